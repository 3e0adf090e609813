"""Policies and engines of optional extras, by where they are to be found, so that nobody imports them in vain.

A place is written as "package.module:name". The extras of this package are entered in ``sb3_pg/__init__.py``, and
your own may be in the same way.
"""

from importlib import import_module
from typing import Any

#: Where a policy is that goes by a name, as in ``PPO("CausalLMPolicy", env)``.
POLICY_PLACES: dict[str, str] = {}

#: Where the engine of a policy is, by where the policy is; subclasses of the policy have it too. It is a class whose
#: constructor takes the policy, see :class:`sb3_pg.common.engines.protocol.Engine`, or a function that makes one.
ENGINE_PLACES: dict[str, str] = {}

#: The same for ``engine="autograd"``, if that of all policies will not do.
AUTOGRAD_PLACES: dict[str, str] = {}

#: Where the rollout buffer of a policy is, by where the policy is: a subclass of ours in ``sb3_pg.common.buffers``.
BUFFER_PLACES: dict[str, str] = {}


def entered_for(policy: type, entered: dict[str, str]) -> Any:
    """Return the class entered for a policy class or its bases, None if there is none."""
    places = (f"{kind.__module__}:{kind.__qualname__}" for kind in policy.__mro__)
    return next((at(entered[place]) for place in places if place in entered), None)


def at(place: str) -> Any:
    """Return what is at a place."""
    module, name = place.split(":")
    return getattr(import_module(module), name)

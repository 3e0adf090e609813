"""Policies and engines of optional extras, by where they are to be found, so that nobody imports them in vain.

A place is written as "package.module:name". The extras of this package are registered in ``sb3_pg/__init__.py``, and
your own may be in the same way.
"""

from importlib import import_module
from typing import Any

#: Where a policy is that goes by a name, as in ``PPO("CausalLMPolicy", env)``.
_policies: dict[str, str] = {}

#: Where the engine of a policy is, by where the policy is. Subclasses of the policy have it too.
_engines: dict[str, str] = {}


def register_policy(name: str, place: str) -> None:
    """Let the algorithms take a policy by its name."""
    _policies[name] = place


def register_engine(policy: str, engine: str) -> None:
    """Let the algorithms act, judge and step with a policy of yours by an engine of its own.

    :param policy: place of the policy's class
    :param engine: place of a class whose constructor takes the policy, see
        :class:`sb3_pg.common.engines.protocol.Engine`
    """
    _engines[policy] = engine


def policy_names() -> list[str]:
    """Return the names of registered policies."""
    return sorted(_policies)


def policy_class(name: str) -> Any:
    """Return the policy class that goes by a registered name, None if there is none."""
    return _at(_policies[name]) if name in _policies else None


def engine_class(policy: type) -> Any:
    """Return the engine class of a policy class, None if none is registered for it or its bases."""
    places = (f"{kind.__module__}:{kind.__qualname__}" for kind in policy.__mro__)
    return next((_at(_engines[place]) for place in places if place in _engines), None)


def _at(place: str) -> Any:
    module, name = place.split(":")
    return getattr(import_module(module), name)

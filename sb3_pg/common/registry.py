"""Policies and engines of optional extras, by where they are to be found, so that nobody imports them in vain.

A place is written as "package.module:name". The extras of this package are entered in ``sb3_pg/__init__.py``, and
your own may be in the same way.
"""

from importlib import import_module
from typing import Any

#: Where a policy is that goes by a name, as in ``PPO("CausalLMPolicy", env)``. Archives may name it.
POLICY_PLACES: dict[str, str] = {}

#: Where our class is that models are made with, by where the one is that users and archives name.
OWN_PLACES: dict[str, str] = {}

#: Where policies are that remember what they have seen; subclasses of theirs do too.
MEMORY_PLACES: set[str] = set()

#: Objects that archives may hold beside those of common/archive/unpickling.py, by where their classes are: where the
#: function is that makes one of its attributes, which come from the file.
MAKER_PLACES: dict[str, str] = {}

#: Where the engine of a policy is, by where the policy is; subclasses of the policy have it too. It is a class whose
#: constructor takes the policy, see :class:`sb3_pg.common.engines.protocol.Engine`, or a function that makes one.
ENGINE_PLACES: dict[str, str] = {}

#: The same for ``engine="autograd"``, if that of all policies will not do.
AUTOGRAD_PLACES: dict[str, str] = {}

#: Files whose code steps an environment named ``env`` by ``model.predict``, without telling it the masks, which it then
#: gets from the environment, see :mod:`sb3_pg.common.masks`.
STEPPERS: set[str] = set()

#: Where the rollout buffer of a policy is, by where the policy is: a subclass of ours in ``sb3_pg.common.buffers``.
BUFFER_PLACES: dict[str, str] = {}

#: Where the default arguments for a policy are, by where the policy is; for its subclasses, too. A function from the
#: algorithm's name and the policy's arguments to a :class:`sb3_pg.common.presets.Preset`.
PRESET_PLACES: dict[str, str] = {}


def entered_for(policy: type, entered: dict[str, str]) -> Any:
    """Return the class entered for a policy class or its bases, None if there is none."""
    places = map(place_of, policy.__mro__)
    return next((at(entered[place]) for place in places if place in entered), None)


def has_memory(policy: type) -> bool:
    """Return whether policies of a class remember what they have seen."""
    return not MEMORY_PLACES.isdisjoint(map(place_of, policy.__mro__))


def place_of(kind: type) -> str:
    """Return where a class is."""
    return f"{kind.__module__}:{kind.__qualname__}"


def at(place: str) -> Any:
    """Return what is at a place."""
    module, name = place.split(":")
    return getattr(import_module(module), name)

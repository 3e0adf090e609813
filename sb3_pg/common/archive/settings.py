"""Which attributes of an object are settings: numbers and texts that only its constructor has assigned.

They are its maker's, also if whoever goes on has made it with others.
"""

import dis
import functools
import types
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.vec_env import VecEnv

#: Whoever uses these may assign any attribute.
_ASSIGN_ANY = frozenset(("setattr", "vars", "__dict__", "__setattr__", "__init__"))

#: The bases of gymnasium, which assign only what they are asked to.
_HARMLESS = frozenset(
    ("gymnasium.core", "gymnasium.utils.ezpickle", "gymnasium.utils.record_constructor", "typing", "abc")
)

#: The flag of types that a ``class`` statement has made (Py_TPFLAGS_HEAPTYPE).
_MADE_BY_CLASS = 1 << 9

#: In place of names: all.
_ANY = frozenset(("*",))


def settings_of(x: Any, others: Iterable[Any]) -> set[str]:
    """Return the names of an object's attributes that are settings.

    :param others: objects that may assign its attributes too, such as its wrappers
    """
    # Vectorised environments only pass values on, and spaces know of nothing else.
    kinds = {type(its) for its in others if not isinstance(its, VecEnv | spaces.Space)}
    kinds = {type(x), *(kind for kind in kinds if kind.__flags__ & _MADE_BY_CLASS)}
    assigned = frozenset[str]().union(*(assigned_by(kind) for kind in kinds))  # type: ignore[arg-type]
    if assigned & _ANY:
        return set()
    return {name for name, its in vars(x).items() if name not in assigned and is_fixed(its)}


def assigned_around(function: types.FunctionType) -> set[str]:
    """Return the variables around a function that it assigns (``nonlocal``), or a function within it."""
    steps = [step for code in _codes(function.__code__, set()) for step in dis.get_instructions(code)]
    return {step.argval for step in steps if step.opname == "STORE_DEREF"} & set(function.__code__.co_freevars)


def is_fixed(x: Any) -> bool:
    """Return whether something cannot change."""
    if isinstance(x, tuple):
        return all(map(is_fixed, x))
    return x is None or isinstance(x, bool | int | float | complex | str | bytes | np.generic)


@functools.lru_cache(maxsize=1024)
def assigned_by(kind: type) -> frozenset[str]:
    """Return the names of attributes that the methods of a class assign, of any object, besides its constructor."""
    found = {"_np_random_seed"}
    for its in kind.__mro__[:-1]:
        if its.__module__ in _HARMLESS:
            continue
        for name, member in vars(its).items():
            if name == "__init__":
                continue
            is_plain = isinstance(member, property | types.GetSetDescriptorType | types.MemberDescriptorType)
            if hasattr(type(member), "__set__") and not is_plain:
                return _ANY  # a descriptor, which keeps its values under any name
            codes = list(_codes(member, set()))
            if callable(member) and not codes and not isinstance(member, type):
                return _ANY  # compiled
            for code in codes:
                if _ASSIGN_ANY.intersection(code.co_names):
                    return _ANY
                found |= {step.argval for step in dis.get_instructions(code) if step.opname == "STORE_ATTR"}
    return frozenset(found)


def _codes(x: Any, seen: set[int]) -> Iterator[types.CodeType]:
    """Return the code of a function, a property and the like, and of functions within, and beside it in its module."""
    if id(x) in seen:
        return
    seen.add(id(x))
    parts: list[Any] = []
    if isinstance(x, types.CodeType):
        yield x
        parts = [its for its in x.co_consts if isinstance(its, types.CodeType)]
    elif isinstance(x, types.FunctionType):
        called = [x.__globals__.get(name) for name in x.__code__.co_names]
        beside = [its for its in called if isinstance(its, types.FunctionType) and its.__module__ == x.__module__]
        parts = [x.__code__, *beside, *(cell.cell_contents for cell in x.__closure__ or () if _is_filled(cell))]
    elif isinstance(x, staticmethod | classmethod):
        parts = [x.__func__]
    elif isinstance(x, property):
        parts = [x.fget, x.fset, x.fdel]
    elif isinstance(x, functools.cached_property):
        parts = [x.func]
    for part in parts:
        yield from _codes(part, seen)


def _is_filled(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False

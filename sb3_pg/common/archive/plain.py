"""Values as plain data, and plain data as values again: what archives say of environments and rollouts.

Plain data are numbers, texts, bytes, arrays, and lists and dictionaries of these with texts as keys. Nothing in them
is a class or a function, so that none runs when they are read. An object is its attributes, written back into the
object of the same class that is found in its place.
"""

import copy
import enum
import hashlib
import random
import sys
import types
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Any, Protocol, TypeAlias, runtime_checkable

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec
from stable_baselines3.common import vec_env
from stable_baselines3.common.monitor import Monitor

from sb3_pg.common.archive.settings import assigned_around, is_fixed, settings_of

Plain: TypeAlias = Any  # recursive, which annotations cannot say

#: Larger arrays are taken for data that do not change: their fingerprint is written in their place.
LARGEST_ARRAY = 1 << 20

#: The same of wrappers around all environments, some of which hold many frames of each, and of rollouts.
LARGEST_OF_ALL = 1 << 28

#: An environment with more than so many numbers, texts and containers is not written down.
LARGEST_STATE = 50_000


class UnstorableError(Exception):
    """Something is not plain data, or plain data do not fit what they are to be written into; says what and where."""


@runtime_checkable
class Stateful(Protocol):
    """An environment that tells its state, such as that of a simulator outside of Python."""

    def get_state(self) -> Any:
        """Return the state: numbers, texts, bytes, arrays, random generators, and lists, tuples and dicts of these."""

    def set_state(self, state: Any) -> None:
        """Go on from a state that ``get_state`` has returned."""


#: What an object has from whoever makes it anew: code, and what only names things. Of methods and functions only that
#: which they belong to.
_GIVEN = (
    types.FunctionType,
    types.ModuleType,
    type,
    np.dtype,
    np.ufunc,
    EnvSpec,
)

#: The same by class, which may not be imported, and what such objects hold that is not written down.
_GIVEN_CLASSES = {"gymnasium.envs.mujoco.mujoco_rendering.MujocoRenderer"}
_IGNORED = {
    Monitor: {"results_writer", "t_start", "episode_returns", "episode_lengths", "episode_times"},
    vec_env.VecMonitor: {"results_writer", "t_start"},
    vec_env.VecEnv: {"class_attributes", "num_envs", "render_mode", "reset_infos", "waiting", "_seeds", "_options"},
    vec_env.VecEnvWrapper: {"venv"},
}

#: What alone is written of some classes.
_CHOSEN = {
    vec_env.VecNormalize: {"obs_rms", "ret_rms", "returns", "old_obs", "old_reward"},
    vec_env.DummyVecEnv: {"envs"},
}

#: Attributes with the arguments that an object was made with, and that follow from its class.
_ARGUMENTS = frozenset(("_saved_kwargs", "_ezpickle_args", "_ezpickle_kwargs"))
_OF_THE_CLASS = frozenset(("spec", "_cached_spec", "metadata", "P"))

#: Objects of these packages are handles of something outside.
_HANDLES = ("multiprocessing", "threading", "socket", "subprocess", "asyncio", "concurrent", "queue", "weakref")

_MUJOCO_MODEL, _MUJOCO_DATA = "mujoco._structs.MjModel", "mujoco._structs.MjData"


#: Where there are subclasses of SB3's vectorised environments, and of gymnasium's TimeLimit, with the same state.
_STAND_INS = ("sb3_pg.common.vec_env.", "rl_zoo3.gym_patches")


def name_of(x: Any) -> str:
    """Return the full name of an object's class, of a stand-in that of the class with the same state."""
    kind = next(kind for kind in type(x).__mro__ if not kind.__module__.startswith(_STAND_INS))
    return f"{kind.__module__}.{kind.__qualname__}"


def fingerprint(data: Any) -> str:
    """Return what tells bytes, or an array's numbers, from others."""
    if isinstance(data, np.ndarray):
        return fingerprint(f"{data.dtype}{data.shape}".encode() + np.ascontiguousarray(data).tobytes())
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def plain(x: Any) -> Plain:
    """Return plain data from which :func:`value` makes an equal value, of arrays copies.

    :raises UnstorableError: there are none
    """
    return Writer().unlimited(x, "it", copies=True)


def value(data: Plain) -> Any:
    """Return what :func:`plain` was given, if that has no objects in it.

    :raises UnstorableError: it has
    """
    reader = Reader()
    found = reader(data, None)
    reader.apply()
    return found


class Writer:
    """Turns values into plain data; what occurs several times is written once.

    :param largest: bytes of an array that is written
    :param most: numbers, texts and containers
    """

    def __init__(self, largest: int = LARGEST_ARRAY, most: int = LARGEST_STATE) -> None:
        self._largest, self._most, self._copies = largest, most, False
        self._seen: dict[int, int] = {}
        self._kept: list[Any] = []  # so that no other object gets the identity of one that is seen
        self._n = 0
        self._above: list[Any] = []  # the objects that those being written are in

    def unlimited(self, x: Any, where: str, copies: bool = False) -> Plain:
        """Write a value that nobody else has, however large.

        :param copies: write arrays without what memory they look at
        """
        before = self._n, self._largest, self._most, self._copies
        self._largest, self._most, self._copies = sys.maxsize, sys.maxsize, copies
        try:
            return self(x, where)
        finally:
            self._n, self._largest, self._most, self._copies = before

    def __call__(self, x: Any, where: str) -> Plain:
        self._n += 1
        if self._n > self._most:
            raise UnstorableError(f"{where}: there is too much of it")
        if x is None or type(x) in (bool, str, bytes, float):
            return x
        if type(x) is int:
            return x if abs(x) < 1 << 53 else {"is": "int", "text": str(x)}
        if isinstance(x, np.generic) and x.dtype.kind in "biufcSU":
            return {"is": "number", "value": np.asarray(x)}
        if _is_given(x) or name_of(x) in _GIVEN_CLASSES:
            return {"is": "given"}
        if id(x) in self._seen:
            return {"is": "same", "as": self._seen[id(x)]}
        number = self._seen[id(x)] = len(self._seen)
        self._kept.append(x)
        return {**self._described(x, where), "number": number}

    def _described(self, x: Any, where: str) -> dict[str, Plain]:
        kind = type(x)
        if kind in (dict, OrderedDict):
            items = [[self(key, where), self(its, f"{where}[{key!r}]")] for key, its in x.items()]
            return {"is": kind.__name__, "items": items}
        if kind in (list, tuple, set, frozenset, deque) or isinstance(x, tuple):
            items = [self(its, f"{where}[{i}]") for i, its in enumerate(x)]
            described = {"is": kind.__name__ if kind.__module__ != "collections" else "deque", "items": items}
            if kind is deque:
                described["maxlen"] = x.maxlen
            elif isinstance(x, tuple) and kind is not tuple:
                described = {"is": "named tuple", "class": name_of(x), "items": items}
            return described
        if kind is np.ndarray:
            return self._array(x, where)
        if kind is th.Tensor and not x.requires_grad:
            return {"is": "tensor", "value": x.detach().cpu().numpy().copy()}
        if isinstance(x, enum.Enum):
            return {"is": "enum", "class": name_of(x), "name": x.name}
        if isinstance(x, types.MethodType | types.BuiltinFunctionType | types.FunctionType):
            return self._function(x, where)
        generator = generator_state(x)
        if generator is not None:
            return {"is": "generator", "class": name_of(x), "state": self(generator, where)}
        if isinstance(x, spaces.Space):
            parts = [self(its, where) for its in _parts_of(x)]
            return {"is": "space", "random": self(x._np_random, where), "parts": parts}
        return self._object(x, where)

    def _function(self, x: Any, where: str) -> dict[str, Plain]:
        """Return what a method is bound to, or the variables around a function that may change."""
        if not isinstance(x, types.FunctionType):
            return {"is": "method", "of": self(x.__self__, f"{where}.__self__")}
        cells = zip(x.__code__.co_freevars, x.__closure__ or (), strict=True)
        parts = {name: self(its.cell_contents, f"{where}: {name}") for name, its in cells if _is_state(x, name, its)}
        return {"is": "function", "cells": parts}

    def _array(self, x: np.ndarray, where: str) -> dict[str, Plain]:
        if x.dtype.hasobject:
            raise UnstorableError(f"{where} is an array of objects")
        if x.nbytes > self._largest:
            return {"is": "fixed", "fingerprint": fingerprint(x)}
        base = x
        while isinstance(base.base, np.ndarray) and not self._copies:
            base = base.base
        if base.base is not None and not self._copies:
            return {"is": "window", "value": x.copy()}
        if base is not x and base.flags.c_contiguous and base.nbytes <= self._largest and type(base) is np.ndarray:
            offset = x.__array_interface__["data"][0] - base.__array_interface__["data"][0]
            shape, strides = list(x.shape), list(x.strides)
            of, dtype = self(base, where), x.dtype.str
            return {"is": "view", "of": of, "dtype": dtype, "offset": offset, "shape": shape, "strides": strides}
        # In the order that they have in memory, by which torch chooses how it convolves images.
        axes = None if x.flags.c_contiguous else sorted(range(x.ndim), key=lambda axis: -abs(x.strides[axis]))
        return {"is": "array", "value": np.array(x if axes is None else x.transpose(axes), order="C"), "axes": axes}

    def _object(self, x: Any, where: str) -> dict[str, Plain]:
        if name_of(x) == _MUJOCO_MODEL:
            return {"is": "model", "fingerprint": _fingerprint_of_model(x)}
        if name_of(x) == _MUJOCO_DATA:
            return {"is": "arrays", "class": name_of(x), "arrays": _arrays_of(x)}
        described: dict[str, Plain] = {"class": name_of(x)}
        its = getattr(x, "__dict__", None)
        if its is None or type(x).__module__.split(".")[0] in _HANDLES:
            raise UnstorableError(f"{where}, a {type(x).__name__}, is not plain data")
        holds_data = any(name_of(part) == _MUJOCO_DATA for part in its.values())
        chosen = next((names for kind, names in _CHOSEN.items() if isinstance(x, kind)), None)
        if issubclass(type(x), Stateful) and not holds_data:
            described |= {"is": "stateful", "state": self.unlimited(x.get_state(), f"{where}.get_state()")}
            names = its.keys() & ({"env"} if isinstance(x, gym.Wrapper) else {"_np_random"})
        elif chosen is not None:
            described |= {"is": "object", "arguments": ""}
            names = its.keys() & chosen
        else:
            if not holds_data and _pickles_in_its_own_way(x):
                raise UnstorableError(f"{where}, a {type(x).__name__}, has more to it than its attributes")
            described |= {"is": "object", "arguments": _arguments(x)}
            ignored = [names for kind, names in _IGNORED.items() if isinstance(x, kind)]
            beside = [part for above in self._above for part in vars(above).values()]  # such as what moves x
            settings = settings_of(x, (*self._above, *beside, *its.values()))
            names = its.keys() - _OF_THE_CLASS.union(_ARGUMENTS, settings, *ignored)
        names = sorted(name for name in names if not name.startswith("__"))
        self._above.append(x)
        attributes = {name: self(its[name], f"{where}.{name}") for name in names}
        self._above.pop()
        return {**described, "attributes": attributes}


class Reader:
    """Turns plain data into values. What is to be changed in objects that there are waits for :meth:`apply`."""

    def __init__(self) -> None:
        self._found: dict[int, Any] = {}
        self._changes: list[Callable[[], Any]] = []

    def apply(self) -> None:
        """Make the changes."""
        for change in self._changes:
            change()

    def __call__(self, data: Plain, there: Any, where: str = "it") -> Any:
        """Return the value.

        :param data: made by :func:`plain`
        :param there: what is in its place now
        :param where: its name, for the message
        :raises UnstorableError: the data do not fit what is there
        """
        if not isinstance(data, dict):
            return data
        kind = data["is"]
        if kind == "int":
            return int(data["text"])
        if kind == "number":
            return data["value"][()]
        if kind == "given":
            return there
        if kind == "same":
            return self._found[data["as"]]
        self._found[data["number"]] = there
        found = self._found[data["number"]] = _READERS[kind](self, data, there, where)
        return found

    def later(self, change: Callable[[], Any]) -> None:
        """Make a change with the others."""
        self._changes.append(change)

    def items(self, data: Plain, there: Any, where: str) -> list[Any]:
        """Return the values in a list or the like."""
        old = list(there) if isinstance(there, list | tuple | deque) else []
        old += [None] * (len(data["items"]) - len(old))
        items = zip(data["items"], old, strict=False)
        return [self(its, before, f"{where}[{i}]") for i, (its, before) in enumerate(items)]


def _read_dict(reader: Reader, data: Plain, there: Any, where: str) -> Any:
    new: Any = OrderedDict() if data["is"] == "OrderedDict" else {}
    for key_data, its in data["items"]:
        key = reader(key_data, None, where)
        new[key] = reader(its, there.get(key) if isinstance(there, dict) else None, f"{where}[{key!r}]")
    return new


def _read_items(reader: Reader, data: Plain, there: Any, where: str) -> Any:
    items = reader.items(data, there, where)
    if data["is"] == "deque":
        return deque(items, maxlen=data["maxlen"])
    if data["is"] == "named tuple":
        return _same_class(data, there, where)(*items)
    return {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}[data["is"]](items)


def _read_array(reader: Reader, data: Plain, there: Any, where: str) -> Any:
    axes = data.get("axes")
    return np.array(data["value"] if axes is None else data["value"].transpose(np.argsort(axes)))


def _read_view(reader: Reader, data: Plain, there: Any, where: str) -> Any:
    of = reader(data["of"], None, where)
    return np.ndarray(data["shape"], np.dtype(data["dtype"]), of, data["offset"], data["strides"])


def _read_window(reader: Reader, data: Plain, there: Any, where: str) -> Any:
    """Write into memory of somebody else's, which stays where it is."""
    new = data["value"]
    if type(there) is not np.ndarray or there.shape != new.shape or there.dtype != new.dtype:
        raise UnstorableError(f"{where} is not an array of {new.dtype} {new.shape}")
    reader.later(lambda: np.copyto(there, new))
    return there


def _read_fixed(reader: Reader, data: Plain, there: Any, where: str) -> Any:
    if type(there) is not np.ndarray or fingerprint(there) != data["fingerprint"]:
        raise UnstorableError(f"{where} is not the array that it was, which was too large for the archive")
    return there


def _read_tensor(reader: Reader, data: Plain, there: Any, where: str) -> Any:
    device = there.device if isinstance(there, th.Tensor) else "cpu"
    return th.from_numpy(data["value"].copy()).to(device)


def _read_enum(reader: Reader, data: Plain, there: Any, where: str) -> Any:
    return _same_class(data, there, where)[data["name"]]


def _read_generator(reader: Reader, data: Plain, there: Any, where: str) -> Any:
    state = reader(data["state"], None, where)
    generator = there if name_of(there) == data["class"] and _is_like(there, state) else _new_generator(data, state)
    reader.later(lambda: set_generator_state(generator, state))
    return generator


def _read_space(reader: Reader, data: Plain, there: Any, where: str) -> Any:
    if not isinstance(there, spaces.Space):
        raise UnstorableError(f"{where} is not a space")
    drawn = reader(data["random"], there._np_random, where)
    reader.later(lambda: setattr(there, "_np_random", drawn))
    for its, part in zip(data["parts"], _parts_of(there), strict=True):
        reader(its, part, where)
    return there


def _read_method(reader: Reader, data: Plain, there: Any, where: str) -> Any:
    """Let the object that a method is bound to go on."""
    if not isinstance(there, types.MethodType | types.BuiltinFunctionType):
        raise UnstorableError(f"{where} is not a method")
    reader(data["of"], there.__self__, f"{where}.__self__")
    return there


def _read_function(reader: Reader, data: Plain, there: Any, where: str) -> Any:
    """Let the variables around a function go on."""
    if not isinstance(there, types.FunctionType) or data["cells"].keys() - set(there.__code__.co_freevars):
        raise UnstorableError(f"{where} is not the function that it was")
    for name, cell in zip(there.__code__.co_freevars, there.__closure__ or (), strict=True):
        if name in data["cells"]:
            new = reader(data["cells"][name], cell.cell_contents, f"{where}: {name}")
            reader.later(lambda cell=cell, new=new: setattr(cell, "cell_contents", new))  # type: ignore[misc]
    return there


def _read_model(reader: Reader, data: Plain, there: Any, where: str) -> Any:
    if name_of(there) != _MUJOCO_MODEL or _fingerprint_of_model(there) != data["fingerprint"]:
        raise UnstorableError(f"{where} is not the model that it was")
    return there


def _read_arrays(reader: Reader, data: Plain, there: Any, where: str) -> Any:
    _same_class(data, there, where)
    reader.later(lambda: _set_arrays(there, data["arrays"]))
    return there


def _read_object(reader: Reader, data: Plain, there: Any, where: str) -> Any:
    _same_class(data, there, where)
    if data["is"] == "stateful":
        state = reader(data["state"], None, where)
        reader.later(lambda: there.set_state(state))
    elif data["arguments"] and data["arguments"] != _arguments(there):
        raise UnstorableError(f"{where}, a {type(there).__name__}, was made with other arguments")
    for name, its in data["attributes"].items():
        new = reader(its, there.__dict__.get(name), f"{where}.{name}")
        if its != {"is": "given"} and not name.startswith("__"):
            reader.later(lambda name=name, new=new: there.__dict__.update({name: new}))  # type: ignore[misc]
    return there


_READERS: dict[str, Callable[[Reader, Plain, Any, str], Any]] = {
    **dict.fromkeys(("dict", "OrderedDict"), _read_dict),
    **dict.fromkeys(("list", "tuple", "set", "frozenset", "deque", "named tuple"), _read_items),
    **dict.fromkeys(("object", "stateful"), _read_object),
    "array": _read_array,
    "view": _read_view,
    "window": _read_window,
    "fixed": _read_fixed,
    "tensor": _read_tensor,
    "enum": _read_enum,
    "generator": _read_generator,
    "space": _read_space,
    "method": _read_method,
    "function": _read_function,
    "model": _read_model,
    "arrays": _read_arrays,
}


def _is_given(x: Any) -> bool:
    """Return whether something has no state: code, and what only names things."""
    if isinstance(x, types.MethodType | types.BuiltinFunctionType):
        return x.__self__ is None or isinstance(x.__self__, type | types.ModuleType)
    return isinstance(x, _GIVEN) and not (isinstance(x, types.FunctionType) and x.__closure__)


def _is_state(function: types.FunctionType, name: str, cell: types.CellType) -> bool:
    """Return whether a variable around a function may change: numbers and texts only if the function assigns them."""
    try:
        content = cell.cell_contents
    except ValueError:  # it has none yet
        return False
    return not is_fixed(content) or name in assigned_around(function)


def _parts_of(space: spaces.Space[Any]) -> list[spaces.Space[Any]]:
    if isinstance(space, spaces.Dict):
        return list(space.spaces.values())
    return list(space.spaces) if isinstance(space, spaces.Tuple | spaces.OneOf) else []


def _same_class(data: Plain, there: Any, where: str) -> Any:
    if name_of(there) != data["class"]:
        raise UnstorableError(f"{where} is a {name_of(there)}, but was a {data['class']}")
    return type(there)


def _pickles_in_its_own_way(x: Any) -> bool:
    """Return whether a class says that its state is not simply its attributes."""
    kinds = [vars(kind) for kind in type(x).__mro__ if kind is not object]
    if any({"__getstate__", "__reduce__", "__reduce_ex__"} & its.keys() or its.get("__slots__") for its in kinds):
        return True
    try:
        object.__reduce_ex__(x, 2)
    except TypeError:
        return True  # there is something of C in it
    return False


def _arguments(x: Any) -> str:
    """Return the fingerprint of the arguments with which an object was made, as far as it remembers them.

    How it is shown does not count: SB3 makes an environment from its id with ``render_mode="rgb_array"``.
    """
    its = {name: x.__dict__[name] for name in sorted(_ARGUMENTS & x.__dict__.keys())}
    shown = x.__dict__.get("render_mode")
    if "_ezpickle_args" in its:
        its["_ezpickle_args"] = [None if arg == shown and type(arg) is str else arg for arg in its["_ezpickle_args"]]
    if isinstance(x.__dict__.get("spec"), EnvSpec):
        its["spec"] = [x.spec.id, x.spec.kwargs, x.spec.max_episode_steps]
    return fingerprint(_as_text(its).encode())


def _as_text(x: Any) -> str:
    """Return plain values as text; of any other its class."""
    if isinstance(x, dict):
        return "{" + ",".join(f"{key}:{_as_text(its)}" for key, its in x.items() if key != "render_mode") + "}"
    if isinstance(x, list | tuple):
        return "[" + ",".join(map(_as_text, x)) + "]"
    if isinstance(x, np.ndarray | np.generic) and not x.dtype.hasobject:
        return fingerprint(np.asarray(x))
    return repr(x) if x is None or isinstance(x, bool | int | float | str | bytes) else name_of(x)


# ------------------------------------------------------------------ generators

_BITS = {
    kind.__name__: kind
    for kind in (np.random.PCG64, np.random.PCG64DXSM, np.random.MT19937, np.random.Philox, np.random.SFC64)
}


def generator_state(x: Any) -> Any:
    """Return the state of a random generator; None for anything else."""
    if isinstance(x, np.random.Generator):
        return copy.deepcopy(x.bit_generator.state)
    if isinstance(x, np.random.RandomState):
        return x.get_state(legacy=False)
    if isinstance(x, random.Random):
        version, words, gauss = x.getstate()
        return {"version": version, "words": np.array(words, np.uint64), "gauss": gauss}
    if isinstance(x, th.Generator):
        return {"bytes": x.get_state().numpy()}
    return None


def set_generator_state(generator: Any, state: Any) -> None:
    """Let a random generator go on from a state."""
    if isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    elif isinstance(generator, np.random.RandomState):
        generator.set_state(state)
    elif isinstance(generator, random.Random):
        generator.setstate((state["version"], tuple(state["words"].tolist()), state["gauss"]))
    else:
        generator.set_state(th.from_numpy(state["bytes"].copy()))


def _is_like(generator: Any, state: Any) -> bool:
    own = generator_state(generator)
    return own is not None and own.get("bit_generator") == state.get("bit_generator")


def _new_generator(data: Plain, state: Any) -> Any:
    if "bit_generator" in state:
        bits = _BITS[state["bit_generator"]](0)
        return np.random.RandomState(bits) if data["class"].endswith("RandomState") else np.random.Generator(bits)
    return random.Random() if "words" in state else th.Generator()


# ---------------------------------------------------------------------- MuJoCo


def _fingerprint_of_model(model: Any) -> str:
    """Return the fingerprint of a MuJoCo model, which environments may change too."""
    import mujoco  # type: ignore[import-untyped]

    buffer = np.zeros(mujoco.mj_sizeModel(model), np.uint8)
    mujoco.mj_saveModel(model, None, buffer)
    return fingerprint(buffer)


def _arrays_of(data: Any) -> dict[str, np.ndarray]:
    """Return what a MuJoCo simulation goes on from, and all arrays derived from it.

    Environments read positions that the last step has left, which are those before its integration.
    """
    import mujoco

    model, kind = data.model, mujoco.mjtState.mjSTATE_INTEGRATION
    state = np.zeros(mujoco.mj_stateSize(model, kind))
    mujoco.mj_getState(model, data, state, kind)
    names = [name for name in dir(data) if not name.startswith("_") and isinstance(getattr(data, name), np.ndarray)]
    return {"": state, **{name: getattr(data, name).copy() for name in names}}


def _set_arrays(data: Any, arrays: dict[str, np.ndarray]) -> None:
    import mujoco

    for name, its in arrays.items():
        # Of contacts there may be more or fewer: they are made anew.
        if name and getattr(data, name).shape == its.shape:
            getattr(data, name)[...] = its
    mujoco.mj_setState(data.model, data, arrays[""], mujoco.mjtState.mjSTATE_INTEGRATION)

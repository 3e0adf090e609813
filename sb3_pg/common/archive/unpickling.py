"""Objects from pickles, without running anything that is in them.

What may be in a file is listed here, by exact module and name: classes, which are only looked up, and objects, each
with a function of ours that makes it from numbers, texts and arrays after looking at them.
"""

import re
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.utils import ConstantSchedule, FloatSchedule, LinearSchedule

from sb3_pg.common.archive.pickles import Call, Elsewhere, Name, UnreadableError, read
from sb3_pg.common.registry import MAKER_PLACES, POLICY_PLACES, at


class ForeignError(ValueError):
    """A file names what is not known to be harmless."""


def _names(module: str, names: str) -> Iterator[Name]:
    return (Name(module, name) for name in names.split())


#: Of torch.
_OPTIMIZERS = ("Adadelta", "Adagrad", "Adam", "Adamax", "AdamW", "ASGD", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD")

#: Classes that a file may name, beside the policies of ``POLICY_PLACES``: policies and what they are made of. They are
#: called later, with arguments from the file, so nothing may be listed here that could do harm then.
CLASSES: frozenset[Name] = frozenset(
    [
        *_names(
            "stable_baselines3.common.policies",
            "ActorCriticPolicy ActorCriticCnnPolicy MultiInputActorCriticPolicy",
        ),
        *_names("stable_baselines3.common.torch_layers", "FlattenExtractor NatureCNN CombinedExtractor"),
        *_names("stable_baselines3.common.buffers", "RolloutBuffer DictRolloutBuffer"),
        *_names("stable_baselines3.common.sb2_compat.rmsprop_tf_like", "RMSpropTFLike"),
        *_names(
            "sb3_contrib.common.maskable.policies",
            "MaskableActorCriticPolicy MaskableActorCriticCnnPolicy MaskableMultiInputActorCriticPolicy",
        ),
        *_names("sb3_contrib.common.maskable.buffers", "MaskableRolloutBuffer MaskableDictRolloutBuffer"),
        *_names(
            "sb3_contrib.common.recurrent.policies",
            "RecurrentActorCriticPolicy RecurrentActorCriticCnnPolicy RecurrentMultiInputActorCriticPolicy",
        ),
        *_names("sb3_contrib.common.recurrent.buffers", "RecurrentRolloutBuffer RecurrentDictRolloutBuffer"),
        *_names("sb3_pg.common.policies", "QuickMlpPolicy SavedCnnPolicy SavedMultiInputPolicy"),
        *_names(
            "sb3_pg.recurrent",
            "QuickActorCriticLstmPolicy QuickActorCriticCnnLstmPolicy QuickMultiInputActorCriticLstmPolicy",
        ),
        *_names("sb3_pg.common.buffers", "RolloutBuffer"),
        *_names(
            "torch.nn.modules.activation",
            "CELU ELU GELU GLU Hardshrink Hardsigmoid Hardswish Hardtanh LeakyReLU LogSigmoid Mish PReLU RReLU ReLU "
            "ReLU6 SELU Sigmoid SiLU Softplus Softshrink Softsign Tanh Tanhshrink",
        ),
        *_names("torch.nn.modules.linear", "Identity"),
        *(Name(f"torch.optim.{name.lower()}", name) for name in _OPTIMIZERS),
        *_names("torch.optim", "Adafactor"),
        *_names("torch", "float16 bfloat16 float32 float64"),
        *_names("numpy", "ndarray bool bool_ int8 int16 int32 int64 uint8 uint16 uint32 uint64"),
        *_names("numpy", "float16 float32 float64"),
        *_names("numpy.random._pcg64", "PCG64 PCG64DXSM"),
        *_names("numpy.random._mt19937", "MT19937"),
        *_names("numpy.random._philox", "Philox"),
        *_names("numpy.random._sfc64", "SFC64"),
        *_names("numpy.random.bit_generator", "SeedSequence"),
        *_names("numpy.random._bit_generator", "SeedSequence"),
    ]
)


def unpickle(pickle: bytes) -> Any:
    """Return the object that a pickle holds, if all that it names is known.

    :raises ForeignError: naming what is not
    :raises UnreadableError: the pickle is not whole
    """
    tree, _ = read(pickle)
    return Builder(len(pickle), MAKERS).build(tree)


class Builder:
    """Makes the objects of what :func:`sb3_pg.common.archive.pickles.read` returns.

    :param size: bytes of the file. What is repeated so often that there would be many more objects is refused
    :param makers: of objects
    :param elsewhere: returns what lies outside the pickle, by its key
    """

    def __init__(
        self,
        size: int,
        makers: Mapping[Name, Callable[[Call], Any]],
        elsewhere: Callable[[Any], Any] | None = None,
    ) -> None:
        self.left = 100 * size + 1000
        self.makers = makers
        self.elsewhere = elsewhere
        self.made: dict[int, Any] = {}

    def build(self, tree: Any) -> Any:
        """Return the object that a tree stands for.

        :raises ForeignError: naming what is not known
        :raises UnreadableError: what is known has arguments that it cannot have
        """
        try:
            return self._build(tree)
        except RecursionError:
            raise UnreadableError("the pickle is nested too deeply") from None

    def _build(self, tree: Any) -> Any:
        self.left -= 1
        if self.left < 0:
            raise UnreadableError("the pickle repeats itself too often")
        if isinstance(tree, Name):
            return known_class(tree)
        if isinstance(tree, Call):
            if id(tree) not in self.made:
                self.made[id(tree)] = self._make(tree)
            return self.made[id(tree)]
        if isinstance(tree, Elsewhere) and self.elsewhere is not None:
            return self.elsewhere(tree.key)
        if isinstance(tree, dict):
            return {self._build(key): self._build(value) for key, value in tree.items()}
        if isinstance(tree, list | tuple | set | frozenset):
            return type(tree)(self._build(x) for x in tree)
        if isinstance(tree, Elsewhere):
            raise UnreadableError("the pickle needs what is not in it")
        return tree

    def _make(self, call: Call) -> Any:
        function = call.function
        if _makes_function(function):
            return _schedule_of_closure(call)
        if function == Name("builtins", "getattr"):
            owner, attribute = call.arguments  # so that protocol 2 can name what is in a class
            return known_class(Name(owner.module, f"{owner.name}.{attribute}"))
        make = self.makers.get(function) if isinstance(function, Name) else None
        if make is None and isinstance(function, Name) and _place(function) in MAKER_PLACES:
            make = _registered(MAKER_PLACES[_place(function)])
        if make is None:
            raise ForeignError(_described(call))
        arguments, keywords = self._build(call.arguments), self._build(call.keywords)
        state, items, pairs = self._build(call.state), self._build(call.items), self._build(call.pairs)
        try:
            return make(Call(function, arguments, keywords, state, items, pairs))
        except (TypeError, ValueError, KeyError, IndexError, AttributeError, AssertionError, OverflowError) as error:
            raise UnreadableError(f"{function} cannot be made: {type(error).__name__}: {error}") from error


#: What SB3 names in place of a policy's schedule, by its name within its class.
_DUMMY_SCHEDULE = Name("stable_baselines3.common.policies", "BasePolicy._dummy_schedule")


def _place(name: Name) -> str:
    return f"{name.module}:{name.name}"


def known_class(name: Name) -> Any:
    """Return the class or function of a name that archives may hold.

    :raises ForeignError: it is none of those that are known to do no harm, or is not installed
    """
    if name == _DUMMY_SCHEDULE:
        return BasePolicy._dummy_schedule
    if name not in CLASSES and _place(name) not in POLICY_PLACES.values():
        raise ForeignError(str(name))
    try:
        return getattr(import_module(name.module), name.name)
    except (ImportError, AttributeError) as error:
        raise ForeignError(f"{name}, which is not installed ({error})") from error


# ------------------------------------------------------------------------------------------------- Python and NumPy


def _text_as_bytes(call: Call) -> bytes:
    text, encoding = call.arguments
    if encoding != "latin1":
        raise ValueError(f"encoding {encoding!r}")
    return bytes(text, encoding)


def _bytes(call: Call) -> bytes:
    if any(not isinstance(x, bytes) for x in call.arguments):  # bytes(10**12) would be large
        raise TypeError("bytes of what are none")
    return b"".join(call.arguments)


def _collection(kind: Callable[..., Any]) -> Callable[[Call], Any]:
    def make(call: Call) -> Any:
        items = list(call.arguments[0]) if call.arguments else []
        return kind([*items, *call.items, *call.pairs])

    return make


def _deque(call: Call) -> deque[Any]:
    items, longest = (*call.arguments, (), None)[:2] if call.arguments else ((), None)
    return deque([*items, *call.items], longest)


def _path(call: Call) -> Path:
    return Path(*call.arguments)


def _dtype(call: Call) -> np.dtype[Any]:
    code, order = call.arguments[0], call.state[1] if call.state else "|"
    if not re.fullmatch(r"[?biufcSUV]\d*", code) or order not in ("<", ">", "|", "=") or (call.state or (3,) * 5)[3]:
        raise ValueError(f"numbers of type {code!r}")
    dtype: np.dtype[Any] = np.dtype(code).newbyteorder(order)
    return dtype


def _array(buffer: Any, dtype: Any, shape: Any, order: str, axes: Any = None) -> np.ndarray:
    """Return an array that is as large as its numbers.

    :param order: "C" or "F"; with "K" the numbers are in C's and ``axes`` then come in another order (NumPy 2.4)
    """
    if not isinstance(dtype, np.dtype) or not isinstance(buffer, bytes | bytearray):
        raise TypeError("an array of what are no numbers")
    shape = tuple(map(int, shape)) if isinstance(shape, tuple | list) else (int(shape),)
    size = dtype.itemsize
    for n in shape:
        size *= n
    if size != len(buffer) or min(shape, default=0) < 0:
        raise ValueError(f"{len(buffer)} bytes for an array of shape {shape} and type {dtype}")
    found: np.ndarray = np.ndarray(shape, dtype, buffer, order="F" if order == "F" else "C")
    return (found if axes is None else found.transpose(axes)).copy(order="K")


def _array_from_buffer(call: Call) -> np.ndarray:
    return _array(*call.arguments)


def _array_from_state(call: Call) -> np.ndarray:
    if call.arguments[0] is not np.ndarray:
        raise TypeError(f"an array of class {call.arguments[0]}")
    shape, dtype, is_fortran, buffer = call.state[-4:]
    return _array(buffer, dtype, shape, "F" if is_fortran else "C")


def _scalar(call: Call) -> Any:
    dtype, number = call.arguments
    return _array(number, dtype, (), "C")[()]


#: NumPy's sources of random bits.
_BIT_GENERATORS = {name: getattr(np.random, name) for name in ("MT19937", "PCG64", "PCG64DXSM", "Philox", "SFC64")}


def _bit_generator(call: Call) -> Any:
    kind = call.arguments[0] if call.arguments else "MT19937"
    made: Any = _BIT_GENERATORS[getattr(kind, "__name__", kind)]()
    if call.state is not None:
        made.state = call.state[0] if isinstance(call.state, tuple) else call.state
    return made


def _generator(kind: Callable[[Any], Any]) -> Callable[[Call], Any]:
    def make(call: Call) -> Any:
        source: Any = call.arguments[0] if call.arguments else "MT19937"
        if isinstance(source, str):
            source = _BIT_GENERATORS[source]()
        if not isinstance(source, tuple(_BIT_GENERATORS.values())):
            raise TypeError("no source of random bits")
        made: Any = kind(source)
        if isinstance(call.state, dict) and isinstance(made, np.random.RandomState):
            made.set_state(call.state)
        elif isinstance(call.state, dict):
            made.bit_generator.state = call.state
        return made

    return make


def _forgotten(call: Call) -> None:
    """Of a seed, which nothing asks for once its generator has a state."""


# ----------------------------------------------------------------------------------------- Gymnasium's and SB3's


def _space(make: Callable[[dict[str, Any]], spaces.Space[Any]]) -> Callable[[Call], spaces.Space[Any]]:
    """Return what makes a space from its attributes, with the state of its generator."""

    def made(call: Call) -> spaces.Space[Any]:
        state = dict(call.state)
        return _with_generator(make(state), state)

    return made


def _with_generator(space: spaces.Space[Any], state: dict[str, Any]) -> spaces.Space[Any]:
    generator = state.get("_np_random", state.get("np_random"))
    if isinstance(generator, np.random.Generator):
        space._np_random = generator
    return space


def _registered(place: str) -> Callable[[Call], Any]:
    """Return what makes an object that another package of ours has entered, from its attributes."""

    def made(call: Call) -> Any:
        state = dict(call.state)
        found = at(place)(state)
        return _with_generator(found, state) if isinstance(found, spaces.Space) else found

    return made


def _box(state: dict[str, Any]) -> spaces.Box:
    low, high = (np.asarray(state[name]) for name in ("low", "high"))
    space = spaces.Box(low, high, dtype=state["dtype"])
    if space.shape != tuple(state.get("_shape", space.shape)):
        raise ValueError(f"shape {state['_shape']} with limits of shape {space.shape}")
    for name in ("bounded_below", "bounded_above"):  # of integers, not to be told from the limits
        mask = state.get(name)
        if isinstance(mask, np.ndarray) and mask.dtype == bool and mask.shape == space.shape:
            setattr(space, name, mask)
    return space


def _discrete(state: dict[str, Any]) -> spaces.Discrete:
    return spaces.Discrete(int(state["n"]), start=int(state.get("start", 0)), **_own_dtype(state))


def _multi_discrete(state: dict[str, Any]) -> spaces.MultiDiscrete:
    return spaces.MultiDiscrete(np.asarray(state["nvec"]), start=state.get("start"), **_own_dtype(state))


def _own_dtype(state: dict[str, Any]) -> dict[str, Any]:
    dtype = state.get("dtype")
    return {} if dtype is None or np.dtype(dtype).kind not in "iu" else {"dtype": np.dtype(dtype).type}


def _multi_binary(state: dict[str, Any]) -> spaces.MultiBinary:
    n = state["n"]
    return spaces.MultiBinary(int(n) if np.ndim(n) == 0 else [int(x) for x in n])


def _dict_space(state: dict[str, Any]) -> spaces.Dict:
    return spaces.Dict(OrderedDict(state["spaces"]))


def _tuple_space(state: dict[str, Any]) -> spaces.Tuple[Any]:
    return spaces.Tuple(state["spaces"])


def _with_attributes(kind: Any, **checks: Callable[[Any], Any]) -> Callable[[Call], Any]:
    """Return what makes an object that has these attributes, each as its function returns it, and no others."""

    def make(call: Call) -> Any:
        made = kind.__new__(kind)
        made.__dict__.update({name: check(call.state[name]) for name, check in checks.items()})
        return made

    return make


def _schedule(x: Any) -> Any:
    if not isinstance(x, float | int | FloatSchedule | ConstantSchedule | LinearSchedule) and not (
        type(x).__module__ == "rl_zoo3.utils"
    ):
        raise TypeError(f"{x!r} is no schedule")
    return x


def _simple_linear_schedule(call: Call) -> Any:
    try:
        from rl_zoo3.utils import SimpleLinearSchedule
    except ImportError as error:
        raise ForeignError("rl_zoo3.utils.SimpleLinearSchedule, which is not installed") from error
    return SimpleLinearSchedule(float(call.state["initial_value"]))


def _described(call: Call) -> str:
    """Return how to name what a pickle would call."""
    attributes = call.state[1] if isinstance(call.state, tuple) and len(call.state) == 2 else {}
    name = attributes.get("__qualname__") if isinstance(attributes, dict) else None
    if name:
        return f"the code of the function {name}"
    function = call.function
    while isinstance(function, Call):  # what another call returns
        function = function.function
    is_code = not isinstance(function, Name) or function.module.startswith("cloudpickle")
    return "the code of a class or function" if is_code else str(function)


def _makes_function(function: Any) -> bool:
    """Return whether this is what cloudpickle makes a function with."""
    if isinstance(function, Call):  # its older versions: the type of functions, from its name
        return isinstance(function.function, Name) and function.arguments == ("FunctionType",)
    return isinstance(function, Name) and function.name == "_make_function"


def _schedule_of_closure(call: Call) -> Any:
    """Return the schedule that a function of SB3's or rl-zoo's was for in older versions.

    It was a function within a function, which is saved as code. Its name says what it does, and with which numbers
    is in its closure; the code itself is not read.

    :raises ForeignError: it is another function
    """
    try:
        attributes, code = call.state[1], call.arguments[0].arguments
        cells = [cell.arguments[0] for cell in attributes["__closure__"] or ()]
        free = next(x for x in code[-2:] if isinstance(x, tuple) and len(x) == len(cells))
    except (TypeError, IndexError, KeyError, AttributeError, StopIteration):
        raise ForeignError(_described(call)) from None
    match (attributes.get("__module__"), attributes.get("__qualname__"), dict(zip(free, cells, strict=True))):
        case ("stable_baselines3.common.utils", "constant_fn.<locals>.func", {"val": float(value)}):
            return ConstantSchedule(value)
        case (
            "stable_baselines3.common.utils",
            "get_linear_fn.<locals>.func",
            {"start": float() | int() as start, "end": float() | int() as end, "end_fraction": float() | int() as part},
        ):
            return LinearSchedule(start, end, part)
        case (
            "stable_baselines3.common.utils",
            "get_schedule_fn.<locals>.<lambda>",
            {"value_schedule": Call() as inner},
        ) if _makes_function(inner.function):
            return FloatSchedule(_schedule_of_closure(inner))
        case (
            "rl_zoo3.utils" | "utils.utils",
            "linear_schedule.<locals>.func",
            {"initial_value": float(value)} | {"initial_value_": float(value)},
        ):
            return LinearSchedule(value, 0.0, 1.0)
    raise ForeignError(_described(call))


def _float(x: Any) -> float:
    return float(x)


def _statistic(x: Any) -> Any:
    if not isinstance(x, np.ndarray | np.generic | float | int):
        raise TypeError(f"{type(x).__name__} is no statistic")
    return x


_UTILS = "stable_baselines3.common.utils"

#: Objects that a file may hold, and what makes them.
MAKERS: dict[Name, Callable[[Call], Any]] = {
    Name("_codecs", "encode"): _text_as_bytes,
    Name("collections", "deque"): _deque,
    Name("collections", "OrderedDict"): _collection(OrderedDict),
    Name("builtins", "bytes"): _bytes,
    Name("builtins", "bytearray"): lambda call: bytearray(_bytes(call)),
    Name("builtins", "complex"): lambda call: complex(*call.arguments),
    Name("builtins", "frozenset"): _collection(frozenset),
    Name("builtins", "set"): _collection(set),
    **{
        Name(module, name): _path
        for module in ("pathlib", "pathlib._local")
        for name in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")
    },
    Name("numpy", "dtype"): _dtype,
    **{
        Name(f"numpy.{core}.{module}", name): make
        for core in ("core", "_core")
        for module, name, make in (
            ("numeric", "_frombuffer", _array_from_buffer),
            ("multiarray", "_reconstruct", _array_from_state),
            ("multiarray", "scalar", _scalar),
        )
    },
    Name("numpy.random._pickle", "__bit_generator_ctor"): _bit_generator,
    Name("numpy.random._pickle", "__generator_ctor"): _generator(np.random.Generator),
    Name("numpy.random._pickle", "__randomstate_ctor"): _generator(np.random.RandomState),
    Name("numpy.random.bit_generator", "__pyx_unpickle_SeedSequence"): _forgotten,
    Name("numpy.random._bit_generator", "__pyx_unpickle_SeedSequence"): _forgotten,
    Name("gymnasium.spaces.box", "Box"): _space(_box),
    Name("gymnasium.spaces.discrete", "Discrete"): _space(_discrete),
    Name("gymnasium.spaces.multi_discrete", "MultiDiscrete"): _space(_multi_discrete),
    Name("gymnasium.spaces.multi_binary", "MultiBinary"): _space(_multi_binary),
    Name("gymnasium.spaces.dict", "Dict"): _space(_dict_space),
    Name("gymnasium.spaces.tuple", "Tuple"): _space(_tuple_space),
    Name("stable_baselines3.common.running_mean_std", "RunningMeanStd"): _with_attributes(
        RunningMeanStd, mean=_statistic, var=_statistic, count=_statistic
    ),
    Name(_UTILS, "FloatSchedule"): _with_attributes(FloatSchedule, value_schedule=_schedule),
    Name(_UTILS, "ConstantSchedule"): _with_attributes(ConstantSchedule, val=_float),
    Name(_UTILS, "LinearSchedule"): _with_attributes(LinearSchedule, start=_float, end=_float, end_fraction=_float),
    Name("rl_zoo3.utils", "SimpleLinearSchedule"): _simple_linear_schedule,
    Name("torch", "device"): lambda call: th.device(*call.arguments),
    Name("torch", "Size"): lambda call: th.Size(*call.arguments),
}

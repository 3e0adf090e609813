"""What archives of SB3 and ours hold is read without running anything; what is not known is refused by name."""

import collections
import functools
import io
import operator
import os
import pathlib
import pickle
import subprocess
import sys
import zipfile

import cloudpickle
import numpy as np
import pytest
import torch as th
from conftest import ACTION_SPACES, OBSERVATION_SPACES
from gymnasium import spaces
from sb3_contrib.common.maskable.policies import MaskableActorCriticPolicy
from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy
from stable_baselines3.common import utils
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.torch_layers import NatureCNN
from stable_baselines3.common.utils import ConstantSchedule, FloatSchedule, LinearSchedule

from sb3_pg.common.archive.pickles import UnreadableError
from sb3_pg.common.archive.tensors import read_tensors
from sb3_pg.common.archive.unpickling import ForeignError, unpickle
from sb3_pg.text.spaces import Vocabulary, text_space

PROTOCOLS = pytest.mark.parametrize("protocol", [2, 3, 4, 5])


def both(x, protocol):
    """What we make of a pickle, and what Python does."""
    pickled = cloudpickle.dumps(x, protocol=protocol)
    return unpickle(pickled), pickle.loads(pickled)


PLAIN = [
    None,
    {"a": [1, 2.5, True, (), {"b": ("x", b"y", -(10**30))}]},
    {"n": {1, 2}, "f": frozenset("ab"), "z": 1 + 2j, "b": bytearray(b"xy"), "e": b""},
    collections.deque([1, 2, 3], maxlen=100),
    collections.deque(),
    collections.OrderedDict(b=1, a=2),
    pathlib.Path("runs") / "x",
    th.nn.Tanh,
    th.optim.Adam,
    ActorCriticPolicy,
    MaskableActorCriticPolicy,
    RecurrentActorCriticPolicy,
    NatureCNN,
    th.float32,
    np.float32,
    {"activation_fn": th.nn.ReLU, "net_arch": {"pi": [4], "vf": [4]}, "optimizer_kwargs": {"eps": 1e-5}},
]


@PROTOCOLS
@pytest.mark.parametrize("x", PLAIN, ids=lambda x: type(x).__name__)
def test_plain_data_and_classes(x, protocol):
    found, expected = both(x, protocol)
    assert found == expected == x and type(found) is type(x)
    if isinstance(x, collections.deque):
        assert found.maxlen == x.maxlen


ARRAYS = [
    np.arange(6, dtype=np.float32).reshape(2, 3),
    np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    np.zeros((0, 4), np.int8),
    np.array(3.5),
    np.array([True, False]),
    np.array(["ab", "c"]),
    np.arange(4, dtype=">i4"),
    np.float64(1.5),
    np.int64(-3),
    np.bool_(True),
    np.arange(10)[::2],
    np.arange(24, dtype=np.uint8).reshape(1, 2, 4, 3).transpose(0, 3, 1, 2),  # of images with their channels last
]


@PROTOCOLS
@pytest.mark.parametrize("x", ARRAYS, ids=lambda x: f"{x.dtype}{np.shape(x)}")
def test_arrays(x, protocol):
    found, _ = both(x, protocol)
    assert type(found) is type(x) and found.dtype == x.dtype and np.shape(found) == np.shape(x)
    np.testing.assert_array_equal(found, x)
    if isinstance(x, np.ndarray) and x.size:
        assert found.flags.f_contiguous == x.flags.f_contiguous or x.base is not None
        found[...] = found[...]  # can be written to


ALL_SPACES = [*ACTION_SPACES.values(), *OBSERVATION_SPACES.values()]
ALL_SPACES += [
    spaces.Discrete(5, start=-2),
    spaces.MultiDiscrete([2, 3], start=[1, -1]),
    spaces.MultiBinary((2, 3)),
    spaces.Box(np.array([-np.inf, 0.0]), np.array([np.inf, 1.0]), dtype=np.float64),
    spaces.Box(-5, 5, (2,), np.int64),
    spaces.Tuple([spaces.Discrete(2), spaces.Box(0, 1, (1,))]),
    spaces.Dict({"z": spaces.Discrete(2), "a": spaces.Box(0, 1, (1,))}, sort_keys=False),
    Vocabulary(10, 3),
    text_space(3, 4, 10),
]


@PROTOCOLS
@pytest.mark.parametrize("seed", [None, 7])
@pytest.mark.parametrize("space", ALL_SPACES, ids=str)
def test_spaces_with_their_generators(space, seed, protocol):
    if seed is not None:
        space.seed(seed)
    found, expected = both(space, protocol)
    assert found == expected == space and type(found) is type(space) and repr(found) == repr(space)
    if isinstance(space, spaces.Dict):
        assert list(found.spaces) == list(expected.spaces)
    if isinstance(space, spaces.Box):
        assert found.is_bounded() == space.is_bounded() and found.dtype == space.dtype
    if seed is not None:
        for _ in range(3):
            np.testing.assert_equal(found.sample(), expected.sample())


@PROTOCOLS
@pytest.mark.parametrize("bits", ["PCG64", "MT19937", "Philox", "SFC64", "PCG64DXSM"])
def test_generators(bits, protocol):
    for kind in (np.random.Generator, np.random.RandomState):
        if kind is np.random.RandomState and bits != "MT19937":
            continue
        generator = kind(getattr(np.random, bits)(3))
        generator.normal(size=3)
        found, expected = both(generator, protocol)
        np.testing.assert_array_equal(found.normal(size=5), expected.normal(size=5))


@PROTOCOLS
def test_schedules_and_statistics(protocol):
    for x in (0.5, LinearSchedule(1.0, 0.1, 0.5), ConstantSchedule(3.0)):
        found, _ = both(FloatSchedule(x), protocol)
        assert type(found) is FloatSchedule
        assert [found(p) for p in (1.0, 0.7, 0.0)] == [FloatSchedule(x)(p) for p in (1.0, 0.7, 0.0)]
    statistics = RunningMeanStd(shape=(3,))
    statistics.update(np.random.default_rng(0).normal(size=(7, 3)))
    found, _ = both(statistics, protocol)
    for name in ("mean", "var", "count"):
        np.testing.assert_array_equal(getattr(found, name), getattr(statistics, name))


@pytest.mark.filterwarnings("ignore:.*deprecated")
@PROTOCOLS
def test_functions_that_older_versions_had_for_schedules(protocol):
    for function in (utils.constant_fn(0.2), utils.get_linear_fn(1.0, 0.1, 0.5), utils.get_schedule_fn(0.3)):
        found, _ = both(function, protocol)
        assert type(found).__module__ == "stable_baselines3.common.utils"
        assert [found(p) for p in (1.0, 0.7, 0.0)] == [function(p) for p in (1.0, 0.7, 0.0)]


def test_rl_zoos_function():
    names = {"__name__": "rl_zoo3.utils"}
    exec("def linear_schedule(initial_value):\n def func(p):\n  return p * initial_value\n return func", names)
    found = unpickle(cloudpickle.dumps(names["linear_schedule"](0.5)))
    assert [found(p) for p in (1.0, 0.5, 0.0)] == [0.5, 0.25, 0.0]


class Calls:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call

    def __call__(self):
        """For what is returned to be called in turn."""


def named(module, name):
    """A pickle of a name, which protocol 4 does not look up before."""
    texts = b"".join(b"\x8c" + bytes([len(x)]) + x.encode() for x in (module, name))
    return b"\x80\x04" + texts + b"\x93."


FOREIGN = {
    "posix.mkdir": Calls(os.mkdir, "never-made"),
    "builtins.eval": Calls(eval, "__import__('os').mkdir('never-made')"),
    "functools.partial": Calls(functools.partial(os.mkdir, "never-made")),
    "operator.methodcaller": Calls(operator.methodcaller("mkdir"), pathlib.Path("never-made")),
    "subprocess.call": Calls(subprocess.call, ["mkdir", "never-made"]),
    "numpy.load": Calls(np.load, "x", None, True),
    "numpy.zeros": Calls(np.zeros, 10**12),
    "torch.storage._load_from_bytes": Calls(th.storage._load_from_bytes, b""),
    "test_unpickling.Calls": Calls,
    "function test_unknown": lambda: test_unknown_names,
    "collections.defaultdict": collections.defaultdict(list),
    "posix.system": collections.deque([os.system]),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_unknown_names(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for x in (FOREIGN[name], [{"x": (FOREIGN[name],)}]):
        with pytest.raises(ForeignError, match="function" if name.startswith("function") else name):
            unpickle(cloudpickle.dumps(x))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "module, name",
    [
        ("stable_baselines3.common.save_util", "os.system"),
        ("stable_baselines3.common.policies", "ActorCriticPolicy.load"),
        ("stable_baselines3.common.policies", "th.load"),
        ("torch.nn.modules.activation", "torch"),
        ("gymnasium.spaces.box", "np"),
        ("numpy", "load"),
        ("sb3_pg.text.policies", "AutoModelForCausalLM"),
        ("a_module_that_is_not_there", "x"),
        ("builtins", "getattr"),
    ],
)
def test_names_beside_known_ones(module, name):
    before = set(sys.modules)
    with pytest.raises(ForeignError, match=name.split(".")[0]):
        unpickle(named(module, name))
    assert "a_module_that_is_not_there" not in set(sys.modules) - before


def test_a_pickle_changes_no_class():
    attributes = b"}\x8c\x06samplec__builtin__\nlen\ns"
    for head in (b"\x80\x04cgymnasium.spaces.box\nBox\n", b"\x80\x04cstable_baselines3.common.policies\nBasePolicy\n"):
        with pytest.raises((ForeignError, UnreadableError)):
            unpickle(head + b"N" + attributes + b"\x86b.")
        with pytest.raises((ForeignError, UnreadableError)):
            unpickle(head + attributes + b"b.")
    assert spaces.Box.sample.__module__ == "gymnasium.spaces.box"


@pytest.mark.parametrize(
    "pickled",
    [
        b"",
        b".",
        b"\x80\x04",
        b"\x80\x04N",
        b"\x80\x04K\x01a.",
        b"\x80\x04(u.",
        b"\x80\x04]e.",
        b"\x80\x04h\x05.",
        b"\x80\x04" + b"]" * 100_000 + b"a" * 99_999 + b".",
        b"\x80\x04]\x94(" + b"h\x00" * 3 + b"e.",  # holds itself
        b"\x80\x02\x8b\xff\xff\xff\x7f.",
        b"\x80\x04]" + b"".join(b"\x94](" + bytes([104, i]) * 10 + b"e" for i in range(12)) + b".",
        b"\x80\x02U\x01x.",
        pickle.dumps(Calls(bytearray, 1 << 40)),
        pickle.dumps(Calls(bytes, 1 << 40)),
    ],
)
def test_what_is_no_pickle_or_too_much(pickled):
    with pytest.raises(UnreadableError):
        unpickle(pickled)


def test_an_array_is_as_large_as_its_numbers():
    pickled = pickle.dumps(np.arange(3, dtype=np.int8), protocol=4)
    larger = pickled.replace(b"K\x03\x85", b"J\x00\x00\x00\x40\x85")
    assert larger != pickled
    with pytest.raises(UnreadableError, match="3 bytes for an array of shape"):
        unpickle(larger)
    with pytest.raises(UnreadableError, match="numbers of type 'O8'"):
        unpickle(pickle.dumps(np.array([None, 1], dtype=object)))


# -------------------------------------------------------------------------------------------------------- tensors


def saved(x, **options):
    file = io.BytesIO()
    th.save(x, file, **options)
    return file.getvalue()


def test_tensors():
    base = th.arange(12.0)
    state = {
        "a": th.randn(3, 4),
        "b": [th.zeros(0), th.tensor(3, dtype=th.int64), th.ones(2, dtype=th.bfloat16), th.tensor([True])],
        "part": base[2:8].view(2, 3),
        "turned": th.randn(3, 4).T,
        "parameter": th.nn.Parameter(th.ones(2)),
        "plain": {"lr": 1e-3, "betas": (0.9, 0.999), "params": [0, 1], "none": None},
    }
    found = read_tensors(saved(state))
    expected = th.load(io.BytesIO(saved(state)), weights_only=True)
    th.testing.assert_close(found, expected, rtol=0, atol=0)
    assert found["plain"] == state["plain"]


def test_tensors_that_are_shared_stay_so():
    x = th.zeros(3)
    found = read_tensors(saved({"x": x, "y": x}))
    found["x"][0] = 1
    assert found["y"][0] == 1


@pytest.mark.parametrize("x", [th.zeros(3).to_sparse(), th.zeros(2, dtype=th.complex64), Calls(os.mkdir, "never-made")])
def test_unusual_tensors_are_refused(x):
    with pytest.raises(ForeignError):
        read_tensors(saved({"x": x}))
    assert not pathlib.Path("never-made").exists()


def test_tensors_beyond_their_numbers():
    pickled = saved({"x": th.zeros(3)})
    with zipfile.ZipFile(io.BytesIO(pickled)) as file:
        entries = {name: file.read(name) for name in file.namelist()}
    name = next(name for name in entries if name.endswith("data.pkl"))
    for old, new in (
        (b"K\x03\x85", b"M\x00\x10\x85"),
        (b"K\x03tq", b"M\x00\x10tq"),
        (b"K\x00K\x03\x85", b"K\x02K\x03\x85"),
    ):
        assert old in entries[name]
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w") as file:
            for key, entry in entries.items():
                file.writestr(key, entry.replace(old, new, 1) if key == name else entry)
        with pytest.raises((UnreadableError, RuntimeError)):
            read_tensors(out.getvalue())

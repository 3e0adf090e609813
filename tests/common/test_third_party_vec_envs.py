"""What a VecEnv returns is learned from alike in every form that NumPy's and SB3's conventions allow."""

import functools

import numpy as np
import pytest
from conftest import OBSERVATION_SPACES, pairs
from gymnasium import spaces
from stable_baselines3.common.vec_env import VecEnv, VecMonitor
from tiny_models import ALGORITHMS, ALL, tiny, weights

from sb3_pg import REINFORCE
from sb3_pg.common import vec_env as ours

N_ENVS, N_STEPS = 3, 400

SPACES = {
    "vector": spaces.Box(-9, 9, (3,), np.float32),
    "matrix": spaces.Box(-9, 9, (2, 3), np.float32),
    "dict": spaces.Dict({"a": spaces.Box(-9, 9, (2,), np.float32), "b": spaces.Box(-9, 9, (2, 2), np.float64)}),
    "image": OBSERVATION_SPACES["image"],
    "discrete": spaces.Discrete(5),
}


@functools.cache
def script(kind):
    """Observations, rewards, dones, truncations of every step, in whole numbers that all types can hold."""
    random, space = np.random.default_rng(0), SPACES[kind]

    def observations(its):
        if isinstance(its, spaces.Dict):
            return {key: observations(part) for key, part in its.spaces.items()}
        if isinstance(its, spaces.Discrete):
            return random.integers(its.n, size=(2 * N_STEPS, N_ENVS))
        low = 0 if its.dtype == np.uint8 else -3
        return random.integers(low, 4, (2 * N_STEPS, N_ENVS, *its.shape)).astype(its.dtype)

    rewards = random.integers(-2, 4, (N_STEPS, N_ENVS)).astype(np.float32)
    dones = random.random((N_STEPS, N_ENVS)) < 0.25
    truncated = dones & (random.random((N_STEPS, N_ENVS)) < 0.5)
    return observations(space), rewards, dones, truncated


def each(change, observations):
    """Apply to one array or to each of a dictionary."""
    if isinstance(observations, dict):
        return {key: change(x) for key, x in observations.items()}
    return change(observations)


class Scripted(VecEnv):
    """Plays the script whatever is done.

    :param kind: of its observations
    :param changes: functions of what would be returned, by its name: observations, rewards, dones, infos, terminal,
        truncated, reset
    :param reuse: which of them are always the same memory: observations, rewards, dones, terminal, infos
    """

    def __init__(self, kind="vector", reuse=(), **changes):
        super().__init__(N_ENVS, SPACES[kind], spaces.Box(-1, 1, (2,), np.float32))
        self.kind, self.reuse, self.changes, self.memory, self.t = kind, reuse, changes, {}, 0

    def _given(self, name, x, env=None):
        x = self.changes.get(name, lambda same: same)(x)
        return self._into((name, env), x) if name in self.reuse else x

    def _into(self, name, x):
        """The same memory for every step's ``name``, with ``x`` in it."""
        if isinstance(x, dict):
            whole = self.memory.setdefault((name, "dict"), {})
            whole.update({key: self._into((name, key), value) for key, value in x.items()})
            return whole
        memory = self.memory.setdefault(name, np.array(x))
        memory[...] = x
        return memory

    def _rows(self, t):
        return each(lambda x: x[t].copy(), script(self.kind)[0])

    def reset(self):
        self.t += 1
        return self._given("reset", self._given("observations", self._rows(self.t)))

    def step_async(self, actions):
        pass

    def step_wait(self):
        _, rewards, dones, truncated = script(self.kind)
        t, self.t = self.t % N_STEPS, self.t + 1
        infos = []
        for env in range(N_ENVS):
            info = {"TimeLimit.truncated": self._given("truncated", bool(truncated[t, env]))}
            if dones[t, env]:
                last = each(lambda x, env=env: x[env], self._rows(N_STEPS + t))
                info["terminal_observation"] = self._given("terminal", last, env)
            infos.append(info)
        if "infos" in self.reuse:
            kept = self.memory.setdefault("infos", [{} for _ in range(N_ENVS)])
            for own, info in zip(kept, infos, strict=True):
                own.clear()
                own.update(info)
            infos = kept
        observations = self._given("observations", self._rows(self.t % N_STEPS))
        given_rewards = self._given("rewards", rewards[t].copy())
        return observations, given_rewards, self._given("dones", dones[t].copy()), self._given("infos_as", infos)

    def close(self):
        pass

    def get_attr(self, attr_name, indices=None):
        return [getattr(self, attr_name, None)] * N_ENVS

    def set_attr(self, attr_name, value, indices=None):
        pass

    def env_method(self, method_name, *args, indices=None, **kwargs):
        return [None] * N_ENVS

    def env_is_wrapped(self, wrapper_class, indices=None):
        return [False] * N_ENVS


def model_on(algorithm, env, **options):
    if isinstance(env.observation_space, spaces.Dict):
        return tiny(algorithm, env, "MultiInputPolicy", **options)
    if env.observation_space.dtype == np.uint8:
        return tiny(algorithm, env, "CnnPolicy", policy_kwargs={"features_extractor_kwargs": {"features_dim": 4}})
    return tiny(algorithm, env, **options)


RECORDED = ("observations", "rewards", "episode_starts", "values", "advantages", "returns")


def learned(model):
    """What several updates from a fixed seed led to, and the last rollout."""
    model.set_random_seed(0)
    model.learn(110)
    buffer = model.rollout_buffer
    rows = [getattr(buffer, name) for name in RECORDED]
    return weights(model), [each(lambda x: x[: buffer.pos].copy(), x) for x in rows]


@functools.cache
def plain(algorithm, kind="vector", wrapper=lambda env: env, **options):
    return learned(model_on(algorithm, wrapper(Scripted(kind)), **options))


def check_same(found, expected):
    for name, x, y in zip(RECORDED, found[1], expected[1], strict=True):
        for key in x if isinstance(x, dict) else (None,):
            np.testing.assert_array_equal(x if key is None else x[key], y if key is None else y[key], err_msg=name)
    np.testing.assert_array_equal(found[0], expected[0])


def as_type(kind):
    return lambda x: each(lambda part: part.astype(kind), x)


def strided(x):
    """The same numbers, not next to each other in memory."""
    return each(lambda part: np.repeat(part, 2, axis=-1)[..., ::2], x)


def read_only(x):
    def locked(part):
        part.flags.writeable = False
        return part

    return each(locked, x)


REWARDS = {
    "float64": as_type(np.float64),
    "float32": as_type(np.float32),
    "float16": as_type(np.float16),
    "int64": as_type(np.int64),
    "int8": as_type(np.int8),
    "list": lambda x: x.tolist(),
    "list of int": lambda x: x.astype(int).tolist(),
    "list of numpy": list,
    "tuple": tuple,
    "strided": strided,
    "read-only": read_only,
}
DONES = {
    "uint8": as_type(np.uint8),
    "int64": as_type(np.int64),
    "float32": as_type(np.float32),
    "float64": as_type(np.float64),
    "list": lambda x: x.tolist(),
    "list of int": lambda x: x.astype(int).tolist(),
    "list of numpy": list,
    "tuple": tuple,
    "strided": strided,
    "read-only": read_only,
}
OBSERVATIONS = {
    "float64": as_type(np.float64),
    "float16": as_type(np.float16),
    "int64": as_type(np.int64),
    "int8": as_type(np.int8),
    "big-endian": as_type(np.dtype(">f4")),
    "fortran": lambda x: each(np.asfortranarray, x),
    "strided": strided,
    "read-only": read_only,
    "list": lambda x: each(np.ndarray.tolist, x),
}
FORMS = {
    **{f"rewards {name}": {"rewards": change} for name, change in REWARDS.items()},
    **{f"dones {name}": {"dones": change} for name, change in DONES.items()},
    **{f"observations {name}": {"observations": change} for name, change in OBSERVATIONS.items()},
    **{f"{name} reused": {"reuse": (name,)} for name in ("observations", "rewards", "dones", "terminal", "infos")},
    "all reused": {"reuse": ("observations", "rewards", "dones", "terminal", "infos")},
    "infos tuple": {"infos_as": tuple},
    "truncated numpy": {"truncated": np.bool_},
    "truncated int": {"truncated": int},
    "terminal list": {"terminal": lambda x: x.tolist()},
    "terminal float64": {"terminal": as_type(np.float64)},
    "terminal read-only": {"terminal": read_only},
    "several": {
        "rewards": as_type(np.float64),
        "dones": as_type(np.uint8),
        "observations": as_type(np.float64),
        "infos_as": tuple,
        "truncated": np.bool_,
        "reuse": ("observations", "rewards", "dones", "terminal"),
    },
}


@ALL
@pytest.mark.parametrize("form", FORMS)
def test_vectors(algorithm, form):
    check_same(learned(model_on(algorithm, Scripted(**FORMS[form]))), plain(algorithm))


OTHER_FORMS = ["observations float64", "observations reused", "dones reused", "all reused", "several"]


@pytest.mark.parametrize("algorithm, kind, form", pairs(ALGORITHMS, ["dict", "matrix"], OTHER_FORMS))
def test_observations_of_other_spaces(algorithm, kind, form):
    check_same(learned(model_on(algorithm, Scripted(kind, **FORMS[form]))), plain(algorithm, kind))


@ALL
@pytest.mark.parametrize("dtype", [np.int32, np.uint8, np.float32])
@pytest.mark.parametrize("reuse", [(), ("observations", "terminal")])
def test_numbered_observations(algorithm, dtype, reuse):
    env = Scripted("discrete", reuse, observations=as_type(dtype), terminal=as_type(dtype))
    check_same(learned(model_on(algorithm, env)), plain(algorithm, "discrete"))


@ALL
@pytest.mark.parametrize("form", ["observations reused", "rewards list", "dones uint8", "dones reused", "several"])
def test_the_autograd_engine(algorithm, form):
    model = model_on(algorithm, Scripted(**FORMS[form]), engine="autograd")
    check_same(learned(model), plain(algorithm, engine="autograd"))


@ALL
def test_images_in_reused_memory(algorithm):
    check_same(learned(model_on(algorithm, Scripted("image", **FORMS["all reused"]))), plain(algorithm, "image"))


@pytest.mark.parametrize(
    "form", ["dones uint8", "dones list", "dones float32", "dones reused", "all reused", "several"]
)
@pytest.mark.parametrize("baseline", ["leave_one_out", "ema", None])
def test_whole_episodes_without_a_value_network(baseline, form):
    found = learned(model_on(REINFORCE, Scripted(**FORMS[form]), baseline=baseline))
    check_same(found, plain(REINFORCE, baseline=baseline))


@pytest.mark.parametrize("form", ["dones uint8", "dones list", "observations reused", "all reused", "several"])
def test_reinforce_with_rollouts_of_a_fixed_length(form):
    check_same(learned(model_on(REINFORCE, Scripted(**FORMS[form]), n_steps=16)), plain(REINFORCE, n_steps=16))


@ALL
@pytest.mark.parametrize(
    "form", ["observations float64", "observations reused", "rewards reused", "dones reused", "several"]
)
def test_a_run_that_goes_on_in_several_calls(algorithm, form):
    def in_calls(changes):
        model = model_on(algorithm, Scripted(**changes))
        calls = [0]

        def stop_now_and_then(locals_, globals_):
            calls[0] += 1
            return calls[0] % 11 != 0

        for i in range(8):
            model.learn(60, stop_now_and_then, reset_num_timesteps=i == 0)
        return weights(model)

    np.testing.assert_array_equal(in_calls(FORMS[form]), in_calls({}))


@ALL
@pytest.mark.parametrize("form", FORMS)
def test_normalised(algorithm, form):
    found = learned(model_on(algorithm, ours.VecNormalize(Scripted(**FORMS[form]))))
    np.testing.assert_allclose(found[0], plain(algorithm, wrapper=ours.VecNormalize)[0], atol=1e-5)


@ALL
@pytest.mark.parametrize("form", ["rewards reused", "dones reused", "observations reused", "dones uint8"])
def test_monitored(algorithm, form):
    found, expected = (model_on(algorithm, VecMonitor(Scripted(**changes))) for changes in (FORMS[form], {}))
    check_same(learned(found), learned(expected))
    assert [e["r"] for e in found.ep_info_buffer] == [e["r"] for e in expected.ep_info_buffer]


# ------------------------------------------------------------------- what is refused


def of_shape(*shape):
    return lambda x: np.zeros(shape, np.float32)


WRONG = {
    "rewards (n, 1)": ("reward", r"\(3, 1\)", {"rewards": lambda x: x[:, None]}),
    "rewards too few": ("reward", r"\(2,\)", {"rewards": lambda x: x[:2]}),
    "rewards one number": ("reward", r"\(\)", {"rewards": lambda x: x[0]}),
    "rewards None": ("reward", "None", {"rewards": lambda x: None}),
    "rewards list of None": ("reward", "None", {"rewards": lambda x: [None] * 3}),
    "rewards text": ("reward", "high", {"rewards": lambda x: ["high"] * 3}),
    "dones too many": ("done", r"\(4,\)", {"dones": lambda x: np.append(x, False)}),
    "dones (n, 1)": ("done", r"\(3, 1\)", {"dones": lambda x: x[:, None]}),
    "dones one": ("done", r"\(\)", {"dones": lambda x: x[0]}),
    "dones None": ("done", "None", {"dones": lambda x: None}),
    "observations too wide": ("observation", r"\(3, 4\)", {"observations": of_shape(3, 4)}),
    "observations too few": ("observation", r"\(2, 3\)", {"observations": of_shape(2, 3)}),
    "observations of one environment": ("observation", r"\(3,\)", {"observations": of_shape(3)}),
    "observations None": ("observation", "None", {"observations": lambda x: None}),
    "observations at reset": ("observation", r"\(3, 4\)", {"reset": of_shape(3, 4)}),
    "infos too few": ("info", "2", {"infos_as": lambda x: x[:2]}),
    "infos one dictionary": ("info", "dict", {"infos_as": lambda x: x[0]}),
    "infos None": ("info", "None", {"infos_as": lambda x: None}),
    "terminal too wide": ("terminal.observation", r"\(4,\)", {"terminal": of_shape(4)}),
}


@ALL
@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_taken_is_named_with_its_shape(algorithm, name):
    what, shape, changes = WRONG[name]
    # ArgumentError is a ValueError; NumPy's own, which names nothing, is one too.
    with pytest.raises(ValueError, match=rf"(?i)(?s){what}.*{shape}|{shape}.*{what}") as caught:
        model_on(algorithm, Scripted(**changes)).learn(110)
    assert "broadcast" not in str(caught.value)


@ALL
@pytest.mark.parametrize(
    "change, words",
    [(lambda x: {"a": x["a"]}, "b"), (lambda x: {**x, "b": x["b"][:, :1]}, r"\(3, 1, 2\)"), (lambda x: x["a"], "dict")],
    ids=["a key is missing", "a shape", "no dictionary"],
)
def test_wrong_dict_observations_are_named(algorithm, change, words):
    with pytest.raises(ValueError, match=rf"(?i)(?s)observation.*{words}"):
        model_on(algorithm, Scripted("dict", observations=change)).learn(110)


@ALL
def test_a_refused_step_leaves_a_model_that_learns_on(algorithm):
    wrong = [False]

    def sometimes(x):
        return x[:, None] if wrong[0] else x

    model = model_on(algorithm, Scripted(rewards=sometimes)).learn(110)
    before, wrong[0] = weights(model), True
    with pytest.raises(ValueError, match="reward"):
        model.learn(110)
    np.testing.assert_array_equal(weights(model), before)
    wrong[0] = False
    after = weights(model.learn(110))
    assert np.isfinite(after).all()
    assert not np.array_equal(after, before)

"""What cannot be learned from does not reach VecNormalize's statistics."""

import numpy as np
import pytest
from conftest import make_envs

from sb3_pg.common.errors import EnvironmentNumberError, NonFiniteError
from sb3_pg.common.vec_env import VecNormalize

pytestmark = pytest.mark.filterwarnings("ignore")


def statistics(env):
    of = env.obs_rms if isinstance(env.obs_rms, dict) else {"": env.obs_rms}
    found = [np.array(x) for its in (*of.values(), env.ret_rms) for x in (its.mean, its.var, its.count)]
    return [*found, env.returns.copy()]


def changed(env, observations=None, rewards=None, last=None):
    """Make the next step of the environments give these."""
    step = env.venv.step_wait

    def step_wait():
        env.venv.step_wait = step
        obs, r, dones, infos = step()
        if last is not None:
            dones[1], infos[1]["terminal_observation"] = True, last
        return obs if observations is None else observations, r if rewards is None else rewards, dones, infos

    env.venv.step_wait = step_wait


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "fault, message",
    [
        ({"observations": np.array([[0, 0, 0], [0, 0, np.nan]], np.float32)}, r"observation of environment 1 .*nan"),
        ({"observations": np.array([[0, -np.inf, 0], [0, 0, 0]], np.float32)}, r"observation of environment 0 .*-inf"),
        ({"observations": np.array([[0, 0, 0], [0, 0, 1e300]])}, r"observation of environment 1 .*single.*1e\+300"),
        ({"rewards": np.array([0, np.nan])}, r"reward of environment 1 .*nan"),
        ({"rewards": np.array([1e300, 0])}, r"reward of environment 0 .*1e\+300"),
        ({"last": np.array([0, np.inf, 0], np.float32)}, r"terminal observation of environment 1 .*inf"),
    ],
)
def test_nothing_changes(fault, message, training):
    env = VecNormalize(make_envs(n_envs=2))
    env.reset()
    actions = np.zeros((2, 2), np.float32)
    for _ in range(3):
        env.step(actions)
    env.training = training
    before, old = statistics(env), (env.old_obs, env.old_reward)
    changed(env, **fault)
    with pytest.raises(EnvironmentNumberError, match=message):
        env.step(actions)
    np.testing.assert_equal(statistics(env), before)
    assert (env.old_obs, env.old_reward) == old or env.old_obs is old[0]
    env.step(actions)
    assert all(np.isfinite(x).all() for x in statistics(env))


def test_squares_that_overflow():
    env = VecNormalize(make_envs(n_envs=2))
    env.reset()
    before = statistics(env)
    changed(env, observations=np.array([[0, 0, 0], [0, 1e25, 0]], np.float32))
    with pytest.raises(EnvironmentNumberError, match=r"observation of environment 1 is too large to be normalised"):
        env.step(np.zeros((2, 2), np.float32))
    np.testing.assert_equal(statistics(env), before)
    env.training = False
    changed(env, observations=np.array([[0, 0, 0], [0, 1e25, 0]], np.float32))
    env.step(np.zeros((2, 2), np.float32))


def test_a_reset_that_gives_nan():
    env = VecNormalize(make_envs(n_envs=2))
    env.reset()
    before, reset = statistics(env), env.venv.reset
    env.venv.reset = lambda: np.full((2, 3), np.nan, np.float32)
    with pytest.raises(EnvironmentNumberError, match="observation of environment 0"):
        env.reset()
    np.testing.assert_equal(statistics(env), before)
    env.venv.reset = reset
    env.reset()


def test_a_dictionary_names_its_key():
    env = VecNormalize(make_envs("dict", n_envs=2), norm_obs_keys=["vector"])
    obs = env.reset()
    env.step(np.zeros((2, 2), np.float32))
    before = statistics(env)
    raw = {key: np.array(x) for key, x in env.get_original_obs().items()}
    raw["vector"] = np.full_like(raw["vector"], np.nan)
    changed(env, observations=raw)
    with pytest.raises(EnvironmentNumberError, match=r"observation 'vector' of environment 0"):
        env.step(np.zeros((2, 2), np.float32))
    np.testing.assert_equal(statistics(env), before)
    assert obs


class Immutable:
    """An array as JAX has them: what is computed with it is one too."""

    def __init__(self, x):
        self.x = np.array(x)

    def __array__(self, dtype=None, copy=None):
        x = np.array(self.x, dtype)
        x.flags.writeable = False
        return x

    def __sub__(self, other):
        return Immutable(self.x - other)

    def __truediv__(self, other):
        return Immutable(self.x / other)


@pytest.mark.parametrize("kind", [list, Immutable])
def test_other_arrays_are_normalised_as_those_of_numpy(kind):
    env, expected = (VecNormalize(make_envs(n_envs=2)) for _ in range(2))
    for its in (env, expected):
        its.reset()
    rows = np.array([[1, -2, 0.5], [0, 3, 4]], np.float32)
    rewards = np.array([1.0, -2.0])

    def act(its):
        return its.step(np.zeros((2, 2), np.float32))

    changed(env, observations=kind(rows), rewards=kind(rewards), last=kind(rows[0]))
    changed(expected, observations=rows, rewards=rewards, last=rows[0].copy())
    found, right = ([*step, infos[1]["terminal_observation"]] for *step, infos in map(act, (env, expected)))
    np.testing.assert_equal(found, right)
    np.testing.assert_array_equal(env.normalize_obs(kind(rows)), expected.normalize_obs(rows))
    for env.norm_reward in (True, False):
        expected.norm_reward = env.norm_reward
        np.testing.assert_array_equal(env.normalize_reward(kind(rewards)), expected.normalize_reward(rewards))


@pytest.mark.parametrize("which", ["obs_rms", "ret_rms"])
def test_statistics_that_were_broken_are_to_blame_and_not_the_environment(which):
    env = VecNormalize(make_envs(n_envs=2))
    env.reset()
    getattr(env, which).mean = getattr(env, which).mean + np.nan
    with pytest.raises(NonFiniteError, match="statistics of VecNormalize are not finite"):
        env.step(np.zeros((2, 2), np.float32))

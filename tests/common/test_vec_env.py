"""Our DummyVecEnv and VecNormalize give SB3's numbers to the bit, and share its files."""

import copy

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from stable_baselines3.common import vec_env as sb3
from stable_baselines3.common.env_util import make_vec_env

from sb3_pg import PPO
from sb3_pg.common import vec_env as ours


class Mixed(gym.Env):
    """Dict observations of float64, float32 and integers; ends or is truncated; may reuse its observation arrays."""

    def __init__(self, kind="dict", reuse=False):
        parts = {
            "a": spaces.Box(-9, 9, (3,), np.float64),
            "b": spaces.Box(-9, 9, (2, 2), np.float32),
            "c": spaces.Discrete(5),
        }
        self.observation_space = spaces.Dict(parts) if kind == "dict" else parts[kind]
        self.action_space = spaces.Box(-1, 1, (1,), np.float32)
        self.kind, self.reuse, self.random = kind, reuse, np.random.default_rng(0)
        self.all = {"a": np.zeros(3), "b": np.zeros((2, 2), np.float32), "c": 0}

    def reset(self, *, seed=None, options=None):
        self.t = 0
        return self._observe(), {"fresh": True}

    def _observe(self):
        self.all["a"][:] = self.random.normal(size=3)
        self.all["b"][:] = self.random.normal(size=(2, 2)) * 3
        self.all["c"] = int(self.random.integers(5))
        seen = self.all if self.kind == "dict" else self.all[self.kind]
        return seen if self.reuse else copy.deepcopy(seen)

    def step(self, action):
        self.t += 1
        return self._observe(), self.random.normal(), self.t == 4, self.t == 7 or self.random.random() < 0.2, {}


def rollout(library, kind, n_envs, normalize, n_steps=40):
    env = library.DummyVecEnv([lambda: Mixed(kind)] * n_envs)
    if normalize:
        env = library.VecNormalize(env, norm_obs_keys=["a", "b"] if kind == "dict" else None, clip_obs=1.5)
    seen = [env.reset()]
    for _ in range(n_steps):
        seen.append(env.step(np.zeros((n_envs, 1))))
    return env, seen


def assert_same(a, b):
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (tuple, list)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        np.testing.assert_array_equal(a, b)
        assert np.asarray(a).dtype == np.asarray(b).dtype


@pytest.mark.parametrize("kind", ["dict", "a", "b", "c"])
@pytest.mark.parametrize("n_envs", [1, 3, 9])
@pytest.mark.parametrize("normalize", [False, True])
def test_same_numbers(kind, n_envs, normalize):
    if kind == "c" and normalize:
        pytest.skip("VecNormalize does not take Discrete observations")
    theirs_env, theirs = rollout(sb3, kind, n_envs, normalize)
    ours_env, mine = rollout(ours, kind, n_envs, normalize)
    assert_same(mine, theirs)
    assert isinstance(ours_env, sb3.VecEnv)
    if normalize:
        assert isinstance(ours_env, sb3.VecNormalize)
        assert_same(ours_env.get_original_obs(), theirs_env.get_original_obs())
        assert_same(ours_env.get_original_reward(), theirs_env.get_original_reward())
        assert_same(ours_env.ret_rms.var, theirs_env.ret_rms.var)


def test_earlier_observations_do_not_change():
    env = ours.DummyVecEnv([lambda: Mixed(reuse=True)])
    first = env.reset()
    kept = {key: value.copy() for key, value in first.items()}
    last = None
    while last is None:
        _, _, dones, infos = env.step(np.zeros((1, 1)))
        if dones[0]:
            last = infos[0]["terminal_observation"]
            copied = {key: np.copy(value) for key, value in last.items()}
    env.step(np.zeros((1, 1)))
    assert_same(first, kept)
    assert_same(last, copied)


@pytest.mark.parametrize("writer, reader", [(sb3, ours), (ours, sb3), (ours, ours)])
def test_statistics_interchange(writer, reader, tmp_path):
    env, _ = rollout(writer, "a", 2, True)
    env.save(str(tmp_path / "statistics.pkl"))
    assert b"sb3_pg" not in (tmp_path / "statistics.pkl").read_bytes()
    loaded = reader.VecNormalize.load(str(tmp_path / "statistics.pkl"), reader.DummyVecEnv([lambda: Mixed("a")] * 2))
    assert type(loaded) is reader.VecNormalize
    obs = np.ones((2, 3))
    assert_same(loaded.normalize_obs(obs), env.normalize_obs(obs))
    loaded.reset()
    loaded.step(np.zeros((2, 1)))


def test_a_plain_environment_is_stepped_by_ours():
    model = PPO("MlpPolicy", "CartPole-v1", n_steps=64)
    assert type(model.env) is ours.DummyVecEnv
    given = make_vec_env("CartPole-v1", 2)
    assert PPO("MlpPolicy", given, n_steps=32).env is given


def test_sb3s_vec_normalize_gets_our_methods_and_keeps_its_numbers():
    class Special(sb3.VecNormalize):
        pass

    inner = sb3.VecNormalize(make_vec_env("Pendulum-v1", 2, seed=1), norm_reward=False)
    special = Special(inner)
    model = PPO("MlpPolicy", sb3.VecMonitor(special), n_steps=32)
    assert type(inner) is ours.VecNormalize
    assert type(special) is Special
    assert model.get_vec_normalize_env() is special

    theirs, mine = (sb3.VecNormalize(make_vec_env("Pendulum-v1", 2, seed=1)) for _ in range(2))
    model.set_env(mine)
    assert type(mine) is ours.VecNormalize
    assert_same(mine.reset(), theirs.reset())
    for _ in range(5):
        assert_same(mine.step(np.zeros((2, 1))), theirs.step(np.zeros((2, 1))))
    sb3.sync_envs_normalization(mine, theirs)

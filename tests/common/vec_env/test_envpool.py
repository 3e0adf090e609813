"""EnvPool's environments: a stand-in that does as EnvPool 1.2.5 does, and EnvPool itself where it is installed."""

import warnings

import gymnasium as gym
import numpy as np
import pytest
from counting_env import VECTOR, CountingEnv
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.wrappers import vector as wrappers
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import VecMonitor
from tiny_models import ALL, tiny, weights

from sb3_pg import PPO
from sb3_pg.common.errors import ArgumentError
from sb3_pg.common.vec_env import DummyVecEnv, EnvPoolVecEnv, VecNormalize, as_vec_env

N = 4


class FakePool(VectorEnv):
    """What ``envpool.make(..., env_type="gymnasium")`` returns, of CountingEnv.

    The spaces are of one environment. ``reset`` returns those environments only that it is for, in their order, by
    number or by mask; seeds are from the start. After an episode the next step resets, unless ``reset`` has. Infos are
    columns without masks, with the environments' numbers; those of Atari games have the rewards as they are and the
    ends of games. Actions are converted to the type that it wants.
    """

    metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP}  # noqa: RUF012
    render_mode = "rgb_array"

    def __init__(self, seed=42, batch_size=N, is_atari=False):
        self.singles = [CountingEnv(i) for i in range(N)]
        self.num_envs, self.is_atari = N, is_atari
        self.config = {"num_envs": N, "batch_size": batch_size, "seed": seed}
        self.single_observation_space = self.observation_space = VECTOR
        self.single_action_space = self.action_space = spaces.Discrete(3)
        self.all_env_ids = np.arange(N, dtype=np.int32)
        self.is_async = batch_size != N
        self.is_over = np.zeros(N, bool)
        for single in self.singles:
            single.reset(seed=seed + single.which)
            single.episode = -1

    def _infos(self, which, results):
        steps = [self.singles[i].step_no for i in which]
        ids = np.array(which, np.int32)
        infos = {"env_id": ids, "players": {"env_id": ids}, "elapsed_step": np.array(steps, np.int32)}
        if self.is_atari:
            infos["reward"] = np.array([10 * r[1] for r in results], np.float32)
            are_over = [r[2] and self.singles[i].episode % 4 == 2 for i, r in zip(which, results, strict=True)]
            infos["terminated"] = np.array(are_over, np.int32)
        return infos

    def _results(self, results):
        return np.stack([r[0] for r in results])

    def reset(self, env_id=None, *, seed=None, options=None):
        assert not (options or {}).keys() - {"reset_mask"}
        if env_id is None:
            env_id = self.all_env_ids if not options else np.flatnonzero(options["reset_mask"])
        self.is_over[env_id] = False
        results = [(self.singles[i].reset()[0], 0.0, False, False) for i in env_id]
        return self._results(results), self._infos(env_id, results)

    def step(self, actions):
        results = []
        for i, action in enumerate(actions.astype(np.int32)):
            if self.is_over[i]:
                results.append((self.singles[i].reset()[0], 0.0, False, False))
            else:
                results.append(self.singles[i].step(action)[:4])
        rewards = np.array([r[1] for r in results], np.float32)
        truncated = np.array([r[3] for r in results])
        terminated = np.array([r[2] for r in results]) & ~truncated
        self.is_over = terminated | truncated
        return self._results(results), rewards, terminated, truncated, self._infos(self.all_env_ids, results)

    def render(self, env_ids=None):
        ids = [0] if env_ids is None else env_ids
        return np.stack([self.singles[i].render() for i in ids])


class DmPool:
    """Of another interface of EnvPool."""

    config, all_env_ids, is_async = {}, np.arange(2), False

    def render(self, env_ids=None):
        pass


def dummy(seed=42):
    env = DummyVecEnv([lambda i=i: Monitor(CountingEnv(i)) for i in range(N)])
    env.seed(seed)
    env.reset()
    env.set_attr("use", None)
    for single in env.envs:
        single.unwrapped.episode = -1
    return env


def expected_rows(n_steps):
    env = dummy()
    return env.reset(), [env.step(np.arange(t, t + N) % 3) for t in range(n_steps)]


@pytest.mark.parametrize("wrap", [lambda env: env, wrappers.RecordEpisodeStatistics])
def test_each_step_is_that_of_dummy_vec_env(wrap):
    env = as_vec_env(wrap(FakePool()))
    assert isinstance(env, EnvPoolVecEnv)
    first, rows = expected_rows(40)
    np.testing.assert_array_equal(env.reset(), first)
    for t, (observations, rewards, dones, infos) in enumerate(rows):
        found = env.step(np.arange(t, t + N) % 3)
        for x, y in zip(found[:3], (observations, rewards, dones), strict=True):
            np.testing.assert_array_equal(x, y)
            assert x.dtype == y.dtype
        for i, (info, other) in enumerate(zip(found[3], infos, strict=True)):
            is_both = dones[i] and other["terminal_observation"][1] % 4 == 3  # for EnvPool that is truncated
            assert info["TimeLimit.truncated"] == (other["TimeLimit.truncated"] or is_both)
            assert ("terminal_observation" in info) == ("terminal_observation" in other) == dones[i]
            assert ("episode" in info) == dones[i]
            if dones[i]:
                np.testing.assert_array_equal(info["terminal_observation"], other["terminal_observation"])
                assert info["episode"]["r"] == pytest.approx(other["episode"]["r"], abs=1e-5)
                assert info["episode"]["l"] == other["episode"]["l"] == info["elapsed_step"]
            assert "players" not in info and "env_id" not in info


@ALL
def test_learning(algorithm):
    """An episode that is truncated and terminated at once is truncated for EnvPool; all else is DummyVecEnv's."""
    model = tiny(algorithm, FakePool()).learn(200)
    buffer = model.rollout_buffer
    observations, starts = buffer.observations[: buffer.pos], buffer.episode_starts[: buffer.pos]
    np.testing.assert_array_equal(observations[:, :, 2] == 0, starts.astype(bool))  # each begins at its first step
    steps = np.diff(observations[:, :, 2], axis=0)
    np.testing.assert_array_equal(steps[~starts[1:].astype(bool)], 1)  # and leaves none out
    assert (buffer.rewards[: buffer.pos] > 0).all()  # a step that only resets gives 0
    assert len(model.ep_info_buffer) > 20


def test_games_of_several_lives():
    env = as_vec_env(FakePool(is_atari=True))
    env.reset()
    raw, lengths, ended = np.zeros(N), np.zeros(N, int), []
    for _ in range(60):
        _, rewards, dones, infos = env.step(np.zeros(N, int))
        raw += 10 * rewards
        lengths += 1
        for i, info in enumerate(infos):
            ends = dones[i] and bool(info["terminated"] or info["TimeLimit.truncated"])
            assert ("episode" in info) == ends
            if ends:
                assert info["episode"]["r"] == pytest.approx(raw[i], rel=1e-5) and info["episode"]["l"] == lengths[i]
                ended.append(lengths[i])
                raw[i], lengths[i] = 0, 0
    assert len(ended) > 10 and max(ended) > 6  # a life takes 6 at most


def test_seeds_are_from_the_start():
    with pytest.warns(UserWarning, match=r"seed.*42.*envpool.make\(..., seed=7\)"):
        tiny(PPO, FakePool(), seed=7)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        models = [tiny(PPO, FakePool(seed=7), seed=7).learn(64) for _ in range(2)]
        assert as_vec_env(FakePool(seed=7)).seed(7) == [7, 8, 9, 10]
    np.testing.assert_array_equal(*map(weights, models))


def test_what_it_does_not_let_at():
    env = as_vec_env(FakePool())
    assert env.get_attr("is_atari") == [False] * N
    assert not env.has_attr("secret") and not env.has_attr("action_masks")
    with pytest.raises(AttributeError, match="secret"):
        env.get_attr("secret")
    with pytest.raises(AttributeError, match="double"):
        env.env_method("double", 1)
    assert env.env_is_wrapped(Monitor) == [True] * N
    assert env.env_is_wrapped(gym.wrappers.TimeLimit, [0]) == [False]
    assert [picture[0, 0, 0] for picture in env.get_images()] == list(range(N))
    assert env.render().shape == (8, 8, 3)


def test_other_interfaces_and_part_batches_are_refused():
    with pytest.raises(ArgumentError, match="env_type='gymnasium'"):
        PPO("MlpPolicy", DmPool())
    with pytest.raises(ArgumentError, match=r"`batch_size` \(2\) must be `num_envs` \(4\)"):
        PPO("MlpPolicy", FakePool(batch_size=2))


@pytest.mark.filterwarnings("ignore:The environment is already wrapped")
def test_in_wrappers():
    model = tiny(PPO, VecNormalize(VecMonitor(as_vec_env(FakePool())))).learn(128)
    assert len(model.ep_info_buffer) > 20
    mean, _ = evaluate_policy(model, as_vec_env(FakePool()), 8)
    assert mean > 0


# ------------------------------------------------------------------ EnvPool itself


@pytest.fixture
def envpool():
    return pytest.importorskip("envpool")


def test_cart_poles_of_envpool(envpool):
    env = as_vec_env(envpool.make("CartPole-v1", env_type="gymnasium", num_envs=8, seed=3, max_episode_steps=20))
    observations, lengths = env.reset(), np.zeros(8, int)
    assert np.abs(observations).max() <= 0.05
    for t in range(100):
        before = observations
        observations, rewards, dones, infos = env.step(np.full(8, t % 2))
        lengths += 1
        assert (rewards == 1).all() and (np.abs(observations[dones]) <= 0.05).all()
        for i in np.flatnonzero(dones):
            last = infos[i]["terminal_observation"]
            assert last[0] == pytest.approx(before[i, 0] + 0.02 * before[i, 1], abs=1e-5)
            assert infos[i]["episode"]["l"] == lengths[i] == infos[i]["elapsed_step"]
            assert infos[i]["TimeLimit.truncated"] == (lengths[i] == 20)
            lengths[i] = 0
    env.close()


@pytest.mark.parametrize("name, policy", [("HalfCheetah-v5", "MlpPolicy"), ("Pong-v5", "CnnPolicy")])
def test_learning_in_envpool(envpool, name, policy):
    env = envpool.make(name, env_type="gymnasium", num_envs=2, seed=0, max_episode_steps=10)
    model = PPO(policy, env, n_steps=16, batch_size=16, n_epochs=1, seed=0, device="cpu").learn(64)
    assert [episode["l"] for episode in model.ep_info_buffer] == [10] * 6
    model.get_env().close()

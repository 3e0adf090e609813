"""How long a rollout is, which of its samples count, and what is said of environments that never end."""

import gymnasium as gym
import numpy as np
import pytest
from conftest import ACTION_SPACES, OBSERVATION_SPACES, FakeEnv, make_envs
from hypothesis import given
from hypothesis import strategies as st
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnvWrapper, VecMonitor

from sb3_pg import PPO, REINFORCE, TRPO
from sb3_pg.common.acting import Steps, WholeEpisodes, longest_episode
from sb3_pg.common.buffers import RolloutBuffer
from sb3_pg.common.errors import ArgumentError
from sb3_pg.common.rollout import Rollout


def whole(n_episodes=None, n_steps=1, longest=10_000):
    return WholeEpisodes(n_episodes, n_steps, longest, "PPO", "use something else")


class ByHand:
    """A rollout of which nothing but the ends of episodes is known, recorded as acting does."""

    def __init__(self, n_envs):
        self.n_envs = n_envs
        buffer = RolloutBuffer(2, OBSERVATION_SPACES["box"], ACTION_SPACES["discrete"], "cpu", n_envs=n_envs)
        self.last = np.ones(n_envs, dtype=bool)
        self.rollout = Rollout(buffer, np.zeros((n_envs, 3)), self.last)

    def record(self, dones):
        """One step of each environment."""
        dones = np.array(dones, dtype=bool)
        self.rollout.note(dones, [{}] * self.n_envs)
        self.rollout.buffer.add(np.zeros((self.n_envs, 3)), np.zeros(self.n_envs), np.zeros(self.n_envs), self.last)
        self.last = self.rollout.last_dones = dones
        return self


def by_hand(*columns):
    """A rollout from each environment's steps, 1 where an episode ends."""
    made = ByHand(len(columns))
    for dones in zip(*columns, strict=True):
        made.record(dones)
    return made.rollout


def completed(horizon, *columns):
    """After how many steps the rollout is complete, None if it is not."""
    made = ByHand(len(columns))
    for n, dones in enumerate(zip(*columns, strict=True)):
        if horizon.is_complete(made.rollout):
            return n
        made.record(dones)
    return len(columns[0]) if horizon.is_complete(made.rollout) else None


def test_steps():
    horizon = Steps(3)
    assert completed(horizon, [0, 1, 0, 0, 0], [0, 0, 0, 0, 0]) == 3
    assert horizon.keep(by_hand([0, 1, 0], [0, 0, 0])) is None
    starts = np.array([False, True])
    assert horizon.prepare(None, "observations", starts) == ("observations", starts)


def test_the_same_number_of_episodes_from_each_environment():
    columns = [1, 0, 1, 0, 0, 1, 1], [0, 0, 0, 1, 0, 1, 0]
    assert completed(whole(1), *columns) == 4
    assert completed(whole(2), *columns) == 6
    assert completed(whole(3), *columns) is None
    cut = [x[:6] for x in columns]
    np.testing.assert_array_equal(whole(2).keep(by_hand(*cut)).T, [[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1]])
    np.testing.assert_array_equal(whole(1).keep(by_hand(*cut)).T, [[1, 0, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0]])


def test_all_episodes_that_begin_within_the_steps():
    # The second environment's third episode begins with step 4, the first one's fourth then, too.
    columns = [1, 0, 1, 1, 0, 0, 1, 1], [0, 1, 0, 1, 0, 1, 0, 0]
    assert completed(whole(n_steps=1), *columns) == 2
    assert completed(whole(n_steps=2), *columns) == 3
    assert completed(whole(n_steps=3), *columns) == 4
    assert completed(whole(n_steps=4), *columns) == 4
    assert completed(whole(n_steps=5), *columns) == 7
    assert completed(whole(n_steps=7), *columns) is None  # the second environment's last one has not ended
    rollout = by_hand(*[x[:7] for x in columns])
    np.testing.assert_array_equal(whole(n_steps=5).keep(rollout).T, [[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 0]])
    np.testing.assert_array_equal(whole(n_steps=1).keep(by_hand(*[x[:2] for x in columns])).T, [[1, 0], [1, 1]])


@given(
    st.lists(st.lists(st.integers(1, 6), min_size=8, max_size=8), min_size=1, max_size=3),
    st.integers(1, 8) | st.none(),
    st.integers(1, 8),
)
def test_what_counts_is_whole_and_no_more_is_acted(lengths, n_episodes, n_steps):
    """By the lengths of the episodes of each environment."""
    horizon, made, running = whole(n_episodes, n_steps), ByHand(len(lengths)), [list(x) for x in lengths]
    while not horizon.is_complete(made.rollout):
        for env in running:
            env[0] -= 1
        made.record([env[0] == 0 for env in running])
        running = [(env if env[0] else env[1:]) or [10_000] for env in running]
    kept, last = horizon.keep(made.rollout), 0
    for env, its in enumerate(lengths):
        starts = np.concatenate([[0], np.cumsum(its)[:-1]])
        counted = range(n_episodes) if n_episodes is not None else np.flatnonzero(starts < n_steps)
        end = int(np.cumsum(its)[len(counted) - 1])
        np.testing.assert_array_equal(kept[:, env], np.arange(len(kept)) < end)
        last = max(last, end)
    assert len(kept) == last
    keeps_episodes_whole = made.rollout.dones[[x.sum() - 1 for x in kept.T], range(len(lengths))]
    assert keeps_episodes_whole.all()


# ---------------------------------------------------------------- getting ready


class CanRest(DummyVecEnv):
    """Notes what it was told, and when it was reset."""

    def __init__(self, *args):
        super().__init__(*args)
        self.told = []

    def rest_after(self, n_episodes):
        self.told.append(n_episodes)

    def reset(self):
        self.told.append("reset")
        return super().reset()


def test_environments_start_anew_only_where_they_must():
    env, observations = make_envs(n_envs=2), np.zeros((2, 3))
    for horizon in (whole(2), whole(n_steps=5)):
        same = horizon.prepare(env, observations, np.array([True, True]))
        assert same[0] is observations
        assert same[1].all()
        anew, starts = horizon.prepare(env, observations, np.array([True, False]))
        assert (anew != 0).any()
        assert starts.tolist() == [True, True]


@pytest.mark.parametrize("wrapper", [lambda env: env, VecMonitor, VecEnvWrapper])
def test_those_that_can_rest_are_told(wrapper):
    class Wrapped(VecEnvWrapper):
        def reset(self):
            return self.venv.reset()

        def step_wait(self):
            return self.venv.step_wait()

    inner = CanRest([FakeEnv, FakeEnv])
    env = (Wrapped if wrapper is VecEnvWrapper else wrapper)(inner)
    _, starts = whole(3).prepare(env, None, np.ones(2, dtype=bool))
    assert inner.told == ["reset", 3]
    assert starts.tolist() == [True, True]
    whole(n_steps=4).prepare(env, None, np.ones(2, dtype=bool))
    assert inner.told == ["reset", 3]  # how many episodes will be needed is not known


# ---------------------------------------------------------------- without an end


def test_an_episode_that_is_too_long():
    horizon, made = whole(1, longest=5), ByHand(3)
    for _ in range(5):
        assert not horizon.is_complete(made.record([1, 0, 1]).rollout)
    made.record([1, 0, 1])
    with pytest.raises(ArgumentError, match=r"Environment 1 has not ended its episode in 6 steps, and PPO learns"):
        horizon.is_complete(made.rollout)


def test_a_long_episode_counts_from_its_own_start():
    horizon, made = whole(2, longest=5), ByHand(2)
    for t in range(9):
        assert not horizon.is_complete(made.record([t % 2, t == 3]).rollout)
    with pytest.raises(ArgumentError, match=r"Environment 1 has not ended its episode in 6 steps"):
        horizon.is_complete(made.record([1, 0]).rollout)


def test_an_episode_that_is_just_not_too_long():
    made = ByHand(1)
    for t in range(5):
        made.record([t == 4])
    assert whole(1, longest=5).is_complete(made.rollout)


def test_environments_that_have_given_their_episodes_may_rest():
    """Without an end from then on, while another one still has episodes to give, each of them short enough."""
    horizon, made = whole(2, longest=5), ByHand(2)
    for t in range(10):
        assert not horizon.is_complete(made.rollout)
        made.record([t in (0, 1), t in (4, 9)])
    assert horizon.is_complete(made.rollout)
    np.testing.assert_array_equal(horizon.keep(made.rollout).sum(axis=0), [2, 10])


def test_how_long_is_too_long():
    assert longest_episode(7, 1_000_000) == 7
    assert longest_episode(None, 50) == 10_000
    assert longest_episode(None, 50_000) == 50_000
    assert longest_episode(None, 10**9) == 200_000


class Endless(FakeEnv):
    def __init__(self):
        super().__init__(lengths=(10**9,))


@pytest.mark.parametrize(
    ("algorithm", "options", "advice"),
    [
        (REINFORCE, {"n_episodes": 2}, "pass `n_steps`"),
        (PPO, {"n_episodes": 2, "batch_size": 16}, "baseline='value'"),
        (PPO, {"n_steps": 16, "batch_size": 16, "baseline": "leave_one_out"}, "baseline='value'"),
        (TRPO, {"n_steps": 16, "batch_size": 16, "baseline": None}, "baseline='value'"),
    ],
)
def test_an_endless_environment_is_named(algorithm, options, advice):
    model = algorithm("MlpPolicy", DummyVecEnv([FakeEnv, Endless]), max_episode_steps=40, **options)
    message = (
        rf"Environment 1 has not ended its episode in 41 steps, and {algorithm.__name__} learns from whole episodes.*"
        rf"TimeLimit, .*{advice}.*, or raise `max_episode_steps` \(now 40\)"
    )
    with pytest.raises(ArgumentError, match=message):
        model.learn(1000)


def test_a_time_limit_is_an_end():
    env = DummyVecEnv([FakeEnv, lambda: gym.wrappers.TimeLimit(Endless(), 30)])
    model = REINFORCE("MlpPolicy", env, n_episodes=2, max_episode_steps=40).learn(60)
    assert model.rollout.n_steps == 30

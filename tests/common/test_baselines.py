"""What returns are compared with, for all three algorithms: whole runs against slow loops over what was recorded."""

from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from conftest import make_envs, pairs
from gymnasium import spaces
from slow import slow_advantages, slow_leave_one_out, slow_leave_one_out_within, slow_within_group
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import DummyVecEnv
from tiny_models import AtRolloutEnd

from sb3_pg import PPO, REINFORCE, TRPO
from sb3_pg.common.advantages import Samples, compared
from sb3_pg.common.errors import ArgumentError
from sb3_pg.common.vec_env import VecNormalize

GAMMA = 0.9


def own(observations, returns):
    return 0.5 * observations[:, 0] + 0.1


BASELINES = ["leave_one_out", "leave_one_out_same_start", "group", "ema", None, own]
SAME_START = ["leave_one_out_same_start", "group"]


class SameStart(gym.Env):
    """Episodes that begin with one of a few observations, in turn, whatever the seed; of lengths in turn.

    :param rank: number of the environment
    :param lengths: of the episodes; a negative one is truncated, not terminated
    :param starts: numbers of the first observations
    :param reward: of each step; None for one that depends on action, step and chance
    """

    def __init__(self, rank=0, lengths=(4, 1, -6, 3, 2), starts=(0, 1, 0, 0, 2), reward=None):
        self.observation_space = spaces.Box(-9.0, 9.0, (3,))
        self.action_space = spaces.Discrete(3)
        self.lengths, self.starts, self.reward = lengths, starts, reward
        self.random, self.episode = np.random.default_rng(rank), rank - 1

    def reset(self, *, seed=None, options=None):
        self.episode += 1
        self.steps = 0
        return np.full(3, self.starts[self.episode % len(self.starts)], np.float32), {}

    def step(self, action):
        self.steps += 1
        length = self.lengths[self.episode % len(self.lengths)]
        over = self.steps == abs(length)
        reward = float(action) + self.random.normal() if self.reward is None else self.reward
        observation = self.random.uniform(-1, 1, 3).astype(np.float32)
        return observation, reward, over and length > 0, over and length < 0, {}


def same_starts(n_envs=2, **options):
    return DummyVecEnv([lambda rank=rank: SameStart(rank, **options) for rank in range(n_envs)])


class Recorder(BaseCallback):
    """Notes each rollout as the environments gave it, and what became of it."""

    def __init__(self):
        super().__init__()
        self.rollouts = []

    def _on_rollout_start(self):
        self.steps = []

    def _on_step(self):
        seen = self.model._last_obs, self.locals["rewards"], self.locals["dones"]
        self.steps.append([np.copy(x) for x in seen])
        return True

    def _on_rollout_end(self):
        observations, rewards, dones = (np.stack(x) for x in zip(*self.steps, strict=True))
        rollout, n = self.model.rollout, len(self.steps)
        assert rollout.buffer is self.model.rollout_buffer
        assert rollout.n_steps == n
        columns = {name: getattr(rollout.buffer, name)[:n].copy() for name in ("advantages", "returns", "values")}
        keep = self.model.horizon.keep(rollout)
        self.rollouts.append(
            SimpleNamespace(observations=observations, rewards=rewards, dones=dones, keep=keep, **columns)
        )


def episodes_that_count(record, n_steps, n_episodes):
    """(env, first step, number of steps) of each, and that the rollout went on for no longer than they need."""
    found = []
    n_envs = record.dones.shape[1]
    for env in range(n_envs):
        ends = np.flatnonzero(record.dones[:, env])
        starts = [0, *(ends + 1)]
        its = [(env, start, end - start + 1) for start, end in zip(starts, ends, strict=False)]
        if n_episodes is not None:
            n = -(-n_episodes // n_envs)
            assert len(its) >= n
            found += its[:n]
        else:
            assert starts[-1] >= n_steps or len(starts) == len(ends)  # none that began in time goes on
            found += [x for x in its if x[1] < n_steps]
    assert max(start + length for _, start, length in found) == len(record.dones)
    return found


def to_go(rewards):
    returns = []
    for reward in rewards[::-1]:
        returns.insert(0, reward + GAMMA * (returns[0] if returns else 0.0))
    return returns


def expected_advantages(baseline, record, found, average):
    """By the definitions, and the mean return of the rollout; zero for what does not count."""
    returns = [to_go(record.rewards[start : start + n, env].astype(float)) for env, start, n in found]
    first = [tuple(record.observations[start, env]) for env, start, _ in found]
    every = np.concatenate(returns)
    advantages = every.copy()
    if baseline == "leave_one_out":
        advantages -= slow_leave_one_out(returns)[0]
    elif baseline == "leave_one_out_same_start":
        alone = np.concatenate([np.full(len(x), first.count(f) < 2) for x, f in zip(returns, first, strict=True)])
        others = slow_leave_one_out(returns)[0]
        advantages -= np.where(alone, others, slow_leave_one_out_within(returns, first))
    elif baseline == "group":
        mean, deviation = map(np.array, slow_within_group(returns, first))
        advantages = (every - mean) / (deviation + 1e-4)
    elif baseline == "ema":
        advantages -= 0.0 if average is None else average
    elif callable(baseline):
        observations = [record.observations[start : start + n, env] for env, start, n in found]
        advantages -= own(np.concatenate(observations), every)
    table = np.zeros(record.dones.shape)
    pieces = np.split(advantages, np.cumsum([n for _, _, n in found])[:-1])
    for (env, start, n), piece in zip(found, pieces, strict=True):
        table[start : start + n, env] = piece
    return table, every.mean()


ALGORITHMS = {
    "ppo, steps": (PPO, {"n_steps": 11, "batch_size": 8, "n_epochs": 2}),
    "ppo, episodes": (PPO, {"n_episodes": 5, "batch_size": 8, "n_epochs": 2}),
    "trpo, steps": (TRPO, {"n_steps": 11, "batch_size": 8, "n_critic_updates": 2}),
    "trpo, episodes": (TRPO, {"n_episodes": 5, "batch_size": 8, "n_critic_updates": 2}),
    "reinforce": (REINFORCE, {"n_episodes": 5, "batch_size": 8, "n_critic_updates": 2}),
}
ALL = pytest.mark.parametrize("algorithm", ALGORITHMS)


def make(algorithm, env, **more):
    kind, options = ALGORITHMS[algorithm]
    policy_kwargs = {"net_arch": [8], **more.pop("policy_kwargs", {})}
    options = {"learning_rate": 1e-2, "gamma": GAMMA, "seed": 0, "device": "cpu", **options, **more}
    return kind("MlpPolicy", env, policy_kwargs=policy_kwargs, **options)


# ------------------------------------------------------------------ advantages


@pytest.mark.parametrize("algorithm, baseline, n_envs", pairs(ALGORITHMS, BASELINES, [1, 2, 3]))
def test_advantages_are_those_of_the_definition(algorithm, baseline, n_envs):
    model, recorder = make(algorithm, same_starts(n_envs), baseline=baseline, ema_decay=0.7), Recorder()
    model.learn(40 * n_envs, callback=recorder)
    assert len(recorder.rollouts) > 1
    average = None
    for record in recorder.rollouts:
        found = episodes_that_count(record, ALGORITHMS[algorithm][1].get("n_steps"), model.n_episodes)
        counts = np.zeros(record.dones.shape, dtype=bool)
        for env, start, n in found:
            counts[start : start + n, env] = True
        np.testing.assert_array_equal(record.keep, counts)
        expected, now = expected_advantages(baseline, record, found, average)
        np.testing.assert_allclose(record.advantages, expected, atol=1e-5, rtol=1e-5)
        assert (record.advantages[~counts] == 0).all()
        average = now if average is None else 0.7 * average + 0.3 * now
    if baseline == "ema":
        assert model._return_ema == pytest.approx(average, rel=1e-5)
    np.testing.assert_array_equal(model.rollout_buffer.advantages[: model.rollout.n_steps], record.advantages)


@pytest.mark.parametrize("algorithm", ["ppo, episodes", "trpo, episodes", "reinforce"])
def test_the_value_network_on_whole_episodes(algorithm):
    """Generalised advantages; what a time limit cut is completed by the value network."""
    model, recorder, gae_lambda = make(algorithm, same_starts(), gae_lambda=0.8), Recorder(), 0.8
    model.learn(60, callback=recorder)
    model.learning_rate = 0.0  # so that the values are still those of the rollout
    model._setup_lr_schedule()
    recorder.rollouts.clear()
    model.learn(1, callback=recorder)
    (record,) = recorder.rollouts
    found = episodes_that_count(record, None, 5)
    assert record.keep.sum() == sum(n for *_, n in found)
    rewards = record.rewards.astype(float)
    for cut in model.rollout.cuts:
        with th.no_grad():
            value = model.policy.predict_values(th.as_tensor(cut.observation[None])).item()
        rewards[cut.step, cut.env] += GAMMA * value
    assert model.rollout.cuts
    with th.no_grad():
        values = model.policy.predict_values(th.as_tensor(record.observations.reshape(-1, 3))).numpy()
        last = model.policy.predict_values(th.as_tensor(model._last_obs)).numpy().ravel()
    values = values.reshape(record.dones.shape)
    expected = slow_advantages(rewards, values, record.dones, last, GAMMA, gae_lambda)
    np.testing.assert_allclose(record.advantages, expected, atol=1e-5)


# ----------------------------------------------------------------------- steps


def spied_rows(model, monkeypatch):
    """The rows of each batch that the policy takes a step on."""
    rows, engine = [], model.network
    name = "actor" if isinstance(model, TRPO) else "evaluate"
    original = getattr(engine, name)

    def spy(batch):
        rows.append(batch.rows.copy())
        return original(batch)

    monkeypatch.setattr(engine, name, spy)
    return rows


@pytest.mark.parametrize("engine", ["auto", "autograd"])
@pytest.mark.parametrize("baseline", [None, "leave_one_out"])
@ALL
def test_samples_that_do_not_count_are_not_in_the_batch(algorithm, baseline, engine, monkeypatch):
    model = make(algorithm, same_starts(), baseline=baseline, engine=engine)
    batches, recorder = spied_rows(model, monkeypatch), Recorder()
    model.learn(1, callback=recorder)
    (record,) = recorder.rollouts
    kept = np.flatnonzero(record.keep)
    assert 0 < len(kept) < record.keep.size
    times = 2 if isinstance(model, PPO) else 1  # epochs
    assert sorted(np.concatenate(batches).tolist()) == sorted(times * kept.tolist())
    assert len(model.network.batch(model.rollout, model.horizon.keep(model.rollout))) == len(kept)


CRITIC = {"plain": {}, "weight decay": {"policy_kwargs": {"optimizer_kwargs": {"weight_decay": 0.1}}}}


@pytest.mark.parametrize(
    "algorithm, baseline, engine, optimizer", pairs(ALGORITHMS, BASELINES, ["auto", "autograd"], CRITIC)
)
def test_the_value_network_stays_as_it_was(algorithm, baseline, engine, optimizer):
    model = make(algorithm, same_starts(), baseline=baseline, engine=engine, **CRITIC[optimizer])
    before = {name: x.clone() for name, x in model.policy.state_dict().items()}
    model.learn(100)
    for name, x in model.policy.state_dict().items():
        assert th.equal(x, before[name]) == ("value" in name), name


@pytest.mark.parametrize("engine", ["auto", "autograd"])
@pytest.mark.parametrize("optimizer", CRITIC)
def test_the_value_network_stays_as_it_was_after_early_stopping(optimizer, engine):
    options = {"baseline": "leave_one_out", "engine": engine, "target_kl": 1e-6, **CRITIC[optimizer]}
    model = make("ppo, steps", same_starts(), **options)
    before = {name: x.clone() for name, x in model.policy.state_dict().items()}
    model.learn(1)
    assert model.logger.name_to_value["train/early_stop"] == 1
    for name, x in model.policy.state_dict().items():
        assert "value" not in name or th.equal(x, before[name]), name


@ALL
def test_the_value_network_is_fitted_where_it_is_the_baseline(algorithm):
    model = make(algorithm, same_starts())
    before = {name: x.clone() for name, x in model.policy.state_dict().items()}
    model.learn(100)
    assert not any(th.equal(x, before[name]) for name, x in model.policy.state_dict().items())


# ---------------------------------------------------------------------- errors


@pytest.mark.parametrize("baseline", ["leave_one_out", *SAME_START])
@pytest.mark.parametrize("algorithm", ["ppo, episodes", "trpo, episodes", "reinforce"])
def test_one_episode_cannot_be_compared(algorithm, baseline):
    with pytest.raises(ArgumentError, match=rf"baseline='{baseline}' compares .*there is only 1\. Raise `n_episodes`"):
        make(algorithm, same_starts(1), baseline=baseline, n_episodes=1)
    make(algorithm, same_starts(2), baseline=baseline, n_episodes=1)  # one of each environment
    make(algorithm, same_starts(1), baseline=baseline, n_episodes=2)
    for other in ("value", "ema", None, own):
        make(algorithm, same_starts(1), baseline=other, n_episodes=1).learn(1)


@pytest.mark.parametrize("algorithm", ["ppo, steps", "trpo, steps"])
def test_one_episode_of_a_few_steps_cannot_be_compared(algorithm):
    model = make(algorithm, same_starts(1, lengths=(30,)), baseline="leave_one_out")
    with pytest.raises(ArgumentError, match="there is only 1"):
        model.learn(100)
    assert model.num_timesteps == 30


@pytest.mark.parametrize("baseline", SAME_START)
@ALL
def test_starts_that_are_never_the_same(algorithm, baseline):
    model = make(algorithm, make_envs(action="discrete", n_envs=2), baseline=baseline)
    before = model.policy.parameters_to_vector()
    with pytest.raises(ArgumentError, match=r"No two of the \d+ episodes of this rollout began with the same obs"):
        model.learn(100)
    assert 0 < model.num_timesteps < 60
    np.testing.assert_array_equal(model.policy.parameters_to_vector(), before)


def test_starts_of_dictionaries():
    observations = {"a": np.array([[0.0], [9.0], [0.0], [0.0]]), "b": np.array([1, 9, 2, 1])}
    first = {key: x[[0, 2, 3]] for key, x in observations.items()}
    samples = Samples(observations, first, np.zeros(4), np.array([0, 0, 1, 2]), np.array([0, 1, 0, 0]))
    group = samples.same_start()
    assert group[0] == group[1] == group[3] != group[2]
    samples.first["b"][2] = 3
    with pytest.raises(ArgumentError, match="No two of the 3 episodes"):
        samples.same_start()


def test_an_own_baseline_is_checked():
    samples = Samples(np.zeros((3, 1)), np.zeros((2, 1)), np.arange(3.0), np.array([0, 0, 1]), np.array([0, 1, 0]))
    np.testing.assert_allclose(compared(lambda o, r: 2 * r, samples, None), [0.0, -1.0, -2.0])
    for wrong in (lambda o, r: r[:2], lambda o, r: np.array([0.0, np.nan, 1.0])):
        with pytest.raises(ArgumentError, match="one finite number for each of the 3 samples"):
            compared(wrong, samples, None)


# ---------------------------------------------------------------------- groups


@ALL
def test_equal_returns_of_a_group_teach_nothing(algorithm):
    model = make(algorithm, same_starts(lengths=(3,), starts=(0,), reward=0.3), baseline="group", ent_coef=0.0)
    model.learn(1)
    rollout = model.rollout
    assert rollout.n_finished.min() >= 2
    np.testing.assert_allclose(rollout.buffer.advantages[: rollout.n_steps], 0.0, atol=1e-9)
    assert rollout.buffer.returns[0].min() > 0.5


@ALL
def test_a_group_is_compared_with_itself_alone(algorithm):
    """Higher rewards of all episodes with the same start change nothing."""
    found = []
    for bonus in (0.0, 100.0):

        class Bonus(SameStart):
            def step(self, action, bonus=bonus):
                observation, reward, *rest = super().step(action)
                if self.steps == 1 and self.starts[self.episode % len(self.starts)] == 0:
                    reward += bonus
                return observation, reward, *rest

        env = DummyVecEnv([lambda rank=rank, kind=Bonus: kind(rank) for rank in range(2)])
        model = make(algorithm, env, baseline="group")
        model.learn(1)
        found.append(model.rollout.buffer.advantages[: model.rollout.n_steps])
    np.testing.assert_allclose(*found, atol=2e-3)
    assert np.abs(found[0]).max() > 0.5


@pytest.mark.parametrize("baseline", SAME_START)
@ALL
def test_starts_under_running_statistics_are_refused(algorithm, baseline):
    """The same observation is another one when it is next normalised."""
    env = VecNormalize(make_envs(action="discrete", n_envs=2))
    with pytest.raises(ArgumentError, match=rf"`baseline={baseline!r}` .* VecNormalize\(env, norm_obs=False\)"):
        make(algorithm, env, baseline=baseline).learn(100)
    for fixed in (VecNormalize(make_envs(action="discrete", n_envs=2), norm_obs=False), env):
        env.training = False
        with pytest.raises(ArgumentError, match="No two of the"):  # it goes as far as to compare them
            make(algorithm, fixed, baseline=baseline).learn(100)


@pytest.mark.parametrize("algorithm", [PPO, TRPO, REINFORCE])
def test_an_unfinished_rollout_is_not_taken_for_whole_episodes(algorithm):
    """What was interrupted in the middle of episodes is left out when only whole ones are learned from."""
    options = {"n_episodes": None} if algorithm is not REINFORCE else {}
    env = DummyVecEnv([lambda: gym.make("CartPole-v1")] * 2)
    model = algorithm("MlpPolicy", env, n_steps=16, seed=1, **options)
    model.learn(32, callback=lambda names, _: names["self"].num_timesteps != 42)
    model.learn(32, callback=lambda names, _: names["self"].num_timesteps != 42, reset_num_timesteps=False)
    assert model._rollout.n_steps == 5 and not model.rollout_buffer.episode_starts[0].all()
    model.baseline = "leave_one_out"
    model.n_steps, model.gae_lambda = (None, 1.0) if algorithm is REINFORCE else (16, model.gae_lambda)
    starts = []
    note = AtRolloutEnd(lambda m: starts.append(m.rollout_buffer.episode_starts[0].astype(bool)))
    model.learn(1, callback=note, reset_num_timesteps=False)
    assert starts and all(its.all() for its in starts)

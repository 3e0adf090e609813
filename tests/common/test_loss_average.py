"""Whole updates with every average, scale and ratio against autograd on the loss as the papers write it."""

import copy

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from conftest import pairs, silent
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy

from sb3_pg import PPO, REINFORCE, TRPO
from sb3_pg.common.batch import Batch
from sb3_pg.common.errors import ArgumentError
from sb3_pg.common.vec_env import DummyVecEnv

SGD = {"optimizer_class": th.optim.SGD, "net_arch": [8]}
OPTIONS = {"gamma": 1.0, "learning_rate": 0.5, "normalize_advantage": False, "seed": 3, "device": "cpu"}


class Alike(gym.Env):
    """Episodes of several lengths that begin with one of two observations; rewarded at their end, by chance.

    :param rank: of the environment
    :param reward: what it earns in place of that
    """

    def __init__(self, rank, reward=None):
        self.observation_space, self.action_space = spaces.Box(-9.0, 9.0, (3,)), spaces.Discrete(4)
        self.random, self.rank, self.episode, self.reward = np.random.default_rng(rank), rank, 0, reward

    def reset(self, *, seed=None, options=None):
        self.episode += 1
        self.t = 0
        return np.full(3, self.rank % 2, np.float32), {}

    def step(self, action):
        self.t += 1
        over = self.t == 1 + (self.rank + 2 * self.episode) % 5
        reward = float(self.random.normal()) if self.reward is None else self.reward(self.rank)
        return self.random.normal(size=3).astype(np.float32), reward * over, over, False, {}


def envs(reward=None):
    return DummyVecEnv([lambda rank=rank: Alike(rank, reward) for rank in range(6)])


def acted(kind, reward=None, **options):
    """A model with a judged rollout of two episodes of each environment."""
    options = {**OPTIONS, "n_episodes": 12, **options}
    model = silent(kind("MlpPolicy", envs(reward), policy_kwargs=SGD, **options))
    _, callback = model._setup_learn(1)
    model.collect_rollouts(model.env, callback, model.rollout_buffer, model.n_steps)
    return model


def episodes(model):
    """Observations, actions, return and start of each episode that counts."""
    rollout, keep, found = model.rollout, model.horizon.keep(model.rollout), []
    buffer, dones = rollout.buffer, rollout.dones
    for env in range(rollout.n_envs):
        first = 0
        for last in np.flatnonzero(dones[:, env]):
            if keep[first, env]:
                steps = slice(first, last + 1)
                columns = buffer.observations[steps, env], buffer.actions[steps, env, 0]
                found.append((*columns, float(buffer.rewards[steps, env].sum()), env % 2))
            first = last + 1
    return found


def advantage_of(number, its, scale):
    """GRPO's, of the episode with this number."""
    returns, start = np.array([x[2] for x in its]), np.array([x[3] for x in its])
    group = returns[start == start[number]]
    deviation = {"group": group.std(ddof=1), "batch": returns.std(ddof=1), None: None}[scale]
    difference = returns[number] - group.mean()
    return difference if deviation is None else difference / (deviation + 1e-4)


def averaged(losses, average):
    """The mean of the losses of the steps of each episode."""
    if average == "step":
        return th.cat(losses).mean()
    if average == "sequence":
        return th.stack([x.mean() for x in losses]).mean()
    return th.stack([x.sum() / average for x in losses]).mean()


def loss_of(policy, old, its, *, scale, average, ratio, clip):
    """The clipped surrogate, episode by episode."""
    losses = []
    for number, (observations, actions, *_) in enumerate(its):
        seen = th.as_tensor(observations), th.as_tensor(actions)
        log_ratio = policy.evaluate_actions(*seen)[1] - old.evaluate_actions(*seen)[1].detach()
        if ratio == "sequence":
            log_ratio = log_ratio.mean().expand(len(actions))
        r, advantage = log_ratio.exp(), advantage_of(number, its, scale)
        losses.append(-th.minimum(r * advantage, r.clip(1 - clip, 1 + clip) * advantage))
    return averaged(losses, average)


def vector(policy):
    return np.concatenate([p.detach().numpy().ravel() for p in policy.parameters()])


AVERAGES = ["step", "sequence", 7]
SCALES = ["group", "batch", None]
ENGINES = pytest.mark.parametrize("engine", ["auto", "autograd"])


@pytest.mark.parametrize(
    "average, scale, ratio, engine", pairs(AVERAGES, SCALES, ["step", "sequence"], ["auto", "autograd"])
)
def test_an_update_of_grpo_and_of_gspo(average, scale, ratio, engine):
    clip = 0.2 if ratio == "step" else 0.02
    options = {"loss_average": average, "scale_rewards": scale, "ratio": ratio, "clip_range": clip, "engine": engine}
    model = acted(PPO, baseline="group", batch_size=1000, n_epochs=3, max_grad_norm=None, **options)
    its = episodes(model)
    assert len({len(x[1]) for x in its}) > 2
    old = copy.deepcopy(model.policy)
    policy = copy.deepcopy(model.policy)
    for _ in range(3):
        policy.zero_grad()
        loss_of(policy, old, its, scale=scale, average=average, ratio=ratio, clip=clip).backward()
        with th.no_grad():
            for p in policy.parameters():
                p -= 0.5 * (0.0 if p.grad is None else p.grad)
    model.train()
    moved = np.abs(vector(policy) - vector(old)).max()
    assert moved > 0.01
    np.testing.assert_allclose(vector(model.policy), vector(policy), atol=2e-4 * moved)


@ENGINES
@pytest.mark.parametrize("average", AVERAGES)
def test_an_update_of_rloo(average, engine):
    options = {"baseline": "leave_one_out_same_start", "loss_average": average, "engine": engine}
    model = acted(REINFORCE, max_grad_norm=None, **options)
    its, policy = episodes(model), copy.deepcopy(model.policy)
    losses = []
    for number, (observations, actions, earned, start) in enumerate(its):
        others = [x[2] for i, x in enumerate(its) if i != number and x[3] == start]
        log_prob = policy.evaluate_actions(th.as_tensor(observations), th.as_tensor(actions))[1]
        losses.append(-(earned - np.mean(others)) * log_prob)
    averaged(losses, average).backward()
    before = vector(model.policy)
    gradient = np.concatenate([np.zeros(p.numel()) if p.grad is None else p.grad.ravel() for p in policy.parameters()])
    model.train()
    np.testing.assert_allclose((before - vector(model.policy)) / 0.5, gradient, atol=1e-5 * np.abs(gradient).max())


@ENGINES
@pytest.mark.parametrize("average", AVERAGES)
def test_trpo_takes_gradient_fisher_and_kl_with_the_same_weights(average, engine):
    model = acted(TRPO, baseline="group", loss_average=average, engine=engine)
    batch = model._batch(model.rollout)
    sizes = np.bincount(model.rollout.stretches.numbers.ravel()[batch.rows])
    n = sizes[model.rollout.stretches.numbers.ravel()[batch.rows]]
    of_sequences = 1 / n / (sizes > 0).sum()
    expected = {"step": 1 / len(n), "sequence": of_sequences, 7: 1 / 7 / (sizes > 0).sum()}[average]
    np.testing.assert_allclose(batch.scale, expected, rtol=1e-6)
    actor = model.network.actor(batch)
    d = th.randn(len(n)) if engine == "autograd" else np.random.default_rng(0).normal(size=len(n))
    alike = copy.copy(batch)
    alike.weight = alike.count = None
    scaled = d * model.network.asarray(np.broadcast_to(expected, n.shape).astype(np.float32)) * len(n)
    one, other = actor.gradient(d, 0.0), model.network.actor(alike).gradient(scaled, 0.0)
    np.testing.assert_allclose(one, other, atol=1e-5)
    vector = actor.vector / 10
    step, product = 1e-2 * vector, actor.fisher()(vector)
    actor.old  # noqa: B018  # is where it was when it was first looked at
    actor.vector = actor.vector + step
    kl = batch.mean(actor.look().kl)
    assert kl == pytest.approx(0.5e-4 * float(vector @ product), rel=0.05)
    assert kl > 0
    policy = copy.deepcopy(model.policy)
    model.train()
    assert model.logger.name_to_value["train/policy_step"] == "accepted"
    old, new = (its.get_distribution(th.as_tensor(batch.observations)).distribution for its in (policy, model.policy))
    expected_kl = (th.distributions.kl_divergence(old, new).detach().numpy() * expected).sum()
    assert model.logger.name_to_value["train/kl_divergence_loss"] == pytest.approx(expected_kl, rel=1e-3)
    assert 0.003 < expected_kl < 0.01


@pytest.mark.parametrize("kind", [PPO, REINFORCE, TRPO])
@pytest.mark.parametrize("average", AVERAGES)
def test_the_value_loss_has_the_same_weights(average, kind):
    more = {PPO: {"batch_size": 99, "n_epochs": 1, "vf_coef": 1.0, "max_grad_norm": None}}
    more[TRPO] = {"batch_size": 99, "n_critic_updates": 1}
    more[REINFORCE] = {"critic_batch_size": 99, "n_critic_updates": 1, "vf_coef": 0.0, "max_grad_norm": None}
    model = acted(kind, loss_average=average, **{"learning_rate": 0.01, **more[kind]})
    policy, batch = copy.deepcopy(model.policy), model._batch(model.rollout)
    errors = policy.predict_values(th.as_tensor(batch.observations)).flatten() - th.as_tensor(batch.returns)
    number = model.rollout.stretches.numbers.ravel()[batch.rows]
    averaged([errors[number == n] ** 2 for n in np.unique(number)], average).backward()
    before = dict(copy.deepcopy(model.policy).named_parameters())
    model.train()
    for name, p in model.policy.named_parameters():
        if "value" in name:
            expected = policy.get_parameter(name).grad
            np.testing.assert_allclose((before[name] - p).detach() / 0.01, expected, atol=2e-4, err_msg=name)


# --------------------------------------------------------------------- figures

#: The whole rollout in one minibatch, by which the parameters are moved once, with nothing to clip or to normalise.
ONCE = {
    PPO: {"batch_size": 99, "n_epochs": 1},
    REINFORCE: {"critic_batch_size": 99, "n_critic_updates": 1, "vf_coef": 0.0},  # the critic moves in its fit alone
    TRPO: {"batch_size": 99, "n_critic_updates": 1},
}
POLICY_LOSS = {PPO: "policy_gradient_loss", REINFORCE: "policy_loss"}


@ENGINES
@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("baseline", ["value", "leave_one_out"])
@pytest.mark.parametrize("kind", [PPO, REINFORCE, TRPO])
def test_losses_are_logged_by_the_average_and_entropies_by_the_step(kind, baseline, average, engine):
    model = acted(kind, loss_average=average, baseline=baseline, engine=engine, **ONCE[kind])
    batch, policy = model._batch(model.rollout), copy.deepcopy(model.policy)
    with th.no_grad():
        values, log_prob, entropy = policy.evaluate_actions(
            th.as_tensor(batch.observations), th.as_tensor(model.rollout.column("actions")[batch.rows]).flatten()
        )
    advantages, returns = th.as_tensor(batch.advantages), th.as_tensor(batch.returns)
    number = model.rollout.stretches.numbers.ravel()[batch.rows]

    def mean(losses):
        return float(averaged([losses[number == n] for n in np.unique(number)], average))

    model.train()
    figures = {name.removeprefix("train/"): x for name, x in model.logger.name_to_value.items()}
    assert figures["entropy_loss"] == pytest.approx(-float(entropy.mean()), rel=1e-4)
    if baseline == "value":
        assert figures["value_loss"] == pytest.approx(mean((values.flatten() - returns) ** 2), rel=1e-4)
    else:
        assert "value_loss" not in figures
    if kind in POLICY_LOSS:
        expected = mean(-advantages * (log_prob if kind is REINFORCE else 1.0))
        assert figures[POLICY_LOSS[kind]] == pytest.approx(expected, rel=1e-4, abs=1e-5)
    if kind is PPO:
        value_loss = 0.5 * figures.get("value_loss", 0.0)
        assert figures["loss"] == pytest.approx(figures["policy_gradient_loss"] + value_loss, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("kind", [PPO, REINFORCE])
def test_samples_that_are_left_out_count_in_the_logged_loss(kind, average, monkeypatch):
    found = []
    for leave_out in (True, False):
        monkeypatch.setattr(kind, "_may_leave_out", lambda self, batch, leave_out=leave_out: leave_out)
        model = acted(kind, half_equal, baseline="group", loss_average=average, **ONCE[kind])
        model.train()
        found.append(model.logger.name_to_value[f"train/{POLICY_LOSS[kind]}"])
    assert found[0] == pytest.approx(found[1], abs=1e-6)


# ------------------------------------------------------------- nothing to learn


def half_equal(rank):
    """Those that begin with zeros earn the same."""
    return 0.3 if rank % 2 == 0 else float(np.random.default_rng(rank).normal())


@pytest.mark.parametrize("ratio", ["step", "sequence"])
@pytest.mark.parametrize("batch_size", [6, 1000])
@ENGINES
def test_groups_of_equal_returns_cost_nothing(engine, batch_size, ratio, monkeypatch):
    """And change nothing: steps are as many, and as large, as with them."""
    found, rows = [], []
    for leave_out in (True, False):
        model = acted(PPO, half_equal, baseline="group", batch_size=batch_size, n_epochs=2, engine=engine, ratio=ratio)
        monkeypatch.setattr(PPO, "_may_leave_out", lambda self, batch, leave_out=leave_out: leave_out)
        read, evaluate = [], model.network.evaluate
        monkeypatch.setattr(
            model.network, "evaluate", lambda batch, e=evaluate, r=read: r.append(len(batch)) or e(batch)
        )
        np.random.seed(0)
        model.train()
        assert model.logger.name_to_value["train/frac_reward_zero_std"] == 0.5
        found.append(vector(model.policy))
        rows.append(read)
    assert len(rows[0]) == len(rows[1])
    assert sum(rows[0]) < 0.8 * sum(rows[1])
    np.testing.assert_allclose(found[0], found[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        (PPO, {"ent_coef": 0.01}),
        (PPO, {"kl_coef": 0.1}),
        (PPO, {"target_kl": 0.5}),
        (PPO, {"adaptive_lr": True}),
        (PPO, {"normalize_advantage": True}),
        (PPO, {"objective": lambda log_ratio, advantage: (log_ratio**2, 2 * log_ratio)}),
        (REINFORCE, {"ent_coef": 0.01}),
        (REINFORCE, {"normalize_advantage": True}),
    ],
    ids=lambda x: x.__name__ if isinstance(x, type) else next(iter(x)),
)
def test_nothing_is_left_out_where_it_matters(kind, more, monkeypatch):
    model = acted(kind, half_equal, baseline="group", **({} if kind is REINFORCE else {"batch_size": 1000}), **more)
    read, evaluate = [], model.network.evaluate
    monkeypatch.setattr(model.network, "evaluate", lambda batch: read.append(len(batch)) or evaluate(batch))
    model.train()
    assert set(read) == {len(model._batch(model.rollout))}


def test_batch_normalisation_sees_all_samples():
    class Normalised(ActorCriticPolicy):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.norm = th.nn.BatchNorm1d(3)

    model = PPO(Normalised, envs(), baseline="group", n_episodes=12)
    assert not model._may_leave_out(Batch(np.zeros(1)))
    assert acted(PPO)._may_leave_out(Batch(np.zeros(1)))


# ---------------------------------------------------------------------- errors


@pytest.mark.parametrize("kind", [PPO, REINFORCE, TRPO])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scale_rewards": "none", "baseline": "group"}, "`scale_rewards` must be one of 'group', 'batch', None"),
        ({"scale_rewards": None}, "`scale_rewards=None` .* baseline='value' divides by nothing"),
        ({"scale_rewards": "batch", "baseline": "leave_one_out"}, "Use baseline='group', or leave out scale_rewards"),
        ({"loss_average": "token"}, "`loss_average` must be one of 'step', 'sequence' or a length"),
        ({"loss_average": None}, "`loss_average` must be one of"),
        ({"loss_average": 0}, "`loss_average` must be a whole number >= 1, not 0"),
        ({"loss_average": True}, "`loss_average` must be a whole number >= 1, not True"),
        ({"loss_average": 2.5}, "`loss_average` must be a whole number >= 1, not 2.5"),
    ],
)
def test_what_cannot_work(kind, arguments, message):
    with pytest.raises(ArgumentError, match=message):
        kind("MlpPolicy", envs(), **arguments)


def test_ratios_of_sequences_that_are_cut():
    with pytest.raises(ArgumentError, match="`ratio` must be one of 'step', 'sequence', not 'token'"):
        PPO("MlpPolicy", envs(), ratio="token")
    with pytest.raises(ArgumentError, match=r"`ratio='sequence'` .* `sequence_length=4` cuts them"):
        PPO("MlpLstmPolicy", envs(), ratio="sequence", sequence_length=4)

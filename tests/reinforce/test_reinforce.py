"""REINFORCE's update is Williams' estimator, and its options run."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch as th
from conftest import ACTION_SPACES, make_envs, silent
from stable_baselines3.common.env_util import make_vec_env

from sb3_pg import REINFORCE
from sb3_pg.common.errors import ArgumentError
from sb3_pg.reinforce.step_limit import StepLimit


@pytest.mark.parametrize("baseline", ["value", "leave_one_out", "ema", None, lambda obs, returns: np.abs(obs[:, 0])])
@pytest.mark.parametrize("batch_size", [None, 32])
def test_reinforce_baselines_run(baseline, batch_size):
    model = REINFORCE(
        "MlpPolicy",
        make_vec_env("CartPole-v1", 2),
        baseline=baseline,
        batch_size=batch_size,
        policy_kwargs={"net_arch": [16]},
        seed=0,
    ).learn(500)
    assert np.isfinite(model.logger.name_to_value["train/policy_loss"])
    assert model._n_updates > 1


def acted(engine="auto", action="box", **options):
    """A model with plain gradient steps, and the rollout that it is about to learn from."""
    policy_kwargs = {"net_arch": [8], "optimizer_class": th.optim.SGD}
    options = {"n_episodes": 4, "normalize_advantage": False, "max_grad_norm": None, "learning_rate": 0.1, **options}
    env = make_envs(action=action, n_envs=2)
    model = silent(REINFORCE("MlpPolicy", env, policy_kwargs=policy_kwargs, engine=engine, seed=0, **options))
    _, callback = model._setup_learn(100)
    model.collect_rollouts(model.env, callback, model.rollout_buffer, model.n_steps)
    return model


def samples(model):
    """Log-probabilities, entropies and values in the graph, advantages and returns, of what counts."""
    keep, buffer = model.horizon.keep(model.rollout), model.rollout_buffer
    n = model.rollout.n_steps
    observations, actions = (th.as_tensor(getattr(buffer, name)[:n][keep]) for name in ("observations", "actions"))
    actions = (actions.flatten() if model.action_space.shape == () else actions).float()
    value, log_prob, entropy = model.policy.evaluate_actions(observations, actions)
    advantages, returns = (th.as_tensor(getattr(buffer, name)[:n][keep]) for name in ("advantages", "returns"))
    return log_prob, entropy, value.flatten(), advantages, returns


@pytest.mark.parametrize("engine", ["auto", "autograd"])
@pytest.mark.parametrize("action", ACTION_SPACES)
@pytest.mark.parametrize("baseline", ["value", None])
def test_an_update_is_one_step_up_the_gradient(baseline, action, engine):
    model = acted(engine, action, baseline=baseline, ent_coef=0.05, vf_coef=0.7, n_critic_updates=0)
    log_prob, entropy, value, advantages, returns = samples(model)
    loss = -(advantages * log_prob).mean() - 0.05 * entropy.mean()
    if baseline == "value":
        loss = loss + 0.7 * ((value - returns) ** 2).mean()
    gradients = th.autograd.grad(loss, list(model.policy.parameters()), materialize_grads=True)
    before = [p.detach().clone() for p in model.policy.parameters()]
    model.train()
    for p, old, gradient in zip(model.policy.parameters(), before, gradients, strict=True):
        th.testing.assert_close(p, old - 0.1 * gradient, atol=1e-5, rtol=1e-4)
    assert any(gradient.abs().max() > 1e-2 for gradient in gradients)
    logged = model.logger.name_to_value
    assert logged["train/policy_loss"] == pytest.approx(-(advantages * log_prob).mean().item(), rel=1e-4)
    assert logged["train/entropy_loss"] == pytest.approx(-entropy.mean().item(), rel=1e-4)
    assert logged["train/samples_used"] == pytest.approx(len(log_prob) / (2 * model.rollout.n_steps))
    assert logged["train/samples_used"] < 1


@pytest.mark.parametrize("batch_size", [1, 5, 7, 1000])
def test_every_sample_is_used_once(batch_size, monkeypatch):
    model = acted(batch_size=batch_size, n_critic_updates=3, learning_rate=1e-4)
    rows, evaluate = [], model.network.evaluate
    monkeypatch.setattr(model.network, "evaluate", lambda batch: rows.append(batch.rows) or evaluate(batch))
    model.train()
    kept = np.flatnonzero(model.horizon.keep(model.rollout))
    assert sorted(np.concatenate(rows).tolist()) == kept.tolist()
    lengths = [len(x) for x in rows]
    assert len(lengths) == -(-len(kept) // batch_size)
    assert max(lengths) - min(lengths) <= 1  # a shorter last one is spread over all


@pytest.mark.parametrize("engine", ["auto", "autograd"])
def test_the_critics_further_passes_leave_the_policy_alone(engine):
    models = [acted(engine, n_critic_updates=n) for n in (0, 5)]
    errors = []
    for model in models:
        model.train()
        _, _, value, _, returns = samples(model)
        errors.append(((value - returns) ** 2).mean().item())
    assert errors[1] < 0.9 * errors[0]
    for (name, x), y in zip(models[0].policy.state_dict().items(), models[1].policy.state_dict().values(), strict=True):
        assert th.equal(x, y) == ("value" not in name), name


@pytest.mark.parametrize("batch_size", [None, 4])
def test_advantages_are_normalised_over_what_counts(batch_size, monkeypatch):
    model = acted(normalize_advantage=True, batch_size=batch_size, baseline=None)
    *_, advantages, _ = samples(model)
    seen, evaluate = [], model.network.evaluate
    monkeypatch.setattr(model.network, "evaluate", lambda batch: seen.append(batch) or evaluate(batch))
    model.train()
    rows = np.concatenate([batch.rows for batch in seen])
    found = np.concatenate([batch.advantages for batch in seen])[np.argsort(rows)]
    expected = (advantages - advantages.mean()) / advantages.std()
    np.testing.assert_allclose(found, expected, atol=1e-5)


def kept_rows(model):
    """Number in ``samples`` of each sample of the rollout that counts, by its number in the rollout."""
    rows = np.flatnonzero(model.horizon.keep(model.rollout))
    return {row: number for number, row in enumerate(rows.tolist())}


@pytest.mark.parametrize("engine", ["auto", "autograd"])
@pytest.mark.parametrize("action", ["box", "discrete"])
def test_later_steps_are_weighted_by_how_probable_their_actions_have_become(action, engine, monkeypatch):
    model = acted(engine, action, batch_size=3, n_critic_updates=0, vf_coef=0.0, learning_rate=0.3)
    number, rows, evaluate = kept_rows(model), [], model.network.evaluate
    expected = copy.deepcopy(model.policy)
    theirs = SimpleNamespace(**{**vars(model), "policy": expected, "horizon": model.horizon, "rollout": model.rollout})
    old, *_ = samples(theirs)
    monkeypatch.setattr(model.network, "evaluate", lambda batch: rows.append(batch.rows) or evaluate(batch))
    model.train()
    assert len(rows) >= 3
    for its in rows:
        now = [number[row] for row in its.tolist()]
        log_prob, _, _, advantages, _ = samples(theirs)
        loss = -(advantages * (log_prob - old.detach()).exp())[now].mean()
        for p, gradient in zip(
            expected.parameters(),
            th.autograd.grad(loss, list(expected.parameters()), materialize_grads=True),
            strict=True,
        ):
            p.data -= 0.3 * gradient
    for p, other in zip(model.policy.parameters(), expected.parameters(), strict=True):
        th.testing.assert_close(p, other, atol=1e-5, rtol=1e-4)


def divergence(model, old):
    """Mean KL(old || new) over what counts, by torch, in float64."""
    keep, n = model.horizon.keep(model.rollout), model.rollout.n_steps
    observations = th.as_tensor(model.rollout_buffer.observations[:n][keep])
    distributions = []
    for policy in (old, model.policy):
        its = policy.get_distribution(observations).distribution
        is_normal = isinstance(its, th.distributions.Normal)
        parameters = (its.mean.double(), its.stddev.double()) if is_normal else (its.probs.double(),)
        distributions.append(type(its)(*parameters))
    kl = th.distributions.kl_divergence(*distributions)
    return (kl.sum(1) if kl.ndim > 1 else kl).mean().item()


@pytest.mark.parametrize("engine", ["auto", "autograd"])
@pytest.mark.parametrize("action", ["box", "discrete"])
def test_an_update_is_shortened_to_the_target_kl(action, engine):
    free, held, wide = (
        acted(engine, action, batch_size=3, learning_rate=0.3, target_kl=target_kl) for target_kl in (None, 1e-3, 1e3)
    )
    old = copy.deepcopy(held.policy)
    for model in (free, held, wide):
        np.random.seed(0)  # of the order of the samples
        model.train()
    assert divergence(free, old) > 2e-3
    figures = held.logger.name_to_value
    assert figures["train/kl_divergence_loss"] == pytest.approx(divergence(held, old), rel=1e-2)
    assert 0.5e-3 < divergence(held, old) <= 1.001e-3
    share = figures["train/step_share"]
    assert 0 < share < 1
    assert wide.logger.name_to_value["train/step_share"] == 1
    assert "train/step_share" not in free.logger.name_to_value
    starts, ends = dict(old.named_parameters()), dict(free.policy.named_parameters())
    for name, p in held.policy.named_parameters():
        assert th.equal(dict(wide.policy.named_parameters())[name], ends[name]), name
        is_critic = "value" in name
        expected = ends[name] if is_critic else starts[name] + share * (ends[name] - starts[name])
        th.testing.assert_close(p, expected, atol=1e-5, rtol=1e-4, msg=name)


def test_an_update_that_no_shortening_helps_is_not_made(monkeypatch):
    model = acted(target_kl=1e-3, learning_rate=1.0)
    old = copy.deepcopy(model.policy.state_dict())
    monkeypatch.setattr(StepLimit, "_kl", lambda self: float("nan"))
    model.train()
    for name, p in model.policy.state_dict().items():
        assert th.equal(p, old[name]) == ("value" not in name), name
    assert model.logger.name_to_value["train/step_share"] == 0


def test_rmsprop_keeps_what_the_optimizers_arguments_say():
    policy_kwargs = {"optimizer_kwargs": {"weight_decay": 0.1}}
    model = REINFORCE("MlpPolicy", "CartPole-v1", use_rms_prop=True, rms_prop_eps=1e-4, policy_kwargs=policy_kwargs)
    (group,) = model.policy.optimizer.param_groups
    assert type(model.policy.optimizer) is th.optim.RMSprop
    assert (group["alpha"], group["eps"], group["weight_decay"]) == (0.99, 1e-4, 0.1)
    assert policy_kwargs == {"optimizer_kwargs": {"weight_decay": 0.1}}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"use_rms_prop": "no"}, "`use_rms_prop` must be one of True, False"), ({"rms_prop_eps": "a"}, "`rms_prop_eps`")],
)
def test_what_a2cs_optimizer_cannot_be(arguments, message):
    with pytest.raises(ArgumentError, match=message):
        REINFORCE("MlpPolicy", "CartPole-v1", **arguments)

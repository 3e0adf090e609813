"""PPO's options run, log, and do what their rules say."""

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from conftest import make_envs, silent

from sb3_pg import PPO
from sb3_pg.common.batch import Batch
from sb3_pg.ppo.figures import Means
from sb3_pg.ppo.stopping import EarlyStopping, adapted_kl_coef, adapted_learning_rate


def make_ppo(**options):
    options = {"policy_kwargs": {"net_arch": [16]}, "seed": 0, "n_steps": 64, "batch_size": 64, **options}
    return PPO("MlpPolicy", "CartPole-v1", **options)


@pytest.mark.parametrize(
    "options",
    [
        {"clip_range_high": 0.3},
        {"dual_clip": 3.0},
        {"objective": "spo"},
        {"objective": "surrogate", "kl_coef": 1.0, "adaptive_kl_coef": True},
        {"adaptive_lr": True},
        {"target_kl": 0.005},
        {"normalize_advantage": "batch"},
        {"normalize_advantage": "running"},
        {"normalize_advantage": False},
        {"clip_range_vf": 1.0},
        {"max_grad_norm": None},
        {"objective": lambda log_ratio, advantage: (-advantage * log_ratio, -advantage)},
    ],
)
def test_ppo_options_run_and_log(options, tmp_path):
    model = make_ppo(**options).learn(192)
    logged = model.logger.name_to_value
    assert np.isfinite([logged["train/loss"], logged["train/approx_kl"], logged["train/value_loss"]]).all()
    model.save(tmp_path / "model")
    given = {name: value for name, value in options.items() if callable(value)}
    PPO.load(tmp_path / "model", env=gym.make("CartPole-v1"), **given).learn(64)


@pytest.mark.parametrize("array", [np.array, th.tensor])
@pytest.mark.parametrize(
    ("low", "high", "share"), [(0.2, 0.2, 0.5), (0.2, 0.5, 0.25), (0.05, 0.5, 0.5), (0.5, 0.5, 0.0)]
)
def test_the_clip_fraction_counts_what_the_objective_clips(array, low, high, share):
    """Below one and above it by the range of that side."""
    log_ratio = array(np.log([0.7, 0.9, 1.1, 1.4]))
    means = Means(log_ratio, low, high)
    means.add(Batch(log_ratio), log_ratio, log_ratio, log_ratio)
    assert means.figures().clip_fraction == share


def test_both_clip_ranges_reach_the_clip_fraction():
    equal, no_limit = (make_ppo(clip_range=1e-6, clip_range_high=high).learn(64) for high in (None, 1e6))
    shares = [model.logger.name_to_value["train/clip_fraction"] for model in (equal, no_limit)]
    assert shares[0] > 0.8
    assert 0.2 < shares[1] < 0.8


# --------------------------------------------------------------- adapted quantities


@pytest.mark.parametrize(("kl", "factor"), [(0.016, 2.0), (0.0149, 1.0), (0.01, 1.0), (0.0067, 1.0), (0.0066, 0.5)])
def test_the_kl_coefficient_follows_the_kl(kl, factor):
    """Doubled above 1.5 times the desired KL, halved below two thirds of it."""
    assert adapted_kl_coef(3.0, kl, 0.01) == 3.0 * factor


@pytest.mark.parametrize(
    ("learning_rate", "kl", "expected"),
    [
        (1e-3, 0.0201, 1e-3 / 1.5),
        (1e-3, 0.0199, 1e-3),
        (1e-3, 0.0051, 1e-3),
        (1e-3, 0.0049, 1.5e-3),
        (1.2e-5, 1.0, 1e-5),
        (9e-3, 0.0, 1e-2),
    ],
)
def test_the_learning_rate_follows_the_kl(learning_rate, kl, expected):
    """A factor of 1.5 where the KL is twice or half of the desired one, within limits."""
    assert adapted_learning_rate(learning_rate, kl, 0.01) == pytest.approx(expected)


# -------------------------------------------------------------------- early stopping


def judged(engine):
    """A model, its engine, and its first rollout as one batch."""
    model = silent(PPO("MlpPolicy", make_envs(n_envs=2), n_steps=16, batch_size=32, engine=engine, seed=0))
    _, callback = model._setup_learn(32)
    model.collect_rollouts(model.env, callback, model.rollout_buffer, 16)
    return model.network, model.network.batch(model.rollout)


@pytest.mark.parametrize("engine", ["auto", "autograd"])
@pytest.mark.parametrize("noticed", ["by the next minibatch", "at the end"])
def test_the_step_that_overshot_is_taken_back(noticed, engine):
    engine, batch = judged(engine)
    stopping = EarlyStopping(engine, batch, 0.01)
    actor = engine.actor(batch)

    def log_ratio():
        return engine.evaluate(batch).log_prob - batch.old_log_prob

    start = actor.vector
    assert stopping.allows(log_ratio())
    good = start + 1e-4
    actor.vector = good
    assert stopping.allows(log_ratio())
    actor.vector = good + 1.0
    if noticed == "at the end":
        stopping.end(batch)
    else:
        assert not stopping.allows(log_ratio())
    assert stopping.stopped
    assert (actor.vector == good).all()
    assert not stopping.allows(log_ratio())  # for the rest of the update
    stopping.end(batch)
    assert (actor.vector == good).all()


@pytest.mark.parametrize("engine", ["auto", "autograd"])
def test_a_step_within_the_limit_stays(engine):
    engine, batch = judged(engine)
    stopping, actor = EarlyStopping(engine, batch, 0.01), engine.actor(batch)
    assert stopping.allows(engine.evaluate(batch).log_prob - batch.old_log_prob)
    moved = actor.vector + 1e-4
    actor.vector = moved
    stopping.end(batch)
    assert not stopping.stopped
    assert (actor.vector == moved).all()


def test_the_limit_is_one_and_a_half_times_the_target():
    engine, batch = judged("auto")

    def uniform(kl):
        """Log-ratios, all the same, with r - 1 - log r = kl."""
        x = th.tensor(0.1, dtype=th.float64)
        for _ in range(50):
            x = x - (th.expm1(x) - x - kl) / th.expm1(x)
        return np.full(8, float(x))

    assert EarlyStopping(engine, batch, 0.01).allows(uniform(0.01499))
    assert not EarlyStopping(engine, batch, 0.01).allows(uniform(0.01501))


def test_without_a_target_nothing_stops():
    engine, batch = judged("auto")
    stopping = EarlyStopping(engine, batch, None)
    assert stopping.allows(np.full(8, 100.0))
    stopping.end(batch)
    assert not stopping.stopped

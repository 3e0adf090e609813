"""What advantages are divided by, and how far an update goes for it."""

import math

import numpy as np
import pytest
from conftest import make_envs
from tiny_models import ALL, OwnGet, tiny, weights
from torch.optim import SGD

from sb3_pg import PPO, REINFORCE, TRPO
from sb3_pg.common.errors import ArgumentError, NonFiniteError


def make(algorithm, **options):
    options = {"normalize_advantage": "running", "n_steps": 32, **options}
    if algorithm is PPO:
        options = {"batch_size": 32, "n_epochs": 1, **options}
    return tiny(algorithm, make_envs(n_envs=2), **options)


def normalized(model, factor=1.0):
    """The advantages of the last rollout, multiplied by a factor, as an update sees them, and as they are."""
    batch = model._batch(model.rollout)
    batch.advantages = factor * batch.advantages
    return model._normalized(batch), batch.advantages


@ALL
@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_a_quiet_rollout_is_divided_by_the_deviation_of_the_past(algorithm, decay):
    model = make(algorithm, ema_decay=decay).learn(64)
    model._advantage_square = None
    found, given = normalized(model)
    deviation = given.std(ddof=1)
    np.testing.assert_allclose(found, (given - given.mean()) / deviation, rtol=1e-5, atol=1e-6)

    found, _ = normalized(model, 0.1)
    square = decay * deviation**2 + (1 - decay) * (0.1 * deviation) ** 2
    assert model._advantage_square == pytest.approx(square, rel=1e-5)
    assert found.std(ddof=1) == pytest.approx(0.1 * deviation / math.sqrt(square), rel=1e-5)

    found, _ = normalized(model, 10.0)  # louder than the past
    assert found.std(ddof=1) == pytest.approx(1.0, rel=1e-5)


@ALL
def test_the_first_update_is_that_by_the_rollouts_own_deviation(algorithm):
    own = "batch" if algorithm is PPO else True
    found, expected = (weights(make(algorithm, normalize_advantage=how).learn(64)) for how in ("running", own))
    np.testing.assert_allclose(found, expected, atol=1e-6)


@ALL
@pytest.mark.parametrize("engine", ["auto", "autograd"])
def test_a_step_is_in_proportion_to_the_advantages(algorithm, engine):
    """By plain gradient descent and by the trust region; Adam remembers what was louder for longer than a step."""

    def moved(past):
        options = {} if algorithm is PPO else {"n_critic_updates": 0}
        if algorithm is not TRPO:
            options |= {"policy_kwargs": {"optimizer_class": SGD}, "vf_coef": 0.0, "max_grad_norm": None}
        model = make(algorithm, engine=engine, ema_decay=0.999, **options)
        before = weights(model)
        model._advantage_square = past
        model.learn(64)
        return np.linalg.norm(weights(model) - before), model

    usual, model = moved(None)
    quiet, _ = moved(400 * model._advantage_square)
    assert usual > 0
    assert quiet == pytest.approx(usual / 20, rel=0.05)


@ALL
def test_equal_advantages_become_zero(algorithm):
    model = make(algorithm).learn(64)
    model._advantage_square = None
    found, _ = normalized(model, 0.0)
    assert not found.any()
    assert model._advantage_square == 0.0


@ALL
def test_what_is_remembered_is_saved(algorithm, tmp_path):
    model = make(algorithm).learn(128)
    assert model._advantage_square > 0
    model.save(tmp_path / "model")
    assert algorithm.load(tmp_path / "model")._advantage_square == model._advantage_square


@ALL
def test_a_failed_update_is_not_remembered(algorithm, monkeypatch):
    model = make(algorithm).learn(64)
    before, after = model._advantage_square, []

    def failing(rollout, figures):
        after.append(model._advantage_square)
        raise NonFiniteError("no")

    monkeypatch.setattr(model, "_end_update", failing)
    with pytest.raises(NonFiniteError):
        model.learn(64, reset_num_timesteps=False)
    assert model._advantage_square == before != after[0]


@pytest.mark.parametrize(
    ("algorithm", "how"), [(PPO, "batch"), (PPO, "running"), (TRPO, "running"), (REINFORCE, "running")]
)
def test_a_buffer_that_gives_out_samples_in_its_own_way_is_refused(algorithm, how, tmp_path):
    with pytest.raises(ArgumentError, match=f"normalize_advantage='{how}'` .*the whole rollout.*OwnGet"):
        make(algorithm, rollout_buffer_class=OwnGet, normalize_advantage=how)
    model = make(algorithm, rollout_buffer_class=OwnGet, normalize_advantage=True).learn(64)
    model.save(tmp_path / "model")
    with pytest.raises(ArgumentError, match=f"normalize_advantage='{how}'`"):
        algorithm.load(tmp_path / "model", trusted=True, normalize_advantage=how)

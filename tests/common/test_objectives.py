"""Every objective's derivative is autograd's, on both kinds of array."""

from functools import partial

import numpy as np
import pytest
import torch as th

from sb3_pg import PPO
from sb3_pg.common import objectives

# Both signs of the advantage, and zero, against ratios below, inside, at the edge of and above every clip range.
ADVANTAGES = [-3.0, -0.5, 0.0, 0.5, 3.0]
RATIOS = [0.01, 0.5, 0.79, 0.81, 0.999, 1.0, 1.001, 1.19, 1.21, 1.29, 1.31, 2.9, 3.1, 50.0]
LOG_RATIO, ADVANTAGE = (x.ravel() for x in np.meshgrid(np.log(RATIOS), ADVANTAGES))

POLICY_LOSSES = {
    "policy_gradient": objectives.policy_gradient,
    "surrogate": objectives.surrogate,
    "clip": objectives.clipped_surrogate,
    "clip higher": partial(objectives.clipped_surrogate, low=0.2, high=0.3),
    "dual clip": partial(objectives.clipped_surrogate, dual_clip=3.0),
    "spo": partial(objectives.simple_policy_optimization, epsilon=0.2),
    "kl penalty": lambda log_ratio, _: objectives.kl_penalty(log_ratio),
}

VALUES, OLD_VALUES, TARGETS = (x.ravel() for x in np.meshgrid(*[[-1.5, -0.3, -0.1, 0.0, 0.1, 0.3, 1.5]] * 3))
VALUE_LOSSES = {
    "squared": lambda value, target, _: objectives.squared_error(value, target),
    "clipped": partial(objectives.clipped_squared_error, clip_range=0.25),
}


def check_derivative(function, x, *others):
    """The second output is the derivative of the first by ``x``, and NumPy gives the numbers that torch gives."""
    leaf = th.tensor(x, requires_grad=True)
    loss, derivative = function(leaf, *map(th.tensor, others))
    (expected,) = th.autograd.grad(loss.sum(), leaf)
    th.testing.assert_close(derivative, expected, rtol=1e-12, atol=1e-12)

    loss_np, derivative_np = function(x, *others)
    assert isinstance(loss_np, np.ndarray)
    np.testing.assert_allclose(loss_np, loss.detach(), rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(derivative_np, derivative.detach(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_policy_loss_derivative(name):
    check_derivative(POLICY_LOSSES[name], LOG_RATIO, ADVANTAGE)


@pytest.mark.parametrize("name", VALUE_LOSSES)
def test_value_loss_derivative(name):
    check_derivative(VALUE_LOSSES[name], VALUES, TARGETS, OLD_VALUES)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_precision_is_kept(name, dtype):
    """A float64 result on float32 arrays would make every step after it twice as slow."""
    for x in POLICY_LOSSES[name](LOG_RATIO.astype(dtype), ADVANTAGE.astype(dtype)):
        assert x.dtype == dtype and x.shape == LOG_RATIO.shape


@pytest.mark.parametrize(
    ("options", "ratio", "advantage", "loss", "derivative"),
    [
        # inside the range: -r A
        ({}, 1.1, 2.0, -2.2, -2.2),
        ({}, 0.9, -2.0, 1.8, 1.8),
        # moved too far in the direction of the advantage: constant
        ({}, 1.5, 2.0, -2.4, 0.0),
        ({}, 0.5, -2.0, 1.6, 0.0),
        # moved too far against it: still pulled back
        ({}, 1.5, -2.0, 3.0, 3.0),
        ({}, 0.5, 2.0, -1.0, -1.0),
        # the two ends of the range are separate
        ({"low": 0.1, "high": 0.4}, 1.3, 1.0, -1.3, -1.3),
        ({"low": 0.1, "high": 0.4}, 1.5, 1.0, -1.4, 0.0),
        ({"low": 0.1, "high": 0.4}, 0.8, -1.0, 0.9, 0.0),
        # dual clip bounds the loss of bad actions only
        ({"dual_clip": 3.0}, 5.0, -2.0, 6.0, 0.0),
        ({"dual_clip": 3.0}, 2.5, -2.0, 5.0, 5.0),
        ({"dual_clip": 3.0}, 5.0, 2.0, -2.4, 0.0),
    ],
)
def test_clipped_surrogate_by_hand(options, ratio, advantage, loss, derivative):
    found = objectives.clipped_surrogate(np.log([ratio]), np.array([advantage]), **options)
    np.testing.assert_allclose(found, [[loss], [derivative]], atol=1e-12)


@pytest.mark.parametrize("advantage", [-2.0, 2.0])
def test_clip_range_ends_are_inside(advantage):
    """At a tie of the two branches the gradient flows, as it does in SB3."""
    _, derivative = objectives.clipped_surrogate(np.zeros(1), np.array([advantage]), low=0.0, high=0.0)
    assert derivative == -advantage


def test_spo_peaks_at_the_edge_of_the_range():
    ratio = np.linspace(0.5, 1.5, 1001)
    for advantage, peak in [(2.0, 1.2), (-2.0, 0.8)]:
        loss, _ = objectives.simple_policy_optimization(np.log(ratio), np.full_like(ratio, advantage), epsilon=0.2)
        assert ratio[loss.argmin()] == pytest.approx(peak)


def test_kl_penalty_estimates_kl():
    """Never negative, zero at equality, unbiased: its mean over all actions, by the old policy, is the KL."""
    rng = np.random.default_rng(0)
    p, q = rng.dirichlet(np.ones(5), size=2)
    penalty, derivative = objectives.kl_penalty(np.log(q / p))
    assert penalty.min() >= 0.0
    assert p @ penalty == pytest.approx(p @ np.log(p / q))
    np.testing.assert_allclose(derivative, q / p - 1.0)
    assert objectives.kl_penalty(np.zeros(1)) == (0.0, 0.0)


def test_kl_penalty_of_tiny_ratios_is_not_rounding_noise():
    penalty, _ = objectives.kl_penalty(np.float32([1e-3]))
    assert penalty[0] == pytest.approx(0.5e-6, rel=1e-2)


def test_clipped_value_error_is_the_larger_one():
    clip = 0.25
    loss, derivative = objectives.clipped_squared_error(VALUES, TARGETS, OLD_VALUES, clip)
    clipped = np.clip(VALUES, OLD_VALUES - clip, OLD_VALUES + clip)
    unclipped_error, clipped_error = (VALUES - TARGETS) ** 2, (clipped - TARGETS) ** 2
    np.testing.assert_allclose(loss, np.maximum(unclipped_error, clipped_error), atol=1e-12)
    assert (loss > clipped_error + 1e-9).any()  # the clipped prediction alone would hide these errors
    # A value that overshot the range on the wrong side of its target is pulled back.
    overshot = (np.abs(VALUES - OLD_VALUES) > clip) & (unclipped_error > clipped_error + 1e-9)
    np.testing.assert_allclose(derivative[overshot], 2.0 * (VALUES - TARGETS)[overshot])


@pytest.mark.parametrize("kind", [np.asarray, th.as_tensor])
def test_spo_without_a_range_takes_no_step(kind):
    """Where a schedule of the clip range ends at 0; the smaller the range, the stronger the pull back to ratio 1."""
    log_ratio, advantage = kind(np.array([0.0, 0.1, -0.2])), kind(np.array([1.0, -2.0, 0.5]))
    loss, derivative = objectives.simple_policy_optimization(log_ratio, advantage, epsilon=0.0)
    np.testing.assert_allclose(loss, -np.exp([0.0, 0.1, -0.2]) * [1.0, -2.0, 0.5])
    np.testing.assert_array_equal(derivative, np.zeros(3))


@pytest.mark.parametrize("objective", ["clip", "spo"])
@pytest.mark.parametrize("ratio", ["step", "sequence"])
def test_a_clip_range_that_ends_at_zero(objective, ratio):
    model = PPO(
        "MlpPolicy",
        "CartPole-v1",
        objective=objective,
        ratio=ratio,
        clip_range=lambda left: 0.2 * left,
        n_steps=32,
        batch_size=16,
        seed=1,
    )
    assert model.learn(128).num_timesteps == 128

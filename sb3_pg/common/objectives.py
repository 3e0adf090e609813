"""What to maximise: small pure functions from (log_ratio, advantage) to (loss, its derivative).

Every objective takes ``log_ratio = log pi(a|s) - log pi_old(a|s)`` and ``advantage``, arrays of the same shape
(n,), and returns two arrays of that shape: the loss of each sample (to be minimised) and the derivative of that
loss with respect to the log-probability ``log pi(a|s)``. Because ``d ratio / d log pi = ratio``, the derivative
of a function of the ratio is the ratio times its ordinary derivative.

They are written against the array API standard, so the same text serves NumPy (the closed form) and torch
(autograd, any device). An objective of your own is any function of that form.
"""

from typing import Any

import numpy as np
import torch as th

from sb3_pg.common.arrays import Array, namespace

__all__ = [
    "clipped_squared_error",
    "clipped_surrogate",
    "kl_estimate",
    "kl_penalty",
    "policy_gradient",
    "sequence_means",
    "simple_policy_optimization",
    "squared_error",
    "surrogate",
]


def clip(x: Array, low: float, high: float) -> Array:
    """Keep ``x`` within bounds; ``np.clip`` checks its arguments for longer than this takes on a minibatch."""
    if isinstance(x, np.ndarray):
        return np.minimum(np.maximum(x, low), high)
    return namespace(x).clip(x, low, high)


def policy_gradient(log_prob: Array, advantage: Array) -> tuple[Array, Array]:
    """Return the score-function estimator of Williams (1992): ``-A log pi``.

    Its argument is the log-probability itself rather than a log-ratio; the derivative is the same for both.
    """
    return -advantage * log_prob, -advantage


def surrogate(log_ratio: Array, advantage: Array) -> tuple[Array, Array]:
    """Return the importance-sampled objective of TRPO (Schulman et al. 2015, eq. 14): ``-r A``."""
    loss = -advantage * namespace(log_ratio).exp(log_ratio)
    return loss, loss


def clipped_surrogate(
    log_ratio: Array, advantage: Array, low: float = 0.2, high: float = 0.2, dual_clip: float | None = None
) -> tuple[Array, Array]:
    """Return PPO's loss and its derivative (Schulman et al. 2017, eq. 7): ``-min(r A, clip(r, 1 - low, 1 + high) A)``.

    :param low: how far the ratio may fall below one before its gradient stops; smaller is more cautious
    :param high: the same above one; a larger ``high`` lets rare good actions grow faster (Yu et al. 2025, DAPO)
    :param dual_clip: bounds the loss of bad actions whose ratio has exploded to ``dual_clip * |A|``
        (Ye et al. 2020, eq. 5); above 1, usually 2 to 5, smaller is more cautious
    """
    xp = namespace(log_ratio)
    ratio = xp.exp(log_ratio)
    unclipped = ratio * advantage
    clipped = clip(ratio, 1.0 - low, 1.0 + high) * advantage
    # Where the clipped branch is the smaller one the ratio is outside the range, so its derivative is zero.
    gain = xp.minimum(unclipped, clipped)
    active = unclipped <= clipped
    if dual_clip is not None:
        floor = dual_clip * advantage
        bounded = (advantage < 0) & (gain < floor)
        gain = xp.where(bounded, floor, gain)
        active = active & ~bounded
    return -gain, -unclipped * active


def simple_policy_optimization(log_ratio: Array, advantage: Array, epsilon: float = 0.2) -> tuple[Array, Array]:
    """Return the loss of SPO and its derivative (Xie et al. 2024, eq. 13): ``-(r A - |A| (r - 1)^2 / (2 epsilon))``.

    A parabola with its peak at the edge of the clip range, so the gradient pulls an overshooting ratio back
    instead of vanishing there.

    :param epsilon: where the peak is; smaller is more cautious, and 0, where a schedule may end, has no step at all
    """
    xp = namespace(log_ratio)
    ratio = xp.exp(log_ratio)
    if epsilon == 0.0:
        return -ratio * advantage, xp.zeros_like(ratio)
    size = xp.abs(advantage)
    loss = size * (ratio - 1.0) ** 2 / (2.0 * epsilon) - ratio * advantage
    return loss, ratio * (size * (ratio - 1.0) / epsilon - advantage)


def kl_penalty(log_ratio: Array) -> tuple[Array, Array]:
    """Return the estimator ``(r - 1) - log r`` of KL(old || new) per sample, and its derivative ``r - 1``.

    Non-negative and unbiased for actions of the old policy (J. Schulman, "Approximating KL divergence", 2020).
    """
    ratio_minus_one = namespace(log_ratio).expm1(log_ratio)
    return ratio_minus_one - log_ratio, ratio_minus_one


#: The estimators of J. Schulman, "Approximating KL divergence" (2020).
KL_ESTIMATORS = ("k1", "k2", "k3")


def kl_estimate(log_ratio: Array, estimator: str) -> tuple[Array, Array]:
    """Return an estimate of KL(policy || reference) for actions of the policy, and its derivative by ``log pi(a|s)``.

    (J. Schulman, "Approximating KL divergence", 2020). With d the log-ratio: "k1" is d, unbiased. "k2" is d^2 / 2,
    biased, with less variance. "k3" is exp(-d) - 1 + d, unbiased, never negative. The means of their derivatives times
    the score are other things: of k1 zero, whatever the policies; of k2 the gradient of KL(policy || reference); of k3
    that of KL(reference || policy).

    :param log_ratio: ``log pi(a|s) - log pi_ref(a|s)``, (n,)
    :param estimator: one of ``KL_ESTIMATORS``
    """
    xp = namespace(log_ratio)
    if estimator == "k1":
        return log_ratio, xp.ones_like(log_ratio)
    if estimator == "k2":
        return 0.5 * log_ratio * log_ratio, log_ratio
    inverse_less_one = xp.expm1(-log_ratio)
    return inverse_less_one + log_ratio, -inverse_less_one


def sequence_means(x: Array, sequences: np.ndarray) -> Array:
    """Return for each sample the mean over all samples of its sequence, (n,).

    Of log-ratios it is the logarithm of GSPO's ratio, the geometric mean of those of a sequence (Zheng et al. 2025,
    section 4.1). Such means are a symmetric matrix where all of a sequence count alike, so that the means of a loss's
    derivatives by them are its derivatives by the log-probabilities (section 4.2).

    :param x: one number per sample, (n,)
    :param sequences: number of the sequence of each sample, (n,)
    """
    place, sizes = np.unique(sequences, return_inverse=True, return_counts=True)[1:]
    if isinstance(x, np.ndarray):
        means: np.ndarray = (np.bincount(place, x) / sizes)[place].astype(x.dtype)
        return means
    index = th.as_tensor(place, device=x.device)
    sums = x.new_zeros(len(sizes)).index_add(0, index, x)
    return (sums / th.as_tensor(sizes, device=x.device))[index]


def squared_error(value: Array, target: Array) -> tuple[Array, Array]:
    """Return ``(v - R)^2`` and its derivative with respect to ``v``."""
    error = value - target
    return error * error, 2.0 * error


def clipped_squared_error(value: Array, target: Array, old_value: Array, clip_range: float) -> tuple[Array, Array]:
    """PPO's pessimistic value loss: the larger of the errors of ``v`` and of ``v`` kept near ``v_old``.

    :param old_value: the prediction before the update
    :param clip_range: how far the value may move from ``old_value``, in units of the return; smaller is more cautious
    """
    xp: Any = namespace(value)
    change = value - old_value
    error = value - target
    clipped_error = old_value + clip(change, -clip_range, clip_range) - target
    unclipped_is_larger = error * error >= clipped_error * clipped_error
    inside = xp.abs(change) <= clip_range
    loss = xp.where(unclipped_is_larger, error * error, clipped_error * clipped_error)
    derivative = xp.where(unclipped_is_larger | inside, 2.0 * error, xp.zeros_like(error))
    return loss, derivative

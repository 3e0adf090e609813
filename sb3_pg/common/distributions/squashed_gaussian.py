"""Independent actions that are the hyperbolic tangent of normal ones."""

import math

import numpy as np
import torch as th

from sb3_pg.common.arrays import Array, namespace
from sb3_pg.common.distributions.family import Likelihood, Parameters, column
from sb3_pg.common.distributions.gaussian import Gaussian
from sb3_pg.common.products import row_sums

#: Where a normal density is looked at for means of smooth functions, and the weights that it has there. The trapezoid
#: rule converges exponentially for these (Trefethen and Weideman 2014, SIAM Review 56), and sooner than Gauss's where
#: the deviation is large: tanh has its poles near.
_NODES = np.arange(-5.0, 5.25, 0.5)
_WEIGHTS = np.exp(-0.5 * _NODES**2) / np.exp(-0.5 * _NODES**2).sum()


class SquashedGaussian(Gaussian):
    """Independent actions in [-1, 1], ``tanh(u)`` of normal u: parameters (mean, log_std) of u, as of the Gaussian.

    Actions are recorded as u, see :class:`sb3_pg.common.distributions.squash.Squash`, so that nothing has to be
    inverted and log(1 - tanh(u)^2) is exact where tanh(u) rounds to 1. Densities are those of tanh(u). KL and Fisher
    matrix are the Gaussian's, because tanh is one-to-one.

    The entropy ``H(u) + E[log(1 - tanh(u)^2)]`` has no closed form. Its mean is taken by a quadrature of 21 nodes,
    right to 1e-3 nats for deviations up to 3. The usual estimate, minus the log-probability of the action taken, will
    not do on-policy: its derivative is on average zero, as that of any log-probability is.

    :param n_dims: k
    :param takes_mean: take the mean of tanh(u), not tanh of u's mean, which is the median, without chance
    """

    def __init__(self, n_dims: int, *, takes_mean: bool = False) -> None:
        super().__init__(n_dims)
        self.takes_mean = takes_mean

    def evaluate(self, parameters: Parameters, actions: Array) -> Likelihood:
        of_gaussian = super().evaluate(parameters, actions)

        def pull(d_log_prob: Array | None, d_entropy: Array | float | None) -> Parameters:
            d_mean, d_log_std = of_gaussian.pull(d_log_prob, d_entropy)
            if d_entropy is None:
                return d_mean, d_log_std
            # The derivative of log(1 - tanh(u)^2) is -2 tanh(u).
            u, z, std = _nodes(parameters)
            t, weight = namespace(u).tanh(u), column(d_entropy)
            return d_mean - 2.0 * weight * _mean(t), d_log_std - 2.0 * weight * std * _mean(z * t)

        log_prob = of_gaussian.log_prob - row_sums(_log_slope(actions))
        return Likelihood(log_prob, of_gaussian.entropy, pull)  # of ``entropy`` below

    def log_prob(self, parameters: Parameters, actions: Array) -> Array:
        return super().log_prob(parameters, actions) - row_sums(_log_slope(actions))

    def entropy(self, parameters: Parameters) -> Array:
        return super().entropy(parameters) + row_sums(_mean(_log_slope(_nodes(parameters)[0])))

    def mode(self, parameters: Parameters) -> Array:
        if not self.takes_mean:
            return super().mode(parameters)
        u, *_ = _nodes(parameters)
        mean = namespace(u).clip(_mean(namespace(u).tanh(u)), -1.0 + 1e-7, 1.0 - 1e-7)
        return 0.5 * namespace(u).log((1.0 + mean) / (1.0 - mean))


def _log_slope(u: Array) -> Array:
    """Return log(1 - tanh(u)^2), also where tanh(u) rounds to 1."""
    xp = namespace(u)
    size = xp.abs(u)
    return 2.0 * math.log(2.0) - 2.0 * (size + xp.log1p(xp.exp(-2.0 * size)))


def _nodes(parameters: Parameters) -> tuple[Array, Array, Array]:
    """Return u at the nodes of the quadrature, (n, k, nodes), the nodes themselves, (nodes,), and the deviation."""
    mean, log_std = parameters
    std, z = namespace(mean).exp(log_std), _in_place_of(mean, _NODES)
    return mean[:, :, None] + std[..., None] * z, z, std


def _mean(f: Array) -> Array:
    """Return the mean over the nodes, (n, k)."""
    weights = _in_place_of(f, _WEIGHTS)
    if isinstance(f, np.ndarray):
        mean: np.ndarray = np.einsum("ijk,k->ij", f, weights)  # on one thread
        return mean
    return f @ weights


def _in_place_of(like: Array, x: np.ndarray) -> Array:
    """Return constants in the kind, precision and place of other numbers."""
    if isinstance(like, np.ndarray):
        return x.astype(like.dtype, copy=False)
    return th.as_tensor(x, dtype=like.dtype, device=like.device)

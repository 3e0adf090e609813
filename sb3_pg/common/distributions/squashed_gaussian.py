"""Independent actions that are the hyperbolic tangent of normal ones."""

import math
from collections.abc import Callable

import numpy as np
import torch as th

from sb3_pg.common.arrays import Array, namespace
from sb3_pg.common.distributions.family import Likelihood, Parameters, column
from sb3_pg.common.distributions.functions import erf
from sb3_pg.common.distributions.gaussian import Gaussian
from sb3_pg.common.products import row_sums

#: Where a narrow normal density is looked at for means of smooth functions, and the weights that it has there. The
#: trapezoid rule converges exponentially for these (Trefethen and Weideman 2014, SIAM Review 56).
_NODES = np.arange(-5.0, 5.25, 0.5)
_WEIGHTS = np.exp(-0.5 * _NODES**2) / np.exp(-0.5 * _NODES**2).sum()

#: Deviations above it are wide: seen from there tanh is a jump, sign(u), log(1 - tanh(u)^2) a corner, 2 log 2 - 2|u|.
#: Their means have closed forms. The rest falls as exp(-2|u|), which Gauss and Laguerre's rule is for, on each side.
_WIDE = 1.0
_DISTANCES, _OF_DISTANCES = (0.5 * x for x in np.polynomial.laguerre.laggauss(12))
_BENDS = np.concatenate([-_DISTANCES, _DISTANCES])
_BOTH = np.concatenate([_OF_DISTANCES, _OF_DISTANCES])
_REST_OF_TANH = _BOTH * -2.0 * np.sign(_BENDS) / (1.0 + np.exp(-2.0 * np.abs(_BENDS)))
_REST_OF_LOG = _BOTH * -2.0 * np.log1p(np.exp(-2.0 * np.abs(_BENDS))) * np.exp(2.0 * np.abs(_BENDS))


class SquashedGaussian(Gaussian):
    """Independent actions in [-1, 1], ``tanh(u)`` of normal u: parameters (mean, log_std) of u, as of the Gaussian.

    Actions are recorded as u, see :class:`sb3_pg.common.distributions.squash.Squash`, so that nothing has to be
    inverted and log(1 - tanh(u)^2) is exact where tanh(u) rounds to 1. Densities are those of tanh(u). KL and Fisher
    matrix are the Gaussian's, because tanh is one-to-one.

    The entropy ``H(u) + E[log(1 - tanh(u)^2)]`` has no closed form. Its mean is taken by a quadrature, as the mean of
    tanh(u) is: right to 4e-6 whatever the deviation. The usual estimate, minus the log-probability of the action taken,
    will not do on-policy: its derivative is on average zero, as that of any log-probability is.

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
            weight, std = 2.0 * column(d_entropy), namespace(parameters[1]).exp(parameters[1])
            return d_mean - weight * mean_tanh(parameters), d_log_std - weight * std * mean_z_tanh(parameters)

        log_prob = of_gaussian.log_prob - row_sums(_log_slope(actions))
        return Likelihood(log_prob, of_gaussian.entropy, pull)  # of ``entropy`` below

    def log_prob(self, parameters: Parameters, actions: Array) -> Array:
        return super().log_prob(parameters, actions) - row_sums(_log_slope(actions))

    def entropy(self, parameters: Parameters) -> Array:
        return super().entropy(parameters) + row_sums(mean_log_slope(parameters))

    def mode(self, parameters: Parameters) -> Array:
        if not self.takes_mean:
            return super().mode(parameters)
        xp = namespace(parameters[0])
        mean = xp.clip(mean_tanh(parameters), -1.0 + 1e-7, 1.0 - 1e-7)
        return 0.5 * xp.log((1.0 + mean) / (1.0 - mean))


def _log_slope(u: Array) -> Array:
    """Return log(1 - tanh(u)^2), also where tanh(u) rounds to 1."""
    xp = namespace(u)
    size = xp.abs(u)
    return 2.0 * math.log(2.0) - 2.0 * (size + xp.log1p(xp.exp(-2.0 * size)))


def mean_log_slope(parameters: Parameters) -> Array:
    """Return E[log(1 - tanh(u)^2)], (n, k)."""

    def wide(mean: Array, std: Array) -> Array:
        _, density = _at_bends(mean, std)
        size = 2.0 * std * _density(mean / std) + mean * erf(mean / std * math.sqrt(0.5))  # E|u|
        return 2.0 * math.log(2.0) - 2.0 * size + _sums(density, _REST_OF_LOG)

    return _by_width(parameters, lambda u, z: _log_slope(u), wide)


def mean_tanh(parameters: Parameters) -> Array:
    """Return E[tanh(u)], (n, k)."""

    def wide(mean: Array, std: Array) -> Array:
        _, density = _at_bends(mean, std)
        return erf(mean / std * math.sqrt(0.5)) + _sums(density, _REST_OF_TANH)

    return _by_width(parameters, lambda u, z: namespace(u).tanh(u), wide)


def mean_z_tanh(parameters: Parameters) -> Array:
    """Return E[z tanh(u)] with u = mean + std z, (n, k)."""

    def wide(mean: Array, std: Array) -> Array:
        z, density = _at_bends(mean, std)
        return 2.0 * _density(mean / std) + _sums(z * density, _REST_OF_TANH)

    return _by_width(parameters, lambda u, z: z * namespace(u).tanh(u), wide)


def _by_width(
    parameters: Parameters, f: Callable[[Array, Array], Array], wide: Callable[[Array, Array], Array]
) -> Array:
    """Return the mean of a function of (u, z), (n, k).

    :param wide: gives it for wide densities, of mean and deviation
    """
    mean, log_std = parameters
    std, z = namespace(mean).exp(log_std), _in_place_of(mean, _NODES)
    is_wide = std > _WIDE
    if is_wide.all():
        return wide(mean, std)
    narrow = _sums(f(mean[:, :, None] + std[..., None] * z, z), _WEIGHTS)
    return namespace(mean).where(is_wide, wide(mean, std), narrow) if is_wide.any() else narrow


def _density(z: Array) -> Array:
    """Return the standard normal density."""
    return namespace(z).exp(-0.5 * z * z) * (1.0 / math.sqrt(2.0 * math.pi))


def _at_bends(mean: Array, std: Array) -> tuple[Array, Array]:
    """Return z and the density of u where tanh bends, (n, k, nodes) each."""
    z = (_in_place_of(mean, _BENDS) - mean[:, :, None]) / std[..., None]
    return z, _density(z) / std[..., None]


def _sums(f: Array, weights: np.ndarray) -> Array:
    """Return weighted sums over the nodes, (n, k)."""
    its = _in_place_of(f, weights)
    if isinstance(f, np.ndarray):
        sums: np.ndarray = np.einsum("ijk,k->ij", f, its)  # on one thread
        return sums
    return f @ its


def _in_place_of(like: Array, x: np.ndarray) -> Array:
    """Return constants in the kind, precision and place of other numbers."""
    if isinstance(like, np.ndarray):
        return x.astype(like.dtype, copy=False)
    return th.as_tensor(x, dtype=like.dtype, device=like.device)

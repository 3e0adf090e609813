"""Independent beta-distributed actions."""

import math
from collections.abc import Callable

import numpy as np
import torch as th

from sb3_pg.common.arrays import Array, namespace
from sb3_pg.common.distributions.family import Likelihood, Parameters, column
from sb3_pg.common.distributions.functions import as_float64, digamma, gammaln, in_type_of, softplus, trigamma
from sb3_pg.common.products import row_sums


class Beta:
    """Independent actions in [-1, 1], ``2 x - 1`` of beta-distributed x (Chou, Maturana and Scherer 2017, ICML).

    Parameters (alpha, beta), (n, k) each, of 1 or more, so that there is one mode. Actions are recorded before
    squashing, see :class:`sb3_pg.common.distributions.squash.Squash`: as u with ``x = 1 / (1 + exp(-2 u))``, whose
    logarithms are exact where x itself rounds to 0 or 1. Densities are those of the squashed action. Formulas are in
    float64: of large alpha and beta they subtract large numbers from each other.

    :param n_dims: k
    :param takes_mean: take the mean, not the mode, without chance
    """

    takes_log_std = False

    def __init__(self, n_dims: int, *, takes_mean: bool = False) -> None:
        self.n_dims, self.takes_mean = n_dims, takes_mean

    def evaluate(self, parameters: Parameters, actions: Array) -> Likelihood:
        like, (alpha, beta) = parameters[0], map(as_float64, parameters)
        log_normaliser, psi = _log_normaliser(alpha, beta), _each(digamma, alpha, beta)
        log_x, log_rest = _logarithms(actions)

        def pull(d_log_prob: Array | None, d_entropy: Array | float | None) -> Parameters:
            xp = namespace(alpha)
            d_alpha, d_beta = xp.zeros_like(alpha), xp.zeros_like(beta)
            if d_log_prob is not None:
                d = d_log_prob[:, None]
                d_alpha, d_beta = d * (log_x - psi[0] + psi[2]), d * (log_rest - psi[1] + psi[2])
            if d_entropy is not None:
                slopes, weight = _each(trigamma, alpha, beta), column(d_entropy)
                both = (alpha + beta - 2.0) * slopes[2]
                d_alpha = d_alpha + weight * (both - (alpha - 1.0) * slopes[0])
                d_beta = d_beta + weight * (both - (beta - 1.0) * slopes[1])
            return in_type_of(d_alpha, like), in_type_of(d_beta, like)

        log_prob = self._summed((alpha - 1.0) * log_x + (beta - 1.0) * log_rest - log_normaliser, -1.0, like)
        entropy = self._summed(_entropy(alpha, beta, log_normaliser, psi), 1.0, like)
        return Likelihood(log_prob, entropy, pull)

    def _summed(self, each: Array, sign: float, like: Array) -> Array:
        """Return what x has of a quantity of each dimension, summed, plus or minus what ``2 x - 1`` has more."""
        return in_type_of(row_sums(each) + sign * self.n_dims * math.log(2.0), like)

    def log_prob(self, parameters: Parameters, actions: Array) -> Array:
        alpha, beta = map(as_float64, parameters)
        log_x, log_rest = _logarithms(actions)
        each = (alpha - 1.0) * log_x + (beta - 1.0) * log_rest - _log_normaliser(alpha, beta)
        return self._summed(each, -1.0, parameters[0])

    def entropy(self, parameters: Parameters) -> Array:
        alpha, beta = map(as_float64, parameters)
        each = _entropy(alpha, beta, _log_normaliser(alpha, beta), _each(digamma, alpha, beta))
        return self._summed(each, 1.0, parameters[0])

    def kl(self, old: Parameters, new: Parameters) -> Array:
        (a, b), (alpha, beta) = map(as_float64, old), map(as_float64, new)
        of_a, of_b, of_both = _each(digamma, a, b)
        each = _log_normaliser(alpha, beta) - _log_normaliser(a, b)
        each = each + (a - alpha) * of_a + (b - beta) * of_b + (alpha - a + beta - b) * of_both
        return in_type_of(row_sums(each), old[0])

    def fisher(self, parameters: Parameters) -> Callable[[Parameters], Parameters]:
        like, (alpha, beta) = parameters[0], map(as_float64, parameters)
        of_alpha, of_beta, of_both = (in_type_of(x, like) for x in _each(trigamma, alpha, beta))

        def product(tangent: Parameters) -> Parameters:
            shared = of_both * (tangent[0] + tangent[1])
            return of_alpha * tangent[0] - shared, of_beta * tangent[1] - shared

        return product

    def sample(self, parameters: Parameters) -> Array:
        # x = g / (g + h) of two gamma-distributed numbers, so that 2 u = log g - log h.
        shapes = th.from_numpy(np.concatenate(parameters, axis=-1, dtype=np.float64))
        logarithms: np.ndarray = np.log(th._standard_gamma(shapes).numpy())
        k = logarithms.shape[1] // 2
        return in_type_of(0.5 * (logarithms[:, :k] - logarithms[:, k:]), parameters[0])

    def mode(self, parameters: Parameters) -> Array:
        alpha, beta = parameters
        if self.takes_mean:
            return 0.5 * namespace(alpha).log(alpha / beta)
        tiny = 1e-12  # of the uniform distribution the middle, and never infinite
        return 0.5 * namespace(alpha).log((alpha - 1.0 + tiny) / (beta - 1.0 + tiny))


def _logarithms(u: Array) -> tuple[Array, Array]:
    """Return log(x) and log(1 - x)."""
    doubled = 2.0 * as_float64(u)
    log_x = -softplus(-doubled)
    return log_x, log_x - doubled


def _entropy(alpha: Array, beta: Array, log_normaliser: Array, psi: tuple[Array, Array, Array]) -> Array:
    """Return the entropy of each x.

    :param psi: digamma of alpha, of beta and of their sum
    """
    return log_normaliser - (alpha - 1.0) * psi[0] - (beta - 1.0) * psi[1] + (alpha + beta - 2.0) * psi[2]


def _each(function: Callable[[Array], Array], alpha: Array, beta: Array) -> tuple[Array, Array, Array]:
    """Return a function of alpha, of beta and of their sum, by one call, which on a few numbers takes as long."""
    k = alpha.shape[1]
    found = function(namespace(alpha).concat([alpha, beta, alpha + beta], axis=-1))
    return found[:, :k], found[:, k : 2 * k], found[:, 2 * k :]


def _log_normaliser(alpha: Array, beta: Array) -> Array:
    of_alpha, of_beta, of_both = _each(gammaln, alpha, beta)
    return of_alpha + of_beta - of_both

"""Independent normal actions."""

import math
from collections.abc import Callable

import numpy as np

from sb3_pg.common.arrays import Array, namespace
from sb3_pg.common.distributions.family import Likelihood, Parameters, column, noise_buffers
from sb3_pg.common.products import row_sums


class Gaussian:
    """Independent normal actions: parameters (mean, log_std), (n, k) each, or (k,) for log_std."""

    takes_log_std = True

    def __init__(self, n_dims: int) -> None:
        self.n_dims = n_dims
        self.constant = 0.5 * n_dims * math.log(2.0 * math.pi)

    def evaluate(self, parameters: Parameters, actions: Array) -> Likelihood:
        mean, log_std = parameters
        precision = namespace(mean).exp(-log_std)
        z = (actions - mean) * precision
        square = z * z

        def pull(d_log_prob: Array | None, d_entropy: Array | float | None) -> Parameters:
            if d_log_prob is None:
                d_mean, d_log_std = namespace(z).zeros_like(z), namespace(z).zeros_like(z)
            else:
                d = d_log_prob[:, None]
                d_mean, d_log_std = d * (z * precision), d * (square - 1.0)
            return d_mean, d_log_std if d_entropy is None else d_log_std + column(d_entropy)

        return Likelihood(self._log_prob(square, log_std), self.entropy(parameters), pull)

    def _log_prob(self, square: Array, log_std: Array) -> Array:
        return -0.5 * row_sums(square) - (log_std.sum(-1) + self.constant)

    def log_prob(self, parameters: Parameters, actions: Array) -> Array:
        mean, log_std = parameters
        z = (actions - mean) * namespace(mean).exp(-log_std)
        return self._log_prob(z * z, log_std)

    def entropy(self, parameters: Parameters) -> Array:
        mean, log_std = parameters
        total = log_std.sum(-1) + 0.5 * self.n_dims * (1.0 + math.log(2.0 * math.pi))
        return total + namespace(mean).zeros_like(mean[:, 0])

    def kl(self, old: Parameters, new: Parameters) -> Array:
        (old_mean, old_log_std), (mean, log_std) = old, new
        xp = namespace(mean)
        # Written with expm1 so that equal standard deviations give exactly zero, not rounding noise.
        change = 2.0 * (old_log_std - log_std)
        distance = (old_mean - mean) * xp.exp(-log_std)
        return 0.5 * row_sums(xp.expm1(change) - change + distance * distance)

    def fisher(self, parameters: Parameters) -> Callable[[Parameters], Parameters]:
        mean, log_std = parameters
        precision = namespace(mean).exp(-2.0 * log_std)
        return lambda tangent: (tangent[0] * precision, 2.0 * tangent[1])

    def noise(self, n_rows: int) -> np.ndarray:
        """Return standard normal numbers, (n_rows, k), until this thread next asks for as many."""
        numbers, view = noise_buffers.of_shape(n_rows, self.n_dims)
        numbers.normal_()
        return view

    def sample(self, parameters: Parameters) -> Array:
        mean, log_std = parameters
        return mean + namespace(mean).exp(log_std) * self.noise(len(mean))

    def mode(self, parameters: Parameters) -> Array:
        return parameters[0]

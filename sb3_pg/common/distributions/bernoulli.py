"""Independent yes/no actions."""

from collections.abc import Callable

import numpy as np
import torch as th

from sb3_pg.common.arrays import Array, namespace
from sb3_pg.common.distributions.family import Likelihood, Parameters, column
from sb3_pg.common.products import row_sums


class Bernoulli:
    """Independent yes/no actions: parameters (logits,), (n, k); actions are zeros and ones."""

    def __init__(self, n_dims: int) -> None:
        self.n_dims = n_dims

    @staticmethod
    def _softplus(x: Array) -> Array:
        xp = namespace(x)
        return xp.log1p(xp.exp(-xp.abs(x))) + xp.where(x > 0, x, xp.zeros_like(x))

    @staticmethod
    def _sigmoid(x: Array) -> Array:
        return 0.5 * (1.0 + namespace(x).tanh(0.5 * x))

    def evaluate(self, parameters: Parameters, actions: Array) -> Likelihood:
        (logits,) = parameters
        p = self._sigmoid(logits)

        def pull(d_log_prob: Array | None, d_entropy: Array | float | None) -> Parameters:
            d = namespace(p).zeros_like(p) if d_log_prob is None else d_log_prob[:, None] * (actions - p)
            return (d if d_entropy is None else d - column(d_entropy) * (logits * p * (1.0 - p)),)

        return Likelihood(self.log_prob(parameters, actions), self.entropy(parameters), pull)

    def log_prob(self, parameters: Parameters, actions: Array) -> Array:
        (logits,) = parameters
        return row_sums(actions * logits - self._softplus(logits))

    def entropy(self, parameters: Parameters) -> Array:
        (logits,) = parameters
        return row_sums(self._softplus(logits) - logits * self._sigmoid(logits))

    def kl(self, old: Parameters, new: Parameters) -> Array:
        (p, q) = old[0], new[0]
        return row_sums(self._sigmoid(p) * (p - q) - self._softplus(p) + self._softplus(q))

    def fisher(self, parameters: Parameters) -> Callable[[Parameters], Parameters]:
        p = self._sigmoid(parameters[0])
        variance = p * (1.0 - p)
        return lambda tangent: (variance * tangent[0],)

    def noise(self, n_rows: int) -> np.ndarray:
        uniform = th.rand(n_rows, self.n_dims).numpy()
        logistic: np.ndarray = np.log1p(-uniform) - np.log(uniform)
        return logistic

    def sample(self, parameters: Parameters, noise: Array) -> Array:
        return self.mode((parameters[0] + noise,))

    def mode(self, parameters: Parameters) -> Array:
        return namespace(parameters[0]).astype(parameters[0] > 0, parameters[0].dtype)

"""Independent yes/no actions."""

from collections.abc import Callable

import numpy as np
import torch as th

from sb3_pg.common.arrays import Array, namespace
from sb3_pg.common.distributions.family import Likelihood, Parameters, column
from sb3_pg.common.distributions.functions import sigmoid, softplus
from sb3_pg.common.products import row_sums


class Bernoulli:
    """Independent yes/no actions: parameters (logits,), (n, k); actions are zeros and ones."""

    takes_log_std = False

    def __init__(self, n_dims: int) -> None:
        self.n_dims = n_dims

    def evaluate(self, parameters: Parameters, actions: Array) -> Likelihood:
        (logits,) = parameters
        p = sigmoid(logits)

        def pull(d_log_prob: Array | None, d_entropy: Array | float | None) -> Parameters:
            d = namespace(p).zeros_like(p) if d_log_prob is None else d_log_prob[:, None] * (actions - p)
            return (d if d_entropy is None else d - column(d_entropy) * (logits * p * (1.0 - p)),)

        return Likelihood(self.log_prob(parameters, actions), self.entropy(parameters), pull)

    def log_prob(self, parameters: Parameters, actions: Array) -> Array:
        (logits,) = parameters
        return row_sums(actions * logits - softplus(logits))

    def entropy(self, parameters: Parameters) -> Array:
        (logits,) = parameters
        return row_sums(softplus(logits) - logits * sigmoid(logits))

    def kl(self, old: Parameters, new: Parameters) -> Array:
        (p, q) = old[0], new[0]
        return row_sums(sigmoid(p) * (p - q) - softplus(p) + softplus(q))

    def fisher(self, parameters: Parameters) -> Callable[[Parameters], Parameters]:
        p = sigmoid(parameters[0])
        variance = p * (1.0 - p)
        return lambda tangent: (variance * tangent[0],)

    def noise(self, n_rows: int) -> np.ndarray:
        """Return logistic numbers, (n_rows, k)."""
        uniform = th.rand(n_rows, self.n_dims).numpy()
        logistic: np.ndarray = np.log1p(-uniform) - np.log(uniform)
        return logistic

    def sample(self, parameters: Parameters) -> Array:
        (logits,) = parameters
        return self.mode((logits + self.noise(len(logits)),))

    def mode(self, parameters: Parameters) -> Array:
        return namespace(parameters[0]).astype(parameters[0] > 0, parameters[0].dtype)

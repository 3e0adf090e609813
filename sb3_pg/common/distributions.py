"""Action distributions as formulas: log-probability, entropy, KL and Fisher matrix of a batch.

A *family* turns the outputs of a network into numbers, on NumPy arrays and torch tensors alike. Its parameters
are a tuple of arrays with one row per sample: ``(mean, log_std)`` for the Gaussian (``log_std`` may also be one
row for all), ``(logits,)`` for the others. Quantities are summed over action dimensions, which are independent:
the joint distribution is what a trust region is about.
"""

import math
from functools import lru_cache
from typing import Protocol

import numpy as np
import torch as th
from stable_baselines3.common.distributions import Distribution

from sb3_pg.common.arrays import Array, namespace

Parameters = tuple[Array, ...]


class Family(Protocol):
    """The formulas of one kind of action distribution."""

    def log_prob(self, parameters: Parameters, actions: Array) -> Array:
        """Log-probability (density) of each row of ``actions``, shape (n,)."""

    def d_log_prob(self, parameters: Parameters, actions: Array) -> Parameters:
        """The derivative of each row's log-probability with respect to that row's parameters."""

    def entropy(self, parameters: Parameters) -> Array:
        """Entropy of each row in nats, shape (n,)."""

    def d_entropy(self, parameters: Parameters) -> Parameters:
        """The derivative of each row's entropy with respect to that row's parameters."""

    def kl(self, old: Parameters, new: Parameters) -> Array:
        """KL(old || new) of each row in nats, shape (n,)."""

    def fisher(self, parameters: Parameters, tangent: Parameters) -> Parameters:
        """Each row's Fisher matrix (with respect to its parameters) times a tangent vector."""

    def noise(self, n_rows: int) -> np.ndarray:
        """Random numbers with which ``sample`` draws ``n_rows`` actions, (n_rows, k).

        From torch's generator, in the amounts that torch's distributions take: the same seed gives the same actions
        as SB3's policy, whichever network acts.
        """

    def sample(self, parameters: Parameters, noise: Array) -> Array:
        """One action for each row, drawn with the given noise."""

    def mode(self, parameters: Parameters) -> Array:
        """The most likely action of each row."""


def d_parameters(
    family: Family, parameters: Parameters, actions: Array, d_log_prob: Array | None, d_entropy: float | None
) -> Parameters | None:
    """The derivative of a loss by each row's parameters, from those by its log-probability and entropy.

    :param d_log_prob: (n,), or None if the loss does not depend on it
    :param d_entropy: the same number for each row; None or 0 if the loss does not depend on it
    :return: None if it depends on neither
    """
    total: Parameters | None = None
    if d_log_prob is not None:
        total = tuple(d_log_prob[:, None] * x for x in family.d_log_prob(parameters, actions))
    if d_entropy:
        more = tuple(d_entropy * x for x in family.d_entropy(parameters))
        total = more if total is None else tuple(a + b for a, b in zip(total, more, strict=True))
    return total


@lru_cache(maxsize=64)
def _scratch(n_rows: int, n_columns: int) -> tuple[th.Tensor, np.ndarray]:
    """Memory for noise, as torch and as NumPy see it; good until the next noise of that shape is drawn."""
    numbers = th.empty(n_rows, n_columns)
    return numbers, numbers.numpy()


class Gaussian:
    """Independent normal actions: parameters (mean, log_std), (n, k) each, or (k,) for log_std."""

    def __init__(self, n_dims: int) -> None:
        self.n_dims = n_dims
        self.constant = 0.5 * n_dims * math.log(2.0 * math.pi)

    def log_prob(self, parameters: Parameters, actions: Array) -> Array:
        mean, log_std = parameters
        xp = namespace(mean)
        z = (actions - mean) * xp.exp(-log_std)
        return -0.5 * (z * z).sum(axis=-1) - (log_std.sum(axis=-1) + self.constant)

    def d_log_prob(self, parameters: Parameters, actions: Array) -> Parameters:
        mean, log_std = parameters
        precision = namespace(mean).exp(-log_std)
        z = (actions - mean) * precision
        return z * precision, z * z - 1.0

    def entropy(self, parameters: Parameters) -> Array:
        mean, log_std = parameters
        total = log_std.sum(axis=-1) + 0.5 * self.n_dims * (1.0 + math.log(2.0 * math.pi))
        return total + namespace(mean).zeros_like(mean[:, 0])

    def d_entropy(self, parameters: Parameters) -> Parameters:
        mean, _ = parameters
        xp = namespace(mean)
        return xp.zeros_like(mean), xp.ones_like(mean)

    def kl(self, old: Parameters, new: Parameters) -> Array:
        (old_mean, old_log_std), (mean, log_std) = old, new
        xp = namespace(mean)
        # Written with expm1 so that equal standard deviations give exactly zero, not rounding noise.
        change = 2.0 * (old_log_std - log_std)
        distance = (old_mean - mean) * xp.exp(-log_std)
        return 0.5 * xp.sum(xp.expm1(change) - change + distance * distance, axis=-1)

    def fisher(self, parameters: Parameters, tangent: Parameters) -> Parameters:
        mean, log_std = parameters
        return tangent[0] * namespace(mean).exp(-2.0 * log_std), 2.0 * tangent[1]

    def noise(self, n_rows: int) -> np.ndarray:
        numbers, view = _scratch(n_rows, self.n_dims)
        numbers.normal_()
        return view

    def sample(self, parameters: Parameters, noise: Array) -> Array:
        mean, log_std = parameters
        return mean + namespace(mean).exp(log_std) * noise

    def mode(self, parameters: Parameters) -> Array:
        return parameters[0]


def _largest(x: Array) -> Array:
    """The largest number of each row, (n, 1)."""
    return x.max(axis=-1, keepdims=True) if isinstance(x, np.ndarray) else x.amax(dim=-1, keepdim=True)


def _sum(blocks: list[Array]) -> Array:
    return blocks[0] if len(blocks) == 1 else sum(blocks)


def _side_by_side(blocks: list[Array]) -> Array:
    return blocks[0] if len(blocks) == 1 else namespace(blocks[0]).concat(blocks, axis=-1)


class Categorical:
    """One or several independent choices: parameters (logits,), (n, sum of ``sizes``).

    :param sizes: number of options of each choice; actions are (n, len(sizes)) integers, or (n,) for one choice
    """

    def __init__(self, sizes: list[int]) -> None:
        ends = np.cumsum(sizes)
        self.n_logits = int(ends[-1])
        self.blocks = [slice(int(end - size), int(end)) for end, size in zip(ends, sizes, strict=True)]

    def _softmax(self, logits: Array) -> list[tuple[Array, Array]]:
        """Log-probability and probability of the options of each choice."""
        xp = namespace(logits)
        normalised = []
        for block in self.blocks:
            x = logits[:, block]
            x = x - _largest(x)
            p = xp.exp(x)
            total = p.sum(axis=-1, keepdims=True)
            normalised.append((x - xp.log(total), p / total))
        return normalised

    def _chosen(self, actions: Array) -> list[Array]:
        return [actions] if actions.ndim == 1 else [actions[:, i] for i in range(len(self.blocks))]

    def log_prob(self, parameters: Parameters, actions: Array) -> Array:
        xp = namespace(parameters[0])
        row = xp.arange(len(actions))
        blocks = zip(self._softmax(parameters[0]), self._chosen(actions), strict=True)
        return _sum([log_p[row, chosen] for (log_p, _), chosen in blocks])

    def d_log_prob(self, parameters: Parameters, actions: Array) -> Parameters:
        xp = namespace(parameters[0])
        row = xp.arange(len(actions))
        derivative = []
        for (_, p), chosen in zip(self._softmax(parameters[0]), self._chosen(actions), strict=True):
            d = -p
            d[row, chosen] += 1.0
            derivative.append(d)
        return (_side_by_side(derivative),)

    def entropy(self, parameters: Parameters) -> Array:
        return -_sum([(p * log_p).sum(axis=-1) for log_p, p in self._softmax(parameters[0])])

    def d_entropy(self, parameters: Parameters) -> Parameters:
        derivative = []
        for log_p, p in self._softmax(parameters[0]):
            entropy = -(p * log_p).sum(axis=-1, keepdims=True)
            derivative.append(-p * (log_p + entropy))
        return (_side_by_side(derivative),)

    def kl(self, old: Parameters, new: Parameters) -> Array:
        blocks = zip(self._softmax(old[0]), self._softmax(new[0]), strict=True)
        return _sum([(p * (log_p - log_q)).sum(axis=-1) for (log_p, p), (log_q, _) in blocks])

    def fisher(self, parameters: Parameters, tangent: Parameters) -> Parameters:
        product = []
        for (_, p), block in zip(self._softmax(parameters[0]), self.blocks, strict=True):
            t = tangent[0][:, block]
            product.append(p * (t - (p * t).sum(axis=-1, keepdims=True)))
        return (_side_by_side(product),)

    def noise(self, n_rows: int) -> np.ndarray:
        drawn = []
        for block in self.blocks:
            numbers, view = _scratch(n_rows, block.stop - block.start)
            numbers.exponential_()
            drawn.append(np.log(view))
        return drawn[0] if len(drawn) == 1 else np.concatenate(drawn, axis=-1)

    def sample(self, parameters: Parameters, noise: Array) -> Array:
        # Minus the logarithm of an exponential number is Gumbel's, and the largest logit perturbed by Gumbel numbers
        # is distributed as the softmax. torch divides the probabilities by the exponential numbers instead.
        return self.mode((parameters[0] - noise,))

    def mode(self, parameters: Parameters) -> Array:
        (logits,) = parameters
        if len(self.blocks) == 1:
            return logits.argmax(-1)
        return namespace(logits).stack([logits[:, block].argmax(-1) for block in self.blocks], axis=-1)


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
        xp = namespace(x)
        return 0.5 * (1.0 + xp.tanh(0.5 * x))

    def log_prob(self, parameters: Parameters, actions: Array) -> Array:
        (logits,) = parameters
        return namespace(logits).sum(actions * logits - self._softplus(logits), axis=-1)

    def d_log_prob(self, parameters: Parameters, actions: Array) -> Parameters:
        return (actions - self._sigmoid(parameters[0]),)

    def entropy(self, parameters: Parameters) -> Array:
        (logits,) = parameters
        return namespace(logits).sum(self._softplus(logits) - logits * self._sigmoid(logits), axis=-1)

    def d_entropy(self, parameters: Parameters) -> Parameters:
        (logits,) = parameters
        p = self._sigmoid(logits)
        return (-logits * p * (1.0 - p),)

    def kl(self, old: Parameters, new: Parameters) -> Array:
        (p, q) = old[0], new[0]
        terms = self._sigmoid(p) * (p - q) - self._softplus(p) + self._softplus(q)
        return namespace(p).sum(terms, axis=-1)

    def fisher(self, parameters: Parameters, tangent: Parameters) -> Parameters:
        p = self._sigmoid(parameters[0])
        return (p * (1.0 - p) * tangent[0],)

    def noise(self, n_rows: int) -> np.ndarray:
        uniform = th.rand(n_rows, self.n_dims).numpy()
        logistic: np.ndarray = np.log1p(-uniform) - np.log(uniform)
        return logistic

    def sample(self, parameters: Parameters, noise: Array) -> Array:
        return self.mode((parameters[0] + noise,))

    def mode(self, parameters: Parameters) -> Array:
        return namespace(parameters[0]).astype(parameters[0] > 0, parameters[0].dtype)


def describe(distribution: Distribution) -> tuple[Family, Parameters] | None:
    """The family and parameters (in the graph) of an SB3 distribution, or None if its kind is unknown.

    A squashed Gaussian is described before squashing: KL and Fisher matrix do not change under a bijection.
    """
    inner = distribution.distribution
    if isinstance(inner, th.distributions.Normal):
        return Gaussian(inner.loc.shape[-1]), (inner.loc, inner.scale.log())
    if isinstance(inner, th.distributions.Bernoulli):
        return Bernoulli(inner.logits.shape[-1]), (inner.logits,)
    choices = inner if isinstance(inner, list) else [inner]
    if all(isinstance(choice, th.distributions.Categorical) for choice in choices):
        logits: list[th.Tensor] = [choice.logits for choice in choices]  # type: ignore[attr-defined]
        return Categorical([x.shape[-1] for x in logits]), (th.cat(logits, dim=-1),)
    return None

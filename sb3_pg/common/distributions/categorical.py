"""One or several independent choices."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from sb3_pg.common.arrays import Array, namespace
from sb3_pg.common.distributions.family import Likelihood, Parameters, column, noise_buffers


class Softmax(NamedTuple):
    """The options of one choice, (n, options) each."""

    log_p: Array
    p: Array

    @property
    def entropy(self) -> Array:
        """Return the entropy in nats, (n,)."""
        return -(self.p * self.log_p).sum(-1)


class Categorical:
    """One or several independent choices: parameters (logits,), (n, sum of ``sizes``).

    :param sizes: number of options of each choice; actions are (n, len(sizes)) integers, or (n,) for one choice
    """

    takes_log_std = False

    def __init__(self, sizes: list[int]) -> None:
        ends = np.cumsum(sizes)
        self.blocks = [slice(int(end - size), int(end)) for end, size in zip(ends, sizes, strict=True)]

    def _softmax(self, logits: Array) -> list[Softmax]:
        xp, normalised = namespace(logits), []
        logits = _by_columns(logits)
        for block in self.blocks:
            x = logits[:, block]
            x = x - _largest(x)
            p = xp.exp(x)
            total = p.sum(-1)[:, None]
            normalised.append(Softmax(x - xp.log(total), p / total))
        return normalised

    def _chosen(self, actions: Array) -> list[Array]:
        return [actions] if actions.ndim == 1 else [actions[:, i] for i in range(len(self.blocks))]

    def evaluate(self, parameters: Parameters, actions: Array) -> Likelihood:
        softmax, chosen = self._softmax(parameters[0]), self._chosen(actions)
        row = namespace(parameters[0]).arange(len(actions))
        entropies = [block.entropy for block in softmax]

        def pull(d_log_prob: Array | None, d_entropy: Array | float | None) -> Parameters:
            pieces = []
            for block, action, entropy in zip(softmax, chosen, entropies, strict=True):
                d: Any = -block.p
                if d_log_prob is None:
                    d = 0.0 * d
                else:
                    d[row, action] += 1.0
                    d *= d_log_prob[:, None]
                if d_entropy is not None:
                    d = d - column(d_entropy) * block.p * (block.log_p + entropy[:, None])
                pieces.append(d)
            return (_side_by_side(pieces),)

        log_prob = _sum([block.log_p[row, action] for block, action in zip(softmax, chosen, strict=True)])
        return Likelihood(log_prob, _sum(entropies), pull)

    def log_prob(self, parameters: Parameters, actions: Array) -> Array:
        row = namespace(parameters[0]).arange(len(actions))
        blocks = zip(self._softmax(parameters[0]), self._chosen(actions), strict=True)
        return _sum([block.log_p[row, action] for block, action in blocks])

    def entropy(self, parameters: Parameters) -> Array:
        return _sum([block.entropy for block in self._softmax(parameters[0])])

    def kl(self, old: Parameters, new: Parameters) -> Array:
        blocks = zip(self._softmax(old[0]), self._softmax(new[0]), strict=True)
        return _sum([(p.p * (p.log_p - q.log_p)).sum(-1) for p, q in blocks])

    def fisher(self, parameters: Parameters) -> Callable[[Parameters], Parameters]:
        softmax = self._softmax(parameters[0])

        def product(tangent: Parameters) -> Parameters:
            products = []
            for (_, p), block in zip(softmax, self.blocks, strict=True):
                weighted = p * _by_columns(tangent[0][:, block])
                products.append(weighted - p * weighted.sum(-1)[:, None])
            return (_side_by_side(products),)

        return product

    def noise(self, n_rows: int) -> np.ndarray:
        """Return logarithms of exponential numbers, one for each logit."""
        drawn = []
        for block in self.blocks:
            numbers, view = noise_buffers.of_shape(n_rows, block.stop - block.start)
            numbers.exponential_()
            drawn.append(np.log(view))
        return drawn[0] if len(drawn) == 1 else np.concatenate(drawn, axis=-1)

    def sample(self, parameters: Parameters) -> Array:
        # Minus the logarithm of an exponential number is Gumbel's, and the largest logit perturbed by Gumbel numbers
        # is distributed as the softmax. torch divides the probabilities by the exponential numbers instead.
        (logits,) = parameters
        return self.mode((logits - self.noise(len(logits)),))

    def mode(self, parameters: Parameters) -> Array:
        (logits,) = parameters
        if len(self.blocks) == 1:
            return logits.argmax(-1)
        return namespace(logits).stack([logits[:, block].argmax(-1) for block in self.blocks], axis=-1)


def _by_columns(x: Array) -> Array:
    """Return an array of NumPy column by column in memory, where sums over a few columns are faster."""
    return np.asfortranarray(x) if isinstance(x, np.ndarray) else x


def _largest(x: Array) -> Array:
    """Return the largest number of each row, (n, 1)."""
    return x.max(axis=-1, keepdims=True) if isinstance(x, np.ndarray) else x.amax(dim=-1, keepdim=True)


def _sum(blocks: list[Array]) -> Array:
    total = blocks[0]
    for block in blocks[1:]:
        total = total + block
    return total


def _side_by_side(blocks: list[Array]) -> Array:
    return blocks[0] if len(blocks) == 1 else namespace(blocks[0]).concat(blocks, axis=-1)

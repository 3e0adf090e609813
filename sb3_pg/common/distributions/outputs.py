"""Families whose parameters are functions of a network's outputs: a deviation within bounds, alpha and beta."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from sb3_pg.common.arrays import Array, namespace
from sb3_pg.common.distributions.family import Family, Likelihood, Parameters
from sb3_pg.common.distributions.functions import sigmoid, softplus


class Link(Protocol):
    """A function of each number that makes one of a family's parameters."""

    def __call__(self, x: Array) -> Array:
        """Return the parameter."""

    def slope(self, x: Array) -> Array:
        """Return its derivative by x."""


@dataclass(frozen=True)
class Bounded:
    """A smooth way to stay between two numbers: nearly x itself in the middle, and never without a slope.

    With the middle m and half the range r it is ``m + r tanh((x - m) / r)``. To clip would have no derivative outside,
    from where nothing leads back.
    """

    low: float
    high: float

    @property
    def _middle_and_radius(self) -> tuple[float, float]:
        return 0.5 * (self.high + self.low), 0.5 * (self.high - self.low)

    def _scaled(self, x: Array) -> Array:
        middle, radius = self._middle_and_radius
        return (x - middle) / radius

    def __call__(self, x: Array) -> Array:
        middle, radius = self._middle_and_radius
        return middle + radius * namespace(x).tanh(self._scaled(x))

    def slope(self, x: Array) -> Array:
        # 1 - tanh^2, also where tanh rounds to 1
        e = namespace(x).exp(-2.0 * namespace(x).abs(self._scaled(x)))
        return 4.0 * e / ((1.0 + e) * (1.0 + e))

    def inverse(self, y: float) -> float:
        """Return the x that becomes a number inside of the bounds."""
        middle, radius = self._middle_and_radius
        return middle + radius * math.atanh((y - middle) / radius)


@dataclass(frozen=True)
class AboveOne:
    """``1 + log(1 + exp(x))``, for alpha and beta of a beta distribution with one mode."""

    def __call__(self, x: Array) -> Array:
        return 1.0 + softplus(x)

    def slope(self, x: Array) -> Array:
        return sigmoid(x)


class OfOutputs:
    """A family whose parameters are links of numbers that a network puts out.

    :param inner: the family
    :param links: of each of its parameters; None takes the numbers as they are
    :param takes_log_std: the numbers are (outputs, log_std). False: they are columns of the outputs, (n, len(links) k),
        those of the first parameter first
    """

    def __init__(self, inner: Family, links: Sequence[Link | None], *, takes_log_std: bool) -> None:
        self.inner, self.links, self.takes_log_std = inner, tuple(links), takes_log_std

    def parameters(self, outputs: Parameters) -> Parameters:
        """Return the inner family's parameters."""
        numbers = zip(self._split(outputs), self.links, strict=True)
        return tuple(x if link is None else link(x) for x, link in numbers)

    def _slopes(self, outputs: Parameters) -> tuple[Array | None, ...]:
        """Return the derivative of each of the inner family's parameters by its number; None is 1."""
        numbers = zip(self._split(outputs), self.links, strict=True)
        return tuple(None if link is None else link.slope(x) for x, link in numbers)

    def _split(self, outputs: Parameters) -> Parameters:
        if self.takes_log_std:
            return outputs
        k = outputs[0].shape[1] // len(self.links)
        return tuple(outputs[0][:, i * k : (i + 1) * k] for i in range(len(self.links)))

    def _joined(self, parts: Parameters) -> Parameters:
        return parts if self.takes_log_std else (namespace(parts[0]).concat(list(parts), axis=-1),)

    def evaluate(self, outputs: Parameters, actions: Array) -> Likelihood:
        log_prob, entropy, inner_pull = self.inner.evaluate(self.parameters(outputs), actions)

        def pull(d_log_prob: Array | None, d_entropy: Array | float | None) -> Parameters:
            return self._joined(_times(inner_pull(d_log_prob, d_entropy), self._slopes(outputs)))

        return Likelihood(log_prob, entropy, pull)

    def log_prob(self, outputs: Parameters, actions: Array) -> Array:
        return self.inner.log_prob(self.parameters(outputs), actions)

    def entropy(self, outputs: Parameters) -> Array:
        return self.inner.entropy(self.parameters(outputs))

    def kl(self, old: Parameters, new: Parameters) -> Array:
        return self.inner.kl(self.parameters(old), self.parameters(new))

    def fisher(self, outputs: Parameters) -> Callable[[Parameters], Parameters]:
        slopes, of_inner = self._slopes(outputs), self.inner.fisher(self.parameters(outputs))

        def product(tangent: Parameters) -> Parameters:
            return self._joined(_times(of_inner(_times(self._split(tangent), slopes)), slopes))

        return product

    def sample(self, outputs: Parameters) -> Array:
        return self.inner.sample(self.parameters(outputs))

    def mode(self, outputs: Parameters) -> Array:
        return self.inner.mode(self.parameters(outputs))


def _times(parts: Parameters, slopes: tuple[Array | None, ...]) -> Parameters:
    return tuple(x if slope is None else x * slope for x, slope in zip(parts, slopes, strict=True))

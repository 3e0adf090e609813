"""What every kind of action distribution can do: log-probability, entropy, KL and Fisher matrix of a batch.

A *family* turns the outputs of a network into numbers, on NumPy arrays and torch tensors alike. Its parameters
are a tuple of arrays with one row per sample: ``(mean, log_std)`` for the Gaussian (``log_std`` may also be one
row for all), ``(logits,)`` for choices, ``(alpha, beta)`` for the beta distribution. Where a network puts out other
numbers than these, a family is made of it by :class:`sb3_pg.common.distributions.outputs.OfOutputs`. Quantities are
summed over action dimensions, which are independent: the joint distribution is what a trust region is about.
"""

import threading
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch as th

from sb3_pg.common.arrays import Array

Parameters = tuple[Array, ...]


class Likelihood(NamedTuple):
    """How likely the actions of a batch were, and how that depends on each row's parameters."""

    log_prob: Array  #: (n,)
    entropy: Array  #: (n,), nats
    #: The derivatives of a loss by log-probability, (n,) or None, and by entropy, (n,), one number for all or None, to
    #: its derivative by the parameters.
    pull: Callable[[Array | None, Array | float | None], Parameters]


class Family(Protocol):
    """The formulas of one kind of action distribution."""

    #: whether the parameters are a network's outputs and a ``log_std`` for all rows, not outputs alone
    takes_log_std: bool

    def evaluate(self, parameters: Parameters, actions: Array) -> Likelihood:
        """Return log-probability and entropy of each row with their derivatives."""

    def log_prob(self, parameters: Parameters, actions: Array) -> Array:
        """Return the log-probability (density) of each row of ``actions``, (n,)."""

    def entropy(self, parameters: Parameters) -> Array:
        """Return the entropy of each row in nats, (n,)."""

    def kl(self, old: Parameters, new: Parameters) -> Array:
        """Return KL(old || new) of each row in nats, (n,)."""

    def fisher(self, parameters: Parameters) -> Callable[[Parameters], Parameters]:
        """Return the product of each row's Fisher matrix (with respect to its parameters) with a tangent vector."""

    def sample(self, parameters: Parameters) -> Array:
        """Return one action for each row, drawn at random; parameters and actions are NumPy's.

        With torch's generator, and where SB3 has the distribution in the amounts that torch's takes: the same seed
        gives the same actions as SB3's policy, whichever engine acts.
        """

    def mode(self, parameters: Parameters) -> Array:
        """Return the action of each row that is taken without chance, the most likely one unless said otherwise."""


def column(d: Array | float) -> Array | float:
    """Return one number per row, (n,), as a column, (n, 1); one for all as it is."""
    return d if isinstance(d, float) else d[:, None]


def draw(family: Family, parameters: Parameters, deterministic: bool) -> Any:
    """Return the most likely action of each row, or one drawn at random; parameters and actions are NumPy's."""
    return family.mode(parameters) if deterministic else family.sample(parameters)


def _allocate(n_rows: int, n_columns: int) -> tuple[th.Tensor, np.ndarray]:
    numbers = th.empty(n_rows, n_columns)
    return numbers, numbers.numpy()


class _NoiseBuffers(threading.local):
    """Memory for noise, as torch and NumPy see it, until the thread next asks for the same shape."""

    def __init__(self) -> None:
        self.of_shape = lru_cache(maxsize=64)(_allocate)


noise_buffers = _NoiseBuffers()

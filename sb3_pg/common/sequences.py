"""Stretches of episodes: what a policy with a memory reads in one go."""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, TypeAlias

import numpy as np

#: What a policy remembers of each environment or sequence: arrays of shape (layers, n, size).
Memory: TypeAlias = tuple[np.ndarray, ...]


class Packing(NamedTuple):
    """Sequences step by step, as torch's PackedSequence has them: the longest first, none of it padding."""

    rows: np.ndarray  #: numbers of the samples: the first of all sequences, then the second of those that have one, ...
    sizes: np.ndarray  #: how many sequences go on at each step
    numbers: np.ndarray  #: of the sequences, the longest first

    @property
    def back(self) -> np.ndarray:
        """Where each sample is in the packed order."""
        places: np.ndarray = np.empty_like(self.rows)
        places[self.rows] = np.arange(len(self.rows))
        return places

    @property
    def last(self) -> np.ndarray:
        """Where the last sample of each sequence is in the packed order, in the order of ``numbers``."""
        n = len(self.numbers)
        lengths = (self.sizes[:, None] > np.arange(n)).sum(axis=0)
        last: np.ndarray = (np.cumsum(self.sizes) - self.sizes)[lengths - 1] + np.arange(n)
        return last


def packed(sequences: np.ndarray) -> Packing:
    """Return how to read samples sequence by sequence.

    :param sequences: number of the sequence of each sample, (n,); those of one are in time order, whatever is between
    """
    together = np.argsort(sequences, kind="stable")
    starts = np.flatnonzero(np.diff(sequences[together], prepend=-1))
    lengths = np.diff(starts, append=len(sequences))
    order = np.argsort(-lengths, kind="stable")
    steps = np.arange(lengths.max())
    goes_on = steps[:, None] < lengths[order]
    rows = together[(steps[:, None] + starts[order])[goes_on]]
    return Packing(rows, goes_on.sum(axis=1), sequences[together[starts[order]]])


@dataclass
class Stretches:
    """A rollout cut where episodes begin, and again after each ``length`` steps.

    :param episode_starts: bool (n_steps, n_envs)
    :param length: None cuts at episodes only
    :param also_at: a step with which all stretches begin anew
    """

    episode_starts: np.ndarray
    length: int | None = None
    also_at: int = 0

    @cached_property
    def _starts(self) -> np.ndarray:
        """Return whether a stretch begins, bool (n_steps, n_envs)."""
        starts = self.episode_starts.copy()
        starts[[0, self.also_at]] = True
        if self.length is not None:
            step = np.arange(len(starts))[:, None]
            since = step - np.maximum.accumulate(np.where(starts, step, 0), axis=0)
            starts |= since % self.length == 0
        return starts

    @cached_property
    def numbers(self) -> np.ndarray:
        """The number of the stretch that each sample is in, (n_steps, n_envs); environment by environment."""
        numbers: np.ndarray = (np.cumsum(self._starts.T.ravel()) - 1).reshape(self._starts.T.shape).T
        return numbers

    @cached_property
    def first(self) -> tuple[np.ndarray, np.ndarray]:
        """Step and environment with which each stretch begins, (n,) each."""
        env, step = np.nonzero(self._starts.T)
        return step, env

    @cached_property
    def goes_on(self) -> np.ndarray:
        """Return whether each stretch continues what its environment did before, not an episode of its own, (n,)."""
        goes_on: np.ndarray = ~self.episode_starts[self.first]
        return goes_on

    @cached_property
    def level(self) -> np.ndarray:
        """How many stretches within the rollout come before each that it continues, (n,)."""
        number = np.arange(len(self.goes_on))
        is_first = ~self.goes_on | np.isin(self.first[0], (0, self.also_at))
        level: np.ndarray = number - np.maximum.accumulate(np.where(is_first, number, 0))
        return level


def at_starts(memory: Memory, starts: np.ndarray) -> Memory:
    """Return the memory with that of environments whose episode begins wiped out.

    :param starts: bool (n,)
    """
    if not np.count_nonzero(starts):
        return memory
    keep = ~np.asarray(starts, dtype=bool)[:, None]
    return tuple(np.where(keep, x, x.dtype.type(0)) for x in memory)

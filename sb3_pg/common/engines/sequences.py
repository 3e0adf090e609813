"""What engines of policies with a memory have in common: judging and batches of whole stretches of episodes."""

from abc import abstractmethod
from typing import Any

import numpy as np

from sb3_pg.common.arrays import mapped, take
from sb3_pg.common.batch import Batch
from sb3_pg.common.engines.protocol import Judged, Seen
from sb3_pg.common.engines.rows import RowEngine
from sb3_pg.common.rollout import Rollout
from sb3_pg.common.sequences import Memory, Stretches, at_starts


def every_nth(batch: Batch, n: int) -> np.ndarray:
    """Return the rows of every n-th sequence of a batch."""
    assert batch.sequences is not None
    return np.flatnonzero(np.unique(batch.sequences, return_inverse=True)[1] % n == 0)


class SequenceEngine(RowEngine):
    """Judging, from what a subclass finds out of sequences.

    Memory is hidden and cell state of the actor's LSTM, then of the critic's, float32 (layers, n, size) each.
    """

    policy: Any

    @abstractmethod
    def judged(self, batch: Batch) -> tuple[np.ndarray, np.ndarray, Memory]:
        """Return V and log pi(a|s) of each row, (n,) each, and the memory after each sequence, by their numbers."""

    @abstractmethod
    def values_of(self, batch: Batch) -> np.ndarray:
        """Return V of each row, (n,)."""

    def row_batch(self, observations: Any, actions: Any, masks: Any, sequences: np.ndarray, memory: Memory) -> Batch:
        """Return recorded rows in the form that the engine takes."""
        taken: Any = actions if actions is None else self.actions(actions)
        return Batch(mapped(self.asarray, observations), taken, masks, sequences, memory)

    def nothing(self, n: int) -> Memory:
        """Return the memory of those who remember nothing yet."""
        layers, _, size = self.policy.lstm_hidden_state_shape
        return tuple(np.zeros((layers, n, size), np.float32) for _ in range(4))

    def remembered(self, seen: Seen, n: int) -> Memory:
        """Return what is remembered of each environment; nothing where an episode begins, or if it does not fit."""
        memory, nothing = seen.memory, self.nothing(n)
        if memory is None or [x.shape for x in memory] != [x.shape for x in nothing]:
            return nothing
        return memory if seen.starts is None else at_starts(memory, seen.starts)

    def judge(self, rollout: Rollout) -> Judged:
        stretches = rollout.stretches
        number, level = stretches.numbers, stretches.level
        starts, ends = self._before(rollout, stretches), self.nothing(len(level))
        values, log_probs = (np.empty(number.size, np.float32) for _ in range(2))
        columns = rollout.column("observations"), rollout.column("actions"), rollout.mask_rows()
        for now in range(int(level.max()) + 1):  # a stretch goes on with what the one before it has left
            at, rows = np.flatnonzero(level == now), np.flatnonzero((level == now)[number.ravel()])
            if now:
                _copy(starts, at, ends, at - 1)
            observations, actions, masks = (x if x is None else take(x, rows) for x in columns)
            batch = self.row_batch(observations, actions, masks, number.ravel()[rows], starts)
            values[rows], log_probs[rows], after = self.judged(batch)
            _copy(ends, at, after, np.arange(len(at)))
        known = rollout.n_known * rollout.n_envs
        values[:known], log_probs[:known] = rollout.column("values")[:known], rollout.column("log_probs")[:known]
        return Judged(
            values.reshape(number.shape),
            log_probs.reshape(number.shape),
            self._final_values(rollout, number, ends),
            memory=tuple(x[:, number[-1]] for x in ends),
            starting_memory=starts,
        )

    def _before(self, rollout: Rollout, stretches: Stretches) -> Memory:
        """Return the memory with which stretches begin, of those that go on from before the rollout or its policy."""
        starts, (step, env) = self.nothing(len(stretches.level)), stretches.first
        for start, memory in ((0, rollout.memory), rollout.replaced or (0, rollout.memory)):
            first = np.flatnonzero(stretches.goes_on & (step == start))
            before = self.remembered(Seen(rollout.last_observations, memory=memory), rollout.n_envs)
            _copy(starts, first, before, env[first])
        return starts

    def _final_values(self, rollout: Rollout, number: np.ndarray, ends: Memory) -> np.ndarray:
        """Return V of the observations after the last step, and of those at which an episode was cut."""
        cuts = np.array([number[cut.step, cut.env] for cut in rollout.cuts], dtype=int)
        memory = at_starts(tuple(x[:, number[-1]] for x in ends), rollout.last_dones)
        memory = tuple(np.concatenate([x, y[:, cuts]], axis=1) for x, y in zip(memory, ends, strict=True))
        batch = self.row_batch(rollout.final_observations, None, None, np.arange(memory[0].shape[1]), memory)
        return self.values_of(batch)

    def batch(self, rollout: Rollout, keep: np.ndarray | None = None) -> Batch:
        batch, numbers = super().batch(rollout, keep), rollout.stretches.numbers
        batch.sequences = numbers.ravel()[batch.rows]
        batch.memory = rollout.starting_memory or self.nothing(int(numbers.max()) + 1)
        return batch

    def thinned(self, batch: Batch, every: int) -> Any:
        """Return the rows of every n-th sequence."""
        return every_nth(batch, every)


def _copy(to: Memory, at: np.ndarray, source: Memory, where: np.ndarray) -> None:
    for x, y in zip(to, source, strict=True):
        x[:, at] = y[:, where]

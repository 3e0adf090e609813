"""What engines have in common that look at rollouts row by row."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np

from sb3_pg.common.arrays import Array, mapped
from sb3_pg.common.batch import Batch, batch_of
from sb3_pg.common.engines.protocol import Judged
from sb3_pg.common.rollout import Rollout


class RowEngine(ABC):
    """Judging and batches, from what a subclass finds out of single rows."""

    @abstractmethod
    def asarray(self, x: np.ndarray) -> Array: ...

    @abstractmethod
    def actions(self, x: np.ndarray) -> Array: ...

    @abstractmethod
    def row_values(self, observations: Any) -> np.ndarray:
        """Return V of each row of recorded observations, float32 (n,), without gradients."""

    @abstractmethod
    def judge_rows(
        self, observations: Any, actions: np.ndarray, masks: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return V and log pi(a|s) of each row of a recorded rollout, float32 (n,) each, without gradients."""

    def judge(self, rollout: Rollout) -> Judged:
        n, first, buffer = rollout.n_steps, rollout.n_known, rollout.buffer
        parts = [[buffer.values[:first], buffer.log_probs[:first]]]
        if first < n:
            columns = rollout.column("observations", first), rollout.column("actions", first), rollout.mask_rows(first)
            parts.append([x.reshape(n - first, -1) for x in self.judge_rows(*columns)])
        values, log_probs = (x[-1] if first in (0, n) else np.concatenate(x) for x in zip(*parts, strict=True))
        return Judged(values, log_probs, self.row_values(rollout.final_observations))

    def is_current(self) -> bool:
        return True  # parameters are asked for where they are

    def adapt(self, figures: Mapping[str, float]) -> None:
        return  # the policy adapts nothing by itself

    def end_update(self) -> None:
        return

    def batch(self, rollout: Rollout, keep: np.ndarray | None = None) -> Batch:
        return batch_of(rollout, self._asarrays, self.actions, keep)

    def figures(self, rollout: Rollout, batch: Batch) -> Mapping[str, float]:
        return {}

    def thinned(self, batch: Batch, every: int) -> Any:
        """Return the rows of every n-th sample."""
        return slice(None, None, every)

    def _asarrays(self, x: Any) -> Any:
        return mapped(self.asarray, x)

"""What a model does otherwise when several workers train it together."""

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import numpy as np
from stable_baselines3.common.callbacks import (
    BaseCallback,
    CallbackList,
    CheckpointCallback,
    EvalCallback,
    EventCallback,
    ProgressBarCallback,
)
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.type_aliases import MaybeCallback
from stable_baselines3.common.utils import explained_variance

from sb3_pg.common import workers
from sb3_pg.common.advantages import moments

#: Whether all workers' policies are the same is looked at after so many updates.
_CHECKED_EVERY = 16

#: What only the first worker does: it writes to files or the screen, or evaluates the policy that all have.
_OF_THE_FIRST = (CheckpointCallback, EvalCallback, ProgressBarCallback)


class DataParallel(OnPolicyAlgorithm):
    """Starts all workers alike, gives each its own random numbers, and lets the first one alone log and evaluate."""

    def set_random_seed(self, seed: int | None = None) -> None:
        """Seed as SB3 does; environment i of worker r as environment r * n_envs + i of a single one would be."""
        super().set_random_seed(None if seed is None else seed + workers.rank() * self.n_envs)

    def set_logger(self, logger: Logger) -> None:
        """Set the logger, which only the first worker writes to."""
        super().set_logger(Logger(None, []) if workers.rank() else logger)

    def _setup_learn(self, *args: Any, **kwargs: Any) -> tuple[int, BaseCallback]:
        if workers.rank():
            self.verbose, self.tensorboard_log = 0, None
        return super()._setup_learn(*args, **kwargs)

    def _init_callback(self, callback: MaybeCallback, progress_bar: bool = False) -> BaseCallback:
        if workers.rank():
            callback, progress_bar = _of_all(callback), False
        return super()._init_callback(callback, progress_bar)

    def dump_logs(self, iteration: int = 0) -> None:
        """Write the log, with the episodes of all workers."""
        own = self.ep_info_buffer, self.ep_success_buffer
        self.ep_info_buffer, self.ep_success_buffer = (deque(chain(*workers.gathered(x or deque()))) for x in own)
        try:
            super().dump_logs(iteration)
        finally:
            self.ep_info_buffer, self.ep_success_buffer = own

    def explained_variance(self, values: np.ndarray, returns: np.ndarray) -> float:
        """Return the share of the variance of all workers' returns that the values explain; NaN if there is none."""
        if workers.size() == 1:
            return explained_variance(values, returns)
        (_, of_rest), (_, of_returns) = moments([returns - values, returns])
        return 1.0 - of_rest * of_rest / (of_returns * of_returns) if of_returns else float("nan")

    def begin_together(self) -> None:
        """Give all workers the parameters, and the running statistics, of the first."""
        workers.broadcast([*self.policy.parameters(), *self.policy.buffers()])
        for its, first in zip(self._statistics(), workers.gathered(self._statistics())[0], strict=True):
            its.mean, its.var, its.count = first.mean, first.var, first.count

    def require_equal_policies(self, iteration: int) -> None:
        """Check now and then that all workers' parameters are the same, to the bit.

        :raises WorkerError: they are not
        """
        if iteration % _CHECKED_EVERY == 1:
            workers.require_equal("The parameters", self.policy.parameters())

    @contextmanager
    def sharing_statistics(self) -> Iterator[None]:
        """Add what the other workers' running statistics see within the block to one's own."""
        statistics = self._statistics() if workers.size() > 1 else []
        before = [(its.mean, its.var, its.count) for its in statistics]
        yield
        for its, old in zip(statistics, before, strict=True):
            _add_changes(its, *old)

    def _statistics(self) -> list[RunningMeanStd]:
        env = self.get_vec_normalize_env()
        if env is None or not env.training:
            return []
        of_observations: Any = env.obs_rms if env.norm_obs else {}
        several = of_observations.values() if isinstance(of_observations, dict) else [of_observations]
        return [*several, env.ret_rms]


def _of_all(callback: MaybeCallback) -> MaybeCallback:
    """Return the callbacks that are not for the first worker alone."""
    if isinstance(callback, list | CallbackList):
        several = callback if isinstance(callback, list) else callback.callbacks
        its: list[Any] = [_of_all(x) for x in several if not isinstance(x, _OF_THE_FIRST)]
        return CallbackList(its)
    if isinstance(callback, EventCallback):
        its_own: Any = _of_all(callback.callback)
        callback.callback = its_own
    return None if isinstance(callback, _OF_THE_FIRST) else callback


def _add_changes(its: RunningMeanStd, mean: Any, var: Any, count: float) -> None:
    """Complete running statistics by what all workers have seen since they had a mean, variance and count in common."""
    change: Any = np.asarray(its.mean - mean, np.float64)
    squares = its.count * (its.var + change * change) - count * var  # around the old mean, so that little cancels
    message = np.concatenate([np.ravel([its.count - count]), np.ravel(its.count * change), np.ravel(squares)])
    workers.add(message)
    (n, *_), (total, of_squares) = message, message[1:].reshape(2, *change.shape)
    its.count = count + n
    shift = total / its.count
    its.mean = mean + shift
    its.var = (count * var + of_squares) / its.count - shift * shift

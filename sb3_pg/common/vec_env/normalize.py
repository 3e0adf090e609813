"""SB3's VecNormalize with arithmetic for small arrays."""

import collections
import copy
import functools
import itertools
import math
import operator
from pathlib import Path
from typing import Any

import numpy as np
from stable_baselines3.common import vec_env as sb3
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env.base_vec_env import VecEnvStepReturn

from sb3_pg.common.archive.statistics import read_statistics, write_statistics
from sb3_pg.common.arrays import mapped
from sb3_pg.common.errors import EnvironmentNumberError, NonFiniteError, require_finite_of


def updated(statistics: RunningMeanStd, batch: np.ndarray) -> dict[str, Any]:
    """Return the attributes that ``statistics`` has after ``update(batch)``, to the bit, in fewer operations.

    :param batch: (n, ...), where n is so small that every call of NumPy costs more than its arithmetic
    """
    if batch.dtype not in (np.float32, np.float64):
        twin = statistics.copy()
        twin.update(batch)
        return vars(twin)
    n, count = len(batch), statistics.count
    old_mean: Any = statistics.mean
    old_variance: Any = statistics.var
    kind: Any = np.asarray
    if batch.ndim == 1 and n < 8 and batch.dtype == np.float64:  # a few numbers: Python's are quicker than NumPy's
        numbers = batch.tolist()
        mean = _sum(numbers) / n
        variance = _sum([(x - mean) * (x - mean) for x in numbers]) / n
        kind, old_mean, old_variance = np.float64, float(old_mean), float(old_variance)
    else:
        mean = np.add.reduce(batch, axis=0) / n
        squares = batch - mean
        squares *= squares  # in place, here and below: new memory for 1024 environments takes as long as the arithmetic
        variance = np.add.reduce(squares, axis=0) / n
    total, delta = count + n, mean - old_mean
    return {
        "mean": kind(old_mean + delta * n / total),
        "var": kind((old_variance * count + variance * n + delta * delta * count * n / total) / total),
        "count": total,
    }


def _sum(numbers: list[float]) -> float:
    """Add one after the other, as NumPy adds fewer than eight; the built-in ``sum`` compensates for rounding."""
    return functools.reduce(operator.add, numbers)


#: A variance below this, over fewer than 1e30 numbers, has seen no number that single precision does not hold.
_USUAL_VARIANCE = 1e37


def _updated_by_observations(statistics: RunningMeanStd, observations: np.ndarray) -> dict[str, Any]:
    """Return what ``updated`` does, unless an observation has no finite square: the statistics could not forget it."""
    changed = updated(statistics, observations)
    variance = changed["var"].ravel()
    if float(variance.dot(variance)) < _USUAL_VARIANCE:  # then so is each of them; else look at all
        return changed
    _require_sound(statistics, "observations")
    require_finite_of(None, "observation", observations)
    if not np.isfinite(variance).all():
        env, *where = np.unravel_index(np.abs(observations).argmax(), observations.shape)
        value = observations[(env, *where)]
        raise EnvironmentNumberError("observation", int(env), value, verdict="is too large to be normalised")
    return changed


def _require_sound(statistics: RunningMeanStd, of: str) -> None:
    """Look at the statistics themselves when numbers that they were updated by are not finite.

    :raises NonFiniteError: they were broken before
    """
    if not (np.isfinite(statistics.mean).all() and np.isfinite(statistics.var).all()):
        raise NonFiniteError(
            f"The running statistics of VecNormalize are not finite: those of {of} have mean {statistics.mean} and "
            f"variance {statistics.var}. Load good ones (VecNormalize.load), or wrap the environments anew."
        )


#: New attributes of objects, each given as its ``__dict__``.
Changes = list[tuple[dict[str, Any], dict[str, Any]]]


def make(changes: Changes) -> None:
    """Make all changes, or none: no interrupt comes between them, since no line of Python is run."""
    collections.deque(itertools.starmap(dict.update, changes), maxlen=0)


def _clip(x: np.ndarray, limit: float) -> np.ndarray:
    """Clip an array in place to [-limit, limit], and return it."""
    np.maximum(x, -limit, out=x)
    np.minimum(x, limit, out=x)
    return x


class VecNormalize(sb3.VecNormalize):
    """Normalises observations and rewards by running statistics; arguments and files are SB3's.

    What is not finite, or so large that its square is not, does not reach the statistics: a step or reset that gives
    it raises an ``EnvironmentNumberError`` and changes nothing here.
    """

    def step_wait(self) -> VecEnvStepReturn:
        """Step, update the statistics and normalise.

        :raises EnvironmentNumberError: an observation or reward is not finite, or its square is not
        """
        obs, rewards, dones, infos = self.venv.step_wait()
        obs, rewards = mapped(np.asarray, obs), np.asarray(rewards)  # of lists
        over: list[int] = np.flatnonzero(dones).tolist() if np.count_nonzero(dones) else []  # quicker than ``any``
        last = {i: infos[i] for i in over if "terminal_observation" in infos[i]} if over else {}
        for i, info in last.items():
            require_finite_of(i, "terminal observation", mapped(np.asarray, info["terminal_observation"]))
        make(self._changes_by_observations(obs) + self._changes_by_rewards(rewards, over))
        for info in last.values():
            info["terminal_observation"] = self.normalize_obs(info["terminal_observation"])
        return self.normalize_obs(obs), self.normalize_reward(rewards), dones, infos

    def reset(self) -> Any:
        """Reset, update the statistics and normalise.

        :raises EnvironmentNumberError: an observation is not finite, or its square is not
        """
        obs: Any = mapped(np.asarray, self.venv.reset())
        make([*self._changes_by_observations(obs), (self.__dict__, {"returns": np.zeros(self.num_envs)})])
        return self.normalize_obs(obs)

    def _changes_by_observations(self, obs: Any) -> Changes:
        """Return what observations change.

        :raises EnvironmentNumberError: one is not finite, or its square is not
        """
        changes: Changes = [(self.__dict__, {"old_obs": obs})]
        is_counted = self.training and self.norm_obs
        of: Any = self.obs_rms if self.norm_obs else None
        if not is_counted or isinstance(of, dict):
            require_finite_of(None, "observation", obs)
        if is_counted:
            pairs: Any = [(of[key], obs[key]) for key in of] if isinstance(of, dict) else [(of, obs)]
            changes += [(statistics.__dict__, _updated_by_observations(statistics, x)) for statistics, x in pairs]
        return changes

    def _changes_by_rewards(self, rewards: np.ndarray, over: list[int]) -> Changes:
        """Return what a step's rewards change; the environments in ``over`` have ended their episodes."""
        returns = self.returns * self.gamma + rewards if self.training else self.returns.copy()
        changed = updated(self.ret_rms, returns) if self.training else {}
        if not changed or not changed["var"] < _USUAL_VARIANCE:
            _require_sound(self.ret_rms, "returns")
            require_finite_of(None, "reward", rewards)
        changes: Changes = [(self.ret_rms.__dict__, changed)]
        if over:
            returns[over] = 0.0
        return [*changes, (self.__dict__, {"old_reward": rewards, "returns": returns})]

    def _normalize_obs(self, obs: np.ndarray, obs_rms: RunningMeanStd) -> np.ndarray:
        scaled = np.asarray(np.asarray(obs) - obs_rms.mean)  # also of lists and of JAX's arrays, which stay as they are
        scaled /= np.sqrt(obs_rms.var + self.epsilon)
        return _clip(scaled, self.clip_obs)

    def normalize_obs(self, obs: Any) -> Any:
        """Normalise observations without changing the statistics or ``obs``."""
        if not self.norm_obs:
            return copy.deepcopy(obs)
        if isinstance(obs, dict):
            of: Any = self.obs_rms
            keys = self.norm_obs_keys or []
            return {
                key: self._normalize_obs(x, of[key]).astype(np.float32) if key in keys else np.copy(x)
                for key, x in obs.items()
            }
        statistics: Any = self.obs_rms
        return self._normalize_obs(obs, statistics).astype(np.float32)

    def normalize_reward(self, reward: np.ndarray) -> np.ndarray:
        """Divide rewards by the deviation of the discounted return, and clip."""
        reward = np.asarray(reward)  # of lists and JAX's arrays
        if not self.norm_reward:
            return reward.astype(np.float32)
        scaled = np.asarray(reward / np.float64(math.sqrt(self.ret_rms.var + self.epsilon)))
        return _clip(scaled, self.clip_reward).astype(np.float32)

    def save(self, save_path: str | Path) -> None:
        """Write a file that SB3's ``VecNormalize.load`` reads, also where this package is not installed.

        What stood there is replaced when all is written, and never lost.

        :raises ArgumentError: naming an attribute that cannot be pickled
        :raises OSError: naming ``save_path``
        """
        write_statistics(save_path, self.__dict__)

    @staticmethod
    def load(load_path: str | Path, venv: sb3.VecEnv, *, trusted: bool = False) -> "VecNormalize":
        """Read a file of SB3's or ours, without running anything that is in it.

        :param trusted: True reads any pickle, and runs the code that it holds: only for files whose origin you know
        :raises ArchiveError: the file is damaged, or holds what is refused; names the file
        """
        loaded = VecNormalize.__new__(VecNormalize)
        loaded.__setstate__(read_statistics(load_path, trusted))
        loaded.set_venv(venv)
        return loaded

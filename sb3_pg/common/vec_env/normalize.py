"""SB3's VecNormalize with arithmetic for small arrays."""

import copy
import functools
import math
import operator
import pickle
from pathlib import Path
from typing import Any

import numpy as np
from stable_baselines3.common import vec_env as sb3
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env.base_vec_env import VecEnvStepReturn


def update_statistics(statistics: RunningMeanStd, batch: np.ndarray) -> None:
    """Do what ``statistics.update(batch)`` does, to the bit, in fewer and cheaper operations.

    :param batch: (n, ...), where n is so small that every call of NumPy costs more than its arithmetic
    """
    if batch.dtype not in (np.float32, np.float64):
        statistics.update(batch)
        return
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
    statistics.mean = kind(old_mean + delta * n / total)
    statistics.var = kind((old_variance * count + variance * n + delta * delta * count * n / total) / total)
    statistics.count = total


def _sum(numbers: list[float]) -> float:
    """Add one after the other, as NumPy adds fewer than eight; the built-in ``sum`` compensates for rounding."""
    return functools.reduce(operator.add, numbers)


def _clip(x: np.ndarray, limit: float) -> np.ndarray:
    """Clip an array in place to [-limit, limit], and return it."""
    np.maximum(x, -limit, out=x)
    np.minimum(x, limit, out=x)
    return x


class VecNormalize(sb3.VecNormalize):
    """Normalises observations and rewards by running statistics; arguments and files are SB3's."""

    def step_wait(self) -> VecEnvStepReturn:
        """Step, update the statistics and normalise."""
        obs, rewards, dones, infos = self.venv.step_wait()
        self.old_obs, self.old_reward = obs, rewards  # type: ignore[assignment]
        if self.training:
            self._update_observations(obs)
            self._update_reward(rewards)
        normalized = self.normalize_obs(obs)
        rewards = self.normalize_reward(rewards)
        if np.count_nonzero(dones):  # quicker than ``any`` on a few
            for i in np.flatnonzero(dones):
                if "terminal_observation" in infos[i]:
                    infos[i]["terminal_observation"] = self.normalize_obs(infos[i]["terminal_observation"])
            self.returns[np.asarray(dones, dtype=bool)] = 0  # some environments give numbers
        return normalized, rewards, dones, infos

    def _update_observations(self, obs: Any) -> None:
        if not self.norm_obs:
            return
        if isinstance(self.obs_rms, dict):
            for key, statistics in self.obs_rms.items():
                update_statistics(statistics, obs[key])
        else:
            update_statistics(self.obs_rms, obs)

    def _update_reward(self, reward: np.ndarray) -> None:
        returns = self.returns * self.gamma
        returns += reward
        self.returns = returns
        update_statistics(self.ret_rms, self.returns)

    def _normalize_obs(self, obs: np.ndarray, obs_rms: RunningMeanStd) -> np.ndarray:
        scaled = np.asarray(obs - obs_rms.mean)
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
        if not self.norm_reward:
            return reward.astype(np.float32)
        scaled = np.asarray(reward / np.float64(math.sqrt(self.ret_rms.var + self.epsilon)))
        return _clip(scaled, self.clip_reward).astype(np.float32)

    def save(self, save_path: str) -> None:
        """Write a file that SB3's ``VecNormalize.load`` reads, also where this package is not installed."""
        twin = sb3.VecNormalize.__new__(sb3.VecNormalize)
        twin.__dict__ = self.__dict__
        with Path(save_path).open("wb") as file:
            pickle.dump(twin, file)

    @staticmethod
    def load(load_path: str, venv: sb3.VecEnv) -> "VecNormalize":
        """Read a file of SB3's or ours. Like any pickle, open only files that you trust."""
        with Path(load_path).open("rb") as file:
            loaded: Any = pickle.load(file)
        loaded.__class__ = VecNormalize
        loaded.set_venv(venv)
        return loaded  # type: ignore[no-any-return]


def take_over(env: sb3.VecEnv) -> None:
    """Give SB3's VecNormalize the methods of ours, wherever it lies among an environment's wrappers.

    It keeps its attributes, numbers and files. A subclass of SB3's keeps its own methods.
    """
    while isinstance(env, sb3.VecEnvWrapper):
        if type(env) is sb3.VecNormalize:
            env.__class__ = VecNormalize
        env = env.venv

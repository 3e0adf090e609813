"""The columns of a rollout as acting records them."""

from collections.abc import Callable, Generator
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common import buffers as sb3_buffers
from stable_baselines3.common.preprocessing import get_action_dim, get_obs_shape
from stable_baselines3.common.type_aliases import DictRolloutBufferSamples, RolloutBufferSamples
from stable_baselines3.common.utils import get_device

from sb3_pg.common.advantages import generalized_advantage
from sb3_pg.common.arrays import take


class RolloutBuffer(sb3_buffers.RolloutBuffer):
    """A rollout of any observation space, with three differences from SB3's two classes.

    Values and log-probabilities may be filled in after the rollout. It keeps its memory from one rollout to the
    next and grows when it is full, which whole-episode algorithms need. And nothing is flattened in place: arrays
    keep the shape (n_steps, n_envs, ...) for callbacks that read them after training.

    Actions of Box spaces are stored as float32 whatever the space's type, since SB3's buffer truncates what the
    Gaussian sampled for an integer Box and so changes its log-probability.

    :param buffer_size: steps per environment; more are accepted
    :param observation_space: any space that SB3 supports, Dict included
    :param action_space: Box, Discrete, MultiDiscrete or MultiBinary
    :param device: where SB3's own ``get`` puts its tensors
    :param gae_lambda: 1 gives Monte-Carlo advantages; lower values have less variance and more bias
    :param gamma: discount factor
    :param n_envs: number of parallel environments
    """

    observations: Any

    def __init__(
        self,
        buffer_size: int,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        device: th.device | str = "auto",
        gae_lambda: float = 1,
        gamma: float = 0.99,
        n_envs: int = 1,
    ) -> None:
        # Not SB3's constructor: it allocates for array observations only.
        self.buffer_size = buffer_size
        self.observation_space = observation_space
        self.action_space = action_space
        self.obs_shape = get_obs_shape(observation_space)  # type: ignore[assignment]
        self.action_dim = get_action_dim(action_space)
        self.device = get_device(device)
        self.gae_lambda = gae_lambda
        self.gamma = gamma
        self.n_envs = n_envs
        self.generator_ready = False
        self._allocate()
        self.reset()

    def _allocate(self) -> None:
        """Make room for ``buffer_size`` steps, keeping what is there."""
        space, rows = self.observation_space, (self.buffer_size, self.n_envs)
        shapes: dict[str, tuple[tuple[int, ...], Any]] = {
            "actions": ((self.action_dim,), np.float32 if isinstance(self.action_space, spaces.Box) else np.int64),
            "rewards": ((), np.float32),
            "episode_starts": ((), np.float32),
            "values": ((), np.float32),
            "log_probs": ((), np.float32),
            "advantages": ((), np.float32),
            "returns": ((), np.float32),
        }

        def enlarged(old: np.ndarray | None, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
            new = np.zeros((*rows, *shape), dtype=dtype)
            if old is not None:
                new[: len(old)] = old
            return new

        old = self.__dict__.get("observations")
        if isinstance(space, spaces.Dict):
            keyed: Any = self.obs_shape
            self.observations = {
                key: enlarged(old[key] if old else None, keyed[key], space[key].dtype) for key in space.spaces
            }
        else:
            self.observations = self._room_for_observations(enlarged)
            self._row_shape = self.observations.shape[1:]
        for name, (shape, dtype) in shapes.items():
            setattr(self, name, enlarged(self.__dict__.get(name), shape, dtype))

    def enlarge(self, n_steps: int) -> None:
        """Make room for at least so many steps, doubling what there is."""
        while self.buffer_size < n_steps:
            self.buffer_size *= 2
        self._allocate()

    def _room_for_observations(self, enlarged: Callable[..., np.ndarray]) -> Any:
        """Return where to record observations that are no dictionaries, with what is there."""
        return enlarged(self.__dict__.get("observations"), self.obs_shape, self.observation_space.dtype)

    def reset(self) -> None:
        """Forget the rollout but keep its memory."""
        self.pos = 0
        self.full = False

    def size(self) -> int:
        """Return the steps recorded per environment."""
        return self.pos

    def add(
        self,
        obs: Any,
        action: np.ndarray,
        reward: np.ndarray,
        episode_start: np.ndarray,
        value: th.Tensor | None = None,
        log_prob: th.Tensor | None = None,
    ) -> None:
        """Record one step of every environment.

        :param obs: what the policy saw, (n_envs, ...) or a dictionary of such arrays
        :param action: what it did, (n_envs, ...), before clipping to the action space
        :param reward: what it got, (n_envs,)
        :param episode_start: whether ``obs`` was the first of an episode, (n_envs,)
        :param value: V(obs), if it is known already
        :param log_prob: log-probability of ``action``, if it is known already
        """
        if self.pos >= self.buffer_size:
            self.enlarge(self.pos + 1)
        row = self.pos
        if isinstance(obs, dict):
            for key, stored in self.observations.items():
                stored[row] = np.reshape(obs[key], stored.shape[1:])
        else:
            self.observations[row] = obs if obs.shape == self._row_shape else obs.reshape(self._row_shape)
        self.actions[row] = action.reshape(self.n_envs, self.action_dim)
        self.rewards[row] = reward
        self.episode_starts[row] = episode_start
        if value is not None and log_prob is not None:
            self.values[row] = value.detach().cpu().numpy().reshape(-1)
            self.log_probs[row] = log_prob.detach().cpu().numpy().reshape(-1)
        self.pos = row + 1
        self.full = self.pos == self.buffer_size

    def compute_returns_and_advantage(self, last_values: th.Tensor, dones: np.ndarray) -> None:
        """Fill ``advantages`` by generalised advantage estimation and ``returns = advantages + values``.

        :param last_values: V of the observations after the last step, (n_envs,) or (n_envs, 1)
        :param dones: whether the last step ended an episode, (n_envs,)
        """
        n, last = self.pos, last_values.detach().cpu().numpy().reshape(-1)
        rewards, values = self.rewards[:n], self.values[:n]
        ends = episode_ends(self.episode_starts[:n], dones)
        advantages = generalized_advantage(rewards, values, last, ends, self.gamma, self.gae_lambda)
        self.advantages[:n] = advantages
        self.returns[:n] = advantages + values

    def get(self, batch_size: int | None = None) -> Generator[Any, None, None]:
        """SB3's minibatches, for code that reads the buffer its way; in SB3's order for the same NumPy seed."""
        n = self.pos * self.n_envs
        rows = sb3_order(np.random.permutation(n), self.pos, self.n_envs)
        kind: Any = DictRolloutBufferSamples if isinstance(self.observations, dict) else RolloutBufferSamples
        for start in range(0, n, batch_size or n):
            index = rows[start : start + (batch_size or n)]
            observations, actions, *numbers = (
                take(flat(getattr(self, name), slice(self.pos)), index) for name in _COLUMNS
            )
            tensors = [self.to_torch(x) for x in (actions.astype(np.float32, copy=False), *numbers)]
            if isinstance(observations, dict):
                observations = {key: self.to_torch(value) for key, value in observations.items()}
            else:
                observations = self.to_torch(observations)
            yield kind(observations, *tensors)


#: What SB3's samples hold, in their order.
_COLUMNS = ("observations", "actions", "values", "log_probs", "advantages", "returns")


def episode_ends(episode_starts: np.ndarray, last_dones: np.ndarray) -> np.ndarray:
    """Return whether an episode ended with each step, bool (n_steps, n_envs).

    :param episode_starts: whether one began there, (n_steps, n_envs)
    :param last_dones: whether one ended with the last step, (n_envs,)
    """
    return np.concatenate([episode_starts[1:], np.asarray(last_dones)[None]]).astype(bool)


def flat(x: Any, steps: slice) -> Any:
    """Return a view of some steps of a column, or dictionary of columns, with one row per sample."""
    if isinstance(x, dict):
        return {key: flat(value, steps) for key, value in x.items()}
    used = x[steps]
    return used.reshape(used.shape[0] * used.shape[1], *used.shape[2:])


def sb3_order(index: np.ndarray, n_steps: int, n_envs: int) -> np.ndarray:
    """Turn row numbers of SB3's flattened rollout (environment by environment) into ours (step by step).

    Drawing the permutation in SB3's numbering makes the same NumPy seed give the same minibatches, without SB3's
    transposed copy of every array. ``index`` is changed in place.
    """
    if n_envs == 1:
        return index
    env = index // n_steps
    index %= n_steps
    index *= n_envs
    index += env
    return index

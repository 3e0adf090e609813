"""The rollout as acting records it and as stepping reads it."""

from collections.abc import Generator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common import buffers as sb3_buffers
from stable_baselines3.common.preprocessing import get_action_dim, get_obs_shape
from stable_baselines3.common.type_aliases import DictRolloutBufferSamples, RolloutBufferSamples
from stable_baselines3.common.utils import get_device

from sb3_pg.common.arrays import Array, length, nbytes, take
from sb3_pg.common.networks.protocol import Network
from sb3_pg.common.returns import generalized_advantage


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
            self.observations = enlarged(old, self.obs_shape, space.dtype)
        for name, (shape, dtype) in shapes.items():
            setattr(self, name, enlarged(self.__dict__.get(name), shape, dtype))

    def reset(self) -> None:
        """Forget the rollout but keep its memory."""
        self.pos = 0
        self.full = False

    def size(self) -> int:
        """Steps recorded per environment."""
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
            self.buffer_size *= 2
            self._allocate()
        row = self.pos
        if isinstance(obs, dict):
            for key, stored in self.observations.items():
                stored[row] = np.reshape(obs[key], stored.shape[1:])
        else:
            self.observations[row] = obs.reshape(self.observations.shape[1:])
        self.actions[row] = action.reshape(self.n_envs, self.action_dim)
        self.rewards[row] = reward
        self.episode_starts[row] = episode_start
        if value is not None and log_prob is not None:
            self.values[row] = value.detach().cpu().numpy().reshape(-1)
            self.log_probs[row] = log_prob.detach().cpu().numpy().reshape(-1)
        self.pos = row + 1
        self.full = self.pos == self.buffer_size

    def dones(self, last_dones: np.ndarray) -> np.ndarray:
        """Whether an episode ended with each step, (n_steps, n_envs); ``last_dones`` says so for the last one."""
        return np.concatenate([self.episode_starts[1 : self.pos], np.asarray(last_dones)[None]]).astype(bool)

    def compute_returns_and_advantage(self, last_values: th.Tensor, dones: np.ndarray) -> None:
        """Fill ``advantages`` by generalised advantage estimation and ``returns = advantages + values``.

        :param last_values: V of the observations after the last step, (n_envs,) or (n_envs, 1)
        :param dones: whether the last step ended an episode, (n_envs,)
        """
        n, last = self.pos, last_values.detach().cpu().numpy().reshape(-1)
        rewards, values = self.rewards[:n], self.values[:n]
        advantages = generalized_advantage(rewards, values, last, self.dones(dones), self.gamma, self.gae_lambda)
        self.advantages[:n] = advantages
        self.returns[:n] = advantages + values

    def get(self, batch_size: int | None = None) -> Generator[Any, None, None]:
        """SB3's minibatches, for code that reads the buffer its way; in SB3's order for the same NumPy seed."""
        n = self.pos * self.n_envs
        rows = sb3_order(np.random.permutation(n), self.pos, self.n_envs)
        kind: Any = DictRolloutBufferSamples if isinstance(self.observations, dict) else RolloutBufferSamples
        for start in range(0, n, batch_size or n):
            index = rows[start : start + (batch_size or n)]
            observations, actions, *numbers = (take(x, index) for x in flat_arrays(self))
            tensors = [self.to_torch(x) for x in (actions.astype(np.float32, copy=False), *numbers)]
            if isinstance(observations, dict):
                observations = {key: self.to_torch(value) for key, value in observations.items()}
            else:
                observations = self.to_torch(observations)
            yield kind(observations, *tensors)


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


def flat_arrays(buffer: sb3_buffers.RolloutBuffer) -> list[Any]:
    """Views of observations, actions, values, log_probs, advantages and returns with one row per sample."""

    def flat(x: Any) -> Any:
        if isinstance(x, dict):
            return {key: flat(value) for key, value in x.items()}
        used = x[: buffer.pos]
        return used.reshape(used.shape[0] * used.shape[1], *used.shape[2:])

    names = ("observations", "actions", "values", "log_probs", "advantages", "returns")
    return [flat(getattr(buffer, name)) for name in names]


@dataclass
class Batch:
    """Samples in the arrays of a network: NumPy for the closed form, torch on its device for autograd.

    All have one row per sample; ``actions`` is in the form that the network's ``evaluate`` takes. ``rows`` are the
    samples' numbers in the rollout, ``step * n_envs + env``, to name a sample in an error. ``sequence`` numbers the
    stretch of an episode that each sample belongs to, if the network is better off with whole ones. What is not needed
    is None.
    """

    observations: Array
    actions: Array | None
    old_values: Array | None
    old_log_prob: Array | None
    advantages: Array | None
    returns: Array
    rows: np.ndarray
    sequence: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> "Batch":
        columns: list[Any] = [None if x is None else take(x, index) for x in self.__dict__.values()]
        return Batch(*columns)

    def for_critic(self) -> "Batch":
        """Only what the value network is fitted to, so that no more is gathered."""
        return Batch(self.observations, None, None, None, None, self.returns, self.rows, self.sequence)

    def minibatches(
        self, batch_size: int | None, order: np.ndarray | None = None, *, even: bool = False
    ) -> Generator["Batch", None, None]:
        """Pieces of ``batch_size`` samples; all at once for None.

        Sequences are not cut: a piece goes on to the end of the one that it ends in.

        :param order: the numbers of the samples in the order in which they are wanted, by default as they are
        :param even: spread a shorter last piece over all, so that none is much smaller than the others
        """
        n = len(self)
        size = batch_size or n
        edges = np.linspace(0, n, -(-n // size) + 1).astype(int) if even else [*range(0, n, size), n]
        if self.sequence is not None:
            sequence = self.sequence if order is None else self.sequence[order]
            ends = np.append(np.flatnonzero(np.diff(sequence)) + 1, n)
            edges = [0, *np.unique(ends[np.searchsorted(ends, edges[1:])])]
        if order is None:
            for start, end in pairwise(edges):
                yield self[start:end]
            return
        # Gathered together, minibatches are plain slices of the result; images are too large for many at a time.
        n_together = max(
            1, _GATHERED_BYTES * n // max(1, sum(nbytes(x) for x in self.__dict__.values() if x is not None) * size)
        )
        for first in range(0, len(edges) - 1, n_together):
            its = edges[first : first + n_together + 1]
            gathered = self[order[its[0] : its[-1]]]
            for start, end in pairwise(its):
                yield gathered[start - its[0] : end - its[0]]


#: How much is gathered at once: a whole rollout, unless it is long or of images.
_GATHERED_BYTES = 1 << 22


def whole_batch(buffer: sb3_buffers.RolloutBuffer, network: Network, keep: np.ndarray | None = None) -> Batch:
    """The rollout as one batch, in time order.

    :param keep: which samples to use, boolean (n_steps, n_envs); all by default
    """
    observations, actions, *numbers = flat_arrays(buffer)
    rows = np.arange(buffer.pos * buffer.n_envs)
    if keep is not None and not keep.all():
        rows = np.flatnonzero(keep)
        observations, actions = take(observations, rows), actions[rows]
        numbers = [x[rows] for x in numbers]
    sequence = sequence_numbers(buffer)[rows] if network.sequential else None
    arrays = [network.asarray(observations), network.actions(actions), *map(network.asarray, numbers), rows, sequence]
    return Batch(*arrays)


def sequence_numbers(buffer: sb3_buffers.RolloutBuffer) -> np.ndarray:
    """A number for each stretch of an episode within the rollout, given to each of its samples, (n_steps * n_envs,)."""
    starts = buffer.episode_starts[: buffer.pos] > 0
    starts[0] = True
    numbers: np.ndarray = (np.cumsum(starts, axis=0) * buffer.n_envs + np.arange(buffer.n_envs)).ravel()
    return numbers


def random_order(batch: Batch, buffer: sb3_buffers.RolloutBuffer) -> np.ndarray:
    """The numbers of the samples in random order, the same as SB3's for the same NumPy seed.

    Samples of one sequence stay together and in time order.
    """
    if batch.sequence is not None:
        _, number = np.unique(batch.sequence, return_inverse=True)
        return np.argsort(np.random.permutation(number.max() + 1)[number], kind="stable")
    order = np.random.permutation(len(batch))
    if len(batch) == buffer.pos * buffer.n_envs:
        order = sb3_order(order, buffer.pos, buffer.n_envs)
    return order


def epoch(
    batch: Batch, buffer: sb3_buffers.RolloutBuffer, network: Network, batch_size: int | None
) -> Generator[Batch, None, None]:
    """One pass over the rollout in random minibatches.

    A rollout buffer of the user's with a ``get`` of its own (prioritised, augmenting, ...) is asked for them.
    """
    own = (RolloutBuffer.get, sb3_buffers.RolloutBuffer.get, sb3_buffers.DictRolloutBuffer.get)
    if type(buffer).get in own and type(buffer)._get_samples in (
        sb3_buffers.RolloutBuffer._get_samples,
        sb3_buffers.DictRolloutBuffer._get_samples,
    ):
        yield from batch.minibatches(batch_size, random_order(batch, buffer))
        return
    for data in buffer.get(batch_size):
        rows = np.full(length(data.observations), -1)
        numbers = (data.old_values, data.old_log_prob, data.advantages, data.returns)
        actions = network.actions(data.actions.cpu().numpy())
        arrays = [network.asarray(x.cpu().numpy()) for x in numbers]
        seen: Any = data.observations
        seen = {k: v.cpu().numpy() for k, v in seen.items()} if isinstance(seen, dict) else seen.cpu().numpy()
        columns = [network.asarray(seen), actions, *arrays, rows]
        yield Batch(*columns)

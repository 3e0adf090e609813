"""From a judged rollout to returns and advantages, written into its buffer."""

import numpy as np
import torch as th

from sb3_pg.common import workers
from sb3_pg.common.advantages import Baseline, Samples, compared, episode_numbers, reward_to_go
from sb3_pg.common.arrays import mapped, take
from sb3_pg.common.rollout import Rollout


def estimate_by_values(rollout: Rollout, final_values: np.ndarray, gamma: float) -> None:
    """Write generalised advantages.

    What a time limit cut off is completed by its value, added to the reward of the last step (SB3 issue 633).

    :param final_values: V of ``rollout.final_observations``
    """
    of_envs, of_cuts = np.split(final_values, [rollout.n_envs])
    for cut, value in zip(rollout.cuts, of_cuts, strict=True):
        rollout.buffer.rewards[cut.step, cut.env] += gamma * value
    rollout.buffer.compute_returns_and_advantage(th.as_tensor(of_envs), rollout.last_dones)


def estimate_by_comparison(
    rollout: Rollout,
    keep: np.ndarray,
    baseline: str | Baseline | None,
    gamma: float,
    average: float | None,
    scale: str | None = "group",
) -> None:
    """Write reward-to-go, and as advantages its difference from a baseline; 0 where samples do not count.

    Without a value network an episode that a time limit cuts ends there.

    :param keep: which samples count, bool (n_steps, n_envs)
    :param average: of the returns of earlier rollouts, for "ema"
    :param scale: what the differences of "group" are divided by
    :raises ArgumentError: the baseline cannot be had from these episodes
    """
    buffer, n, dones = rollout.buffer, rollout.n_steps, rollout.dones
    returns = reward_to_go(buffer.rewards[:n], dones, gamma)
    number, step = episode_numbers(dones)
    episode = _kept_episodes(number, keep)
    observations = take(rollout.column("observations"), np.flatnonzero(keep))
    advantages = np.zeros(keep.shape)
    first = mapped(np.asarray, take(observations, np.flatnonzero(step[keep] == 0)))
    samples = Samples(observations, first, returns[keep], episode, step[keep])
    advantages[keep] = compared(baseline, samples, average, scale)
    buffer.returns[:n], buffer.advantages[:n] = returns, advantages


def _kept_episodes(number: np.ndarray, keep: np.ndarray) -> np.ndarray:
    """Return which episode each kept sample is in, (n,), counted from 0 over all environments.

    :param number: of the episode within its environment, (n_steps, n_envs)
    """
    of_all = number * number.shape[1] + np.arange(number.shape[1])
    return np.unique(of_all[keep], return_inverse=True)[1].reshape(-1)


def share_without_signal(rollout: Rollout, keep: np.ndarray) -> float:
    """Return the share of the episodes whose advantages are all zero, over all workers.

    :param keep: which samples count, bool (n_steps, n_envs)
    """
    episode = _kept_episodes(episode_numbers(rollout.dones)[0], keep)
    largest = np.zeros(int(episode.max(initial=-1)) + 1)
    np.maximum.at(largest, episode, np.abs(rollout.buffer.advantages[: rollout.n_steps][keep]))
    silent, n = workers.total([float((largest == 0).sum()), float(len(largest))])
    return silent / n if n else float("nan")

"""Returns, advantages and baselines: pure functions on arrays of shape (n_steps, n_envs)."""

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.floating]
BoolArray = NDArray[np.bool_]


def discounted_sum(x: FloatArray, discount: FloatArray) -> FloatArray:
    """Solve ``y[t] = x[t] + discount[t] * y[t + 1]`` backwards in time, with ``y[n_steps] = 0``.

    Not a loop over time but a scan that doubles its span: after k rounds each row holds the sum over 2^k steps,
    so 2048 steps take 11 vectorised rounds.

    :param x: shape (n_steps, n_envs)
    :param discount: the same shape; 0 where an episode ends
    :return: ``y`` in float64, the same shape
    """
    return _scanned(np.array(x, dtype=np.float64), np.array(discount, dtype=np.float64))


def _scanned(y: FloatArray, c: FloatArray) -> FloatArray:
    """``discounted_sum`` of ``y`` with the discount ``c``, in their own memory."""
    span = 1
    with np.errstate(under="ignore"):  # long products of discounts may underflow to zero, as they should
        while span < len(y):
            y[:-span] += c[:-span] * y[span:]
            c[:-span] *= c[span:]
            span *= 2
    return y


def generalized_advantage(
    rewards: FloatArray, values: FloatArray, last_values: FloatArray, dones: BoolArray, gamma: float, gae_lambda: float
) -> FloatArray:
    """Generalised advantage estimation (Schulman et al. 2016, eq. 16).

    :param rewards: (n_steps, n_envs); those of truncated episodes already hold ``gamma * V(terminal observation)``
    :param values: V(s_t), (n_steps, n_envs)
    :param last_values: V of the observation after the last step, (n_envs,)
    :param dones: whether the episode ended with step t, (n_steps, n_envs)
    :param gamma: discount factor
    :param gae_lambda: 1 is the Monte-Carlo advantage (no bias, most variance), 0 the one-step TD error
    :return: advantages, float64, (n_steps, n_envs)
    """
    alive = 1.0 - dones
    next_values = np.concatenate([values[1:], last_values[None]])
    delta = rewards + gamma * alive * next_values - values
    alive *= gamma * gae_lambda
    return _scanned(delta, alive)


def reward_to_go(rewards: FloatArray, dones: BoolArray, gamma: float) -> FloatArray:
    """The discounted sum of an episode's rewards from each step on, (n_steps, n_envs), float64."""
    return discounted_sum(rewards, gamma * (1.0 - dones))


def episode_numbers(dones: BoolArray) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """For every step, which episode of its environment it belongs to and how many steps that episode had before.

    :param dones: (n_steps, n_envs), row 0 being the first step of an episode in every environment
    :return: episode number within its environment and step within its episode, both (n_steps, n_envs)
    """
    n_steps, n_envs = dones.shape
    starts = np.concatenate([np.ones((1, n_envs), dtype=bool), dones[:-1]])
    episode = np.cumsum(starts, axis=0) - 1
    row = np.arange(n_steps)[:, None]
    first_row = np.maximum.accumulate(np.where(starts, row, 0), axis=0)
    return episode, row - first_row


def leave_one_out(
    returns: FloatArray, episode: NDArray[np.int64], step: NDArray[np.int64]
) -> tuple[FloatArray, BoolArray]:
    """The mean reward-to-go of the *other* episodes that are still running at the same step of theirs.

    RLOO's estimator (Kool et al. 2019) applied at each time step; with one-step episodes it is RLOO exactly.
    It does not depend on the step's own action, so it adds no bias. An episode that is the only one left at some
    step falls back on the mean reward-to-go over *all* steps of the other episodes, and in a batch of one episode
    on zero; that depends on other episodes only, too.

    :param returns: reward-to-go of each sample, (n,)
    :param episode: number of the episode of each sample, 0 .. n_episodes - 1, (n,)
    :param step: step of each sample within its episode, (n,)
    :return: the baseline of each sample, (n,), and where the fallback was used, (n,)
    """
    n_episodes, n_steps = int(episode.max()) + 1, int(step.max()) + 1
    table = np.zeros((n_episodes, n_steps))
    running = np.zeros((n_episodes, n_steps), dtype=bool)
    table[episode, step] = returns
    running[episode, step] = True
    n_others = running.sum(axis=0) - 1  # at each step
    at_same_step = (table.sum(axis=0) - table) / np.maximum(n_others, 1)
    n_other_samples = running.sum() - running.sum(axis=1, keepdims=True)
    over_all_steps = (table.sum() - table.sum(axis=1, keepdims=True)) / np.maximum(n_other_samples, 1)
    baseline = np.where(n_others > 0, at_same_step, over_all_steps)
    return baseline[episode, step], n_others[step] < 1


def leave_one_out_within(
    group: NDArray[np.int64], returns: FloatArray, episode: NDArray[np.int64], step: NDArray[np.int64]
) -> FloatArray:
    """The mean reward-to-go of the other episodes of a group, such as those that began alike, at the same step.

    With one completion of a prompt as the episode and the prompt as the group this is RLOO for language models
    (Ahmadian et al. 2024). An episode that has ended counts with its last reward-to-go: the reward of a completion
    comes with its end, so the longest one is still compared with what all the others got. An episode alone in its
    group gets zero.

    :param group: number of the group of each sample, the same for all samples of an episode, (n,)
    :param returns: reward-to-go of each sample, (n,)
    :param episode: number of the episode of each sample, 0 .. n_episodes - 1, (n,)
    :param step: step of each sample within its episode, (n,)
    :return: the baseline of each sample, (n,)
    """
    n_episodes, n_steps = int(episode.max()) + 1, int(step.max()) + 1
    table = np.zeros((n_episodes, n_steps))
    table[episode, step] = returns
    last = np.bincount(episode, minlength=n_episodes)[:, None] - 1
    table = np.take_along_axis(table, np.minimum(np.arange(n_steps), last), axis=1)
    group_of = np.zeros(n_episodes, dtype=np.int64)
    group_of[episode] = group
    sums = np.zeros((int(group.max()) + 1, n_steps))
    np.add.at(sums, group_of, table)
    n_others = np.bincount(group_of)[group_of][:, None] - 1
    baseline: FloatArray = np.where(n_others > 0, (sums[group_of] - table) / np.maximum(n_others, 1), 0.0)
    return baseline[episode, step]

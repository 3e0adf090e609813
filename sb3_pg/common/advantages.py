"""Returns, advantages and baselines: pure functions, most of them on arrays of shape (n_steps, n_envs)."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch as th
from numpy.typing import NDArray

from sb3_pg.common import workers
from sb3_pg.common.arrays import mapped
from sb3_pg.common.errors import ArgumentError
from sb3_pg.common.products import inner

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
    """Return generalised advantage estimates (Schulman et al. 2016, eq. 16).

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
    """Return the discounted sum of an episode's rewards from each step on, (n_steps, n_envs), float64."""
    return discounted_sum(rewards, gamma * (1.0 - dones))


def episode_numbers(dones: BoolArray) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return which episode of its environment each step belongs to, and how many steps that episode had before.

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
    """Return the mean reward-to-go of the *other* episodes that are still running at the same step of theirs.

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
    """Return the mean reward-to-go of the other episodes of a group, such as those that began alike, at the same step.

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
    table, group_of, size = _held_table(group, returns, episode, step)
    n_others, first = size[:, None] - 1, _of_first(table, group_of)
    table -= first  # so that equal returns differ from their mean by nothing, not by rounding
    baseline: FloatArray = first + (_group_sums(table, group_of) - table) / np.maximum(n_others, 1)
    return np.where(n_others > 0, baseline, 0.0)[episode, step]


def within_group(
    group: NDArray[np.int64], returns: FloatArray, episode: NDArray[np.int64], step: NDArray[np.int64]
) -> tuple[FloatArray, FloatArray]:
    """Return mean and standard deviation of the reward-to-go in a group at the same step, (n,) each.

    GRPO's estimate (Shao et al. 2024, section 4.1.2): the mean includes the episode's own return, the deviation is
    that of a sample (n - 1), and 0 for an episode alone. Arguments are those of :func:`leave_one_out_within`.
    """
    table, group_of, size = _held_table(group, returns, episode, step)
    first = _of_first(table, group_of)
    table -= first  # so that equal returns differ from their mean by nothing, not by rounding
    mean = _group_sums(table, group_of) / size[:, None]
    variance = _group_sums((table - mean) ** 2, group_of) / np.maximum(size - 1, 1)[:, None]
    return (first + mean)[episode, step], np.sqrt(variance)[episode, step]


def _held_table(
    group: NDArray[np.int64], returns: FloatArray, episode: NDArray[np.int64], step: NDArray[np.int64]
) -> tuple[FloatArray, NDArray[np.int64], NDArray[np.int64]]:
    """Return each episode's reward-to-go at each step, held after its end; its group; and the episodes in that."""
    n_episodes, n_steps = int(episode.max()) + 1, int(step.max()) + 1
    table = np.zeros((n_episodes, n_steps))
    table[episode, step] = returns
    last = np.bincount(episode, minlength=n_episodes)[:, None] - 1
    table = np.take_along_axis(table, np.minimum(np.arange(n_steps), last), axis=1)
    group_of = np.zeros(n_episodes, dtype=np.int64)
    group_of[episode] = group
    return table, group_of, np.bincount(group_of)[group_of]


def _group_sums(table: FloatArray, group_of: NDArray[np.int64]) -> FloatArray:
    """Return the sum over each episode's group, (n_episodes, n_steps)."""
    sums = np.zeros((int(group_of.max()) + 1, table.shape[1]))
    np.add.at(sums, group_of, table)
    found: FloatArray = sums[group_of]
    return found


def _of_first(table: FloatArray, group_of: NDArray[np.int64]) -> FloatArray:
    """Return the row of the first episode of each episode's group, (n_episodes, n_steps)."""
    first: FloatArray = table[np.unique(group_of, return_index=True)[1]][np.unique(group_of, return_inverse=True)[1]]
    return first


@dataclass
class Samples:
    """The samples of whole episodes, in time order, (n, ...) each.

    :param observations: an array, or a dictionary of them
    :param first: those of the samples that begin an episode, (n_episodes, ...)
    :param returns: reward-to-go
    :param episode: number of the episode, 0 .. n_episodes - 1
    :param step: step within it
    """

    observations: Any
    first: Any
    returns: FloatArray
    episode: NDArray[np.int64]
    step: NDArray[np.int64]

    @property
    def n_episodes(self) -> int:
        """How many episodes there are."""
        return int(self.episode.max()) + 1 if len(self.episode) else 0

    def same_start(self) -> NDArray[np.int64]:
        """Return a number for each sample, the same in episodes that began with the same observation, (n,).

        :raises ArgumentError: no two episodes did
        """
        is_first = self.step == 0
        parts = self.first.values() if isinstance(self.first, dict) else [self.first]
        rows = np.concatenate([x.reshape(len(x), -1) for x in parts], axis=1)
        start = np.unique(rows, axis=0, return_inverse=True)[1].reshape(-1)
        if start.max() + 1 == len(start):
            raise ArgumentError(
                f"No two of the {len(start)} episodes of this rollout began with the same observation, so that a "
                "baseline of episodes with the same start compares nothing. Let several environments start alike "
                "(TextVecEnv's completions_per_prompt, one seed), or use baseline='leave_one_out' or 'value'."
            )
        of_episode = np.zeros(len(start), dtype=np.int64)
        of_episode[self.episode[is_first]] = start
        group: NDArray[np.int64] = of_episode[self.episode]
        return group


def of_all_workers(own: Samples) -> tuple[Samples, slice]:
    """Return the samples of all workers, without observations but the first, and where this worker's own are."""
    parts = workers.gathered(replace(own, observations=None))
    episodes = np.cumsum([0, *(x.n_episodes for x in parts)])
    n_before = sum(len(x.step) for x in parts[: workers.rank()])
    firsts = [x.first for x in parts]
    if isinstance(own.first, dict):
        first: Any = {key: np.concatenate([x[key] for x in firsts]) for key in own.first}
    else:
        first = np.concatenate(firsts)
    returns, step = (np.concatenate([getattr(x, name) for x in parts]) for name in ("returns", "step"))
    episode = np.concatenate([x.episode + n for x, n in zip(parts, episodes, strict=False)])
    return Samples(None, first, returns, episode, step), slice(n_before, n_before + len(own.step))


#: (observations, returns) to the baseline of each sample
Baseline = Callable[[Any, np.ndarray], np.ndarray]

#: The baselines that have names.
BASELINES = ("value", "leave_one_out", "leave_one_out_same_start", "group", "ema", None)

#: The baselines that compare episodes with others that began alike.
SAME_START = ("leave_one_out_same_start", "group")

#: What the differences of baseline "group" are divided by: the names that TRL's ``scale_rewards`` has.
SCALES = ("group", "batch", None)

#: Added to a deviation, so that returns that differ by rounding alone are not blown up.
_SMALL = 1e-4


def compared(
    baseline: str | Baseline | None, samples: Samples, average: float | None, scale: str | None = "group"
) -> FloatArray:
    """Return how much better each sample's return is than its baseline, (n,).

    :param baseline: one of ``BASELINES`` but "value", or a function
    :param samples: of whole episodes
    :param average: the average return of *earlier* rollouts, for "ema", so that it does not depend on this one's
        actions; None at the first
    :param scale: one of ``SCALES``, for "group"
    :raises ArgumentError: the baseline cannot be had from these episodes, or the function gave something else
    """
    if baseline == "ema":
        return samples.returns - (average or 0.0)
    if not isinstance(baseline, str):
        return samples.returns - _own(baseline, samples) if baseline is not None else samples.returns
    if workers.size() == 1:
        return _compared_with_others(baseline, samples, scale)
    of_all, own = of_all_workers(samples)
    return _compared_with_others(baseline, of_all, scale)[own]


def _compared_with_others(baseline: str, samples: Samples, scale: str | None) -> FloatArray:
    """Return how much better each sample's return is than those of other episodes, (n,)."""
    returns, episode, step = samples.returns, samples.episode, samples.step
    require_several(baseline, samples.n_episodes)
    if baseline == "leave_one_out":
        return returns - leave_one_out(returns, episode, step)[0]
    group = samples.same_start()
    if baseline == "group":
        mean, deviation = within_group(group, returns, episode, step)
        if scale is None:
            return returns - mean
        if scale == "batch":
            _, deviation = within_group(np.zeros_like(group), returns, episode, step)
        return (returns - mean) / (deviation + _SMALL)
    # One that nobody began like is compared with all others: none of it depends on its own actions.
    alone = np.bincount(group, weights=step == 0)[group] < 2
    others = leave_one_out(returns, episode, step)[0]
    return returns - np.where(alone, others, leave_one_out_within(group, returns, episode, step))


def require_several(baseline: str, n_episodes: int) -> None:
    """Refuse a baseline that compares episodes if there is only one.

    :raises ArgumentError: there is
    """
    if n_episodes < 2:
        raise ArgumentError(
            f"baseline={baseline!r} compares an episode with others of the same rollout, but there is only "
            f"{n_episodes}. Raise `n_episodes` (or `n_steps`), or the number of environments."
        )


def _own(baseline: Baseline, samples: Samples) -> FloatArray:
    """Return what the user's function says."""
    given = baseline(mapped(np.asarray, samples.observations), samples.returns)
    wanted = f"`baseline` must return one finite number for each of the {len(samples.returns)} samples"
    try:
        found = np.asarray(given, dtype=np.float64)
    except (TypeError, ValueError):
        raise ArgumentError(f"{wanted}, but gave a {type(given).__name__} that is no array of numbers.") from None
    if found.shape != samples.returns.shape or not np.isfinite(found).all():
        raise ArgumentError(
            f"{wanted}, but gave a {type(given).__name__} of shape {found.shape}, {int((~np.isfinite(found)).sum())} "
            "of them not finite."
        )
    return found


def moving_average(before: float | None, now: float, decay: float) -> float:
    """Return an average with one more number; ``decay`` in [0, 1), higher remembers longer."""
    return now if before is None else decay * before + (1 - decay) * now


def moments(columns: Sequence[Any]) -> list[tuple[float, float]]:
    """Return the mean and the standard deviation (n - 1) of each of several columns, over all workers.

    Of one number or none they are (0, 1), which change nothing when they are taken out.
    """
    numbers = [np.asarray(x.cpu() if isinstance(x, th.Tensor) else x, np.float64) for x in columns]
    sums = workers.total([y for x in numbers for y in (len(x), x.sum(), (x * x).sum())])
    found = []
    for n, total, squares in np.reshape(sums, (-1, 3)).tolist():
        variance = (squares - total * total / n) / (n - 1) if n > 1 else 1.0
        found.append((total / n if n > 1 else 0.0, math.sqrt(max(variance, 0.0))))
    return found


def normalized(advantages: Any, scale: tuple[float, float] | None = None, counts: Any = None) -> Any:
    """Return advantages with mean 0 and standard deviation 1; one alone is left as it is (SB3 issue 325).

    :param scale: mean and standard deviation to take out; None takes their own, over all workers
    :param counts: True for those that mean and deviation are of, bool (n,); None is all
    """
    its = advantages if counts is None else advantages[counts]
    if scale is not None or workers.size() > 1:
        mean, deviation = scale or moments([its])[0]
        return (advantages - mean) / (deviation + 1e-8)
    if len(its) < 2:
        return advantages
    mean = its.sum() / len(its)
    centered = its - mean
    deviation = math.sqrt(inner(centered, centered) / (len(its) - 1))
    return (centered if counts is None else advantages - mean) / (deviation + 1e-8)

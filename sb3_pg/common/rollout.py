"""A rollout: what acting has recorded, and what judging and stepping ask of it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch as th
from stable_baselines3.common.buffers import RolloutBuffer

from sb3_pg.common.arrays import Observations, mapped
from sb3_pg.common.buffers import episode_ends, flat
from sb3_pg.common.errors import require_finite_of
from sb3_pg.common.returned import checked_observations
from sb3_pg.common.sequences import Memory, Stretches


class Cut(NamedTuple):
    """Where a time limit cut an episode, and the observation that it would have gone on from, (1, ...)."""

    step: int
    env: int
    observation: Any


class Told(NamedTuple):
    """What an environment has told at the end of an episode besides its reward, for the engine."""

    step: int
    env: int
    infos: Mapping[str, Any]  #: those of ``TOLD``


#: "reward_scores": numbers by name, to be logged. "step_rewards": the share of each step in the last reward, (length,).
TOLD = ("reward_scores", "step_rewards")


class Step(NamedTuple):
    """What acting and stepping have given, of all environments, before it is recorded."""

    actions: np.ndarray
    rewards: np.ndarray
    dones: np.ndarray
    infos: Any
    observations: Any  #: after the step
    values: th.Tensor | None
    log_probs: th.Tensor | None
    memory: Memory | None
    masks: np.ndarray | None  #: of the actions that were allowed


@dataclass
class Rollout:
    """The buffer, and what it has no columns for.

    :param buffer: SB3's or ours, or one of the user's
    :param last_observations: after the last step, (n_envs, ...)
    :param last_dones: whether the last step ended an episode, (n_envs,)
    :param cuts: the episodes that ended by a time limit
    :param told: what environments have told at the ends of episodes
    :param masks: of allowed actions at each step, bool (n_envs, options) each; empty if all were
    :param may_be_masked: whether actions were masked if the environments have masks
    :param sequence_length: longer stretches of episodes are cut into pieces of so many steps; None leaves them whole
    :param memory: what the policy remembered of each environment before the first step
    :param replaced: the step after which a callback replaced the policy, and what was remembered then
    :param starting_memory: what it remembered when each of the stretches began, found by judging
    :param reference_log_probs: log-probabilities under the reference, where the loss needs them, found by judging
    :param n_known: of so many first steps values and log-probabilities are in the buffer, by the policy that acted
    :param n_judged: steps when it was judged; 0 before
    :param needs_values: whether values are used; an engine for which judging is costly may leave out what is not
    :param needs_log_probs: whether log-probabilities are used; judging may leave them out, too
    :param is_paused: whether nothing of a step is missing, so that an interrupted run can go on from here
    :param unrecorded: the step after which the callback is asked
    :param figures: what judging has found to log
    :param n_finished: episodes that each environment has ended, (n_envs,)
    :param last_end: the step with which each environment last ended one, (n_envs,); -1 before
    """

    buffer: RolloutBuffer
    last_observations: Observations
    last_dones: np.ndarray
    cuts: list[Cut] = field(default_factory=list)
    told: list[Told] = field(default_factory=list)
    masks: list[np.ndarray] = field(default_factory=list)
    may_be_masked: bool = True
    sequence_length: int | None = None
    memory: Memory | None = None
    replaced: tuple[int, Memory | None] | None = None
    starting_memory: Memory | None = None
    reference_log_probs: np.ndarray | None = None
    n_known: int = 0
    n_judged: int = 0
    needs_values: bool = True
    needs_log_probs: bool = True
    is_paused: bool = False
    unrecorded: Step | None = None
    figures: Mapping[str, float] = field(default_factory=dict)
    n_finished: np.ndarray = field(init=False)
    last_end: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.n_finished = np.zeros(self.n_envs, dtype=int)
        self.last_end = np.full(self.n_envs, -1)
        self._changed: tuple[Any, np.ndarray, np.ndarray] | None = None  # where, rewards before and after judging

    @property
    def n_steps(self) -> int:
        """Steps of each environment."""
        return self.buffer.pos

    @property
    def n_envs(self) -> int:
        """Environments."""
        return self.buffer.n_envs

    def note(self, dones: np.ndarray, infos: list[dict[str, Any]]) -> None:
        """Remember which episodes ended with the step that is about to be recorded.

        :raises EnvironmentNumberError: the last observation of one that was cut is not finite
        """
        step, cuts, told = self.buffer.pos, [], []
        for env in np.flatnonzero(dones):
            info = infos[env]
            if any(name in info for name in TOLD):
                told.append(Told(step, int(env), {name: info[name] for name in TOLD if name in info}))
            if info.get("TimeLimit.truncated", False) and info.get("terminal_observation") is not None:
                cuts.append(Cut(step, int(env), self._as_batch(info["terminal_observation"])))
        for cut in cuts:
            require_finite_of(cut.env, "value of the terminal observation", cut.observation, step)
        self.cuts += cuts
        self.told += told
        self.n_finished += dones
        self.last_end[dones] = step

    def _as_batch(self, observation: Any) -> Any:
        """Return one observation as a batch of one."""
        single = checked_observations(self.buffer.observation_space, observation, None, "terminal observation")
        return mapped(lambda x: x[None], single)

    @contextmanager
    def changing_rewards(self) -> Iterator[None]:
        """Let judging change the rewards in the block; what an earlier judging has changed is taken back before."""
        rewards = self.buffer.rewards[: self.n_steps]
        if self._changed is not None:
            where, before, after = self._changed
            rewards[where] = np.where(rewards[where] == after, before, rewards[where])
        before = rewards.copy()
        try:
            yield
        finally:
            where = np.nonzero(rewards != before)
            self._changed = where, before[where], rewards[where]

    @property
    def dones(self) -> np.ndarray:
        """Bool (n_steps, n_envs), True where an episode ended with the step; of a complete rollout."""
        return episode_ends(self.buffer.episode_starts[: self.n_steps], self.last_dones)

    def column(self, name: str, first_step: int = 0) -> Any:
        """Return a column of the buffer with one row per sample, (n_steps * n_envs, ...)."""
        return flat(getattr(self.buffer, name), slice(first_step, self.n_steps))

    def mask_rows(self, first_step: int = 0) -> np.ndarray | None:
        """Return which actions were allowed, one row per sample, (n_steps * n_envs, options); None if all were."""
        return np.concatenate(self.masks[first_step:]) if self.masks else None

    @property
    def final_observations(self) -> Any:
        """The observations after the last step, and those at which an episode was cut, (n_envs + len(cuts), ...)."""
        return _joined(self.last_observations, [cut.observation for cut in self.cuts])

    @property
    def stretches(self) -> Stretches:
        """The stretches of episodes within the rollout."""
        starts = self.buffer.episode_starts[: self.n_steps] > 0
        return Stretches(starts, self.sequence_length, self.replaced[0] if self.replaced else 0)


def _joined(observations: Any, more: list[Any]) -> Any:
    """Return a batch of observations with batches of one appended."""
    if isinstance(observations, dict):
        return {key: _joined(x, [row[key] for row in more]) for key, x in observations.items()}
    return np.concatenate([observations, *more]) if more else observations

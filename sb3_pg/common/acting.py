"""When a rollout is complete, which of its samples count, and whether environments may rest."""

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from stable_baselines3.common.vec_env import VecEnv

from sb3_pg.common.advantages import episode_numbers
from sb3_pg.common.errors import ArgumentError
from sb3_pg.common.rollout import Rollout

#: An episode longer than the whole of ``learn``, within these limits, is taken for one that never ends.
_SHORTEST_ENDLESS, _LONGEST = 10_000, 200_000


@runtime_checkable
class Resting(Protocol):
    """A vectorised environment whose environments can rest once they have given their episodes.

    It spares the steps that nothing is learned from.
    """

    def rest_after(self, n_episodes: int) -> None:
        """Let each environment rest after so many episodes, from here until the next reset."""


@dataclass
class Steps:
    """A fixed number of steps of each environment, wherever their episodes are then."""

    n_steps: int

    def prepare(self, env: VecEnv, observations: Any, episode_starts: np.ndarray) -> tuple[Any, np.ndarray]:
        """Get the environments ready for a new rollout.

        :param observations: where they are
        :param episode_starts: which of them are at the start of an episode, (n_envs,)
        :return: the same two after that
        """
        return observations, episode_starts

    def is_complete(self, rollout: Rollout) -> bool:
        """Return whether the rollout has all that it needs.

        :raises ArgumentError: it never will
        """
        return rollout.buffer.pos >= self.n_steps

    def keep(self, rollout: Rollout) -> np.ndarray | None:
        """Return which samples count, bool (n_steps, n_envs); None for all."""
        return None


@dataclass
class WholeEpisodes:
    """Whole episodes: of each environment the same number, or all those that it begins within so many steps.

    Taking the first episodes that finish would favour short ones. What an environment does while the others finish
    does not count.

    :param n_episodes: of each environment; None for all those that begin within ``n_steps``
    :param n_steps: see there
    :param longest: an episode of more steps is an error
    :param learner: who learns from them, and
    :param instead: how to learn from rollouts without whole episodes, both for the error
    """

    n_episodes: int | None
    n_steps: int
    longest: int
    learner: str
    instead: str

    def prepare(self, env: VecEnv, observations: Any, episode_starts: np.ndarray) -> tuple[Any, np.ndarray]:
        can_rest = self.n_episodes is not None and isinstance(env.unwrapped, Resting)
        if can_rest or not np.all(episode_starts):
            observations, episode_starts = env.reset(), np.ones(env.num_envs, dtype=bool)
        if self.n_episodes is not None and isinstance(env.unwrapped, Resting):
            env.unwrapped.rest_after(self.n_episodes)
        return observations, episode_starts

    def is_complete(self, rollout: Rollout) -> bool:
        if self.n_episodes is not None:
            unfinished = rollout.n_finished < self.n_episodes
        else:
            unfinished = rollout.last_end < self.n_steps - 1
        if not np.count_nonzero(unfinished):
            return True
        if rollout.n_steps > self.longest:
            self._check_endless(rollout, unfinished)
        return False

    def keep(self, rollout: Rollout) -> np.ndarray | None:
        episode, step = episode_numbers(rollout.dones)
        kept: np.ndarray
        if self.n_episodes is not None:
            kept = episode < self.n_episodes
        else:
            kept = np.arange(len(step))[:, None] - step < self.n_steps
        return kept

    def _check_endless(self, rollout: Rollout, unfinished: np.ndarray) -> None:
        running = np.where(unfinished, rollout.n_steps - 1 - rollout.last_end, 0)
        env = int(running.argmax())
        if running[env] > self.longest:
            raise ArgumentError(
                f"Environment {env} has not ended its episode in {running[env]} steps, and {self.learner} learns "
                f"from whole episodes. Wrap it in gymnasium.wrappers.TimeLimit, {self.instead}, or raise "
                f"`max_episode_steps` (now {self.longest}) if they are that long."
            )


#: How long a rollout is, and which of its samples count.
Horizon = Steps | WholeEpisodes


def longest_episode(max_episode_steps: int | None, total_timesteps: int) -> int:
    """Return the number of steps after which an episode is taken for one that never ends."""
    return max_episode_steps or min(max(total_timesteps, _SHORTEST_ENDLESS), _LONGEST)

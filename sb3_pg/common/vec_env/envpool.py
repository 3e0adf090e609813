"""EnvPool's environments as a VecEnv. The package itself (``pip install sb3_pg[envpool]``) is not imported."""

import warnings
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from sb3_pg.common.errors import ArgumentError
from sb3_pg.common.vec_env.gymnasium_vector import GymnasiumVecEnv
from sb3_pg.common.vec_env.infos import Info, spread
from sb3_pg.common.vec_env.partial_reset import Environments


@runtime_checkable
class EnvPool(Protocol):
    """What ``envpool.make`` returns, of any ``env_type``."""

    @property
    def config(self) -> dict[str, Any]:
        """What it was made with."""

    @property
    def all_env_ids(self) -> np.ndarray:
        """The numbers of the environments, int32 (n_envs,)."""

    @property
    def is_async(self) -> bool:
        """Whether a step waits for some of the environments only."""

    def render(self, env_ids: np.ndarray) -> Any:
        """Return their pictures, (n, height, width, 3)."""


def seed_for_pool(seed: int) -> int:
    """Return a seed that EnvPool takes, which are those of 31 bits."""
    return seed % 2**31


class EnvPoolVecEnv(GymnasiumVecEnv):
    """A VecEnv around ``envpool.make(..., env_type="gymnasium")``.

    It resets at the next step and knows masks of what to reset, its infos are about all environments, and its seeds
    are given when it is made. In Atari games ``infos[i]["episode"]`` is of the whole game and of rewards as they are,
    whatever ``episodic_life`` and ``reward_clip``.

    :param env: what EnvPool has made, or wrappers of gymnasium.vector around it
    :raises ArgumentError: it steps some of its environments at a time
    """

    def __init__(self, env: Environments) -> None:
        inside: Any = env.unwrapped
        self._pool: EnvPool = inside
        config = self._pool.config
        if self._pool.is_async:
            raise ArgumentError(
                f"EnvPool's `batch_size` ({config['batch_size']}) must be `num_envs` ({config['num_envs']}), for a "
                "VecEnv steps all environments at once. Leave it out."
            )
        super().__init__(env)
        self._checks_resets = False

    def seed(self, seed: int | None = None) -> Sequence[int | None]:
        """Warn if the environments were made with another seed, for EnvPool cannot change it."""
        made_with = self._pool.config["seed"]
        if seed is not None and seed_for_pool(seed) != made_with:
            warnings.warn(
                f"EnvPool's environments keep the seed that they were made with, {made_with}. For {seed} make them "
                f"with envpool.make(..., seed={seed_for_pool(seed)}).",
                stacklevel=2,
            )
        return [made_with + i for i in range(self.num_envs)]

    def _spread(self, info: Any, infos: list[Info]) -> None:
        spread({key: column for key, column in info.items() if key not in ("env_id", "players")}, infos)

    def _count(self, rewards: Any, info: Any) -> None:
        super()._count(info.get("reward", rewards), info)

    def _note_episodes(self, ends: np.ndarray, infos: list[Info]) -> None:
        """Write the episodes that ended; a game does not end when only a life was lost."""
        of_games = ends.copy()
        for i in np.flatnonzero(ends).tolist():
            of_games[i] = infos[i].get("terminated", True) or infos[i]["TimeLimit.truncated"]
        super()._note_episodes(of_games, infos)

    def get_images(self) -> Sequence[np.ndarray | None]:
        return list(self._pool.render(self._pool.all_env_ids))

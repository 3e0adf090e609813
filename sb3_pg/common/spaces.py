"""Which spaces can be learned on, and by which name an environment knows its actions."""

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from stable_baselines3.common.vec_env.patch_gym import _patch_env

from sb3_pg.common.errors import ArgumentError

PLAIN_SPACES = (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)

_FLATTEN = "Flatten it (gymnasium.wrappers.FlattenObservation), or use a Dict of plain spaces."


class SpaceError(ArgumentError, NotImplementedError):
    """A space that cannot be learned on. Also a ``NotImplementedError``, which SB3 raises for some."""


def checked_environment(env: Any) -> gym.Env[Any, Any]:
    """Return a single environment of gymnasium's, or of gym's by SB3's adapter.

    :raises ArgumentError: it is none
    """
    if isinstance(env, type):
        raise ArgumentError(f"`env` is the class {env.__name__}: pass an environment, {env.__name__}(...).")
    try:
        return _patch_env(env)
    except ValueError:
        raise ArgumentError(
            "`env` must be an environment of gymnasium, a VecEnv, or the id of a registered environment, not a "
            f"{type(env).__name__}."
        ) from None


def check_spaces(observation_space: spaces.Space[Any], action_space: spaces.Space[Any]) -> None:
    """Refuse spaces that cannot be learned on.

    :raises SpaceError: naming the space and what to do
    """
    if isinstance(observation_space, spaces.Dict):
        if not observation_space.spaces:
            raise SpaceError("The observation space Dict() is empty. Give it at least one space.")
        for key, part in observation_space.spaces.items():
            _check_observations(f"observation space {key!r}", part)
    else:
        _check_observations("observation space", observation_space)
    _check_actions(action_space)


def environments_own(known: spaces.Space[Any], given: spaces.Space[Any]) -> spaces.Space[Any]:
    """Return the space of an environment in place of an equal one, if it may tell more than is compared.

    :param known: the model's
    :param given: the environment's
    """
    return given if type(given) is type(known) and type(given) not in PLAIN_SPACES else known


def _check_observations(what: str, space: spaces.Space[Any]) -> None:
    if not isinstance(space, PLAIN_SPACES):
        raise SpaceError(
            f"The {what} {space} is none of Box, Discrete, MultiDiscrete and MultiBinary, or a Dict of them. {_FLATTEN}"
        )
    if np.any(start_of(space)):
        raise SpaceError(
            f"The {what} {space} has a start other than 0. Shift observations to begin at 0 "
            "(gymnasium.wrappers.TransformObservation)."
        )
    if isinstance(space, spaces.MultiDiscrete) and space.nvec.ndim != 1:
        raise SpaceError(f"The {what} {space} is MultiDiscrete of {space.nvec.ndim} dimensions. {_FLATTEN}")
    if isinstance(space, spaces.Box) and space.shape == ():
        raise SpaceError(
            f"The {what} {space} is a number without a dimension. Let the environment return arrays of "
            "shape (1,) (gymnasium.wrappers.ReshapeObservation)."
        )
    if 0 in (space.shape or ()):
        raise SpaceError(f"The {what} {space} is empty. Leave it out, or give it at least one number.")


def _check_actions(space: spaces.Space[Any]) -> None:
    wrap = "wrap the environment to take a plain one (gymnasium.ActionWrapper)."
    if not isinstance(space, PLAIN_SPACES):
        raise SpaceError(f"The action space {space} is none of Box, Discrete, MultiDiscrete and MultiBinary: {wrap}")
    if not isinstance(space, spaces.Box) and len(space.shape or ()) > 1:
        raise SpaceError(f"Multi-dimensional {space} action space is not supported. Flatten it: {wrap}")
    if 0 in (space.shape or ()):
        raise SpaceError(f"The action space {space} is empty: {wrap}")
    if isinstance(space, spaces.Box) and not space.is_bounded():
        raise SpaceError(
            f"The action space {space} must have finite bounds, which policies act within: give it some in the "
            "environment, or by gymnasium.wrappers.TransformAction(env, function, Box(-1, 1, ...))."
        )


def start_of(space: spaces.Space[Any]) -> Any:
    """Return the number of the first action of a Discrete or of each of a MultiDiscrete space, otherwise 0."""
    return space.start if isinstance(space, spaces.Discrete | spaces.MultiDiscrete) else 0


def shifted(space: spaces.Space[Any], actions: np.ndarray) -> np.ndarray:
    """Return actions numbered from 0 as the space numbers them (SB3 issue 1295)."""
    if isinstance(space, spaces.Discrete):
        if space.start == 0:
            return actions  # quicker than to add
    elif not isinstance(space, spaces.MultiDiscrete):
        return actions
    moved = np.empty_like(actions)  # an array for a single choice, too
    np.add(actions, start_of(space), out=moved, casting="unsafe")
    return moved

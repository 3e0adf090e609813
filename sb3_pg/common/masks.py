"""Masks of allowed actions: where environments say them, and what they must be like.

An environment says with a method ``action_masks()`` which actions are allowed in its present state: booleans, one for
each option of a Discrete space, for each option of each choice of a MultiDiscrete one in a row, and two (off, on) for
each number of a MultiBinary one, as sb3-contrib has it.
"""

import sys
import weakref
from collections.abc import Callable
from types import FrameType
from typing import Any

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

from sb3_pg.common.errors import ArgumentError
from sb3_pg.common.registry import STEPPERS

METHOD = "action_masks"

#: Asks all environments, at a step of the rollout if it is during one, and returns booleans, (n_envs, options).
AskMasks = Callable[[int | None], np.ndarray]


def options_of(space: spaces.Space[Any]) -> list[int]:
    """Return how many options each choice of a space of actions has; none for Box."""
    if isinstance(space, spaces.Discrete):
        return [int(space.n)]
    if isinstance(space, spaces.MultiDiscrete):
        return [int(n) for n in space.nvec.ravel()]
    return [2] * int(np.prod(space.n)) if isinstance(space, spaces.MultiBinary) else []


def masks_of(env: VecEnv) -> AskMasks | None:
    """Return what asks the environments for their masks and checks them; None if they have none."""
    space, n, ask = env.action_space, env.num_envs, _asking(env)
    sizes = options_of(space)
    if ask is None or not sizes:
        return None
    return lambda step: _checked(space, sizes, ask(), n, "" if step is None else f" at step {step} of this rollout")


def _asking(env: VecEnv) -> Callable[[], Any] | None:
    """Return what asks the environments, unchecked."""
    inside = env.unwrapped
    try:
        if not env.has_attr(METHOD):
            return None
        if isinstance(inside, DummyVecEnv):  # each one directly takes half the time
            asked = [single.get_wrapper_attr(METHOD) for single in inside.envs]
            if all(map(callable, asked)):
                return lambda: [ask() for ask in asked]
            raise ArgumentError(
                f"The environment's `{METHOD}` must be a method. Make it one, or pass use_masking=False."
            )
    except (AttributeError, NotImplementedError):
        return None
    reference = weakref.ref(env)
    return lambda: reference().env_method(METHOD)  # type: ignore[union-attr]


def checked_masks(space: spaces.Space[Any], masks: Any, n: int) -> np.ndarray:
    """Return masks as booleans, (n, options).

    :param space: of the actions
    :param masks: (n, options), or anything that reshapes to that
    :param n: rows of observations
    :raises ArgumentError: they are of another shape, not true or false, or allow nothing
    """
    sizes = options_of(space)
    if not sizes:
        raise ArgumentError(f"`action_masks` are for choices, not for actions of {space}. Leave them out.")
    return _checked(space, sizes, masks, n, "")


def _checked(space: spaces.Space[Any], sizes: list[int], masks: Any, n: int, when: str) -> np.ndarray:
    width = sum(sizes)
    try:
        array = np.asarray(masks)
    except ValueError:  # rows of several lengths
        array = np.empty(0, object)
    if array.dtype.kind not in "biuf" or array.size != n * width or (array.ndim > 1 and len(array) != n):
        raise ArgumentError(
            f"`action_masks`{when} must be true or false for each of the {width} options of {space}, of shape "
            f"{(n, width)}, but are of shape {array.shape} and type {array.dtype}."
        )
    allowed: Any = (array if array.dtype == bool else array != 0).reshape(n, width)
    starts = [0] if len(sizes) == 1 else np.cumsum([0, *sizes[:-1]])
    some = np.logical_or.reduceat(allowed, starts, axis=1)
    if np.count_nonzero(some) < some.size:
        env, choice = np.argwhere(~some)[0]
        which = "no action" if len(sizes) == 1 else f"no option of choice {choice}"
        raise ArgumentError(f"`action_masks` of environment {env}{when} allow {which}. One must be true.")
    return allowed  # type: ignore[no-any-return]


def n_rows(space: spaces.Space[Any], observation: Any) -> int:
    """Return how many observations there are in a batch of them, 1 for a single one."""
    while isinstance(space, spaces.Dict):
        key, space = next(iter(space.spaces.items()))
        observation = observation[key]
    shape = np.shape(observation)
    return shape[0] if len(shape) > len(space.shape or ()) else 1


STEPPERS.add(evaluate_policy.__code__.co_filename)

#: What asks the environments of earlier evaluations, since to find that out takes long.
_known: weakref.WeakKeyDictionary[VecEnv, AskMasks | None] = weakref.WeakKeyDictionary()


def masks_of_caller(space: spaces.Space[Any], observation: Any) -> Any:
    """Return the masks of the environment that code of ``STEPPERS`` acts in by asking for predictions; else None.

    SB3's evaluation has no argument for masks, and so neither have EvalCallback and whatever else calls it. What it
    asks for must not depend on that: a policy that has learned with masks knows nothing of forbidden actions.

    :param space: of the observations
    :param observation: what the prediction is for; if it is not one for each environment, somebody else asks
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_name == "predict":  # the model's, and those of its subclasses
        frame = frame.f_back
    if frame is None or frame.f_code.co_filename not in STEPPERS or "env" not in frame.f_locals:
        return None
    env = frame.f_locals["env"]
    if env not in _known:
        _known[env] = masks_of(env)
    ask = _known[env]
    return None if ask is None or env.num_envs != n_rows(space, observation) else ask(None)

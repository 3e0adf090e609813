"""Masks of allowed actions: where environments say them, and what they must be like.

An environment says with a method ``action_masks()`` which actions are allowed in its present state: booleans, one for
each option of a Discrete space, for each option of each choice of a MultiDiscrete one in a row, and two (off, on) for
each number of a MultiBinary one, as sb3-contrib has it.
"""

import sys
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

from sb3_pg.common.errors import ArgumentError

METHOD = "action_masks"

#: Asks all environments, (n_envs, options).
Masks = Callable[[], Any]


def options_of(space: spaces.Space[Any]) -> list[int]:
    """Return how many options each choice of a space of actions has; none for Box."""
    if isinstance(space, spaces.Discrete):
        return [int(space.n)]
    if isinstance(space, spaces.MultiDiscrete):
        return [int(n) for n in space.nvec.ravel()]
    return [2] * int(np.prod(space.n)) if isinstance(space, spaces.MultiBinary) else []


def masks_of(env: VecEnv) -> Masks | None:
    """Return what asks the environments for their masks; None if they have none."""
    if not options_of(env.action_space):
        return None
    inside = env.unwrapped
    try:
        if not env.has_attr(METHOD):
            return None
        if isinstance(inside, DummyVecEnv):  # ask each one directly, in half the time
            asked = [single.get_wrapper_attr(METHOD) for single in inside.envs]
            return lambda: [ask() for ask in asked]
    except (AttributeError, NotImplementedError):
        return None
    return lambda: env.env_method(METHOD)


def checked_masks(space: spaces.Space[Any], masks: Any, n: int, step: int | None = None) -> np.ndarray:
    """Return masks as booleans, (n, options).

    :param masks: (n, options), or anything that reshapes to that
    :param n: rows of observations
    :param step: of the rollout, for the message
    :raises ArgumentError: they are of another shape, not true or false, or allow nothing
    """
    sizes = options_of(space)
    if not sizes:
        raise ArgumentError(f"`action_masks` are for choices, not for actions of {space}. Leave them out.")
    when = "" if step is None else f" at step {step} of this rollout"
    try:
        array = np.asarray(masks)
    except ValueError:  # rows of several lengths
        array = np.empty(0, object)
    if array.dtype.kind not in "biuf" or array.size != n * sum(sizes) or (array.ndim > 1 and len(array) != n):
        raise ArgumentError(
            f"`action_masks`{when} must be true or false for each of the {sum(sizes)} options of {space}, of shape "
            f"{(n, sum(sizes))}, but are of shape {array.shape} and type {array.dtype}."
        )
    allowed: Any = array.reshape(n, sum(sizes)) != 0
    starts = np.cumsum([0, *sizes[:-1]])
    some: Any = allowed.any(axis=1)[:, None] if len(sizes) == 1 else np.logical_or.reduceat(allowed, starts, axis=1)
    if not some.all():
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


#: Functions that step the environment named ``env`` by ``model.predict``, without telling it the masks.
STEPPERS = {evaluate_policy.__code__}

_known: WeakKeyDictionary[VecEnv, Masks | None] = WeakKeyDictionary()


def masks_of_caller() -> Any:
    """Return the masks of the environment that one of ``STEPPERS`` acts in by asking for predictions; else None.

    SB3's evaluation has no argument for masks, and so neither have EvalCallback and whatever else calls it. What it
    asks for must not depend on that: a policy that has learned with masks knows nothing of forbidden actions.
    """
    frame = sys._getframe(1)
    for _ in range(4):  # its subclasses' ``predict`` may call the model's
        if frame.f_code in STEPPERS:
            env = frame.f_locals["env"]
            if env not in _known:
                _known[env] = masks_of(env)
            ask = _known[env]
            return None if ask is None else ask()
        if frame.f_back is None:
            break
        frame = frame.f_back
    return None

"""What environments return, as arrays of the usual types in memory of our own.

A VecEnv may return numbers of any type, and write into the same memory at each step.
"""

from typing import Any

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecEnvWrapper

from sb3_pg.common.errors import ArgumentError

#: Kinds of VecEnv that do as ``is_usual`` says.
USUAL: list[type[VecEnv]] = [DummyVecEnv]


def is_usual(env: VecEnv) -> bool:
    """Return whether steps return arrays of the usual types in memory of their own, as DummyVecEnv's do.

    SB3's wrappers keep them so, and are looked through.
    """
    while isinstance(env, VecEnvWrapper) and _is_sb3s(env):
        env = env.venv
    return isinstance(env, tuple(USUAL)) and _is_sb3s(env)


def _is_sb3s(env: VecEnv) -> bool:
    return type(env).__module__.split(".")[0] in ("stable_baselines3", "sb3_pg")


def checked_step(env: VecEnv, returned: Any) -> tuple[Any, np.ndarray, np.ndarray, Any]:
    """Return what ``env.step`` has returned: observations, rewards, dones and infos.

    :raises ArgumentError: something is not of the shape that a VecEnv's results have, or not made of numbers
    """
    observations, rewards, dones, infos = returned
    n = env.num_envs
    if type(rewards) is not np.ndarray or rewards.dtype != np.float32 or rewards.shape != (n,):
        rewards = numbers("rewards", rewards, (n,)).astype(np.float32)
    if type(dones) is not np.ndarray or dones.dtype != np.bool_ or dones.shape != (n,):
        dones = numbers("dones", dones, (n,)).astype(bool)
    if isinstance(infos, list) and not infos:  # SB3 asks for those of last steps only, so some environments give none
        infos = [{} for _ in range(n)]
    if not isinstance(infos, list | tuple) or len(infos) != n:
        found = len(infos) if isinstance(infos, list | tuple) else repr(infos)
        raise ArgumentError(f"The environment's `infos` must be {n} dictionaries, one for each of them, not {found}.")
    return checked_observations(env.observation_space, observations, n), rewards, dones.copy(), infos


def checked_observations(space: spaces.Space[Any], x: Any, n: int | None, what: str = "observations") -> Any:
    """Return a copy of observations, an array or a dictionary of them.

    :param n: of so many environments; None for a single observation
    :param what: their name, for the message
    :raises ArgumentError: their shape is not that of the space
    """
    if isinstance(space, spaces.Dict):
        if not isinstance(x, dict) or not space.spaces.keys() <= x.keys():
            found = sorted(x) if isinstance(x, dict) else f"{type(x).__name__} {x!r}"
            raise ArgumentError(f"The environment's {what} must be a dict of {sorted(space.spaces)}, not {found}.")
        return {key: checked_observations(part, x[key], n, f"{what} {key!r}") for key, part in space.spaces.items()}
    shape = (space.shape or ()) if n is None else (n, *(space.shape or ()))
    if type(x) is np.ndarray and x.shape == shape and x.dtype.isnative and x.dtype.kind in "fiub":
        return x.copy()
    if type(x) is np.ndarray and x.shape == (n, 1) and shape == (n,):
        x = x.reshape(n)  # SB3's shape of a choice
    array = numbers(what, x, shape)
    return array.astype(array.dtype.newbyteorder("="))


def numbers(what: str, x: Any, shape: tuple[int, ...]) -> np.ndarray:
    """Return numbers as an array.

    :param what: their name, for the message
    :param shape: that they must have
    :raises ArgumentError: they have another, or are no numbers
    """
    array = np.asarray(x)
    if array.shape != shape or array.dtype.kind not in "fiub":
        found = repr(x) if array.dtype.kind not in "fiub" or array.ndim == 0 else ""
        raise ArgumentError(
            f"The environment's {what} must be numbers of shape {shape}, not of shape {array.shape} and type "
            f"{array.dtype} {found}".rstrip()
            + "."
        )
    return array

"""Which adapter a vectorised environment needs."""

from typing import Any

from gymnasium.vector import VectorEnv
from stable_baselines3.common.vec_env import VecEnv

from sb3_pg.common.errors import ArgumentError
from sb3_pg.common.vec_env.envpool import EnvPool, EnvPoolVecEnv
from sb3_pg.common.vec_env.gymnasium_vector import GymnasiumVecEnv


def is_vectorised(env: Any) -> bool:
    """Return whether :func:`as_vec_env` is for this."""
    return isinstance(env, VectorEnv | EnvPool)


def as_vec_env(env: Any) -> VecEnv:
    """Return a vectorised environment of gymnasium or EnvPool as a VecEnv of SB3, and a VecEnv as it is.

    The algorithms do so with what they are given. SB3's ``evaluate_policy``, callbacks and wrappers do not.

    :param env: ``gymnasium.make_vec(...)``, ``envpool.make(..., env_type="gymnasium")``, wrappers of gymnasium.vector
        around one of them, or a VecEnv
    :raises ArgumentError: it is something else, or cannot be learned on
    """
    if isinstance(env, VecEnv):
        return env
    if isinstance(env, VectorEnv):
        return (EnvPoolVecEnv if isinstance(env.unwrapped, EnvPool) else GymnasiumVecEnv)(env)
    if isinstance(env, EnvPool):
        raise ArgumentError("EnvPool's environments must be made with envpool.make(..., env_type='gymnasium').")
    raise ArgumentError(
        f"`env` must be a gymnasium.vector.VectorEnv, one of EnvPool or a VecEnv, not {type(env).__name__}. Give a "
        "single environment to the algorithm itself, or to DummyVecEnv([lambda: env])."
    )

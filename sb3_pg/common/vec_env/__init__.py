"""Vectorised environments: SB3's with less overhead and clearer errors, and gymnasium's and EnvPool's as SB3's.

SB3 deep-copies observations and infos at every step, and keeps its running statistics with functions made for
large arrays. For small observations that costs as much as the simulation itself. DummyVecEnv, VecNormalize and
SubprocVecEnv give the same numbers, are instances of SB3's classes and read and write the same files. The VecNormalize
and SubprocVecEnv of an environment that is given to one of our algorithms become ours.

:func:`as_vec_env` makes a VecEnv of a ``gymnasium.vector.VectorEnv`` or of what ``envpool.make`` returns; the
algorithms take these as they are.
"""

from stable_baselines3.common import vec_env as sb3

from sb3_pg.common.vec_env.adapters import as_vec_env
from sb3_pg.common.vec_env.dummy import DummyVecEnv
from sb3_pg.common.vec_env.envpool import EnvPoolVecEnv
from sb3_pg.common.vec_env.gymnasium_vector import GymnasiumVecEnv
from sb3_pg.common.vec_env.normalize import VecNormalize
from sb3_pg.common.vec_env.subproc import SubprocVecEnv

__all__ = [
    "DummyVecEnv",
    "EnvPoolVecEnv",
    "GymnasiumVecEnv",
    "SubprocVecEnv",
    "VecNormalize",
    "as_vec_env",
    "take_over",
]


def take_over(env: sb3.VecEnv) -> None:
    """Give SB3's VecNormalize and SubprocVecEnv the methods of ours, wherever they lie among an environment's wrappers.

    They keep their attributes, numbers and files. A subclass of SB3's keeps its own methods.
    """
    while isinstance(env, sb3.VecEnvWrapper):
        if type(env) is sb3.VecNormalize:
            env.__class__ = VecNormalize
        env = env.venv
    if type(env) is sb3.SubprocVecEnv:
        env.__class__ = SubprocVecEnv
        env.watch()  # type: ignore[attr-defined]

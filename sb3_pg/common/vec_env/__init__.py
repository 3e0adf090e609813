"""SB3's DummyVecEnv, VecNormalize and SubprocVecEnv with the same results, less overhead and clearer errors.

SB3 deep-copies observations and infos at every step, and keeps its running statistics with functions made for
large arrays. For small observations that costs as much as the simulation itself. These subclasses give the same
numbers, are instances of SB3's classes and read and write the same files. The VecNormalize and SubprocVecEnv of an
environment that is given to one of our algorithms become ours.
"""

from stable_baselines3.common import vec_env as sb3

from sb3_pg.common.vec_env.dummy import DummyVecEnv
from sb3_pg.common.vec_env.normalize import VecNormalize
from sb3_pg.common.vec_env.subproc import SubprocVecEnv

__all__ = ["DummyVecEnv", "SubprocVecEnv", "VecNormalize"]


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

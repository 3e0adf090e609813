"""Vectorised environments: SB3's with less overhead, and gymnasium's and EnvPool's as SB3's.

SB3 deep-copies observations and infos at every step, and keeps its running statistics with functions made for
large arrays. For small observations that costs as much as the simulation itself. DummyVecEnv and VecNormalize give the
same numbers, are instances of SB3's classes and read and write the same files. The VecNormalize of an environment that
is given to one of our algorithms becomes ours.

:func:`as_vec_env` makes a VecEnv of a ``gymnasium.vector.VectorEnv`` or of what ``envpool.make`` returns; the
algorithms take these as they are.
"""

from sb3_pg.common.vec_env.adapters import as_vec_env
from sb3_pg.common.vec_env.dummy import DummyVecEnv
from sb3_pg.common.vec_env.envpool import EnvPoolVecEnv
from sb3_pg.common.vec_env.gymnasium_vector import GymnasiumVecEnv
from sb3_pg.common.vec_env.normalize import VecNormalize

__all__ = ["DummyVecEnv", "EnvPoolVecEnv", "GymnasiumVecEnv", "VecNormalize", "as_vec_env"]

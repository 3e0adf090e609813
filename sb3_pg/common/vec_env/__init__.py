"""SB3's DummyVecEnv and VecNormalize with the same results and less overhead.

SB3 deep-copies observations and infos at every step, and keeps its running statistics with functions made for
large arrays. For small observations that costs as much as the simulation itself. These subclasses give the same
numbers, are instances of SB3's classes and read and write the same files. The VecNormalize of an environment that is
given to one of our algorithms becomes ours.
"""

from sb3_pg.common.vec_env.dummy import DummyVecEnv
from sb3_pg.common.vec_env.normalize import VecNormalize

__all__ = ["DummyVecEnv", "VecNormalize"]

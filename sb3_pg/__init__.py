"""REINFORCE, TRPO and PPO for Stable-Baselines3: one family with one design."""

from sb3_pg import text  # registers its environments and imports nothing else
from sb3_pg.ppo import PPO
from sb3_pg.reinforce import REINFORCE
from sb3_pg.trpo import TRPO

__version__ = "0.1.0"

__all__ = ["PPO", "REINFORCE", "TRPO", "__version__", "text"]

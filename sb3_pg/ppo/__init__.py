"""Proximal policy optimization (Schulman et al. 2017)."""

from sb3_pg.ppo.policies import CnnPolicy, MlpPolicy, MultiInputPolicy
from sb3_pg.ppo.ppo import PPO

__all__ = ["PPO", "CnnPolicy", "MlpPolicy", "MultiInputPolicy"]

"""Trust region policy optimization (Schulman et al. 2015)."""

from sb3_pg.trpo.policies import CnnPolicy, MlpPolicy, MultiInputPolicy
from sb3_pg.trpo.trpo import TRPO

__all__ = ["TRPO", "CnnPolicy", "MlpPolicy", "MultiInputPolicy"]

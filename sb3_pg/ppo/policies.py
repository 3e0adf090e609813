"""The names under which SB3 users know the policies; they are SB3's own classes, so archives cross over."""

from stable_baselines3.common.policies import ActorCriticCnnPolicy as CnnPolicy
from stable_baselines3.common.policies import ActorCriticPolicy as MlpPolicy
from stable_baselines3.common.policies import MultiInputActorCriticPolicy as MultiInputPolicy

__all__ = ["CnnPolicy", "MlpPolicy", "MultiInputPolicy"]

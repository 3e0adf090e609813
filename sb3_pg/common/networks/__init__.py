"""Two implementations of one protocol: any torch policy, and SB3's MlpPolicy in closed form."""

from stable_baselines3.common.policies import ActorCriticPolicy

from sb3_pg.common.networks.autograd import AutogradNetwork
from sb3_pg.common.networks.protocol import Fisher, Network

__all__ = ["AutogradNetwork", "Fisher", "Network", "make_network"]


def make_network(policy: ActorCriticPolicy) -> Network:
    """The fastest network that computes exactly what ``policy`` does."""
    return AutogradNetwork(policy)

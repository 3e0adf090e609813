"""Two implementations of one protocol: any torch policy, and SB3's MlpPolicy in closed form.

A policy may bring a third, as language models do.
"""

from collections.abc import Callable

from stable_baselines3.common.policies import ActorCriticPolicy

from sb3_pg.common.networks.autograd import AutogradNetwork
from sb3_pg.common.networks.blueprint import Unsuitable
from sb3_pg.common.networks.closed_form import ClosedFormNetwork
from sb3_pg.common.networks.protocol import Fisher, Network

__all__ = ["AutogradNetwork", "ClosedFormNetwork", "Fisher", "Network", "make_network"]


def make_network(policy: ActorCriticPolicy, engine: str = "auto") -> Network:
    """The fastest network that computes exactly what ``policy`` does.

    :param policy: any ActorCriticPolicy; one with a method ``make_network`` is asked for its own
    :param engine: "autograd" always takes torch's
    """
    if engine == "autograd":
        return AutogradNetwork(policy, "engine='autograd'")
    make: Callable[[], Network] | None = getattr(policy, "make_network", None)
    if make is not None:
        return make()
    try:
        return ClosedFormNetwork(policy)
    except Unsuitable as reason:
        return AutogradNetwork(policy, str(reason))

"""Small models of the three algorithms for tests that ask the same of all of them."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from torch.nn.utils import parameters_to_vector

from sb3_pg import PPO, REINFORCE, TRPO

ALGORITHMS = [PPO, TRPO, REINFORCE]
ALL = pytest.mark.parametrize("algorithm", ALGORITHMS)

#: An update has 16 steps of each environment, REINFORCE's four episodes of each of two.
OPTIONS: dict[Any, dict[str, Any]] = {
    PPO: {"n_steps": 16, "batch_size": 16, "n_epochs": 2},
    TRPO: {"n_steps": 16, "batch_size": 16, "n_critic_updates": 2, "cg_max_steps": 3},
    REINFORCE: {"n_episodes": 4, "n_critic_updates": 1},
}

#: Arguments of policies that choose the distribution of Box actions.
BOX_OPTIONS: dict[str, dict[str, Any]] = {
    "squashed": {"distribution": "squashed_gaussian"},
    "beta": {"distribution": "beta", "deterministic_action": "mean"},
    "state_dependent": {"state_dependent_std": True},
    "bounded": {"log_std_bounds": (-1.0, 1.0)},
    "squashed_state_dependent": {
        "distribution": "squashed_gaussian",
        "state_dependent_std": True,
        "log_std_bounds": (-3, 1),
        "deterministic_action": "mean",
    },
}


def tiny(algorithm: Any, env: Any, policy: Any = "MlpPolicy", **options: Any) -> Any:
    """A model that learns in milliseconds."""
    policy_kwargs = {"net_arch": [8], **options.pop("policy_kwargs", {})}
    options = {**OPTIONS[algorithm], "seed": 0, "device": "cpu", **options}
    return algorithm(policy, env, policy_kwargs=policy_kwargs, **options)


class OwnGet(RolloutBuffer):
    """Gives out samples in its own way."""

    def get(self, batch_size: int | None = None) -> Any:
        yield from super().get(batch_size)


class AtRolloutEnd(BaseCallback):
    """Calls a function with the model whenever a rollout is complete and judged, before the update."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        super().__init__()
        self.function = function

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        self.function(self.model)


def weights(model: Any) -> np.ndarray:
    """All parameters of a model or a policy as one vector of its own."""
    policy = getattr(model, "policy", model)
    vector: np.ndarray = parameters_to_vector(policy.parameters()).detach().numpy().copy()
    return vector

"""Default arguments of the algorithms for language models."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sb3_pg.common.presets import Preset

#: Arguments that ask for a value network, or for rollouts that are not of whole responses.
_OF_VALUES = ("n_steps", "gae_lambda", "vf_coef", "clip_range_vf", "critic_batch_size", "n_critic_updates")

#: Learning rates. A new model has everything to learn, a pretrained one much to lose; an adapter is small and begins at
#: zero (Schulman et al. 2025, "LoRA without regret", find ten times the rate of all weights).
RATES = {"a new model": 3e-4, "a pretrained model": 1e-5, "a pretrained model with LoRA": 1e-4}

#: Whole responses, compared with one another: no value network to be trained first (Ahmadian et al. 2024).
_COMPARED: dict[str, Any] = {"n_episodes": 64, "baseline": "leave_one_out", "gamma": 1.0}

ARGUMENTS: dict[str, dict[str, Any]] = {
    "REINFORCE": _COMPARED,
    "PPO": {**_COMPARED, "batch_size": 1024, "n_epochs": 2},
    "TRPO": {**_COMPARED, "batch_size": 1024, "cg_max_steps": 10, "sub_sampling_factor": 4},
}


def preset_of(algorithm: str, policy_kwargs: Mapping[str, Any]) -> Preset:
    """Return the default arguments for a language model.

    :param algorithm: "REINFORCE", "TRPO" or "PPO"
    :param policy_kwargs: of the policy
    """
    kind = "a new model"
    if isinstance(policy_kwargs.get("model"), str | Path):
        kind = "a pretrained model with LoRA" if policy_kwargs.get("lora") else "a pretrained model"
    rate = {} if algorithm == "TRPO" else {"learning_rate": RATES[kind]}  # TRPO's is the value network's
    return Preset(kind, {**rate, **ARGUMENTS[algorithm]}, {"n_episodes": ("n_steps",), "baseline": _OF_VALUES})

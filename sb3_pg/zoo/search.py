"""What ``--optimize`` tries: a search space for each algorithm, and how its values become arguments."""

from collections.abc import Callable
from typing import Any

import optuna
from rl_zoo3.hyperparams_opt import convert_onpolicy_params

Sampler = Callable[[optuna.Trial, int, int, dict[str, Any]], dict[str, Any]]


def suggest_common(trial: optuna.Trial) -> None:
    """Suggest the arguments that the three have in common."""
    trial.suggest_float("one_minus_gamma", 1e-4, 0.03, log=True)
    trial.suggest_float("one_minus_gae_lambda", 1e-4, 0.1, log=True)
    trial.suggest_categorical("net_arch", ["small", "medium"])
    trial.suggest_categorical("activation_fn", ["tanh", "relu"])


def arguments_of(trial: optuna.Trial) -> dict[str, Any]:
    """Return the arguments that the suggested values stand for; those under another name are noted in the study."""
    arguments: dict[str, Any] = convert_onpolicy_params(trial.params)
    for name, value in arguments.items():
        if name not in trial.params and name != "policy_kwargs":
            trial.set_user_attr(name, value)
    return arguments


def sample_reinforce(trial: optuna.Trial, n_actions: int, n_envs: int, more: dict[str, Any]) -> dict[str, Any]:
    """Suggest arguments of REINFORCE, for whole episodes; a configuration's own ``n_steps`` still holds."""
    suggest_common(trial)
    trial.suggest_categorical("n_episodes", [2, 4, 8, 16, 32])
    trial.suggest_float("learning_rate", 1e-4, 2e-2, log=True)
    trial.suggest_categorical("batch_size", [None, 16, 64, 256])
    trial.suggest_int("n_critic_updates", 0, 20)
    trial.suggest_float("ent_coef", 1e-8, 0.1, log=True)
    trial.suggest_float("max_grad_norm", 0.3, 5.0, log=True)
    return arguments_of(trial)


def sample_trpo(trial: optuna.Trial, n_actions: int, n_envs: int, more: dict[str, Any]) -> dict[str, Any]:
    """Suggest arguments of TRPO. The trust region grows with the action dimensions, over which the KL is summed."""
    suggest_common(trial)
    dimensions = max(n_actions, 1)  # 0 stands for discrete actions
    trial.suggest_float("target_kl", 1e-3 * dimensions, 0.05 * dimensions, log=True)
    trial.suggest_float("cg_damping", 1e-3 * dimensions, 0.1 * dimensions, log=True)
    trial.suggest_int("cg_max_steps", 5, 30)
    trial.suggest_int("n_steps_pow", 7, 12)
    trial.suggest_int("batch_size_pow", 5, 9)
    trial.suggest_int("n_critic_updates", 5, 30)
    trial.suggest_float("learning_rate", 1e-4, 5e-3, log=True)
    return arguments_of(trial)


def sample_ppo(trial: optuna.Trial, n_actions: int, n_envs: int, more: dict[str, Any]) -> dict[str, Any]:
    """Suggest arguments of PPO, for clip and SPO alike."""
    suggest_common(trial)
    trial.suggest_categorical("objective", ["clip", "spo"])
    trial.suggest_categorical("clip_range", [0.1, 0.2, 0.3, 0.4])
    trial.suggest_categorical("normalize_advantage", [True, "batch"])
    trial.suggest_int("n_steps_pow", 5, 12)
    trial.suggest_int("batch_size_pow", 5, 10)
    trial.suggest_categorical("n_epochs", [1, 5, 10, 20])
    trial.suggest_float("learning_rate", 1e-5, 2e-3, log=True)
    trial.suggest_float("ent_coef", 1e-8, 0.1, log=True)
    trial.suggest_float("max_grad_norm", 0.3, 2.0)
    return arguments_of(trial)


SAMPLERS: dict[str, Sampler] = {"reinforce": sample_reinforce, "trpo": sample_trpo, "ppo": sample_ppo}

#: From a trial's values to arguments, for ``--trial-id``.
CONVERTERS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = dict.fromkeys(SAMPLERS, convert_onpolicy_params)

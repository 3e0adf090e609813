"""The arguments that all algorithms have: what cannot work."""

import inspect
import math
import warnings
from collections.abc import Mapping
from os import PathLike
from typing import TYPE_CHECKING, Any

from stable_baselines3.common import buffers as sb3_buffers
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.utils import get_device

from sb3_pg.common.advantages import BASELINES, SAME_START, SCALES, require_several
from sb3_pg.common.batch import AVERAGES, has_own_get
from sb3_pg.common.buffers import RolloutBuffer
from sb3_pg.common.errors import (
    LAST_SEED,
    ArgumentError,
    as_number,
    check_choice,
    check_count,
    check_number,
    check_parameters,
    evaluate_schedule,
    is_whole,
)
from sb3_pg.common.registry import ENGINE_PLACES, entered_for, has_memory

if TYPE_CHECKING:
    from sb3_pg.common.policy_gradient import PolicyGradientAlgorithm


def check_common(model: "PolicyGradientAlgorithm") -> None:
    """Refuse arguments that cannot work.

    :raises ArgumentError: naming the argument, its value and what is allowed
    """
    for name in ("learning_rate", "ent_coef", "vf_coef"):
        check_number(name, getattr(model, name), or_schedule=True)
    evaluate_schedule("learning_rate", model.learning_rate, 1.0)
    check_number("gamma", model.gamma, high=1.0)
    check_number("gae_lambda", model.gae_lambda, high=1.0)
    _check_max_grad_norm(model.max_grad_norm)
    _check_critic(model)
    if model.sequence_length is not None:
        check_count("sequence_length", model.sequence_length)
        if not has_memory(model.policy_class):
            raise ArgumentError(
                f"`sequence_length={model.sequence_length}` is for policies with a memory, such as 'MlpLstmPolicy', "
                f"but {model.policy_class.__name__} has none. Leave it out."
            )
    if model.seed is not None and (not is_whole(model.seed) or not 0 <= model.seed <= LAST_SEED):
        raise ArgumentError(f"`seed` must be a whole number from 0 to {LAST_SEED}, or None, not {model.seed!r}.")
    check_count("sde_sample_freq", model.sde_sample_freq, low=-1)
    check_choice("use_masking", model.use_masking, (True, False))
    check_choice("engine", model.engine, ("auto", "autograd"))
    _check_baseline(model)
    _check_average(model)
    if model._learns_from_episodes:
        _check_buffer_of_episodes(model.rollout_buffer_class)


def check_base_arguments(arguments: Mapping[str, Any]) -> None:
    """Refuse arguments of SB3's constructor that it takes without a look and fails on later.

    :param arguments: those that are given
    :raises ArgumentError: naming the argument and its value
    """
    check_count("stats_window_size", arguments.get("stats_window_size", 100))
    verbose = arguments.get("verbose", 0)
    check_count("verbose", int(verbose) if isinstance(verbose, bool) else verbose, low=0)
    folder, kind = arguments.get("tensorboard_log"), arguments.get("rollout_buffer_class")
    if not isinstance(folder, str | PathLike | None):
        raise ArgumentError(f"`tensorboard_log` must be a folder or None, not {folder!r}.")
    if kind is not None and not (isinstance(kind, type) and issubclass(kind, sb3_buffers.RolloutBuffer)):
        raise ArgumentError(f"`rollout_buffer_class` must be a subclass of SB3's RolloutBuffer or None, not {kind!r}.")
    if not isinstance(arguments.get("rollout_buffer_kwargs"), dict | None):
        its = arguments["rollout_buffer_kwargs"]
        raise ArgumentError(f"`rollout_buffer_kwargs` must be a dictionary or None, not {its!r}.")


def check_callback(callback: Any) -> None:
    """Refuse what ``learn`` cannot call.

    :raises ArgumentError: naming it
    """
    if isinstance(callback, list):
        for its in callback:
            if not isinstance(its, BaseCallback):
                raise ArgumentError(
                    f"`callback` has {its!r} in its list, which must be callbacks of SB3. A function goes into "
                    "ConvertCallback(function), a list into CallbackList(list)."
                )
    elif callback is not None and not isinstance(callback, BaseCallback) and not callable(callback):
        raise ArgumentError(
            f"`callback` must be a callback of SB3, a list of them, a function or None, not {callback!r}."
        )


def check_starts(model: "PolicyGradientAlgorithm") -> None:
    """Refuse observations by which nobody can tell which episodes began alike, where a baseline asks for that.

    :raises ArgumentError: says what to do
    """
    env = model.get_vec_normalize_env()
    if model.baseline in SAME_START and env is not None and env.norm_obs and env.training:
        raise ArgumentError(
            f"`baseline={model.baseline!r}` compares episodes that began with the same observation, but VecNormalize "
            "changes observations as it learns their mean. Use VecNormalize(env, norm_obs=False), or set its training "
            "to False."
        )


def check_device(device: Any) -> None:
    """Refuse what torch knows no device of the name for.

    :raises ArgumentError: naming it
    """
    try:
        get_device(device)
    except (RuntimeError, TypeError) as error:
        raise ArgumentError(
            f"`device` must be 'auto' or one of torch's such as 'cpu', 'cuda' and 'cuda:0', not {device!r}."
        ) from error


def _check_max_grad_norm(max_grad_norm: Any) -> None:
    is_pair = isinstance(max_grad_norm, tuple | list)
    if is_pair and len(max_grad_norm) != 2:
        raise ArgumentError(
            f"`max_grad_norm` must be a number, None, or a pair of them, for the actor and for the critic, not "
            f"{max_grad_norm!r}."
        )
    for limit in max_grad_norm if is_pair else [max_grad_norm]:
        if limit is not None:
            check_number("max_grad_norm", limit)


def _check_critic(model: "PolicyGradientAlgorithm") -> None:
    """Check what the critic has of its own in the optimizer."""
    rate, kwargs = model.critic_learning_rate, model.critic_optimizer_kwargs
    if not isinstance(kwargs, dict | None):
        raise ArgumentError(f"`critic_optimizer_kwargs` must be a dictionary or None, not {kwargs!r}.")
    if rate is not None:
        check_number("critic_learning_rate", rate, or_schedule=True)
        evaluate_schedule("critic_learning_rate", rate, 1.0)
    for name, value in {"critic_learning_rate": rate, "critic_optimizer_kwargs": kwargs}.items():
        if value is not None and model.baseline != "value":
            raise ArgumentError(
                f"`{name}={value!r}` needs the value network, but baseline={model.baseline!r} has none. Leave it out."
            )


def check_learning(total_timesteps: Any, log_interval: Any) -> None:
    """Refuse arguments of ``learn`` that cannot work.

    :raises ArgumentError: naming the argument, its value and what is allowed
    """
    if as_number(total_timesteps) != math.inf:  # until a callback stops it
        check_number("total_timesteps", total_timesteps)
    if log_interval is not None:
        check_count("log_interval", log_interval)


def _check_baseline(model: "PolicyGradientAlgorithm") -> None:
    for name in ("n_episodes", "max_episode_steps"):
        if getattr(model, name) is not None:
            check_count(name, getattr(model, name))
    check_number("ema_decay", model.ema_decay)
    if not model.ema_decay < 1:
        raise ArgumentError(f"`ema_decay` must be below 1, not {model.ema_decay!r}: the average would never move.")
    if callable(model.baseline):
        check_parameters("baseline", model.baseline, "observations", "returns")
    else:
        check_choice("baseline", model.baseline, BASELINES)
    compares = model.baseline not in ("value", "ema", None) and not callable(model.baseline)
    if compares and model.n_episodes is not None and model.env is not None:
        require_several(str(model.baseline), model._episodes_per_env * model.n_envs)

    check_choice("scale_rewards", model.scale_rewards, SCALES)
    if model.scale_rewards != "group" and model.baseline != "group":
        raise ArgumentError(
            f"`scale_rewards={model.scale_rewards!r}` says what differences of baseline='group' are divided by, but "
            f"baseline={model.baseline!r} divides by nothing. Use baseline='group', or leave out scale_rewards."
        )


def _check_average(model: "PolicyGradientAlgorithm") -> None:
    average = model.loss_average
    if isinstance(average, str) or average is None:
        if average not in AVERAGES:
            raise ArgumentError(
                f"`loss_average` must be one of {', '.join(map(repr, AVERAGES))} or a length, a whole number, not "
                f"{average!r}."
            )
    else:
        check_count("loss_average", average)
    if average != "step":
        require_usual_get(f"loss_average={average!r}", model.rollout_buffer_class)


def require_usual_get(
    argument: str, kind: type[sb3_buffers.RolloutBuffer] | None, needs: str = "which samples are of one sequence"
) -> None:
    """Refuse an argument about all samples together with a class of buffers that gives them out in its own way.

    :param needs: what is to be known of them
    :raises ArgumentError: it has a ``get`` of its own
    """
    if kind is not None and has_own_get(kind):
        raise ArgumentError(
            f"`{argument}` needs to know {needs}, which `rollout_buffer_class={kind.__name__}` with a `get` of its own "
            "does not tell. Leave one of them out."
        )


def check_normalization(model: "PolicyGradientAlgorithm", *choices: bool | str) -> None:
    """Refuse ways of normalising advantages that there are not, or not with the buffer.

    :param choices: those that the algorithm knows
    :raises ArgumentError: it is none of them, or needs the whole rollout and the buffer has a ``get`` of its own
    """
    how = model.normalize_advantage
    check_choice("normalize_advantage", how, choices)
    if how in ("batch", "running"):
        needs = "the advantages of the whole rollout"
        require_usual_get(f"normalize_advantage={how!r}", model.rollout_buffer_class, needs)


def _check_buffer_of_episodes(kind: type[sb3_buffers.RolloutBuffer] | None) -> None:
    if kind in (None, sb3_buffers.RolloutBuffer, sb3_buffers.DictRolloutBuffer):
        return
    if not issubclass(kind, RolloutBuffer):
        raise ArgumentError(
            f"`rollout_buffer_class={kind.__name__}` has a fixed length, but whole "
            "episodes differ in theirs. Derive it from sb3_pg.common.buffers.RolloutBuffer, or pass n_steps."
        )
    if has_own_get(kind):
        raise ArgumentError(
            f"`rollout_buffer_class={kind.__name__}` has a `get` of its own, which does not know "
            "which samples belong to whole episodes. Pass n_steps and baseline='value'."
        )


def check_rollout_size(model: "PolicyGradientAlgorithm", batch_size: int) -> None:
    """Check rollouts of fixed length; like SB3 warn when an epoch's last minibatch is smaller than the others.

    Policies with an engine of their own have minibatches of whole sequences, whose sizes differ anyway.

    :raises ArgumentError: there is one sample, whose advantage cannot be normalised
    """
    if model._learns_from_episodes:
        return
    rollout_size = model.n_steps * model.n_envs
    if model.normalize_advantage and rollout_size < 2:
        raise ArgumentError(
            "`n_steps * n_envs` must be greater than 1 to normalise advantages. Currently "
            f"n_steps={model.n_steps} and n_envs={model.n_envs}; raise one or pass normalize_advantage=False."
        )
    if rollout_size % batch_size and entered_for(model.policy_class, ENGINE_PLACES) is None:
        whole = rollout_size // batch_size
        warnings.warn(
            f"You have specified a mini-batch size of {batch_size}, but the rollout has n_steps * n_envs = "
            f"{rollout_size} samples: after every {whole} untruncated mini-batches, there will be a truncated "
            f"mini-batch of size {rollout_size % batch_size}. We recommend a `batch_size` that divides "
            f"n_steps * n_envs (n_steps={model.n_steps} and n_envs={model.n_envs}).",
            stacklevel=_outside(),
        )


def _outside() -> int:
    """Return the ``stacklevel`` at which a warning of the caller's names the line outside of this package."""
    level, frame = 1, inspect.currentframe()
    frame = frame and frame.f_back
    while frame is not None and frame.f_globals["__name__"].split(".")[0] == __name__.split(".")[0]:
        level, frame = level + 1, frame.f_back
    return level

"""PPO's arguments: what cannot work, and the objective that they make."""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from sb3_pg.common.arrays import Array, namespace
from sb3_pg.common.batch import Batch
from sb3_pg.common.errors import (
    ArgumentError,
    PolicyError,
    check_choice,
    check_count,
    check_number,
    check_parameters,
    evaluate_schedule,
    without_wrappers,
)
from sb3_pg.common.objectives import (
    clipped_surrogate,
    kl_penalty,
    sequence_means,
    simple_policy_optimization,
    surrogate,
)
from sb3_pg.common.options import check_normalization, check_rollout_size, require_usual_get

if TYPE_CHECKING:
    from sb3_pg.ppo.ppo import PPO

#: (log_ratio, advantage) to (loss, d loss / d log_prob), arrays of shape (n,)
Objective = Callable[[Array, Array], tuple[Array, Array]]

#: (log_ratio, minibatch) to the same
BatchObjective = Callable[[Array, Batch], tuple[Array, Array]]


def make_objective(ppo: "PPO", kl_coef: float) -> BatchObjective:
    """Return the objective with the coefficients of this update, on a minibatch."""
    objective = _of_ratio(ppo)

    def by_step(log_ratio: Array, batch: Batch) -> tuple[Array, Array]:
        return objective(log_ratio, batch.advantages)

    def by_sequence(log_ratio: Array, batch: Batch) -> tuple[Array, Array]:
        assert batch.sequences is not None
        loss, derivative = objective(sequence_means(log_ratio, batch.sequences), batch.advantages)
        return loss, sequence_means(derivative, batch.sequences)

    chosen = by_sequence if ppo.ratio == "sequence" else by_step
    return chosen if kl_coef == 0.0 else _with_kl_penalty(chosen, kl_coef)


def clip_ranges(ppo: "PPO") -> tuple[float, float]:
    """Return how far the ratio may be below one, and how far above it, before it is clipped."""
    low = ppo._coefficient("clip_range")
    return low, low if ppo.clip_range_high is None else ppo._coefficient("clip_range_high")


def _of_ratio(ppo: "PPO") -> Objective:
    low, high = clip_ranges(ppo)
    objective: Objective
    if callable(ppo.objective):
        objective = _checked(ppo.objective)
    elif ppo.objective == "spo":
        objective = partial(simple_policy_optimization, epsilon=low)
    elif ppo.objective == "surrogate":
        objective = surrogate
    else:
        objective = partial(clipped_surrogate, low=low, high=high, dual_clip=ppo.dual_clip)
    return objective


def _checked(objective: Callable[..., Any]) -> Objective:
    """Return the user's objective, whose answers are looked at."""

    def checked(log_ratio: Array, advantage: Array) -> tuple[Array, Array]:
        found = objective(log_ratio, advantage)
        answers = found if isinstance(found, tuple | list) else [found]
        if len(answers) != 2 or any(type(x) is not type(log_ratio) or x.shape != log_ratio.shape for x in answers):
            shown = [f"{type(x).__name__} {getattr(x, 'shape', '')}" for x in answers]
            raise ArgumentError(
                "`objective` must return (loss, derivative of the loss by the log-probability), each a "
                f"{type(log_ratio)} of shape ({len(log_ratio)},), one number for each sample, not {shown}."
            )
        loss, derivative = found
        if not namespace(derivative).isfinite(derivative).all():
            raise PolicyError("The derivative that `objective` has returned is not finite.")
        return loss, derivative

    return checked


def _with_kl_penalty(objective: BatchObjective, kl_coef: float) -> BatchObjective:
    def penalised(log_ratio: Array, batch: Batch) -> tuple[Array, Array]:
        loss, derivative = objective(log_ratio, batch)
        penalty, d_penalty = kl_penalty(log_ratio)
        return loss + kl_coef * penalty, derivative + kl_coef * d_penalty

    return penalised


def learns_from_advantages_alone(ppo: "PPO", kl_coef: float, ent_coef: float) -> bool:
    """Return whether samples whose advantages are zero have no part in the update but that of being counted."""
    watches_kl = ppo.target_kl is not None or ppo.adaptive_lr or kl_coef
    return not (callable(ppo.objective) or ppo.baseline == "value" or watches_kl or ent_coef)


def check_arguments(ppo: "PPO") -> None:
    """Refuse arguments that cannot work.

    :raises ArgumentError: naming the argument, its value and what is allowed
    """
    for name in ("n_steps", "batch_size", "n_epochs"):
        check_count(name, getattr(ppo, name))
    check_number("clip_range", ppo.clip_range, above_low=True, or_schedule=True)
    for name in ("clip_range_vf", "clip_range_high", "target_kl"):
        if getattr(ppo, name) is not None:
            check_number(name, getattr(ppo, name), above_low=True, or_schedule=True)
    if ppo.dual_clip is not None:
        check_number("dual_clip", ppo.dual_clip, low=1.0, above_low=True)
    check_number("kl_coef", ppo.kl_coef, or_schedule=True)
    check_number("desired_kl", ppo.desired_kl, above_low=True)
    check_normalization(ppo, True, False, "minibatch", "batch", "running")
    for name in ("adaptive_lr", "adaptive_kl_coef"):
        check_choice(name, getattr(ppo, name), (True, False))
    if callable(ppo.objective):
        check_parameters("objective", ppo.objective, "log_ratio", "advantage")
    else:
        check_choice("objective", ppo.objective, ("clip", "spo", "surrogate"))
    check_choice("ratio", ppo.ratio, ("step", "sequence"))
    _check_contradictions(ppo)
    if ppo.env is not None:
        _check_rollout_size(ppo)


def _check_contradictions(ppo: "PPO") -> None:
    if ppo.objective != "clip" and (ppo.clip_range_high is not None or ppo.dual_clip is not None):
        raise ArgumentError(
            f"`clip_range_high` and `dual_clip` belong to objective='clip', not {ppo.objective!r}. Leave them out."
        )
    if ppo.ratio == "sequence":
        require_usual_get("ratio='sequence'", ppo.rollout_buffer_class)
    if ppo.ratio == "sequence" and ppo.sequence_length is not None:
        raise ArgumentError(
            f"`ratio='sequence'` needs whole sequences, but `sequence_length={ppo.sequence_length}` cuts them. Leave "
            "one of them out."
        )
    if ppo.adaptive_lr and not is_constant(ppo.learning_rate):
        raise ArgumentError(
            "`adaptive_lr=True` and a schedule for `learning_rate` contradict each other: both set the learning "
            "rate. Pass a number, or adaptive_lr=False."
        )
    if ppo.adaptive_kl_coef and (not is_constant(ppo.kl_coef) or evaluate_schedule("kl_coef", ppo.kl_coef, 1.0) == 0.0):
        raise ArgumentError(
            f"`adaptive_kl_coef=True` needs a number above 0 to start from, not kl_coef={ppo.kl_coef!r}; "
            "the paper uses 1."
        )


def _check_rollout_size(ppo: "PPO") -> None:
    if ppo.normalize_advantage in (True, "minibatch") and ppo.batch_size < 2:
        raise ArgumentError(
            f"`batch_size` must be greater than 1 to normalise advantages in it, not {ppo.batch_size} "
            "(SB3 issue 440). Raise it or pass normalize_advantage='batch' or False."
        )
    check_rollout_size(ppo, ppo.batch_size)


def is_constant(value: Any) -> bool:
    """Return whether a coefficient is a number, perhaps wrapped as SB3 and the zoo wrap constants."""
    return not callable(without_wrappers(value))

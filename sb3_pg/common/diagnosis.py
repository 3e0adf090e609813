"""What is to blame for a number that is not finite, and how to go on after it."""

from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.policies import ActorCriticPolicy

from sb3_pg.common.arrays import Array
from sb3_pg.common.batch import Batch
from sb3_pg.common.engines.protocol import Engine
from sb3_pg.common.errors import NonFiniteError, PolicyError, first_not_finite
from sb3_pg.common.rollout import Rollout


def explain_bad_gradient(engine: Engine, rollout: Rollout, batch: Batch, norm: float) -> PolicyError:
    """Return an error that names the parameters with a non-finite gradient and the sample behind it."""
    blame = _blame(engine.policy)
    if blame:
        return PolicyError(f"The policy cannot be improved: {blame}.")
    parameters = ", ".join(
        name for name, p in engine.policy.named_parameters() if p.grad is not None and not p.grad.isfinite().all()
    )
    evaluation = engine.evaluate(batch)
    log_ratio = None if batch.old_log_prob is None else evaluation.log_prob - batch.old_log_prob
    columns: list[Any] = [evaluation.log_prob, log_ratio, evaluation.value, batch.advantages, batch.returns]
    bad = ~np.all([np.isfinite(_to_numpy(x)) for x in columns if x is not None], axis=0)
    if batch.rows is None:  # of a buffer with samples of its own
        where = f"from sample {bad.argmax()} of a minibatch" if bad.any() else "in a minibatch"
        where += f" that {type(rollout.buffer).__name__}.get gave out"
    else:
        step, env = divmod(int(batch.rows[bad.argmax()]), rollout.n_envs)
        where = f"environment {env} at step {step} of this rollout"
        where = f"from {where}" if bad.any() else f"in the minibatch that begins with {where}"
    return PolicyError(
        f"The gradient of {parameters or 'the parameters'} is not finite (norm {norm}): {where}. Lower "
        "`learning_rate`, clip gradients (`max_grad_norm`), or bring rewards and observations to a usual scale "
        "(VecNormalize)."
    )


def _to_numpy(x: Array) -> np.ndarray:
    return x.detach().cpu().numpy() if isinstance(x, th.Tensor) else np.asarray(x)


def require_sound_policy(policy: ActorCriticPolicy, what: str, x: Any, first_step: int = 0) -> None:
    """Check what a policy has answered to observations that are finite, (n_steps, n_envs, ...).

    :param what: the answers, for the message
    :param first_step: number of the array's first row in the rollout, for the message
    :raises PolicyError: one is not finite; names the parameters that are to blame
    """
    found = first_not_finite(x)
    if found is not None:
        raise PolicyError(
            f"The policy's {what} for environment {found[1]} at step {found[0] + first_step} of this rollout is not "
            f"finite ({x[found]}): {_blame(policy) or 'its parameters are finite, so look at its own code'}."
        )


def explained(error: Exception, policy: ActorCriticPolicy) -> Exception:
    """Return an error that names the policy's parameters if they explain another one, which else is returned."""
    blame = "" if isinstance(error, NonFiniteError) else _blame(policy)
    return PolicyError(f"The policy could not be computed: {blame}.") if blame else error


def _blame(policy: ActorCriticPolicy) -> str:
    """Return what is wrong with a policy's parameters; nothing if they are fine."""
    names = [name for name, p in policy.named_parameters() if not p.isfinite().all()]
    if names:
        return f"its parameters {', '.join(names)} are not finite"
    log_std = dict(policy.named_parameters()).get("log_std")
    if log_std is not None and not log_std.exp().isfinite().all():
        return f"its standard deviation, the exponential of log_std (up to {log_std.max().item():g}), overflows"
    return ""


class LastGood:
    """A policy's parameters as they were when a rollout had turned out well.

    :param policy: whose trained parameters are kept; not of more than ``_KEPT_NUMBERS``, for their memory
    """

    _KEPT_NUMBERS = 1 << 24

    def __init__(self, policy: ActorCriticPolicy) -> None:
        self._policy: ActorCriticPolicy | None = None
        self._kept: list[th.Tensor] = []
        if not _blame(policy):
            self.keep(policy)

    @th.no_grad()
    def keep(self, policy: ActorCriticPolicy) -> None:
        """Remember the present parameters as good."""
        present = self._numbers_of(policy)
        if policy is self._policy and [x.shape for x in self._kept] == [x.shape for x in present]:
            if present:
                th._foreach_copy_(self._kept, present)
        else:
            self._policy, self._kept = policy, [x.detach().clone() for x in present]

    @th.no_grad()
    def restore(self, policy: ActorCriticPolicy) -> str:
        """Return to the good ones, and say so, or say what to do."""
        present = self._numbers_of(policy)
        fits = policy is self._policy and [x.shape for x in self._kept] == [x.shape for x in present]
        if fits and present:
            th._foreach_copy_(present, self._kept)
        if _blame(policy):
            return "There are no earlier good ones: load an archive, or mend the policy before learning goes on."
        if not (fits and present):
            return "The policy's parameters are finite and can be saved."
        return "The policy keeps its last good parameters and can be saved."

    def _numbers_of(self, policy: ActorCriticPolicy) -> list[th.Tensor]:
        numbers = [*(p for p in policy.parameters() if p.requires_grad), *policy.buffers()]
        return numbers if sum(x.numel() for x in numbers) <= self._KEPT_NUMBERS else []

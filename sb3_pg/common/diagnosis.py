"""What is to blame for a number that is not finite, and how to go on after it."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import ActorCriticPolicy

from sb3_pg.common.arrays import Array
from sb3_pg.common.batch import Batch
from sb3_pg.common.distributions.box import deviation
from sb3_pg.common.engines.protocol import Engine
from sb3_pg.common.errors import (
    LARGEST,
    ArgumentError,
    EnvironmentNumberError,
    NonFiniteError,
    PolicyError,
    first_not_finite,
)
from sb3_pg.common.groups import has_critic_group
from sb3_pg.common.interrupts import uninterrupted
from sb3_pg.common.rollout import Rollout


def explain_bad_gradient(engine: Engine, rollout: Rollout, batch: Batch, norm: float) -> PolicyError:
    """Return an error that names the parameters with a non-finite gradient and the sample behind it."""
    blame = _blame(engine.policy)
    if blame:
        return PolicyError(_after_step(engine.policy, blame))
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
        raise unsound(policy, what, found[1], found[0] + first_step, x[found])


def unsound(policy: ActorCriticPolicy, what: str, env: int, step: int, value: float) -> PolicyError:
    """Return the error for an answer of the policy that is not finite."""
    return PolicyError(
        f"The policy's {what} for environment {env} at step {step} of this rollout is not "
        f"finite ({value}): {_blame(policy) or 'its parameters are finite, so look at its own code'}."
    )


def require_sound_parameters(policy: ActorCriticPolicy, after_step: bool = False) -> None:
    """Check a policy before it acts, or after an update.

    :param after_step: whether steps of the optimizer have just made the parameters
    :raises PolicyError: a parameter, or the deviation that it stands for, is not finite
    """
    numbers = _numbers_of(policy)
    with th.no_grad():
        std = deviation(policy)
        norms = th._foreach_norm([x for x in numbers if x.is_floating_point()]) if numbers else ()
        if all(map(math.isfinite, map(float, norms))) and (std is None or math.isfinite(std.sum())):
            return
    blame = _blame(policy)
    if blame:
        raise PolicyError(_after_step(policy, blame) if after_step else f"The policy cannot act: {blame}.")


def _after_step(policy: ActorCriticPolicy, blame: str) -> str:
    names = ["learning_rate", "critic_learning_rate"] if has_critic_group(policy.optimizer) else ["learning_rate"]
    groups = zip(names, policy.optimizer.param_groups, strict=False)
    advice = " or ".join(f"`{name}` (now {group['lr']:g})" for name, group in groups)
    return f"After a step of the optimizer {blame}. Lower {advice}."


def explained(error: Exception, policy: ActorCriticPolicy) -> Exception:
    """Return an error that names the policy's parameters if they explain another one, which else is returned."""
    if isinstance(error, EnvironmentNumberError):
        blame = _blame(policy, _DIVERGED)
        return PolicyError(f"The policy has diverged: {blame}. What its actions led to: {error}") if blame else error
    blame = "" if isinstance(error, NonFiniteError) else _blame(policy)
    if blame:
        return PolicyError(f"The policy could not be computed: {blame}.")
    types = {p.dtype for p in policy.parameters()}
    if isinstance(error, RuntimeError) and "dtype" in str(error) and types != {th.float32}:
        return ArgumentError(
            f"The policy's parameters are of {', '.join(map(str, types))}, but SB3 makes float32 of observations "
            f"({error}). Call torch.set_default_dtype(torch.float32) before the policy is made."
        )
    return error


#: A standard deviation above which a policy is to blame for what its actions lead to.
_DIVERGED = 1e6


def _blame(policy: ActorCriticPolicy, largest_deviation: float = LARGEST) -> str:
    """Return what is wrong with a policy's parameters; nothing if they are fine."""
    names = [name for name, p in policy.named_parameters() if not p.isfinite().all()]
    if names:
        return f"its parameters {', '.join(names)} are not finite"
    std = deviation(policy)
    if std is not None and not (std <= largest_deviation).all():
        verb = "overflows" if largest_deviation == LARGEST else "has grown"
        return f"its standard deviation, the exponential of log_std (up to {std.log().max().item():g}), {verb}"
    return ""


class LastGood:
    """What an update changes, as it was when the rollout for the update had turned out well.

    That is the parameters and buffers of the policy, the state of its optimizer, and attributes of the algorithm.

    :param model: the algorithm; of a policy of more than ``_KEPT_NUMBERS`` nothing is kept, for the memory
    :param attributes: names of those that an update changes
    """

    _KEPT_NUMBERS = 1 << 24

    def __init__(self, model: OnPolicyAlgorithm, attributes: Sequence[str]) -> None:
        self._model, self._names = model, attributes
        self._policy: ActorCriticPolicy | None = None  # of which something is kept
        self._copies: list[th.Tensor] = []
        self.keep()

    @th.no_grad()
    def keep(self) -> None:
        """Remember what is there now as good."""
        policy = self._model.policy
        numbers = _numbers_of(policy)
        self._policy = None  # half of it is there from here on
        if sum(x.numel() for x in numbers) > self._KEPT_NUMBERS:
            return
        self._optimizer = policy.optimizer
        self._state = {p: dict(its) for p, its in self._optimizer.state.items()}
        self._groups = [{k: x for k, x in g.items() if k != "params"} for g in self._optimizer.param_groups]
        self._attributes = {name: getattr(self._model, name) for name in self._names}
        self._tensors = [x for its in self._state.values() for x in its.values() if isinstance(x, th.Tensor)]
        present = numbers + self._tensors
        if [x.shape for x in self._copies] != [x.shape for x in present]:
            self._copies = [x.detach().clone() for x in present]
        elif present:
            th._foreach_copy_(self._copies, present)
        self._policy = policy

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Keep what is there now, and return to it if the update in the block fails."""
        require_sound_parameters(self._model.policy)
        self.keep()
        try:
            yield
            require_sound_parameters(self._model.policy, after_step=True)
        except BaseException:
            self.restore()
            raise

    @th.no_grad()
    def restore(self) -> bool:
        """Return to what is kept; False if that is not possible, and nothing was changed."""
        policy = self._model.policy
        numbers, n = _numbers_of(policy), len(self._copies) - len(self._tensors)
        if self._policy is not policy or [x.shape for x in self._copies[:n]] != [x.shape for x in numbers]:
            return False
        with uninterrupted():
            self._model.__dict__.update(self._attributes)
            if policy.optimizer is self._optimizer:
                numbers += self._tensors
                self._optimizer.state.clear()
                self._optimizer.state.update({p: dict(its) for p, its in self._state.items()})
                for group, its in zip(self._optimizer.param_groups, self._groups, strict=False):
                    group.update(its)
            if numbers:
                th._foreach_copy_(numbers, self._copies[: len(numbers)])
        return True

    def returned(self) -> str:
        """Return to what is kept after the policy has failed, and say so, or say what to do."""
        was_restored = self.restore()
        if _blame(self._model.policy):
            return "There are no earlier good ones: load an archive, or mend the policy before learning goes on."
        if not was_restored:
            return "The policy's parameters are finite and can be saved."
        return "The policy keeps its last good parameters and can be saved."


def _numbers_of(policy: ActorCriticPolicy) -> list[th.Tensor]:
    return [*(p for p in policy.parameters() if p.requires_grad), *policy.buffers()]

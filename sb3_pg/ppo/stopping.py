"""Rules that keep PPO's updates at a wanted size: early stopping, and adapted coefficients."""

from sb3_pg.common import workers
from sb3_pg.common.arrays import Array
from sb3_pg.common.batch import Batch
from sb3_pg.common.engines.protocol import Engine
from sb3_pg.common.interrupts import uninterrupted
from sb3_pg.common.objectives import kl_penalty


def adapted_kl_coef(kl_coef: float, kl: float, desired_kl: float) -> float:
    """Return the coefficient by the rule of the paper's second algorithm (Schulman et al. 2017, section 4)."""
    if kl > 1.5 * desired_kl:
        return 2.0 * kl_coef
    return kl_coef / 2.0 if kl < desired_kl / 1.5 else kl_coef


def adapted_learning_rate(learning_rate: float, kl: float, desired_kl: float) -> float:
    """Return the learning rate by the rule of rsl_rl and rl_games: the KL within a factor of two of the desired one."""
    if kl > 2.0 * desired_kl:
        return max(learning_rate / 1.5, 1e-5)
    return min(learning_rate * 1.5, 1e-2) if kl < desired_kl / 2.0 else learning_rate


class EarlyStopping:
    """Stop the policy when the KL of a minibatch exceeds 1.5 ``target_kl``, and take back the step that led there.

    The factor is SB3's. The step is noticed by the next minibatch, so the parameters before each step are kept
    until then; the critic goes on without the policy.

    :param engine: whose actor is watched
    :param batch: the rollout
    :param target_kl: in nats; None never stops and costs nothing
    """

    def __init__(self, engine: Engine, batch: Batch, target_kl: float | None) -> None:
        self._engine = engine
        self._actor = None if target_kl is None else engine.actor(batch)
        self._limit = 0.0 if target_kl is None else 1.5 * target_kl
        self._before_step: Array | None = None
        self.stopped = False

    def allows(self, log_ratio: Array) -> bool:
        """Return whether the policy may take a step on the minibatch with these log-ratios."""
        if self._actor is None or self.stopped:
            return not self.stopped
        if workers.mean(float(kl_penalty(log_ratio)[0].mean()), len(log_ratio)) > self._limit:
            self.stopped = True
            if self._before_step is not None:
                with uninterrupted():
                    self._actor.vector = self._before_step
        else:
            self._before_step = self._actor.vector
        return not self.stopped

    def end(self, minibatch: Batch) -> None:
        """Check the update's last step on its own: it has no next minibatch that could notice it."""
        if self._actor is not None and not self.stopped:
            self.allows(self._engine.evaluate(minibatch).log_prob - minibatch.old_log_prob)

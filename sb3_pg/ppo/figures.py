"""What an update of PPO logs."""

import math
from dataclasses import dataclass

import numpy as np

from sb3_pg.common import workers
from sb3_pg.common.arrays import Array, Column, namespace
from sb3_pg.common.batch import Batch
from sb3_pg.common.figures import Figures, logged
from sb3_pg.common.objectives import kl_penalty, sequence_means

#: The numbers of so many samples are kept before they are summed up.
_KEPT_SAMPLES = 1 << 14


@dataclass
class PPOFigures(Figures):
    """Means are over all minibatches of the update on which the policy took a step; losses by `loss_average`."""

    entropy_loss: float | None = logged("minus the policy's entropy in nats; rises to 0 as it becomes certain")
    policy_gradient_loss: float | None = logged("the objective's loss; near 0, below it where the policy improves")
    value_loss: float | None = logged("squared error of the values, in squared units of the return")
    approx_kl: float = logged(
        "KL(old || new) in nats, estimated from the samples; how far the policy has moved", default=math.nan
    )
    clip_fraction: float | None = logged("share of the samples whose probability ratio has left the clip range")
    loss: float | None = logged("the loss of the last minibatch, without the penalty of a language model's reference")
    clip_range: float | None = logged("the present clip range")
    clip_range_vf: float | None = logged("the present clip range of the values")
    kl_coef: float | None = logged("the weight of the KL penalty in this update")
    early_stop: float | None = logged("1 if the KL has stopped the policy's part of the update, 0 if not")


class Means:
    """Means over all samples of an update, collected minibatch by minibatch.

    :param like: an array with one row for each sample of the rollout
    :param low: ratios further below one than this count as clipped
    :param high: and those further above one than this
    :param by_sequence: these ratios are those of whole sequences
    """

    def __init__(self, like: Array, low: float, high: float, *, by_sequence: bool = False) -> None:
        self.value_loss, self._log_ratio, self._loss, self._entropy = (Column(like[:_KEPT_SAMPLES]) for _ in range(4))
        self._of_sequences = Column(like[:_KEPT_SAMPLES]) if by_sequence else None
        self._low, self._high = low, high
        self._sums = dict.fromkeys(("value_loss", "policy_gradient_loss", "entropy", "approx_kl", "clip_fraction"), 0.0)
        self._shares = dict.fromkeys(self._sums, 0.0)
        self._at_last_end = (0.0, 0.0)

    def add(self, minibatch: Batch, log_ratio: Array, loss: Array, entropy: Array) -> None:
        """Add a minibatch on which the policy takes a step."""
        self._log_ratio.add(log_ratio)
        if self._of_sequences is not None and minibatch.sequences is not None:
            self._of_sequences.add(sequence_means(log_ratio, minibatch.sequences))
        self._loss.add(loss, minibatch.weight, minibatch.share)
        self._entropy.add(entropy)
        if len(self._loss) >= _KEPT_SAMPLES:
            self._sum_up()

    def end_epoch(self) -> float:
        """Return the KL of the steps since the last epoch's end, NaN if the policy took none."""
        self._sum_up()
        kl, n = workers.total([self._sums["approx_kl"], self._shares["approx_kl"]])
        (kl_before, n_before), self._at_last_end = self._at_last_end, (kl, n)
        return (kl - kl_before) / (n - n_before) if n > n_before else math.nan

    def _sum_up(self) -> None:
        log_ratio = self._log_ratio.take()
        kl, _ = kl_penalty(log_ratio)
        clipped = log_ratio if self._of_sequences is None else self._of_sequences.take()
        sums = [column.sums() for column in (self.value_loss, self._loss, self._entropy)]
        sums += [(float(x.sum()), len(x)) for x in (kl, self._outside(clipped))]
        for name, (total, share) in zip(self._sums, sums, strict=True):
            self._sums[name] += total
            self._shares[name] += share

    def figures(self) -> PPOFigures:
        """Return the means over all epochs; NaN where no minibatch contributed."""
        self._sum_up()
        sums, shares = np.split(np.array(workers.total([*self._sums.values(), *self._shares.values()])), 2)
        means = {
            name: x / n if n else math.nan
            for name, x, n in zip(self._sums, sums.tolist(), shares.tolist(), strict=True)
        }
        entropy = means.pop("entropy")
        return PPOFigures(entropy_loss=-entropy, **means)  # type: ignore[arg-type]

    def _outside(self, log_ratio: Array) -> Array:
        xp = namespace(log_ratio)
        change = xp.expm1(log_ratio)
        outside: Array = xp.astype((change > self._high) | (-change > self._low), log_ratio.dtype)
        return outside

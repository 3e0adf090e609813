"""What an update of REINFORCE logs."""

from dataclasses import dataclass

from sb3_pg.common.figures import Figures, logged


@dataclass
class REINFORCEFigures(Figures):
    """What an update of REINFORCE logs."""

    entropy_loss: float | None = logged("minus the policy's entropy in nats; rises to 0 as it becomes certain")
    policy_loss: float | None = logged("mean of -A log pi(a|s); with `batch_size` of -A pi(a|s) / pi_old(a|s)")
    value_loss: float | None = logged("squared error of the values, in squared units of the return")
    samples_used: float | None = logged("share of the steps that belong to the episodes learned from")
    kl_divergence_loss: float | None = logged("KL(old || new) in nats of the update, with `target_kl`")
    step_share: float | None = logged(
        "what `target_kl` has left of the step of the update, 1 if all; small if it was long"
    )

"""What an update of TRPO logs."""

from dataclasses import dataclass

from sb3_pg.common.figures import Figures, logged


@dataclass
class TRPOFigures(Figures):
    """What an update of TRPO logs."""

    policy_step: str | None = logged("whether the step was accepted, or why none was made", exclude="tensorboard")
    is_line_search_success: float | None = logged("1 if a step was accepted, 0 if not")
    policy_objective: float | None = logged("the surrogate E[r A] and entropy bonus after the update")
    kl_divergence_loss: float | None = logged(
        "mean KL(old || new) of the accepted step in nats, by `loss_average`; below target_kl"
    )
    surrogate_improvement: float | None = logged("how much the accepted step has improved the objective")
    surrogate_predicted: float | None = logged("how much it would have if the objective were linear")
    step_length: float | None = logged("Euclidean length of the accepted step of the parameters")
    backtracks: int | None = logged("how often the step was shortened")
    cg_iterations: int | None = logged("iterations of the conjugate-gradient solve")
    cg_residual: float | None = logged("what it has left over, as a fraction of the gradient")
    entropy_loss: float | None = logged("minus the policy's entropy before the update, in nats")
    value_loss: float | None = logged("squared error of the values, in squared units of the return")

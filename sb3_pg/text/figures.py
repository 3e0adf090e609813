"""What is logged of a rollout of texts."""

from dataclasses import dataclass
from typing import ClassVar

from sb3_pg.common.figures import Logged, logged


@dataclass
class TextFigures(Logged):
    """Figures of a rollout of texts: of the responses that ended in it, and of all its tokens."""

    prefix: ClassVar[str] = "text"

    score: float | None = logged("the task's reward of a response, without the penalty")
    response_length: float | None = logged("tokens of a response, its end token included")
    ended: float | None = logged("share of the responses that ended by an end token or stop string, not by length")
    kl: float | None = logged("KL(policy || reference) of a whole response in nats, estimated from the samples")
    kl_coef: float | None = logged("weight of the penalty for this KL; changes if `reference_kl_target` adapts it")
    reference_perplexity: float | None = logged(
        "perplexity of the responses under the reference; larger where the model says what the reference finds unlikely"
    )
    penalised_reward: float | None = logged("what is maximised: the score less the weighted KL")

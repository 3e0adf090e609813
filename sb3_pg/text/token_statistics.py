"""What a language model's logits say of tokens, and the gradient of that."""

from typing import Any

import torch as th
from torch.autograd.function import once_differentiable


class TokenStatistics(th.autograd.Function):
    """The log-probability of a token, and the entropy, at each row of logits.

    The graph keeps one array of the logits' size. By torch's operations it would keep three, and where logits are
    computed again for the gradient (checkpoints), those of an entropy whose gradient nobody asks for would stay until
    all gradients have been made: 0.6 MB for each token, with a vocabulary of 50,000.
    """

    @staticmethod
    def forward(ctx: Any, logits: th.Tensor, chosen: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """Return log pi(a|s) and the entropy in nats, (n,) each.

        :param logits: (n, n_tokens), finite
        :param chosen: the tokens a, (n,)
        """
        log_probs = th.log_softmax(logits, dim=-1)
        entropy = -(log_probs.exp() * log_probs).sum(dim=-1)
        ctx.save_for_backward(log_probs, chosen, entropy)
        ctx.set_materialize_grads(False)
        return log_probs.gather(1, chosen[:, None])[:, 0], entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_log_prob: th.Tensor | None, d_entropy: th.Tensor | None) -> tuple[th.Tensor | None, None]:
        """Return the derivative of the loss by the logits z, from those by log-probability and entropy H.

        d log p_a / dz = 1_a - p, and dH / dz = -p (log p + H).
        """
        log_probs, chosen, entropy = ctx.saved_tensors
        if d_log_prob is None and d_entropy is None:
            return None, None
        probs, slope = log_probs.exp(), th.zeros(())
        if d_entropy is not None:
            slope = (log_probs + entropy[:, None]).mul_(-d_entropy[:, None])
        if d_log_prob is None:
            return probs.mul_(slope), None
        d_logits = probs.mul_(slope - d_log_prob[:, None])
        return d_logits.scatter_add_(1, chosen[:, None], d_log_prob[:, None]), None

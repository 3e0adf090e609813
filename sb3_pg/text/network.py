"""The third network: a language model that acts with a cache, and judges and steps on whole sequences."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch as th

from sb3_pg.common.arrays import Array
from sb3_pg.common.distributions import Parameters
from sb3_pg.common.networks import AutogradNetwork, Fisher
from sb3_pg.common.networks.protocol import KnownEarly
from sb3_pg.common.threads import choose_threads
from sb3_pg.text.decoding import Decoder
from sb3_pg.text.policies import CHUNK_LOGITS, LanguageModelPolicy, to_rows
from sb3_pg.text.sequences import prefix_chains


class TextNetwork(AutogradNetwork):
    """Autograd, with what a language model does differently.

    The rows of a minibatch may come in any order; the policy reads each sequence in them once. Minibatches are made
    of whole responses (``sequential``), so that this is once per response and epoch.

    :param policy: a language model policy
    """

    policy: LanguageModelPolicy
    sequential = True

    def __init__(self, policy: LanguageModelPolicy) -> None:
        super().__init__(policy)
        self.description = "text (key/value cache, whole sequences)"
        self.judges_while_acting = False
        self._decoder = Decoder(policy)

    def refresh(self) -> bool:
        self._decoder.forget()
        return super().refresh()

    def act(self, observations: Any) -> tuple[np.ndarray, KnownEarly | None]:
        choose_threads(len(observations) * self._largest_layer)
        with th.no_grad():
            hidden = self._decoder.read(observations)
            going = ~self.policy.is_over(observations)
            if going.all():
                return self.policy.choose(hidden).cpu().numpy(), None
            tokens = np.full(len(observations), self.policy.end_token)
            tokens[going] = self.policy.choose(hidden[th.as_tensor(going, device=hidden.device)]).cpu().numpy()
        return tokens, None

    def judge(self, observations: Any, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        going = ~self.policy.is_over(observations)
        if going.all():
            return super().judge(observations, actions)
        values, log_probs = np.zeros((2, len(observations)), np.float32)
        values[going], log_probs[going] = super().judge(observations[going], actions[going])
        return values, log_probs

    def evaluate(self, observations: Array, actions: Array | None) -> tuple[Array, Array, Array]:
        if actions is not None:
            return super().evaluate(observations, actions)
        choose_threads(len(observations) * self._largest_layer)
        # The critic alone is fitted while the actor is held, and the actor is all but the value head.
        with th.no_grad():
            hidden = self.policy.hidden_states(observations)
        values = self.policy.value_head(hidden).flatten()
        self._push = lambda d_log_prob, d_entropy, d_value: [(values, d_value)]
        return None, None, values.detach()

    # Natural gradient: in pieces, whose logits fit into memory

    def _pieces(self, observations: Array) -> list[Array]:
        """Row numbers of pieces made of whole sequences."""
        size = max(1, CHUNK_LOGITS // self.policy.n_tokens)
        n = len(observations)
        if n <= size:
            return [slice(None)]
        _, chain = prefix_chains(to_rows(observations), self.policy.prompt_length)
        order = np.argsort(chain, kind="stable")
        return [th.as_tensor(order[i : i + size], device=self._device) for i in range(0, n, size)]

    def fisher(self, observations: Array) -> Fisher:
        pieces = [observations[piece] for piece in self._pieces(observations)]
        with twice_differentiable(self.policy.lm):
            if len(pieces) == 1:
                return super().fisher(observations)
        of_piece = super().fisher

        def product(vector: th.Tensor) -> th.Tensor:
            total = th.zeros_like(vector)
            with twice_differentiable(self.policy.lm):
                for piece in pieces:  # made again for each product: only one is in memory at a time
                    total += of_piece(piece)(vector) * (len(piece) / len(observations))
            return total

        return product

    def actor(self, observations: Array, actions: Array) -> tuple[Array, Array, Parameters]:
        pieces = self._pieces(observations)
        if len(pieces) == 1:
            return super().actor(observations, actions)
        log_prob = th.empty(len(observations), device=self._device)
        entropy, logits = th.empty_like(log_prob), log_prob.new_empty(len(observations), self.policy.n_tokens)
        for piece in pieces:
            log_prob[piece], entropy[piece], (family, parameters) = super().actor(observations[piece], actions[piece])
            (logits[piece],) = parameters
        return log_prob, entropy, (family, (logits,))

    def kl(self, old: Any, new: Any) -> Array:
        (family, (before,)), (_, (after,)) = old, new
        size = max(1, CHUNK_LOGITS // self.policy.n_tokens)
        pieces = [
            super(TextNetwork, self).kl((family, (a,)), (family, (b,)))
            for a, b in zip(before.split(size), after.split(size), strict=True)
        ]
        return th.cat(pieces)


@contextmanager
def twice_differentiable(lm: Any) -> Iterator[None]:
    """Let the model compute attention step by step: torch's fused attention has no second derivative."""
    usual = lm.config._attn_implementation
    lm.set_attn_implementation("eager")
    try:
        yield
    finally:
        lm.set_attn_implementation(usual)

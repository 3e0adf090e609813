"""The engine of language models: acts with a cache, judges and steps on whole sequences."""

import copy
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch as th

from sb3_pg.common.batch import Batch
from sb3_pg.common.engines.autograd import AutogradEngine, Described, GraphActor, GraphEvaluation
from sb3_pg.common.engines.protocol import Acted, Fisher, Judged, Seen
from sb3_pg.common.errors import ArgumentError
from sb3_pg.common.rollout import Rollout
from sb3_pg.common.threads import choose_threads
from sb3_pg.text.decoding import Decoder
from sb3_pg.text.figures import TextFigures
from sb3_pg.text.policies import CHUNK_LOGITS, LanguageModelPolicy, to_rows
from sb3_pg.text.sequences import prefix_chains, response_lengths


class TextEngine(AutogradEngine):
    """Autograd, with what a language model does differently.

    The rows of a minibatch may come in any order; the policy reads each sequence in them once. Batches number the
    responses (``Batch.sequences``), so that minibatches are made of whole ones: once per response and epoch.

    :param policy: a language model policy
    """

    policy: LanguageModelPolicy

    def __init__(self, policy: LanguageModelPolicy) -> None:
        self._decoder = Decoder(policy)
        super().__init__(policy)
        self.description = "text (key/value cache, whole sequences)"

    def refresh(self) -> bool:
        self._decoder.forget()
        return super().refresh()

    def act(self, seen: Seen, deterministic: bool = False) -> Acted:
        if seen.masks is not None:
            raise ArgumentError("Language models are not masked. Pass use_masking=False.")
        rows: Any = seen.observations
        choose_threads(len(rows) * self._largest_layer)
        with th.no_grad():
            hidden = self._decoder.read(rows)
            going = ~self.policy.is_over(rows)
            if going.all():
                return Acted(self.policy.choose(hidden, deterministic).cpu().numpy())
            tokens = np.full(len(rows), self.policy.end_token)
            chosen = self.policy.choose(hidden[th.as_tensor(going, device=hidden.device)], deterministic)
            tokens[going] = chosen.cpu().numpy()
        return Acted(tokens)

    # Judge

    def judge_rows(
        self, observations: Any, actions: np.ndarray, masks: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        going = ~self.policy.is_over(observations)
        if going.all():
            return super().judge_rows(observations, actions)
        values, log_probs = np.zeros((2, len(observations)), np.float32)
        values[going], log_probs[going] = super().judge_rows(observations[going], actions[going])
        return values, log_probs

    def judge(self, rollout: Rollout) -> Judged:
        """Judge, and take the penalty for leaving the reference from the rewards.

        Here and not in the environment, so that Monitor's episode reward stays the task's score. The figures are
        means over the responses that ended in this rollout, in nats and tokens.
        """
        judged = super().judge(rollout)
        policy, over = self.policy, rollout.dones.ravel()
        observations, actions = rollout.column("observations"), rollout.column("actions")
        rewards, figures, length = rollout.column("rewards"), TextFigures(), 1.0
        if over.any():
            length = float(response_lengths(observations[over], policy.prompt_length).mean()) + 1
            figures.score = float(rewards[over].mean())
            figures.response_length = length
            figures.ended = float((actions[over] == policy.end_token).mean())
        if not policy.has_reference:
            return judged._replace(figures=figures.named())
        going = ~policy.is_over(observations)  # not those at rest
        log_prob = policy.reference_log_prob(observations[going], actions[going])
        log_ratio = np.zeros(len(observations), np.float32)
        log_ratio[going] = judged.log_probs.ravel()[going] - log_prob
        coef, kl = float(policy.reference_kl_coef), float(log_ratio[going].mean()) * length
        figures.kl, figures.kl_coef = kl, coef
        figures.reference_perplexity = math.exp(min(-float(log_prob.mean()), 700.0))
        if figures.score is not None:
            figures.penalised_reward = figures.score - coef * kl
        penalised = (rewards - coef * log_ratio).reshape(rollout.n_steps, -1)
        return judged._replace(rewards=penalised, figures=figures.named())

    def adapt(self, figures: Mapping[str, float]) -> None:
        """Adapt the weight of the penalty to the KL (Ziegler et al. 2019, section 2.2)."""
        target = self.policy.reference_kl_target
        if target is not None and "text/kl" in figures:
            self.policy.reference_kl_coef *= 1.0 + 0.1 * min(max(figures["text/kl"] / target - 1.0, -0.2), 0.2)

    # Step

    def batch(self, rollout: Rollout, keep: np.ndarray | None = None) -> Batch:
        batch = super().batch(rollout, keep)
        batch.sequences = rollout.stretches.numbers.ravel()[batch.rows]
        return batch

    def evaluate_critic(self, batch: Batch) -> GraphEvaluation:
        # The critic alone is fitted while the actor is held, and the actor is all but the value head.
        choose_threads(len(batch) * self._largest_layer)
        with th.no_grad():
            hidden = self.policy.hidden_states(batch.observations)
        return GraphEvaluation(self, batch, self.policy.value_head(hidden).flatten())

    def actor(self, batch: Batch) -> "TextActor":
        return TextActor(self, batch)

    def pieces(self, batch: Batch) -> list[Any]:
        """Return row numbers of pieces made of whole sequences, whose logits fit into memory."""
        size = max(1, CHUNK_LOGITS // self.policy.n_tokens)
        if len(batch) <= size:
            return [slice(None)]
        _, chain = prefix_chains(to_rows(batch.observations), self.policy.prompt_length)
        order = np.argsort(chain, kind="stable")
        return [th.as_tensor(order[i : i + size], device=self._device) for i in range(0, len(batch), size)]


class TextActor(GraphActor):
    """A language model's actor, looked at in pieces whose logits fit into memory."""

    _engine: TextEngine

    def _distribution(self, batch: Batch) -> tuple[Described, th.Tensor, th.Tensor]:
        pieces = self._engine.pieces(batch)
        if len(pieces) == 1:
            return super()._distribution(batch)
        log_prob = th.empty(len(batch), device=self._engine.policy.device)
        entropy = th.empty_like(log_prob)
        logits = log_prob.new_empty(len(batch), self._engine.policy.n_tokens)
        for piece in pieces:
            described: Any
            described, log_prob[piece], entropy[piece] = super()._distribution(_part(batch, piece))
            family, (logits[piece],) = described
        return (family, (logits,)), log_prob, entropy

    def _kl(self, old: Any, now: Any) -> th.Tensor:
        (family, (before,)), (_, (after,)) = old, now
        size = max(1, CHUNK_LOGITS // self._engine.policy.n_tokens)
        pieces = zip(before.split(size), after.split(size), strict=True)
        return th.cat([super(TextActor, self)._kl((family, (a,)), (family, (b,))) for a, b in pieces])

    def _fisher(self, batch: Batch) -> Fisher:
        lm, pieces = self._engine.policy.lm, self._engine.pieces(batch)
        with twice_differentiable(lm):
            if len(pieces) == 1:
                return super()._fisher(batch)
        of_piece = super()._fisher
        share = th.as_tensor(batch.scale, device=self._engine.policy.device).expand(len(batch))

        def product(vector: Any) -> th.Tensor:
            total: Any = th.zeros_like(vector)
            with twice_differentiable(lm):
                for piece in pieces:  # made again for each product: only one is in memory at a time
                    part = _part(batch, piece)
                    part.weight = share[piece]
                    total += of_piece(part)(vector)
            return total  # type: ignore[no-any-return]

        return product


def _part(batch: Batch, piece: Any) -> Batch:
    """Return some of a batch's samples, with what it takes to look at them."""
    part = copy.copy(batch)
    part.observations, part.actions = batch.observations[piece], batch.actions[piece]
    part.weight = None if batch.weight is None else batch.weight[piece]
    return part


@contextmanager
def twice_differentiable(lm: Any) -> Iterator[None]:
    """Let the model compute attention step by step: torch's fused attention has no second derivative."""
    usual = lm.config._attn_implementation
    lm.set_attn_implementation("eager")
    try:
        yield
    finally:
        lm.set_attn_implementation(usual)

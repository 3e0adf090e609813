"""The engine of language models: acts with a cache, judges and steps on whole sequences."""

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import numpy as np
import torch as th

from sb3_pg.common.arrays import Array
from sb3_pg.common.batch import Batch
from sb3_pg.common.distributions import Categorical
from sb3_pg.common.engines.autograd import AutogradEngine, GraphActor, GraphEvaluation, PolicyEvaluation
from sb3_pg.common.engines.protocol import Acted, Fisher, Judged, Look, Seen
from sb3_pg.common.engines.sequences import every_nth
from sb3_pg.common.errors import ArgumentError
from sb3_pg.common.objectives import kl_estimate
from sb3_pg.common.rollout import Rollout
from sb3_pg.common.threads import choose_threads
from sb3_pg.text.decoding import Decoder
from sb3_pg.text.figures import TextFigures
from sb3_pg.text.language_model import CHUNK_LOGITS, LanguageModelPolicy, to_rows
from sb3_pg.text.rewards import at_their_tokens, mean_by_name
from sb3_pg.text.rows import TokenRows

#: Rows that are written out at once to look for ends.
ROWS = 1 << 12


class TextEngine(AutogradEngine):
    """Autograd, with what a language model does differently.

    The rows of a minibatch may come in any order; the policy reads each sequence in them once. Batches number the
    responses (``Batch.sequences``), so that minibatches are made of whole ones: once per response and epoch.

    :param policy: a language model policy
    """

    policy: LanguageModelPolicy
    _n_looked_at = 1

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
        rows = to_rows(seen.observations)
        choose_threads(len(rows) * self._largest_layer)
        with th.no_grad():
            hidden = self._decoder.read(rows)
            going = ~self.policy.is_over(rows)
            if going.all():
                lengths = self.policy.response_lengths(rows)
                return Acted(self.policy.choose(hidden, deterministic, lengths).cpu().numpy())
            tokens = np.full(len(rows), self.policy.end_token)
            lengths = self.policy.response_lengths(rows[going])
            chosen = self.policy.choose(hidden[th.as_tensor(going, device=hidden.device)], deterministic, lengths)
            tokens[going] = chosen.cpu().numpy()
        return Acted(tokens)

    # Judge

    def judge(self, rollout: Rollout) -> Judged:
        """Judge what is needed; take the penalty for leaving the reference from the rewards, unless the loss has it.

        Each response is read once, with the final observation that continues it. What acting has computed on the way
        is not kept: a log-probability takes another pass over the vocabulary at each step, and in half precision it is
        not that of the minibatches, so that ratios would not begin at one.

        The penalty is taken here and not in the environment, so that Monitor's episode reward stays the task's score.
        The figures are means over the responses that ended in this rollout, in nats and tokens.
        """
        policy, n, shape = self.policy, rollout.n_steps * rollout.n_envs, (rollout.n_steps, rollout.n_envs)
        rows, actions = self._with_final_rows(rollout), self.actions(rollout.column("actions"))
        going = ~policy.is_over(rows)  # not those at rest
        going[n:] &= np.append(~np.asarray(rollout.last_dones, dtype=bool), np.ones(len(rollout.cuts), dtype=bool))
        values, log_probs = self._judge_rows(rollout, rows, actions, going)
        rewards = at_their_tokens(rollout, rollout.column("rewards"))
        judged = Judged(values[:n].reshape(shape), log_probs.reshape(shape), values[n:], rewards.reshape(shape))
        figures = self._figures(rollout, rows[:n], going[:n])
        if policy.has_reference:
            judged = self._with_penalty(rollout, judged, figures, rows[:n], actions, going[:n])
        by_name = {f"text/reward/{name}": mean for name, mean in mean_by_name(rollout).items()}
        return judged._replace(figures=figures.named() | by_name)

    def _figures(self, rollout: Rollout, rows: TokenRows, going: np.ndarray) -> TextFigures:
        """Return what there is to log of the responses that have ended.

        :param rows: of the rollout
        :param going: whether a token was added to each
        """
        figures, tokens = TextFigures(), rollout.column("actions").reshape(-1)
        ended = np.zeros(len(rows), dtype=bool)
        ended[going] = self._have_ended(rows[going], tokens[going])
        is_longest = rows.length + 1 == self.policy.response_length
        over = rollout.dones.ravel() | (going & (ended | is_longest))  # a conversation goes on after a turn
        if over.any():
            figures.score = float(rollout.column("rewards")[over].mean())
            figures.response_length = float(rows.length[over].mean()) + 1
            figures.ended = float((ended | ~is_longest)[over].mean())
        return figures

    def _have_ended(self, rows: TokenRows, tokens: np.ndarray) -> np.ndarray:
        """Return which responses have an end after one more token, (n,).

        :param rows: before it
        :param tokens: (n,)
        """
        ends = self.policy.ends
        ended = ends.is_end(tokens)
        for start in range(0, len(rows), ROWS) if ends.strings else ():  # not all are written out at once
            some = slice(start, start + ROWS)
            responses = np.asarray(rows[some])[:, self.policy.prompt_length :]
            responses[np.arange(len(responses)), rows.length[some]] = tokens[some]
            ended[some] = ends.have_ended(responses)
        return ended

    def _with_penalty(
        self,
        rollout: Rollout,
        judged: Judged,
        figures: TextFigures,
        rows: TokenRows,
        actions: th.Tensor,
        going: np.ndarray,
    ) -> Judged:
        """Return what was judged with the penalty for leaving the reference, or what the loss needs for it.

        :param figures: get what there is to log of it
        """
        policy, settings, coef = self.policy, self.policy.reference_settings, float(self.policy.reference_kl_coef)
        of_reference, log_ratio = np.zeros(len(going), np.float32), np.zeros(len(going), np.float32)
        of_reference[going] = log_prob = policy.reference_log_prob(rows[going], actions[self.asarray(going)])
        log_ratio[going] = judged.log_probs.ravel()[going] - log_prob
        penalty: Any = kl_estimate(log_ratio, settings.estimator)[0]
        length = figures.response_length or 1.0
        figures.kl_coef = coef
        figures.reference_perplexity = math.exp(min(-float(log_prob.mean()), 700.0))
        if self._judges_log_probs(rollout):
            figures.kl = float(log_ratio[going].mean()) * length
            if figures.score is not None:
                figures.penalised_reward = figures.score - coef * float(penalty[going].mean()) * length
        shape = judged.log_probs.shape
        if settings.kl_in == "loss":
            return judged._replace(reference_log_probs=of_reference.reshape(shape))
        assert judged.rewards is not None
        return judged._replace(rewards=judged.rewards - coef * penalty.reshape(shape))

    def _judges_log_probs(self, rollout: Rollout) -> bool:
        """Return whether log-probabilities of the policy are needed in the update, or already before it."""
        policy, settings = self.policy, self.policy.reference_settings
        is_for_loss = settings.kl_in == "loss" and settings.kl_target is None and policy.reference_kl_coef > 0
        return rollout.needs_log_probs or (policy.has_reference and not is_for_loss)

    def _judge_rows(
        self, rollout: Rollout, rows: TokenRows, actions: th.Tensor, going: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return V of each row, and log pi(a|s) of those of the rollout; zeros where they are not needed."""
        policy, n, known = self.policy, len(actions), rollout.n_known * rollout.n_envs
        needs_log_probs = self._judges_log_probs(rollout)
        values, log_probs = np.zeros(len(rows), np.float32), np.zeros(n, np.float32)
        values[:known], log_probs[:known] = rollout.column("values")[:known], rollout.column("log_probs")[:known]
        wanted = going.copy()
        wanted[:known] = False
        if not needs_log_probs and not rollout.needs_values:
            wanted[:] = False
        elif not rollout.needs_values:
            wanted[n:] = False
        read = np.flatnonzero(wanted)
        chosen = th.nn.functional.pad(actions, (0, len(rows) - n))[self.asarray(read)]
        lengths = policy.response_lengths(rows[read])

        def numbers(hidden: th.Tensor, members: np.ndarray) -> tuple[th.Tensor, ...]:
            its = self.asarray(members)
            value, of_rows = policy.values(hidden).flatten(), None if lengths is None else lengths[its]
            if not needs_log_probs:
                return value, th.zeros_like(value)
            return value, policy.action_log_prob(hidden, chosen[its], of_rows)

        if len(read):
            with th.no_grad():
                value, log_prob = (x.cpu().numpy() for x in policy.by_pieces(rows[read], numbers))
            values[read] = value if rollout.needs_values else 0.0
            log_probs[read[read < n]] = log_prob[read < n]
        return values, log_probs

    def _with_final_rows(self, rollout: Rollout) -> TokenRows:
        """Return the rows of a rollout and, behind them, its final observations."""
        rows, final = rollout.column("observations"), np.asarray(rollout.final_observations)
        if not isinstance(rows, TokenRows):
            return TokenRows.of(np.concatenate([rows, final]), self.policy.prompt_length)
        recording: Any = rollout.buffer.observations
        steps = [rollout.n_steps - 1] * rollout.n_envs + [cut.step for cut in rollout.cuts]
        envs = [*range(rollout.n_envs), *(cut.env for cut in rollout.cuts)]
        return rows.with_more(recording.followed(np.array(steps), np.array(envs), final))

    def adapt(self, figures: Mapping[str, float]) -> None:
        """Adapt the weight of the penalty to the KL (Ziegler et al. 2019, section 2.2)."""
        target = self.policy.reference_kl_target
        if target is not None and "text/kl" in figures:
            self.policy.reference_kl_coef *= 1.0 + 0.1 * min(max(figures["text/kl"] / target - 1.0, -0.2), 0.2)

    def end_update(self) -> None:
        self.policy.end_update()

    # Step

    def asarray(self, x: Any) -> Any:
        return x if isinstance(x, TokenRows) else super().asarray(x)

    def batch(self, rollout: Rollout, keep: np.ndarray | None = None) -> Batch:
        batch = super().batch(rollout, keep)
        batch.sequences, policy = rollout.stretches.numbers.ravel()[batch.rows], self.policy
        if policy.reference_settings.kl_in == "loss" and policy.reference_kl_coef > 0:
            known = rollout.reference_log_probs
            log_prob = policy.reference_log_prob(batch.observations, batch.actions) if known is None else known.ravel()
            batch.reference_log_prob = self.asarray(log_prob if known is None else log_prob[batch.rows])
        if policy.mask_truncated_completions:
            batch.weight = self.asarray((~self._are_cut_short(rollout))[batch.rows].astype(np.float32))
        if not rollout.needs_log_probs:
            unknown: Any = None
            batch.old_log_prob = unknown
        return batch

    def figures(self, rollout: Rollout, batch: Batch) -> Mapping[str, float]:
        """Return the KL of responses, and what it leaves of their scores, where judging has had no need of it."""
        log_prob: Any = batch.old_log_prob
        sequences = batch.sequences
        if batch.reference_log_prob is None or sequences is None or self._judges_log_probs(rollout):
            return {}
        found, n_responses = TextFigures(), len(np.unique(sequences))
        found.kl = float((log_prob - batch.reference_log_prob).sum()) / n_responses
        score = rollout.figures.get("text/score")
        if score is not None:
            found.penalised_reward = score - float(self.penalty(log_prob, batch)[0].sum()) / n_responses
        return found.named()

    def _are_cut_short(self, rollout: Rollout) -> np.ndarray:
        """Return which tokens are of a response that has reached the greatest length without an end, (n,).

        A conversation has several responses in one episode, of which each is one by itself.
        """
        rows = TokenRows.of(rollout.column("observations"), self.policy.prompt_length)
        numbers = rollout.stretches.numbers
        length = np.asarray(rows.length).reshape(numbers.shape)
        begins = (np.diff(numbers, axis=0, prepend=-1) != 0) | (np.diff(length, axis=0, prepend=0) <= 0)
        responses = np.cumsum(begins.T).reshape(begins.T.shape).T.ravel()
        longest = np.flatnonzero(rows.length + 1 == self.policy.response_length)
        ended = self._have_ended(rows[longest], rollout.column("actions").ravel()[longest])
        return np.isin(responses, responses[longest[~ended]])

    def evaluate(self, batch: Batch) -> "TextEvaluation":
        choose_threads(len(batch) * self._largest_layer)
        return TextEvaluation(self, batch, *self._evaluated(batch))

    def penalty(self, log_prob: th.Tensor, batch: Batch) -> tuple[Any, Any]:
        """Return what the reference adds to each sample's loss, and its derivative by the log-probability; else zeros.

        :param log_prob: of the policy, (n,)
        """
        if batch.reference_log_prob is None:
            return 0.0, 0.0
        policy, log_ratio = self.policy, log_prob - batch.reference_log_prob
        penalty, derivative = kl_estimate(log_ratio, policy.reference_settings.estimator)
        coef = float(policy.reference_kl_coef)
        return coef * penalty, coef * derivative

    def thinned(self, batch: Batch, every: int) -> Any:
        """Return the rows of every n-th sequence."""
        return every_nth(batch, every)

    def evaluate_critic(self, batch: Batch) -> GraphEvaluation:
        # The critic alone is fitted while the actor is held, and the actor is all but the value head.
        choose_threads(len(batch) * self._largest_layer)
        with th.no_grad():
            hidden = self.policy.hidden_states(batch.observations)
        return GraphEvaluation(self, batch, self.policy.values(hidden).flatten())

    def actor_parameters_of_all(self, batch: Batch) -> list[th.nn.Parameter]:
        """Return those of the first samples: language models send all tokens through the same layers."""
        return self.actor_parameters(batch)

    def actor(self, batch: Batch) -> "TextActor":
        return TextActor(self, batch)

    def pieces(self, batch: Batch) -> list[Any]:
        """Return row numbers of pieces made of whole sequences, whose graphs and logits fit into memory."""
        policy = self.policy
        rows, n_logits = TokenRows.of(batch.observations, policy.prompt_length), len(batch) * policy.n_tokens
        size = min(policy.graph_tokens(policy.lm, rows), rows.n_tokens * CHUNK_LOGITS // n_logits)
        return [np.sort(piece.members) for piece in rows.pieces(size)]


class TextEvaluation(PolicyEvaluation):
    """A batch as the present parameters see it; the penalty for leaving the reference adds to the loss."""

    _engine: TextEngine

    def backward(
        self, d_log_prob: Array | None = None, d_entropy: float | None = None, d_value: Array | None = None
    ) -> None:
        if d_log_prob is not None:
            d_log_prob = d_log_prob + self._engine.penalty(self.log_prob, self._batch)[1]
        super().backward(d_log_prob, d_entropy, d_value)


class TextActor(GraphActor):
    """A language model's actor, looked at in pieces whose graphs and logits fit into memory.

    What it was is remembered as hidden states and the head, not as logits of the whole vocabulary for each token.
    """

    _engine: TextEngine

    @cached_property
    def _before(self) -> tuple[th.Tensor, Any, Look]:
        """Return hidden states, head and look at the old parameters."""
        policy = self._engine.policy
        head = policy.lm.get_output_embeddings()
        if any(p.requires_grad for p in head.parameters()):
            head = copy.deepcopy(head)
        hidden, log_prob, entropy = self._seen(lambda hidden, log_prob, entropy, _: (hidden, log_prob, entropy))
        penalty, _ = self._engine.penalty(log_prob, self._batch)
        return hidden, head, Look(log_prob, entropy, th.zeros_like(log_prob), penalty)

    @property
    def old(self) -> Look:
        return self._before[2]

    def look(self) -> Look:
        before, head, _ = self._before
        policy, lengths = self._engine.policy, self._lengths
        size, family = max(1, CHUNK_LOGITS // policy.n_tokens), Categorical([policy.n_tokens])

        def with_kl(hidden: th.Tensor, log_prob: th.Tensor, entropy: th.Tensor, members: Any) -> tuple[th.Tensor, ...]:
            kl = []
            for some in th.split(th.arange(len(hidden), device=hidden.device), size):
                its = members[some]
                old, of_rows = policy.logits(before[its], head=head), None if lengths is None else lengths[its]
                now = policy.narrowed(policy.logits(hidden[some]), of_rows, None, (before[its], head))
                kl.append(self._kl((family, (policy.narrowed(old, of_rows),)), (family, (now,))))
            return log_prob, entropy, th.cat(kl)

        log_prob, entropy, kl = self._seen(with_kl, before, head)
        return Look(log_prob, entropy, kl, self._engine.penalty(log_prob, self._batch)[0])

    @cached_property
    def _lengths(self) -> th.Tensor | None:
        return self._engine.policy.response_lengths(self._batch.observations)

    @th.no_grad()
    def _seen(
        self, of: Callable[..., tuple[th.Tensor, ...]], before: th.Tensor | None = None, head: Any = None
    ) -> tuple[th.Tensor, ...]:
        """Return what a function makes of hidden states, log-probabilities and entropies.

        :param before: the old hidden states, with whose head it is decided which tokens may be chosen: of policies that
            choose from other tokens the KL would be infinite
        """
        policy, batch, lengths = self._engine.policy, self._batch, self._lengths
        actions: Any = batch.actions

        def numbers(hidden: th.Tensor, members: np.ndarray) -> tuple[th.Tensor, ...]:
            its = th.as_tensor(members, device=hidden.device)
            of_rows = None if lengths is None else lengths[its]
            deciding = None if before is None else (before[its], head)
            return of(hidden, *policy.token_statistics(hidden, actions[its], of_rows, deciding), its)

        return policy.by_pieces(batch.observations, numbers)

    def _fisher(self, batch: Batch) -> Fisher:
        lm, of_piece = self._engine.policy.lm, super()._fisher
        with twice_differentiable(lm):
            pieces = self._engine.pieces(batch)
            if len(pieces) == 1:
                return of_piece(batch)

        def product(vector: Any) -> th.Tensor:
            total: Any = th.zeros_like(vector)
            with twice_differentiable(lm):
                for piece in pieces:  # made again for each product: only one is in memory at a time
                    total += of_piece(batch.part(piece))(vector)
            return total  # type: ignore[no-any-return]

        return product


@contextmanager
def twice_differentiable(lm: Any) -> Iterator[None]:
    """Let the model compute attention step by step: torch's fused attention has no second derivative."""
    usual = lm.config._attn_implementation
    lm.set_attn_implementation("eager")
    try:
        yield
    finally:
        lm.set_attn_implementation(usual)

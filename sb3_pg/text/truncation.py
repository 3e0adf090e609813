"""Which tokens may be chosen: top-k, top-p, min-p and a least length, by transformers' names and rules.

One rule holds wherever probabilities are computed. The set is found from the logits of the policy that is asked, so it
follows the policy from one minibatch to the next: a ratio compares what the two policies would act, and where they are
the same it is one. The token that was chosen is always in it. A policy that would no longer choose it still gives it a
finite log-probability, whose gradient can bring it back.
"""

from dataclasses import asdict, dataclass
from typing import Any

import torch as th

from sb3_pg.common.errors import ArgumentError, check_count, check_number

#: The logit of a token that cannot be chosen. Not infinite, so that every formula stays finite.
IMPOSSIBLE = -1e8


@dataclass(frozen=True)
class Truncation:
    """What is left of a distribution over tokens; arguments are those of transformers' ``GenerationConfig``.

    :param end_tokens: those that end a response
    :param top_k: so many of the likeliest tokens; fewer are safer and explore less. None takes all
    :param top_p: the likeliest tokens that have this probability together; lower is safer. None takes all
    :param min_p: tokens with at least this share of the likeliest one's probability; higher is safer. None takes all
    :param min_new_tokens: a response does not end before it has so many tokens. None lets it end at once
    :raises ArgumentError: a number is outside of its range
    """

    end_tokens: tuple[int, ...]
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    min_new_tokens: int | None = None

    def __post_init__(self) -> None:
        for name in ("top_k", "min_new_tokens"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name))
        for name in ("top_p", "min_p"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), high=1.0, above_low=True)

    def settings(self) -> dict[str, Any]:
        """Return what transformers' ``GenerationConfig`` takes to do the same."""
        return {name: value for name, value in asdict(self).items() if value is not None and name != "end_tokens"}

    def check_length(self, longest: int) -> None:
        """Refuse a least length above the greatest.

        :raises ArgumentError: it is
        """
        if self.min_new_tokens is not None and self.min_new_tokens > longest:
            raise ArgumentError(
                f"`min_new_tokens={self.min_new_tokens}` is more than the {longest} tokens that a response may have. "
                "Lower it, or raise `response_length`."
            )

    @th.no_grad()
    def kept(self, logits: th.Tensor, lengths: th.Tensor, chosen: th.Tensor | None = None) -> th.Tensor:
        """Return True for tokens that may be chosen, bool (n, n_tokens).

        :param logits: (n, n_tokens), divided by the temperature
        :param lengths: tokens of the response before this one, (n,)
        :param chosen: the token that was, (n,), which is kept in any case
        """
        left = logits.detach().clone()
        if self.min_new_tokens is not None:
            ends = th.zeros(left.shape[1], dtype=th.bool, device=left.device)
            ends[list(self.end_tokens)] = True
            left[(lengths < self.min_new_tokens)[:, None] & ends] = IMPOSSIBLE
        if self.top_k is not None and self.top_k < left.shape[1]:
            left[left < left.topk(self.top_k)[0][:, -1:]] = IMPOSSIBLE
        if self.top_p is not None:
            by_size, order = left.sort()
            unlikely = by_size.softmax(-1).cumsum(-1) <= 1.0 - self.top_p
            unlikely[:, -1] = False
            left[unlikely.scatter(1, order, unlikely)] = IMPOSSIBLE
        if self.min_p is not None:
            probs = left.softmax(-1)
            left[probs < self.min_p * probs.amax(-1, keepdim=True)] = IMPOSSIBLE
        kept = left > IMPOSSIBLE / 2
        return kept if chosen is None else kept.scatter(1, chosen[:, None], True)

"""Completing prompts by the model's own ``generate``."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch as th
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from sb3_pg.common.errors import ArgumentError
from sb3_pg.text.ends import Ends, check_tokenizer
from sb3_pg.text.prompts import Prompt, prompt_rows
from sb3_pg.text.sequences import flush_right
from sb3_pg.text.spaces import EMPTY, Vocabulary, checked_strings

if TYPE_CHECKING:
    from sb3_pg.text.language_model import LanguageModelPolicy

#: Texts completed at once.
BATCH = 64


def answers(policy: "LanguageModelPolicy", prompts: Sequence[Prompt], settings: Mapping[str, Any]) -> np.ndarray:
    """Return the responses with which a model goes on, as :func:`generated`, those of one prompt after one another.

    :param prompts: texts or conversations, at least one, each as long as the model's window allows
    :param settings: of ``policy.generate``
    :raises ArgumentError: there is no tokenizer, or a prompt is too long
    """
    longest = settings.get("max_new_tokens", policy.response_length)
    return in_batches(policy, prompt_rows(required_tokenizer(policy), prompts), longest, settings)


def in_batches(
    policy: "LanguageModelPolicy", rows: np.ndarray, longest: int, settings: Mapping[str, Any]
) -> np.ndarray:
    """Return responses as :func:`generated`, a batch of prompts at a time.

    :raises ArgumentError: a prompt and its response do not fit into the model's window
    """
    window = None if policy.lm.config.is_encoder_decoder else getattr(policy.lm.config, "max_position_embeddings", None)
    if window is not None and rows.shape[1] + longest > window:
        number = int((rows != EMPTY).sum(axis=1).argmax())
        raise ArgumentError(
            f"Prompt {number} has {rows.shape[1]} tokens and its response may have {longest}, but the model's window "
            f"is {window}. Shorten the prompt or pass a smaller max_new_tokens."
        )
    starts = range(0, max(len(rows), 1), BATCH)
    return np.concatenate([generated(policy, rows[start : start + BATCH], longest, settings) for start in starts])


def required_tokenizer(policy: "LanguageModelPolicy") -> Any:
    """Return the policy's tokenizer.

    :raises ArgumentError: it has none; says how to give one
    """
    if policy.tokenizer is None:
        how = "policy.tokenizer = AutoTokenizer.from_pretrained(...)"
        if not isinstance(policy.action_space, Vocabulary):
            how = "actions of Vocabulary(n, end_token, tokenizer=...) in the environment"
        raise ArgumentError(f"The policy has no tokenizer to read and write texts with. Give it one: {how}.")
    return policy.tokenizer


def generated(policy: "LanguageModelPolicy", rows: np.ndarray, longest: int, settings: Mapping[str, Any]) -> np.ndarray:
    """Return responses up to their ends, empty columns -1, (n * num_return_sequences, longest).

    :param rows: prompts, (n, width), empty columns -1
    :param longest: most tokens of a response
    :param settings: of ``policy.generate``
    """
    end, ends = policy.end_token, ends_of(policy, settings)
    if not len(rows):
        return np.full((0, longest), EMPTY)
    tokens, lengths = flush_right(policy.read_prompts(rows), end)
    mask = np.arange(tokens.shape[1]) >= tokens.shape[1] - lengths[:, None]
    options: dict[str, Any] = {
        "do_sample": False,
        "pad_token_id": end,
        **{name: value for name, value in settings.items() if name not in ("stop_strings", "tokenizer")},
        "eos_token_id": list(ends.tokens),
        "max_new_tokens": min(longest, settings.get("max_new_tokens", longest)),
    }
    n_before = policy.skipped(tokens.shape[1])
    if ends.strings:
        own = [*(settings.get("stopping_criteria") or ()), _Stopping(ends, n_before)]
        options["stopping_criteria"] = StoppingCriteriaList(own)
    options = {**policy.generation_settings(options["do_sample"]), **options}
    n_known = policy.lm.get_output_embeddings().out_features
    if n_known > policy.n_tokens:
        options["suppress_tokens"] = [*(options.get("suppress_tokens") or ()), *range(policy.n_tokens, n_known)]
    with policy.precision(), plain_generation(policy.lm):
        out = policy.lm.generate(
            input_ids=th.as_tensor(tokens, device=policy.device).long(),
            attention_mask=th.as_tensor(mask, device=policy.device).long(),
            **options,
        )
    new = out[:, n_before:].cpu().numpy()[:, :longest]
    responses = np.full((len(new), longest), EMPTY)
    responses[:, : new.shape[1]] = ends.cut(new)
    return responses


def ends_of(policy: "LanguageModelPolicy", settings: Mapping[str, Any]) -> Ends:
    """Return what ends responses: the policy's ends, and those of the settings in place of them.

    :param settings: of ``policy.generate``: ``stop_strings``, ``eos_token_id``, ``tokenizer``
    :raises ArgumentError: they are none, or there are strings but no tokenizer
    """
    strings, tokens = settings.get("stop_strings", policy.stop_strings), settings.get("eos_token_id")
    strings = checked_strings([strings] if isinstance(strings, str) else strings or ())
    tokenizer = settings.get("tokenizer")
    if tokenizer is not None:
        check_tokenizer(tokenizer)
    elif strings:
        tokenizer = required_tokenizer(policy)
    else:
        tokenizer = policy.tokenizer
    ends = np.ravel(policy.end_tokens if tokens is None else tokens)
    if ends.dtype.kind not in "iu" or ((ends < 0) | (ends >= policy.n_tokens)).any():
        raise ArgumentError(f"`eos_token_id` must be numbers of tokens, 0 to {policy.n_tokens - 1}, not {tokens!r}.")
    return Ends(tokenizer, tuple(ends.tolist()), strings)


class _Stopping(StoppingCriteria):
    """Ends responses as environments do. Transformers' own rule for stop strings looks into prompts, too."""

    def __init__(self, ends: Ends, n_before: int) -> None:
        self._ends, self._n_before = ends, n_before

    def __call__(self, input_ids: th.Tensor, scores: Any, **_: Any) -> th.Tensor:
        ended = self._ends.have_ended(input_ids[:, self._n_before :].cpu().numpy())
        return th.as_tensor(ended, device=input_ids.device)


@contextmanager
def plain_generation(lm: Any) -> Iterator[None]:
    """Let the model generate in the block without settings of its own."""
    own, start = lm.generation_config, getattr(lm.config, "decoder_start_token_id", None)
    lm.generation_config = GenerationConfig(decoder_start_token_id=start)  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        lm.generation_config = own


def settings_to_save(policy: "LanguageModelPolicy") -> Any:
    """Return the model's own settings for generating, with the ends and lengths of the environment's responses."""
    settings = copy.deepcopy(policy.lm.generation_config)
    settings.eos_token_id = policy.end_tokens
    settings.stop_strings = list(policy.stop_strings) or None
    if settings.pad_token_id is None:
        settings.pad_token_id = policy.end_token
    if settings.max_new_tokens is None:
        settings.max_new_tokens = policy.response_length
    if policy.truncation is not None and policy.truncation.min_new_tokens is not None:
        settings.min_new_tokens = policy.truncation.min_new_tokens  # which holds for greedy responses, too
    return settings

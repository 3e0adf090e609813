"""Is a language model one that acting, judging and stepping see alike? Asked by reading a few tokens in every way."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch as th

from sb3_pg.common.errors import ArgumentError
from sb3_pg.text.spaces import EMPTY

if TYPE_CHECKING:
    from sb3_pg.text.policies import LanguageModelPolicy

#: Tokens of the longest prompt and response that are read.
_PROMPT, _RESPONSE = 8, 5

#: By how much the head is enlarged to see whether logits are capped.
_ENLARGED = 1024.0


def half_precision(lm: Any) -> th.dtype | None:
    """Return the type of a model in half precision, None for float32.

    :raises ArgumentError: it is a type in which training fails
    """
    if lm.dtype in (th.float32, th.bfloat16):
        return None if lm.dtype is th.float32 else th.bfloat16
    name = str(lm.dtype).removeprefix("torch.")
    raise ArgumentError(
        f"The model's numbers are of type {name}, in which training does not work (float16: gradients vanish). Pass "
        "model_kwargs={'dtype': torch.bfloat16}, or float32."
    )


@th.no_grad()
def check_reading(policy: "LanguageModelPolicy") -> None:
    """Refuse a model that does not see the same in rows read whole, token by token with a cache, and by itself.

    :raises ArgumentError: naming the kind of model and what is different
    """
    policy.language_model.eval()
    kind = policy.lm.config.model_type
    rows = _some_rows(policy)
    n_prompt, limit = policy.prompt_length, 1e-2 if policy.half_type is None else 0.2
    steps = [np.where(np.arange(rows.shape[1]) < n_prompt + step, rows, EMPTY) for step in range(_length(policy) + 1)]
    try:
        whole = policy.hidden_states(np.concatenate(steps))
    except Exception as error:
        raise ArgumentError(f"Models of type {kind!r} are not supported: they cannot be read ({error}).") from error
    for scale in (1.0, _ENLARGED):
        with _enlarged(policy.lm.get_output_embeddings(), scale):
            own = _own_logits(policy, steps[-1])
            if not _close(own, _logits(policy, steps[-1])[: len(own)], limit):
                raise ArgumentError(
                    f"Models of type {kind!r} are not supported: their logits are not just the output embeddings "
                    "times the last hidden state."
                )
    try:
        cached = _read_with_cache(policy, steps)
    except Exception as error:
        raise ArgumentError(
            f"Models of type {kind!r} are not supported: they have no key/value cache of the usual kind "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})."
        ) from error
    if not _close(cached, whole, limit):
        raise ArgumentError(
            f"Models of type {kind!r} are not supported: read token by token with a key/value cache, as acting does, "
            "they see something else than when they read a text at once."
        )


def _length(policy: "LanguageModelPolicy") -> int:
    width: int = policy.observation_space.shape[0]  # type: ignore[index]
    return min(_RESPONSE, width - policy.prompt_length - 1)


def _some_rows(policy: "LanguageModelPolicy") -> np.ndarray:
    """Return two rows of different lengths, so that one of them is padded, of tokens that do not end a text."""
    n_known = min(policy.n_tokens, policy.lm.get_output_embeddings().out_features)
    usual = np.setdiff1d(np.arange(n_known), policy.end_tokens)
    rows = np.full((2, policy.observation_space.shape[0]), EMPTY)  # type: ignore[index]
    for row, longest in zip(rows, (_PROMPT, 2), strict=True):
        columns = slice(
            policy.prompt_length - min(longest, policy.prompt_length), policy.prompt_length + _length(policy)
        )
        row[columns] = usual[(np.arange(columns.stop - columns.start) * 31 + longest) % len(usual)]
    return rows


def _read_with_cache(policy: "LanguageModelPolicy", steps: list[np.ndarray]) -> th.Tensor:
    """Return the hidden states of all steps, as acting finds them."""
    with policy.precision():
        hidden, memories = policy.begin(steps[0])
        found = [hidden]
        for step, rows in enumerate(steps[1:]):
            tokens = th.as_tensor(rows[:, policy.prompt_length + step], device=policy.device).long()
            hidden, memories = policy.proceed(memories, tokens)
            found.append(hidden)
    return th.cat(found)


def _logits(policy: "LanguageModelPolicy", rows: np.ndarray) -> th.Tensor:
    return policy.logits(policy.hidden_states(rows[:1]))[0] * policy.temperature


def _own_logits(policy: "LanguageModelPolicy", rows: np.ndarray) -> th.Tensor:
    """Return what the model itself says about the last token of the first row, read without padding."""
    n_prompt, row, lm = policy.prompt_length, rows[0], policy.lm
    parts = [row[:n_prompt], row[n_prompt:]]
    prompt, response = (th.as_tensor(x[x != EMPTY], device=policy.device).long()[None] for x in parts)
    inputs = {"input_ids": th.cat([prompt, response], dim=1)}
    if lm.config.is_encoder_decoder:
        start = th.full((1, 1), lm.config.decoder_start_token_id, device=policy.device)
        inputs = {"input_ids": prompt, "decoder_input_ids": th.cat([start, response], dim=1)}
    with policy.precision():
        logits: th.Tensor = lm(**inputs).logits[0, -1, : policy.n_tokens].float()
    return logits


def _close(x: th.Tensor, y: th.Tensor, tolerance: float) -> bool:
    size = float(x.abs().max())
    return bool(th.allclose(x.float(), y.float(), rtol=tolerance, atol=tolerance * size))


@contextmanager
def _enlarged(module: th.nn.Module, scale: float) -> Iterator[None]:
    """Multiply the module's parameters in the block by a power of two, which is exactly undone."""
    for p in module.parameters():
        p.mul_(scale)
    try:
        yield
    finally:
        for p in module.parameters():
            p.div_(scale)

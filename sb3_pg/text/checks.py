"""Checks that a language model fits its environment, and that acting, judging and stepping see the same of it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch as th

from sb3_pg.common.errors import ArgumentError, check_choice, check_count, check_number
from sb3_pg.text.base import BEGINNINGS
from sb3_pg.text.models import check_options
from sb3_pg.text.spaces import EMPTY, end_token_of

if TYPE_CHECKING:
    from sb3_pg.text.language_model import LanguageModelPolicy

#: Tokens of the longest prompt and response that are read.
_PROMPT, _RESPONSE = 8, 5

#: Numbers of a model that is not copied to look at it.
_LARGE = 1 << 28

#: By how much the head is enlarged to see whether logits are capped.
_ENLARGED = 1024.0


def check_arguments(arguments: Mapping[str, Any]) -> None:
    """Refuse arguments of a policy that cannot work, whatever its model.

    :raises ArgumentError: naming the argument, its value and what is allowed
    """
    check_number("temperature", arguments["temperature"], above_low=True)
    check_count("frozen_layers", arguments["frozen_layers"], low=0)
    if arguments["micro_batch_tokens"] is not None:
        check_count("micro_batch_tokens", arguments["micro_batch_tokens"])
    for name in ("mask_truncated_completions", "save_base", "gradient_checkpointing"):
        check_choice(name, arguments[name], (True, False))
    check_options("lora", arguments["lora"], "{'r': 8}")
    check_options("model_kwargs", arguments["model_kwargs"], "{'dtype': torch.bfloat16}")
    if arguments["lora"] is not None:
        _check_lora(arguments["lora"], arguments["frozen_layers"], arguments["reference_kl_coef"] is not None)


def _check_lora(lora: Mapping[str, Any], frozen_layers: int, has_reference: bool) -> None:
    """Refuse what an adapter passes over, and one without which the model is not what it was: the reference is that."""
    if frozen_layers:
        raise ArgumentError(
            f"`frozen_layers={frozen_layers}` and `lora` do not go together: with an adapter nothing else is trained. "
            "To give the lowest layers none, pass lora={..., 'layers_to_transform': [numbers of the others]}."
        )
    for name, usual, what in (
        ("bias", ("none",), "trains biases of the model itself"),
        ("init_lora_weights", BEGINNINGS, "changes the weights under the adapter"),
    ):
        value = lora.get(name, usual[0])
        if has_reference and value not in usual:
            raise ArgumentError(
                f"`lora` has {name}={value!r}, which {what}, so that the model without its adapter is not the "
                f"reference. Pass reference_kl_coef=None to have none, or leave out {name}."
            )


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


def check_fit(policy: "LanguageModelPolicy") -> None:
    """Refuse a model that cannot read the tokens of the policy's environment.

    :raises ArgumentError: says what does not fit
    """
    config, end = policy.lm.config, end_token_of(policy.action_space)
    n_known = policy.lm.get_output_embeddings().out_features
    # Models round their vocabulary up, so a few tokens more than the tokenizer has are usual; and tokens are added
    # to tokenizers, such as one for padding.
    n_more = policy.n_tokens - n_known
    if n_more > max(1, n_known // 100) or policy.n_tokens < 0.9 * n_known:
        raise ArgumentError(
            f"The tokenizer does not fit the model: it has {policy.n_tokens} tokens, but the model's vocabulary "
            f"has {n_known}. Use the tokenizer that the model was trained with"
            + (
                f", or give the model room for its tokens: resize_token_embeddings({policy.n_tokens})."
                if n_more > 0
                else "."
            )
        )
    own = policy.own_end_tokens
    if not own:
        raise ArgumentError(
            "The model has no end token, so no response would ever end: set `eos_token_id` in its configuration."
        )
    if end is not None and end not in own:
        raise ArgumentError(
            f"The tokenizer does not fit the model: it ends texts with token {end}, the model with "
            f"{own[0] if len(own) == 1 else own}. Use the tokenizer that the model was trained with."
        )
    ignored = sorted(set(own) - set(policy.end_tokens))
    if ignored:
        raise ArgumentError(
            f"The model ends texts with the tokens {own}, but {ignored} would not end a response of this "
            f"environment. Pass TextTask(end_tokens={ignored})."
        )
    window, width = getattr(config, "max_position_embeddings", None), policy.observation_space.shape[0]  # type: ignore[index]
    if window is not None and width > window:
        raise ArgumentError(
            f"Prompt and response may take {width} tokens ({policy.prompt_length} and "
            f"{width - policy.prompt_length}), but the model's window is {window}. Shorten one of them."
        )
    short = _short_window(config)
    if short is not None and width > short:
        raise ArgumentError(
            f"Prompt and response may take {width} tokens ({policy.prompt_length} and "
            f"{width - policy.prompt_length}), but with more than {short} the model's 'longrope' sees all of them in "
            "another way, also in texts that are read together with them. Shorten one of them."
        )


def _short_window(config: Any) -> int | None:
    """Return up to how many tokens a model with "longrope" positions takes the usual ones; None if it has none."""
    given = getattr(config, "rope_parameters", None) or {}
    layers = [given, *(its for its in given.values() if isinstance(its, Mapping))]  # of all, or of each type of layer
    lengths = [its["original_max_position_embeddings"] for its in layers if its.get("rope_type") == "longrope"]
    return min(lengths, default=None)


@th.no_grad()
def check_reading(policy: "LanguageModelPolicy") -> None:
    """Refuse a model that does not see the same in rows read whole, token by token with a cache, and by itself.

    :raises ArgumentError: naming the kind of model and what is different
    """
    policy.language_model.eval()
    with _single_precision(policy):
        try:
            fault = _difference(policy)
        except Exception as error:
            reason = str(error).partition("\n")[0]
            fault = f"reading them, whole or with a key/value cache, fails ({type(error).__name__}: {reason})"
    if fault is not None:
        raise ArgumentError(f"Models of type {policy.lm.config.model_type!r} are not supported: {fault}.")


def _difference(policy: "LanguageModelPolicy") -> str | None:
    """Return what a model sees differently, None if there is nothing."""
    rows, columns = _some_rows(policy), np.arange(policy.observation_space.shape[0])  # type: ignore[index]
    seen = range(policy.prompt_length, policy.prompt_length + _length(policy) + 1)
    steps = [np.where(columns < n, rows, EMPTY) for n in seen]
    tolerance = 0.2 if policy.half_type is not None else 1e-4  # of half precision only what is grossly wrong is seen
    for scale in (1.0, _ENLARGED):
        with _enlarged(policy.lm.get_output_embeddings(), scale):
            own = _own_logits(policy, steps[-1])
            if not _close(own, _logits(policy, steps[-1])[: len(own)], 10 * tolerance):
                return "their logits are not just the output embeddings times the last hidden state"
    if not _close(_read_with_cache(policy, steps), policy.hidden_states(np.concatenate(steps)), tolerance):
        return "with a key/value cache, as acting reads, they see something else than in a text that is read at once"
    return None


@contextmanager
def _single_precision(policy: "LanguageModelPolicy") -> Iterator[None]:
    """Let a model of half precision be one of float32 in the block, unless it is large: noise would hide much."""
    parameters, half_type = list(policy.language_model.parameters()), policy.half_type
    if half_type is None or sum(p.numel() for p in parameters) > _LARGE:
        yield
        return
    own = [p.dtype for p in parameters]
    policy.half_type = None
    for p in parameters:
        p.data = p.data.float()
    try:
        yield
    finally:
        policy.half_type = half_type
        for p, dtype in zip(parameters, own, strict=True):
            p.data = p.data.to(dtype)


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
    n_prompt, lm = policy.prompt_length, policy.lm
    parts = [policy.read_prompts(rows[:1, :n_prompt])[0], rows[0, n_prompt:]]
    prompt, response = (th.as_tensor(x[x != EMPTY], device=policy.device).long()[None] for x in parts)
    inputs = {"input_ids": th.cat([prompt, response], dim=1)}
    if lm.config.is_encoder_decoder:
        start = th.full((1, 1), lm.config.decoder_start_token_id, device=policy.device)
        inputs = {"input_ids": prompt, "decoder_input_ids": th.cat([start, response], dim=1)}
    with policy.precision():
        logits: th.Tensor = lm(**inputs, use_cache=False).logits[0, -1, : policy.n_tokens].float()
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

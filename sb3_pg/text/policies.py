"""The two kinds of language model that are policies."""

import inspect
from typing import Any, TypeVar

import numpy as np
import torch as th

from sb3_pg.common.errors import ArgumentError
from sb3_pg.text.decoding import Memory, growing_cache
from sb3_pg.text.language_model import LanguageModelPolicy
from sb3_pg.text.sequences import flush_left, flush_right, last_tokens
from sb3_pg.text.spaces import EMPTY, Vocabulary

# isort: split
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, DynamicCache, EncoderDecoderCache

Kind = TypeVar("Kind", bound=LanguageModelPolicy)

#: A model of the size that the built-in tasks need; untrained.
SMALL_CAUSAL: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 96,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "tie_word_embeddings": True,
}
SMALL_SEQ2SEQ: dict[str, Any] = {
    "model_type": "t5",
    "d_model": 96,
    "d_kv": 24,
    "d_ff": 192,
    "num_layers": 2,
    "num_heads": 4,
    "dropout_rate": 0.0,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
}


def _flushed(rows: np.ndarray, device: th.device) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
    """Return rows with their tokens at the right, where they are read from, their mask, and their lengths.

    :param rows: (n, width)
    :return: (n, longest), (n, longest) and (n,), of integers
    """
    tokens, lengths = flush_right(rows, 0)
    tensor, used = th.as_tensor(tokens, device=device).long(), th.as_tensor(lengths, device=device)
    return tensor, (th.arange(tensor.shape[1], device=device) >= tensor.shape[1] - used[:, None]).long(), used


def _with_arguments(kind: type[Kind]) -> type[Kind]:
    """Let ``help`` of a kind of policy describe the arguments, which are those of all."""
    if kind.__doc__ and LanguageModelPolicy.__doc__:  # python -OO leaves none
        about, general = (inspect.cleandoc(text) for text in (kind.__doc__, LanguageModelPolicy.__doc__))
        kind.__doc__ = f"{about}\n\n{general[general.index(':param') :]}"
    return kind


@_with_arguments
class CausalLMPolicy(LanguageModelPolicy):
    """A language model that continues its prompt, such as GPT-2 and Llama.

    Arguments say what to read (``model``, ``model_kwargs``), what to train (``lora``, ``frozen_layers``), how far it
    may go (``reference_kl_coef``, ``reference_kl_target``), and how tokens are chosen (``temperature``).
    """

    small_config = SMALL_CAUSAL
    auto_model = AutoModelForCausalLM

    def place(self, prompt: np.ndarray, response: np.ndarray) -> np.ndarray:
        places: np.ndarray = prompt + response - 1
        return places

    def read_sequences(self, lm: Any, rows: np.ndarray) -> th.Tensor:
        # Nothing to mask: what fills a row up stands behind its tokens, where they do not look.
        tokens, _ = flush_left(rows, 0)
        tensor = th.as_tensor(tokens, device=self.device).long()
        states: th.Tensor = lm.base_model(input_ids=tensor, use_cache=False).last_hidden_state
        return states

    def begin(self, rows: np.ndarray) -> tuple[th.Tensor, tuple[Memory, ...]]:
        tensor, mask, used = _flushed(rows, self.device)
        memory = Memory(growing_cache(), th.zeros(len(rows), dtype=th.long, device=self.device))
        # Positions count the row's own tokens; those before the first one are never looked at.
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        return self._append(memory, tensor, mask, positions, used)

    def proceed(self, memories: tuple[Memory, ...], tokens: th.Tensor) -> tuple[th.Tensor, tuple[Memory, ...]]:
        (memory,) = memories
        return self._append(memory, tokens[:, None], memory.mask(1), memory.lengths[:, None], 1)

    def _append(
        self, memory: Memory, tokens: th.Tensor, mask: th.Tensor, positions: th.Tensor, more: Any
    ) -> tuple[th.Tensor, tuple[Memory, ...]]:
        out = self.lm.base_model(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=memory.cache,
            use_cache=True,
        )
        return out.last_hidden_state[:, -1], (Memory(memory.cache, memory.lengths + more),)

    def skipped(self, n_prompt: int) -> int:
        return n_prompt


@_with_arguments
class Seq2SeqLMPolicy(LanguageModelPolicy):
    """A language model whose encoder reads the prompt and whose decoder writes the response, such as T5.

    The encoder reads a prompt with the end token behind it that the tokenizer writes behind texts, if it does.
    Its positions must be relative, as T5's are; absolute ones would need rows in step.
    """

    small_config = SMALL_SEQ2SEQ
    auto_model = AutoModelForSeq2SeqLM

    def _check_fit(self) -> None:
        super()._check_fit()
        config = self.lm.config
        if not hasattr(config, "relative_attention_num_buckets"):
            raise ArgumentError(
                f"Seq2SeqLMPolicy needs a model with relative positions (t5, mt5, umt5), not {config.model_type!r}."
            )
        if config.decoder_start_token_id is None:
            raise ArgumentError("The model's configuration has no `decoder_start_token_id`; T5's is its pad token.")

    def place(self, prompt: np.ndarray, response: np.ndarray) -> np.ndarray:
        return response

    def read_prompts(self, rows: np.ndarray) -> np.ndarray:
        """Return prompts with the tokenizer's end behind those that do not have it, (n, width + 1)."""
        end = self.action_space.kept_tokenizer.closing if isinstance(self.action_space, Vocabulary) else None
        if end is None:
            return rows
        last, _ = last_tokens(rows, 0)
        return np.column_stack([rows, np.where(last == end, EMPTY, end)])

    def _encode(self, lm: Any, rows: np.ndarray) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """States, (n, length, d), and mask of each row's prompt; each different prompt is read once."""
        prompts, which = np.unique(rows[:, : self.prompt_length], axis=0, return_inverse=True)
        tensor, mask, used = _flushed(self.read_prompts(prompts), self.device)
        states = lm.get_encoder()(input_ids=tensor, attention_mask=mask).last_hidden_state
        index = th.as_tensor(which.reshape(-1), device=self.device)
        return states[index], mask[index], used[index]

    def _decoder_input(self, lm: Any, rows: np.ndarray) -> np.ndarray:
        """Return the start token and the response, as rows of tokens."""
        start = np.full((len(rows), 1), lm.config.decoder_start_token_id)
        return np.concatenate([start, rows[:, self.prompt_length :]], axis=1)

    def read_sequences(self, lm: Any, rows: np.ndarray) -> th.Tensor:
        prompt, mask, _ = self._encode(lm, rows)
        tokens, _ = flush_left(self._decoder_input(lm, rows), 0)
        out = lm.get_decoder()(
            input_ids=th.as_tensor(tokens, device=self.device).long(),
            encoder_hidden_states=prompt,
            encoder_attention_mask=mask,
            use_cache=False,
        )
        states: th.Tensor = out.last_hidden_state
        return states

    def begin(self, rows: np.ndarray) -> tuple[th.Tensor, tuple[Memory, ...]]:
        prompt, prompt_mask, prompt_lengths = self._encode(self.lm, rows)
        tensor, mask, used = _flushed(self._decoder_input(self.lm, rows), self.device)
        cache = EncoderDecoderCache(growing_cache(), DynamicCache())
        out = self._decode(tensor, mask, prompt, prompt_mask, cache)
        return out, (Memory(cache.self_attention_cache, used), Memory(cache.cross_attention_cache, prompt_lengths))

    def proceed(self, memories: tuple[Memory, ...], tokens: th.Tensor) -> tuple[th.Tensor, tuple[Memory, ...]]:
        own, prompt = memories
        cache = EncoderDecoderCache(own.cache, prompt.cache)
        # The prompt's keys and values are in the cache; its states tell the decoder only their number.
        prompt_mask = prompt.mask()
        states = tokens.new_empty(*prompt_mask.shape, 0, dtype=th.float32)
        out = self._decode(tokens[:, None], own.mask(1), states, prompt_mask, cache)
        return out, (Memory(own.cache, own.lengths + 1), prompt)

    def _decode(
        self, tokens: th.Tensor, mask: th.Tensor, prompt: th.Tensor, prompt_mask: th.Tensor, cache: Any
    ) -> th.Tensor:
        out = self.lm.get_decoder()(
            input_ids=tokens,
            attention_mask=mask,
            encoder_hidden_states=prompt,
            encoder_attention_mask=prompt_mask,
            past_key_values=cache,
            use_cache=True,
        )
        hidden: th.Tensor = out.last_hidden_state[:, -1]
        return hidden

    def skipped(self, n_prompt: int) -> int:
        return 1  # the start token

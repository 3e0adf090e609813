"""Tiny language models, a tokenizer of letters, and tasks for them."""

from typing import Any

from sb3_pg.text import TextTask
from sb3_pg.text.tokenizers import word_tokenizer

LETTERS = list("abcdefgh")

GPT2 = {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "bos_token_id": None}
LLAMA = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
    "bos_token_id": None,
}
T5 = {
    "model_type": "t5",
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 24,
    "num_layers": 2,
    "num_heads": 2,
    "pad_token_id": 0,
    "decoder_start_token_id": 0,
}
SHAPES = {"gpt2": ("CausalLMPolicy", GPT2), "llama": ("CausalLMPolicy", LLAMA), "t5": ("Seq2SeqLMPolicy", T5)}


def count_a(prompts: list[str], completions: list[str], references: list[Any]) -> list[float]:
    """The share of letters a."""
    return [text.split().count("a") / 6 for text in completions]


def letters_task(**options: Any) -> TextTask:
    tokenizer = word_tokenizer(LETTERS)
    prompts = ["a b c", "d", "e f", "g h a b", "c d e"]
    return TextTask(**{"prompts": prompts, "reward": count_a, "tokenizer": tokenizer, "response_length": 6, **options})


def config_of(shape: str, task: TextTask, **more: Any) -> dict[str, Any]:
    config = SHAPES[shape][1]
    return {**config, "vocab_size": task.action_space.n, "eos_token_id": task.end_token, **more}

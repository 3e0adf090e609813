"""Tiny language models, a tokenizer of letters, tasks for them, and algorithms that learn them."""

from typing import Any

import numpy as np
import torch as th
from conftest import silent
from stable_baselines3.common.callbacks import BaseCallback
from tokenizers.processors import TemplateProcessing

from sb3_pg import PPO, TRPO
from sb3_pg.text import TextTask, TextVecEnv
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


def closing_tokenizer() -> Any:
    """Of letters, with an end behind every text, as T5's."""
    tokenizer = word_tokenizer(LETTERS)
    end = TemplateProcessing(single="$A <end>", special_tokens=[("<end>", tokenizer.eos_token_id)])
    tokenizer.backend_tokenizer.post_processor = end
    return tokenizer


class Infos(BaseCallback):
    """Keeps what environments tell."""

    def _init_callback(self) -> None:
        self.seen: list[dict[str, Any]] = []

    def _on_step(self) -> bool:
        self.seen += self.locals["infos"]
        return True


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


def make(
    shape: str,
    algorithm: Any = PPO,
    n_envs: int = 4,
    task: TextTask | None = None,
    policy_kwargs: dict[str, Any] | None = None,
    **options: Any,
) -> Any:
    """A model with weights large enough for its answers to differ, and a value head that is not zero."""
    task = task or letters_task()
    if algorithm is PPO:
        options = {"n_steps": 13, "batch_size": 16, "n_epochs": 2, **options}
    if algorithm is TRPO:
        options = {"n_steps": 13, "batch_size": 16, **options}
    kwargs = {"model": config_of(shape, task), "temperature": 0.7, **(policy_kwargs or {})}
    env = TextVecEnv(task, n_envs, seed=3)
    options = {"seed": 1, "gamma": 1.0, "device": "cpu", **options}
    model = algorithm(SHAPES[shape][0], env, policy_kwargs=kwargs, **options)
    sharpen(model.policy)
    return silent(model)


def sharpen(policy: Any) -> None:
    generator = th.Generator().manual_seed(0)
    for p in policy.parameters():
        if p.ndim > 1 and p.requires_grad:
            p.data += 0.2 * th.randn(p.shape, generator=generator).to(p.device)


def act(model: Any) -> tuple[np.ndarray, np.ndarray]:
    """Fill the rollout buffer; returns the log-probabilities and values that the cached states of acting gave."""
    policy, seen = model.policy, []

    def choose(hidden: th.Tensor, deterministic: bool = False, lengths: th.Tensor | None = None) -> th.Tensor:
        tokens = type(policy).choose(policy, hidden, deterministic, lengths)
        log_prob, _ = policy.token_statistics(hidden, tokens, lengths)
        seen.append((log_prob.cpu().numpy(), policy.value_head(hidden)[:, 0].cpu().numpy()))
        return tokens

    policy.choose = choose
    _, callback = model._setup_learn(1000)
    model.collect_rollouts(model.env, callback, model.rollout_buffer, model.n_steps)
    del policy.choose
    log_probs, values = zip(*seen, strict=True)
    return np.array(log_probs), np.array(values)

"""Tokenizers written in Python ("slow"): all works with them, but archives and other processes do not have them."""

import numpy as np
import pytest
from conftest import silent
from stable_baselines3.common.env_util import make_vec_env
from text_models import count_a
from transformers import AutoTokenizer, ByT5Tokenizer
from transformers.models.bert.tokenization_bert_legacy import BertTokenizerLegacy

from sb3_pg import PPO
from sb3_pg.common.errors import ArgumentError
from sb3_pg.text import ChatEnv, Reply, TextTask, TextVecEnv, evaluate_texts
from sb3_pg.text.supervised import pretrain

TEMPLATE = "{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}"
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "c", "##d", "tea", "?"]
KINDS = ["bert", "byt5"]


def tokenizer_of(kind, folder):
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    made = (
        ByT5Tokenizer(extra_ids=0) if kind == "byt5" else BertTokenizerLegacy(folder / "vocab.txt", eos_token="[SEP]")
    )
    made.chat_template = TEMPLATE
    assert not made.is_fast
    return made


def task_of(tokenizer):
    return TextTask(
        ["a b", "tea ?"], count_a, tokenizer, references=["tea", "a"], response_length=6, stop_strings=["ea", "b"]
    )


def learned(env):
    options = {"n_steps": 8, "batch_size": 16, "n_epochs": 1, "gamma": 1.0, "seed": 0, "device": "cpu"}
    kwargs = {"mask_truncated_completions": True}
    return silent(PPO("CausalLMPolicy", env, policy_kwargs=kwargs, **options)).learn(32)


@pytest.mark.parametrize("kind", KINDS)
def test_a_task_and_its_archive(kind, tmp_path):
    tokenizer = tokenizer_of(kind, tmp_path)
    task = task_of(tokenizer)
    model = learned(TextVecEnv(task, 4, seed=0))
    said = model.policy.generate(task.prompts)
    assert [record["completion"] for record in evaluate_texts(model.policy, task, do_sample=False)[1]] == said
    assert len(model.policy.generate([[{"role": "user", "content": "tea"}]])) == 1
    model.save(tmp_path / "model")
    loaded = PPO.load(tmp_path / "model", device="cpu")
    assert loaded.policy.action_space.kept_tokenizer.closing == tokenizer.eos_token_id  # of prompts for an encoder
    with pytest.raises(ArgumentError, match=r"no tokenizer .* policy\.tokenizer = AutoTokenizer\.from_pretrained"):
        loaded.policy.generate(task.prompts)
    assert evaluate_texts(loaded.policy, task, do_sample=False)[0]["score"] >= 0.0
    loaded.policy.tokenizer = tokenizer
    assert loaded.policy.generate(task.prompts) == said
    loaded = PPO.load(tmp_path / "model", env=TextVecEnv(task, 4), device="cpu")  # which has it
    assert loaded.policy.generate(task.prompts) == said
    loaded.learn(32)


@pytest.mark.parametrize("kind", KINDS)
def test_a_supervised_start_writes_it(kind, tmp_path):
    task = task_of(tokenizer_of(kind, tmp_path))
    folder = pretrain(task, tmp_path / "start", n_steps=1, batch_size=2)
    again = AutoTokenizer.from_pretrained(folder)
    assert np.array_equal(task_of(again).rows, task.rows)
    assert again.chat_template == TEMPLATE


class Chat(ChatEnv):
    def begin(self, rng):
        return Reply([{"role": "user", "content": "tea"}])

    def answer(self, text, state, messages):
        return Reply([{"role": "user", "content": "a ?"}], reward=float("a" in text))


@pytest.mark.parametrize("kind", KINDS)
def test_conversations(kind, tmp_path):
    options = {"tokenizer": tokenizer_of(kind, tmp_path), "prompt_length": 64, "response_length": 3, "max_turns": 2}
    model = learned(make_vec_env(Chat, 2, env_kwargs={**options, "stop_strings": ["b"]}))
    assert len(model.policy.generate([[{"role": "user", "content": "tea"}]])) == 1

"""Texts in, texts out: with the environment's tokenizer, which travels with archives, policies and folders."""

import copy
import json
import pickle
import subprocess
import sys
import zlib

import cloudpickle
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from text_models import LETTERS, SHAPES, act, closing_tokenizer, config_of, letters_task, make
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, ByT5Tokenizer

from sb3_pg import PPO
from sb3_pg.common.errors import ArgumentError
from sb3_pg.text import TextVecEnv, word_tokenizer
from sb3_pg.text.ends import texts_of
from sb3_pg.text.kept import KeptTokenizer
from sb3_pg.text.policies import CausalLMPolicy, Seq2SeqLMPolicy
from sb3_pg.text.prompts import prompt_rows
from sb3_pg.text.spaces import Vocabulary

TEMPLATE = "{% for m in messages %}{{ m['content'] }} {% endfor %}{% if add_generation_prompt %}h{% endif %}"
PROMPTS = ["a b c", "d", "g h a b"]


def with_template():
    task = letters_task()
    task.tokenizer.chat_template = TEMPLATE
    return task


@pytest.mark.parametrize("shape", SHAPES)
def test_texts_are_completed_as_rows_of_tokens_are(shape):
    model = make(shape)
    task = model.env.task
    expected = task.decode(model.policy.generate(task.observations()))
    assert model.policy.generate(task.prompts) == expected
    assert model.policy.generate(tuple(task.prompts[2:4])) == expected[2:4]
    assert model.policy.generate([]) == []
    assert len(set(expected)) > 1


def test_settings_are_those_of_rows():
    policy = make("llama").policy
    texts = policy.generate(PROMPTS, do_sample=True, num_return_sequences=20)
    assert len(texts) == 60 and len(set(texts[:20])) > 5
    assert all(set(text.split()) <= {*LETTERS, "<pad>", "<unknown>"} for text in texts)
    assert max(len(text.split()) for text in texts) == 6
    assert max(len(text.split()) for text in policy.generate(PROMPTS, do_sample=True, max_new_tokens=2)) == 2
    longer = policy.generate(PROMPTS, do_sample=True, num_return_sequences=20, max_new_tokens=20)
    assert 6 < max(len(text.split()) for text in longer) <= 20


def test_prompts_may_be_longer_than_those_of_training_but_not_than_the_window():
    model = make("gpt2")
    long = " ".join(LETTERS * 3)  # 24 tokens, of 4 that prompts have in training, and 32 of the window
    rows = prompt_rows(model.env.task.tokenizer, [long, "a"])
    assert rows.shape == (2, 24) and (rows[1] >= 0).sum() == 1
    assert model.policy.generate([long, "a"])[1] == model.policy.generate(["a"])[0]
    with pytest.raises(ArgumentError, match=r"Prompt 1 has 24 tokens and its response may have 9, .* window is 32"):
        model.policy.generate(["a", long], max_new_tokens=9)


def test_rows_of_tokens_are_those_of_the_environment():
    policy, task = make("gpt2").policy, letters_task()
    whole = policy.generate(task.observations())
    np.testing.assert_array_equal(policy.generate(task.rows), whole)  # without the columns of the response
    with pytest.raises(ArgumentError, match=r"must have 10 columns, as the environment's .* 4 of its prompts, not 8"):
        policy.generate(np.full((2, 8), 3))


def test_tokens_that_are_suppressed_are_not_written_where_the_vocabulary_is_padded():
    task = letters_task()
    tokens = [task.tokenizer.convert_tokens_to_ids(letter) for letter in "abcdef"]
    for n_more in (0, 1):
        config = config_of("gpt2", task, vocab_size=len(task.tokenizer) + n_more)
        policy = make("gpt2", policy_kwargs={"model": config}).policy
        assert set(" ".join(policy.generate(PROMPTS)).split()) & set("abcdef")
        said = policy.generate(PROMPTS, suppress_tokens=tokens, do_sample=True, num_return_sequences=20)
        assert not set(" ".join(said).split()) & set("abcdef") and any(said)


def test_many_texts_are_completed_in_parts(monkeypatch):
    policy = make("gpt2").policy
    expected = policy.generate(["a", "b c", "d", "e", "f g h"])
    monkeypatch.setattr("sb3_pg.text.generation.BATCH", 2)
    assert policy.generate(["a", "b c", "d", "e", "f g h"]) == expected


def test_conversations_go_through_the_template():
    model = make("llama", task=with_template())
    conversation = [{"role": "system", "content": "a b"}, {"role": "user", "content": "c"}]
    other = [{"role": "user", "content": "d"}]
    assert model.policy.generate([conversation, other]) == model.policy.generate(["a b c h", "d h"])


def test_coding():
    tokenizer = word_tokenizer(LETTERS)
    rows = prompt_rows(tokenizer, ["a b c", "d"])
    assert rows.tolist() == [[3, 4, 5], [-1, -1, 6]]
    assert texts_of(tokenizer, np.array([[3, 1, -1], [3, 4, 5], [1, -1, -1], [0, 2, 1]]), [1, 2]) == [
        "a",
        "a b c",
        "",
        "<pad> <unknown>",
    ]


@pytest.mark.parametrize(
    "prompts, message",
    [
        ("a b", r"Texts are given as a list: \['a b'\]"),
        ([{"role": "user", "content": "a"}], "Conversations are given as a list of them"),
        (["a", 3], "prompt 1 is neither"),
        (["a", ""], r"Prompt 1 \(''\) has no tokens"),
        (["a", "a z"], r"Prompt 1 \('a z'\) has what the tokenizer does not know: 'z'"),
        ([[{"role": "user", "content": "a"}]], "need a chat template"),
        ([["a"]], "integers, not"),
    ],
    ids=["text", "conversation", "number", "empty", "unknown", "no template", "words"],
)
def test_prompts_that_cannot_be_read_get_one_line(prompts, message):
    with pytest.raises(ArgumentError, match=message) as caught:
        make("gpt2").policy.generate(prompts)
    assert "\n" not in str(caught.value)


def test_predict_says_what_to_do_with_texts():
    model = make("gpt2")
    for texts in ("a", ["a"], np.array(["a"])):
        for predict in (model.predict, model.policy.predict):
            with pytest.raises(ArgumentError, match=r"Texts are for policy\.generate\(texts\)"):
                predict(texts)


# ------------------------------------------------------------------ its travels


def test_a_loaded_model_answers_in_a_new_process(tmp_path):
    model = make("gpt2", task=with_template())
    model.save(tmp_path / "model")
    model.policy.save(tmp_path / "policy.pt")
    conversation = [{"role": "user", "content": "a b"}]
    code = (
        "import json; from sb3_pg import PPO; from sb3_pg.text import CausalLMPolicy\n"
        f"model = PPO.load({str(tmp_path / 'model')!r}, device='cpu')\n"
        f"policy = CausalLMPolicy.load({str(tmp_path / 'policy.pt')!r}, device='cpu')\n"
        f"for p in (model.policy, policy): print(json.dumps(p.generate({PROMPTS!r}) + p.generate([{conversation!r}])))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    expected = [*model.policy.generate(PROMPTS), *model.policy.generate([conversation])]
    assert [json.loads(line) for line in done.stdout.splitlines()] == [expected, expected]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_copies_have_it(copied):
    policy = copied(make("gpt2").policy)
    assert policy.generate(["a"]) == make("gpt2").policy.generate(["a"])
    env = TextVecEnv(letters_task(), 2)
    assert copied(env.action_space).tokenizer("a b")["input_ids"] == [3, 4]


def test_the_tokenizer_that_is_made_again_is_the_same():
    tokenizer = word_tokenizer(LETTERS)
    tokenizer.chat_template = TEMPLATE
    tokenizer.padding_side = "left"
    tokenizer.add_special_tokens({"additional_special_tokens": ["<turn>"]})
    again = cloudpickle.loads(cloudpickle.dumps(KeptTokenizer(tokenizer))).live
    assert again is not tokenizer and len(again) == len(tokenizer) == 12
    assert again.get_vocab() == tokenizer.get_vocab()
    text = "a <turn> b z <end>"
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    ids = [3, 11, 1, 2]
    for skip in (False, True):
        assert again.decode(ids, skip_special_tokens=skip) == tokenizer.decode(ids, skip_special_tokens=skip)
    names = ("eos_token_id", "pad_token_id", "unk_token_id", "bos_token_id", "chat_template", "padding_side")
    assert [getattr(again, name) for name in names] == [getattr(tokenizer, name) for name in names]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_folder_is_all_that_transformers_needs(shape, tmp_path):
    """It says the same, greedily, with the ends that the environment has."""
    policy = make(shape, task=letters_task(end_tokens=["c"])).policy
    policy.save_pretrained(tmp_path)
    kind = AutoModelForSeq2SeqLM if shape == "t5" else AutoModelForCausalLM
    tokenizer, lm = AutoTokenizer.from_pretrained(tmp_path), kind.from_pretrained(tmp_path)
    assert said(lm, tokenizer, shape) == policy.generate(PROMPTS)


@pytest.mark.parametrize("shape", SHAPES)
def test_an_encoder_reads_the_end_that_its_tokenizer_writes(shape, tmp_path):
    """As transformers does with the saved folder, and in acting, judging and generating alike."""
    task = letters_task(tokenizer=closing_tokenizer())
    assert np.array_equal(task.rows, letters_task().rows)  # to continue them, they must not be at an end
    model = make(shape, task=task)
    policy, plain = model.policy, make(shape).policy
    log_probs, _ = act(model)
    np.testing.assert_allclose(log_probs, model.rollout_buffer.log_probs[: len(log_probs)], atol=1e-5)
    tokens = th.tensor([3, 4, 5, 6, 7])
    (own, others) = (its.evaluate_actions(task.observations(), tokens)[1].detach() for its in (policy, plain))
    assert (own - others).abs().max() > 0.1 if shape == "t5" else th.equal(own, others)

    policy.save_pretrained(tmp_path)
    kind = AutoModelForSeq2SeqLM if shape == "t5" else AutoModelForCausalLM
    tokenizer, lm = AutoTokenizer.from_pretrained(tmp_path), kind.from_pretrained(tmp_path)
    if shape == "t5":
        assert tokenizer("a b")["input_ids"] == [3, 4, task.end_token]
        assert said(lm, tokenizer, shape) == policy.generate(PROMPTS) != plain.generate(PROMPTS)
        with th.no_grad():
            start = th.zeros(1, 1, dtype=th.long)
            logits = lm(input_ids=tokenizer("a b c", return_tensors="pt").input_ids, decoder_input_ids=start).logits
        expected = (logits[0, -1] / policy.temperature).log_softmax(dim=-1)[tokens[0]]
        assert float(own[0]) == pytest.approx(float(expected), abs=1e-5)
    else:
        assert said(lm, word_tokenizer(LETTERS), shape) == policy.generate(PROMPTS)

    model.save(tmp_path / "model")
    assert PPO.load(tmp_path / "model", device="cpu").policy.generate(PROMPTS) == policy.generate(PROMPTS)


def test_a_prompt_has_one_end_by_the_tokenizer_that_is_set():
    task = letters_task()
    space = Vocabulary(task.action_space.n, task.end_token)
    policy = Seq2SeqLMPolicy(task.observation_space, space, lambda _: 0.0, model=config_of("t5", task))
    rows = np.array([[-1, -1, 3, 4], [-1, 3, 4, 1]])
    for tokenizer in (None, word_tokenizer(LETTERS), task.tokenizer):
        if tokenizer is not None:
            policy.tokenizer = tokenizer
        assert policy.read_prompts(rows) is rows
    policy.predict(task.observations())
    policy.tokenizer = closing_tokenizer()
    assert policy.read_prompts(rows).tolist() == [[-1, -1, 3, 4, 1], [-1, 3, 4, 1, -1]]
    observations = task.observations()
    observations[:, 4] = 3
    with th.no_grad():  # nothing of the prompts is remembered from before
        for hidden in (policy._decoder.read(observations), policy.hidden_states(observations)):
            np.testing.assert_allclose(hidden, policy.begin(observations)[0], rtol=1e-5, atol=1e-6)


def test_tokenizers_that_write_an_end():
    begins, unknown = word_tokenizer(LETTERS), word_tokenizer("b")
    begins.backend_tokenizer.post_processor = TemplateProcessing(single="<end> $A", special_tokens=[("<end>", 1)])
    unknown.eos_token = "<unknown>"
    assert begins("")["input_ids"] == [1] and unknown("a")["input_ids"] == [2] == [unknown.eos_token_id]
    for tokenizer in (word_tokenizer(LETTERS), begins, unknown):
        assert KeptTokenizer(tokenizer).closing is None
    for tokenizer in (closing_tokenizer(), ByT5Tokenizer()):  # the second is not in archives, but what it does
        kept = KeptTokenizer(tokenizer)
        assert kept.closing == 1
        for again in (copy.deepcopy(kept), pickle.loads(pickle.dumps(kept)), pickle.loads(pickle.dumps(kept))):
            assert again.closing == pickle.loads(pickle.dumps(again)).closing == 1


@pytest.mark.parametrize("shape", SHAPES)
def test_the_least_length_is_in_the_folder(shape, tmp_path):
    policy = make(shape, policy_kwargs={"min_new_tokens": 5}).policy
    with th.no_grad():  # a model that would end at once
        policy.lm.get_output_embeddings().weight[:] *= 0.0
        policy.lm.get_output_embeddings().weight[policy.end_token] += policy.hidden_states(
            letters_task().observations()
        ).mean(dim=0)
    policy.save_pretrained(tmp_path)
    kind = AutoModelForSeq2SeqLM if shape == "t5" else AutoModelForCausalLM
    tokenizer, lm = AutoTokenizer.from_pretrained(tmp_path), kind.from_pretrained(tmp_path)
    expected = policy.generate(PROMPTS)
    assert said(lm, tokenizer, shape) == expected
    assert all(len(text.split()) >= 5 for text in expected)


def said(lm, tokenizer, shape):
    texts = []
    for prompt in PROMPTS:
        asked = tokenizer(prompt, return_tensors="pt").input_ids
        told = lm.generate(asked)[0, 1 if shape == "t5" else asked.shape[1] :]
        told = [token for token in told.tolist() if token not in lm.generation_config.eos_token_id]
        texts.append(tokenizer.decode(told))
    return texts


@pytest.mark.parametrize("shape", SHAPES)
def test_the_folder_of_an_adapter_names_its_base(shape, tmp_path):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    make(shape).policy.save_pretrained(base)
    policy = make(shape, policy_kwargs={"model": str(base), "lora": {"r": 4}, "temperature": 1.0}).policy
    policy.save_pretrained(adapter)
    assert not any(path.name.startswith(("model", "pytorch_model")) for path in adapter.iterdir())
    kind = AutoModelForSeq2SeqLM if shape == "t5" else AutoModelForCausalLM
    tokenizer, lm = AutoTokenizer.from_pretrained(adapter), kind.from_pretrained(adapter)
    lm.generation_config = type(lm.generation_config).from_pretrained(adapter)
    assert said(lm, tokenizer, shape) == policy.generate(PROMPTS)
    with policy.language_model.disable_adapter():
        assert said(lm, tokenizer, shape) != policy.generate(PROMPTS)


def test_an_archive_keeps_all_end_tokens(tmp_path):
    task = letters_task(end_tokens=["c"])
    model = make("gpt2", task=task)
    model.save(tmp_path / "model")
    loaded = PPO.load(tmp_path / "model", env=model.env)
    assert loaded.policy.end_tokens == model.policy.end_tokens == [task.end_token, 5]


def test_a_tokenizer_can_be_given_later(tmp_path):
    task = letters_task()
    space = Vocabulary(task.action_space.n, task.end_token)
    policy = CausalLMPolicy(task.observation_space, space, lambda _: 0.0, model=config_of("gpt2", task))
    with pytest.raises(ArgumentError, match=r"no tokenizer .* policy\.tokenizer = AutoTokenizer\.from_pretrained"):
        policy.generate(["a"])
    with pytest.raises(ArgumentError, match="`tokenizer` has 4 tokens, but the policy 11"):
        policy.tokenizer = word_tokenizer("a")
    with pytest.raises(ArgumentError, match="must be a Hugging Face tokenizer, not 'gpt2'"):
        policy.tokenizer = "gpt2"
    policy.tokenizer = task.tokenizer
    assert policy.generate(["a"]) == task.decode(policy.generate(prompt_observation(task, "a")))
    policy.save(tmp_path / "policy.pt")
    assert CausalLMPolicy.load(tmp_path / "policy.pt", device="cpu").generate(["a"]) == policy.generate(["a"])


def prompt_observation(task, text):
    row = np.full((1, task.width + task.response_length), -1)
    row[0, task.width - 1] = task.tokenizer(text)["input_ids"][0]
    return row


def test_actions_without_a_vocabulary_have_none():
    task = letters_task()
    policy = CausalLMPolicy(task.observation_space, spaces.Discrete(11), lambda _: 0.0, model=config_of("gpt2", task))
    with pytest.raises(ArgumentError, match=r"Vocabulary\(n, end_token, tokenizer=\.\.\.\)"):
        policy.generate(["a"])
    with pytest.raises(ArgumentError, match=r"belongs to actions of a Vocabulary, not Discrete\(11\)"):
        policy.tokenizer = task.tokenizer


def test_tokenizers_in_python_stay_in_their_process():
    space = Vocabulary(384, 1, tokenizer=ByT5Tokenizer())
    assert copy.deepcopy(space).tokenizer("a")["input_ids"] == [100, 1]
    assert pickle.loads(pickle.dumps(space)).tokenizer is None


@pytest.mark.parametrize("packed", [b"nothing", zlib.compress(b"{}"), zlib.compress(b" " * 10_000)], ids=str)
def test_damaged_tokenizers_are_named(packed, monkeypatch):
    monkeypatch.setattr("sb3_pg.text.kept.LARGEST_TEXT", 5_000)
    with pytest.raises(ArgumentError, match="The tokenizer of the archive cannot be read"):
        KeptTokenizer(packed=packed).live  # noqa: B018

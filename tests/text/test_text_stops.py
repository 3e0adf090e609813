"""Stop strings: environments, generation, archives, figures and the loss end responses by one rule."""

import copy
import json
import pickle

import numpy as np
import pytest
from gymnasium import spaces
from text_models import LETTERS, SHAPES, Infos, config_of, letters_task, make, sharpen
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from sb3_pg import PPO
from sb3_pg.common.errors import ArgumentError
from sb3_pg.text import TextVecEnv, evaluate_texts, word_tokenizer
from sb3_pg.text.engine import TextEngine
from sb3_pg.text.policies import CausalLMPolicy
from sb3_pg.text.spaces import Vocabulary, vocabulary_of
from sb3_pg.text.supervised import examples

STOPS = ["d a", "b b d"]


def pieces_tokenizer():
    """Tokens of several letters, so that stop strings begin and end within them."""
    pairs = ["ab", "cd", "efg", "h a", "ga"]
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<end>", *LETTERS, " ", *pairs])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>")


def acted(model, task):
    """What the environment says of greedy answers to all prompts, step by step."""
    env = TextVecEnv(task, len(task.prompts), in_order=True)
    observations, found = env.reset(), {}
    while len(found) < len(task.prompts):
        actions, _ = model.predict(observations, deterministic=True)
        observations, _, dones, infos = env.step(actions)
        for i in np.flatnonzero(dones):
            found.setdefault(int(i), infos[i])
    return [found[i] for i in range(len(task.prompts))]


def stopping(shape, tokenizer):
    """A model and a task some of whose greedy answers have a stop string in their midst."""
    texts = make(shape, task=letters_task(tokenizer=tokenizer)).policy.generate(letters_task().prompts)
    longest = sorted(set(texts), key=len)[-3:]
    stops = [text[len(text) // 2 - 2 : len(text) // 2 + 1] for text in longest if len(text) > 3]
    task = letters_task(tokenizer=tokenizer, stop_strings=stops)
    return make(shape, task=task), task, texts


@pytest.mark.parametrize("tokenizer", [word_tokenizer(LETTERS), pieces_tokenizer()], ids=["words", "pieces"])
@pytest.mark.parametrize("shape", SHAPES)
def test_generate_says_what_the_environment_gives_step_by_step(shape, tokenizer):
    model, task, whole = stopping(shape, tokenizer)
    infos = acted(model, task)
    expected = [info["completion"] for info in infos]
    rows = np.array([info["terminal_observation"][task.width :] for info in infos])
    assert expected != whole and all(a.startswith(b) for a, b in zip(whole, expected, strict=True))
    assert model.policy.generate(task.prompts) == expected
    assert np.array_equal(model.policy.generate(task.observations()), rows)
    assert [record["completion"] for record in evaluate_texts(model.policy, task, do_sample=False)[1]] == expected
    beams = model.policy.generate(task.observations(), num_beams=3, num_return_sequences=2)
    assert np.array_equal(task.cut(beams), beams)


def test_a_stop_string_does_not_begin_in_the_prompt():
    """Transformers' own rule would end a response at its first token."""
    model = make("gpt2")
    (text,) = model.policy.generate(["a b"])
    first, second = text.split()[:2]
    stop = [f"b {first}", f"{first} {second}"]
    assert model.policy.generate(["a b"], stop_strings=stop) == [f"{first} {second}"]


def test_stop_strings_may_be_given_to_generate():
    plain, policy = make("gpt2").policy, make("gpt2", task=letters_task(stop_strings=["zzz"])).policy
    (text,) = plain.generate(["a b"], max_new_tokens=10)
    first, second = text.split()[:2]
    for its in (plain, policy):
        assert its.generate(["a b"], stop_strings=[f"{first} {second}"]) == [f"{first} {second}"]
        assert its.generate(["a b"], stop_strings=first) == [first]
        assert its.generate(["a b"], stop_strings=None, max_new_tokens=10) == [text]
        assert its.generate(["a b"], stop_strings=[], tokenizer=word_tokenizer(LETTERS)) == plain.generate(["a b"])
        word = next(word for word in text.split() if word != first)
        number, before = word_tokenizer(LETTERS).convert_tokens_to_ids(word), text.partition(f" {word}")[0]
        assert its.generate(["a b"], eos_token_id=number) == [before]
        assert its.generate(["a b"], eos_token_id=[number, 1], max_new_tokens=10) == [before]
    with pytest.raises(ArgumentError, match=r"`stop_strings` must be a list of texts that are not empty, not \[''\]"):
        plain.generate(["a b"], stop_strings=[""])
    with pytest.raises(ArgumentError, match="`tokenizer` must be a Hugging Face tokenizer, not 'gpt2'"):
        plain.generate(["a b"], stop_strings=["a"], tokenizer="gpt2")


def test_without_a_tokenizer_there_is_one_line():
    task = letters_task(stop_strings=["a"])
    space = Vocabulary(task.action_space.n, task.end_token, stop_strings=["a"])
    policy = CausalLMPolicy(task.observation_space, space, lambda _: 0.0, model=config_of("gpt2", task))
    with pytest.raises(ArgumentError, match="The policy has no tokenizer"):
        policy.generate(task.observations())
    assert evaluate_texts(policy, task, do_sample=False)[0]["length"] > 0


# ------------------------------------------------------------------ its travels


def test_archives_and_copies_keep_them(tmp_path):
    task = letters_task(stop_strings=STOPS)
    model = make("gpt2", task=task)
    expected = model.policy.generate(task.prompts)
    assert expected != make("gpt2").policy.generate(task.prompts)
    model.save(tmp_path / "model")
    model.policy.save(tmp_path / "policy.pt")
    loaded = PPO.load(tmp_path / "model", device="cpu")
    for policy in (
        loaded.policy,
        CausalLMPolicy.load(tmp_path / "policy.pt", device="cpu"),
        copy.deepcopy(model.policy),
        pickle.loads(pickle.dumps(model.policy)),
    ):
        assert policy.stop_strings == tuple(STOPS)
        assert policy.generate(task.prompts) == expected
    assert repr(loaded.action_space) == f"Vocabulary(11, end_token=1, stop_strings={tuple(STOPS)})"


def test_older_archives_have_none_but_those_of_the_environment_that_goes_on(tmp_path, monkeypatch):
    task = letters_task(stop_strings=STOPS)
    model = make("gpt2", task=task)
    expected = model.policy.generate(task.prompts)
    del model.action_space.stop_strings
    assert pickle.loads(pickle.dumps(model.action_space)).stop_strings == ()
    model.save(tmp_path / "model")
    assert PPO.load(tmp_path / "model", device="cpu").policy.stop_strings == ()
    loaded = PPO.load(tmp_path / "model", env=TextVecEnv(letters_task(stop_strings=STOPS), 4), device="cpu")
    assert loaded.policy.generate(task.prompts) == expected
    model.set_env(TextVecEnv(letters_task(stop_strings=["h"]), 4))
    assert model.policy.stop_strings == ("h",) and model.action_space is model.policy.action_space


def test_only_spaces_that_tell_more_become_the_environments():
    model = PPO("MlpPolicy", "CartPole-v1", n_steps=8, batch_size=8)
    own = model.action_space
    model.set_env(model.env)
    assert model.action_space is model.policy.action_space is own and type(own) is spaces.Discrete


@pytest.mark.parametrize("strings", ["a", ("a", 3), ("",), 3])
def test_archives_with_other_things_in_their_place_are_refused(strings):
    with pytest.raises(ArgumentError, match="`stop_strings` must be a list of texts"):
        vocabulary_of({"n": 3, "end_token": 1, "stop_strings": strings})


def test_a_folder_has_them_for_transformers(tmp_path):
    model, task, _ = stopping("gpt2", pieces_tokenizer())  # transformers cannot look for strings with whole words
    policy = model.policy
    policy.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "generation_config.json").read_text())["stop_strings"] == task.stop_strings
    tokenizer, lm = AutoTokenizer.from_pretrained(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)
    for prompt in task.prompts:
        asked = tokenizer(prompt, return_tensors="pt").input_ids
        told = lm.generate(asked, tokenizer=tokenizer)[0, asked.shape[1] :].tolist()
        assert [tokenizer.decode([token for token in told if token != 1])] == policy.generate([prompt])


# ---------------------------------------------------------- learning, figures


def of_longest(model):
    """Numbers of the stretches that reach the greatest length, and the last token of each."""
    rollout = model.rollout
    rows, actions = np.asarray(rollout.column("observations")), rollout.column("actions").ravel()
    length = (rows[:, model.policy.prompt_length :] >= 0).sum(axis=1)
    longest = rollout.dones.ravel() & (length == 5)
    return rollout.stretches.numbers.ravel()[longest], actions[longest]


def test_a_response_that_stops_at_its_greatest_length_is_not_cut_short(monkeypatch):
    monkeypatch.setattr("sb3_pg.text.engine.ROWS", 7)
    task = letters_task(stop_strings=["a", "c d"])
    model = make("gpt2", task=task, n_envs=16, n_steps=60, policy_kwargs={"mask_truncated_completions": True})
    _, callback = model._setup_learn(10_000, Infos())
    model.collect_rollouts(model.env, callback, model.rollout_buffer, model.n_steps)
    infos = [info for info in callback.seen if "completion" in info]
    engine = model.network
    assert isinstance(engine, TextEngine)
    numbers, last = of_longest(model)
    a = task.tokenizer.convert_tokens_to_ids("a")
    assert (last == a).any()
    truncated = np.unique(model.rollout.stretches.numbers.ravel()[engine._are_cut_short(model.rollout)])
    assert not np.isin(numbers[(last == a) | (last == 1)], truncated).any()
    assert len(truncated) == sum(not info["ended"] for info in infos) > 0
    weight = np.asarray(engine.batch(model.rollout).weight)
    assert 0 < weight.mean() < 1
    assert model.logger.name_to_value["text/ended"] == pytest.approx(np.mean([info["ended"] for info in infos]))


def test_figures_count_turns_that_end_by_a_stop_string():
    from test_text_conversation import echo

    model = PPO(
        "CausalLMPolicy",
        echo(stop_strings=["a", "b", "c", "d"]),
        n_steps=64,
        batch_size=64,
        gamma=1.0,
        seed=0,
        policy_kwargs={"temperature": 2.0},
    )
    sharpen(model.policy)
    _, callback = model._setup_learn(1000, Infos())
    model.collect_rollouts(model.env, callback, model.rollout_buffer, 64)
    infos = callback.seen
    turns = [number for number, info in enumerate(infos) if "completion" in info]
    ended = [infos[number]["ended"] for number in turns]
    assert len(turns) > 5 and np.mean(ended) > 0
    assert model.logger.name_to_value["text/ended"] == pytest.approx(np.mean(ended))
    assert model.logger.name_to_value["text/response_length"] == pytest.approx((turns[-1] + 1) / len(turns))


def test_a_supervised_start_imitates_what_the_environment_would_show():
    task = letters_task(prompts=["a", "b"], examples=[["b c", "b c d"], "b d"], stop_strings=["b c"])
    b, c, d = task.tokenizer.convert_tokens_to_ids(list("bcd"))
    expected = [[b, c, -1, -1, -1, -1], [b, c, -1, -1, -1, -1], [b, d, task.end_token, -1, -1, -1]]
    assert examples(task)[:, task.width :].tolist() == expected


def test_turns_to_imitate_end_as_those_that_are_acted():
    from test_text_conversation import echo, message

    env = echo(stop_strings=["b"])
    talk = [message(role, text) for role, text in zip(["user", "assistant"] * 2, ["a", "a b", "c", "c"], strict=True)]
    first, second = env.turns_of([talk])
    a, b, c = env.tokenizer.convert_tokens_to_ids(list("abc"))
    assert first[40:].tolist() == [a, b, -1, -1] and second[40:].tolist() == [c, env.turn_end, -1, -1]
    said, after = first[first >= 0].tolist(), second[:40][second[:40] >= 0].tolist()
    assert after[: len(said) + 1] == [*said, env.turn_end]  # the template writes its own end behind the stop

"""Prompts as texts, messages and data sets; stop strings."""

import pickle
from pathlib import Path

import numpy as np
import pytest
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.evaluation import evaluate_policy
from text_models import LETTERS, config_of, count_a, letters_task
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from sb3_pg import PPO, REINFORCE
from sb3_pg.common.errors import ArgumentError
from sb3_pg.text import TextEnv, TextEvalCallback, TextTask, TextVecEnv, best_of_n, evaluate_texts, word_tokenizer
from sb3_pg.text.chat import continuation, turn_end
from sb3_pg.text.evaluation import table
from sb3_pg.text.supervised import examples, train

#: As most chat templates are: a start token, roles, and a token of its own at the end of each turn.
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %} <{{ m.role }}> {{ m.content }} <turn>{% endfor %}"
    "{% if add_generation_prompt %} <assistant>{% endif %}"
)


def chat_tokenizer(template=TEMPLATE):
    tokenizer = word_tokenizer([*LETTERS, "<start>", "<turn>", "<user>", "<assistant>", "<system>"])
    tokenizer.add_special_tokens({"bos_token": "<start>", "additional_special_tokens": ["<turn>"]})
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<start> $A", special_tokens=[("<start>", tokenizer.bos_token_id)]
    )
    tokenizer.chat_template = template
    return tokenizer


def user(text):
    return [{"role": "user", "content": text}]


CHATS = [user("a b"), [{"role": "system", "content": "c"}, *user("d")], user("e")]


def chat_task(**options):
    return letters_task(**{"tokenizer": chat_tokenizer(), "prompts": CHATS, **options})


def words(task, row):
    return task.tokenizer.convert_ids_to_tokens([int(token) for token in row if token >= 0])


def test_messages_are_written_by_the_chat_template():
    task = chat_task()
    assert words(task, task.rows[0]) == ["<start>", "<user>", "a", "b", "<turn>", "<assistant>"]
    assert words(task, task.rows[1]) == ["<start>", "<system>", "c", "<turn>", "<user>", "d", "<turn>", "<assistant>"]
    turn = task.tokenizer.convert_tokens_to_ids("<turn>")
    assert task.action_space.end_tokens == (1, turn)
    assert task.answer_end == turn


@pytest.mark.parametrize("kind", [TextEnv, TextVecEnv])
def test_the_end_of_a_turn_ends_a_response(kind):
    task = chat_task(missing_end_penalty=9.0)
    env = kind(task) if kind is TextEnv else kind(task, 1, in_order=True)
    env.reset(**({"options": {"prompt": 0}} if kind is TextEnv else {}))
    for word in ("a", "<turn>"):
        action = task.tokenizer.convert_tokens_to_ids(word)
        _, reward, done, *_, info = env.step(action if kind is TextEnv else [action])
    info = info if kind is TextEnv else info[0]
    assert done and info["ended"] and info["prompt"] == CHATS[0] and info["completion"] == "a"
    assert reward == pytest.approx(1 / 6)


def test_a_template_without_a_token_for_the_end_of_a_turn():
    template = TEMPLATE.replace("<turn>", ". .")
    tokenizer = word_tokenizer([*LETTERS, "<user>", "<assistant>", "<system>", "."])
    tokenizer.chat_template = template
    assert turn_end(tokenizer) is None
    task = letters_task(prompts=CHATS, tokenizer=tokenizer)
    assert task.action_space.end_tokens == (1,) and task.answer_end == 1


def test_what_stands_between_two_turns():
    tokenizer = chat_tokenizer()
    turn, a = tokenizer.convert_tokens_to_ids(["<turn>", "a"])

    def between(last):
        return tokenizer.convert_ids_to_tokens(continuation(tokenizer, user("b c"), last))

    expected = ["<user>", "b", "c", "<turn>", "<assistant>"]
    assert between(turn) == expected
    assert between(a) == ["<turn>", *expected]  # which the model has not written


#: Forms of the templates of well-known models: what begins a text, surrounds a message, and begins an answer.
FORMS = {
    "chatml": ("", "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n", "<|im_start|>assistant\n", "<|im_end|>"),
    "headers": (
        "<s>",
        "<|h|>{{ m.role }}<|/h|>\n\n{{ m.content | trim }}<|eot|>",
        "<|h|>assistant<|/h|>\n\n",
        "<|eot|>",
    ),
    "inst": (
        "<s>",
        "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content | trim }}</s>{% endif %}",
        "",
        "</s>",
    ),
    "lines": ("", "{{ m.role }}: {{ m.content }}\n", "assistant:", None),
}


def byte_tokenizer(form):
    """Byte pairs, as most models have, with special tokens of the templates above."""
    start, around, beginning, _ = FORMS[form]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["</s>", "<s>", "<|im_start|>", "<|im_end|>", "<|h|>", "<|/h|>", "<|eot|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(["user assistant tool what is the time now it is ten past ten"] * 5, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    made.chat_template = (
        f"{start}{{% for m in messages %}}{around}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{beginning}{{% endif %}}"
    )
    return made


@pytest.mark.parametrize("form", FORMS)
def test_turns_by_the_templates_of_well_known_models(form):
    """What is put together turn by turn is what the template writes of the whole conversation."""
    tokenizer, end = byte_tokenizer(form), FORMS[form][-1]
    number = turn_end(tokenizer)
    assert number == (None if end is None else tokenizer.convert_tokens_to_ids(end))
    question, answer = {"role": "user", "content": "what is the time?"}, {"role": "assistant", "content": "It is ten."}
    first = tokenizer.apply_chat_template([question], add_generation_prompt=True, return_dict=False)
    written = tokenizer(" It is ten." if form in ("inst", "lines") else "It is ten.")["input_ids"]
    written += [] if number is None else [number]
    more = continuation(tokenizer, [question], written[-1])
    whole = [question, answer, question]
    assert [*first, *written, *more] == tokenizer.apply_chat_template(
        whole, add_generation_prompt=True, return_dict=False
    )


@pytest.mark.parametrize(
    "options, message",
    [
        ({"prompts": [[]]}, r"Prompt 0 must be a list of messages with 'role' and 'content', not \[\]"),
        ({"prompts": user("a")}, r"must be a list of conversations, not the messages of one. Pass \[messages\]"),
        ({"prompts": [user("a"), "b"]}, "must be lists of messages, as the first is, but prompt 1 is 'b'"),
        ({"prompts": ["b", user("a")]}, r"must be texts, but prompt 1 is \[{'role'"),
        ({"prompts": [user("a"), user("  ")]}, "Prompt 1 has an empty message of the role 'user'"),
        ({"prompts": [[{"role": "user"}]]}, r"Prompt 0 has the message {'role': 'user'}: .* must be texts"),
        ({"prompts": [user("a"), 3]}, "Prompt 1 must be a list of messages"),
        ({"prompts": [[*user("a"), {"role": "assistant", "content": "b"}]]}, "ends with a message of the assistant"),
        ({"prompts": [user("a zebra")]}, "has what the tokenizer does not know: 'zebra'"),
        (
            {"tokenizer": word_tokenizer(LETTERS)},
            "need a chat template, but the .* has none. Use .* set tokenizer.chat_template",
        ),
        (
            {"tokenizer": chat_tokenizer("{{ raise_exception('roles must alternate') }}")},
            "does not take a conversation of user: roles must alternate",
        ),
        ({"prompts": None}, "`prompts` must be a list of texts, .* not NoneType None"),
        ({"prompts": {"prompt": ["a"]}}, "`prompts` must be a list of texts, of lists of messages, .* not dict"),
        ({"references": 3}, "`references` must be a list of texts, not int 3"),
        ({"stop_strings": "a"}, "`stop_strings` must be a list of texts that are not empty, not 'a'"),
        ({"stop_strings": [""]}, "`stop_strings` must be a list of texts"),
        ({"end_tokens": "<turn>"}, "`end_tokens` must be a list of tokens, not one text"),
        ({"prompt_length": 0}, "`prompt_length` must be a whole number >= 1"),
    ],
)
def test_prompts_that_cannot_work_are_named_in_one_line(options, message):
    with pytest.raises(ArgumentError, match=message) as error:
        chat_task(**options)
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------ data sets


def dataset(**columns):
    return pytest.importorskip("datasets").Dataset.from_dict(columns)


def test_a_data_set_brings_all_that_belongs_to_a_prompt():
    data = dataset(prompt=["a", "b c"], reference=["c", "d"], completion=["e", "f"], level=[1, 2])
    task = letters_task(prompts=data)
    assert (task.prompts, task.references, task.examples) == (["a", "b c"], ["c", "d"], ["e", "f"])
    assert task.columns == {"level": [1, 2]}
    task = letters_task(prompts=dataset(prompt=["a"], completion=["e"]))
    assert (task.references, task.examples) == (["e"], ["e"])
    task = letters_task(prompts=dataset(prompt=["a"]))
    assert (task.references, task.examples, task.columns) == (None, None, {})
    assert pickle.loads(pickle.dumps(task)).prompts == ["a"]


def test_a_data_set_of_conversations():
    answers = [[{"role": "assistant", "content": text}] for text in "abc"]
    task = chat_task(prompts=dataset(prompt=[user("a"), user("b"), user("c")], completion=answers))
    plain = chat_task(prompts=[user("a"), user("b"), user("c")], references=list("abc"))
    assert np.array_equal(task.rows, plain.rows)
    assert task.references == task.examples == list("abc")
    assert words(task, examples(task)[0]) == ["<start>", "<user>", "a", "<turn>", "<assistant>", "a", "<turn>"]


def test_data_sets_that_cannot_work():
    datasets = pytest.importorskip("datasets")
    data = dataset(question=["a"])
    with pytest.raises(ArgumentError, match="without a column 'prompt'; it has 'question'"):
        letters_task(prompts=data)
    with pytest.raises(ArgumentError, match=r"not a DatasetDict. Pass one of its splits, such as data\['test'\]"):
        letters_task(prompts=datasets.DatasetDict({"test": data}))
    with pytest.raises(ArgumentError, match="not a IterableDataset"):
        letters_task(prompts=data.to_iterable_dataset())
    with pytest.raises(ArgumentError, match="come from the columns of the data set"):
        letters_task(prompts=dataset(prompt=["a"]), references=["b"])
    with pytest.raises(ArgumentError, match="must be texts, but prompt 1 is None"):
        letters_task(prompts=dataset(prompt=["a", None]))


# --------------------------------------------------------------- stop strings


@pytest.mark.parametrize("kind", [TextEnv, TextVecEnv])
def test_a_stop_string_ends_a_response(kind):
    seen = []

    def reward(prompts, completions, references):
        seen.extend(completions)
        return [1.0] * len(prompts)

    task = letters_task(reward=reward, stop_strings=["b c", "h"], missing_end_penalty=0.5)
    env = kind(task) if kind is TextEnv else kind(task, 1)
    for text, ends in (("a b c", True), ("c b a h", True), ("b b b b b b", False), ("a a a a a h", True)):
        env.reset()
        for word in text.split():
            action = task.tokenizer.convert_tokens_to_ids(word)
            _, reward_, done, *_, info = env.step(action if kind is TextEnv else [action])
        info = info if kind is TextEnv else info[0]
        assert (done, info["ended"], info["completion"]) == (True, ends, text)
        assert reward_ == pytest.approx(1.0 if ends else 0.5)
    assert seen == ["a b c", "c b a h", "b b b b b b", "a a a a a h"]


def test_responses_of_generate_are_cut_at_their_first_stop():
    task = letters_task(stop_strings=["b c"])
    a, b, c = task.tokenizer.convert_tokens_to_ids(["a", "b", "c"])
    rows = np.array([[a, b, c, a, b, c], [a, c, b, 1, -1, -1], [b, c, 1, -1, -1, -1], [a] * 6])
    expected = [[a, b, c, -1, -1, -1], [a, c, b, 1, -1, -1], [b, c, -1, -1, -1, -1], [a] * 6]
    assert task.cut(rows).tolist() == expected
    assert task.have_ended(task.cut(rows)).tolist() == [True, True, True, False]


def test_those_at_rest_after_a_stop_string_are_over_for_the_policy():
    """Else they would be acted on, and their tokens would count in the KL."""
    task = letters_task(stop_strings=["a b", "g", "h"])
    env = TextVecEnv(task, 16, seed=0)
    kwargs = {"model": config_of("gpt2", task), "reference_kl_coef": 0.0}
    model = REINFORCE("CausalLMPolicy", env, n_episodes=16, n_critic_updates=0, gamma=1.0, seed=0, policy_kwargs=kwargs)
    _, callback = model._setup_learn(100)
    model.collect_rollouts(env, callback, model.rollout_buffer, model.n_steps)
    keep, rollout = model.horizon.keep(model.rollout), model.rollout
    assert not keep.all()
    over = model.policy.is_over(rollout.column("observations")).reshape(keep.shape)
    assert np.array_equal(over, ~keep)
    lengths = keep.sum(axis=0)
    log = model.logger.name_to_value
    assert log["text/response_length"] == pytest.approx(lengths.mean())
    last = model.rollout_buffer.actions[lengths - 1, np.arange(16), 0]
    stops = task.tokenizer.convert_tokens_to_ids(list("gh"))
    texts = [
        task.tokenizer.decode(x[:n, 0])
        for x, n in zip(model.rollout_buffer.actions.swapaxes(0, 1), lengths, strict=True)
    ]
    stopped = [any(stop in text for stop in task.stop_strings) for text in texts]
    assert log["text/ended"] == pytest.approx(np.mean((last == 1) | stopped))
    assert np.isin(last, stops).any() and (lengths == 6).any()


# ------------------------------------------------------- training, evaluation


def learner(task, algorithm=PPO, n_envs=8, **options):
    if algorithm is PPO:
        options = {"n_steps": 16, "batch_size": 64, "n_epochs": 2, **options}
    config = config_of("llama", task, eos_token_id=list(task.action_space.end_tokens))
    return algorithm(
        "CausalLMPolicy",
        TextVecEnv(task, n_envs, seed=0),
        gamma=1.0,
        seed=0,
        policy_kwargs={"model": config},
        **options,
    )


def test_supervised_start_and_evaluation_of_chats(tmp_path):
    task = chat_task(references=["a", "b", "c"], stop_strings=["h"])
    model = learner(task)
    train(model.policy, task, n_steps=60, learning_rate=1e-2)
    figures, records = evaluate_texts(model.policy, task, do_sample=False)
    assert figures["exact_match"] == 1.0
    assert [record["completion"] for record in records] == ["a", "b", "c"]
    assert "| user: a b | a | a | 0.17 |" in table(records)
    callback = TextEvalCallback(task, eval_freq=16, log_path=tmp_path)
    model.learn(128, callback=callback)
    assert len(callback.history) == 2
    assert "user: a b" in Path(tmp_path / "texts.md").read_text()


@pytest.mark.parametrize("make_task", [chat_task, letters_task])
def test_sb3s_evaluation(make_task, tmp_path):
    task = make_task()
    model, env = learner(task), TextVecEnv(task, 4, in_order=True)
    rewards, lengths = evaluate_policy(model, env, 8, deterministic=False, return_episode_rewards=True)
    assert len(rewards) == 8 and all(1 <= n <= 6 for n in lengths) and all(0 <= r <= 1 for r in rewards)
    callback = EvalCallback(TextVecEnv(task, 4), eval_freq=8, n_eval_episodes=4, log_path=str(tmp_path))
    model.learn(128, callback=callback)
    assert len(callback.evaluations_results) == 2


def test_the_same_prompt_as_text_and_as_messages_is_the_same_to_the_policy():
    tokenizer = chat_tokenizer()
    texts = [tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) for chat in CHATS]
    assert np.array_equal(chat_task().rows, chat_task(prompts=texts).rows)


def test_prompts_without_a_data_set_need_no_datasets(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "datasets", None)
    task = TextTask(["a"], count_a, word_tokenizer(LETTERS))
    assert task.rows.shape == (1, 1)


def test_prompts_may_be_a_column_of_a_data_set():
    data = dataset(prompt=["a", "b c"], answer=["c", "d"], level=[1, 2])
    task = letters_task(prompts=data["prompt"], references=data["answer"], columns={"level": data["level"]})
    assert (task.prompts, task.references, task.columns) == (["a", "b c"], ["c", "d"], {"level": [1, 2]})
    policy = learner(task).policy
    expected = policy.generate(["a", "b c"])
    for prompts in (data["prompt"], data, iter(["a", "b c"]), np.array(["a", "b c"])):
        assert policy.generate(prompts) == expected
    texts, rewards = best_of_n(policy, data["prompt"], count_a, n=2, references=data["answer"])
    assert len(texts) == len(rewards) == 2

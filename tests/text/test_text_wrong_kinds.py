"""One clear line for what is of the wrong kind: tasks, policies, metrics, references, pairs."""

import numpy as np
import pytest
import torch as th
from stable_baselines3.common.callbacks import EvalCallback
from test_text_conversation import echo
from text_models import letters_task, make

from sb3_pg import PPO
from sb3_pg.common.errors import ArgumentError
from sb3_pg.text import TextEnv, TextEvalCallback, TextVecEnv, best_of_n, evaluate_texts, metrics, word_tokenizer
from sb3_pg.text.raters import export_pairs, preferences
from sb3_pg.text.supervised import pretrain, train


def refused(message, function, *arguments, **options):
    with pytest.raises(ArgumentError, match=message) as caught:
        function(*arguments, **options)
    assert "\n" not in str(caught.value)


WRONG_TASKS = {
    "conversations": (echo, "not a Echo. Environments, conversations too, .* by SB3's EvalCallback"),
    "environments": (lambda: TextVecEnv(letters_task(), 2), r"not a TextVecEnv. Pass its task: env\.task"),
    "environment": (lambda: TextEnv(letters_task()), r"not a TextEnv. Pass its task: env\.task"),
    "nothing": (lambda: None, r"not a NoneType. Make one: TextTask\("),
    "list": (lambda: [letters_task()], r"not a list. Make one: TextTask\("),
}


@pytest.mark.parametrize("kind", WRONG_TASKS)
def test_tasks(kind):
    wrong, message = WRONG_TASKS[kind][0](), f"`task` must be a TextTask, {WRONG_TASKS[kind][1]}"
    refused(message, TextEvalCallback, wrong)
    refused(message, evaluate_texts, make("gpt2").policy, wrong)
    refused(message, TextVecEnv, wrong)
    refused(message, TextEnv, wrong)
    if kind == "conversations":
        refused(r"no examples to learn from. Pass rows=env\.turns_of", pretrain, wrong, "folder")
    else:
        refused(message, pretrain, wrong, "folder")


def test_conversations_are_evaluated_as_the_error_says():
    model = PPO("CausalLMPolicy", echo(), n_steps=16, batch_size=16, gamma=1.0)
    callback = EvalCallback(echo(), eval_freq=8, n_eval_episodes=2)
    model.learn(16, callback=callback)
    assert callback.last_mean_reward > -np.inf


def test_policies():
    task, model = letters_task(references=list("abcde")), make("gpt2")
    other = PPO("MlpPolicy", "CartPole-v1", n_steps=8, batch_size=8)
    message = "`policy` must be that of a language model .* not a "
    refused(rf"{message}PPO. Pass model\.policy", evaluate_texts, model, task)
    refused(rf"{message}PPO. Pass model\.policy", best_of_n, model, ["a"], task.reward)
    refused(rf"{message}PPO. Pass model\.policy", train, model, task)
    refused(f"{message}QuickMlpPolicy", evaluate_texts, other.policy, task)
    refused("`policy_class` must be CausalLMPolicy or Seq2SeqLMPolicy", pretrain, task, "folder", "CausalLMPolicy")
    refused(f"{message}QuickMlpPolicy", other.learn, 8, callback=TextEvalCallback(task))
    assert other.num_timesteps == 0


@pytest.mark.parametrize(
    "options, message",
    [
        ({"n_prompts": 0}, "`n_prompts` must be a whole number >= 1, not 0"),
        ({"n_texts": -1}, "`n_texts` must be a whole number >= 0, not -1"),
        ({"names": ["blue"]}, "There is no metric 'blue'.* Did you mean 'bleu'"),
        ({"names": "bleu"}, "`names` must be a list of metrics, not 'bleu'"),
        ({"names": 3}, "`names` must be a list of metrics, not 3"),
        ({"names": [3]}, "There is no metric 3"),
        ({"names": ["bleu"]}, "The metric 'bleu' needs references"),
        ({"names": [lambda completions: 1.0]}, r"`names` must be a function of \(completions, references\)"),
        ({"callback_on_new_best": 3}, "`callback_on_new_best` must be a callback of SB3, not 3"),
        ({"callback_after_eval": "stop"}, "`callback_after_eval` must be a callback of SB3, not 'stop'"),
    ],
)
def test_evaluation_is_checked_before_training(options, message):
    refused(message, TextEvalCallback, letters_task(), **options)


def test_our_metrics_may_be_given_as_functions():
    found = metrics.measure(["a a", "b"], None, [metrics.distinct_1, metrics.self_bleu, lambda texts, right: 2.0])
    assert found == {**metrics.measure(["a a", "b"], None, ["distinct_1", "self_bleu"]), "metric": 2.0}
    refused("The metric 'metric' must return a number", metrics.measure, ["a"], None, [lambda texts, right: None])


@pytest.mark.parametrize("metric", [*metrics.WITH_REFERENCES.values(), metrics.classification])
def test_metrics_refuse_references_that_do_not_fit(metric):
    refused("There are 2 completions, but 1 references", metric, ["a", "b"], ["a"])
    refused("There are no completions", metric, [], [])
    refused("Reference 1 must be a text or a list of texts, not None", metric, ["a", "b"], ["a", None])
    refused(r"Reference 0 must be a text or a list of texts, not \[\]", metric, ["a"], [[]])
    refused("Reference 0 must be a text or a list of texts, not 3", metric, ["a"], [3])
    refused("`references` must be a list, not 'a'", metric, ["a"], "a")
    refused("`completions` must be a list, not 'a'", metric, "a", ["a"])
    refused("`references` must be a list, not None", metric, ["a"], None)


@pytest.mark.parametrize("labels", ["good", [], 3, [1, 2]])
def test_labels(labels):
    refused("`labels` must be a list of texts, at least one, not", metrics.classification, ["a"], ["b"], labels)


def test_kinds_of_rouge():
    refused("`kind` must be one of 'rouge1'", metrics.rouge, "rouge")


def test_best_of_n():
    policy, reward = make("gpt2").policy, letters_task().reward
    refused(
        "`references` must have one entry for each of the 2 prompts, not 1",
        best_of_n,
        policy,
        ["a", "b"],
        reward,
        references=["a"],
    )
    refused(
        "`references` must be a list of texts, not one text", best_of_n, policy, ["a", "b"], reward, references="ab"
    )
    refused("`prompts` must be a list of texts, .* not NoneType", best_of_n, policy, None, reward)
    refused("`prompts` must be a list of texts, not one text", best_of_n, policy, "a b", reward)
    refused("`prompts` must be a list of texts, .* not TextTask", best_of_n, policy, letters_task(), reward)
    th.manual_seed(0)
    texts, _ = best_of_n(policy, np.array(["a", "b"]), reward, references=np.array(["a", "b"]))
    assert len(texts) == 2


def test_pairs_for_raters(tmp_path):
    refused("`prompts` must be a list of texts, not one text: 'ab'", export_pairs, tmp_path, "ab", "cd", "ef")
    refused("`prompts` is empty", export_pairs, tmp_path, [], [], [])
    for names in (("x", "x"), ("x", "tie"), ("x",), "xy"):
        refused("`names` must be two different names", export_pairs, tmp_path, ["a"], ["b"], ["c"], names)
    refused("has no key.csv: export_pairs writes it", preferences, tmp_path / "nowhere")
    path = export_pairs(tmp_path, [[{"role": "user", "content": "hi"}]], ["b"], ["b"])
    assert "user: hi,b,b" in path.read_text()


@pytest.mark.parametrize("number", [5, -1, "a", None, 1.0])
def test_a_prompt_that_is_not_there(number):
    env = TextEnv(letters_task())
    refused("There is no prompt .* numbers < 5", env.reset, options={"prompt": number})
    assert env.reset(options={"prompt": np.int64(4)})[0] is not None


def test_turns_of_what_is_no_list_of_conversations():
    env, turns = echo(), [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    message = "What `turns_of` is given must be a list of messages"
    refused(message, env.turns_of, turns)
    refused(message, env.turns_of, ["a"])
    refused("'role' and 'content' must be texts", env.turns_of, [[{"content": "a"}]])
    refused("Message 2 of .* is the assistant's, but answers none", env.turns_of, [[*turns, turns[1]]])
    refused("Message 0 of .* is the assistant's, but answers none", env.turns_of, [turns[1:]])
    assert env.turns_of([]).shape == (0, 44) and env.turns_of([turns]).shape == (1, 44)


@pytest.mark.parametrize(
    "words, message",
    [
        ("give me tea", r"must be a list of words, not one text: 'give me tea'. Pass text\.split\(\)"),
        (["give me"], "`words` has 'give me', which is no word"),
        ([1], "`words` has 1, which is no word"),
        ([""], "`words` has '', which is no word"),
    ],
)
def test_words(words, message):
    refused(message, word_tokenizer, words)


def test_a_supervised_start():
    policy, task = make("gpt2").policy, letters_task(references=list("abcde"))
    refused("`learning_rate` must be a finite number >= 0, not -1", train, policy, task, learning_rate=-1)
    refused("`max_grad_norm` must be a finite number > 0, not 0", train, policy, task, max_grad_norm=0)
    refused("`learning_rate` must be a number, not '1'", train, policy, task, learning_rate="1")
    refused("rows that are empty, or tokens that the policy's 11 are not", train, policy, np.full((2, 10), 11))
    refused("rows that are empty", train, policy, np.full((2, 10), -1))
    refused("`gradient_checkpointing` must be one of", make, "gpt2", policy_kwargs={"gradient_checkpointing": "yes"})


def test_references_for_rewards_alone():
    """Metrics of texts leave them out, unless they are asked for."""
    task = letters_task(references=[1, 2, 3, None, 5])
    figures, _ = evaluate_texts(make("gpt2").policy, task)
    assert "distinct_1" in figures and "bleu" not in figures
    refused("Reference 0 must be a text", evaluate_texts, make("gpt2").policy, task, names=["bleu"])


def test_rows_of_a_data_set_are_no_prompts():
    refused("not rows of a data set. Pass Dataset.from_list", letters_task, prompts=[{"prompt": "a"}])

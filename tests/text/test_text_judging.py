"""Metrics of labels and samples, best of n, pairs for people, and the evaluation among other callbacks."""

import csv
import itertools
import json
import math
from fractions import Fraction

import numpy as np
import pytest
import torch as th
from stable_baselines3.common.callbacks import (
    BaseCallback,
    CallbackList,
    CheckpointCallback,
    EvalCallback,
    StopTrainingOnNoModelImprovement,
    StopTrainingOnRewardThreshold,
)
from stable_baselines3.common.logger import KVWriter, Logger
from text_models import LETTERS, count_a, letters_task, make
from transformers import GenerationConfig

from sb3_pg.common.errors import ArgumentError, NonFiniteError
from sb3_pg.text import TextEvalCallback, TextVecEnv, best_of_n, evaluate_texts, metrics, word_tokenizer
from sb3_pg.text.raters import export_pairs, preferences

# -------------------------------------------------------------------- labels

GIVEN = ["good", "Good.", "bad", "bad", "so so", "", "good"]
RIGHT = ["good", "bad", "bad", "good", "so so", "bad", "good"]


def by_counting(given, right, labels):
    """Precision, recall and F1 of each label as fractions, from the confusion matrix."""
    table = {(a, b): sum(x == a and y == b for x, y in zip(given, right, strict=True)) for a in given for b in right}
    found = {}
    for label in labels:
        tp = table.get((label, label), 0)
        fp = sum(n for (a, b), n in table.items() if a == label != b)
        fn = sum(n for (a, b), n in table.items() if b == label != a)
        ratio = lambda a, b: Fraction(a, b) if b else Fraction(0)  # noqa: E731
        found[label] = ratio(tp, tp + fp), ratio(tp, tp + fn), ratio(2 * tp, 2 * tp + fp + fn)
    return found


def test_classification():
    figures = metrics.classification(GIVEN, RIGHT)
    plain = [metrics.normalized(text) for text in GIVEN]
    expected = by_counting(plain, RIGHT, ["good", "bad", "so so"])
    assert figures["accuracy"] == pytest.approx(4 / 7)
    for which, name in enumerate(("precision", "recall", "f1")):
        for label, scores in expected.items():
            assert figures[f"{name}/{label}"] == pytest.approx(float(scores[which]))
        assert figures[f"macro_{name}"] == pytest.approx(float(sum(x[which] for x in expected.values()) / 3))
    assert len(figures) == 4 + 3 * 3
    assert figures["precision/good"] == pytest.approx(2 / 3)
    assert figures["recall/bad"] == pytest.approx(1 / 3)  # an empty completion is no label


def test_a_label_that_is_never_given_or_never_right():
    figures = metrics.classification(["a1", "a1"], ["b1", "a1"])
    assert (figures["precision/b1"], figures["recall/b1"], figures["f1/b1"]) == (0.0, 0.0, 0.0)
    figures = metrics.classification(["c1", "a1"], ["a1", "a1"], labels=["a1", "c1"])
    assert (figures["precision/c1"], figures["recall/c1"], figures["f1/c1"]) == (0.0, 0.0, 0.0)
    assert figures["macro_f1"] == pytest.approx((2 / 3) / 2)


def test_one_label():
    assert set(metrics.classification(["Yes", "yes"], ["yes", "yes"]).values()) == {1.0}
    figures = metrics.classification(["", "no"], ["yes", "yes"])
    assert set(figures.values()) == {0.0} and "f1/yes" in figures


def test_any_of_several_references_is_right():
    figures = metrics.classification(["glad", "bad"], [["good", "glad"], ["good", "glad"]])
    assert (figures["recall/glad"], figures["recall/good"], figures["accuracy"]) == (1.0, 0.0, 0.5)


@pytest.mark.parametrize("labels", [None, ["+", "-"]])
def test_labels_that_only_punctuation_tells_apart(labels):
    given, right = ["+", "-", " + ", "", "?"], ["+", "+", "-", "-", "-"]
    figures = metrics.classification(given, right, labels)
    assert figures["accuracy"] == 1 / 5
    assert (figures["precision/+"], figures["recall/+"]) == (1 / 2, 1 / 2)
    assert (figures["precision/-"], figures["recall/-"], figures["f1/-"]) == (0.0, 0.0, 0.0)


def test_labels_that_are_articles():
    figures = metrics.classification(["A", "a", "", "b"], ["A", "A", "A", "B"])
    assert figures["accuracy"] == 3 / 4 and figures["recall/A"] == 2 / 3 and figures["recall/B"] == 1.0
    figures = metrics.classification(["The cat.", "b"], ["cat", "B"])  # where nothing coincides, as SQuAD compares
    assert figures["accuracy"] == 1.0
    figures = metrics.classification(["C++", "c"], ["C", "C"], labels=["C", "C++"])  # those asked for differ, too
    assert figures["accuracy"] == figures["recall/C"] == 1 / 2 and figures["precision/C++"] == 0.0


# ------------------------------------------------------------------ pass at k


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_pass_at_k_is_the_share_of_all_draws_with_a_right_one(k):
    right = np.array([[1, 0, 0, 1, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 1, 0]], dtype=bool)
    shares = [np.mean([some.any() for some in map(row.__getitem__, _draws(5, k))]) for row in right]
    assert metrics.pass_at_k(right, k) == pytest.approx(np.mean(shares))


def _draws(n, k):
    return [list(some) for some in itertools.combinations(range(n), k)]


def test_pass_at_k_of_many_samples_does_not_overflow():
    right = np.zeros((1, 3000), dtype=bool)
    right[0, :30] = True
    expected = 1 - Fraction(math.comb(2970, 100), math.comb(3000, 100))
    assert metrics.pass_at_k(right, 100) == pytest.approx(float(expected), rel=1e-12)


@pytest.mark.parametrize(
    "right, k", [([[1, 0]], 3), ([1, 0], 1), ([], 1), ([[1, 0]], 0)], ids=["3", "flat", "none", "0"]
)
def test_pass_at_k_refuses_what_cannot_be(right, k):
    with pytest.raises(ArgumentError):
        metrics.pass_at_k(right, k)


# ------------------------------------------------------------- own and edges


def share_of_a(completions, references):
    return float(np.mean(count_a([], list(completions), [])))


def both(completions, references):
    return {"n": float(len(completions)), "has_references": float(references is not None)}


def of_numpy(completions, references):
    return {"float32": np.float32(0.5), "int64": np.sum([1, 2]), "tensor": th.tensor(1.0)}


def test_metrics_of_ones_own():
    found = metrics.measure(["a a", "b"], None, ["distinct_1", share_of_a, both])
    assert found == {"distinct_1": 2 / 3, "share_of_a": 1 / 6, "both/n": 2.0, "both/has_references": 0.0}
    found = metrics.measure(["a", "b"], ["a", "a"], ["classification", both])
    assert (found["classification/accuracy"], found["both/has_references"]) == (0.5, 1.0)
    found = metrics.measure(["a"], None, [of_numpy])
    assert found == {"of_numpy/float32": 0.5, "of_numpy/int64": 3.0, "of_numpy/tensor": 1.0}
    assert {type(x) for x in found.values()} == {float}
    task = letters_task(references=["a", "b", "c", "d", "e"])
    figures, records = evaluate_texts(make("gpt2", task=task).policy, task, names=[share_of_a], do_sample=False)
    assert figures["share_of_a"] == pytest.approx(np.mean([record["score"] for record in records]))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((["a"], None, ["blue"]), "There is no metric 'blue'.* Did you mean 'bleu'"),
        ((["a"], None, ["bleu"]), "'bleu' needs references"),
        (([], []), "no completions"),
        ((["a"], ["a", "b"]), "1 completions, but 2 references"),
    ],
    ids=["unknown", "references", "none", "numbers"],
)
def test_metrics_that_cannot_be(arguments, message):
    with pytest.raises(ArgumentError, match=message):
        metrics.measure(*arguments)


@pytest.mark.parametrize("name", [*metrics.WITH_REFERENCES, *metrics.WITHOUT, *metrics.ON_REQUEST])
def test_empty_completions_are_as_bad_as_can_be(name):
    found = metrics.measure(["", ""], ["a b c d", "e f g h"], [name])
    assert set(found.values()) == {0.0}


def test_the_first_evaluation_takes_at_least_one_prompt():
    with pytest.raises(ArgumentError, match="`n_prompts` must be a whole number"):
        evaluate_texts(make("gpt2").policy, letters_task(), 0)


@pytest.mark.parametrize("shape", ["gpt2", "t5"])
def test_held_out_prompts_and_responses_may_be_longer_than_those_of_training(shape):
    policy = make(shape).policy  # made for 4 tokens and 6
    held_out = letters_task(prompts=["a b c d e f g h", "h g f e d"], response_length=12)
    figures, records = evaluate_texts(policy, held_out, do_sample=False, min_new_tokens=8)
    expected = policy.generate(held_out.prompts, max_new_tokens=12, min_new_tokens=8)
    assert [record["completion"] for record in records] == expected
    assert figures["length"] > 6
    assert expected[0] != policy.generate(["a b c d"], max_new_tokens=12, min_new_tokens=8)[0]


def test_held_out_prompts_that_do_not_fit():
    policy = make("gpt2").policy  # a window of 32
    with pytest.raises(ArgumentError, match="30 tokens and its response may have 6, but the model's window is 32"):
        evaluate_texts(policy, letters_task(prompts=["a " * 30]))
    other = letters_task(tokenizer=word_tokenizer([*LETTERS, "x"]))
    with pytest.raises(ArgumentError, match="`task` has a tokenizer of 12 tokens, but the policy's has 11"):
        evaluate_texts(policy, other)


def test_a_generation_config_says_how_to_evaluate():
    task = letters_task()
    policy = make("gpt2", task=task).policy
    _, records = evaluate_texts(policy, task, generation_config=GenerationConfig(do_sample=False))
    assert [record["completion"] for record in records] == policy.generate(task.prompts)


# ------------------------------------------------------------------ best of n


def test_best_of_n_keeps_the_best_of_those_that_generate_draws():
    model = make("llama")
    prompts = ["a b", "c"]
    th.manual_seed(3)
    drawn = model.policy.generate(prompts, do_sample=True, num_return_sequences=16)
    scores = np.array(count_a([], drawn, [])).reshape(2, 16)
    seen = []

    def reward(asked, texts, references):
        seen.append((asked, texts, references))
        return th.tensor(count_a(asked, texts, references))

    th.manual_seed(3)
    texts, rewards = best_of_n(model.policy, prompts, reward, n=16, references=["x", "y"])
    assert seen == [(["a b"] * 16 + ["c"] * 16, drawn, ["x"] * 16 + ["y"] * 16)]
    np.testing.assert_allclose(rewards, scores.max(axis=1), rtol=1e-6)
    assert texts == [drawn[scores[0].argmax()], drawn[16 + scores[1].argmax()]]
    assert rewards.sum() > 2 * scores.mean()
    assert best_of_n(model.policy, [], reward)[0] == []


def test_best_of_n_gives_rewards_the_tokens_that_they_get_in_training():
    """Those of the response with the one that ends it, not of its text, which may be empty."""
    model, seen = make("gpt2"), []
    end, numbers = model.policy.end_token, model.env.task.tokenizer.get_vocab()

    def by_token(prompts, completions, references, token_ids):
        seen.extend(zip(completions, token_ids, strict=True))
        return [[0.1] * len(ids) for ids in token_ids]

    def total(prompts, completions, references):
        return [1.0] * len(completions)

    _, rewards = best_of_n(model.policy, ["a b c", "d"] * 6, [by_token, total], n=16)
    assert len(seen) == 192 and any(text == "" for text, _ in seen)
    for text, ids in seen:
        words = [numbers[word] for word in text.split()]
        assert ids == ([*words, end] if len(words) < 6 else words)
    assert rewards.max() == pytest.approx(1.6)


@pytest.mark.parametrize(
    "reward, error, message",
    [
        (lambda prompts, texts, references: [1.0], ArgumentError, "one number for each of the 4"),
        (lambda prompts, texts, references: None, ArgumentError, "one number for each"),
        (lambda prompts, texts, references: ["good"] * 4, ArgumentError, "one number for each"),
        (
            lambda prompts, texts, references: [1, 2, math.nan, 0],
            NonFiniteError,
            "returned nan for the prompt",
        ),
        (lambda texts: [1.0] * 4, ArgumentError, "`reward`"),
    ],
    ids=["short", "None", "words", "nan", "arguments"],
)
def test_best_of_n_refuses_rewards_that_cannot_be_compared(reward, error, message):
    with pytest.raises(error, match=message):
        best_of_n(make("gpt2").policy, ["a"], reward)


# ----------------------------------------------------------- pairs for people


def test_pairs_for_raters(tmp_path):
    prompts = [f"prompt {i}" for i in range(40)]
    first, second = [f"first, {i}\n=1" for i in range(40)], [f'"second" {i}' for i in range(40)]
    path = export_pairs(tmp_path / "raters", prompts, first, second, ("tuned", "base"), seed=1)
    rows = list(csv.DictReader(path.open(encoding="utf-8", newline="")))
    key = list(csv.DictReader((tmp_path / "raters" / "key.csv").open(encoding="utf-8")))
    assert [row["number"] for row in rows] == [row["number"] for row in key] == [str(i) for i in range(40)]
    order = [int(row["prompt"].split()[1]) for row in rows]
    assert sorted(order) == list(range(40)) != order
    texts = {"tuned": first, "base": second}
    for i, row, its in zip(order, rows, key, strict=True):
        assert (row["A"], row["B"], row["better"]) == (texts[its["A"]][i], texts[its["B"]][i], "")
    assert 10 < sum(its["A"] == "tuned" for its in key) < 30
    assert "tuned" not in path.read_text()
    again = export_pairs(tmp_path / "again", prompts, first, second, ("tuned", "base"), seed=1)
    assert again.read_bytes() == path.read_bytes()
    assert export_pairs(tmp_path / "other", prompts, first, second, seed=2).read_bytes() != path.read_bytes()

    answers = ["A" if its["A"] == "tuned" else " b " for its in key[:6]] + ["tie"] * 2 + [""] * 32
    answers[0] = "A" if key[0]["A"] == "base" else "B"
    fill(path, rows, answers)
    assert preferences(path.parent) == {"tuned": 5 / 8, "base": 1 / 8, "tie": 2 / 8}
    fill(path, rows, ["C"] + [""] * 39)
    with pytest.raises(ArgumentError, match="Pair 0 has 'C'"):
        preferences(path.parent)
    with pytest.raises(ArgumentError, match=r"No pair of .* is filled in"):
        preferences(again.parent)
    with pytest.raises(ArgumentError, match="40 prompts, but 1 and 40"):
        export_pairs(tmp_path, prompts, first[:1], second)


def test_pairs_that_a_spreadsheet_has_saved(tmp_path):
    path = export_pairs(tmp_path, ["p; q", "p, q", "p"], ["1", "2\n3", "ä"], ["4", "5", "6"], ("tuned", "base"))
    rows = list(csv.DictReader(path.open(encoding="utf-8", newline="")))
    key = list(csv.DictReader((tmp_path / "key.csv").open(encoding="utf-8")))
    answers, expected = ["A", "TIE", "b"], {"tuned": 0.0, "base": 0.0, "tie": 1 / 3}
    for number, side in ((0, "A"), (2, "B")):
        expected[key[number][side]] += 1 / 3
    given = [[*list(row.values())[:4], answer] for row, answer in zip(rows, answers, strict=True)]
    for delimiter, encoding in itertools.product(",;", ("utf-8", "utf-8-sig")):
        with path.open("w", encoding=encoding, newline="") as file:
            csv.writer(file, delimiter=delimiter).writerows([rows[0].keys(), *given])
        assert preferences(tmp_path) == expected
    with path.open("a", encoding="utf-8") as file:
        file.write("\n;;;;\n")  # with empty rows
    assert preferences(tmp_path) == expected


HEAD = "number,prompt,A,B,better\n"


@pytest.mark.parametrize(
    "text, message",
    [
        (HEAD + "0,p,1,3,A\n1,q\n", r"Row 2 of .*pairs\.csv has 2 columns, not 5: keep the empty ones"),
        (HEAD + "0,p,1,3,4,A\n", r"Row 1 of .*pairs\.csv has 6 columns, not 5"),
        (HEAD + "7,p,1,3,A\n", r"pairs\.csv has a pair '7', which key\.csv does not have: keep the numbers"),
        (HEAD.replace(",", "\t"), r"pairs\.csv has the columns .* must have number, better. Save it as CSV"),
        ("", r"pairs\.csv has the columns \[\], but must have number, better"),
        (HEAD + "0,p,ä,3,A\n", r"pairs\.csv is not in UTF-8. Save it as 'CSV UTF-8'"),
        (None, r"has no pairs\.csv: export_pairs writes it"),
    ],
)
def test_pairs_that_cannot_be_read(text, message, tmp_path):
    path = export_pairs(tmp_path, ["p", "q"], ["1", "2"], ["3", "4"])
    path.unlink()
    if text is not None:
        path.write_text(text, encoding="cp1252")
    with pytest.raises(ArgumentError, match=message) as error:
        preferences(tmp_path)
    assert "\n" not in str(error.value)


def fill(path, rows, answers):
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows({**row, "better": answer} for row, answer in zip(rows, answers, strict=True))


# ------------------------------------------------------------------ callbacks


class Count(BaseCallback):
    def __init__(self):
        super().__init__()
        self.seen = []

    def _on_step(self):
        self.seen.append((self.parent.best_mean_reward, self.model.num_timesteps, "infos" in self.locals))
        return True


class Keys(KVWriter):
    def __init__(self):
        self.seen = set()

    def write(self, key_values, key_excluded, step=0):
        self.seen.update(key_values)

    def close(self):
        pass


def test_it_evaluates_among_sb3s_callbacks(tmp_path):
    task = letters_task()
    model = make("gpt2", task=task)
    texts = TextEvalCallback(task, eval_freq=13, n_prompts=4, log_path=tmp_path)
    options = {"settings": {"do_sample": False}, "log_name": "greedy"}
    greedy = TextEvalCallback(task, eval_freq=26, n_prompts=2, names=[share_of_a], **options)
    keys = Keys()
    model.set_logger(Logger(None, [keys]))
    usual = EvalCallback(TextVecEnv(task, 2, seed=9), eval_freq=13, n_eval_episodes=4, best_model_save_path=tmp_path)
    saving = CheckpointCallback(save_freq=26, save_path=tmp_path / "checkpoints")
    model.learn(208, callback=CallbackList([texts, usual, saving, greedy]))
    assert [h["timesteps"] for h in texts.history] == [0, 52, 104, 156, 208]
    assert {"eval/score", "eval/distinct_1", "eval/mean_reward", "greedy/score", "greedy/share_of_a"} <= keys.seen
    assert "eval/share_of_a" not in keys.seen
    assert [h["timesteps"] for h in greedy.history] == [0, 104, 208]
    assert np.isfinite(usual.last_mean_reward) and (tmp_path / "best_model.zip").exists()
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2
    assert len((tmp_path / "evaluations.jsonl").read_text().splitlines()) == 5
    assert json.loads((tmp_path / "evaluations.jsonl").read_text().splitlines()[0])["timesteps"] == 0


@pytest.mark.parametrize("do_sample", [False, True])
def test_an_evaluation_changes_nothing_of_what_is_learned(do_sample):
    task = letters_task()
    model = make("gpt2", task=task).learn(104)
    watched = make("gpt2", task=task)
    watched.learn(104, callback=TextEvalCallback(task, 13, n_prompts=4, settings={"do_sample": do_sample}))
    for p, q in zip(model.policy.parameters(), watched.policy.parameters(), strict=True):
        assert th.equal(p, q)


def test_a_run_that_goes_on_is_the_same_with_an_evaluation(tmp_path):
    task = letters_task()
    whole = make("gpt2", task=task)
    whole.learn(208, callback=TextEvalCallback(task, 13, n_prompts=4))
    half = make("gpt2", task=task)
    half.learn(104, callback=TextEvalCallback(task, 13, n_prompts=4))
    half.save(tmp_path / "half")
    other = type(half).load(tmp_path / "half", env=TextVecEnv(task, 4))
    other.learn(104, callback=TextEvalCallback(task, 13, n_prompts=4), reset_num_timesteps=False)
    for p, q in zip(whole.policy.parameters(), other.policy.parameters(), strict=True):
        assert th.equal(p, q)


def test_not_a_number_is_never_best(tmp_path):
    task, values = letters_task(), iter([math.nan, 0.5, math.nan, 0.1])

    def odd(completions, references):
        return np.float32(next(values))

    callback = TextEvalCallback(task, eval_freq=13, n_prompts=2, names=[odd], best_by="odd", log_path=tmp_path)
    make("gpt2", task=task).learn(156, callback=callback)
    assert callback.best_mean_reward == 0.5
    lines = (tmp_path / "evaluations.jsonl").read_text().splitlines()
    assert [json.loads(line)["odd"] for line in lines][1::2] == [0.5, pytest.approx(0.1)]


def test_sb3s_callbacks_follow_an_evaluation():
    task = letters_task()
    model = make("gpt2", task=task)
    best, after = Count(), Count()
    callback = TextEvalCallback(
        task, eval_freq=13, n_prompts=4, best_by="length", callback_on_new_best=best, callback_after_eval=after
    )
    model.learn(208, callback=callback)
    assert [steps for _, steps, _ in after.seen] == [0, 52, 104, 156, 208]
    lengths = [h["length"] for h in callback.history]
    records = [i for i, x in enumerate(lengths) if x > max(lengths[:i], default=-1)]
    assert [seen[:2] for seen in best.seen] == [(lengths[i], 52 * i) for i in records]
    assert after.seen[-1][0] == callback.best_mean_reward == max(lengths)
    assert all(shown for _, steps, shown in after.seen if steps)


def test_a_threshold_stops_training_also_before_it_begins():
    task = letters_task()
    for threshold, steps in ((-1.0, 4), (np.inf, 104)):
        model = make("gpt2", task=task)
        stop = StopTrainingOnRewardThreshold(threshold)
        model.learn(104, callback=TextEvalCallback(task, eval_freq=5, n_prompts=2, callback_on_new_best=stop))
        assert model.num_timesteps == steps


def test_early_stopping():
    task = letters_task()
    model = make("gpt2", task=task, learning_rate=0.0)
    stop = StopTrainingOnNoModelImprovement(2, min_evals=1)
    options = {"n_prompts": 4, "settings": {"do_sample": False}, "callback_after_eval": stop}
    callback = TextEvalCallback(task, eval_freq=13, **options)
    model.learn(1000, callback=callback)
    assert model.num_timesteps < 300 and len({h["score"] for h in callback.history}) == 1

import json

import numpy as np
import pytest
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer
from text_models import letters_task, make

from sb3_pg import PPO
from sb3_pg.common.errors import ArgumentError
from sb3_pg.text import TextEvalCallback, TextVecEnv, evaluate_texts, metrics
from sb3_pg.text.evaluation import table
from sb3_pg.text.supervised import examples, pretrain, steps_of, train
from sb3_pg.text.tasks import TASKS, sentence_chrf, sentiment_of, words_in_place

TEXTS = ["the cat sat on the mat", "a dog barked", "birds fly south in winter"]
REFERENCES = ["the cat is on the mat", "the dog barked loudly", "birds fly south in winter"]


def test_sacrebleu():
    assert metrics.bleu(TEXTS, REFERENCES) == sacrebleu.corpus_bleu(TEXTS, [REFERENCES]).score
    assert metrics.chrf(TEXTS, REFERENCES) == sacrebleu.corpus_chrf(TEXTS, [REFERENCES]).score
    several = [[r, text] for r, text in zip(REFERENCES, TEXTS, strict=True)]
    assert metrics.bleu(TEXTS, several) == pytest.approx(100)
    assert 0 < metrics.bleu(TEXTS, REFERENCES) < 100


@pytest.mark.parametrize("kind", ["rouge1", "rouge2", "rougeL"])
def test_rouge(kind):
    scorer = RougeScorer([kind])
    expected = np.mean([scorer.score(r, t)[kind].fmeasure for r, t in zip(REFERENCES, TEXTS, strict=True)])
    assert metrics.rouge(kind)(TEXTS, REFERENCES) == pytest.approx(expected)


def test_matches():
    texts = ["Paris", "the 42", "blue", " red  hat "]
    references = [["Paris", "paris france"], "42.", "green", "red hat"]
    assert metrics.exact_match(texts, references) == 0.5
    assert metrics.accuracy(texts, references) == 0.75


def test_token_scores():
    # two of three words are right, of four expected ones
    assert metrics.token_precision(["x y z"], ["x y u v"]) == pytest.approx(2 / 3)
    assert metrics.token_recall(["x y z"], ["x y u v"]) == pytest.approx(1 / 2)
    assert metrics.token_f1(["x y z"], ["x y u v"]) == pytest.approx(4 / 7)
    assert metrics.token_f1([""], ["x"]) == 0.0
    assert metrics.token_f1(["u"], ["x"]) == 0.0
    assert metrics.token_precision(["x x x"], ["x"]) == pytest.approx(1 / 3)  # a word counts as often as it is there


def test_diversity():
    assert metrics.distinct_1(["a a b", "a"]) == pytest.approx(2 / 4)
    assert metrics.distinct_2(["a a b", "a"]) == 1.0
    assert metrics.distinct_2(["a"]) == 0.0
    same, different = ["one two three four"] * 3, ["a b c d", "e f g h", "i j k l"]
    assert metrics.self_bleu(same) == pytest.approx(100)
    assert metrics.self_bleu(different) < 20
    assert metrics.self_bleu(["a"]) == 0.0


def test_measure():
    assert set(metrics.measure(TEXTS, REFERENCES)) == {*metrics.WITH_REFERENCES, *metrics.WITHOUT}
    assert set(metrics.measure(TEXTS, None)) == set(metrics.WITHOUT)
    assert list(metrics.measure(TEXTS, REFERENCES, ["bleu"])) == ["bleu"]


def test_rewards_of_the_tasks():
    assert words_in_place([], ["1 2", "1", "2 1", ""], ["1 2"] * 4) == [1.0, 0.5, 0.0, 0.0]
    assert sentence_chrf([], ["uno", "dos"], ["uno", "tres"])[0] == 1.0
    good, bad, plain = sentiment_of([], ["a wonderful party", "a horrible meal", "a long walk"], [])
    assert good > 0.5 > 0.0 == plain > bad


@pytest.mark.parametrize("name", TASKS)
def test_tasks(name):
    train_task, test_task = TASKS[name].make("train"), TASKS[name].make("test")
    assert not set(train_task.prompts) & set(test_task.prompts)
    assert train_task.observation_space == test_task.observation_space
    assert train_task.action_space == test_task.action_space
    assert len(test_task.prompts) > 40
    unknown = train_task.tokenizer.unk_token_id
    for task in (train_task, test_task):
        rows = examples(task)
        assert not (rows == unknown).any()
        assert (task.references is None) == (name == "sentiment")
        first = rows[:: len(rows) // len(task.prompts)]
        scores, texts = task.score(range(len(task.prompts)), first[:, task.width :])
        assert texts == [found[0] for found in task.examples]
        if task.references is not None:
            assert texts == task.references
            assert np.allclose(scores, 1.0)
            n = len(rows) // len(task.prompts)
            wrong = rows[n - 1 :: n]
            assert task.score(range(len(task.prompts)), wrong[:, task.width :])[0].mean() < 0.7
    with pytest.raises(ArgumentError, match="`split` must be one of 'train', 'test'"):
        TASKS[name].make("dev")


def letters_with_answers():
    return letters_task(references=["a a", ["b", "c c"], "a", "d e f", "g"])


def test_examples_are_rows_as_acting_would_record_them():
    task = letters_with_answers()
    rows = examples(task)
    assert len(rows) == 6
    observations, actions = steps_of(rows, task.width)
    assert task.decode(rows[:, task.width :]) == ["a a", "b", "c c", "a", "d e f", "g"]
    assert len(actions) == (rows[:, task.width :] >= 0).sum()
    assert np.array_equal(observations[0], task.observations([0])[0])
    assert actions[:3].tolist() == [3, 3, task.end_token]
    assert observations[2, task.width :].tolist() == [3, 3, -1, -1, -1, -1]
    with pytest.raises(ArgumentError, match="has no `examples` or `references`"):
        examples(letters_task())
    with pytest.raises(ArgumentError, match="has 3 tokens and its end; response_length is 3"):
        examples(letters_task(references=["a", "a", "a", "a b c", "a"], response_length=3))


@pytest.mark.parametrize("shape", ["llama", "t5"])
def test_supervised_training_learns(shape, tmp_path):
    task = letters_task(references=["a a", "c c", "a", "d e f", "g"])
    model = make(shape, task=task, policy_kwargs={"temperature": 1.0})
    steps = []
    losses = train(model.policy, task, 80, 10, 1e-2, report=lambda step, loss: steps.append(step))
    assert len(losses) == len(steps) == 80
    assert losses[-1] < 0.3 < losses[0]
    figures, records = evaluate_texts(model.policy, task, do_sample=False)
    assert figures["exact_match"] == 1.0
    assert [r["completion"] for r in records] == task.references


def test_pretrained_folder(tmp_path):
    task = letters_with_answers()
    folder = pretrain(task, tmp_path / "model", n_steps=2, batch_size=4)
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in folder.iterdir()}
    model = PPO("CausalLMPolicy", TextVecEnv(task, 4), n_steps=8, batch_size=8, policy_kwargs={"model": str(folder)})
    model.learn(32)


def test_callback(tmp_path):
    task = letters_with_answers()
    model = make("gpt2", task=task)
    new_best = []

    class Note:
        def init_callback(self, model):
            pass

        def on_step(self):
            new_best.append(model.num_timesteps)
            return True

        def update_locals(self, locals_):
            pass

    callback = TextEvalCallback(
        task,
        eval_freq=10,
        n_prompts=4,
        n_texts=2,
        log_path=tmp_path,
        best_model_save_path=tmp_path,
        best_by="distinct_1",
    )
    model.learn(104, callback=callback)
    assert [h["timesteps"] for h in callback.history] == [0, 40, 80]
    lines = [json.loads(line) for line in (tmp_path / "evaluations.jsonl").read_text().splitlines()]
    assert lines == callback.history
    assert {"score", "length", "bleu", "distinct_2"} <= set(lines[0])
    texts = (tmp_path / "texts.md").read_text()
    assert texts.count("| a b c |") == 3
    assert (tmp_path / "best_model.zip").exists()
    with pytest.raises(ArgumentError, match=r"`best_by` must be one of score, .*, not 'blue'"):
        model.learn(52, callback=TextEvalCallback(task, best_by="blue"))


def test_evaluation_of_several_responses():
    task = letters_with_answers()
    model = make("gpt2", task=task)
    _, records = evaluate_texts(model.policy, task, 3, num_return_sequences=2)
    assert [r["prompt"] for r in records] == ["a b c", "a b c", "d", "d", "e f", "e f"]


def test_table():
    text = table([{"prompt": "a|b", "completion": "x\ny", "reference": None, "score": 0.5}])
    assert text.splitlines() == ["| prompt | completion | score |", "| --- | --- | --- |", "| a\\|b | x y | 0.50 |"]

import ast
import importlib.util
import os
import runpy
import shlex
import signal
import sys
import time
from importlib.machinery import PathFinder

import pytest
from forked import forget, forked, forking
from transformers import AutoModelForCausalLM, AutoTokenizer

from sb3_pg import PPO
from sb3_pg.text.demo import ALGORITHMS, PRETRAIN_STEPS, SETTINGS, TIMESTEPS, main, parse
from sb3_pg.text.tasks import TASKS


def small_run(monkeypatch, algo="ppo"):
    monkeypatch.setattr("sb3_pg.text.demo.N_ENVS", 8)
    small = {"n_episodes": 8} if algo == "reinforce" else {"n_steps": 8, "batch_size": 64}
    monkeypatch.setitem(SETTINGS, algo, {**SETTINGS[algo], **small})


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_demo(algo, tmp_path, capsys, monkeypatch):
    small_run(monkeypatch, algo)
    arguments = ["--task", "sentiment", "--algo", algo, "--timesteps", "64", "--pretrain-steps", "2"]
    assert main([*arguments, "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "Before tuning: score" in printed
    assert "| prompt | completion | score |" in printed
    assert (tmp_path / "model.zip").exists()
    assert (tmp_path / "supervised" / "config.json").exists()
    assert ALGORITHMS[algo].load(tmp_path / "model.zip").policy.lm.config.model_type == "llama"


def test_its_last_lines_load_the_tuned_model_and_ask_it_something(tmp_path, capsys, monkeypatch):
    small_run(monkeypatch)
    assert main(["--task", "sentiment", "--timesteps", "64", "--pretrain-steps", "2", "--out", str(tmp_path)]) == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()[-3:]]
    said = forked(lambda: exec("\n".join(lines), {})).stdout
    lm, tokenizer = (kind.from_pretrained(tmp_path / "tuned") for kind in (AutoModelForCausalLM, AutoTokenizer))
    asked = tokenizer(TASKS["sentiment"].make("test").prompts[0], return_tensors="pt").input_ids
    told = lm.generate(asked)[0, asked.shape[1] :]
    assert ast.literal_eval(said) == [tokenizer.decode(told).removesuffix(" <end>")]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_with_all_that_was_learned(number, tmp_path, capsys, monkeypatch):
    arguments = ["--task", "sentiment", "--pretrain-steps", "0", "--no-progress", "--out", str(tmp_path / "a run")]
    train = PPO.train
    monkeypatch.setattr(PPO, "train", lambda self: print("It learns", flush=True) or train(self))

    def work():
        sys.argv[1:] = [*arguments, "--timesteps", "10000000"]
        runpy.run_module("sb3_pg.text.demo", run_name="__main__")

    with forking(work) as (process, said):
        while "It learns" not in said()[0]:
            assert process.is_alive(), said()
            time.sleep(0.1)
        os.kill(process.pid, number)
        process.join()
        assert process.exitcode == 128 + number
        _, errors = said()
    (line,) = errors.splitlines()
    path = tmp_path / "a run" / "model.zip"
    n_tokens = PPO.load(path).num_timesteps
    assert line.startswith(
        f"Interrupted: saved in {path} after {n_tokens:,} tokens; go on with python -m sb3_pg.text.demo"
    )
    small_run(monkeypatch)
    monkeypatch.setattr("sb3_pg.text.demo.N_ENVS", 64)
    again = shlex.split(line.split("python -m sb3_pg.text.demo ")[1])
    again[-1] = str(n_tokens + 64)
    assert main([*again, "--no-progress"]) == 0
    printed = capsys.readouterr().out
    assert f"Going on with {path} after {n_tokens:,} tokens" in printed
    assert f"After {PPO.load(path).num_timesteps - n_tokens:,} more tokens of PPO" in printed


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_before_there_is_anything_to_save(number, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sb3_pg.text.supervised.pretrain", lambda *_, **__: signal.raise_signal(number))
    assert main(["--task", "sentiment", "--out", str(tmp_path)]) == 128 + number
    assert capsys.readouterr().err == "python -m sb3_pg.text.demo: interrupted; there is nothing new to save\n"


def test_a_bar_is_shown_by_default_where_there_is_one():
    assert parse([]).progress == all(importlib.util.find_spec(name) for name in ("tqdm", "rich"))
    assert not parse(["--no-progress"]).progress


def test_each_task_and_algorithm_has_its_numbers_of_steps():
    assert set(PRETRAIN_STEPS) == set(TASKS) and set(TIMESTEPS) == set(SETTINGS) == set(ALGORITHMS)


def test_the_case_of_an_algorithm_does_not_matter():
    assert parse(["--algo", "PPO"]).algo == "ppo"


@pytest.mark.parametrize("missing", ["transformers", "peft", "num2words", "vaderSentiment"])
def test_without_the_extra_there_is_one_line_and_help(missing, tmp_path):
    find = PathFinder.find_spec

    def demo(*arguments):
        forget(missing, "sb3_pg.text")
        PathFinder.find_spec = lambda name, *more: None if name.split(".")[0] == missing else find(name, *more)
        return importlib.import_module("sb3_pg.text.demo").main(list(arguments))

    done = forked(lambda: demo("--out", str(tmp_path / "out")))
    assert done.returncode == 2 and not (tmp_path / "out").exists()
    assert "pip install 'sb3_pg[text]'" in done.stderr and done.stderr.count("\n") == 1
    if missing == "transformers":
        helped = forked(lambda: demo("--help"))
        assert helped.returncode == 0 and "usage:" in helped.stdout


def test_zero_steps_are_no_steps(tmp_path, capsys, monkeypatch):
    small_run(monkeypatch)
    assert main(["--task", "sentiment", "--timesteps", "0", "--pretrain-steps", "0", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "Supervised start: 0 steps" in printed and "After 0 tokens" in printed


def test_resuming_with_another_algorithm_is_one_line(tmp_path, capsys):
    PPO("MlpPolicy", "CartPole-v1").save(tmp_path / "model.zip")
    assert main(["--algo", "trpo", "--out", str(tmp_path), "--resume"]) == 2
    assert "model.zip is of PPO: pass --algo ppo" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--timesteps", "-1"], "must be a whole number >= 0, not '-1'"),
        (["--pretrain-steps", "-5"], "must be a whole number >= 0, not '-5'"),
        (["--seed", "-1"], "must be a whole number from 0 to 4294967295, not '-1'"),
        (["--seed", "4294967296"], "must be a whole number from 0 to 4294967295, not '4294967296'"),
        (["--out", "/dev/null/x"], "/dev/null/x"),
        (["--out", __file__], "exists. Pass another folder by --out"),
        (["--out", "/proc"], "cannot write to /proc"),
        (["--timesteps", "1.5"], "must be a whole number >= 0, not '1.5'"),
        (["--resume", "--out", "/tmp/nowhere"], "there is no /tmp/nowhere/model.zip to go on with: leave out --resume"),
        (["--task", "poems"], "poems"),
    ],
)
def test_wrong_input_gets_one_line(arguments, says, capsys, monkeypatch):
    monkeypatch.setattr("sb3_pg.text.supervised.pretrain", None)  # it is noticed before
    assert main(arguments) == 2
    errors = capsys.readouterr().err
    assert says in errors and errors.count("\n") == 1

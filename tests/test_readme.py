import json
import re
from pathlib import Path

import gymnasium as gym
import pytest

import sb3_pg
from sb3_pg.common import errors

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def blocks():
    for found in re.finditer(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL):
        line = README[: found.start()].count("\n") + 1
        # Leading empty lines, so that a traceback shows the line of the README.
        yield pytest.param("\n" * line + found[1], id=f"line {line}")


def bad_inputs():
    """Rows of the table: code, name of the error, what its message contains."""
    for found in re.finditer(r"^\| `([^`]+)`.*? \| (\w+Error): `` (.+) `` \|$", README, re.MULTILINE):
        yield pytest.param(*found.groups(), id=found[1])


class Named(gym.Wrapper):
    def __init__(self, env_id):
        super().__init__(gym.make(env_id))
        self.n_steps = 0

    def step(self, action):
        self.n_steps += 1
        return self.change(*self.env.step(action))


class BadReward(Named):
    def change(self, observation, reward, *rest):
        return observation, float("inf") if self.n_steps == 5 else reward, *rest


class BadObservation(Named):
    def change(self, observation, *rest):
        return observation * (float("nan") if self.n_steps == 5 else 1.0), *rest


class Endless(Named):
    def step(self, action):
        return self.observation_space.sample().clip(-1, 1), 1.0, False, False, {}


@pytest.mark.parametrize("block", list(blocks()))
def test_code_blocks_run(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), {"__name__": "__main__"})


def test_there_is_a_block_for_each_algorithm():
    code = "".join(block.values[0] for block in blocks())
    assert all(f"import {name}\n" in code for name in ("PPO", "TRPO", "REINFORCE"))


@pytest.mark.parametrize("code, error, message", list(bad_inputs()))
def test_bad_input_gets_the_promised_error(code, error, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    kind = getattr(errors, error, None) or {"ValueError": ValueError}[error]
    names = {name: getattr(sb3_pg, name) for name in ("PPO", "TRPO", "REINFORCE")} | {"gym": gym}
    names |= {kind.__name__: kind for kind in (BadReward, BadObservation, Endless)}
    with pytest.raises(kind, match=re.escape(message)):
        exec(code, names)


def test_every_row_of_the_table_is_tested_but_the_one_in_words():
    table = README.split("## What bad input gets")[1].split("\n## ")[0]
    rows = [line for line in table.splitlines() if line.startswith("| ") and "Error" in line]
    assert len(list(bad_inputs())) == len(rows) - 1


def test_every_linked_file_exists():
    for link in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (Path(__file__).parent.parent / link).exists(), link


def test_the_example_of_a_language_model_is_the_recorded_one():
    record = json.loads((Path(__file__).parent.parent / "benchmarks/text/results.json").read_text())
    run = record["runs"]["translation ppo 0"]
    recorded = [
        f"| {before['prompt']} | {before['completion']} | {after['completion']} | {before['reference']} |"
        for before, after in zip(run["before"], run["after"], strict=True)
    ]
    rows = re.findall(r"^\| to (?:spanish|french) : .*$", README, re.MULTILINE)
    assert len(rows) == 3 and set(rows) <= set(recorded)
    first, last = run["curve"][0], run["curve"][-1]
    assert f"BLEU rose from {first['bleu']:.1f} to {last['bleu']:.1f} and" in README
    assert f"the reward (chrF) from {first['score']:.2f} to {last['score']:.2f}\n" in README

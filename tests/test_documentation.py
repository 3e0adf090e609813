"""README.md and docs/: what they show runs, and what they link to and promise is there."""

import json
import re
import runpy
import statistics
import sys
from pathlib import Path

import gymnasium as gym
import pytest
from forked import forked

import sb3_pg
from sb3_pg.common import errors

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
OF_DOCS = [*sorted(DOCS.glob("*.md")), *sorted(DOCS.glob("algorithms/*.md"))]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *OF_DOCS]
TEXTS = {str(page.relative_to(ROOT)): page.read_text(encoding="utf-8") for page in PAGES}

#: By name, as Sphinx loads it.
generate = runpy.run_path(str(DOCS / "generate.py"))


def blocks():
    """Each block once, though the README's are in the quickstart too."""
    seen = set()
    for name, text in TEXTS.items():
        for found in re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
            if found[1] in seen:
                continue
            seen.add(found[1])
            line = text[: found.start()].count("\n") + 1
            # Leading empty lines, so that a traceback shows the line of the page.
            yield pytest.param(name, "\n" * line + found[1], id=f"{name} line {line}")


def bad_inputs():
    """Rows of the table: code, name of the error, what its message contains."""
    for found in re.finditer(r"^\| `([^`]+)`.*? \| (\w+Error): `` (.+) `` \|$", TEXTS["docs/errors.md"], re.MULTILINE):
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


@pytest.mark.parametrize("name, block", list(blocks()))
def test_code_blocks_run(name, block, tmp_path, monkeypatch):
    """As the program that a reader makes of it."""
    monkeypatch.chdir(tmp_path)
    module = type(sys)("example")
    monkeypatch.setitem(sys.modules, "example", module)
    exec(compile(block, name, "exec"), vars(module))


def test_the_readme_has_a_block_for_each_algorithm():
    code = "".join(block.values[1] for block in blocks() if block.values[0] == "README.md")
    assert all(f"import {name}\n" in code for name in ("PPO", "TRPO", "REINFORCE"))


def test_the_readme_is_short():
    assert len(TEXTS["README.md"].splitlines()) <= 150


@pytest.mark.parametrize("code, error, message", list(bad_inputs()))
def test_bad_input_gets_the_promised_error(code, error, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    kind = getattr(errors, error, None) or {"ValueError": ValueError}[error]
    names = {name: getattr(sb3_pg, name) for name in ("PPO", "TRPO", "REINFORCE")} | {"gym": gym}
    names |= {kind.__name__: kind for kind in (BadReward, BadObservation, Endless)}
    with pytest.raises(kind, match=re.escape(message)):
        exec(code, names)


def test_every_row_of_the_table_is_tested_but_the_one_in_words():
    rows = [line for line in TEXTS["docs/errors.md"].splitlines() if line.startswith("| ") and "Error" in line]
    assert len(list(bad_inputs())) == len(rows) - 1


@pytest.mark.parametrize("name", TEXTS)
def test_every_linked_file_exists(name):
    for link in re.findall(r"\]\((?!http|#)([^)#]+)[^)]*\)", TEXTS[name]):
        generated = re.fullmatch(r"(?:\.\./)?generated/(\w+)\.md", link)
        if generated:
            assert generated[1] in generate["TABLES"], link
        else:
            assert ((ROOT / name).parent / link).exists(), link


def test_every_page_is_in_the_table_of_contents():
    listed = re.findall(r"^[\w/]+$", TEXTS["docs/index.md"], re.MULTILINE)
    pages = [page.relative_to(DOCS).with_suffix("").as_posix() for page in OF_DOCS]
    assert sorted([*listed, "index"]) == sorted(pages)


def test_the_legend_has_a_row_for_each_key_of_the_log():
    parts = generate["legends"]()
    shown = re.findall(r"include\} generated/legend_(\w+)\.md", TEXTS["docs/log.md"])
    assert sorted(shown) == sorted(parts)
    rows = [line for part in parts.values() for line in generate["table"](part).splitlines()]
    assert all(row.count("|") == 3 for row in rows)  # a bar within a text would end its cell
    assert all(any(row.startswith(f"| `{key}` | ") for row in rows) for part in parts.values() for key in part)


def test_tables_are_taken_as_they_are_without_links_to_files_beside_them(tmp_path):
    (tmp_path / "benchmarks" / "speed").mkdir(parents=True)
    table = "# Speed\n\n[All](results.csv) by [SB3](https://x.org/y).\n"
    (tmp_path / "benchmarks" / "speed" / "table.md").write_text(table)
    generate["generate"](tmp_path, tmp_path / "generated")
    assert (tmp_path / "generated" / "speed.md").read_text() == "# Speed\n\nAll by [SB3](https://x.org/y).\n"


def test_what_is_generated_says_so_where_nothing_was_measured(tmp_path):
    generate["generate"](tmp_path, tmp_path / "generated")
    assert "Not measured" in (tmp_path / "generated" / "speed.md").read_text()
    assert "`train/approx_kl`" in (tmp_path / "generated" / "legend_ppo.md").read_text()


def test_the_documentation_builds_without_warnings(tmp_path):
    pytest.importorskip("sphinx")
    from sphinx.cmd.build import main

    options = ["-W", "--keep-going", "-q", "-b", "html"]
    done = forked(lambda: main([*options, str(DOCS), str(tmp_path)]))
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "log.html").read_text(encoding="utf-8")
    assert "train/kl_divergence_loss" in page and "text/reference_perplexity" in page and "KL(old || new)" in page


def test_the_example_of_a_language_model_is_the_recorded_one():
    record = json.loads((ROOT / "benchmarks/text/results.json").read_text())
    page = TEXTS["docs/text.md"]
    run = record["runs"]["translation ppo 0"]
    recorded = [
        f"| {before['prompt']} | {before['completion']} | {after['completion']} | {before['reference']} |"
        for before, after in zip(run["before"], run["after"], strict=True)
    ]
    rows = re.findall(r"^\| to (?:spanish|french) : .*$", page, re.MULTILINE)
    assert len(rows) == 3 and set(rows) <= set(recorded)
    first, last = run["curve"][0], run["curve"][-1]
    assert f"BLEU rose from {first['bleu']:.1f} to {last['bleu']:.1f} and" in page
    assert f"the reward (chrF) from {first['score']:.2f} to {last['score']:.2f}\n" in page


def test_the_readmes_figures_are_those_of_the_tables():
    # Of the times, as the picture above: the table's are rounded already.
    times = json.loads((ROOT / "benchmarks" / "speed" / "results.json").read_text())["rows"]
    rows = ["PPO vs SB3 PPO CartPole-v1 1 envs MlpPolicy", "PPO vs SB3 PPO HalfCheetah-v5 1 envs MlpPolicy"]
    rows += [row.replace("PPO vs SB3 PPO", "TRPO vs contrib TRPO") for row in rows]
    rows += ["PPO vs SB3 PPO Images 84x84 2 envs CnnPolicy n_steps=64 batch_size=64 n_epochs=4"]
    sides = [times[f"main: {row}"]["seconds_per_step"] for row in rows]
    ratios = [statistics.median(p / o for p, o in zip(side["peer"], side["ours"], strict=True)) for side in sides]
    said = TEXTS["README.md"].split("With the defaults PPO")[1].split("Everything")[0]
    assert re.findall(r"\d+\.\d", said) == [f"{ratio:.1f}" for ratio in ratios]

    scores = (ROOT / "benchmarks" / "learning" / "table.md").read_text()
    rows = [line.split(" | ") for line in scores.splitlines() if line.startswith("| HalfCheetah-v5 | 300,000 |")]
    said = TEXTS["README.md"].split("interquartile mean) ")[1].split("After 60")[0]
    assert re.findall(r"\d,\d{3}", said) == [row[4].split()[0] for row in rows[:6]]

    table = (ROOT / "benchmarks" / "learning" / "budget.md").read_text()
    rows = [line[2:].split(" | ") for line in table.splitlines() if "-v5 | " in line]
    medians = {(task, seconds, side): median for task, seconds, side, _, median, _ in rows}
    said = TEXTS["README.md"].split("(medians) ")[1].split("\n([benchmarks/learning/budget.md]")[0]
    sides = ["TRPO", "sb3-contrib TRPO", "PPO", "sbx PPO", "SB3 PPO"]
    asked = [("HalfCheetah-v5", "60"), ("Hopper-v5", "60"), ("HalfCheetah-v5", "600")]
    expected = [medians[task, seconds, side] for task, seconds in asked for side in sides]
    expected.append(medians["HalfCheetah-v5", "600", "REINFORCE"])
    said = said.replace("\n600 seconds", "")
    assert re.findall(r"[\s(](\d[\d,.]*\d)", said) == expected

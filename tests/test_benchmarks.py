"""Scripts of benchmarks/ on small tasks, and the settings that they give the peers."""

import csv
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
RL_ZOO = {"contrib_trpo": "trpo", "sb3_ppo": "ppo", "sb3_a2c": "a2c"}


def learning(command, folder, *options):
    """What the script prints; rl_zoo3 patches gymnasium, hence a process of its own."""
    call = [
        sys.executable,
        "benchmarks/learning.py",
        command,
        "--folder",
        str(folder),
        "--tasks",
        "CartPole-v1",
        *options,
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(call, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def results(folder):
    with (folder / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two seeds of TRPO and its peer, and one of PPO."""
    folder = tmp_path_factory.mktemp("learning")
    learning("run", folder, "--algos", "trpo", "contrib_trpo", "--seeds", "2", "--steps", "1000", "--processes", "2")
    return folder


def test_every_run_is_there_once(folder):
    rows = results(folder)
    runs = [(row["side"], row["seed"]) for row in rows]
    assert len(rows) == 40
    assert {run: runs.count(run) for run in runs} == dict.fromkeys(
        [(side, seed) for side in ("trpo", "contrib_trpo") for seed in "01"], 10
    )
    for row in rows:
        assert float(row["min"]) <= float(row["mean"]) <= float(row["max"])
        assert 0 < float(row["wall_clock_s"])
    assert [int(row["steps"]) for row in rows[:10]] == [*range(100, 1000, 100), 1024]


def test_both_sides_are_evaluated_alike(folder):
    """Before the first update the two are the same policy, and so must be what they score."""
    first = {
        side: next(row for row in results(folder) if (row["side"], row["seed"]) == (side, "1"))
        for side in RL_ZOO | {"trpo": ""}
        if "trpo" in side
    }
    scores = [{name: row[name] for name in ("steps", "mean", "std", "min", "max")} for row in first.values()]
    assert scores[0] == scores[1]


def test_what_is_complete_is_not_done_again(folder):
    before = results(folder)
    options = ("--algos", "trpo", "contrib_trpo", "--steps", "1000")
    assert learning("run", folder, *options, "--seeds", "2") == ""
    assert results(folder) == before
    printed = learning("run", folder, *options, "--seeds", "3").splitlines()
    assert [line.split(":")[0] for line in printed] == [
        "TRPO, CartPole-v1, 1,000 steps, seed 2",
        "sb3-contrib TRPO, CartPole-v1, 1,000 steps, seed 2",
    ]


def test_report_of_incomplete_results(folder, tmp_path):
    rows = results(folder)
    for row in rows:  # a third seed of TRPO, but not of its peer; and a run with settings that are no longer used
        if (row["side"], row["seed"]) == ("trpo", "1"):
            rows = [*rows, row | {"seed": "7"}, row | {"seed": "8"}, row | {"seed": "9", "settings": "old"}]
    with (tmp_path / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(sorted(rows, key=lambda row: (row["side"], row["seed"])))
    (tmp_path / "machine.txt").write_text("a machine")
    assert learning("report", tmp_path).startswith("10 rows are left out")
    table = (tmp_path / "table.md").read_text()
    ours, peer = (
        [cell.strip() for cell in line.split("|")] for line in table.splitlines() if line.startswith("| Cart")
    )
    assert int(ours[4]) == int(peer[4]) + 2
    assert "[" in ours[5]
    assert (tmp_path / "curves.png").stat().st_size > 10_000


@pytest.mark.parametrize("side", RL_ZOO)
def test_peers_have_the_published_settings(side):
    package = importlib.util.find_spec("rl_zoo3").submodule_search_locations[0]
    published = yaml.safe_load((Path(package) / "hyperparams" / f"{RL_ZOO[side]}.yml").read_text())
    used = yaml.safe_load((ROOT / "benchmarks" / "learning" / "peers.yml").read_text())[side]
    assert len(used) == 7
    for task, settings in used.items():
        expected = published[task.replace("-v5", "-v4")]
        assert {k: str(v).replace(" ", "") for k, v in settings.items()} == {
            k: str(v).replace(" ", "") for k, v in parsed(expected).items()
        }


def parsed(settings):
    """YAML takes 1e-3 and 2e-05 for text where the zoo turns them into numbers."""
    numbers = ("learning_rate", "ent_coef")
    return {k: float(v) if k in numbers and not str(v).startswith("lin") else v for k, v in settings.items()}

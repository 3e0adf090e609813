"""Scripts of benchmarks/ on small tasks, and the settings that they give the peers."""

import argparse
import csv
import importlib
import importlib.util
import json
import shutil
import statistics
from pathlib import Path

import pytest
import yaml
from forked import forked, run_script

ROOT = Path(__file__).parent.parent
PAIR = ("--algos", "ppo", "sb3_ppo", "--steps", "1000")
RL_ZOO = {"contrib_trpo": "trpo", "sb3_ppo": "ppo", "sb3_a2c": "a2c"}


def learning(command, folder, *options):
    """What learning.py prints."""
    return script("learning.py", command, "--folder", str(folder), "--tasks", "CartPole-v1", *options)


def script(name, *options):
    """What a script prints; rl_zoo3 patches gymnasium, hence a process of its own."""
    done = forked(lambda: run_script(ROOT / "benchmarks" / name, *options))
    assert done.returncode == 0, done.stderr
    return done.stdout


def results(folder):
    with (folder / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module", autouse=True)
def module():
    """The module of learning.py, with fewer repetitions of the bootstrap; scripts find imported what it imports."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        module = importlib.import_module("learning")
        patch.setattr(module, "REPETITIONS", 50)
        yield module


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two seeds of PPO and its peer, by two processes side by side."""
    folder = tmp_path_factory.mktemp("learning")
    learning("run", folder, *PAIR, "--seeds", "2", "--processes", "2")
    return folder


def test_every_run_is_there_once(folder):
    machine = importlib.import_module("processes").machine
    rows = results(folder)
    runs = [(row["side"], row["seed"]) for row in rows]
    assert len(rows) == 40
    assert all(runs.count((side, seed)) == 10 for side in ("ppo", "sb3_ppo") for seed in "01")
    for row in rows:
        assert float(row["min"]) <= float(row["mean"]) <= float(row["max"])
        assert float(row["wall_clock_s"]) > 0
        assert row["machine"] == machine("NumPy")
    assert [int(row["steps"]) for row in rows[:10]] == [104, 200, 304, 400, 504, 600, 704, 800, 904, 1024]


def test_both_sides_are_evaluated_alike(folder):
    """Before the first update the two are the same policy, and so must be what they score."""
    rows = [row for row in results(folder) if row["seed"] == "1" and row["steps"] == "104"]
    ours, peer = ([row[name] for name in ("mean", "std", "min", "max")] for row in rows)
    assert ours == peer


def test_what_is_complete_is_not_done_again(folder, tmp_path):
    before = results(folder)
    shutil.copy(folder / "results.csv", tmp_path)
    printed = learning("run", tmp_path, *PAIR, "--seeds", "3").splitlines()
    assert [line.split(":")[0] for line in printed] == [
        "PPO, CartPole-v1, 1,000 steps, seed 2",
        "SB3 PPO, CartPole-v1, 1,000 steps, seed 2",
    ]
    assert results(tmp_path)[:40] == before
    assert len(results(tmp_path)) == 60


def test_report_of_incomplete_results(folder, tmp_path):
    rows = results(folder)
    ours = [row for row in rows if (row["side"], row["seed"]) == ("ppo", "1")]
    rows += [row | {"seed": seed} for seed in "234" for row in ours]  # seeds that the peer has not
    rows += [row | {"seed": "5", "settings": "of old"} for row in ours]
    rows = [row | {"machine": "a slower one"} if row["side"] == "sb3_ppo" else row for row in rows]
    with (tmp_path / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    assert learning("report", tmp_path).startswith("10 rows are left out")
    lines = [line for line in (tmp_path / "table.md").read_text().splitlines() if line.startswith("| CartPole-v1")]
    ours, peer = ([cell.strip() for cell in line.split("|")[3:]] for line in lines)
    assert (ours[:2], peer[:2]) == (["PPO", "5"], ["SB3 PPO", "2"])
    assert "[" in ours[2]  # an interval from five seeds on
    assert "[" not in peer[2]
    assert ours[4].isdigit() and peer[4].endswith(" (2)")  # seconds of another machine are marked
    assert (tmp_path / "curves.png").stat().st_size > 10_000


def test_tuning_tries_changed_settings_on_seeds_of_its_own(tmp_path):
    def tune(*options):
        return script("tuning.py", "--folder", str(tmp_path), "run", "trpo", "CartPole-v1", "--steps", "1024", *options)

    tune("--seeds", "100", "101", "--change", "gamma: 0.9", "policy_kwargs: dict(net_arch=[8])")
    assert tune("--seeds", "100", "--change", "gamma: 0.9", "policy_kwargs: dict(net_arch=[8])") == ""  # is there
    tune("--seeds", "100")
    with (tmp_path / "tuning.csv").open(newline="") as file:
        changed, other_seed, unchanged = csv.DictReader(file)
    assert (changed["seed"], other_seed["seed"], unchanged["seed"]) == ("100", "101", "100")
    assert changed["mean"] != unchanged["mean"]  # the change reached the algorithm
    lines = script("tuning.py", "--folder", str(tmp_path), "report").splitlines()
    assert [line.split(" | ")[1] for line in lines] == [
        "gamma: 0.9, policy_kwargs: dict(net_arch=[8])",
        "as in the entry",
    ]
    tune("--seeds", "100", "--entry", "default")
    with (tmp_path / "tuning.csv").open(newline="") as file:
        *_, by_default = csv.DictReader(file)
    assert "normalize: true" in by_default["settings"] and "normalize: true" not in unchanged["settings"]
    with pytest.raises(AssertionError, match="must be at least 100"):
        tune("--seeds", "4")


def test_the_arithmetic_of_ppo_is_that_of_its_layers(module, monkeypatch):
    speed = importlib.import_module("speed")
    monkeypatch.setattr(speed, "product_rate", lambda: 1.0)
    settings = {"n_steps": 64, "batch_size": 64, "n_epochs": 2}
    found = speed.time_arithmetic(speed.Row("main", "PPO", "SB3 PPO", "CartPole-v1", 2, settings))
    first, others = 2 * 4 * 64, 2 * 64 * 64 + 64 * 3  # products of actor and critic for one observation
    # Acting is one pass forward; an epoch one forward and two back, none of them to the observations.
    assert found == pytest.approx(2 * (first + others + 2 * (2 * first + 3 * others)), rel=0.02)


def test_the_arithmetic_of_trpo_is_that_of_its_layers(module, monkeypatch):
    speed = importlib.import_module("speed")
    monkeypatch.setattr(speed, "product_rate", lambda: 1.0)

    def operations(iterations, passes):
        settings = {"n_steps": 64, "batch_size": 64, "cg_max_steps": iterations, "n_critic_updates": passes}
        return speed.time_arithmetic(speed.Row("main", "TRPO", "contrib TRPO", "CartPole-v1", 2, settings))

    first, actor, critic = 4 * 64, 64 * 64 + 64 * 2, 64 * 64 + 64  # products of a network for one observation
    # An iteration is two passes with the tangents and two back, a pass of the critic one forward and two back; the
    # observations have neither a tangent nor a gradient.
    assert operations(2, 1) - operations(1, 1) == pytest.approx(2 * (2 * first + 4 * actor))
    assert operations(1, 2) - operations(1, 1) == pytest.approx(2 * (2 * first + 3 * critic))


def test_the_limit_normalises_nothing(module, monkeypatch):
    """A peer's normalisation can be spared: ours takes less time."""
    speed = importlib.import_module("speed")
    monkeypatch.setattr(speed.sb3_vec_env, "VecNormalize", None)
    assert speed.time_limit(speed.Row("main", "TRPO", "contrib TRPO", "CartPole-v1", 2, {}, normalize=True), 4) > 0


@pytest.mark.parametrize("side", RL_ZOO)
def test_peers_have_the_published_settings(side):
    package = importlib.util.find_spec("rl_zoo3").submodule_search_locations[0]
    published = yaml.safe_load((Path(package) / "hyperparams" / f"{RL_ZOO[side]}.yml").read_text())
    used = yaml.safe_load((ROOT / "benchmarks" / "learning" / "peers.yml").read_text())[side]
    assert len(used) == 7
    for task, settings in used.items():
        assert plain(settings) == plain(published[task.replace("-v5", "-v4")])


def plain(settings):
    """Texts are the same when they differ only in how they are broken into lines."""
    return {name: "".join(value.split()) if isinstance(value, str) else value for name, value in settings.items()}


def test_ours_are_set_beside_the_published_returns(module):
    rows = [
        {
            "machine": "a",
            "steps": "1000",
            "wall_clock_s": "2",
            "cpu_s": "2",
            "mean": str(500 + 100 * (n // 10) + n % 10),
        }
        for n in range(5 * module.EVALUATIONS)
    ]
    curves = {
        ("Hopper-v5", 1000): {"reinforce": module.make_curve(rows), "ppo": module.make_curve(rows)},
        ("Walker2d-v5", 1000): {"ppo": module.make_curve(rows)},
        ("CartPole-v1", 1000): {"reinforce": module.make_curve(rows)},
    }
    rows = [line for line in module.published_tables(curves) if "-v" in line]
    assert [row.split(" | 1,000 | 5 | 709.0 [")[0] for row in rows] == [
        "| Hopper-v5 | 396.0 | 800.0",
        "| Hopper-v5 | 2,410",
        "| Walker2d-v5 | 3,479",
    ]
    assert all(row.endswith("] | 509.0 to 909.0 |") for row in rows)
    assert module.published_tables({}) == []


def test_the_time_of_training_is_that_of_the_fastest_seed(module):
    rows = [
        {"machine": "a", "steps": f"{n}", "wall_clock_s": f"{n * factor}", "cpu_s": f"{n * 3}", "mean": "1"}
        for factor in (5, 3, 4)
        for n in range(1, module.EVALUATIONS + 1)
    ]
    curve = module.make_curve(rows)
    assert curve.seconds.tolist() == [3.0 * n for n in range(1, module.EVALUATIONS + 1)]
    curves = {("Hopper-v5", 10): {"ppo": curve}}
    assert [cell.strip() for cell in module.make_table(curves)[-1].split("|")][7] == "30"
    assert module.disturbed(curves).startswith("2 of 3 ")


def test_a_peer_without_published_settings_does_not_run(module):
    args = argparse.Namespace(seeds=1, tasks=["InvertedPendulum-v5"], algos=["reinforce", "sb3_a2c"], steps=None)
    assert [run.side for run in module.wanted_runs(args)] == ["reinforce"]


def test_a_task_counts_once_in_the_average_of_all(module):
    def curve(score):
        row = {"machine": "a", "steps": "1", "wall_clock_s": "1", "cpu_s": "1", "mean": str(score)}
        return module.make_curve([row] * module.MIN_SEEDS * module.EVALUATIONS)

    won, lost = {"ppo": curve(2), "sb3_ppo": curve(1)}, {"ppo": curve(1), "sb3_ppo": curve(2)}
    curves = {("Hopper-v5", 10): won, ("Swimmer-v5", 10): won, ("Swimmer-v5", 30): lost}
    assert module.make_table(curves)[-1].startswith("| all 2 | | PPO | | | | | 1.00 ")


def test_vectorised_environments_are_timed_and_reported(tmp_path):
    options = ["--folder", str(tmp_path), "--repeats", "2", "--only", "8 environments"]
    printed = script("vectorised.py", *options, "--group", "normalising")
    assert "8 environments, observations of 17" in printed
    script("vectorised.py", *options, "--report")
    table = (tmp_path / "table.md").read_text()
    rows = json.loads((tmp_path / "results.json").read_text())["groups"]["normalising"]
    assert [len(rates["wall"]) for row in rows.values() for rates in row.values()] == [2] * 3
    ours, peer = (statistics.median(rates["wall"]) for rates in list(next(iter(rows.values())).values())[:2])
    assert f"| ours | {ours:,.0f} (" in table and f"| SB3's | {peer:,.0f} (" in table


def test_a_budget_of_seconds_is_so_many_steps(module):
    """What is compiled in the first rollout counts once; of several runs the median counts."""
    budget = importlib.import_module("budget")
    pace = budget.Pace(1.0)
    pace.steps, pace.clock = [0, 100, 200, 300], [0.0, 5.0, 6.0, 7.0]
    assert pace.found() == [100, 5.0, 100.0]
    assert budget.steps_in(60, [pace.found()]) == 100 + 55 * 100
    assert budget.steps_in(60, [[100, 5.0, 90.0], pace.found(), [100, 5.0, 500.0]]) == 100 + 55 * 100
    assert not pace._on_step()
    pace.clock[-1] = 0.9
    assert pace._on_step()


def test_report_of_a_budget(module, tmp_path):
    budget = importlib.import_module("budget")
    paces = {side: [[100, 5.0, 100.0]] for side in ("trpo", "ppo")}
    known = {"Hopper-v5": {"machine": "a machine", "paces": paces}}
    known |= {f"Hopper-v5 trpo 60 {seed}": {"mean": 10.0 * seed} for seed in range(5)}
    known |= {f"Hopper-v5 ppo 60 {seed}": {"mean": 1.0} for seed in range(4)}
    (tmp_path / "budget.json").write_text(json.dumps(known))
    budget.report(tmp_path / "budget.json")
    seconds, _, _, _, _, *rows = (tmp_path / "budget.md").read_text().splitlines()[4:]
    assert seconds == "- The seconds of Hopper-v5 are those of a machine."
    assert rows == ["| Hopper-v5 | 60 | TRPO | 5,600 | 20.0 | 0.0, 10.0, 20.0, 30.0, 40.0 |"]  # not four seeds


def test_report_of_pong(module, tmp_path):
    atari = importlib.import_module("atari")
    curve = [[100, 3600.0, -20.0], [200, 7200.0, 1.0], [300, 10800.0, 5.0]]
    known = {"machine": "a machine", "ppo 0 300": {"curve": curve, "returns": [18.0, 20.0]}}
    known["ppo 0 300"] |= {"device": "cpu", "machine": "a laptop"}
    known["trpo 1 300"] = {"curve": curve[:1], "returns": [-21.0], "device": "a GPU", "machine": "a server"}
    (tmp_path / "atari.json").write_text(json.dumps(known))
    atari.report(tmp_path / "atari.json")
    lines = (tmp_path / "atari.md").read_text().splitlines()
    assert lines[4:6] == ["- a GPU: a server.", "- cpu: a laptop."]
    assert lines[-2:] == [
        "| PPO | 0 | cpu | 300 | 180.0 | 200 | 5.0 | 19.0, 18 |",
        "| TRPO | 1 | a GPU | 100 | 60.0 | never | -20.0 | -21.0, -21 |",
    ]


def test_what_is_kept_is_not_found_again(module, tmp_path):
    kept, path = importlib.import_module("kept"), tmp_path / "results.json"
    assert [kept.kept(path, name, lambda name=name: name * 2) for name in ("a", "b")] == ["aa", "bb"]
    assert kept.kept(path, "a", lambda: "other") == "aa"
    assert kept.read(path).keys() == {"a", "b", "machine"}

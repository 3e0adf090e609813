"""Try settings of zoo_configs/ on seeds that the benchmark of learning does not use.

    python benchmarks/tuning.py run trpo Hopper-v5 --change "target_kl: 0.06" "policy_kwargs: dict(log_std_init=-1)"
    python benchmarks/tuning.py run ppo Hopper-v5 --entry default     # how the general settings do
    python benchmarks/tuning.py report

Trains as benchmarks/learning.py does, with the entry of the task (without one, the default) as it is or with some of
its values changed, plays 20 episodes with deterministic actions after training, and adds a row for each seed to
learning/tuning.csv; what is there is not done again. ``report`` prints all of it, a line for each setting.
"""

import argparse
import csv
from pathlib import Path
from typing import Any

from processes import with_one_thread

if __name__ == "__main__":
    with_one_thread()

import learning
import numpy as np
import torch as th
import yaml

#: What tells one run from another (all settings, as the algorithm got them), then its result.
KEYS = ["side", "task", "total_steps", "settings", "seed"]
COLUMNS = [*KEYS, "mean", "std", "min", "max", "cpu_s"]

#: The benchmark of learning reports the seeds from 0 on.
FIRST_SEED = 100


def settings_text(settings: dict[str, Any]) -> str:
    """One line that is the same for the same settings."""
    kept = {key: value for key, value in settings.items() if key != "n_timesteps"}
    return yaml.safe_dump(kept, default_flow_style=True, sort_keys=True, width=10_000).strip()


def read(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def try_settings(
    side: str, task: str, entry: str, change: dict[str, Any], seeds: list[int], steps: int, path: Path
) -> None:
    settings = {**learning.settings_of(side, entry), **change}
    done = {tuple(row[key] for key in KEYS) for row in read(path)}
    for seed in seeds:
        key = (side, task, str(steps), settings_text(settings), str(seed))
        if key in done:
            continue
        rows = learning.train(learning.Run(side, task, seed, steps, ""), settings, evaluations=1)
        _, _, cpu_seconds, *result = rows[-1]
        with path.open("a", newline="") as file:
            writer = csv.writer(file)
            if file.tell() == 0:
                writer.writerow(COLUMNS)
            writer.writerow([*key, *result, cpu_seconds])
        about = change if entry == task else f"by the entry {entry} {change}"
        print(
            f"{side} {task} {about} seed {seed}: {result[0]:.1f} +/- {result[1]:.1f}, {cpu_seconds:.0f} s", flush=True
        )


def report(path: Path) -> None:
    """Every setting by its difference from the entry of today, with the interquartile mean and all seeds."""
    groups: dict[tuple[str, ...], list[float]] = {}
    for row in read(path):
        groups.setdefault(tuple(row[key] for key in KEYS[:-1]), []).append(float(row["mean"]))
    for (side, task, steps, text), scores in sorted(groups.items()):
        today, then = learning.settings_of(side, task), yaml.safe_load(text)
        today.pop("n_timesteps", None)
        names = sorted(key for key in {*today, *then} if today.get(key) != then.get(key))
        changed = ", ".join(f"{name}: {then.get(name, 'default')}" for name in names) or "as in the entry"
        middle = learning.interquartile_mean(np.array(scores)[:, None, None])[0]
        every = " ".join(f"{score:.0f}" if abs(score) >= 1000 else f"{score:.1f}" for score in scores)
        print(f"{side} {task} {int(steps):,} steps | {changed} | {middle:.1f} of {every}")


def seed(text: str) -> int:
    if int(text) < FIRST_SEED:
        raise argparse.ArgumentTypeError(f"must be at least {FIRST_SEED}: smaller ones are for learning.py")
    return int(text)


def one_change(text: str) -> dict[str, Any]:
    change = yaml.safe_load(text)
    if not isinstance(change, dict):
        raise argparse.ArgumentTypeError(f"must be KEY: VALUE with a space after the colon, not {text}")
    return change


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=learning.HERE, help="where the results are")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("report", help="print the results")
    run = commands.add_parser("run", help="train")
    run.add_argument("side", choices=learning.SIDES)
    run.add_argument("task", help="any environment that is registered")
    run.add_argument("--entry", help="of the configuration file (default: the task's)")
    run.add_argument("--change", nargs="+", type=one_change, default=[], metavar='"KEY: VALUE"')
    run.add_argument("--seeds", nargs="+", type=seed, default=[FIRST_SEED, FIRST_SEED + 1, FIRST_SEED + 2])
    run.add_argument("--steps", type=learning.positive, help="default: those of learning.py, else 300,000")
    args = parser.parse_args()
    path = args.folder / "tuning.csv"
    if args.command == "report":
        report(path)
        return
    change = {key: value for change in args.change for key, value in change.items()}
    th.set_num_threads(1)
    steps = args.steps or learning.TASKS.get(args.task, 300_000)
    try_settings(args.side, args.task, args.entry or args.task, change, args.seeds, steps, path)


if __name__ == "__main__":
    main()

"""What is learned in 60 seconds and in 10 minutes on one core, by ours and by the peers, each with its zoo settings.

    python benchmarks/budget.py                                  # everything, five seeds: two days; resumable
    python benchmarks/budget.py --seconds 60 --tasks Hopper-v5   # an hour; two of these side by side take two cores
    python benchmarks/budget.py --report                         # the table again from the data

Short runs, of all sides by turns, find how many steps each makes in the time, what it compiles first included. Then
each seed trains for so many steps, by which schedules end, and plays 20 episodes with deterministic actions, as in
learning.py, which has the settings too. The clock is that of the processor, on one core and one thread, so that other
work does not count. sbx's PPO has the settings of SB3's. Writes learning/budget.json and learning/budget.md.
"""

import argparse
import itertools
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

from processes import in_a_process, machine, with_one_thread

if __name__ == "__main__":
    with_one_thread()

import learning
import numpy as np
import torch as th
from kept import kept, read, run_or_report
from stable_baselines3.common.callbacks import BaseCallback

#: Every side, as the data names it and as the report does.
SIDES = {side: name for side, name in learning.SIDES.items() if side != "sb3_a2c"} | {"sbx_ppo": "sbx PPO"}
TASKS = ("HalfCheetah-v5", "Hopper-v5")
SECONDS = (60, 600)
SEEDS = 5
PROBES, PROBE_SECONDS, PROBE_SEED = 5, 8, 99


class Pace(BaseCallback):
    """Notes steps and CPU seconds at the start of each rollout; stops after so many seconds and three rollouts."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds
        self.steps, self.clock = list[int](), list[float]()

    def _on_training_start(self) -> None:
        self.start = time.process_time()

    def _on_rollout_start(self) -> None:
        self.steps.append(self.num_timesteps)
        self.clock.append(time.process_time() - self.start)

    def _on_step(self) -> bool:
        return len(self.clock) <= 3 or self.clock[-1] < self.seconds

    def found(self) -> list[float]:
        """Return steps and seconds of the first rollout, which compiles, and the steps per second after it."""
        return [self.steps[1], self.clock[1], (self.steps[-1] - self.steps[1]) / (self.clock[-1] - self.clock[1])]


def steps_in(seconds: int, paces: list[list[float]]) -> int:
    """Return how many steps there are in so many seconds, by the median of what several runs have found."""
    return max(1, int(statistics.median(first + (seconds - after) * rate for first, after, rate in paces)))


def settings_of(side: str, task: str) -> dict[str, Any]:
    return learning.settings_of("sb3_ppo" if side == "sbx_ppo" else side, task)


def prepare(side: str) -> None:
    """Compute on one thread; let the zoo know sbx's PPO, with the activation functions of its own framework."""
    th.set_num_threads(1)
    if side != "sbx_ppo":
        return
    import sbx
    from flax import linen
    from rl_zoo3 import ALGOS

    class PPO(sbx.PPO):
        def __init__(self, *args: Any, policy_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> None:
            own = dict(policy_kwargs or {})
            if own.get("activation_fn") is th.nn.ReLU:
                own["activation_fn"] = linen.relu
            super().__init__(*args, policy_kwargs=own, **kwargs)

    ALGOS["sbx_ppo"] = PPO


def pace(side: str, task: str) -> list[float]:
    prepare(side)
    with learning.experiment(learning.Run(side, task, PROBE_SEED, 10**9, ""), settings_of(side, task)) as (model, _):
        callback = Pace(PROBE_SECONDS)
        model.learn(10**9, callback=callback)
    return callback.found()


def all_paces(task: str, sides: list[str]) -> dict[str, Any]:
    """Return the paces of all sides, which run by turns."""
    rounds = [{side: in_a_process(pace, side, task) for side in sides} for _ in range(PROBES)]
    return {"machine": machine("NumPy"), "paces": {side: [found[side] for found in rounds] for side in sides}}


def train(side: str, task: str, seed: int, steps: int) -> dict[str, float]:
    """Return what a run has found."""
    prepare(side)
    run = learning.Run(side, task, seed, steps, "")
    (row,) = learning.train(run, settings_of(side, task), evaluations=1)
    return dict(zip(learning.COLUMNS[5:], row, strict=True))


def do_runs(path: Path, args: argparse.Namespace) -> None:
    for seconds in args.seconds:
        for seed in range(SEEDS):
            for task in args.tasks:
                paces = kept(path, task, partial(all_paces, task, args.sides))["paces"]
                if missing := set(args.sides) - set(paces):
                    raise SystemExit(f"{path} has paces for {task} without those of {missing}: take another --folder.")
                for side in args.sides:
                    name = f"{task} {side} {seconds} {seed}"
                    steps = steps_in(seconds, paces[side])
                    found = kept(path, name, partial(in_a_process, train, side, task, seed, steps))
                    print(f"{name}: {found['mean']:.1f} after {found['cpu_s']:.0f} s", flush=True)


def report(path: Path) -> None:
    known = read(path)
    begun = {task: known[task] for task in learning.TASKS if task in known}
    times = sorted({int(name.split()[2]) for name in known if len(name.split()) == 4})
    lines = ["# In the same time", "", "Made by `benchmarks/budget.py`, for one core and one thread.", ""]
    lines += [f"- The seconds of {task} are those of {found['machine']}." for task, found in begun.items()]
    lines += ["- Mean return of 20 episodes with deterministic actions after training, of each seed.", ""]
    lines += ["| task | seconds | side | steps | median | each seed |", "|---|---|---|---|---|---|"]
    for task, seconds in itertools.product(begun, times):
        for side, paces in begun[task]["paces"].items():
            runs = [known.get(f"{task} {side} {seconds} {seed}") for seed in range(SEEDS)]
            if None not in runs:
                scores = [run["mean"] for run in runs if run]
                cells = [task, str(seconds), SIDES[side], f"{steps_in(seconds, paces):,}"]
                cells += [learning.number(np.median(scores)), ", ".join(map(learning.number, scores))]
                lines.append("| " + " | ".join(cells) + " |")
    path.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=learning.TASKS, default=TASKS, metavar="TASK")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES), metavar="SIDE", help=", ".join(SIDES))
    parser.add_argument("--seconds", nargs="+", type=learning.positive, default=SECONDS)
    run_or_report(parser, learning.HERE / "budget.json", do_runs, report)


if __name__ == "__main__":
    main()

"""What is learned in 60 seconds and in 10 minutes on one core, by ours and by the peers, each with its zoo settings.

    python benchmarks/budget.py                                  # everything, five seeds: two days; resumable
    python benchmarks/budget.py --seconds 60 --tasks Hopper-v5   # an hour; two of these side by side take two cores
    python benchmarks/budget.py --report                         # the table again from the data

A short run finds how many steps a side makes in the time, what it compiles first included. Then each seed trains for so
many steps, by which schedules end, and plays 20 episodes with deterministic actions, as in learning.py, which has the
settings too. The clock is that of the processor, on one core and one thread, so that other work does not count. What
was begun on one machine goes on there only. sbx's PPO has the settings of SB3's. Writes learning/budget.json and
learning/budget.md.
"""

import argparse
import os
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

if __name__ == "__main__" and os.environ.get("OMP_NUM_THREADS") != "1":
    os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")
    os.execv(sys.executable, [sys.executable, *sys.argv])

import learning
import numpy as np
import torch as th
from kept import kept, read, run_or_report
from processes import in_a_process
from speed import machine
from stable_baselines3.common.callbacks import BaseCallback

#: Every side, as the data names it and as the report does.
SIDES = {side: name for side, name in learning.SIDES.items() if side != "sb3_a2c"} | {"sbx_ppo": "sbx PPO"}
TASKS = ("HalfCheetah-v5", "Hopper-v5")
SECONDS = (60, 600)
SEEDS = 5
PROBE_SEED = 99


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

    def steps_in(self, seconds: float) -> int:
        """Return how many steps there are in so many seconds; the first rollout compiles."""
        rate = (self.steps[-1] - self.steps[1]) / (self.clock[-1] - self.clock[1])
        return max(1, self.steps[1] + int((seconds - self.clock[1]) * rate))


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


def steps_in(side: str, task: str, seconds: int) -> dict[str, Any]:
    """Return how many steps a side makes in the time, and on which machine."""
    prepare(side)
    with learning.experiment(learning.Run(side, task, PROBE_SEED, 10**9, ""), settings_of(side, task)) as (model, _):
        pace = Pace(seconds / 8)
        model.learn(10**9, callback=pace)
    return {"steps": pace.steps_in(seconds), "machine": machine()}


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
                for side in args.sides:
                    do_run(path, f"{task} {side} {seconds}", seed)


def do_run(path: Path, budget: str, seed: int) -> None:
    task, side, seconds = budget.split()
    begun = kept(path, budget, partial(in_a_process, steps_in, side, task, int(seconds)))

    def find() -> dict[str, float]:
        if begun["machine"] != machine():
            raise SystemExit(f"{budget} was begun on {begun['machine']}: go on there, or take another --folder.")
        return in_a_process(train, side, task, seed, begun["steps"])

    found = kept(path, f"{budget} {seed}", find)
    print(f"{budget} {seed}: {found['mean']:.1f} after {found['cpu_s']:.0f} s", flush=True)


def report(path: Path) -> None:
    known = read(path)
    lines = ["# In the same time", "", "Made by `benchmarks/budget.py`, on one core and with one thread.", ""]
    lines += ["Mean return of 20 episodes with deterministic actions after training, of each seed.", ""]
    lines += ["| task | seconds | side | steps | seconds taken | median | each seed |", "|---|---|---|---|---|---|---|"]
    machines: dict[str, list[str]] = {}
    for name in (name for name in known if len(name.split()) == 3):
        task, side, seconds = name.split()
        runs = [known[f"{name} {seed}"] for seed in range(SEEDS) if f"{name} {seed}" in known]
        if len(runs) < SEEDS:
            continue
        scores = [run["mean"] for run in runs]
        taken = statistics.median(run["cpu_s"] for run in runs)
        steps, on = f"{known[name]['steps']:,}", known[name]["machine"]
        cells = [task, seconds, SIDES[side], steps, f"{taken:.0f}", learning.number(np.median(scores))]
        lines.append("| " + " | ".join([*cells, ", ".join(map(learning.number, scores))]) + " |")
        if f"{task}, {seconds} s" not in machines.setdefault(on, []):
            machines[on].append(f"{task}, {seconds} s")
    lines += ["", *(f"- {'; '.join(budgets)}: on {on}." for on, budgets in machines.items())]
    path.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=learning.TASKS, default=TASKS, metavar="TASK")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES), metavar="SIDE", help=", ".join(SIDES))
    parser.add_argument("--seconds", nargs="+", type=learning.positive, default=SECONDS)
    run_or_report(parser, learning.HERE / "budget.json", do_runs, report)


if __name__ == "__main__":
    main()

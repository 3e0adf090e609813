"""Learning curves of our three algorithms and of their peers, against steps and against wall-clock.

    python benchmarks/learning.py run                                            # everything, 5 seeds: many hours
    python benchmarks/learning.py run --tasks Hopper-v5 --algos trpo contrib_trpo --seeds 10 --processes 2
    python benchmarks/learning.py run --tasks HalfCheetah-v5 --steps 1000000
    python benchmarks/learning.py report                                         # of whatever there is

Each side trains with its zoo settings: ours with those of zoo_configs/, the peers with learning/peers.yml. Ten times
in a run, the last after training, it plays 20 episodes with deterministic actions, on seeds that no training uses and
that are the same for all sides, with the observations normalised as in training. The clock stops meanwhile. One
process trains with one thread, on the vectorised environments of its side.

``run`` adds the rows of a run to learning/results.csv when it is complete, and passes over those that are there, so it
may be stopped at any time, and started twice side by side. A run is known by side, task, seed, steps and settings:
after a change of settings it is done again, and ``report`` leaves out the old one. Changes of code it cannot see.
"""

import argparse
import contextlib
import csv
import hashlib
import io
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__" and os.environ.get("OMP_NUM_THREADS") != "1":
    os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")
    os.execv(sys.executable, [sys.executable, *sys.argv])

import numpy as np
import torch as th
import yaml
from filelock import FileLock, Timeout
from speed import machine
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecEnv, sync_envs_normalization

from sb3_pg.zoo import CONFIGS

HERE = Path(__file__).parent / "learning"

#: Every side, as the results name it and as the report does.
SIDES = {
    "trpo": "TRPO",
    "contrib_trpo": "sb3-contrib TRPO",
    "ppo": "PPO",
    "sb3_ppo": "SB3 PPO",
    "reinforce": "REINFORCE",
    "sb3_a2c": "SB3 A2C",
}

#: Ours, and whom each is compared with.
PEERS = {"trpo": "contrib_trpo", "ppo": "sb3_ppo", "reinforce": "sb3_a2c"}

#: Steps of training.
TASKS = {
    "CartPole-v1": 100_000,
    "Acrobot-v1": 100_000,
    "LunarLanderContinuous-v3": 300_000,
    "HalfCheetah-v5": 300_000,
    "Hopper-v5": 300_000,
    "Walker2d-v5": 300_000,
    "Swimmer-v5": 300_000,
}

EVALUATIONS = 10
EPISODES = 20
EVALUATION_SEED = 1_000_000

COLUMNS = "side task seed total_steps settings steps wall_clock_s mean std min max".split()


class Run(NamedTuple):
    """What tells one run from another."""

    side: str
    task: str
    seed: int
    total_steps: int
    settings: str


def settings_of(side: str, task: str) -> dict[str, Any]:
    """The entry of a configuration file."""
    if side in PEERS:
        return yaml.safe_load((CONFIGS / f"{side}.yml").read_text())[task]
    return yaml.safe_load((HERE / "peers.yml").read_text())[side][task]


def fingerprint(side: str, task: str) -> str:
    """Eight letters that change with the settings."""
    settings = {key: value for key, value in settings_of(side, task).items() if key != "n_timesteps"}
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]


# --------------------------------------------------------------------- run


class Evaluate(BaseCallback):
    """Plays episodes at equal intervals and after training, and notes what the results file holds of them.

    :param env: one environment for each episode, wrapped as those of training
    :param seed: of training; its evaluations have seeds of their own
    :param total_steps: of training
    """

    def __init__(self, env: VecEnv, seed: int, total_steps: int) -> None:
        super().__init__()
        self.env, self.seed, self.interval = env, seed, total_steps / EVALUATIONS
        self.rows: list[list[float]] = []
        self.started = self.paused = 0.0

    def _on_training_start(self) -> None:
        self.started = time.perf_counter()

    def _on_step(self) -> bool:
        n = len(self.rows) + 1
        if n < EVALUATIONS and self.num_timesteps >= n * self.interval:
            self.evaluate()
        return True

    def _on_training_end(self) -> None:
        self.evaluate()

    def evaluate(self) -> None:
        now = time.perf_counter()
        wall_clock = now - self.started - self.paused
        sync_envs_normalization(self.model.get_env(), self.env)
        self.env.seed(EVALUATION_SEED * (1 + self.seed) + EPISODES * len(self.rows))
        returns, _ = evaluate_policy(self.model, self.env, EPISODES, return_episode_rewards=True)
        numbers = (wall_clock, np.mean(returns), np.std(returns), np.min(returns), np.max(returns))
        self.rows.append([self.model.num_timesteps, *(round(float(number), 3) for number in numbers)])
        self.paused += time.perf_counter() - now


def train(run: Run) -> list[list[float]]:
    """Train one side with rl-zoo's code for models and environments; a row for each evaluation."""
    import sb3_contrib
    import stable_baselines3
    from rl_zoo3 import ALGOS

    from sb3_pg.zoo import register
    from sb3_pg.zoo.manager import ExperimentManager

    register()
    ALGOS.update(contrib_trpo=sb3_contrib.TRPO, sb3_ppo=stable_baselines3.PPO, sb3_a2c=stable_baselines3.A2C)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        config = Path(folder) / "settings.yml"
        config.write_text(yaml.safe_dump({run.task: settings_of(run.side, run.task)}))
        experiment = ExperimentManager(
            argparse.Namespace(),
            run.side,
            run.task,
            folder,
            n_timesteps=run.total_steps,
            eval_freq=-1,
            seed=run.seed,
            verbose=0,
            device="cpu",
            config=None if run.side in PEERS else str(config),
        )
        model, _ = experiment.setup_experiment()
        evaluate = Evaluate(experiment.create_envs(EPISODES, eval_env=True), run.seed, run.total_steps)
        model.learn(run.total_steps, callback=evaluate)
        for env in (model.get_env(), evaluate.env):
            env.close()
    return evaluate.rows


def complete_runs(path: Path) -> set[Run]:
    if not path.exists():
        return set()
    with path.open(newline="") as file:
        return {
            Run(row["side"], row["task"], int(row["seed"]), int(row["total_steps"]), row["settings"])
            for row in csv.DictReader(file)
        }


def wanted_runs(args: argparse.Namespace) -> Iterator[Run]:
    """Every task and side with a seed before the next seed."""
    for seed in range(args.seeds):
        for task in args.tasks:
            for side in args.algos:
                yield Run(side, task, seed, args.steps or TASKS[task], fingerprint(side, task))


def append(path: Path, run: Run, rows: list[list[float]]) -> None:
    with FileLock(f"{path}.lock"), path.open("a", newline="") as file:
        writer = csv.writer(file)
        if file.tell() == 0:
            writer.writerow(COLUMNS)
        writer.writerows([*run, *row] for row in rows)


def work(args: argparse.Namespace) -> bool:
    """Do the runs that nobody has done or is doing; whether all went well."""
    th.set_num_threads(1)
    path, well = args.folder / "results.csv", True
    claims = args.folder / ".claims"
    claims.mkdir(parents=True, exist_ok=True)
    (args.folder / "machine.txt").write_text(machine() + "\n")
    for run in wanted_runs(args):
        # The system frees the lock of a process that ends in whatever way.
        claim = FileLock(claims / f"{'-'.join(map(str, run))}.lock")
        with contextlib.suppress(Timeout), claim.acquire(blocking=False):
            if run in complete_runs(path):
                continue
            name = f"{SIDES[run.side]}, {run.task}, {run.total_steps:,} steps, seed {run.seed}"
            try:
                rows = train(run)
            except Exception:  # of one run: the others are still worth having
                traceback.print_exc()
                print(f"{name}: failed", flush=True)
                well = False
                continue
            append(path, run, rows)
            _, seconds, mean, std, *_ = rows[-1]
            print(f"{name}: {mean:.1f} +/- {std:.1f} after {seconds:.1f} s", flush=True)
    return well


def run_command(args: argparse.Namespace) -> bool:
    if args.processes == 1:
        return work(args)
    command = [sys.executable, *sys.argv, "--processes", "1"]
    children = [subprocess.Popen(command) for _ in range(args.processes)]
    return not any([child.wait() for child in children])

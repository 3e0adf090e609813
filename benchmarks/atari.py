"""Pong from its pixels, in EnvPool's environments, by ours with their zoo settings for Atari but for ``CHANGES``.

    python benchmarks/atari.py                          # PPO, five seeds: hours each; resumable
    python benchmarks/atari.py --algos trpo --seeds 1
    python benchmarks/atari.py --device cuda --processes 5 --env-threads 3     # all seeds at once on one GPU: minutes
    python benchmarks/atari.py --report                 # the table again from the data

Needs EnvPool. A run is one process, with one thread and those of its environments. While it trains it notes the mean
return of the last 100 episodes of training, whose actions are drawn from the policy; afterwards 20 episodes are played
with deterministic actions. A game goes to 21 points: -21 is to lose all, 0 as good as the opponent. Writes
learning/atari.json and learning/atari.md.
"""

import argparse
import contextlib
import io
import itertools
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
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
from stable_baselines3.common.evaluation import evaluate_policy

from sb3_pg.zoo import register

TASK = "Pong-v5"
STEPS = 1_000_000
SEEDS = 5
POINTS = 20  # of a curve
EPISODES = 20

#: rl-zoo's settings are for ten times as many steps: with more environments a step of all takes less time for each, and
#: larger steps learn sooner.
CHANGES = {"ppo": {"n_envs": 32, "n_steps": 64, "learning_rate": 5e-4, "clip_range": 0.2}}


class Curve(BaseCallback):
    """Notes steps, seconds and the mean return of the last episodes of training, at equal intervals."""

    def __init__(self, total_steps: int) -> None:
        super().__init__()
        self.interval = total_steps / POINTS
        self.rows: list[list[float]] = []

    def _on_training_start(self) -> None:
        self.start = time.perf_counter()

    def _on_step(self) -> bool:
        if self.num_timesteps >= (len(self.rows) + 1) * self.interval:
            returns = [episode["r"] for episode in self.model.ep_info_buffer or ()]
            score = round(float(np.mean(returns)), 2) if returns else float("nan")
            self.rows.append([self.num_timesteps, round(time.perf_counter() - self.start, 1), score])
        return True


def train(algo: str, seed: int, steps: int, device: str, env_threads: int) -> dict[str, Any]:
    """Return the curve of a run, the returns afterwards, the device and the machine."""
    th.set_num_threads(1)
    register()
    from sb3_pg.zoo.manager import ExperimentManager

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        manager = ExperimentManager(
            argparse.Namespace(),
            algo,
            TASK,
            folder,
            n_timesteps=steps,
            eval_freq=-1,
            seed=seed,
            verbose=0,
            device=device,
            vec_env_type="envpool",
            hyperparams=CHANGES.get(algo, {}),
            env_kwargs={"num_threads": env_threads},
            eval_env_kwargs={"num_threads": env_threads},
        )
        made = manager.setup_experiment()
        assert made is not None
        model = made[0]
        curve = Curve(steps)
        model.learn(steps, callback=curve)
        manager.seed = learning.EVALUATION_SEED * (1 + seed)
        env = manager.create_envs(EPISODES, eval_env=True)
        returns, _ = evaluate_policy(model, env, EPISODES, return_episode_rewards=True)
    name = th.cuda.get_device_name() if device == "cuda" else device
    played = np.array(returns, float).tolist()
    return {"curve": curve.rows, "returns": played, "device": name, "machine": machine("NumPy")}


def report(path: Path) -> None:
    known = read(path)
    del known["machine"]  # of the last run only
    lines = ["# Pong", "", "Made by `benchmarks/atari.py`.", ""]
    machines = sorted({(found["device"], found["machine"]) for found in known.values()})
    lines += [f"- {device}: {name}." for device, name in machines]
    lines += [
        "- Minutes: of the clock, on a machine that did other work beside some of the runs.",
        "- As good as the opponent: steps until the mean return of the last 100 episodes of training is above 0.",
        "- Last episodes: their mean return at the end of training, with actions drawn from the policy.",
        f"- Played after training: the mean return of {EPISODES} episodes with deterministic actions, and the least.",
        "",
        "| side | seed | device | steps | minutes | as good as the opponent | last episodes | played after training |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, found in sorted(known.items()):
        algo, seed, _ = name.split()
        steps, seconds, score = found["curve"][-1]
        even = next((f"{int(step):,}" for step, _, mean in found["curve"] if mean > 0), "never")
        played = f"{np.mean(found['returns']):.1f}, {min(found['returns']):.0f}"
        about = [learning.SIDES[algo], seed, found["device"], f"{int(steps):,}", f"{seconds / 60:.1f}"]
        cells = [*about, even, f"{score:.1f}", played]
        lines.append("| " + " | ".join(cells) + " |")
    path.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def do_runs(path: Path, args: argparse.Namespace) -> None:
    def do_run(which: tuple[int, str]) -> None:
        seed, algo = which
        name = f"{algo} {seed} {args.steps}"
        run = partial(in_a_process, train, algo, seed, args.steps, args.device, args.env_threads)
        found = kept(path, name, run)
        print(f"{name}: {np.mean(found['returns']):.1f}", flush=True)

    with ThreadPoolExecutor(args.processes) as pool:
        list(pool.map(do_run, itertools.product(range(args.seeds), args.algos)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--algos", nargs="+", choices=learning.PEERS, default=["ppo"], metavar="ALGO")
    parser.add_argument("--seeds", type=learning.positive, default=SEEDS)
    parser.add_argument("--steps", type=learning.positive, default=STEPS)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--processes", type=learning.positive, default=1, help="how many runs at a time")
    parser.add_argument("--env-threads", type=learning.positive, default=1, help="of the environments of a run")
    run_or_report(parser, learning.HERE / "atari.json", do_runs, report)


if __name__ == "__main__":
    main()

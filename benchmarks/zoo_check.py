"""Train one entry of zoo_configs/ with one seed and write the result into the comment above it.

    python benchmarks/zoo_check.py trpo CartPole-v1 --timesteps 50000
    python benchmarks/zoo_check.py trpo PongNoFrameskip-v4 --entry atari --timesteps 20000

Further options are those of ``python -m sb3_pg.zoo train``; with -params add --dry, for the entry is another then. The
score is that of 20 episodes with deterministic actions on seeds that training has not seen.
"""

import argparse
import datetime
import re
import tempfile
from pathlib import Path

import torch as th
from rl_zoo3 import ALGOS, create_test_env, get_saved_hyperparams
from stable_baselines3.common.evaluation import evaluate_policy

from sb3_pg.zoo import CONFIGS
from sb3_pg.zoo.__main__ import main as zoo

EPISODES = 20


def train(algo: str, env_id: str, seed: int, timesteps: int, folder: str, more: list[str]) -> Path:
    """Train by the zoo's command; the folder of the run."""
    options = ["--algo", algo, "--env", env_id, "--seed", str(seed), "-f", folder, "--eval-freq", "-1"]
    options += ["--log-interval", "1000000", "-n", str(timesteps)]
    if zoo(["train", *options, *more]) != 0:
        raise SystemExit(1)
    return Path(folder) / algo / f"{env_id}_1"


def evaluate(algo: str, env_id: str, seed: int, run: Path) -> tuple[int, float, float]:
    """Steps trained, mean and standard deviation of the return."""
    settings, statistics = get_saved_hyperparams(str(run / env_id))
    env = create_test_env(
        env_id, stats_path=statistics, seed=seed, should_render=False, hyperparams=settings, env_kwargs={}
    )
    model = ALGOS[algo].load(run / f"{env_id}.zip", device="cpu")
    mean, std = evaluate_policy(model, env, EPISODES)
    return model.num_timesteps, float(mean), float(std)


def write(algo: str, entry: str, line: str) -> None:
    """Put the line in place of the one that says when the entry was run."""
    path = CONFIGS / f"{algo}.yml"
    pattern = rf"^# (?:Run on|Not run).*\n(?=(?:# .*\n)*{re.escape(entry)}:)"
    text, n = re.subn(pattern, lambda _: line + "\n", path.read_text(), flags=re.MULTILINE)
    assert n == 1, f"{path} has no line '# Not run.' or '# Run on ...' above {entry}"
    path.write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("algo", choices=("reinforce", "trpo", "ppo"))
    parser.add_argument("env")
    parser.add_argument("--entry", help="default: the environment's own")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--timesteps", type=int, default=-1, help="default: the entry's own")
    parser.add_argument("--dry", action="store_true", help="print the comment, leave the file")
    options, more = parser.parse_known_args()
    th.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        run = train(options.algo, options.env, options.seed, options.timesteps, folder, more)
        steps, mean, std = evaluate(options.algo, options.env, options.seed + 10_000, run)
    date = datetime.datetime.now(datetime.timezone.utc).date()
    where = f" of {options.env}" if options.entry else ""
    line = f"# Run on {date} with seed {options.seed} for {steps:,} steps{where}: {mean:.4g} +/- {std:.3g}."
    print(f"{options.algo} {options.env}: {line}")
    if not options.dry:
        write(options.algo, options.entry or options.env, line)


if __name__ == "__main__":
    main()

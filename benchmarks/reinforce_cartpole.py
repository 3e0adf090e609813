"""Does REINFORCE with its defaults solve CartPole-v1? Five seeds, 4 environments, 100,000 steps; writes a CSV.

    python benchmarks/reinforce_cartpole.py

Solved means a mean return of at least 475 over 20 evaluation episodes on other seeds.
"""

import csv
from pathlib import Path

import torch as th
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

from sb3_pg import REINFORCE

OUT = Path(__file__).parent / "learning" / "reinforce_cartpole.csv"


def main() -> None:
    th.set_num_threads(1)
    OUT.parent.mkdir(exist_ok=True)
    with OUT.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["baseline", "seed", "steps", "eval_mean", "eval_std"])
        for baseline in ("value", "leave_one_out"):
            for seed in range(5):
                env = make_vec_env("CartPole-v1", 4, seed=seed)
                model = REINFORCE("MlpPolicy", env, seed=seed, baseline=baseline).learn(100_000)
                test = make_vec_env("CartPole-v1", 1, seed=1000 + seed)
                row = [baseline, seed, model.num_timesteps, *evaluate_policy(model, test, 20)]
                writer.writerow(row)
                print(*row, flush=True)


if __name__ == "__main__":
    main()

"""Draw the pictures of "Is my run healthy?": ``python benchmarks/draw_runs.py [ppo] [trpo] [reinforce]``.

Trains each algorithm three times for a few seconds, once well and twice ill, and draws what the log says into
docs/images/.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import KVWriter, Logger
from stable_baselines3.common.vec_env import VecNormalize

from sb3_pg import PPO, REINFORCE, TRPO
from sb3_pg.common.policy_gradient import PolicyGradientAlgorithm

matplotlib.use("Agg")
from matplotlib import pyplot as plt

IMAGES = Path(__file__).parents[1] / "docs" / "images"

#: Well, and two ways to be ill.
COLORS = ("#1b7837", "#c2410c", "#6d5bb3")


@dataclass
class Case:
    """An algorithm on an environment, with settings that do well and others that do not."""

    algorithm: type[PolicyGradientAlgorithm]
    env: str
    n_envs: int
    timesteps: int
    settings: dict[str, dict[str, Any]]  # by what the picture calls them; the first does well
    panels: list[str]
    common: dict[str, Any] = field(default_factory=dict)
    normalize: bool = False
    logarithmic: tuple[str, ...] = ()


CASES = {
    "ppo": Case(
        PPO,
        "HalfCheetah-v5",
        2,
        100_000,
        {
            "well: learning_rate=3e-4": {},
            "steps too large: learning_rate=0.02": {"learning_rate": 0.02},
            "steps too small: learning_rate=3e-6": {"learning_rate": 3e-6},
        },
        ["rollout/ep_rew_mean", "train/explained_variance", "train/approx_kl", "train/clip_fraction"],
        {"n_steps": 1024, "stats_window_size": 10},
        normalize=True,
        logarithmic=("train/approx_kl",),
    ),
    "trpo": Case(
        TRPO,
        "HalfCheetah-v5",
        2,
        100_000,
        {
            "well: target_kl=0.24": {},
            "region too wide: target_kl=2, cg_damping=1e-3": {"target_kl": 2.0, "cg_damping": 1e-3},
            "region too narrow: target_kl=0.001": {"target_kl": 1e-3},
        },
        ["rollout/ep_rew_mean", "train/kl_divergence_loss", "train/backtracks", "train/cg_residual"],
        {"n_steps": 1024, "target_kl": 0.24, "n_critic_updates": 20, "cg_max_steps": 25, "stats_window_size": 10},
        normalize=True,
        logarithmic=("train/kl_divergence_loss",),
    ),
    "reinforce": Case(
        REINFORCE,
        "CartPole-v1",
        8,
        60_000,
        {
            "well: defaults": {},
            "steps too large: learning_rate=0.2": {"learning_rate": 0.2},
            "steps too small: learning_rate=2e-4": {"learning_rate": 2e-4},
        },
        ["rollout/ep_rew_mean", "train/entropy_loss", "train/explained_variance", "train/samples_used"],
        {"stats_window_size": 20},
    ),
}


class Rows(KVWriter):
    """Keeps what is logged."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, Any], step: int = 0) -> None:
        self.rows.append({**key_values, "step": step})

    def close(self) -> None:
        pass


def run(case: Case, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Train once and return the lines of the log."""
    env = make_vec_env(case.env, case.n_envs, seed=1)
    model = case.algorithm("MlpPolicy", VecNormalize(env) if case.normalize else env, seed=1, **case.common | settings)
    rows = Rows()
    model.set_logger(Logger(None, [rows]))
    model.learn(case.timesteps)
    return rows.rows


def draw(name: str, case: Case) -> None:
    """Draw a panel for each figure, a line for each run."""
    figure, axes = plt.subplots(1, len(case.panels), figsize=(3.1 * len(case.panels), 3.6), layout="constrained")
    for (label, settings), color in zip(case.settings.items(), COLORS, strict=True):
        rows = run(case, settings)
        for axis, key in zip(axes, case.panels, strict=True):
            points = [(row["step"], row[key]) for row in rows if key in row]
            steps, values = np.reshape(points, (-1, 2)).T if points else ([], [])
            axis.plot(steps, values, color=color, linewidth=1.6, label=label)
        print(f"{name}, {label}: {rows[-1]['rollout/ep_rew_mean']:.1f} at the end")
    for axis, key in zip(axes, case.panels, strict=True):
        axis.set_title(key, fontsize=10, family="monospace")
        axis.set_xlabel("environment steps")
        axis.xaxis.set_major_formatter(lambda x, _: f"{x / 1000:.0f}k" if x else "0")
        axis.grid(color="#e3e3e3", linewidth=0.8)
        axis.spines[["top", "right"]].set_visible(False)
        if key in case.logarithmic:
            axis.set_yscale("log")
    if "train/explained_variance" in case.panels:
        axes[case.panels.index("train/explained_variance")].set_ylim(-1.05, 1.05)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    title = f"{case.algorithm.__name__} on {case.env}, seed 1"
    figure.suptitle(title, fontsize=11, fontweight="bold")
    figure.savefig(IMAGES / f"healthy_{name}.png", dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    for name in sys.argv[1:] or CASES:
        draw(name, CASES[name])

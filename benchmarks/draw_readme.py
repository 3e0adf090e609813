"""Draw the README's pictures of speed and learning from the records: ``python benchmarks/draw_readme.py``."""

import argparse
import json
from pathlib import Path
from typing import Any

import learning
import matplotlib
import speed

matplotlib.use("Agg")
from matplotlib import pyplot as plt

HERE = Path(__file__).parent
IMAGES = HERE.parent / "images"

OURS, THEIRS = "#1f4e8c", "#9aa3ad"

#: The peers of the picture of speed, and what each is called there.
PEERS = {
    ("PPO", "SB3 PPO"): "PPO next to SB3's PPO",
    ("TRPO", "contrib TRPO"): "TRPO next to sb3-contrib's TRPO",
    ("REINFORCE", "SB3 A2C"): "REINFORCE next to SB3's A2C",
}

#: The task of the picture of learning.
TASK = ("HalfCheetah-v5", 300_000)


def plain(axis: Any) -> None:
    """Take away what is not needed to read a panel."""
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(color="#e3e3e3", linewidth=0.8)
    axis.set_axisbelow(True)


def draw_speed(path: Path) -> None:
    """Draw how many times as fast as its peer each algorithm is, with 1 and 8 environments."""
    rows = json.loads((HERE / "speed" / "results.json").read_text())["rows"].values()
    bars: list[tuple[str, float | None]] = []
    for (ours, peer), title in PEERS.items():
        bars.append((title, None))
        for row in rows:
            is_of_pair = (row["group"], row["ours"], row["peer"]) == ("main", ours, peer)
            if is_of_pair and (row["n_envs"] != 2 or row["env"].startswith("Images")):
                n = row["n_envs"]
                label = f"{row['env']}, {n} environment{'s' if n > 1 else ''}"
                bars.append((label, speed.ratio(row["seconds_per_step"])))
    figure, axis = plt.subplots(figsize=(7.6, 0.34 * len(bars) + 0.9), layout="constrained")
    for y, (label, ratio) in enumerate(bars):
        if ratio is None:
            axis.text(0, y, f"  {label}", va="center", fontweight="bold")
            continue
        axis.barh(y, ratio, height=0.72, color=OURS)
        axis.text(ratio, y, f" {ratio:.1f} times", va="center", color=OURS)
    named = [(y, label) for y, (label, ratio) in enumerate(bars) if ratio is not None]
    axis.set_yticks([y for y, _ in named], [label for _, label in named])
    axis.tick_params(axis="y", length=0)
    axis.axvline(1.0, color="#444444", linewidth=1.0, linestyle=":")
    axis.text(1.0, -0.9, " 1: as fast as the peer", fontsize=9, color="#444444", va="center")
    axis.set(xlabel="how many times as many steps per second of learn(), one thread", ylim=(len(bars) - 0.4, -1.3))
    axis.set_xlim(0, 1.2 * max(ratio for _, ratio in bars if ratio is not None))
    plain(axis)
    axis.grid(visible=False, axis="y")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_learning(path: Path) -> None:
    """Draw the return over the seconds of training, each algorithm beside its peer."""
    options = argparse.Namespace(tasks=[TASK[0]], algos=list(learning.SIDES), steps=TASK[1])
    curves = learning.read_curves(learning.HERE / "results.csv", options)[TASK]
    figure, axes = plt.subplots(1, len(learning.PEERS), figsize=(10, 3.4), sharey=True, layout="constrained")
    for axis, (ours, peer) in zip(axes, learning.PEERS.items(), strict=True):
        for side, color in ((peer, THEIRS), (ours, OURS)):
            curve = curves[side]
            axis.plot(curve.seconds, curve.iqm, color=color, linewidth=2.2, label=learning.SIDES[side])
            if curve.interval is not None:
                axis.fill_between(curve.seconds, *curve.interval, color=color, alpha=0.2, linewidth=0)
        axis.set(xlabel="seconds of training", xlim=0)
        axis.legend(frameon=False, loc="upper right")
        plain(axis)
    axes[0].set_ylabel("return")
    axes[0].yaxis.set_major_formatter("{x:,.0f}")
    seeds = len(next(iter(curves.values())).scores)
    figure.suptitle(
        f"{TASK[0]}, {TASK[1]:,} steps each. Line: middle half of {seeds} seeds, averaged; band: its 95 % interval",
        fontsize=10,
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    draw_speed(IMAGES / "speed.png")
    draw_learning(IMAGES / "learning.png")

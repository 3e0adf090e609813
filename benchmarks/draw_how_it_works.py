"""Draw images/how_it_works.png for docs/how_it_works.md: ``python benchmarks/draw_how_it_works.py``."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

INK, FAINT = "#22303c", "#5b6b7a"
BLUE, GREEN, AMBER, GREY = (
    ("#dceafa", "#3f78b5"),
    ("#dff2e1", "#4b9a57"),
    ("#fdeccf", "#c98a1b"),
    ("#eef1f4", "#8795a3"),
)
Colours = tuple[str, str]


def box(axes: Axes, x: float, y: float, width: float, height: float, colours: Colours, title: str, text: str) -> None:
    """A rounded box with its lower left corner at (x, y)."""
    style = "round,pad=0,rounding_size=0.12"
    face, edge = colours
    axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=style, facecolor=face, edgecolor=edge, linewidth=1.4))
    middle, top = x + width / 2, y + height
    axes.text(middle, top - 0.28, title, ha="center", va="center", fontsize=12.5, weight="bold", color=INK)
    axes.text(middle, top - 0.54, text, ha="center", va="top", fontsize=10, color=INK, linespacing=1.5)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], label: str = "") -> None:
    """An arrow with a label beside its middle."""
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=15, linewidth=1.5, color=FAINT))
    if label:
        x, y = (start[0] + end[0]) / 2, (start[1] + end[1]) / 2
        axes.text(x, y + 0.16, label, ha="center", va="center", fontsize=9.5, color=FAINT)


def draw_rollout(axes: Axes) -> None:
    """The upper row: environments, act, rollout, judge."""
    box(axes, 0.2, 4.35, 2.4, 1.55, GREY, "Environments", "any number,\nstepped together")
    box(axes, 4.4, 4.35, 2.2, 1.55, BLUE, "1  Act", "only sample\nan action each")
    box(axes, 7.55, 4.35, 2.35, 1.55, GREY, "Rollout", "observations,\nactions, rewards")
    box(
        axes,
        11.2,
        4.0,
        3.6,
        1.9,
        GREEN,
        "2  Judge",
        "one batched pass:\nvalues, log-probabilities,\nreturns and advantages",
    )
    arrow(axes, (2.6, 5.4), (4.4, 5.4), "observations")
    arrow(axes, (4.4, 4.85), (2.6, 4.85), "actions")
    arrow(axes, (6.6, 5.12), (7.55, 5.12))
    arrow(axes, (9.9, 5.12), (11.2, 5.12), "complete")


def draw_step(axes: Axes) -> None:
    """The lower row: objective, and the two ways to move the parameters."""
    style = "round,pad=0,rounding_size=0.2"
    axes.add_patch(FancyBboxPatch((0.2, 0.2), 14.6, 3.2, boxstyle=style, facecolor="#fffaf0", edgecolor=AMBER[1]))
    axes.text(8.13, 3.1, "3  Step", ha="center", va="center", fontsize=12.5, weight="bold", color=INK)
    text = "(log-ratio, advantage) to\nthe loss and its derivative\nby the log-probability"
    box(axes, 10.95, 0.75, 3.3, 1.9, AMBER, "Objective", text)
    box(
        axes,
        6.55,
        0.75,
        3.15,
        1.9,
        AMBER,
        "Engine",
        "backward: pushes the\nderivative into the\nparameters' gradients",
    )
    box(axes, 0.6, 1.95, 4.75, 1.05, AMBER, "Optimizer", "PPO, REINFORCE: minibatches, Adam")
    box(axes, 0.6, 0.6, 4.75, 1.05, AMBER, "Natural gradient", "TRPO: conjugate gradient, line search")
    arrow(axes, (13.0, 4.0), (13.0, 2.65))
    arrow(axes, (10.95, 1.7), (9.7, 1.7), "derivative")
    arrow(axes, (6.55, 1.9), (5.35, 2.48), "")
    arrow(axes, (6.55, 1.5), (5.35, 1.12), "")
    arrow(axes, (5.5, 3.4), (5.5, 4.35))
    axes.text(5.65, 3.88, "new parameters", ha="left", va="center", fontsize=9.5, color=FAINT)


def main() -> None:
    """Write the picture."""
    figure, axes = plt.subplots(figsize=(12, 4.95))
    axes.set(xlim=(0, 15), ylim=(0, 6.1))
    axes.axis("off")
    draw_rollout(axes)
    draw_step(axes)
    path = Path(__file__).parent.parent / "images" / "how_it_works.png"
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=140, bbox_inches="tight", pad_inches=0.1, facecolor="white")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()

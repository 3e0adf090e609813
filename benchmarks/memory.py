"""What policies with a memory and masks of actions are good for, beside sb3-contrib's RecurrentPPO and MaskablePPO.

    python benchmarks/memory.py run                       # everything, 5 seeds; goes on where it was stopped
    python benchmarks/memory.py run --tasks Recall --sides ppo_lstm
    python benchmarks/memory.py report                    # of whatever there is

Each side trains with as many steps as the others of its task, on the same vectorised environments, in one thread. Then
it plays episodes with deterministic actions, on seeds that no training uses and that are the same for all sides.
sb3-contrib's algorithms have the settings of our PPO. ``run`` adds a row to memory/results.csv after each run, and
passes over those that are there with the settings of today; ``report`` leaves out all others.
"""

import argparse
import csv
import functools
import hashlib
import json
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from processes import machine, with_one_thread

if __name__ == "__main__":
    with_one_thread()

import gymnasium as gym
import numpy as np
import torch as th
from filelock import FileLock
from rl_zoo3.wrappers import MaskVelocityWrapper
from sb3_contrib import MaskablePPO, RecurrentPPO
from sb3_contrib.common.envs import InvalidActionEnvDiscrete, InvalidActionEnvMultiDiscrete
from sb3_contrib.common.maskable.evaluation import evaluate_policy as evaluate_with_masks
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecEnv, VecNormalize, sync_envs_normalization

from sb3_pg import PPO, REINFORCE, TRPO

HERE = Path(__file__).parent / "memory"

SEEDS = range(5)
EVALUATION_SEED = 1_000_000
COLUMNS = ["side", "task", "seed", "settings", "steps", "mean", "std", "min", "max", "episodes", "seconds"]


# ------------------------------------------------------------------- tasks


class Recall(gym.Env):
    """One of four signals is shown in the first step, and asked for after twenty steps in which nothing is.

    The reward is 1 for the right answer and 0 for all others. Until then actions do nothing.
    """

    signals, delay = 4, 20

    def __init__(self) -> None:
        self.observation_space = gym.spaces.Box(0.0, 1.0, (self.signals + 1,), np.float32)
        self.action_space = gym.spaces.Discrete(self.signals)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.t, self.signal = 0, int(self.np_random.integers(self.signals))
        return self.look(), {}

    def look(self) -> np.ndarray:
        x = np.zeros(self.observation_space.shape, np.float32)
        if self.t == 0:
            x[self.signal] = 1.0
        elif self.is_asked:
            x[self.signals] = 1.0
        return x

    @property
    def is_asked(self) -> bool:
        return self.t == self.delay + 1

    def is_right(self, action: int) -> bool:
        return action == self.signal

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        reward = float(self.is_asked and self.is_right(int(action)))
        is_over = self.is_asked
        self.t += 1
        return self.look(), reward, is_over, False, {}


class MaskedRecall(Recall):
    """Recall with rules: of 40 actions only the first is allowed until the question, and only four answers then.

    A forbidden action loses: the episode is over, with a reward of 0.
    """

    def __init__(self) -> None:
        super().__init__()
        self.action_space = gym.spaces.Discrete(40)

    def action_masks(self) -> np.ndarray:
        mask = np.zeros(40, bool)
        mask[slice(1, 1 + self.signals) if self.is_asked else 0] = True
        return mask

    def is_right(self, action: int) -> bool:
        return action == 1 + self.signal

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        is_lost = not self.action_masks()[action]
        observation, reward, is_over, *more = super().step(action)
        return observation, reward, is_over or is_lost, *more


class Task(NamedTuple):
    """What is trained and how.

    :param steps: of training
    :param n_envs: environments side by side
    :param episodes: of the evaluation
    :param reached: from this mean return on the task counts as learned
    :param limits: of the figure
    :param normalize: observations and rewards, as the zoo does
    :param settings: by side, without those that the side itself has
    """

    make: Callable[[], gym.Env]
    title: str
    limits: tuple[float, float]
    steps: int
    n_envs: int
    episodes: int
    reached: float
    settings: dict[str, dict[str, Any]]
    normalize: bool = False


LSTM = {"policy_kwargs": {"lstm_hidden_size": 64}}

#: With forget gates that begin nearly open: what is seen lasts for many steps.
OPEN = {"policy_kwargs": {"lstm_hidden_size": 64, "forget_bias": 3.0}}

#: PPO's on each task, with which sb3-contrib's train too; text that starts with lin_ falls to 0, as in the zoo.
CARTPOLE = {"n_steps": 128, "batch_size": 1024, "n_epochs": 10, "gae_lambda": 0.9, "gamma": 0.98}
CARTPOLE |= {"learning_rate": "lin_3e-3", "clip_range": "lin_0.2"}
PENDULUM = {"n_steps": 200, "batch_size": 200, "n_epochs": 10, "gae_lambda": 0.95, "gamma": 0.9}
PENDULUM |= {"learning_rate": "lin_3e-3"}
REINFORCE_PENDULUM = {"n_episodes": 8, "batch_size": 200, "gamma": 0.9, "gae_lambda": 0.95, "n_critic_updates": 10}
REINFORCE_PENDULUM |= {"learning_rate": "lin_3e-3", **LSTM}
RECALL = {"n_steps": 176, "batch_size": 352, "n_epochs": 10, "gamma": 1.0, "gae_lambda": 0.95, "ent_coef": 0.05}
RECALL |= {"learning_rate": "lin_1e-3"}
#: With masks one step in 22 has a choice, and the entropy bonus is a mean over all.
MASKED_RECALL = {**RECALL, "ent_coef": 0.5}
INVALID = {"n_steps": 128, "batch_size": 128, "n_epochs": 10, "gamma": 0.4, "learning_rate": 1e-3}

RECALL_TASK = Task(
    Recall,
    "Recall of 1 of 4 signals",
    (0, 1.02),
    steps=119_680,
    n_envs=8,
    episodes=100,
    reached=0.99,
    settings={
        "ppo_lstm": {**RECALL, **OPEN},
        "ppo_lstm_closed": {**RECALL, **LSTM},
        "ppo_mlp": RECALL,
    },
)
INVALID_TASK = Task(
    lambda: InvalidActionEnvDiscrete(dim=80, n_invalid_actions=60),
    "1 of 80 actions, 60 forbidden",
    (0, 102),
    steps=20_480,
    n_envs=8,
    episodes=20,
    reached=99.0,
    settings={
        "ppo_mlp_masks": INVALID,
        "contrib_ppo_masks": INVALID,
        "ppo_mlp": INVALID,
        "trpo_mlp_masks": {"n_steps": 128, "gamma": 0.4, "target_kl": 0.05, "cg_damping": 0.01},
        "reinforce_mlp_masks": {"n_steps": 64, "batch_size": 128, "gamma": 0.4, "ent_coef": 0.02},
    },
)

TASKS = {
    "CartPoleNoVel-v1": Task(
        lambda: MaskVelocityWrapper(gym.make("CartPole-v1")),
        "CartPole without velocities",
        (0, 510),
        steps=61_440,
        n_envs=8,
        episodes=20,
        reached=475.0,
        settings={
            "ppo_lstm": {**CARTPOLE, **LSTM},
            "contrib_ppo_lstm": {**CARTPOLE, **LSTM},
            "ppo_mlp": CARTPOLE,
            "trpo_lstm": {"n_steps": 128, "gamma": 0.98, "gae_lambda": 0.9, **LSTM},
            "reinforce_lstm": {"n_episodes": 8, **LSTM},
        },
        normalize=True,
    ),
    "PendulumNoVel-v1": Task(
        lambda: MaskVelocityWrapper(gym.make("Pendulum-v1")),
        "Pendulum without velocities",
        (-1500, 0),
        steps=60_800,
        n_envs=8,
        episodes=20,
        reached=-200.0,
        settings={
            "ppo_lstm": {**PENDULUM, **LSTM},
            "ppo_mlp": PENDULUM,
            "trpo_lstm": {
                "n_steps": 200,
                "batch_size": 200,
                "gamma": 0.9,
                "target_kl": 0.03,
                "n_critic_updates": 20,
                **LSTM,
            },
            "reinforce_lstm": REINFORCE_PENDULUM,
        },
        normalize=True,
    ),
    "Recall": RECALL_TASK,
    "MaskedRecall": RECALL_TASK._replace(
        make=MaskedRecall,
        title="Recall with 40 actions, 1 or 4 allowed",
        settings={
            "ppo_lstm_masks": {**MASKED_RECALL, **OPEN},
            "ppo_lstm": {**RECALL, **OPEN},
            "ppo_mlp_masks": MASKED_RECALL,
        },
    ),
    "InvalidActions": INVALID_TASK,
    "InvalidChoices": INVALID_TASK._replace(
        make=lambda: InvalidActionEnvMultiDiscrete(dims=[16, 16], n_invalid_actions=16),
        title="Two of 16 options, 16 of 32 forbidden",
        settings={
            **INVALID_TASK.settings,
            "trpo_mlp_masks": {"n_steps": 128, "gamma": 0.4, "cg_damping": 0.01},
            "reinforce_mlp_masks": {"n_steps": 64, "batch_size": 128, "gamma": 0.4},
        },
    ),
}


class Side(NamedTuple):
    """An algorithm with a policy."""

    title: str
    algorithm: Any
    policy: str = "MlpPolicy"
    arguments: dict[str, Any] = {}  # noqa: RUF012


UNMASKED = {"use_masking": False}

#: In the order of the report.
SIDES = {
    "ppo_lstm_masks": Side("PPO, LSTM, masks", PPO, "MlpLstmPolicy"),
    "ppo_lstm": Side("PPO, LSTM", PPO, "MlpLstmPolicy", UNMASKED),
    "contrib_ppo_lstm": Side("sb3-contrib RecurrentPPO", RecurrentPPO, "MlpLstmPolicy"),
    "ppo_lstm_closed": Side("PPO, LSTM as torch starts it", PPO, "MlpLstmPolicy", UNMASKED),
    "trpo_lstm": Side("TRPO, LSTM", TRPO, "MlpLstmPolicy", UNMASKED),
    "reinforce_lstm": Side("REINFORCE, LSTM", REINFORCE, "MlpLstmPolicy", UNMASKED),
    "ppo_mlp_masks": Side("PPO, MLP, masks", PPO),
    "contrib_ppo_masks": Side("sb3-contrib MaskablePPO", MaskablePPO),
    "trpo_mlp_masks": Side("TRPO, MLP, masks", TRPO),
    "reinforce_mlp_masks": Side("REINFORCE, MLP, masks", REINFORCE),
    "ppo_mlp": Side("PPO, MLP", PPO, "MlpPolicy", UNMASKED),
}


@functools.cache
def fingerprint(side: str, task: str) -> str:
    """Eight letters that change with the settings."""
    spec, policy = TASKS[task], SIDES[side]
    settings = [spec.steps, spec.n_envs, spec.normalize, spec.settings[side], policy.policy, policy.arguments]
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]


# --------------------------------------------------------------------- run


def as_argument(value: Any) -> Any:
    """A schedule in place of its name."""
    if isinstance(value, str) and value.startswith("lin_"):
        start = float(value.removeprefix("lin_"))
        return lambda left: start * left
    return value


def make_env(task: str, n: int, seed: int, settings: dict[str, Any]) -> VecEnv:
    env = make_vec_env(TASKS[task].make, n, seed=seed)
    return VecNormalize(env, gamma=settings.get("gamma", 0.99)) if TASKS[task].normalize else env


def train(side: str, task: str, seed: int) -> list[float]:
    """Train and evaluate; the numbers of the results file from the steps on."""
    spec, kind = TASKS[task], SIDES[side]
    env = make_env(task, spec.n_envs, 1000 * seed, spec.settings[side])
    arguments = {name: as_argument(value) for name, value in spec.settings[side].items()}
    model = kind.algorithm(kind.policy, env, seed=1000 * seed, device="cpu", **arguments, **kind.arguments)
    start = time.perf_counter()
    model.learn(spec.steps)
    seconds = time.perf_counter() - start
    np.random.seed(EVALUATION_SEED + seed)  # sb3-contrib's environments draw from it
    played = make_env(task, 20, EVALUATION_SEED + 1000 * seed, spec.settings[side])
    if isinstance(played, VecNormalize):
        played.training, played.norm_reward = False, False
        sync_envs_normalization(env, played)
    evaluate = evaluate_with_masks if kind.algorithm is MaskablePPO else evaluate_policy
    returns, _ = evaluate(model, played, spec.episodes, return_episode_rewards=True)
    numbers = np.mean(returns), np.std(returns), np.min(returns), np.max(returns)
    return [model.num_timesteps, *(round(float(x), 3) for x in numbers), len(returns), round(seconds, 1)]


def read(path: Path) -> list[dict[str, str]]:
    """The runs with the settings of today."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [
        row
        for row in rows
        if row["side"] in TASKS[row["task"]].settings and row["settings"] == fingerprint(row["side"], row["task"])
    ]


def append(path: Path, row: list[Any]) -> None:
    with FileLock(f"{path}.lock"), path.open("a", newline="") as file:
        writer = csv.writer(file)
        if file.tell() == 0:
            writer.writerow(COLUMNS)
        writer.writerow(row)


def run_command(args: argparse.Namespace) -> None:
    th.set_num_threads(1)
    path = args.folder / "results.csv"
    args.folder.mkdir(parents=True, exist_ok=True)
    (args.folder / "machine.txt").write_text(machine("NumPy") + "\n")
    for task in args.tasks:
        for seed in args.seeds:
            for side in (side for side in args.sides if side in TASKS[task].settings):
                if any((row["side"], row["task"], row["seed"]) == (side, task, str(seed)) for row in read(path)):
                    continue
                numbers = train(side, task, seed)
                append(path, [side, task, seed, fingerprint(side, task), *numbers])
                steps, mean, std, *_, seconds = numbers
                print(
                    f"{task}, {SIDES[side].title}, seed {seed}: {mean:.2f} +/- {std:.2f} after {steps:,} steps, "
                    f"{seconds:.0f} s",
                    flush=True,
                )


#: What the report says of it all.
NOTES = [
    "Each seed: the mean return of its evaluation after training with deterministic actions, in the order "
    "of seeds 0 to 4. Seconds of training are those of the fastest seed. The machine had other work, more "
    "at some times than at others: only PPO and sb3-contrib's ran in turn, and only these compare.",
    "sb3-contrib's algorithms have the settings of our PPO. Settings were chosen on seeds from 100 on; "
    "TRPO's and REINFORCE's of InvalidActions and the ent_coef of MaskedRecall again, on those, after some of "
    "the seeds 0 to 4 had failed. The first rows are still in results.csv.",
    "A side without `masks` in its name ignores the masks that there are.",
]

#: What the report says of a task.
SAYS = {
    "CartPoleNoVel-v1": ("Positions are seen, velocities are not."),
    "PendulumNoVel-v1": (
        "The angle is seen, the velocity is not. RecurrentPPO was not run on it, for want of time. REINFORCE "
        "learns next to nothing in so few steps."
    ),
    "Recall": (
        "One of four signals is shown in the first step and asked for after twenty steps in which nothing is "
        "shown; a guess is right a quarter of the time. `forget_bias` lets the forget gates begin nearly open; as "
        "torch starts them they halve the memory at each step. "
        "RecurrentPPO, TRPO and REINFORCE were not run with five seeds, for want of time."
    ),
    "MaskedRecall": (
        "Recall with rules: of 40 actions only the first is allowed until the question, and only four answers "
        "then. A forbidden action loses. Masks without memory must guess; memory without masks has to find "
        "out 21 times in a row which action is allowed before it sees a reward. With masks only "
        "the question, one step in 22, has a choice, and the entropy bonus is a mean over all steps; with ent_coef "
        "0.05, as without masks, some seeds settle for an answer too early."
    ),
    "InvalidActions": (
        "sb3-contrib's `InvalidActionEnvDiscrete(dim=80, n_invalid_actions=60)`: the state says which one of "
        "80 actions is right, and 60 others are forbidden, drawn anew for each of the 100 steps."
    ),
    "InvalidChoices": (
        "sb3-contrib's `InvalidActionEnvMultiDiscrete(dims=[16, 16], n_invalid_actions=16)`: the same with "
        "two choices that must both be right, and 16 of the 32 options forbidden."
    ),
}


# ------------------------------------------------------------------ report

#: A colour for each algorithm, Okabe and Ito's, which the colour-blind can tell apart; sb3-contrib's are hollow.
COLOURS = {PPO: "#d55e00", TRPO: "#0072b2", REINFORCE: "#009e73", RecurrentPPO: "#555555", MaskablePPO: "#555555"}

Groups = dict[str, dict[str, list[dict[str, str]]]]


def groups_of(rows: list[dict[str, str]], args: argparse.Namespace) -> Groups:
    """The rows by task and side, in the order of TASKS and SIDES, sorted by seed."""
    groups: Groups = {}
    for task in (task for task in TASKS if task in args.tasks):
        for side in (side for side in SIDES if side in args.sides):
            mine = [row for row in rows if (row["task"], row["side"]) == (task, side)]
            if mine:
                groups.setdefault(task, {})[side] = sorted(mine, key=lambda row: int(row["seed"]))
    return groups


def scores(rows: list[dict[str, str]]) -> list[float]:
    return [float(row["mean"]) for row in rows]


def shown(x: float, spec: Task) -> str:
    return f"{x:.2f}" if abs(spec.reached) < 10 else f"{x:.1f}"


def settings_text(settings: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items())


def table_rows(task: str, sides: dict[str, list[dict[str, str]]]) -> list[str]:
    spec, lines = TASKS[task], []
    for side, rows in sides.items():
        found = scores(rows)
        cells = [
            SIDES[side].title,
            shown(float(np.mean(found)), spec),
            " ".join(shown(x, spec) for x in found),
            f"{sum(x >= spec.reached for x in found)} of {len(found)}",
            f"{int(rows[0]['steps']):,}",
            f"{min(float(row['seconds']) for row in rows):.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def write_table(groups: Groups, folder: Path) -> None:
    where = folder / "machine.txt"
    text = [
        "# Memory and masks",
        "",
        f"Made by `benchmarks/memory.py` on {where.read_text().strip()}; one thread for each run.",
        "",
        *(textwrap.fill(note, 118, initial_indent="- ", subsequent_indent="  ") for note in NOTES),
    ]
    for task, sides in groups.items():
        spec = TASKS[task]
        text += ["", f"## {spec.title} (`{task}`)", "", textwrap.fill(SAYS[task], 118), ""]
        text += [
            f"| side | mean | each seed | at least {spec.reached:g} | steps | seconds |",
            "|---|---|---|---|---|---|",
        ]
        text += table_rows(task, sides)
        more = ", observations and rewards normalised" if spec.normalize else ""
        text += ["", f"{spec.n_envs} environments{more}, {spec.episodes} episodes of evaluation. Settings:", ""]
        by_settings: dict[str, list[str]] = {}
        for side in sides:
            by_settings.setdefault(settings_text(spec.settings[side]), []).append(SIDES[side].title)
        text += [f"- {'; '.join(titles)}: {settings}." for settings, titles in by_settings.items()]
    (folder / "table.md").write_text("\n".join(text) + "\n")
    print("\n".join(text))


def draw(groups: Groups, folder: Path) -> None:
    """A panel for each task with a row for each side: every seed a point, and their mean a bar."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    n_columns = 2
    panels = list(groups.items())
    pairs = [panels[i : i + n_columns] for i in range(0, len(panels), n_columns)]
    heights = [max(len(sides) for _, sides in pair) + 1.2 for pair in pairs]
    figure, axes = plt.subplots(
        len(pairs),
        n_columns,
        figsize=(12.5, 0.5 * sum(heights) + 0.4),
        layout="constrained",
        squeeze=False,
        gridspec_kw={"height_ratios": heights},
    )
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (task, sides) in zip(axes.flat, panels, strict=False):
        spec = TASKS[task]
        axis.axvline(spec.reached, color="#999999", lw=1, ls=(0, (3, 2)), zorder=0)
        for y, (side, rows) in enumerate(sides.items()):
            colour, found = COLOURS[SIDES[side].algorithm], scores(rows)
            is_peer = SIDES[side].algorithm in (RecurrentPPO, MaskablePPO)
            places = y + np.linspace(-0.3, 0.3, len(found))
            axis.scatter(found, places, s=24, color="white" if is_peer else colour, edgecolor=colour, zorder=3)
            axis.plot([np.mean(found)] * 2, [y - 0.4, y + 0.4], color=colour, lw=1.6, zorder=2)
        axis.set_yticks(range(len(sides)), [SIDES[side].title for side in sides])
        axis.set_ylim(len(sides) - 0.4, -0.6)
        axis.set_xlim(*spec.limits)
        axis.set_title(f"{spec.title}, {spec.steps:,} steps", fontsize=11, loc="left")
        axis.grid(axis="x", alpha=0.25)
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.tick_params(axis="y", length=0)
    says = (
        "mean return of the evaluation: a point for each seed, a bar for their mean; dashed is what counts as learned"
    )
    figure.supxlabel(says, fontsize=10)
    figure.savefig(folder / "scores.png", dpi=130)


def report_command(args: argparse.Namespace) -> None:
    groups = groups_of(read(args.folder / "results.csv"), args)
    if not groups:
        sys.exit(f"{args.folder / 'results.csv'} has no run with the settings of today: call `run` first.")
    write_table(groups, args.folder)
    draw(groups, args.folder)


def main() -> None:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), metavar="TASK", help=", ".join(TASKS))
    common.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES), metavar="SIDE", help=", ".join(SIDES))
    common.add_argument("--folder", type=Path, default=HERE, help="where the results are")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    run = commands.add_parser("run", parents=[common], help="train whatever is not in the results")
    run.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS), help="default: 0 to 4")
    run.set_defaults(command=run_command)
    report = commands.add_parser("report", parents=[common], help="write the table and draw the figure")
    report.set_defaults(command=report_command)
    args = parser.parse_args()
    args.command(args)


if __name__ == "__main__":
    main()

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
import functools
import hashlib
import io
import json
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from processes import machine, with_one_thread

if __name__ == "__main__":
    with_one_thread()

import numpy as np
import torch as th
import yaml
from filelock import FileLock, Timeout
from scipy.stats import trim_mean
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
    "Pendulum-v1": 100_000,
    "LunarLanderContinuous-v3": 300_000,
    "HalfCheetah-v5": 300_000,
    "Hopper-v5": 300_000,
    "Walker2d-v5": 300_000,
    "Swimmer-v5": 300_000,
    "InvertedPendulum-v5": 300_000,
    "Ant-v5": 1_000_000,
    "Humanoid-v5": 1_000_000,
    "BipedalWalker-v3": 1_000_000,
}

#: Published returns by ours that they are set beside and by who publishes them, all on earlier versions of the tasks.
#: Sources: examples/mujoco/README.md of https://github.com/thu-ml/tianshou (its REINFORCE has no critic; of ten seeds
#: the largest during training; Spinning Up's VPG, with a critic and GAE as ours has here, is read off a figure there);
#: docs/modules/trpo.rst of https://github.com/Stable-Baselines-Team/stable-baselines3-contrib (three seeds);
#: benchmark.md of https://github.com/DLR-RM/rl-baselines3-zoo (one run).
PUBLISHED: dict[str, dict[str, dict[str, float]]] = {
    "reinforce": {
        "tianshou's REINFORCE, 3M steps": {
            "HalfCheetah-v5": 884,
            "Hopper-v5": 396,
            "Walker2d-v5": 412,
            "Swimmer-v5": 35,
            "InvertedPendulum-v5": 999,
            "Ant-v5": 475,
            "Humanoid-v5": 438,
        },
        "Spinning Up's VPG, 3M": {
            "HalfCheetah-v5": 600,
            "Hopper-v5": 800,
            "Walker2d-v5": 460,
            "Swimmer-v5": 51,
            "Ant-v5": 5,
        },
    },
    "trpo": {
        "sb3-contrib's TRPO, 1M steps": {
            "HalfCheetah-v5": 1803,
            "Hopper-v5": 3372,
            "Walker2d-v5": 4502,
            "Swimmer-v5": 359,
            "Ant-v5": 3554,
        },
    },
    "ppo": {
        "rl-zoo's PPO, 1M steps": {
            "HalfCheetah-v5": 5819,
            "Hopper-v5": 2410,
            "Walker2d-v5": 3479,
            "Swimmer-v5": 282,
            "Ant-v5": 1327,
        },
    },
}

EVALUATIONS = 10
EPISODES = 20
EVALUATION_SEED = 1_000_000

#: Of the results file: what tells one run from another, then an evaluation.
COLUMNS = ["side", "task", "seed", "total_steps", "settings"]
COLUMNS += ["steps", "wall_clock_s", "cpu_s", "mean", "std", "min", "max", "machine"]


class Run(NamedTuple):
    """What tells one run from another."""

    side: str
    task: str
    seed: int
    total_steps: int
    settings: str


@functools.cache
def all_settings(side: str) -> dict[str, Any]:
    """The entries of a configuration file."""
    if side in PEERS:
        return yaml.safe_load((CONFIGS / f"{side}.yml").read_text())
    return yaml.safe_load((HERE / "peers.yml").read_text())[side]


def settings_of(side: str, task: str) -> dict[str, Any]:
    """The entry of a task, or that for tasks without one."""
    entries = all_settings(side)
    return dict(entries[task if task in entries else "default"])


@functools.cache
def fingerprint(side: str, task: str) -> str:
    """Eight letters that change with the settings."""
    settings = {key: value for key, value in settings_of(side, task).items() if key != "n_timesteps"}
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]


# --------------------------------------------------------------------- run


def now() -> np.ndarray:
    return np.array([time.perf_counter(), time.process_time()])


class Evaluate(BaseCallback):
    """Plays episodes at equal intervals and after training, and notes what the results file holds of them.

    :param env: one environment for each episode, wrapped as those of training
    :param seed: of training; its evaluations have seeds of their own
    :param total_steps: of training
    :param evaluations: how many
    """

    def __init__(self, env: VecEnv, seed: int, total_steps: int, evaluations: int = EVALUATIONS) -> None:
        super().__init__()
        self.env, self.seed, self.evaluations = env, seed, evaluations
        self.interval = total_steps / evaluations
        self.rows: list[list[float]] = []
        self.clocks = np.zeros(2)  # wall-clock and CPU, in seconds, without the evaluations

    def _on_training_start(self) -> None:
        self.clocks = -now()

    def _on_step(self) -> bool:
        n = len(self.rows) + 1
        if n < self.evaluations and self.num_timesteps >= n * self.interval:
            self.evaluate()
        return True

    def _on_training_end(self) -> None:
        self.evaluate()

    def evaluate(self) -> None:
        self.clocks += now()
        sync_envs_normalization(self.model.get_env(), self.env)
        self.env.seed(EVALUATION_SEED * (1 + self.seed) + EPISODES * len(self.rows))
        returns, _ = evaluate_policy(self.model, self.env, EPISODES, return_episode_rewards=True)
        numbers = (*self.clocks, np.mean(returns), np.std(returns), np.min(returns), np.max(returns))
        self.rows.append([self.model.num_timesteps, *(round(float(number), 3) for number in numbers)])
        self.clocks -= now()


@contextlib.contextmanager
def experiment(run: Run, settings: dict[str, Any] | None = None) -> Iterator[tuple[Any, VecEnv]]:
    """A model of one side by rl-zoo's code for models and environments, and environments for evaluation.

    :param settings: others than those of the configuration file
    """
    import sb3_contrib
    import stable_baselines3
    from rl_zoo3 import ALGOS

    from sb3_pg.zoo import register
    from sb3_pg.zoo.manager import ExperimentManager

    register()
    ALGOS.update(contrib_trpo=sb3_contrib.TRPO, sb3_ppo=stable_baselines3.PPO, sb3_a2c=stable_baselines3.A2C)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        config = Path(folder) / "settings.yml"
        config.write_text(yaml.safe_dump({run.task: settings or settings_of(run.side, run.task)}))
        manager = ExperimentManager(
            argparse.Namespace(),
            run.side,
            run.task,
            folder,
            n_timesteps=run.total_steps,
            eval_freq=-1,
            seed=run.seed,
            verbose=0,
            device="cpu",
            config=None if run.side in PEERS and settings is None else str(config),
        )
        model, _ = manager.setup_experiment()
        env = manager.create_envs(EPISODES, eval_env=True)
        try:
            yield model, env
        finally:
            model.get_env().close()
            env.close()


def train(run: Run, settings: dict[str, Any] | None = None, evaluations: int = EVALUATIONS) -> list[list[float]]:
    """Train one side; a row for each evaluation.

    :param settings: others than those of the configuration file
    """
    with experiment(run, settings) as (model, env):
        evaluate = Evaluate(env, run.seed, run.total_steps, evaluations)
        model.learn(run.total_steps, callback=evaluate)
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
    """Every task and side with a seed before the next seed; peers have no settings for some tasks."""
    for seed in range(args.seeds):
        for task in args.tasks:
            for side in (side for side in args.algos if task in all_settings(side)):
                yield Run(side, task, seed, args.steps or TASKS[task], fingerprint(side, task))


def append(path: Path, run: Run, rows: list[list[float]]) -> None:
    with FileLock(f"{path}.lock"), path.open("a", newline="") as file:
        writer = csv.writer(file)
        if file.tell() == 0:
            writer.writerow(COLUMNS)
        writer.writerows([*run, *row, machine("NumPy")] for row in rows)


def work(args: argparse.Namespace) -> bool:
    """Do the runs that nobody has done or is doing; whether all went well."""
    th.set_num_threads(1)
    path, well = args.folder / "results.csv", True
    claims = args.folder / ".claims"
    claims.mkdir(parents=True, exist_ok=True)
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
            _, seconds, _, mean, std, *_ = rows[-1]
            print(f"{name}: {mean:.1f} +/- {std:.1f} after {seconds:.1f} s", flush=True)
    return well


def run_command(args: argparse.Namespace) -> bool:
    if args.processes == 1:
        return work(args)
    command = [sys.executable, *sys.argv, "--processes", "1"]
    children = [subprocess.Popen(command) for _ in range(args.processes)]
    codes = [child.wait() for child in children]
    return not any(codes)


# ------------------------------------------------------------------ report

#: Fewer seeds than this have no interval: of four or less it would be the range, or nearly.
MIN_SEEDS = 5
REPETITIONS = 2000
DISTURBED = 1.2

#: A colour for ours and its peer, the peer dashed: Okabe and Ito's, which the colour-blind can tell apart.
COLOURS = {"trpo": "#0072b2", "ppo": "#d55e00", "reinforce": "#009e73"}
STYLES = {side: {"color": colour, "ls": "-"} for side, colour in COLOURS.items()} | {
    PEERS[side]: {"color": colour, "ls": (0, (3, 1.5))} for side, colour in COLOURS.items()
}


class Curve(NamedTuple):
    """All runs of one side on one task: arrays (seeds, evaluations), ``iqm`` (evaluations,), ``interval`` (2, same)."""

    steps: np.ndarray
    all_seconds: np.ndarray
    cpu_seconds: np.ndarray
    scores: np.ndarray
    iqm: np.ndarray
    interval: np.ndarray | None
    machines: list[str]

    @property
    def fastest(self) -> int:
        """The seed with the shortest wall-clock: what else the machine does only ever makes runs longer."""
        return int(self.all_seconds[:, -1].argmin())

    @property
    def seconds(self) -> np.ndarray:
        """Wall-clock (evaluations,) of the fastest seed."""
        return self.all_seconds[self.fastest]

    @property
    def machine(self) -> str:
        """Where those seconds passed."""
        return self.machines[self.fastest]


Curves = dict[tuple[str, int], dict[str, Curve]]


def bootstrap(scores: Any, statistic: Any) -> tuple[np.ndarray, np.ndarray]:
    """A statistic and its 95 % interval, (2, ...), by rliable's stratified bootstrap."""
    from rliable.library import get_interval_estimates

    np.random.seed(0)  # rliable resamples with NumPy's own generator
    values, intervals = get_interval_estimates({"": scores}, statistic, reps=REPETITIONS)
    return values[""], intervals[""]


def interquartile_mean(scores: np.ndarray) -> np.ndarray:
    """The ``aggregate_iqm`` of rliable for every evaluation at once: (seeds, 1, evaluations) to (evaluations,)."""
    return trim_mean(scores[:, 0], 0.25, axis=0)


def make_curve(rows: list[dict[str, str]]) -> Curve:
    def column(name: str) -> np.ndarray:
        return np.array([float(row[name]) for row in rows]).reshape(-1, EVALUATIONS)

    scores = column("mean")
    value, interval = interquartile_mean(scores[:, None]), None
    if len(scores) >= MIN_SEEDS:
        value, interval = bootstrap(scores[:, None], interquartile_mean)
    machines = [row["machine"] for row in rows[::EVALUATIONS]]
    return Curve(column("steps"), column("wall_clock_s"), column("cpu_s"), scores, value, interval, machines)


def read_curves(path: Path, args: argparse.Namespace) -> Curves:
    """From the results file by (task, steps) and side, in the order of the arguments."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    current = [row for row in rows if row["settings"] == fingerprint(row["side"], row["task"])]
    if len(current) < len(rows):
        print(f"{len(rows) - len(current)} rows are left out: the settings of their task have changed since.")
    curves: Curves = {}
    for task in args.tasks:
        for steps in sorted({int(row["total_steps"]) for row in current if row["task"] == task}):
            for side in args.algos:
                mine = [
                    row for row in current if (row["task"], row["total_steps"], row["side"]) == (task, str(steps), side)
                ]
                if mine and args.steps in (None, steps):
                    curves.setdefault((task, steps), {})[side] = make_curve(mine)
    return curves


def improvement(pairs: list[tuple[Curve, Curve]]) -> str:
    """How probably a run of ours ends above one of its peer, averaged over tasks, by rliable; ties count half."""
    from rliable.metrics import probability_of_improvement

    scores = []
    for curves in zip(*pairs, strict=True):  # ours, then the peers
        n = min(len(curve.scores) for curve in curves)
        scores.append(np.stack([curve.scores[:n, -1] for curve in curves], axis=1))
    if min(map(len, scores)) < MIN_SEEDS:
        return "-"
    value, interval = bootstrap(scores, lambda *sides: np.array([probability_of_improvement(*sides)]))
    return f"{value[0]:.2f} [{interval[0, 0]:.2f}, {interval[1, 0]:.2f}]"


def number(x: float) -> str:
    return f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.1f}"


def machines_of(curves: Curves) -> list[str]:
    """The machine of most runs first."""
    machines = [name for sides in curves.values() for curve in sides.values() for name in curve.machines]
    return [name for name, _ in Counter(machines).most_common()]


def score_cells(side: str, curve: Curve) -> list[str]:
    """Side, seeds, final return, worst to best seed."""
    final = curve.scores[:, -1]
    bounds = "" if curve.interval is None else " [{}, {}]".format(*map(number, curve.interval[:, -1]))
    return [
        SIDES[side],
        str(len(final)),
        number(curve.iqm[-1]) + bounds,
        f"{number(final.min())} to {number(final.max())}",
    ]


def make_table(curves: Curves) -> list[str]:
    machines = machines_of(curves)
    lines = [
        "| task | steps | side | seeds | final return | worst to best seed | seconds of training | above its peer |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (task, steps), sides in curves.items():
        for side, curve in sides.items():
            n, peer = machines.index(curve.machine) + 1, sides.get(PEERS.get(side, ""))
            seconds = f"{curve.seconds[-1]:,.0f}" + (f" ({n})" if n > 1 else "")
            above = improvement([(curve, peer)]) if peer else ""
            lines.append("| " + " | ".join([task, f"{steps:,}", *score_cells(side, curve), seconds, above]) + " |")
    for ours, peer in PEERS.items():
        pairs: dict[str, tuple[Curve, Curve]] = {}  # a task counts once, with its shortest runs
        for (task, _), sides in curves.items():
            pair = tuple(sides[side] for side in (ours, peer) if side in sides)
            if len(pair) == 2 and min(len(curve.scores) for curve in pair) >= MIN_SEEDS:
                pairs.setdefault(task, pair)
        if len(pairs) > 1:
            lines.append(f"| all {len(pairs)} | | {SIDES[ours]} | | | | | {improvement(list(pairs.values()))} |")
    return lines


def published_tables(curves: Curves) -> list[str]:
    """Ours beside the published returns."""
    lines = []
    for side, sources in PUBLISHED.items():
        rows = [
            f"| {task} | " + " | ".join(number(its[task]) if task in its else "" for its in sources.values()) + " | "
            f"{steps:,} | " + " | ".join(score_cells(side, sides[side])[1:]) + " |"
            for (task, steps), sides in curves.items()
            if side in sides and any(task in its for its in sources.values())
        ]
        columns = ["task", *sources, f"steps of our {SIDES[side]}", "seeds", "final return", "worst to best seed"]
        if rows:
            lines += ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|", *rows, ""]
    about = [
        "Beside what others publish, on earlier versions of the tasks: tianshou the largest return during training, of",
        "a REINFORCE without a critic; Spinning Up's VPG has one, as ours has on these tasks; rl-zoo's is one run.",
        "",
    ]
    return about + lines if lines else []


def disturbed(curves: Curves) -> str:
    """How many runs had to wait for their core, which makes their wall-clock too long."""
    runs = [curve for sides in curves.values() for curve in sides.values()]
    ratios = np.concatenate([curve.all_seconds[:, -1] / curve.cpu_seconds[:, -1] for curve in runs])
    return f"{np.sum(ratios > DISTURBED)} of {len(ratios)} runs took more than {DISTURBED} times their CPU time."


def write_table(curves: Curves, folder: Path) -> None:
    machines = ", and ".join(f"({i}) {name}" for i, name in enumerate(machines_of(curves), 1))
    pairs = ", ".join(f"{SIDES[ours]} above {SIDES[peer]}" for ours, peer in PEERS.items())
    text = [
        "# Learning",
        "",
        f"Made by `benchmarks/learning.py` on {machines}; one thread for each run.",
        "",
        f"- Final return: the mean of {EPISODES} episodes with deterministic actions after training; of the seeds the",
        f"  interquartile mean, with its 95 % bootstrap interval from {MIN_SEEDS} seeds on.",
        "- Seconds of training: of the fastest seed, without evaluations; on machine (1) where no other is named, and",
        f"  seconds of two machines are not to be compared. {disturbed(curves)}",
        f"- Above its peer: how probably a run of ours ends above one of its peer's, 0.5 being a draw ({pairs});",
        "  in the last rows the average over the tasks, with as many seeds of each as every side has. A dash is for",
        "  too few seeds, nothing for no peer. Ten seeds are where five did not decide.",
        "",
        *make_table(curves),
        "",
        *published_tables(curves),
    ]
    (folder / "table.md").write_text("\n".join(text))
    print("\n".join(text))


def draw_panel(axis: Any, side: str, x: np.ndarray, curve: Curve) -> None:
    faint = {"lw": 0.9, "alpha": 0.9} if curve.interval is None else {"lw": 0.6, "alpha": 0.3}
    axis.plot(x, curve.scores.T, **faint, **STYLES[side])
    if curve.interval is not None:
        axis.plot(x, curve.iqm, lw=1.9, **STYLES[side])
        axis.fill_between(x, *curve.interval, color=STYLES[side]["color"], alpha=0.13, lw=0)


def draw(curves: Curves, folder: Path) -> None:
    """Panels in rows of four: above against steps, below against wall-clock, of one machine."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    first, n_columns = machines_of(curves)[0], min(len(curves), 4)
    n_rows = 2 * -(-len(curves) // n_columns)
    figure, axes = plt.subplots(
        n_rows, n_columns, figsize=(3.3 * n_columns + 0.5, 2.7 * n_rows + 0.8), layout="constrained", squeeze=False
    )
    for axis in axes.flat:
        axis.set_visible(False)
    for i, ((task, steps), sides) in enumerate(curves.items()):
        block, column = divmod(i, n_columns)
        above, below = axes[2 * block : 2 * block + 2, column]
        for side, curve in sides.items():
            draw_panel(above, side, np.median(curve.steps, axis=0), curve)
            if curve.machine == first:
                draw_panel(below, side, curve.seconds, curve)
        above.set_title(f"{task}, {EngFormatter(sep='')(steps)} steps", fontsize=11)
        above.set(xlabel="environment steps", xlim=0)
        above.xaxis.set_major_formatter(EngFormatter(sep=""))
        below.set(xlabel="seconds of training", xscale="log")
        below.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
        below.xaxis.set_major_formatter("{x:g}")
        below.xaxis.set_minor_formatter(NullFormatter())
        for axis in (above, below):
            axis.set_visible(True)
            axis.grid(alpha=0.25)
            axis.spines[["top", "right"]].set_visible(False)
            if column == 0:
                axis.set_ylabel("return")
    handles = [Line2D([], [], lw=1.9, label=SIDES[side], **STYLES[side]) for side in SIDES]
    figure.legend(handles=handles, loc="outside upper center", ncols=min(6, 2 * n_columns), frameon=False, fontsize=11)
    explanation = "Thick: mean of the middle half of the seeds. Band: its 95 % interval. Thin: single seeds."
    figure.supxlabel(f"{explanation} Dashed: the peers. Seconds: on the first machine only.", fontsize=11)
    figure.savefig(folder / "curves.png", dpi=100)


def report_command(args: argparse.Namespace) -> bool:
    path = args.folder / "results.csv"
    if not path.exists():
        print(f"{path} does not exist: call `run` first.")
        return False
    curves = read_curves(path, args)
    if not curves:
        print(f"{path} has no run of these tasks, sides and steps with the settings of today.")
        return False
    write_table(curves, args.folder)
    compared = {task: sides for task, sides in curves.items() if len(sides) > 1}
    draw(compared or curves, args.folder)
    return True


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {value}")
    return value


def main() -> None:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), metavar="TASK", help=", ".join(TASKS))
    common.add_argument("--algos", nargs="+", choices=SIDES, default=list(SIDES), metavar="SIDE", help=", ".join(SIDES))
    common.add_argument(
        "--steps", type=positive, help="of training (default: by task, 100,000 to 1,000,000; all in a report)"
    )
    common.add_argument("--folder", type=Path, default=HERE, help="where the results are")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    run = commands.add_parser("run", parents=[common], help="train whatever is not in the results")
    run.add_argument("--seeds", type=positive, default=5, help="how many, from 0")
    run.add_argument("--processes", type=positive, default=1, help="how many runs at a time, one core each")
    run.set_defaults(command=run_command)
    report = commands.add_parser("report", parents=[common], help="draw the curves and write the table")
    report.set_defaults(command=report_command)
    args = parser.parse_args()
    sys.exit(0 if args.command(args) else 1)


if __name__ == "__main__":
    main()

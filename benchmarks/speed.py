"""Time ours and the peers side by side, and write table, data and figures to benchmarks/speed/.

    python benchmarks/speed.py                 # everything, about an hour
    python benchmarks/speed.py --only cartpole # the rows whose name contains a word
    python benchmarks/speed.py --group threads # one group of rows
    python benchmarks/speed.py --report        # draw the table and the figures again from the data

Each row runs ``learn()`` of ours and its peer alternately in one process with one thread; the first update of each is
warm-up and not timed; the figures are medians of ``--repeats`` runs with the range beside. Both sides get the same
settings, which the table prints. The *limit* is the time that stepping the same environments takes with a constant
action and SB3's own vectorised environment, not normalised, so that everybody sees how much of the rest is the
algorithm's; for PPO and TRPO the time is added that their products and convolutions take at the rate of a large
product: as many as SB3's PPO makes, and our TRPO with torch's autograd.

Four groups measure something else: the peak memory, what a number of threads and a busy neighbour change, the time of
``predict``, and the time of a run with evaluations as rl-zoo makes it. What has to do with the process as a whole is
measured in one of its own.
"""

import argparse
import contextlib
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from processes import highest_memory, machine, with_one_thread

if __name__ == "__main__" and "--alone" not in sys.argv:
    with_one_thread()

import numpy as np
import sb3_contrib
import stable_baselines3
import torch as th
from board import FiveInARow
from sb3_contrib.common.envs import InvalidActionEnvDiscrete
from stable_baselines3.common import vec_env as sb3_vec_env
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import FakeImageEnv, SimpleMultiObsEnv
from torch.utils.flop_counter import FlopCounterMode

import sb3_pg
from sb3_pg.common import vec_env as our_vec_env

HERE = Path(__file__).parent / "speed"

#: What grows along each figure's axis.
GROWTH = {"environments": "environments", "width": "width of two hidden layers", "rollout": "samples per rollout"}

#: A task for language models: answers of six letters.
LETTERS = "Letters"

ENVS: dict[str, Any] = {
    "CartPole-v1": "CartPole-v1",
    "HalfCheetah-v5": "HalfCheetah-v5",
    "Images 84x84": lambda: FakeImageEnv(screen_height=84, screen_width=84, n_channels=1, discrete=True),
    "Images 84x84x4": lambda: FakeImageEnv(screen_height=84, screen_width=84, n_channels=4, discrete=True),
    "Dict of vector and image": lambda: SimpleMultiObsEnv(random_start=False),
    "80 actions, 60 invalid": lambda: InvalidActionEnvDiscrete(dim=80, n_invalid_actions=60),
    "Five in a row": FiveInARow,
}


@dataclass
class Row:
    """One comparison: an algorithm and its peer, or ours alone, on one task with the same settings."""

    group: str
    ours: str
    peer: str
    env: str
    n_envs: int
    settings: dict[str, Any] = field(default_factory=dict)
    policy: str = "MlpPolicy"
    net_arch: list[int] | None = None
    normalize: bool = False
    updates: int = 2
    wanted: float | None = None

    @property
    def name(self) -> str:
        sides = [self.ours, "vs", self.peer] if self.peer else [self.ours]
        parts = [f"{self.group}:", *sides, self.env, f"{self.n_envs} envs", self.policy]
        parts += ["VecNormalize"] if self.normalize else []
        parts += [f"net {self.net_arch}"] if self.net_arch else []
        return " ".join([*parts, *(f"{k}={v}" for k, v in self.settings.items())])


ZOO_TRPO = {"n_steps": 1024, "batch_size": 128, "cg_max_steps": 25, "n_critic_updates": 20, "target_kl": 0.04}
SMALL = {"n_steps": 256, "batch_size": 256}


def main_rows() -> list[Row]:
    """The comparisons of the table."""
    cart, cheetah = "CartPole-v1", "HalfCheetah-v5"
    rows = [
        Row("main", "PPO", "SB3 PPO", cart, 1, wanted=9),
        Row("main", "PPO", "SB3 PPO", cart, 2, {"n_steps": 1024}),
        Row("main", "PPO", "SB3 PPO", cart, 8, SMALL, wanted=4.5),
        Row("main", "PPO", "SB3 PPO", cheetah, 1, wanted=5.5),
        Row("main", "PPO", "SB3 PPO", cheetah, 2, {"n_steps": 1024}),
        Row("main", "PPO", "SB3 PPO", cheetah, 8, SMALL, wanted=3),
        Row("main", "TRPO", "contrib TRPO", cart, 1, wanted=9),
        Row("main", "TRPO", "contrib TRPO", cart, 8, {"n_steps": 256}),
        Row("main", "TRPO", "contrib TRPO", cheetah, 1, wanted=5),
        Row("main", "TRPO", "contrib TRPO", cheetah, 2, ZOO_TRPO, wanted=4),
        Row("main", "TRPO", "contrib TRPO", cheetah, 2, ZOO_TRPO, normalize=True, wanted=4),
        Row("main", "TRPO", "contrib TRPO", cheetah, 8, {"n_steps": 256}),
        Row("main", "REINFORCE", "SB3 A2C", cart, 8, updates=6, wanted=4),
    ]
    images, mixed = "Images 84x84", "Dict of vector and image"
    few = {"n_steps": 64, "batch_size": 64}
    rows += [
        Row("main", "PPO", "SB3 PPO", images, 2, few | {"n_epochs": 4}, "CnnPolicy", updates=1, wanted=1.3),
        Row("main", "TRPO", "contrib TRPO", images, 2, few, "CnnPolicy", updates=1, wanted=1.3),
        Row("main", "PPO", "SB3 PPO", mixed, 2, few | {"n_epochs": 4}, "MultiInputPolicy", updates=1, wanted=1.3),
        Row("main", "TRPO", "contrib TRPO", mixed, 2, few, "MultiInputPolicy", updates=1, wanted=1.3),
    ]
    sbx = [(cart, 1, {}), (cheetah, 1, {}), (cart, 8, SMALL), (cheetah, 8, SMALL)]
    return rows + [Row("main", "PPO", "sbx PPO", env, n, settings, wanted=2) for env, n, settings in sbx]


def masks_and_memory_rows() -> list[Row]:
    """Action masks and recurrent policies, beside sb3-contrib's."""
    cart, lstm, images = "CartPole-v1", "MlpLstmPolicy", "Images 84x84"
    of_peer = {"n_steps": 128, "batch_size": 128}
    few = {"n_steps": 64, "batch_size": 64, "n_epochs": 2}
    return [
        Row("masks and memory", "PPO", "MaskablePPO", "80 actions, 60 invalid", 1, wanted=8),
        Row("masks and memory", "PPO", "MaskablePPO", "Five in a row", 1, wanted=8),
        Row("masks and memory", "PPO", "MaskablePPO", "Five in a row", 8, SMALL),
        Row("masks and memory", "PPO", "RecurrentPPO", cart, 1, of_peer, lstm, updates=4, wanted=6),
        Row("masks and memory", "PPO", "RecurrentPPO", cart, 8, of_peer, lstm, updates=2, wanted=6),
        Row("masks and memory", "PPO", "RecurrentPPO", images, 2, few, "CnnLstmPolicy", updates=1, wanted=1),
    ]


def growth_rows() -> list[Row]:
    """How the ratio changes with the number of environments, the width of the network and the rollout."""
    cart = "CartPole-v1"
    rows = [
        Row("environments", "PPO", "SB3 PPO", cart, n, {"n_steps": 2048 // n, "batch_size": 256})
        for n in (1, 2, 4, 8, 16, 32, 64)
    ]
    rows += [
        Row("width", "PPO", "SB3 PPO", cart, 8, SMALL, net_arch=[w, w], updates=1) for w in (64, 128, 256, 512, 1024)
    ]
    return rows + [
        Row("rollout", "PPO", "SB3 PPO", cart, 8, {"n_steps": n, "batch_size": 256}, updates=1)
        for n in (64, 256, 1024, 4096)
    ]


def memory_rows() -> list[Row]:
    """Peak memory of one rollout and its update, where it matters."""
    images = {"n_steps": 512, "batch_size": 64}
    few = {"n_steps": 64, "cg_max_steps": 2, "n_critic_updates": 1, "sub_sampling_factor": 16}
    return [
        Row("memory", "PPO", "SB3 PPO", "CartPole-v1", 64, {"n_steps": 8192, "batch_size": 256, "n_epochs": 2}),
        Row("memory", "PPO", "SB3 PPO", "Images 84x84x4", 8, images | {"n_epochs": 2}, "CnnPolicy"),
        Row("memory", "TRPO", "contrib TRPO", "CartPole-v1", 64, {"n_steps": 1024}),
        Row("memory", "TRPO", "contrib TRPO", "Images 84x84x4", 8, images | few, "CnnPolicy"),
    ]


#: What the threads are: set by the environment, set in torch, and whether another process is busy meanwhile.
CONDITIONS = {
    "1": (True, False, False),
    "nothing set": (False, False, False),
    "torch.set_num_threads(1)": (False, True, False),
    "1, busy neighbour": (True, False, True),
    "nothing set, busy neighbour": (False, False, True),
}


def thread_rows() -> list[Row]:
    """Ours under each of ``CONDITIONS``."""
    cart, few = "CartPole-v1", {"n_steps": 32, "batch_size": 128}
    small, medium, large = [64, 64], [256, 256], [1024, 1024]
    text = {"n_episodes": 64, "baseline": "leave_one_out_same_start", "n_critic_updates": 1}
    return [
        Row("threads", "PPO", "", cart, 8, SMALL, net_arch=small, updates=20),
        Row("threads", "TRPO", "", cart, 8, {"n_steps": 256}, net_arch=small, updates=20),
        Row("threads", "TRPO", "", cart, 8, {"n_steps": 256}, net_arch=medium, updates=5),
        Row("threads", "REINFORCE", "", cart, 8, net_arch=medium, updates=10),
        Row("threads", "PPO", "", cart, 8, few, net_arch=large, updates=5),
        Row("threads", "REINFORCE", "", LETTERS, 64, text, "CausalLMPolicy", updates=8),
    ]


def predict_rows() -> list[Row]:
    """Actions for a single environment, and for eight."""
    cart, lstm = "CartPole-v1", "MlpLstmPolicy"
    rows = [Row("predict", "PPO", "SB3 PPO", env, n_envs) for env in (cart, "HalfCheetah-v5") for n_envs in (1, 8)]
    return rows + [Row("predict", "PPO", "RecurrentPPO", cart, n_envs, policy=lstm) for n_envs in (1, 8)]


def evaluation_rows() -> list[Row]:
    """Runs as rl-zoo makes them, with the settings of zoo_configs/ for either side."""
    return [
        Row("evaluation", "PPO", "SB3 PPO", "CartPole-v1", 8, {"n_timesteps": 100_000}),
        Row("evaluation", "TRPO", "contrib TRPO", "HalfCheetah-v5", 2, {"n_timesteps": 50_000}, normalize=True),
    ]


def all_rows() -> list[Row]:
    rows = main_rows() + masks_and_memory_rows() + growth_rows() + memory_rows()
    return rows + thread_rows() + predict_rows() + evaluation_rows()


def algorithms() -> dict[str, Any]:
    """Every algorithm by the name that rows use; sbx only where it is installed."""
    found: dict[str, Any] = {
        "PPO": sb3_pg.PPO,
        "TRPO": sb3_pg.TRPO,
        "REINFORCE": sb3_pg.REINFORCE,
        "SB3 PPO": stable_baselines3.PPO,
        "SB3 A2C": stable_baselines3.A2C,
        "contrib TRPO": sb3_contrib.TRPO,
        "MaskablePPO": sb3_contrib.MaskablePPO,
        "RecurrentPPO": sb3_contrib.RecurrentPPO,
    }
    try:
        import sbx

        found["sbx PPO"] = sbx.PPO
    except ImportError:
        print("sbx is not installed (pip install sbx-rl): its rows are left out")
    return found


def make_env(row: Row, library: Any) -> Any:
    if row.env == LETTERS:
        return make_letters(row.n_envs)
    env = make_vec_env(ENVS[row.env], row.n_envs, seed=0, vec_env_cls=library.DummyVecEnv)
    return library.VecNormalize(env) if row.normalize else env


def make_letters(n_envs: int) -> Any:
    """The reward is the share of letters a; the policy makes a small language model for the task by itself."""
    from sb3_pg.text import TextTask, TextVecEnv, word_tokenizer

    prompts = ["a b c", "d", "e f", "g h a b", "c d e"]
    tokenizer = word_tokenizer("abcdefgh")
    task = TextTask(prompts, lambda _, texts, __: [text.count("a") / 6 for text in texts], tokenizer, response_length=6)
    return TextVecEnv(task, n_envs, completions_per_prompt=8, seed=0)


def make_model(row: Row, name: str, kind: Any) -> Any:
    policy_kwargs = {"net_arch": row.net_arch} if row.net_arch else {}
    env = make_env(row, our_vec_env if name == row.ours else sb3_vec_env)
    return kind(row.policy, env, seed=0, policy_kwargs=policy_kwargs, **row.settings, **({} if "sbx" in name else CPU))


CPU = {"device": "cpu"}


def steps_of(row: Row) -> int:
    """Environment steps of one timed run: whole rollouts of both sides."""
    return row.updates * row.settings.get("n_steps", 2048) * (row.n_envs if "n_steps" in row.settings else 1)


def time_learn(model: Any, steps: int) -> float:
    before, start = model.num_timesteps, time.perf_counter()
    model.learn(steps, reset_num_timesteps=False, log_interval=10**9)
    return (time.perf_counter() - start) / (model.num_timesteps - before)


def time_limit(row: Row, steps: int) -> float:
    """Seconds per environment step with a constant action, and the masks if there are, and nothing else."""
    env = make_env(replace(row, normalize=False), sb3_vec_env)
    is_masked = env.has_attr("action_masks")
    env.reset()
    actions = np.stack([env.action_space.sample()] * row.n_envs)
    start = time.perf_counter()
    for _ in range(steps // row.n_envs):
        env.step(actions)
        if is_masked:
            env.env_method("action_masks")
    return (time.perf_counter() - start) / (steps // row.n_envs * row.n_envs)


def product_rate() -> float:
    """Floating-point operations per second of a large matrix product."""
    n, seconds = 1024, []
    x, y = th.randn(2, n, n)
    for _ in range(20):
        start = time.perf_counter()
        x @ y
        seconds.append(time.perf_counter() - start)
    return 2 * n**3 / min(seconds)


#: Algorithms whose products and convolutions torch can count: SB3's PPO, and ours where the peer's TRPO makes more.
COUNTED = {"PPO": stable_baselines3.PPO, "TRPO": partial(sb3_pg.TRPO, engine="autograd")}


def time_arithmetic(row: Row) -> float:
    """Seconds per environment step of what cannot be spared: products and convolutions, as fast as they can be."""
    model = make_model(row, row.peer, COUNTED[row.ours])
    with FlopCounterMode(display=False) as counter:
        model.learn(1)
    return counter.get_total_flops() / model.num_timesteps / product_rate()


# ------------------------------------------------- in a process of its own


def peak_memory(row: Row, side: str) -> float:
    """Megabytes that one rollout and its update add to the process, at the worst moment."""
    model = make_model(row, side, algorithms()[side])
    before = highest_memory()
    model.learn(row.settings["n_steps"] * row.n_envs)
    return highest_memory() - before


def learn_seconds(row: Row, condition: str) -> float:
    """Seconds of a row's steps with ours; what the condition says of the environment is done already."""
    _, by_torch, _ = CONDITIONS[condition]
    if by_torch:
        th.set_num_threads(1)
    model, steps = make_model(row, row.ours, getattr(sb3_pg, row.ours)), steps_of(row)
    time_learn(model, steps // row.updates)  # warm-up
    return time_learn(model, steps) * steps


def evaluation_seconds(row: Row, side: str) -> float:
    """Seconds of ``learn`` with rl-zoo's evaluations: 5 episodes every 10,000 steps."""
    from rl_zoo3 import ALGOS

    from sb3_pg.zoo import register
    from sb3_pg.zoo.manager import ExperimentManager

    register()
    algo, steps = row.ours.lower(), row.settings["n_timesteps"]
    ALGOS[algo] = algorithms()[side]  # by the name of ours, so that the settings are ours too
    evaluations = {"eval_freq": 10_000, "n_eval_episodes": 5}
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        experiment = ExperimentManager(
            argparse.Namespace(), algo, row.env, folder, n_timesteps=steps, seed=0, verbose=0, **evaluations, **CPU
        )
        model, _ = experiment.setup_experiment()
        assert model.n_envs == row.n_envs
        start = time.perf_counter()
        model.learn(steps, callback=experiment.callbacks)
        return time.perf_counter() - start


#: What can be measured so, by the name that ``--alone`` takes.
ALONE = {"peak": peak_memory, "learn": learn_seconds, "evaluation": evaluation_seconds}


def alone(what: str, row: Row, side: str, environment: dict[str, str] | None = None) -> float:
    """One of ``ALONE``, measured in a process of its own.

    :param side: an algorithm, or one of ``CONDITIONS``
    :param environment: of that process; None is this one's, with one thread
    """
    command = [sys.executable, __file__, "--alone", what, row.name, side]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return float(done.stdout.split()[-1])


@contextlib.contextmanager
def neighbour(is_busy: bool) -> Iterator[None]:
    """Keep one core busy within the block."""
    if not is_busy:
        yield
        return
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


# ---------------------------------------------------------------- measures


def phases(row: Row, kind: Any, steps: int) -> dict[str, float]:
    """Share of ours in acting, judging, stepping and the environment, from one run with a clock around each."""
    model = make_model(row, row.ours, kind)
    time_learn(model, steps)
    spent = dict.fromkeys(("environment", "act", "judge", "step"), 0.0)

    def clocked(phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = function(*args, **kwargs)
            spent[phase] += time.perf_counter() - start
            return result

        return run

    engine, env = model.network, model.env
    env.step = clocked("environment", env.step)
    engine.act = clocked("act", engine.act)
    model.judge = clocked("judge", model.judge)
    model.train = clocked("step", model.train)
    total = time_learn(model, steps) * steps
    spent["rest"] = max(total - sum(spent.values()), 0.0)
    return {name: seconds / total for name, seconds in spent.items()}


def measure(row: Row, kinds: dict[str, Any], repeats: int) -> dict[str, Any]:
    """Seconds per step of ``learn`` and of the environments alone, and where the time of ours goes."""
    steps = steps_of(row)
    sides = {name: make_model(row, name, kinds[name]) for name in (row.ours, row.peer)}
    for model in sides.values():
        time_learn(model, steps // row.updates)  # warm-up
    times: dict[str, list[float]] = {"ours": [], "peer": [], "limit": []}
    for _ in range(repeats):
        times["ours"].append(time_learn(sides[row.ours], steps))
        times["peer"].append(time_learn(sides[row.peer], steps))
        times["limit"].append(time_limit(row, min(steps, 4096)))
    if row.ours in COUNTED and row.group != "masks and memory":
        arithmetic = time_arithmetic(row)
        times["limit"] = [seconds + arithmetic for seconds in times["limit"]]
    engine = sides[row.ours].network.description
    return {**asdict(row), "name": row.name, "seconds_per_step": times, "engine": engine, "steps": steps} | {
        "phases": phases(row, kinds[row.ours], steps)
    }


def measure_memory(row: Row, kinds: dict[str, Any], repeats: int) -> dict[str, Any]:
    sides = {"ours_mb": row.ours, "peer_mb": row.peer}
    peaks = {key: [alone("peak", row, side) for _ in range(3)] for key, side in sides.items()}
    return {**asdict(row), "name": row.name, **peaks}


def measure_threads(row: Row, kinds: dict[str, Any], repeats: int) -> dict[str, Any]:
    """Seconds under each condition, three times in turn."""
    free = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")}
    times: dict[str, list[float]] = {condition: [] for condition in CONDITIONS}
    for _ in range(3):
        for condition, (by_environment, _, is_busy) in CONDITIONS.items():
            with neighbour(is_busy):
                times[condition].append(alone("learn", row, condition, None if by_environment else free))
    return {**asdict(row), "name": row.name, "seconds": times, "steps": steps_of(row)}


def measure_predict(row: Row, kinds: dict[str, Any], repeats: int) -> dict[str, Any]:
    """Seconds of a call with deterministic actions, as evaluations make it."""
    calls, models = 1000, {"ours": make_model(row, row.ours, kinds[row.ours])}
    models["peer"] = make_model(row, row.peer, kinds[row.peer])
    observations = models["ours"].env.reset()
    times: dict[str, dict[str, list[float]]] = {}
    for what in ("model.predict", "policy.predict"):
        times[what] = {side: [] for side in models}
        for _ in range(repeats):
            for side, model in models.items():
                predict = model.predict if what == "model.predict" else model.policy.predict
                _, state = predict(observations, deterministic=True)  # warm-up
                start = time.perf_counter()
                for _ in range(calls):
                    _, state = predict(observations, state, deterministic=True)
                times[what][side].append((time.perf_counter() - start) / calls)
    return {**asdict(row), "name": row.name, "seconds_per_call": times}


def measure_evaluation(row: Row, kinds: dict[str, Any], repeats: int) -> dict[str, Any]:
    times: dict[str, list[float]] = {"ours": [], "peer": []}
    for _ in range(repeats):
        times["ours"].append(alone("evaluation", row, row.ours))
        times["peer"].append(alone("evaluation", row, row.peer))
    return {**asdict(row), "name": row.name, "seconds": times}


#: By group; all others are measured by ``measure``.
MEASURES = {
    "memory": measure_memory,
    "threads": measure_threads,
    "predict": measure_predict,
    "evaluation": measure_evaluation,
}


# ------------------------------------------------------------------ report


def ratio(times: dict[str, list[float]]) -> float:
    return statistics.median(p / o for p, o in zip(times["peer"], times["ours"], strict=True))


def spread(times: dict[str, list[float]]) -> str:
    ratios = sorted(p / o for p, o in zip(times["peer"], times["ours"], strict=True))
    return f"{ratios[0]:.2f}-{ratios[-1]:.2f}"


def settings_of(result: dict[str, Any]) -> str:
    parts = [f"{k}={v}" for k, v in result["settings"].items()]
    parts += [f"net_arch={result['net_arch']}"] if result["net_arch"] else []
    parts += ["VecNormalize"] if result["normalize"] else []
    return ", ".join(parts or ["defaults"])


def table(results: list[dict[str, Any]]) -> str:
    lines = [
        "| ours / peer | task | settings | steps/s | peer's steps/s | ratio (range) | wanted | at most | time / limit "
        "| environment / act / judge / step / rest |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        median = {side: statistics.median(times) for side, times in r["seconds_per_step"].items()}
        times = r["seconds_per_step"]
        share = " / ".join(f"{100 * r['phases'][p]:.0f}" for p in ("environment", "act", "judge", "step", "rest"))
        wanted = "" if r["wanted"] is None else f">= {r['wanted']:g}"
        at_most, by_limit = median["peer"] / median["limit"], median["ours"] / median["limit"]
        lines.append(
            f"| {r['ours']} / {r['peer']} | {r['env']}, {r['n_envs']} env, {r['policy']} | {settings_of(r)} "
            f"| {1 / median['ours']:,.0f} | {1 / median['peer']:,.0f} | {ratio(times):.2f} ({spread(times)}) "
            f"| {wanted} | {at_most:.1f} | {by_limit:.1f} | {share} % |"
        )
    return "\n".join(lines)


def repeats_of(results: list[dict[str, Any]], groups: Iterable[str]) -> str:
    """Of the row with the fewest, and where they differ of the one with the most."""
    repeats = {len(r["seconds_per_step"]["ours"]) for r in results if r["group"] in groups}
    return " to ".join(map(str, sorted({min(repeats, default=0), max(repeats, default=0)})))


def memory_table(results: list[dict[str, Any]]) -> str:
    lines = ["| ours / peer | task | settings | ours, MB | peer, MB |", "|---|---|---|---|---|"]
    for r in results:
        ours, peer = ("-".join(f"{x:.0f}" for x in sorted({min(r[k]), max(r[k])})) for k in ("ours_mb", "peer_mb"))
        settings = ", ".join(f"{k}={v}" for k, v in r["settings"].items())
        lines.append(f"| {r['ours']} / {r['peer']} | {r['env']}, {r['n_envs']} env | {settings} | {ours} | {peer} |")
    return "\n".join(lines)


def threads_table(results: list[dict[str, Any]]) -> str:
    lines = ["| | task | settings | " + " | ".join(CONDITIONS) + " |", "|---|---|---" + "|---" * len(CONDITIONS) + "|"]
    for r in results:
        seconds = {condition: statistics.median(times) for condition, times in r["seconds"].items()}
        cells = []
        for condition, (_, _, is_busy) in CONDITIONS.items():
            one = seconds["1, busy neighbour" if is_busy else "1"]
            cells.append(f"{seconds[condition]:.2f} ({seconds[condition] / one:.2f})")
        task = f"{r['env']}, {r['n_envs']} env, {r['steps']:,} steps"
        lines.append(f"| {r['ours']} | {task} | {settings_of(r)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def predict_table(results: list[dict[str, Any]]) -> str:
    lines = ["| ours / peer | task | call | ours, us | peer, us | ratio (range) |", "|---|---|---|---|---|---|"]
    for r in results:
        for call, times in r["seconds_per_call"].items():
            ours, peer = (f"{1e6 * statistics.median(times[side]):.0f}" for side in ("ours", "peer"))
            task = f"{r['env']}, {r['n_envs']} env, {r['policy']}"
            lines.append(
                f"| {r['ours']} / {r['peer']} | {task} | `{call}` | {ours} | {peer} "
                f"| {ratio(times):.2f} ({spread(times)}) |"
            )
    return "\n".join(lines)


def evaluation_table(results: list[dict[str, Any]]) -> str:
    lines = ["| ours / peer | task | steps | ours, s | peer, s | ratio (range) |", "|---|---|---|---|---|---|"]
    for r in results:
        times, steps = r["seconds"], r["settings"]["n_timesteps"]
        ours, peer = (f"{statistics.median(times[side]):.1f}" for side in ("ours", "peer"))
        task = f"{r['env']}, {r['n_envs']} env" + ", VecNormalize" * r["normalize"]
        sides = f"{r['ours']} / {r['peer']}"
        lines.append(f"| {sides} | {task} | {steps:,} | {ours} | {peer} | {ratio(times):.2f} ({spread(times)}) |")
    return "\n".join(lines)


def write_report(data: dict[str, Any], folder: Path) -> None:
    results = [data["rows"][row.name] for row in all_rows() if row.name in data["rows"]]
    text = [
        "# Speed",
        "",
        f"Made by `benchmarks/speed.py` on {data['machine']}.",
        f"One thread; medians of {repeats_of(results, ['main'])} alternating runs. *At most* is the ratio that a side",
        "would have which takes no time beside the limit: that of the environments, and for PPO and TRPO that of their",
        "products and convolutions at the rate of a large product (torch's convolutions are slower).",
        "",
        table([r for r in results if r["group"] == "main"]),
        "",
        "## Masks and memory",
        "",
        "The limit includes asking for the masks.",
        "",
        table([r for r in results if r["group"] == "masks and memory"]),
        "",
        "## Growth",
        "",
        f"Medians of {repeats_of(results, GROWTH)} alternating runs.",
        "",
        table([r for r in results if r["group"] in GROWTH]),
        "",
        "## Memory",
        "",
        "What one rollout and its update add to the memory of a process at the worst moment (range of 3 runs).",
        "",
        memory_table([r for r in results if r["group"] == "memory"]),
        "",
        "## Threads",
        "",
        "Seconds of `learn()` in a process of its own, and in brackets the ratio to one thread set by the environment",
        "(`OMP_NUM_THREADS=1` and the like), with the same neighbour. The busy neighbour is a process that keeps one",
        "core busy. Medians of 3 runs.",
        "",
        threads_table([r for r in results if r["group"] == "threads"]),
        "",
        "## Predict",
        "",
        "Microseconds of a call with deterministic actions, one thread, medians of alternating runs.",
        "",
        predict_table([r for r in results if r["group"] == "predict"]),
        "",
        "## Training with evaluations",
        "",
        "Seconds of `learn()` with 5 episodes of evaluation every 10,000 steps, by rl-zoo's code with our settings for",
        "both sides, each with its own vectorised environments. One thread, medians of alternating runs.",
        "",
        evaluation_table([r for r in results if r["group"] == "evaluation"]),
        "",
    ]
    (folder / "table.md").write_text("\n".join(text))
    draw(results, folder)
    print("\n".join(text))


def draw_ratios(rows: list[dict[str, Any]], folder: Path) -> None:
    """Draw how many times as fast as each peer ours is, a panel for each peer."""
    import matplotlib.pyplot as plt

    pairs = list(dict.fromkeys((r["ours"], r["peer"]) for r in rows))
    its = [[r for r in rows if (r["ours"], r["peer"]) == pair] for pair in pairs]
    sizes = [len(x) for x in its]
    figure, axes = plt.subplots(
        len(pairs),
        1,
        figsize=(8.4, 0.34 * sum(sizes) + 0.4 * len(pairs)),
        sharex=True,
        squeeze=False,
        height_ratios=sizes,
        layout="constrained",
    )
    for axis, (ours, peer), some in zip(axes[:, 0], pairs, its, strict=True):
        ratios = [ratio(r["seconds_per_step"]) for r in some]
        labels = [f"{r['env']}, {r['n_envs']} env" + ", VecNormalize" * r["normalize"] for r in some]
        axis.barh(range(len(some)), ratios, color="#1f4e8c", height=0.72)
        for i, number in enumerate(ratios):
            axis.text(number + 0.08, i, f"{number:.1f}", va="center", fontsize=9)
        axis.set_yticks(range(len(some)), labels)
        axis.set_title(f"{ours} next to {peer.replace('contrib', 'sb3-contrib')}", loc="left", fontsize=10)
        axis.axvline(1, color="#444444", lw=1.0, ls=":")
        axis.set_ylim(len(some) - 0.5, -0.5)
        axis.tick_params(axis="y", length=0)
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1, 0].set_xlabel("how many times as fast as the peer (dotted: as fast)")
    figure.savefig(folder / "ratios.png", dpi=120)
    plt.close(figure)


#: What is drawn of each row, and how.
GROWTH_LINES = {
    "ours": ("sb3_pg", "#1f4e8c"),
    "peer": ("SB3", "#cc6677"),
    "limit": ("the environments and the arithmetic alone", "#888888"),
}


def draw(results: list[dict[str, Any]], folder: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    draw_ratios([r for r in results if r["group"] == "main"], folder)
    groups = [g for g in GROWTH if any(r["group"] == g for r in results)]
    if not groups:
        return
    figure, axes = plt.subplots(1, len(groups), figsize=(3.6 * len(groups), 3.5), layout="constrained", squeeze=False)
    value = {
        "environments": lambda r: r["n_envs"],
        "width": lambda r: r["net_arch"][0],
        "rollout": lambda r: r["settings"]["n_steps"] * r["n_envs"],
    }
    for axis, group in zip(axes[0], groups, strict=True):
        rows = [r for r in results if r["group"] == group]
        x = [value[group](r) for r in rows]
        for side, (label, color) in GROWTH_LINES.items():
            y = [1 / statistics.median(r["seconds_per_step"][side]) for r in rows]
            axis.plot(x, y, "o-", ms=4, color=color, label=label)
        axis.set(yscale="log", xlabel=GROWTH[group], ylabel="environment steps per second")
        axis.set_xscale("log", base=2)
        axis.set_xticks(x, [str(v) for v in x])
        axis.grid(alpha=0.3)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(
        "PPO on CartPole-v1; where nothing else is said, 8 environments and 2,048 steps a rollout", fontsize=10
    )
    figure.savefig(folder / "growth.png", dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="rows whose name contains this, any case")
    parser.add_argument("--group", default="", help=", ".join(dict.fromkeys(row.group for row in all_rows())))
    parser.add_argument("--alone", nargs=3, metavar=("WHAT", "ROW", "SIDE"), help="only print one of the numbers")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--report", action="store_true", help="only draw the report again")
    parser.add_argument("--folder", type=Path, default=HERE, help="where the results are")
    args = parser.parse_args()
    if args.alone:
        what, name, side = args.alone
        print(ALONE[what](next(row for row in all_rows() if row.name == name), side))
        return
    args.folder.mkdir(exist_ok=True)
    path = args.folder / "results.json"
    data = json.loads(path.read_text()) if path.exists() else {"rows": {}}
    if not args.report:
        th.set_num_threads(1)
        kinds = algorithms()
        data["machine"] = machine("NumPy")
        for row in all_rows():
            wanted = args.only.lower() in row.name.lower() and args.group in row.group
            if wanted and (not row.peer or row.peer in kinds):
                start = time.perf_counter()
                data["rows"][row.name] = MEASURES.get(row.group, measure)(row, kinds, args.repeats)
                print(f"{time.perf_counter() - start:4.0f} s  {row.name}", flush=True)
                path.write_text(json.dumps(data, indent=1))
    write_report(data, args.folder)


if __name__ == "__main__":
    main()

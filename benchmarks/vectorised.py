"""Time vectorised environments of gymnasium and EnvPool, and ours and the peers on them, into benchmarks/vectorised/.

    python benchmarks/vectorised.py                   # everything, about ten minutes; EnvPool's rows need it installed
    python benchmarks/vectorised.py --group learning  # one group of rows
    python benchmarks/vectorised.py --report          # write the table again from the data

The sides of a row take turns in one process with one thread for NumPy and torch; EnvPool's own threads and other
processes use what cores there are. Figures are medians of ``--repeats`` turns with the range beside, by the clock and
by the processor time of this process. The peers take EnvPool's environments by our adapter, since they have none.

:func:`returns` plays one policy, and one of chance, in EnvPool's environments and in gymnasium's.
"""

import argparse
import functools
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from processes import machine, with_one_thread

if __name__ == "__main__":
    with_one_thread()

import gymnasium as gym
import numpy as np
import sb3_contrib
import stable_baselines3
import torch as th
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv
from stable_baselines3.common import vec_env as sb3_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor

from sb3_pg import PPO, TRPO
from sb3_pg.common import vec_env as ours

HERE = Path(__file__).parent / "vectorised"

#: A side of a row: what to time, of how many of the row's units one call is, and what to close at the end.
Side = tuple[Callable[[], Any], int, Any]

CPU = {"device": "cpu", "seed": 0}


# ------------------------------------------------------------ environments


class Slow(gym.Env):
    """Takes a millisecond for a step, in episodes of 200.

    :param is_busy: whether it computes, or waits for somebody else
    """

    observation_space, action_space = spaces.Box(-1, 1, (8,)), spaces.Discrete(2)

    def __init__(self, is_busy: bool) -> None:
        self.is_busy = is_busy

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        self.steps = 0
        return np.zeros(8, np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.steps += 1
        if self.is_busy:
            end = time.thread_time() + 1e-3
            while time.thread_time() < end:
                pass
        else:
            time.sleep(1e-3)
        return np.zeros(8, np.float32), 1.0, False, self.steps == 200, {}


class Images(gym.Env):
    """Shows one picture after the other, in episodes of 200 steps, and takes no time."""

    observation_space, action_space = spaces.Box(0, 255, (4, 84, 84), np.uint8), spaces.Discrete(2)

    def __init__(self) -> None:
        self.pictures = np.random.default_rng(0).integers(0, 255, (16, 4, 84, 84), np.uint8)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        self.steps = 0
        return self.pictures[0], {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.steps += 1
        return self.pictures[self.steps % 16], 1.0, False, self.steps == 200, {}


SINGLE: dict[str, Callable[[], gym.Env]] = {
    "1 ms of computing": functools.partial(Slow, True),
    "1 ms of waiting": functools.partial(Slow, False),
    "images 84x84x4": Images,
    "CartPole-v1": lambda: gym.make("CartPole-v1"),
    "HalfCheetah-v5": lambda: gym.make("HalfCheetah-v5"),
}


def monitored(name: str) -> gym.Env:
    return Monitor(SINGLE[name]())


class Still(VectorEnv):
    """Returns the same at each step: what is left is the adapter's time."""

    metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}  # noqa: RUF012

    def __init__(self, n_envs: int, n_infos: int) -> None:
        self.num_envs = n_envs
        self.single_observation_space, self.single_action_space = spaces.Box(-9, 9, (17,)), spaces.Discrete(2)
        self.observations, self.rewards = np.zeros((n_envs, 17), np.float32), np.ones(n_envs)
        self.never, self.infos = np.zeros(n_envs, bool), {str(i): np.arange(n_envs) / 7 for i in range(n_infos)}

    def reset(self, *, seed: Any = None, options: Any = None) -> Any:
        return self.observations, {}

    def step(self, actions: Any) -> Any:
        return self.observations, self.rewards, self.never, self.never, self.infos


def pool(name: str, n_envs: int, seed: int = 0) -> Any:
    """Return EnvPool's environments by our adapter."""
    import envpool

    return ours.as_vec_env(envpool.make(name, env_type="gymnasium", num_envs=n_envs, seed=seed))


def acting(env: Any, steps: int) -> Side:
    """Return what steps environments with actions of chance, and by how much."""
    env.seed(0)
    env.reset()
    choices = [np.stack([env.action_space.sample() for _ in range(env.num_envs)]) for _ in range(16)]

    def run() -> None:
        for i in range(steps):
            env.step(choices[i % 16])

    return run, steps * env.num_envs, env


# ------------------------------------------------------------------- groups


def stepping() -> dict[str, Callable[[], dict[str, Side]]]:
    """Environments in processes and in one, steps per second."""

    def row(name: str, n: int, steps: int) -> dict[str, Side]:
        makers = [functools.partial(monitored, name)] * n
        same, other = ({"copy": False, "autoreset_mode": AutoresetMode(mode)} for mode in ("SameStep", "Disabled"))
        return {
            "AsyncVectorEnv, reset in the same step": acting(ours.as_vec_env(AsyncVectorEnv(makers, **same)), steps),
            "AsyncVectorEnv, reset when asked": acting(ours.as_vec_env(AsyncVectorEnv(makers, **other)), steps),
            "SubprocVecEnv": acting(sb3_vec_env.SubprocVecEnv(makers), steps),
            "SyncVectorEnv": acting(ours.as_vec_env(SyncVectorEnv(makers, **same)), steps),
            "DummyVecEnv (ours)": acting(ours.DummyVecEnv(makers), steps),
            "DummyVecEnv (SB3's)": acting(sb3_vec_env.DummyVecEnv(makers), steps),
        }

    sizes = [("1 ms of computing", 4, 100), ("1 ms of waiting", 4, 100), ("images 84x84x4", 4, 200)]
    sizes += [("images 84x84x4", 16, 50), ("CartPole-v1", 8, 500), ("HalfCheetah-v5", 4, 200)]
    return {f"{name}, {n} environments": functools.partial(row, name, n, steps) for name, n, steps in sizes}


def learning() -> dict[str, Callable[[], dict[str, Side]]]:
    """``learn`` of ours and a peer, all by our adapter of EnvPool, and that alone, steps per second."""

    def row(kinds: tuple[Any, Any], name: str, n: int, policy: str, settings: dict[str, Any]) -> dict[str, Side]:
        steps = 2 * n * settings["n_steps"]
        sides: dict[str, Side] = {}
        for side, kind in zip(("ours", "peer"), kinds, strict=True):
            model = kind(policy, pool(name, n), **settings, **CPU)
            model.learn(steps // 2)  # warm-up
            sides[side] = (functools.partial(model.learn, steps, reset_num_timesteps=False), steps, model.env)
        return sides | {"EnvPool alone": acting(pool(name, n), settings["n_steps"])}

    ppo = {"n_steps": 32, "batch_size": 256}
    rows = {
        "PPO / SB3 PPO, CartPole-v1, 64": ((PPO, stable_baselines3.PPO), "CartPole-v1", 64, "MlpPolicy", ppo),
        "PPO / SB3 PPO, CartPole-v1, 1024": (
            (PPO, stable_baselines3.PPO),
            "CartPole-v1",
            1024,
            "MlpPolicy",
            {**ppo, "n_steps": 8},
        ),
        "PPO / SB3 PPO, HalfCheetah-v5, 64": ((PPO, stable_baselines3.PPO), "HalfCheetah-v5", 64, "MlpPolicy", ppo),
        "PPO / SB3 PPO, Pong-v5, 8": ((PPO, stable_baselines3.PPO), "Pong-v5", 8, "CnnPolicy", {**ppo, "n_epochs": 2}),
        "TRPO / contrib TRPO, CartPole-v1, 64": (
            (TRPO, sb3_contrib.TRPO),
            "CartPole-v1",
            64,
            "MlpPolicy",
            {"n_steps": 32},
        ),
        "TRPO / contrib TRPO, HalfCheetah-v5, 64": (
            (TRPO, sb3_contrib.TRPO),
            "HalfCheetah-v5",
            64,
            "MlpPolicy",
            {"n_steps": 32},
        ),
    }
    return {f"{name} environments": functools.partial(row, *arguments) for name, arguments in rows.items()}


def bare_arithmetic(observations: np.ndarray, rewards: np.ndarray) -> Callable[[], Any]:
    """Return the arithmetic of VecNormalize as NumPy has it, and nothing else."""
    n, mean, variance, returns = len(observations), np.zeros(17), np.ones(17), np.zeros(len(rewards))

    def moments(x: np.ndarray) -> tuple[Any, Any]:
        center = np.add.reduce(x, axis=0) / n
        squares = x - center
        squares *= squares
        return center, np.add.reduce(squares, axis=0) / n

    def scaled(x: Any, deviation: Any) -> np.ndarray:
        x /= deviation
        np.maximum(x, -10.0, out=x)
        np.minimum(x, 10.0, out=x)
        return x.astype(np.float32)

    def run() -> None:
        for x, old_mean, old_variance in ((observations, mean, variance), (returns * 0.99 + rewards, 0.0, 1.0)):
            center, spread = moments(x)
            delta = center - old_mean
            new_mean = old_mean + delta * n / (n + 1.0)
            new = (old_variance + spread * n + delta * delta * n / (n + 1.0)) / (n + 1.0)
            scaled(observations - new_mean if x is observations else rewards * 1.0, np.sqrt(new + 1e-8))

    return run


def normalising() -> dict[str, Callable[[], dict[str, Side]]]:
    """VecNormalize around environments that take no time, steps of all environments per second."""

    class Cost(sb3_vec_env.DummyVecEnv):
        """Returns the same at each step."""

        def __init__(self, n: int) -> None:
            super().__init__([lambda: gym.make("CartPole-v1")])
            random = np.random.default_rng(0)
            self.num_envs, self.observation_space = n, spaces.Box(-np.inf, np.inf, (17,), np.float64)
            self.rows = random.normal(size=(n, 17)), random.normal(size=n).astype(np.float32), np.zeros(n, bool)
            self.infos: list[dict[str, Any]] = [{} for _ in range(n)]

        def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
            return [None] * self.num_envs

        def step_wait(self) -> Any:
            return *self.rows, self.infos

    def repeated(env: Any, function: Callable[[], Any]) -> Side:
        def run() -> None:
            for _ in range(500):
                function()

        return run, 500, env

    def row(n: int) -> dict[str, Side]:
        env = Cost(n)
        return {
            "ours": repeated(env, ours.VecNormalize(env).step_wait),
            "SB3's": repeated(env, sb3_vec_env.VecNormalize(env).step_wait),
            "arithmetic": repeated(env, bare_arithmetic(*env.rows[:2])),
        }

    return {f"{n} environments, observations of 17": functools.partial(row, n) for n in (1, 8, 64, 1024)}


def adapting() -> dict[str, Callable[[], dict[str, Side]]]:
    """The adapter around environments that take no time, steps of all environments per second."""

    def row(n: int) -> dict[str, Side]:
        sides = {}
        for n_infos in (0, 1, 5):
            run, _, env = acting(ours.as_vec_env(Still(n, n_infos)), 300)
            sides[f"{n_infos} numbers in infos"] = run, 300, env
        return sides

    return {f"{n} environments": functools.partial(row, n) for n in (8, 64, 1024)}


GROUPS = {"stepping": stepping, "learning": learning, "normalising": normalising, "adapting": adapting}


def measured(sides: dict[str, Side], repeats: int) -> dict[str, dict[str, list[float]]]:
    """Return units of each side per second, and per second of this process's processor time, in turns."""
    rates: dict[str, dict[str, list[float]]] = {name: {"wall": [], "processor": []} for name in sides}
    for run, _, _ in sides.values():
        run()  # warm-up
    for _ in range(repeats):
        for name, (run, n, _) in sides.items():
            start, used = time.perf_counter(), time.process_time()
            run()
            rates[name]["wall"].append(n / (time.perf_counter() - start))
            rates[name]["processor"].append(n / (time.process_time() - used))
    for _, _, env in sides.values():
        env.close()
    return rates


# ------------------------------------------------------------------- returns


def gymnasium_pong() -> gym.Env:
    import ale_py

    gym.register_envs(ale_py)
    game = gym.make("ALE/Pong-v5", frameskip=1, repeat_action_probability=0.0, full_action_space=False)
    return gym.wrappers.FrameStackObservation(gym.wrappers.AtariPreprocessing(game, noop_max=30), 4)


def returns(name: str, n_episodes: int) -> dict[str, list[float]]:
    """Return what a policy that has learned in EnvPool and one of chance score there and in gymnasium."""
    policy, steps = ("CnnPolicy", 2048) if name == "Pong-v5" else ("MlpPolicy", 100_000)
    model = PPO(policy, pool(name, 16), n_steps=128, batch_size=256, **CPU)
    single: Any = gymnasium_pong if name == "Pong-v5" else functools.partial(gym.make, name)
    scores = {}
    for which in ("of chance", "learned"):
        if which == "learned":
            model.learn(steps)
        for side in ("EnvPool", "gymnasium"):
            env = pool(name, 8, seed=1000) if side == "EnvPool" else ours.DummyVecEnv([lambda: Monitor(single())] * 8)
            env.seed(1000)
            found, _ = evaluate_policy(model, env, n_episodes, deterministic=False, return_episode_rewards=True)
            scores[f"{which}, {side}"] = [float(x) for x in found]
            env.close()
    return scores


#: Episodes of each side.
EPISODES = {"CartPole-v1": 200, "HalfCheetah-v5": 48, "Pong-v5": 8}


# -------------------------------------------------------------------- report


def compared(first: list[float], values: list[float]) -> list[str]:
    """Return the median of a side with its range, and the median ratio of the first side to it."""
    ratio = statistics.median(x / y for x, y in zip(first, values, strict=True))
    return [f"{statistics.median(values):,.0f} ({min(values):,.0f}-{max(values):,.0f})", f"{ratio:.2f}"]


def table(data: dict[str, Any]) -> str:
    lines = ["# Vectorised environments", "", f"Made by `benchmarks/vectorised.py` on {data['machine']}.", ""]
    lines += [
        "Medians of turns (range). One thread for NumPy and torch. Processor time is that of this process with all its "
        "threads; a busy machine changes it less.",
        "",
    ]
    for group, rows in data["groups"].items():
        lines += [f"## {group.capitalize()}", "", str(GROUPS[group].__doc__), ""]
        for row, rates in rows.items():
            clocks = ["wall"] if group == "stepping" else ["wall", "processor"]  # there other processes do the work
            head = " | ".join(f"per second ({clock}) | first / this" for clock in clocks)
            lines += [f"| {row} | {head} |", "|---" * (1 + 2 * len(clocks)) + "|"]
            first = next(iter(rates.values()))
            for side, by_clock in rates.items():
                cells = [cell for clock in clocks for cell in compared(first[clock], by_clock[clock])]
                lines.append(f"| {' | '.join([side, *cells])} |")
            lines.append("")
    if data["returns"]:
        lines += ["## Returns", "", "The same policy in EnvPool's environments and in gymnasium's.", ""]
        lines += ["| task, policy, environments | mean return | standard error | episodes |", "|---|---|---|---|"]
        for name, scores in data["returns"].items():
            for side, values in scores.items():
                error = statistics.stdev(values) / len(values) ** 0.5
                lines.append(f"| {name}, {side} | {statistics.mean(values):.2f} | {error:.2f} | {len(values)} |")
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--group", default="", choices=["", *GROUPS, "returns"], help="only these rows")
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--report", action="store_true", help="only write the table again")
    parser.add_argument("--folder", type=Path, default=HERE, help="where the results are")
    args = parser.parse_args()
    args.folder.mkdir(exist_ok=True)
    path = args.folder / "results.json"
    data = json.loads(path.read_text()) if path.exists() else {"groups": {}, "returns": {}}
    if not args.report:
        th.set_num_threads(1)
        data["machine"] = f"{machine('NumPy')}, load {os.getloadavg()[0]:.0f}"
        for group, rows in GROUPS.items():
            for name, make in rows().items() if args.group in ("", group) else ():
                if args.only in name:
                    rates = measured(make(), args.repeats)
                    data["groups"].setdefault(group, {})[name] = rates
                    print(
                        group,
                        name,
                        {side: round(statistics.median(x["wall"])) for side, x in rates.items()},
                        flush=True,
                    )
                    path.write_text(json.dumps(data, indent=1) + "\n")
        for name, n_episodes in EPISODES.items() if args.group in ("", "returns") else ():
            if args.only in name:
                data["returns"][name] = returns(name, n_episodes)
                print(
                    name, {side: round(statistics.mean(x), 2) for side, x in data["returns"][name].items()}, flush=True
                )
                path.write_text(json.dumps(data, indent=1) + "\n")
    (args.folder / "table.md").write_text(table(data))


if __name__ == "__main__":
    main()

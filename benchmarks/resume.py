"""Is a resumed run the uninterrupted one, bit for bit? Ours, and SB3 and sb3-contrib on the same inputs.

    python benchmarks/resume.py

Each case is run three times, in three processes: whole; until it is saved; and from the archive on. What is compared
is every parameter, the optimizer's state, the statistics of VecNormalize, the step count and the logged episodes.
Writes ``benchmarks/resume/results.csv`` and ``table.md``; takes about ten minutes on two cores.
"""

import argparse
import csv
import subprocess
import sys
import tempfile
import threading
import warnings
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces, wrappers
from stable_baselines3 import A2C
from stable_baselines3 import PPO as SB3PPO
from stable_baselines3.common import vec_env as sb3
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.utils import LinearSchedule

import sb3_pg
from sb3_pg.common.vec_env import DummyVecEnv, VecNormalize
from sb3_pg.demo import quieten_mujoco

ROOT = Path(__file__).parent
FOLDER = ROOT / "resume"
N_ENVS, SEED = 2, 3

#: The peers run every n-th of the cases that they can.
PEERS_EVERY = 2


# ---------------------------------------------------------------- environments


@dataclass
class Body:
    """A part of an environment with attributes of its own."""

    speed: np.ndarray
    age: int = 0


class Attributes(gym.Env):
    """Keeps its state in attributes of many kinds: a view, a deque, an object, a generator of its own."""

    observation_space, action_space = spaces.Box(-9, 9, (4,)), spaces.Discrete(2)

    def __init__(self) -> None:
        self.memory, self.own = np.zeros(6, np.float32), np.random.default_rng(0)
        self.place = self.memory[1:5]
        self.last, self.body = deque(maxlen=3), Body(np.zeros(4))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.memory[:] = self.np_random.normal(size=6)
        self.body.age = 0
        self.last.clear()
        return self.place.copy(), {}

    def step(self, action):
        self.body.age += 1
        self.body.speed += self.own.normal(scale=0.1, size=4)
        self.memory[1:5] += self.body.speed * (2 * int(action) - 1) * 0.1
        np.clip(self.memory, -9, 9, out=self.memory)
        self.last.append(float(self.place.sum()))
        over = self.body.age >= 20 and bool(self.own.random() < 0.2)
        return self.place.copy(), sum(self.last) / 3, over, False, {}


class Simulator:
    """Where Python cannot look: no attributes."""

    __slots__ = ("generator", "place")


class Told(gym.Env):
    """Has its state elsewhere, and tells it."""

    observation_space, action_space = spaces.Box(-9, 9, (3,)), spaces.Box(-1, 1, (2,))

    def __init__(self) -> None:
        self.simulator = Simulator()

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.simulator.place, self.simulator.generator = self.np_random.normal(size=3), np.random.default_rng(1)
        return self.simulator.place.astype(np.float32), {}

    def step(self, action):
        drawn = self.simulator.generator.normal(size=3)
        self.simulator.place = np.clip(self.simulator.place + 0.1 * drawn + 0.1 * float(action[0]), -9, 9)
        seen = self.simulator.place.astype(np.float32)
        return seen, float(seen[0]), bool(seen[1] > 1.5), False, {}

    def get_state(self):
        return {"place": self.simulator.place, "generator": self.simulator.generator}

    def set_state(self, state):
        self.simulator.place, self.simulator.generator = state["place"], state["generator"]


class Locked(Attributes):
    """Has something that is no plain data: both runs reset where the one was saved."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()

    def reset(self, *, seed=None, options=None):
        self.own = np.random.default_rng(0)
        self.body.speed[:] = 0.0
        return super().reset(seed=seed)


class Masked(gym.Env):
    """Three actions, of which a random two are allowed."""

    observation_space, action_space = spaces.Box(-1, 1, (3,)), spaces.Discrete(3)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.n = 0
        return self._seen(), {}

    def _seen(self):
        self.forbidden = int(self.np_random.integers(3))
        return self.np_random.uniform(-1, 1, 3).astype(np.float32)

    def step(self, action):
        assert action != self.forbidden
        self.n += 1
        return self._seen(), float(action), bool(self.np_random.random() < 0.1), self.n == 15, {}

    def action_masks(self):
        return np.arange(3) != self.forbidden


class Parts(gym.Env):
    """Observations of parts."""

    observation_space = spaces.Dict({"a": spaces.Box(-1, 1, (3,)), "b": spaces.Discrete(4)})
    action_space = spaces.Discrete(3)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self._seen(), {}

    def _seen(self):
        return {"a": self.np_random.uniform(-1, 1, 3).astype(np.float32), "b": int(self.np_random.integers(4))}

    def step(self, action):
        return self._seen(), float(action), bool(self.np_random.random() < 0.1), False, {}


OWN = {kind.__name__: kind for kind in (Attributes, Told, Locked, Masked, Parts)}

WRAPPERS = {
    "": lambda env: env,
    "NormalizeObservation": wrappers.NormalizeObservation,
    "DelayObservation": lambda env: wrappers.DelayObservation(env, 2),
    "FrameStackObservation": lambda env: wrappers.FrameStackObservation(env, 3),
    "StickyAction": lambda env: wrappers.StickyAction(env, 0.3),
}

VEC_WRAPPERS = {
    "": lambda env: env,
    "VecFrameStack": lambda env: sb3.VecFrameStack(env, 3),
    "VecMonitor": sb3.VecMonitor,
    "VecFrameStack and VecNormalize": lambda env: VecNormalize(sb3.VecFrameStack(env, 2)),
    "VecNormalize": VecNormalize,
}

LETTERS = list("abcdefgh")


def share_of_a(prompts, completions, references):
    return [text.split().count("a") / 6 for text in completions]


def make_text():
    from sb3_pg.text import TextTask, TextVecEnv
    from sb3_pg.text.tokenizers import word_tokenizer

    prompts = ["a b c", "d", "e f", "g h a b", "c d e"]
    task = TextTask(prompts=prompts, reward=share_of_a, tokenizer=word_tokenizer(LETTERS), response_length=6)
    return TextVecEnv(task, 4, completions_per_prompt=2, seed=SEED)


def make_env(case: "Case", seed: int) -> sb3.VecEnv:
    if case.env == "text":
        return make_text()
    name, _, where = case.env.partition(" in ")

    def one() -> gym.Env:
        env = OWN[name]() if name in OWN else gym.make(name)
        return Monitor(WRAPPERS.get(case.wrapper, WRAPPERS[""])(env))

    kind = sb3.SubprocVecEnv if where else DummyVecEnv
    env = kind([one] * N_ENVS)
    env.seed(seed)
    return VEC_WRAPPERS.get(case.wrapper, VEC_WRAPPERS[""])(env)


# ------------------------------------------------------------------ algorithms

UPDATE = {
    "PPO": {"n_steps": 32, "batch_size": 16, "n_epochs": 2},
    "TRPO": {"n_steps": 32, "batch_size": 16, "n_critic_updates": 2, "cg_max_steps": 4},
    "REINFORCE": {"n_steps": 32, "n_critic_updates": 2},
}
SMALL = {"net_arch": [16]}
LSTM = {"lstm_hidden_size": 8, "net_arch": [16]}
TEXT = {"reference_kl_coef": 0.1, "reference_kl_target": 0.01, "model": None}
GPT2 = {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32, "bos_token_id": None}

#: By name of the policy: that of the class, its arguments, and further ones of the algorithm.
POLICIES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "MLP": ("MlpPolicy", SMALL, {}),
    "MLP, gSDE": ("MlpPolicy", SMALL, {"use_sde": True, "sde_sample_freq": 5}),
    "MLP, masks": ("MlpPolicy", SMALL, {}),
    "Dict": ("MultiInputPolicy", SMALL, {}),
    "LSTM": ("MlpLstmPolicy", LSTM, {}),
    "LSTM, masks": ("MlpLstmPolicy", LSTM, {}),
    "GRU": ("MlpGruPolicy", LSTM, {}),
    "MLP, adaptive lr": ("MlpPolicy", SMALL, {"adaptive_lr": True}),
    "MLP, adaptive KL": ("MlpPolicy", SMALL, {"kl_coef": 0.1, "adaptive_kl_coef": True}),
    "MLP, schedules": ("MlpPolicy", SMALL, {"learning_rate": LinearSchedule(1e-2, 1e-3, 1.0)}),
    "MLP, episodes and moving average": ("MlpPolicy", SMALL, {"n_episodes": 4, "baseline": "ema"}),
    "MLP, episodes and leave-one-out": ("MlpPolicy", SMALL, {"n_episodes": 4, "baseline": "leave_one_out"}),
    "GPT-2, adapted KL": ("CausalLMPolicy", TEXT, {"gamma": 1.0}),
    "T5, adapted KL": ("Seq2SeqLMPolicy", TEXT, {"gamma": 1.0}),
}


@dataclass(frozen=True)
class Case:
    """One line of the results."""

    algorithm: str
    engine: str
    policy: str
    env: str
    wrapper: str
    moment: str

    @property
    def resets(self) -> bool:
        """Whether the environment cannot go on, so that both runs reset it."""
        return self.env == "Locked"

    @property
    def total(self) -> int:
        return 512 if self.env != "text" else 384


#: When a run is saved: after so many steps of both environments together, or with so many-th rollout's start or end.
MOMENTS = {
    "between two calls of learn": 192,
    "in a callback, amid a rollout": 83,
    "in a callback, with a rollout's last step": 64,
    "at a rollout's start": 3,
    "at a rollout's end": 3,
    "after a callback has stopped it": 83,
    "twice, amid a rollout": 83,
}


def cases() -> list[Case]:
    algorithms, engines = ("PPO", "TRPO", "REINFORCE"), ("auto", "autograd")
    main, some = [*MOMENTS], [*MOMENTS][:2] + [*MOMENTS][4:6]
    places = (("CartPole-v1", ""), ("Pendulum-v1", "VecNormalize"), ("HalfCheetah-v5", "VecNormalize"))
    found = [
        Case(a, e, "MLP", env, wrapper, m)
        for a, e, (env, wrapper), m in product(algorithms, engines, places, main)
        if e == "auto" or m in some
    ]
    kinds = (
        ("MLP, gSDE", "Pendulum-v1"),
        ("MLP, masks", "Masked"),
        ("Dict", "Parts"),
        ("LSTM", "CartPole-v1"),
        ("LSTM, masks", "Masked"),
        ("GRU", "CartPole-v1"),
    )
    found += [Case(a, "auto", policy, env, "", m) for a, (policy, env), m in product(algorithms, kinds, some)]
    found += [Case(a, "autograd", "LSTM", "Pendulum-v1", "VecNormalize", m) for a, m in product(algorithms, some)]
    options = [name for name in POLICIES if name.startswith("MLP, ") and name not in ("MLP, gSDE", "MLP, masks")]
    found += [Case("PPO", "auto", name, "CartPole-v1", "", m) for name, m in product(options, some)]
    around = [name for name in (*WRAPPERS, *VEC_WRAPPERS) if name not in ("", "VecNormalize")]
    found += [Case(a, "auto", "MLP", "CartPole-v1", name, m) for a, name, m in product(algorithms, around, some[1:3])]
    places = ("Acrobot-v1", "FrozenLake-v1", "Attributes", "Told", "Told in other processes")
    found += [Case(a, "auto", "MLP", env, "", m) for a, env, m in product(algorithms, places, some[1:3])]
    at_resets = some[0], some[3]
    found += [Case(a, "auto", "MLP", "Locked", "VecNormalize", m) for a, m in product(algorithms, at_resets)]
    texts = [name for name in POLICIES if "adapted KL" in name and "MLP" not in name]
    found += [Case(a, "auto", name, "text", "", m) for a, name, m in product(algorithms, texts, some)]
    return list(dict.fromkeys(found))


def ours(case: Case) -> type:
    return getattr(sb3_pg, case.algorithm)


def peer(case: Case) -> type | None:
    """Return the peer's algorithm that takes the same policy and environment, A2C for REINFORCE; None for none."""
    from sb3_contrib import TRPO, MaskablePPO, RecurrentPPO

    if case.env == "text" or case.policy in ("GRU", "LSTM, masks") or case.engine == "autograd":
        return None  # one engine only
    if case.policy not in ("MLP", "MLP, gSDE", "MLP, schedules", "Dict"):
        kind = {"MLP, masks": MaskablePPO, "LSTM": RecurrentPPO}.get(case.policy)
        return kind if case.algorithm == "PPO" else None
    return {"PPO": SB3PPO, "TRPO": TRPO, "REINFORCE": A2C}[case.algorithm]


def arguments(case: Case, kind: type) -> dict[str, Any]:
    name, policy_kwargs, more = POLICIES[case.policy]
    options = {**UPDATE[case.algorithm], **more, "policy_kwargs": dict(policy_kwargs)}
    options = {"seed": SEED, "device": "cpu", "learning_rate": 1e-2, **options}
    if case.env == "text":
        options["learning_rate"] = 1e-3
        if case.policy.startswith("GPT-2"):
            task = make_text().task
            end = {"vocab_size": task.action_space.n, "eos_token_id": task.end_token}
            options["policy_kwargs"]["model"] = {**GPT2, **end}
    if kind is A2C:
        kept = ("n_steps", "policy_kwargs", "seed", "device", "learning_rate", "use_sde", "sde_sample_freq")
        return {"policy": name, **{key: value for key, value in options.items() if key in kept}}
    if kind.__module__.startswith("sb3_pg"):
        options["engine"] = case.engine
    return {"policy": name, **options}


# ------------------------------------------------------------------------ runs


class Saving(BaseCallback):
    """Saves at a moment, or stops there."""

    def __init__(self, moment: str, save: Any) -> None:
        super().__init__()
        self.moment, self.save, self.n_rollouts = moment, save, 0

    def _on_step(self) -> bool:
        is_now = self.n_calls * self.training_env.num_envs == self.at
        if is_now and ("callback, " in self.moment or "twice" in self.moment):
            self.save(self.model)
        return not (is_now and "stopped" in self.moment)

    @property
    def at(self) -> int:
        n = self.training_env.num_envs
        return MOMENTS[self.moment] // n * n

    def _on_rollout_start(self) -> None:
        self.n_rollouts += 1
        if self.moment == "at a rollout's start" and self.n_rollouts == MOMENTS[self.moment]:
            self.save(self.model)

    def _on_rollout_end(self) -> None:
        if self.moment == "at a rollout's end" and self.n_rollouts == MOMENTS[self.moment]:
            self.save(self.model)


def save_to(path: Path) -> Any:
    def save(model: Any) -> None:
        model.save(path)
        statistics = model.get_vec_normalize_env()
        if statistics is not None:
            statistics.save(str(path.with_suffix(".pkl")))

    return save


def first_part(model: Any, case: Case, save: Any) -> Any:
    """Learn until the moment; saves there."""
    if case.moment == "between two calls of learn":
        model.learn(MOMENTS[case.moment])
        save(model)
    else:
        model.learn(case.total, callback=Saving(case.moment, save))
        if "stopped" in case.moment:
            save(model)
    return model


def go_on(model: Any, case: Case, callback: Any = None) -> Any:
    return model.learn(max(case.total - model.num_timesteps, 0), callback=callback, reset_num_timesteps=False)


def run_whole(case: Case, kind: type, path: Path) -> Any:
    model = kind(env=make_env(case, SEED), **arguments(case, kind))
    first_part(model, case, lambda model: None)
    if case.resets:
        model.set_env(model.get_env())
    return go_on(model, case)


def run_first(case: Case, kind: type, path: Path) -> Any:
    return first_part(kind(env=make_env(case, SEED), **arguments(case, kind)), case, save_to(path))


def run_rest(case: Case, kind: type, path: Path) -> Any:
    def loaded(path: Path) -> Any:
        env, statistics = make_env(case, 1_000), path.with_suffix(".pkl")
        if statistics.exists() and not kind.__module__.startswith("sb3_pg"):
            env = sb3.VecNormalize.load(str(statistics), env.venv)  # ours has the statistics in the archive
        return kind.load(path, env=env, device="cpu")

    model = loaded(path)
    if "twice" in case.moment:
        again = path.with_name(f"{path.stem}-again.zip")
        go_on(model, case, Saving(case.moment, save_to(again)))
        model = loaded(again)
    return go_on(model, case)


def numbers_of(model: Any) -> dict[str, np.ndarray]:
    """Return all that is compared, by name."""
    found = {name: x.detach().numpy() for name, x in model.policy.state_dict().items()}
    for i, state in model.policy.optimizer.state_dict()["state"].items():
        found |= {f"optimizer {i} {name}": np.asarray(x) for name, x in state.items()}
    statistics = model.get_vec_normalize_env()
    if statistics is not None:
        its = {"observations": statistics.obs_rms, "returns": statistics.ret_rms}
        found |= {f"statistics of {name}": np.append(x.mean, x.var) for name, x in its.items()}
    found["num_timesteps"] = np.asarray(model.num_timesteps)
    found["episodes"] = np.array([(its["r"], its["l"]) for its in model.ep_info_buffer])
    return found


ROLES = {"whole": run_whole, "first": run_first, "rest": run_rest}


def play(role: str, side: str, folder: Path, wanted: list[int]) -> None:
    """Run all cases in one role."""
    warnings.simplefilter("ignore")
    quieten_mujoco()
    th.set_num_threads(1)
    choice = {"ours": ours, "peer": peer}[side]
    runs = [(i, case, choice(case)) for i, case in enumerate(cases())]
    runs = [run for run in runs if run[2] is not None][:: 1 if side == "ours" else PEERS_EVERY]
    for i, case, kind in runs:
        if wanted and i not in wanted:
            continue
        try:
            model = ROLES[role](case, kind, folder / f"{side}-{i}.zip")
            np.savez(folder / f"{side}-{i}-{role}.npz", **numbers_of(model))
            model.get_env().close()
        except Exception as error:
            (folder / f"{side}-{i}-{role}.txt").write_text(f"{type(error).__name__}: {error}")


def verdict(folder: Path, side: str, i: int) -> str:
    """Return "equal", or the first difference, or what was raised."""
    files = [folder / f"{side}-{i}-{role}" for role in ("whole", "rest")]
    for file in (*files, folder / f"{side}-{i}-first"):
        if file.with_suffix(".txt").exists():
            return " ".join(file.with_suffix(".txt").read_text().split())[:200]
    if not files[0].with_suffix(".npz").exists():
        return ""
    whole, rest = (dict(np.load(file.with_suffix(".npz"))) for file in files)
    for name, x in whole.items():
        if name not in rest or x.shape != rest[name].shape:
            return f"{name}: another number"
        if not np.array_equal(x, rest[name]):
            return f"{name}: up to {np.abs(x - rest[name]).max():.2g}"
    return "equal"


# ---------------------------------------------------------------------- report


def write_table(rows: list[dict[str, str]]) -> None:
    def share(some: list[dict[str, str]], side: str) -> str:
        found = [row[side] for row in some if row[side]]
        return f"{sum(its == 'equal' for its in found)} of {len(found)}" if found else "-"

    lines = [
        "# Resumed runs",
        "",
        "Made by `benchmarks/resume.py`; each case is a line of [results.csv](results.csv), with the first difference.",
        "Equal means that all parameters, the optimizer, VecNormalize's statistics, the step count and the logged",
        "episodes are those of the uninterrupted run, bit for bit. The peers are SB3's PPO, and A2C beside REINFORCE,",
        "and sb3-contrib's TRPO, MaskablePPO and RecurrentPPO, on every second of the cases of which one takes the",
        "policy and environment; theirs load VecNormalize's own file, ours needs none.",
        "",
    ]
    for heading, key in (("Saved", "moment"), ("Policy", "policy"), ("Environment", "env"), ("Wrapper", "wrapper")):
        lines += [f"| {heading} | ours equal | peers equal |", "|---|---|---|"]
        for value in dict.fromkeys(row[key] for row in rows):
            some = [row for row in rows if row[key] == value]
            lines.append(f"| {value or 'none'} | {share(some, 'ours')} | {share(some, 'peer')} |")
        lines.append("")
    lines += [f"In all: ours {share(rows, 'ours')}, the peers {share(rows, 'peer')}.", ""]
    (FOLDER / "table.md").write_text("\n".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--role", choices=ROLES)
    parser.add_argument("--side", choices=("ours", "peer"), default="ours")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--cases", type=int, nargs="*", default=[], help="numbers of cases; nothing is written then")
    options = parser.parse_args()
    if options.role:
        return play(options.role, options.side, options.folder, options.cases)
    with tempfile.TemporaryDirectory() as name:

        def play_in_turn(side: str) -> None:
            for role in ROLES:
                command = [sys.executable, __file__, "--role", role, "--side", side, "--folder", name, "--cases"]
                subprocess.run([*command, *map(str, options.cases)], check=True, stdout=subprocess.DEVNULL)

        with ThreadPoolExecutor() as pool:
            list(pool.map(play_in_turn, ("ours", "peer")))
        rows = [
            {**vars(case), "ours": verdict(Path(name), "ours", i), "peer": verdict(Path(name), "peer", i)}
            for i, case in enumerate(cases())
        ]
    if options.cases:
        for i in options.cases:
            print(i, rows[i])
        return None
    FOLDER.mkdir(exist_ok=True)
    with (FOLDER / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    write_table(rows)
    print(Counter((row["ours"] == "equal", row["peer"] == "equal") for row in rows))
    return None


if __name__ == "__main__":
    main()

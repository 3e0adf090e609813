"""What an exception leaves behind: ours and the peers, with the same faults at the same moments.

``python benchmarks/faults.py`` runs every case in one process, a second or less each, and writes results.csv and
table.md in benchmarks/faults/. A case is one fault in a small run: the step in which an environment raises or gives a
number that is not finite, the callback that raises, the line at which ctrl-C arrives, a step that is too large. After
it four questions are asked:

- kept: are parameters, the optimizer's state and VecNormalize's statistics those after a whole update and step, finite,
  and have no number that is not finite reached the environments?
- told: is the error one line that names the cause, or what was raised by the environment, callback or user itself?
- saved: does an archive saved now load, with the same parameters?
- goes on: once the cause is gone, does ``learn(..., reset_num_timesteps=False)`` run, and change finite parameters?
"""

import argparse
import csv
import functools
import random
import re
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import sb3_contrib
import stable_baselines3
import torch as th
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecNormalize

from sb3_pg import PPO, REINFORCE, TRPO

FOLDER = Path(__file__).parent / "faults"

SMALL = {"n_steps": 16, "batch_size": 16, "policy_kwargs": {"net_arch": [8]}, "device": "cpu", "seed": 0}
PPO_SIZE, TRPO_SIZE = {**SMALL, "n_epochs": 2}, {**SMALL, "n_critic_updates": 2, "cg_max_steps": 3}
EPISODES = {"policy_kwargs": SMALL["policy_kwargs"], "device": "cpu", "seed": 0, "n_episodes": 4, "n_critic_updates": 1}
A2C_SIZE = {"policy_kwargs": SMALL["policy_kwargs"], "device": "cpu", "seed": 0, "n_steps": 16}

#: (class, arguments) by names; the sides of one row of the table stand beside each other
SIDES: dict[str, tuple[type, dict[str, Any]]] = {
    "PPO": (PPO, PPO_SIZE),
    "PPO, autograd": (PPO, {**PPO_SIZE, "engine": "autograd"}),
    "TRPO": (TRPO, TRPO_SIZE),
    "TRPO, autograd": (TRPO, {**TRPO_SIZE, "engine": "autograd"}),
    "REINFORCE": (REINFORCE, EPISODES),
    "REINFORCE, autograd": (REINFORCE, {**EPISODES, "engine": "autograd"}),
    "SB3 PPO": (stable_baselines3.PPO, PPO_SIZE),
    "sb3-contrib TRPO": (sb3_contrib.TRPO, TRPO_SIZE),
    "SB3 A2C": (stable_baselines3.A2C, A2C_SIZE),
}
OURS = [name for name, (kind, _) in SIDES.items() if kind in (PPO, TRPO, REINFORCE)]

#: Environment steps of a run; an update has about 32 of them.
STEPS = 200


class FaultError(Exception):
    """What environments and callbacks raise."""


@dataclass
class Fault:
    """What goes wrong, once, and with which step of the environments or event of the callback.

    :param what: of ``ENVIRONMENT``, ``CALLBACK`` or ``OTHER``
    :param at: the step of the second environment, or event; of "interrupt" the share of the run that is over
    """

    what: str
    at: float
    is_over: bool = False


class Faulty(gym.Env[np.ndarray, np.ndarray]):
    """Episodes of seven steps; counts actions that are not finite."""

    def __init__(self, fault: Fault | None = None) -> None:
        self.observation_space = spaces.Box(-np.inf, np.inf, (3,), np.float64)
        self.action_space = spaces.Box(-1.0, 1.0, (2,), np.float32)
        self.fault, self.total, self.after, self.bad_actions = fault, 0, 0, 0

    def _breaks(self, *what: str) -> bool:
        fault = self.fault
        if fault is None or fault.is_over or fault.what not in what or self.total < fault.at:
            return False
        fault.is_over = True
        return True

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        if self._breaks("reset raises"):
            raise FaultError("reset")
        self.steps = 0
        return self.np_random.uniform(-1, 1, 3), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.bad_actions += not np.isfinite(action).all()
        self.after += self.fault is not None and self.fault.is_over
        self.total, self.steps = self.total + 1, self.steps + 1
        if self._breaks("step raises"):
            raise FaultError("step")
        if self._breaks("ctrl-C in step"):
            raise KeyboardInterrupt
        observation, reward = self.np_random.uniform(-1, 1, 3), float(1.0 - np.square(action).sum())
        for name, value in NUMBERS.items():
            if self._breaks(f"observation {name}"):
                observation = np.full(3, value)
            if self._breaks(f"reward {name}"):
                reward = value
        is_cut = self.steps == 7
        if is_cut and self._breaks("terminal observation nan"):
            observation = np.full(3, np.nan)
        return observation, reward, False, is_cut, {}


NUMBERS = {"nan": np.nan, "inf": np.inf, "1e300": 1e300}
ENVIRONMENT = ["step raises", "reset raises", "ctrl-C in step", "terminal observation nan"]
ENVIRONMENT += [f"{what} {name}" for what in ("observation", "reward") for name in NUMBERS]
STEPS_THAT_FAIL = [what for what in ENVIRONMENT if what != "reset raises"]
CALLBACK = [
    "rollout start raises",
    "callback step raises",
    "rollout end raises",
    "ctrl-C in callback",
    "learn in callback",
]
POLICY = ["weight nan", "deviation overflows", "learning rate 1e39", "learning rate 1e30"]

#: What an error must name; a fault that is not here is raised by the user's code and must reach the caller as it is.
CAUSES = {
    "terminal observation nan": r"terminal observation of environment 1\b.*nan",
    "learn in callback": r"learn.*callback",
    "weight nan": r"policy.*action_net\.weight",
    "deviation overflows": r"policy.*log_std",
    "learning rate 1e39": r"learning_rate|polic",
    "learning rate 1e30": r"learning_rate|polic",
}
CAUSES |= {
    f"{w} {n}": rf"{w} of environment 1 at step \d+ .*{n.replace('1e300', '1e.300|inf')}"
    for w in ("observation", "reward")
    for n in NUMBERS
}


def state_of(model: Any) -> list[np.ndarray]:
    """Return copies of the parameters and the optimizer's state."""
    numbers = [p.detach().numpy().copy() for p in model.policy.parameters()]
    for its in model.policy.optimizer.state_dict()["state"].values():
        numbers += [np.array(x.numpy() if isinstance(x, th.Tensor) else x) for x in its.values()]
    return numbers


def statistics_of(env: VecEnv) -> list[np.ndarray]:
    """Return copies of VecNormalize's statistics."""
    if not isinstance(env, VecNormalize):
        return []
    return [np.array(x) for its in (env.obs_rms, env.ret_rms) for x in (its.mean, its.var, its.count)]  # type: ignore[union-attr]


def are_equal(a: list[np.ndarray], b: list[np.ndarray]) -> bool:
    """Return whether two states are the same to the bit."""
    return len(a) == len(b) and all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


class Watching(BaseCallback):
    """Remembers what is whole, and raises the faults of callbacks."""

    def __init__(self, fault: Fault) -> None:
        super().__init__()
        self.fault = fault
        self.whole: list[list[np.ndarray]] = []
        self.statistics: list[list[np.ndarray]] = []
        self.counts: Counter[str] = Counter()

    def note(self) -> None:
        """Remember the present state as that after a whole update."""
        state = state_of(self.model)
        if not (self.whole and are_equal(self.whole[-1], state)):
            self.whole = [*self.whole[-1:], state]

    def _maybe(self, *what: str) -> None:
        self.counts[what[0]] += 1
        if self.fault.what in what and not self.fault.is_over and self.counts[what[0]] > self.fault.at:
            self.fault.is_over = True
            if self.fault.what == "ctrl-C in callback":
                raise KeyboardInterrupt
            if self.fault.what == "learn in callback":
                self.model.learn(32)
                return
            raise FaultError("callback")

    def _on_rollout_start(self) -> None:
        self.note()
        self.statistics = [*self.statistics[-1:], statistics_of(self.training_env)]
        if self.fault.what in POLICY and not self.fault.is_over and self.counts["rollout start raises"] >= 2:
            self._break_policy()
        self._maybe("rollout start raises")

    def _break_policy(self) -> None:
        self.fault.is_over = True
        with th.no_grad():
            if self.fault.what == "weight nan":
                self.model.policy.action_net.weight.fill_(np.nan)
            elif self.fault.what == "deviation overflows":
                self.model.policy.log_std.fill_(100.0)
            else:
                rate = float(self.fault.what.split()[-1])
                self.model.lr_schedule = lambda progress_remaining: rate

    def _on_step(self) -> bool:
        self.statistics = [*self.statistics[-1:], statistics_of(self.training_env)]
        self._maybe("callback step raises", "ctrl-C in callback", "learn in callback")
        return True

    def _on_rollout_end(self) -> None:
        self._maybe("rollout end raises")


def interrupted_at(line: int, function: Callable[[], Any]) -> int:
    """Call a function and raise KeyboardInterrupt at a line of the algorithms' or torch's optimizers' code.

    :param line: which of the lines that are run; -1 for none
    :return: how many were run
    """
    n = 0
    parts = ("sb3_pg", "stable_baselines3", "sb3_contrib", "torch/optim")

    def local(frame: Any, event: str, argument: Any) -> Any:
        nonlocal n
        if event == "line":
            n += 1
            if n == line:
                sys.settrace(None)
                raise KeyboardInterrupt
        return local

    def enter(frame: Any, event: str, argument: Any) -> Any:
        name = frame.f_code.co_filename
        return local if any(f"/{part}/" in name for part in parts) and "benchmarks" not in name else None

    sys.settrace(enter)
    try:
        function()
    finally:
        sys.settrace(None)
    return n


def make(side: str, fault: Fault, is_normalized: bool) -> Any:
    """Return a model on two environments, of which the second has the fault."""
    kind, arguments = SIDES[side]
    env: VecEnv = DummyVecEnv([Faulty, lambda: Faulty(fault)])
    if is_normalized:
        env = VecNormalize(env)
    return kind("MlpPolicy", env, **arguments)


@functools.cache
def lines_of(side: str, is_normalized: bool) -> int:
    """Return how many lines a run without a fault has."""
    model = make(side, Fault("none", 0), is_normalized)
    return interrupted_at(-1, lambda: model.learn(STEPS))


@dataclass
class Result:
    """The answers of one case."""

    side: str
    fault: str
    at: float
    normalized: bool
    kept: bool = True
    told: bool = True
    saved: bool = True
    goes_on: bool = True
    message: str = ""
    notes: list[str] = field(default_factory=list)


def run(side: str, what: str, at: float, is_normalized: bool) -> Result:
    """Run one case."""
    fault, result = Fault(what, at), Result(side, what, at, is_normalized)
    model, watching = make(side, fault, is_normalized), Watching(fault)
    train = model.train

    def noted_train() -> None:
        train()
        watching.note()

    model.train = noted_train
    error: BaseException | None = None
    try:
        if what == "interrupt":
            lines = lines_of(side, is_normalized)
            interrupted_at(int(at * lines), lambda: model.learn(STEPS, watching))
        else:
            model.learn(STEPS, watching)
    except BaseException as raised:
        error = raised
    finally:
        del model.train
    fault.is_over = True
    result.message = " ".join(f"{type(error).__name__}: {error}".split())[:200] if error else "no error"
    result.told = is_told(what, error)
    ask_kept(result, model, watching)
    if what in POLICY:
        mend(model, watching, what)
    ask_saved(result, model)
    ask_goes_on(result, model)
    return result


def is_told(what: str, error: BaseException | None) -> bool:
    """Return whether an error says what happened."""
    if what in CAUSES:
        said = isinstance(error, ValueError | AssertionError) and "\n" not in str(error)
        return said and re.search(CAUSES[what], str(error)) is not None
    expected = KeyboardInterrupt if what == "interrupt" or "ctrl-C" in what else FaultError
    return isinstance(error, expected)


def ask_kept(result: Result, model: Any, watching: Watching) -> None:
    """Compare the state with those that were whole."""
    state, env = state_of(model), model.get_env()
    statistics = statistics_of(env)
    if result.fault not in ("weight nan", "deviation overflows") or result.side in OURS:
        if not all(np.isfinite(x).all() for x in state):
            result.notes.append("parameters or optimizer not finite")
        if watching.whole and not any(are_equal(state, whole) for whole in watching.whole):
            result.notes.append("neither before nor after an update")
    if not all(np.isfinite(x).all() and (np.abs(x) < 1e100).all() for x in statistics):
        result.notes.append("statistics not finite")
    elif result.fault in STEPS_THAT_FAIL and watching.statistics and not are_equal(statistics, watching.statistics[-1]):
        result.notes.append("statistics amid a step")
    envs = env.unwrapped.envs
    if sum(its.unwrapped.bad_actions for its in envs):
        result.notes.append("actions that are not finite were sent")
    if result.fault in ENVIRONMENT and sum(its.unwrapped.after for its in envs):
        result.notes.append(f"{sum(its.unwrapped.after for its in envs)} steps after it")
    result.kept = not result.notes


def mend(model: Any, watching: Watching, what: str) -> None:
    """Do what a user can do about a broken policy whose last good parameters are not there."""
    model.lr_schedule = lambda progress_remaining: 1e-3
    if not all(np.isfinite(x).all() for x in state_of(model)) or model.policy.log_std.max() > 50:
        for parameter, good in zip(model.policy.parameters(), watching.whole[0], strict=False):
            parameter.data = th.as_tensor(good)
        model.policy.optimizer.state.clear()


def ask_saved(result: Result, model: Any) -> None:
    """Save and load."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            model.save(Path(folder) / "model")
            loaded = type(model).load(Path(folder) / "model", device="cpu")
        pairs = zip(model.policy.parameters(), loaded.policy.parameters(), strict=True)
        result.saved = all(a.equal(b) for a, b in pairs)
    except Exception as error:
        result.saved = False
        result.notes.append(f"save: {type(error).__name__}: {str(error)[:80]}")


def ask_goes_on(result: Result, model: Any) -> None:
    """Learn on."""
    before = [p.detach().clone() for p in model.policy.parameters()]
    try:
        model.learn(96, reset_num_timesteps=False)
        after = list(model.policy.parameters())
        finite = all(bool(p.isfinite().all()) for p in after)
        result.goes_on = finite and any(not a.equal(b) for a, b in zip(before, after, strict=True))
    except Exception as error:
        result.goes_on = False
        result.notes.append(f"goes on: {type(error).__name__}: {str(error)[:80]}")


def cases(n_interrupts: int) -> Iterator[tuple[str, float, bool]]:
    """Yield faults, their moments and whether VecNormalize is there."""
    for is_normalized in (False, True):
        for what in ENVIRONMENT:
            for at in (0, 21, 40) if what != "reset raises" else (1, 25):
                yield what, at, is_normalized
    for what in CALLBACK:
        for at in (0, 1, 3) if "rollout" in what else (0, 20, 41):
            yield what, at, True
    for what in POLICY:
        yield what, 0, False
        yield what, 0, True
    moments = random.Random(0)
    for number in range(n_interrupts):
        yield "interrupt", moments.random(), number % 2 == 1


def report(results: list[Result]) -> str:
    """Return the table."""
    questions = ("kept", "told", "saved", "goes_on")
    lines = ["| fault | cases | " + " | ".join(SIDES) + " |", "|---" * (len(SIDES) + 2) + "|"]
    faults = list(dict.fromkeys(result.fault for result in results))
    for fault in [*faults, "all"]:
        row = []
        for side in SIDES:
            of = [r for r in results if r.side == side and fault in (r.fault, "all")]
            whole = sum(all(getattr(r, q) for q in questions) for r in of)
            missing = [
                f"{q.replace('_', ' ')} {n}" for q in questions if (n := sum(getattr(r, q) for r in of)) < len(of)
            ]
            row.append(f"{whole}" + (f" ({', '.join(missing)})" if missing else ""))
        lines.append(f"| {fault} | {len(of)} | " + " | ".join(row) + " |")
    return "\n".join(lines)


HEAD = """# Faults

Made by `benchmarks/faults.py` ({n} cases; the script says what a case is, and what is asked after it). In each cell
stands after how many of the row's cases all four answers are yes, and in brackets the answers that are not always
yes, with how often they are. A2C stands beside REINFORCE. "interrupt" is ctrl-C at a random line of the libraries' own
code or of torch's optimizers; for the peers, too, what was before or after any whole update counts as kept. Parameters
that are not numbers count as not saved.

"""


def main() -> None:
    """Run all cases, or some."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--interrupts", type=int, default=60, help="random moments for each side; default: 60")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--out", type=Path, default=FOLDER)
    options = parser.parse_args()
    th.set_num_threads(1)
    warnings.simplefilter("ignore")
    np.seterr(all="ignore")
    results = [run(side, *case) for side in options.sides for case in cases(options.interrupts)]
    options.out.mkdir(parents=True, exist_ok=True)
    with (options.out / "results.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["side", "fault", "at", "normalized", "kept", "told", "saved", "goes_on", "message", "notes"])
        for r in results:
            row = [r.side, r.fault, f"{r.at:.4g}", r.normalized, r.kept, r.told, r.saved, r.goes_on, r.message]
            writer.writerow([*row, "; ".join(r.notes)])
    table = HEAD.format(n=len(results)) + report(results) + "\n"
    (options.out / "table.md").write_text(table)
    print(table)


if __name__ == "__main__":
    main()

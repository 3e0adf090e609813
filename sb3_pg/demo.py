"""Train an algorithm on an environment and show the result: ``python -m sb3_pg.demo --algo trpo --env HalfCheetah-v5``.

Trains with a progress bar, evaluates before and after, saves the model with its normalisation statistics, loads
both back, checks that the loaded model scores the same, and draws the learning curve.
"""

import argparse
import importlib.util
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import configure
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.vec_env import VecEnv, VecNormalize, sync_envs_normalization

from sb3_pg import PPO, REINFORCE, TRPO
from sb3_pg.common.errors import NonFiniteError
from sb3_pg.common.policy_gradient import PolicyGradientAlgorithm

ALGORITHMS: dict[str, type[PolicyGradientAlgorithm]] = {"reinforce": REINFORCE, "trpo": TRPO, "ppo": PPO}

#: For continuous actions, with normalised observations and rewards. TRPO's are rl-zoo's for HalfCheetah.
CONTINUOUS: dict[str, dict[str, Any]] = {
    "reinforce": {
        "n_episodes": 2,
        "batch_size": 16,
        "learning_rate": 1e-3,
        "gae_lambda": 0.95,
        "n_critic_updates": 10,
    },
    "trpo": {
        "n_steps": 1024,
        "batch_size": 128,
        "learning_rate": 1e-3,
        "gamma": 0.99,
        "gae_lambda": 0.95,
        "cg_max_steps": 25,
        "n_critic_updates": 20,
        "sub_sampling_factor": 1,
    },
    "ppo": {"n_steps": 1024, "batch_size": 64, "n_epochs": 10},
}

#: For discrete actions: many short rollouts, so that there are many updates.
DISCRETE: dict[str, dict[str, Any]] = {
    "reinforce": {},
    "trpo": {"n_steps": 512, "batch_size": 128, "gae_lambda": 0.98, "n_critic_updates": 20},
    "ppo": {"n_steps": 256, "batch_size": 64, "n_epochs": 10, "gae_lambda": 0.98},
}

#: rl-zoo's for HalfCheetah, where the KL is averaged over action dimensions; ours is summed.
TARGET_KL_PER_ACTION_DIMENSION = 0.04

#: (environments, steps in all): the defaults
CONTINUOUS_SIZE, DISCRETE_SIZE = (2, 204_800), (4, 50_000)

EVALUATION_EPISODES = 10


class DemoError(Exception):
    """Something the user can put right; the message is one line."""


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


class EpisodeLog(BaseCallback):
    """Remembers the environment step and the return of each episode that Monitor reports."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[int] = []
        self.returns: list[float] = []

    def _on_step(self) -> bool:
        for info in self.locals["infos"]:
            if "episode" in info:
                self.steps.append(self.num_timesteps)
                self.returns.append(float(info["episode"]["r"]))
        return True


@dataclass(frozen=True)
class Files:
    """Where the results lie."""

    model: Path
    statistics: Path
    curve: Path
    log: Path


@dataclass(frozen=True)
class Score:
    """Mean and standard deviation of the return over the evaluation episodes."""

    mean: float
    std: float

    def __str__(self) -> str:
        return f"{self.mean:.1f} +/- {self.std:.1f}"


# ---------------------------------------------------------------- environments


def quieten_mujoco() -> None:
    """Keep MuJoCo's remarks on what is deprecated in Gymnasium's models off the screen, but no other warning."""
    try:
        import mujoco  # type: ignore[import-untyped]
    except ImportError:
        return

    def warn(message: str) -> None:
        if "deprecated" not in message:
            print(f"MuJoCo: {message}", file=sys.stderr)

    mujoco.set_mju_user_warning(warn)


def check_environment(env_id: str) -> gym.Env[Any, Any]:
    """Make the environment once, to see whether it can be made and what its spaces are."""
    try:
        env = gym.make(env_id)
    except (gym.error.Error, ImportError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())
        if isinstance(error, (gym.error.DependencyNotInstalled, ImportError)):
            reason += " For MuJoCo: pip install 'sb3_pg[mujoco]'."
        raise DemoError(f"cannot make environment {env_id!r}: {reason}") from None
    return env


def is_continuous(env: gym.Env[Any, Any]) -> bool:
    """Return whether actions and observations are plain vectors of numbers, which gain from normalisation."""
    observation = env.observation_space
    return (
        isinstance(env.action_space, spaces.Box)
        and isinstance(observation, spaces.Box)
        and not is_image_space(observation)
    )


def policy_for(space: spaces.Space[Any]) -> str:
    """Return the policy that reads these observations."""
    if isinstance(space, spaces.Dict):
        return "MultiInputPolicy"
    return "CnnPolicy" if is_image_space(space) else "MlpPolicy"


def evaluation_env(env_id: str, train_env: VecEnv, seed: int) -> VecEnv:
    """Return one environment that never trains: true rewards, and the training environment's present statistics."""
    env = make_vec_env(env_id, n_envs=1, seed=seed)
    if isinstance(train_env, VecNormalize):
        env = VecNormalize(env, training=False, norm_reward=False)
        sync_envs_normalization(train_env, env)
    return env


def evaluate(model: PolicyGradientAlgorithm, env: VecEnv, seed: int) -> Score:
    """Deterministic actions, the same starts for the same seed."""
    env.seed(seed)
    mean, std = evaluate_policy(model, env, n_eval_episodes=EVALUATION_EPISODES, deterministic=True)
    return Score(float(np.mean(mean)), float(np.mean(std)))


# -------------------------------------------------------------- save and load


def save(model: PolicyGradientAlgorithm, env: VecEnv, files: Files) -> None:
    """Write the model, and the statistics without which its observations mean nothing."""
    model.save(files.model)
    if isinstance(env, VecNormalize):
        env.save(str(files.statistics))


def load(algorithm: str, env_id: str, files: Files, seed: int) -> tuple[PolicyGradientAlgorithm, VecEnv]:
    """Read both back into fresh objects, ready for evaluation."""
    env = make_vec_env(env_id, n_envs=1, seed=seed)
    if files.statistics.exists():
        env = VecNormalize.load(str(files.statistics), env)
        env.training = env.norm_reward = False
    return ALGORITHMS[algorithm].load(files.model, env=env), env


# --------------------------------------------------------------------- drawing


def running_mean(values: list[float], window: int) -> np.ndarray:
    """Return the mean of each value and up to ``window - 1`` before it."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    end = np.arange(1, len(values) + 1)
    start = np.maximum(end - window, 0)
    mean: np.ndarray = (total[end] - total[start]) / (end - start)
    return mean


def draw(log: EpisodeLog, title: str, path: Path) -> None:
    """The return of each episode as a thin line, and their running mean."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FuncFormatter

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    window = max(2, min(20, len(log.returns) // 5))
    axes.plot(log.steps, log.returns, color="#9db7d5", linewidth=0.8, label="episode")
    # Environments may finish together: one point for each step, or the mean would draw stairs.
    last = np.flatnonzero(np.diff(log.steps, append=-1))
    mean, steps = running_mean(log.returns, window)[last], np.asarray(log.steps)[last]
    axes.plot(steps, mean, color="#1f4e8c", linewidth=2.2, label=f"mean of the last {window} episodes")
    axes.set_title(title, loc="left", fontsize=12)
    axes.set_xlabel("environment steps")
    axes.set_ylabel("episode return")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.4g}"))
    axes.grid(color="#e3e3e3", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


# ---------------------------------------------------------------- the program


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = Parser(prog="python -m sb3_pg.demo", description=__doc__.split("\n")[0])
    parser.add_argument("--algo", default="trpo", choices=ALGORITHMS, help="default: trpo")
    parser.add_argument("--env", default="HalfCheetah-v5", metavar="ID", help="default: HalfCheetah-v5 (needs mujoco)")
    parser.add_argument("--timesteps", type=positive, metavar="N", help="environment steps in all")
    parser.add_argument("--n-envs", type=positive, metavar="N", help="parallel environments")
    parser.add_argument("--seed", type=natural, default=1, metavar="S", help="default: 1")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: runs/ALGO-ENV-SEED")
    options = parser.parse_args(arguments)
    if options.out is None:
        options.out = Path("runs") / f"{options.algo}-{options.env.replace('/', '_')}-{options.seed}"
    return options


def natural(text: str) -> int:
    """Return a whole number from 0 on."""
    number = int(text) if text.isdecimal() else -1
    if number < 0:
        raise argparse.ArgumentTypeError(f"must be a whole number >= 0, not {text!r}")
    return number


def positive(text: str) -> int:
    """Return a whole number from 1 on."""
    number = int(text) if text.isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number >= 1, not {text!r}")
    return number


def prepare(folder: Path) -> Files:
    """Make the folder of the results, and forget an earlier run's statistics."""
    missing = [name for name in ("matplotlib", "rich", "tqdm") if importlib.util.find_spec(name) is None]
    if missing:
        raise DemoError(f"{', '.join(missing)} not installed: pip install 'sb3_pg[extra]'")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DemoError(f"cannot write to {folder}: {error.strerror}") from None
    files = Files(
        folder / "model.zip", folder / "vecnormalize.pkl", folder / "learning_curve.png", folder / "progress.csv"
    )
    files.statistics.unlink(missing_ok=True)
    return files


def set_up(options: argparse.Namespace) -> tuple[PolicyGradientAlgorithm, VecEnv]:
    """Return the untrained model and its environments; completes ``options.timesteps``."""
    probe = check_environment(options.env)
    continuous, policy = is_continuous(probe), policy_for(probe.observation_space)
    probe.close()
    n_envs, timesteps = CONTINUOUS_SIZE if continuous else DISCRETE_SIZE
    options.timesteps = options.timesteps or timesteps
    env = make_vec_env(options.env, n_envs=options.n_envs or n_envs, seed=options.seed)
    if continuous:
        env = VecNormalize(env)
    arguments = dict((CONTINUOUS if continuous else DISCRETE)[options.algo])
    if continuous and options.algo == "trpo":
        arguments["target_kl"] = TARGET_KL_PER_ACTION_DIMENSION * math.prod(env.action_space.shape or ())
    device = "auto" if policy == "CnnPolicy" else "cpu"
    return ALGORITHMS[options.algo](policy, env, seed=options.seed, device=device, **arguments), env


def train(model: PolicyGradientAlgorithm, timesteps: int, folder: Path) -> tuple[EpisodeLog, float]:
    """Learn with a progress bar; the episodes and the seconds it took."""
    log = EpisodeLog()
    model.set_logger(configure(str(folder), ["csv"]))
    start = time.perf_counter()
    model.learn(timesteps, callback=log, progress_bar=True)
    seconds = time.perf_counter() - start
    model.logger.close()
    return log, seconds


def run(options: argparse.Namespace) -> bool:
    """Run the whole demonstration.

    :return: whether the loaded model scores what the saved one does
    """
    quieten_mujoco()
    model, env = set_up(options)
    files = prepare(options.out)
    name, eval_seed = type(model).__name__, options.seed + 10_000
    print(f"{name} on {options.env}: {options.timesteps:,} steps in {env.num_envs} environments, seed {options.seed}")
    print(f"Network: {model.network.description}")
    untrained = evaluate(model, evaluation_env(options.env, env, eval_seed), eval_seed)

    log, seconds = train(model, options.timesteps, options.out)
    trained = evaluate(model, evaluation_env(options.env, env, eval_seed), eval_seed)
    save(model, env, files)
    loaded = evaluate(*load(options.algo, options.env, files, eval_seed), eval_seed)
    draw(log, f"{name} on {options.env}, seed {options.seed}", files.curve)

    print(f"Trained in {seconds:.0f} s, {model.num_timesteps / seconds:,.0f} steps a second")
    print(f"Score (mean return of {EVALUATION_EPISODES} episodes +/- standard deviation, deterministic actions)")
    print(f"  untrained  {untrained}\n  trained    {trained}")
    print(f"  loaded     {loaded}  ({'the same' if loaded == trained else 'NOT the same'})")
    for what, path in vars(files).items():
        if path.exists():
            print(f"  {what:<11}{path}")
    return loaded == trained


def main(arguments: list[str] | None = None) -> int:
    """Run the demonstration; the exit code: 0, 1 if the loaded model differs, 2 for input that cannot work."""
    options = parse(arguments)
    try:
        return 0 if run(options) else 1
    except (DemoError, NonFiniteError, gym.error.Error, ValueError) as error:
        print(f"python -m sb3_pg.demo: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    th.set_num_threads(1)  # the networks are small: more threads only wait for each other
    sys.exit(main())

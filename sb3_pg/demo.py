"""Train an algorithm on an environment and show the result: ``python -m sb3_pg.demo --algo trpo --env HalfCheetah-v5``.

Trains with a progress bar, evaluates before and after, saves the model with its normalisation statistics, loads
both back, checks that the loaded model scores the same, and draws the learning curve.
"""

import argparse
import importlib.util
import math
import os
import re
import shlex
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.callbacks import CallbackList, ConvertCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import CSVOutputFormat, Logger
from stable_baselines3.common.policies import ActorCriticCnnPolicy
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.vec_env import sync_envs_normalization

from sb3_pg import PPO, REINFORCE, TRPO
from sb3_pg.command_line import CommandError, Parser, make_writable, missing_package, read_own, seed_number, whole
from sb3_pg.common import workers
from sb3_pg.common.errors import NonFiniteError
from sb3_pg.common.interrupts import Interrupted, interrupts_after_steps, saved_when_interrupted
from sb3_pg.common.policy_gradient import PolicyGradientAlgorithm
from sb3_pg.common.vec_env import VecNormalize

PROGRAM = "python -m sb3_pg.demo"

ALGORITHMS: dict[str, type[PolicyGradientAlgorithm]] = {"reinforce": REINFORCE, "trpo": TRPO, "ppo": PPO}

#: For continuous actions, with normalised observations and rewards. TRPO's are rl-zoo's for HalfCheetah.
CONTINUOUS: dict[str, dict[str, Any]] = {
    "reinforce": {"n_episodes": 2, "batch_size": 16, "learning_rate": 1e-3, "gae_lambda": 0.95, "n_critic_updates": 10},
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

EVALUATION_EPISODES, IMAGE_EVALUATION_EPISODES = 10, 3

#: Of an episode in an environment without a time limit: an untrained policy may never reach its end.
EVALUATION_STEPS = 1_000

#: After how many seconds of the first evaluation the length of the training is foreseen, and from how many minutes on
#: it is told.
PACE_SECONDS, LONG_MINUTES = 2.0, 5.0

FILES = {"model": "model.zip", "statistics": "vecnormalize.pkl", "curve": "learning_curve.png", "log": "progress.csv"}
FILES["episodes"] = "episodes.csv"  # step and return of each


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    positive = partial(whole, low=1)
    parser = Parser(prog=PROGRAM, description=__doc__.split("\n")[0])
    parser.add_argument("--algo", type=str.lower, default="trpo", choices=ALGORITHMS, help="default: trpo")
    parser.add_argument("--env", default="HalfCheetah-v5", metavar="ID", help="default: HalfCheetah-v5 (needs mujoco)")
    parser.add_argument(
        "--timesteps", type=positive, metavar="N", help="environment steps in all; default: about a minute's"
    )
    parser.add_argument("--n-envs", type=positive, metavar="N", help="environments side by side; default: 2 or 4")
    parser.add_argument(
        "--workers", type=positive, default=1, metavar="N", help="processes that train together, best one for each core"
    )
    parser.add_argument("--seed", type=seed_number, default=1, metavar="S", help="default: 1")
    parser.add_argument("--trusted", action="store_true", help="when loading, run the code that the files hold")
    parser.add_argument("--resume", action="store_true", help="go on with the run in the folder, up to --timesteps")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: runs/ALGO-ENV-SEED")
    options = parser.parse_args(arguments)
    if options.out is None:
        options.out = Path("runs") / f"{options.algo}-{re.sub('[/:]', '_', options.env)}-{options.seed}"
    return options


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


def inspect_environment(env_id: str) -> tuple[str, bool]:
    """Return the policy that reads its observations, and whether it is control from vector to vector."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*is out of date")  # comes again where the environment is used
            env = gym.make(env_id)
    except (gym.error.Error, ImportError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split()).rstrip(".") + "."
        if isinstance(error, (gym.error.DependencyNotInstalled, ImportError)):
            reason += missing_package(error)
        elif isinstance(error, gym.error.NamespaceNotFound):
            reason += " An id may begin with the module that registers it: ale_py:ALE/Pong-v5."
        raise CommandError(f"cannot make environment {env_id!r}: {reason}") from None
    except Exception as error:  # in code of the user's
        raise CommandError(f"cannot make environment {env_id!r}: {type(error).__name__}: {error}") from error
    env.close()
    if isinstance(env.observation_space, spaces.Dict):
        return "MultiInputPolicy", False
    if is_image_space(env.observation_space):
        return "CnnPolicy", False
    return "MlpPolicy", isinstance(env.observation_space, spaces.Box) and isinstance(env.action_space, spaces.Box)


def set_up(options: argparse.Namespace) -> PolicyGradientAlgorithm:
    """Return the untrained model on its environments; completes ``options.timesteps``."""
    policy, continuous = inspect_environment(options.env)
    n_envs, timesteps = CONTINUOUS_SIZE if continuous else DISCRETE_SIZE
    options.timesteps = options.timesteps or timesteps
    if (options.n_envs or 0) > options.timesteps:
        raise CommandError(
            f"--n-envs {options.n_envs} cannot share --timesteps {options.timesteps}: pass fewer environments"
        )
    device = "auto" if policy == "CnnPolicy" else "cpu"
    if options.resume:
        return set_up_again(options, continuous, device)
    env = make_vec_env(options.env, n_envs=options.n_envs or n_envs, seed=options.seed)
    settings = dict((CONTINUOUS if continuous else DISCRETE)[options.algo])
    if continuous:
        env = VecNormalize(env)
        if options.algo == "trpo":
            settings["target_kl"] = TARGET_KL_PER_ACTION_DIMENSION * math.prod(env.action_space.shape or ())
    return ALGORITHMS[options.algo](policy, env, seed=options.seed, device=device, **settings)


def set_up_again(options: argparse.Namespace, continuous: bool, device: str) -> PolicyGradientAlgorithm:
    """Return the model that a run has saved in the folder, on new environments."""
    path = options.out / FILES["model"]
    if not path.exists():
        raise CommandError(f"nothing to resume: there is no {path}")
    algorithm = ALGORITHMS[options.algo]
    archive = read_own(path, algorithm)
    is_another = CommandError(f"{options.out} is no run of {options.env}: pass the --env that it began with")
    if continuous != (options.out / FILES["statistics"]).exists():
        raise is_another
    env = make_vec_env(options.env, n_envs=options.n_envs or archive.data["n_envs"])
    if continuous:
        env = VecNormalize.load(options.out / FILES["statistics"], env, trusted=options.trusted)
    try:
        model = algorithm.load(path, env=env, device=device, trusted=options.trusted)
    except ValueError as error:
        if "spaces do not match" not in str(error):
            raise
        raise is_another from None
    if model.num_timesteps >= options.timesteps:
        raise CommandError(f"{path} has {model.num_timesteps:,} steps already: pass --timesteps with more")
    return model


def prepare(folder: Path, resume: bool = False) -> None:
    """Make the folder of the results, and forget an earlier run's statistics unless it is resumed."""
    missing = [name for name in ("matplotlib", "rich", "tqdm") if importlib.util.find_spec(name) is None]
    if missing:
        raise CommandError(f"{', '.join(missing)} not installed: pip install 'sb3_pg[extra]'")
    make_writable(folder)
    for name in () if resume else ("statistics", "episodes"):
        (folder / FILES[name]).unlink(missing_ok=True)


def train(model: PolicyGradientAlgorithm, timesteps: int, folder: Path, episodes: list[tuple[int, float]]) -> float:
    """Learn with a progress bar up to so many steps in all; return the seconds it took.

    :param episodes: to which the environment step and return of each is added
    """

    def note_episodes(names: dict[str, Any], _: dict[str, Any]) -> bool:
        ended = [info["episode"] for info in names["infos"] if "episode" in info]
        episodes.extend((model.num_timesteps, float(episode["r"])) for episode in ended)
        return True

    n, log = model.num_timesteps, folder / FILES["log"]
    log = log.with_stem(f"{log.stem}-from-{n}") if n else log
    model.set_logger(Logger(str(folder), [CSVOutputFormat(str(log))]))
    start = time.perf_counter()
    with interrupts_after_steps() as after_step:
        callbacks = CallbackList([ConvertCallback(note_episodes), after_step])
        model.learn(timesteps - n, callback=callbacks, progress_bar=True, reset_num_timesteps=not n)
    seconds = time.perf_counter() - start
    model.logger.close()
    return seconds


class Pace:
    """Says how long the training will take once that can be foreseen, if it is long; a callback of evaluations.

    :param n_steps: of the training
    """

    def __init__(self, n_steps: int) -> None:
        self._n_steps, self._n_done, self._start, self._is_told = n_steps, 0, time.perf_counter(), False

    def __call__(self, *_: Any) -> None:
        """Count a step."""
        self._n_done += 1
        seconds = time.perf_counter() - self._start
        if self._is_told or seconds < PACE_SECONDS:
            return
        self._is_told, per_step = True, seconds / self._n_done
        minutes = per_step * self._n_steps / 60
        if minutes >= LONG_MINUTES:
            print(
                f"A step takes {1000 * per_step:.3g} ms here, so {self._n_steps:,} steps take {minutes:,.0f} minutes "
                "or more. Ctrl-C ends it at any time; --timesteps makes it shorter",
                flush=True,
            )


def n_evaluation_episodes(model: PolicyGradientAlgorithm) -> int:
    """Return on how many episodes it is evaluated: fewer of images, whose steps are slow."""
    return IMAGE_EVALUATION_EPISODES if isinstance(model.policy, ActorCriticCnnPolicy) else EVALUATION_EPISODES


def evaluate(
    model: PolicyGradientAlgorithm, env_id: str, seed: int, callback: Callable[..., None] | None = None
) -> tuple[float, float]:
    """Return mean and standard deviation of the unscaled return, of the same episodes for the same seed.

    Observations are normalised by the model's statistics, if it has any. Episodes without a time limit get one.
    """
    assert model.env is not None
    (spec,) = model.env.get_attr("spec", 0)
    limit = {} if spec.max_episode_steps else {"max_episode_steps": EVALUATION_STEPS}
    env = make_vec_env(env_id, n_envs=1, seed=seed, env_kwargs=limit)
    statistics = model.get_vec_normalize_env()
    if statistics is not None:
        env = VecNormalize(env, training=False, norm_reward=False)
        sync_envs_normalization(statistics, env)
    n = n_evaluation_episodes(model)
    mean, std = evaluate_policy(model, env, n_eval_episodes=n, deterministic=True, callback=callback)
    return float(np.mean(mean)), float(np.mean(std))


def save(model: PolicyGradientAlgorithm, folder: Path, episodes: list[tuple[int, float]]) -> None:
    """Write the model, the statistics without which its observations mean nothing, and what the curve is drawn of."""
    model.save(folder / FILES["model"])
    np.savetxt(folder / FILES["episodes"], np.reshape(episodes, (-1, 2)), "%.10g", ",", header="step,return")
    statistics = model.get_vec_normalize_env()
    if statistics is not None:
        statistics.save(str(folder / FILES["statistics"]))


def save_for_later(
    model: PolicyGradientAlgorithm, options: argparse.Namespace, episodes: list[tuple[int, float]]
) -> str:
    """Save an interrupted run; return where, and how to go on."""
    save(model, options.out, episodes)
    others = f" --seed {options.seed}" + " --trusted" * options.trusted
    others += f" --workers {options.workers}" if options.workers > 1 else ""
    return (
        f"{options.out / FILES['model']} after {model.num_timesteps:,} steps; go on with {PROGRAM} --resume --algo "
        f"{options.algo} --env {options.env} --timesteps {options.timesteps} --out {shlex.quote(str(options.out))}"
        f"{others}"
    )


def episodes_in(folder: Path) -> list[tuple[int, float]]:
    """Return the steps and returns of the episodes of a run that is resumed; none if it is a new one."""
    path = folder / FILES["episodes"]
    lines = path.read_text().splitlines()[1:] if path.exists() else []
    return [(int(step), float(its)) for step, its in (line.split(",") for line in lines)]


def load(algorithm: str, env_id: str, folder: Path, trusted: bool = False) -> PolicyGradientAlgorithm:
    """Return the saved model with a new environment, and with its statistics if there are any."""
    env = make_vec_env(env_id, n_envs=1)
    statistics = folder / FILES["statistics"]
    if statistics.exists():
        env = VecNormalize.load(statistics, env, trusted=trusted)
    return ALGORITHMS[algorithm].load(folder / FILES["model"], env=env, trusted=trusted)


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Return the mean of each value and up to ``window - 1`` before it."""
    total = np.cumsum(values)
    total[window:] = total[window:] - total[:-window]
    return total / np.minimum(np.arange(1, len(total) + 1), window)


def draw(episodes: list[tuple[int, float]], title: str, path: Path) -> None:
    """Draw the return of each episode as a thin line, and their running mean."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    steps, returns = np.reshape(episodes, (-1, 2)).T
    window = max(2, min(20, len(returns) // 5))
    # Environments may finish together: one point for each step, or the mean would draw stairs.
    last = np.flatnonzero(np.diff(steps, append=-1))
    mean = running_mean(returns, window)[last]

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    axes.plot(steps, returns, color="#9db7d5", linewidth=0.8, label="episode")
    axes.plot(steps[last], mean, color="#1f4e8c", linewidth=2.2, label=f"mean of the last {window} episodes")
    axes.set_title(title, loc="left", fontsize=12)
    axes.set(xlabel="environment steps", ylabel="episode return")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.yaxis.set_major_formatter("{x:,.4g}")
    axes.grid(color="#e3e3e3", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def run(options: argparse.Namespace) -> bool:
    """Run the whole demonstration; return whether the loaded model scores what the saved one does."""
    quieten_mujoco()
    workers.join()
    model = set_up(options)
    if workers.rank():  # the first worker does the rest
        model.learn(options.timesteps - model.num_timesteps, reset_num_timesteps=not model.num_timesteps)
        return True
    prepare(options.out, options.resume)
    episodes, n_before = episodes_in(options.out), model.num_timesteps
    title, seed = f"{type(model).__name__} on {options.env}", options.seed + 10_000
    of_workers = f" of each of {workers.size()} workers" if workers.size() > 1 else ""
    print(f"{title}: {options.timesteps:,} steps in {model.n_envs} environments{of_workers}, seed {options.seed}")
    print(f"Network: {model.network.description}")

    n, when = n_evaluation_episodes(model), "before going on" if options.resume else "untrained"
    print(f"Evaluating the policy {when}, {n} episodes ...", flush=True)
    untrained = evaluate(model, options.env, seed, Pace(options.timesteps - n_before))
    with saved_when_interrupted(lambda: save_for_later(model, options, episodes)):
        seconds = train(model, options.timesteps, options.out, episodes)
        save(model, options.out, episodes)
        print("Evaluating it trained, and once more as loaded ...", flush=True)
        trained = evaluate(model, options.env, seed)
    loaded = evaluate(load(options.algo, options.env, options.out, options.trusted), options.env, seed)
    draw(episodes, f"{title}, seed {options.seed}", options.out / FILES["curve"])

    print(f"Trained in {seconds:.0f} s, {(model.num_timesteps - n_before) / seconds:,.0f} steps a second")
    print(f"Score (mean return of {n} episodes +/- standard deviation, deterministic actions)")
    verdict = "  (the same)" if loaded == trained else "  (NOT the same)"
    for when, (mean, std) in {
        "before" if options.resume else "untrained": untrained,
        "trained": trained,
        "loaded": loaded,
    }.items():
        print(f"  {when:<11}{mean:.1f} +/- {std:.1f}{verdict if when == 'loaded' else ''}")
    for what, name in FILES.items():
        if (options.out / name).exists():
            print(f"  {what:<11}{options.out / name}")
    return loaded == trained


def main(arguments: list[str] | None = None) -> int:
    """Run the demonstration; the exit code: 0, 1 if the loaded model differs, 2 for input that cannot work.

    An interrupt has that of a shell: 130 after ctrl-C, 143 after SIGTERM.
    """
    try:
        options = parse(arguments)
        if options.workers > 1 and "RANK" not in os.environ:
            return workers.start(options.workers, "sb3_pg.demo", sys.argv[1:] if arguments is None else arguments)
        return 0 if run(options) else 1
    except Interrupted as interrupt:
        return interrupt.exit_status
    except KeyboardInterrupt:
        print(f"{PROGRAM}: interrupted; there is nothing new to save", file=sys.stderr)
        return 130
    except ImportError as error:
        print(f"{PROGRAM}: {' '.join(str(error).split()).rstrip('.')}.{missing_package(error)}", file=sys.stderr)
        return 2
    except (CommandError, workers.WorkerError, NonFiniteError, gym.error.Error, OSError, ValueError) as error:
        print(f"{PROGRAM}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    th.set_num_threads(1)  # the networks are small: more threads only wait for each other
    sys.exit(main())

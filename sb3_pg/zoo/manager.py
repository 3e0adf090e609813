"""rl_zoo3's ExperimentManager for our algorithms: their settings, schedules and environments, and clear errors."""

import functools
import inspect
import sys
import tempfile
import typing
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import yaml
from gymnasium import spaces
from rl_zoo3 import ALGOS, exp_manager, linear_schedule
from stable_baselines3.common import vec_env as sb3
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.type_aliases import Schedule

from sb3_pg.common import workers
from sb3_pg.common.archive.peers import OF_NEW_MODELS
from sb3_pg.common.errors import ArgumentError, NonFiniteError, check_count, check_number, did_you_mean
from sb3_pg.common.interrupts import interrupts_after_steps, saved_when_interrupted
from sb3_pg.common.policy_gradient import PolicyGradientAlgorithm
from sb3_pg.common.vec_env import DummyVecEnv
from sb3_pg.zoo.settings import CONFIGS
from sb3_pg.zoo.vec_envs import AS_WRAPPED, ATARI_WRAPPER, OF_WRAPPED_GAMES, POOL, VEC_ENVS, make_known, pool

#: Keys of a configuration that rl_zoo3 takes for itself; all others are arguments of the algorithm.
ZOO_KEYS = (
    "callback",
    "env_kwargs",
    "env_wrapper",
    "frame_stack",
    "monitor_kwargs",
    "n_envs",
    "n_timesteps",
    "normalize",
    "vec_env_wrapper",
)

#: Arguments that rl_zoo3 takes from the command line, and the options.
COMMAND_LINE_ARGUMENTS = {name: f"--{name}" for name in ("device", "env", "seed", "verbose")}
COMMAND_LINE_ARGUMENTS |= {"tensorboard_log": "--tensorboard-log"}

#: What settings that cannot work raise in the constructors that they are for.
MISTAKES = (AssertionError, AttributeError, KeyError, OSError, RuntimeError, TypeError, ValueError)


def config_arguments(algorithm: type[BaseAlgorithm]) -> list[str]:
    """Return the arguments of an algorithm that a configuration may set."""
    not_set = {*COMMAND_LINE_ARGUMENTS, "_init_setup_model"}
    return [name for name in inspect.signature(algorithm).parameters if name not in not_set]


def schedule_arguments(algorithm: type[BaseAlgorithm]) -> list[str]:
    """Return the arguments of an algorithm that may be schedules, by its annotations."""
    parameters = inspect.signature(algorithm).parameters.values()
    return [parameter.name for parameter in parameters if Schedule in typing.get_args(parameter.annotation)]


def read_number(value: Any) -> Any:
    """Return a text that is a number as that number: YAML 1.1 takes 1e-3 for a text, for it wants 1.0e-3.

    In dictionaries and lists as well, such as those of ``critic_optimizer_kwargs`` and ``max_grad_norm``.
    """
    if isinstance(value, dict):
        return {key: read_number(its) for key, its in value.items()}
    if isinstance(value, list):
        return [read_number(its) for its in value]
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def multiplied(value: Any, factor: int) -> str:
    """Return a setting times a factor, as ``-params`` takes it."""
    if isinstance(value, str):
        return f"\"'lin_{float(value.removeprefix('lin_')) * factor:g}'\""
    return f"{value * factor:g}"


class GoingOn:
    """A loaded model as rl_zoo3 trains one: it goes on.

    :param model: of ours
    :param n_timesteps: so many more; None for the rest of the run that it was saved in, or else what rl_zoo3 asks for
    """

    def __init__(self, model: BaseAlgorithm, n_timesteps: int | None) -> None:
        self._model, self.env, self._n_timesteps = model, model.env, n_timesteps

    def learn(self, total_timesteps: int, **options: Any) -> None:
        """Train it."""
        rest = max(0, self._model._total_timesteps - self._model.num_timesteps)
        n = self._n_timesteps or rest or total_timesteps
        self._model.learn(n, reset_num_timesteps=False, **options)


class ExperimentManager(exp_manager.ExperimentManager):
    """Arguments are rl_zoo3's; ``config`` has a default for each of our algorithms. Other algorithms run as there.

    :raises ArgumentError: a configuration that cannot work
    """

    def __init__(self, args: Any, algo: str, env_id: str, *more: Any, **options: Any) -> None:
        self.vec_env_type = vec_env_type = options.get("vec_env_type", "dummy")
        if vec_env_type == POOL:
            make_known(env_id)
        if vec_env_type not in ("dummy", "subproc"):
            options["vec_env_type"] = "dummy"  # rl_zoo3 knows no other
        super().__init__(args, algo, env_id, *more, **options)
        if workers.rank():  # the first worker's files are those of the run
            self._folder = tempfile.TemporaryDirectory()
            self.save_path = self.params_path = self._folder.name
        self.config_is_given = options.get("config") is not None
        self.n_timesteps_given = self.n_timesteps if self.n_timesteps > 0 else None
        default = CONFIGS / f"{algo}.yml"
        if not self.config_is_given and default.exists():
            self.config = str(default)
        self.is_ours = issubclass(ALGOS[algo], PolicyGradientAlgorithm)
        if vec_env_type in VEC_ENVS:
            self.vec_env_class = VEC_ENVS[vec_env_type]  # type: ignore[assignment]
        elif self.is_ours and self.vec_env_class is sb3.DummyVecEnv:
            self.vec_env_class = DummyVecEnv

    # --------------------------------------------------------------- settings

    def read_hyperparameters(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the settings as they are in the file."""
        if self.trial_id is not None and not (self.storage and self.study_name):
            raise ArgumentError(f"--trial-id {self.trial_id} needs --storage and --study-name: the study it is from.")
        if self.trial_id == 0 and self.storage and self.study_name:  # rl_zoo3 takes 0 for none given
            trial = self.load_trial(self.storage, self.study_name, 0)
            self.custom_hyperparams = trial | (self.custom_hyperparams or {})
        try:
            return super().read_hyperparameters()
        except KeyError as key:
            raise ArgumentError(f"{self.config} has no entry {key}.") from None
        except ValueError as error:
            if "Hyperparameters not found" not in str(error):
                raise
            raise ArgumentError(f"{self.config} has no entry for {self.env_name.gym_id}: add one.") from None
        except (yaml.YAMLError, NameError, SyntaxError) as error:
            raise ArgumentError(f"{self.config} cannot be read: {error}") from None
        except (AttributeError, TypeError) as error:
            raise ArgumentError(
                f"{self.config} must hold settings by environment, `CartPole-v1: {{policy: MlpPolicy, ...}}` in YAML "
                f"or such a dict named `hyperparams` in Python ({error})."
            ) from None

    def load_trial(self, storage: str, study_name: str, trial_id: int | None = None, convert: bool = True) -> Any:
        """Return the settings of one trial of an Optuna study."""
        try:
            return super().load_trial(storage, study_name, trial_id, convert)
        except (KeyError, IndexError):
            raise ArgumentError(f"There is no trial {trial_id} of a study {study_name!r} in {storage}.") from None

    def _preprocess_hyperparams(
        self, hyperparams: dict[str, Any]
    ) -> tuple[dict[str, Any], Callable[..., Any] | None, list[BaseCallback], Callable[..., Any] | None]:
        where = f"{self.config}, {self.env_name.gym_id}"
        for key in ("n_timesteps", "policy"):
            if key not in hyperparams:
                raise ArgumentError(f"{where}: the key {key!r} is missing.")
        if self.is_ours:
            hyperparams = {key: read_number(value) for key, value in hyperparams.items()}
        check_number("n_timesteps", hyperparams["n_timesteps"], low=1)
        check_count("n_envs", hyperparams.get("n_envs", 1))
        pools_game = self.vec_env_type == POOL and hyperparams.get("env_wrapper") == ATARI_WRAPPER
        if pools_game:
            hyperparams = {key: value for key, value in hyperparams.items() if key not in OF_WRAPPED_GAMES}
        processed = super()._preprocess_hyperparams(hyperparams)
        if pools_game:
            self.env_kwargs, self.eval_env_kwargs = AS_WRAPPED | self.env_kwargs, AS_WRAPPED | self.eval_env_kwargs
        for key in processed[0] if self.is_ours else ():
            self._check_key(key, where)
        return processed

    def _check_key(self, key: str, where: str) -> None:
        """Refuse a key that is neither the algorithm's nor rl-zoo's, with what the user may have meant."""
        known = config_arguments(ALGOS[self.algo])
        if key in (self.custom_hyperparams or {}):
            where = "-params"
        if key in known:
            return
        if key in COMMAND_LINE_ARGUMENTS:
            raise ArgumentError(f"{where}: {key!r} is set by {COMMAND_LINE_ARGUMENTS[key]} on the command line only.")
        hint = did_you_mean(key, [*known, *ZOO_KEYS]) or " Take it out."
        raise ArgumentError(f"{where}: {key!r} is neither an argument of {self.algo} nor rl-zoo's.{hint}")

    def _preprocess_schedules(self, hyperparams: dict[str, Any]) -> dict[str, Any]:  # type: ignore[override]
        """``lin_0.1`` becomes a schedule wherever the algorithm takes one; rl_zoo3 knows four of the names."""
        if not self.is_ours:
            return super()._preprocess_schedules(hyperparams)
        for name in schedule_arguments(ALGOS[self.algo]):
            value = hyperparams.get(name)
            if isinstance(value, str):
                start = read_number(value.removeprefix("lin_"))
                if isinstance(start, str):
                    raise ArgumentError(f"`{name}` must be a number, or lin_ and a number for a schedule, not {value}.")
                hyperparams[name] = linear_schedule(start)
        return hyperparams

    # ----------------------------------------------------------- environments

    def create_envs(self, n_envs: int, eval_env: bool = False, no_log: bool = False) -> sb3.VecEnv:
        """Return the environments in their wrappers.

        :raises ArgumentError: EnvPool's are to be in a wrapper of single environments
        """
        if self.vec_env_type == POOL:
            if self.env_wrapper is not None:
                raise ArgumentError(
                    f"--vec-env {POOL} has no single environments for the setting `env_wrapper`. Take it out, or "
                    "choose another --vec-env."
                )
            log = None if eval_env or no_log else Path(self.save_path)
            options = self.eval_env_kwargs if eval_env else self.env_kwargs
            keywords = self.monitor_kwargs.get("info_keywords", ())
            seed = self.seed + workers.rank() * n_envs  # as that of the algorithm, for it cannot be set later
            made = functools.partial(pool, self.env_name.gym_id, n_envs, seed, options, log, keywords)
            self.vec_env_class = lambda _: made()  # type: ignore[assignment]
        return super().create_envs(n_envs, eval_env, no_log)

    # --------------------------------------------------------------- training

    def setup_experiment(self) -> tuple[BaseAlgorithm, dict[str, Any]] | None:
        """Make model and environments; None when settings are to be searched.

        What the settings make the constructors raise becomes one line, unless ``--verbose`` is above 1.
        """
        try:
            made = super().setup_experiment()
        except MISTAKES as error:
            if self.verbose > 1 or isinstance(error, (ArgumentError, gym.error.Error)):
                raise
            raise ArgumentError(
                f"{self.algo} cannot start on {self.env_name.gym_id} with {self.config} and the options: "
                f"{type(error).__name__}: {error} (--verbose 2 shows where)."
            ) from error
        if made is not None and self.algo == "trpo" and self.is_ours and self.config_is_given:
            self._warn_of_joint_kl(*made)
        return made

    def _warn_of_joint_kl(self, model: Any, given: dict[str, Any]) -> None:
        """Say that settings from elsewhere may mean the KL averaged over action dimensions, as sb3-contrib's do."""
        space = model.action_space
        n = int(np.prod(space.shape)) if isinstance(space, (spaces.Box, spaces.MultiBinary)) else 1
        if n > 1:
            target_kl, cg_damping = (
                read_number(given.get(name, inspect.signature(type(model)).parameters[name].default))
                for name in ("target_kl", "cg_damping")
            )
            warnings.warn(
                f"target_kl={target_kl} bounds the KL summed over the {n} action dimensions, sb3-contrib's the mean "
                f"over them. If {self.config} was tuned for sb3-contrib, this does what it does there: "
                f"-params target_kl:{multiplied(target_kl, n)} cg_damping:{multiplied(cg_damping, n)}",
                stacklevel=2,
            )

    def _maybe_normalize(self, env: sb3.VecEnv, eval_env: bool) -> sb3.VecEnv:
        """Normalise if the settings say so, but observations only if they are numbers."""
        space = env.observation_space
        parts = space.spaces if isinstance(space, spaces.Dict) else {"": space}
        of_numbers = [key for key, part in parts.items() if isinstance(part, spaces.Box)]
        if self.normalize and len(of_numbers) < len(parts):
            which = {"norm_obs_keys": of_numbers} if of_numbers else {"norm_obs": False}
            self.normalize_kwargs = {**which, **self.normalize_kwargs}
        return super()._maybe_normalize(env, eval_env)

    def learn(self, model: BaseAlgorithm) -> None:
        """Train, and keep what was learned if an interrupt or a number that is not finite stops it."""
        try:
            with saved_when_interrupted(lambda: self._save_for_later(model)), interrupts_after_steps() as after_step:
                self.callbacks.append(after_step)
                goes_on = self.is_ours and self.continue_training
                super().learn(GoingOn(model, self.n_timesteps_given) if goes_on else model)  # type: ignore[arg-type]
        except NonFiniteError:
            self.save_trained_model(model)
            raise

    def _load_pretrained_agent(self, hyperparams: dict[str, Any], env: sb3.VecEnv) -> BaseAlgorithm:
        """Load the model of ``-i``, which goes on with its own random numbers unless ``--seed`` is given.

        What adapts by itself goes on too, unless ``-params`` sets it. So does the policy, of which nothing can be set.
        """
        if not self.is_ours:
            return super()._load_pretrained_agent(hyperparams, env)
        adapts = {"learning_rate": "adaptive_lr", "kl_coef": "adaptive_kl_coef"}
        kept = {"policy_kwargs", "use_sde", *OF_NEW_MODELS}
        kept |= {name for name, rule in adapts.items() if hyperparams.get(rule)}
        kept -= (self.custom_hyperparams or {}).keys()
        settings = {key: x for key, x in hyperparams.items() if key not in kept}
        if any(option.split("=")[0] == "--seed" for option in sys.argv):
            settings["seed"] = self.seed
        print("Loading pretrained agent")
        common: dict[str, Any] = {
            "tensorboard_log": self.tensorboard_log,
            "verbose": self.verbose,
            "device": self.device,
        }
        return ALGOS[self.algo].load(self.trained_agent, env=env, **common, **settings)

    def _save_for_later(self, model: BaseAlgorithm) -> str:
        """Save an interrupted run; return where, and how to go on."""
        self.save_trained_model(model)
        path = f"{self.save_path}/{self.env_name}.zip"
        go_on = f"train --algo {self.algo} --env {self.env_name.gym_id} -i {path}"
        return f"{path} after {model.num_timesteps:,} steps; go on with python -m sb3_pg.zoo {go_on}"

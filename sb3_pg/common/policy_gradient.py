"""The base of the three algorithms: act, judge, step.

Act: step the environments and only sample actions (:meth:`PolicyGradientAlgorithm.collect_rollouts`).
Judge: when the rollout is complete, values, log-probabilities and advantages in one batched pass
(:meth:`PolicyGradientAlgorithm.judge`). Step: each algorithm's own ``train``.
"""

import io
import json
import math
import pathlib
import warnings
import zipfile
from collections.abc import Iterable
from importlib import import_module
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common import buffers as sb3_buffers
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import is_wrapped
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import (
    ActorCriticCnnPolicy,
    ActorCriticPolicy,
    BasePolicy,
    MultiInputActorCriticPolicy,
)
from stable_baselines3.common.save_util import open_path
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, Schedule, TensorDict
from stable_baselines3.common.utils import explained_variance
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.common.vec_env.patch_gym import _patch_env

from sb3_pg.common.arrays import Array, take
from sb3_pg.common.buffers import Batch, RolloutBuffer, flat_arrays
from sb3_pg.common.errors import (
    ArgumentError,
    NonFiniteError,
    check_choice,
    check_number,
    evaluate_schedule,
    require_finite,
)
from sb3_pg.common.networks import Network, make_network
from sb3_pg.common.products import inner
from sb3_pg.common.threads import threads_to_choose
from sb3_pg.common.vec_env import DummyVecEnv

SelfAlgorithm = TypeVar("SelfAlgorithm", bound="PolicyGradientAlgorithm")

ACTION_SPACES = (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)

#: What tells the archives of algorithms apart: the first of these attributes that one has.
_ARCHIVE_MARKS = {
    "REINFORCE": "n_episodes",
    "TRPO": "cg_max_steps",
    "PPO": "clip_range",
    "DQN": "exploration_fraction",
    "SAC or TQC": "target_entropy",
    "TD3 or DDPG": "policy_delay",
    "an off-policy algorithm": "buffer_size",
    "A2C": "gae_lambda",
}


class PolicyGradientAlgorithm(OnPolicyAlgorithm):
    """Acting and judging, shared by REINFORCE, TRPO and PPO; a subclass adds ``train``.

    Arguments are SB3's, with the same names; each algorithm documents its own. What differs from
    ``OnPolicyAlgorithm``, all of it by design:

    - values and log-probabilities are computed after the rollout in one pass, not at each step;
    - logs are written after the update they belong to, so that the last update's are written too;
    - schedules stop at their end value, they do not run past it;
    - stopping in a callback keeps the last observation and the unfinished rollout, which a following
      ``learn(reset_num_timesteps=False)`` completes;
    - a number that is not finite stops training with its environment and step, before it reaches the policy.
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": ActorCriticPolicy,
        "CnnPolicy": ActorCriticCnnPolicy,
        "MultiInputPolicy": MultiInputActorCriticPolicy,
    }

    #: Policies of optional extras, by the module to import when one is asked for.
    optional_policies: ClassVar[dict[str, str]] = {
        "CausalLMPolicy": "sb3_pg.text.policies",
        "Seq2SeqLMPolicy": "sb3_pg.text.policies",
    }

    #: The name under which archives of this algorithm are known, see ``load``.
    archive_name: ClassVar[str]
    rollout_buffer_class: type[sb3_buffers.RolloutBuffer] | None

    def __init__(
        self,
        policy: str | type[ActorCriticPolicy],
        env: GymEnv | str | None,
        learning_rate: float | Schedule,
        n_steps: int,
        gamma: float,
        gae_lambda: float,
        ent_coef: float | Schedule,
        vf_coef: float | Schedule,
        max_grad_norm: float | None,
        use_sde: bool,
        sde_sample_freq: int,
        rollout_buffer_class: type[sb3_buffers.RolloutBuffer] | None,
        rollout_buffer_kwargs: dict[str, Any] | None,
        stats_window_size: int,
        tensorboard_log: str | None,
        policy_kwargs: dict[str, Any] | None,
        verbose: int,
        seed: int | None,
        device: th.device | str,
        engine: str,
    ) -> None:
        # SB3 writes into nested dictionaries of policy_kwargs, so the caller's are copied first.
        policy_kwargs = {k: dict(v) if isinstance(v, dict) else v for k, v in (policy_kwargs or {}).items()}
        super().__init__(
            policy,
            env,  # type: ignore[arg-type]
            learning_rate=learning_rate,
            n_steps=n_steps,
            gamma=gamma,
            gae_lambda=gae_lambda,
            ent_coef=ent_coef,  # type: ignore[arg-type]
            vf_coef=vf_coef,  # type: ignore[arg-type]
            max_grad_norm=max_grad_norm,  # type: ignore[arg-type]
            use_sde=use_sde,
            sde_sample_freq=sde_sample_freq,
            rollout_buffer_class=rollout_buffer_class,
            rollout_buffer_kwargs=rollout_buffer_kwargs,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            policy_kwargs=policy_kwargs,
            verbose=verbose,
            device=device,
            seed=seed,
            _init_setup_model=False,
            supported_action_spaces=ACTION_SPACES,
        )
        self.engine = engine
        self._network: Network | None = None
        self._rollout_is_unfinished = False

    # ------------------------------------------------------------------ setup

    def _get_policy_from_name(self, policy_name: str) -> type[BasePolicy]:
        if policy_name in self.optional_policies:
            found: type[BasePolicy] = getattr(import_module(self.optional_policies[policy_name]), policy_name)
            return found
        return super()._get_policy_from_name(policy_name)

    @staticmethod
    def _wrap_env(env: GymEnv, verbose: int = 0, monitor_wrapper: bool = True) -> VecEnv:
        """SB3's wrappers, with our DummyVecEnv around a single environment."""
        if not isinstance(env, VecEnv):
            single = _patch_env(env)
            if monitor_wrapper and not is_wrapped(single, Monitor):
                if verbose >= 1:
                    print("Wrapping the env with a `Monitor` wrapper")
                single = Monitor(single)
            env = DummyVecEnv([lambda: single])
        return OnPolicyAlgorithm._wrap_env(env, verbose, monitor_wrapper)

    def _setup_model(self) -> None:
        self._check_arguments()
        self._setup_lr_schedule()
        self.set_random_seed(self.seed)
        self.rollout_buffer = self._make_rollout_buffer()
        self.policy = self.policy_class(  # type: ignore[assignment]
            self.observation_space, self.action_space, self.lr_schedule, use_sde=self.use_sde, **self.policy_kwargs
        )
        self.policy = self.policy.to(self.device)
        self._maybe_recommend_cpu()
        self._network = None
        self._rollout_is_unfinished = False
        if self.verbose >= 1:
            print(f"Using the {self.network.description} network")

    def _check_arguments(self) -> None:
        """Refuse arguments that cannot work. Called by ``_setup_model``, so also for loaded and changed ones.

        :raises ArgumentError: naming the argument, its value and what is allowed
        """
        for name in ("learning_rate", "ent_coef", "vf_coef"):
            check_number(name, getattr(self, name), or_schedule=True)
        check_number("gamma", self.gamma, high=1.0)
        check_number("gae_lambda", self.gae_lambda, high=1.0)
        if self.max_grad_norm is not None:
            check_number("max_grad_norm", self.max_grad_norm)
        check_choice("engine", self.engine, ("auto", "autograd"))

    def _check_batch_size(self, batch_size: int, rollout_size: int) -> None:
        """Warn, as SB3 does, when the last minibatch of an epoch is smaller than the others."""
        if rollout_size % batch_size:
            whole = rollout_size // batch_size
            warnings.warn(
                f"You have specified a mini-batch size of {batch_size}, but the rollout has n_steps * n_envs = "
                f"{rollout_size} samples: after every {whole} untruncated mini-batches, there will be a truncated "
                f"mini-batch of size {rollout_size % batch_size}. We recommend a `batch_size` that divides "
                f"n_steps * n_envs (n_steps={self.n_steps} and n_envs={self.n_envs}).",
                stacklevel=4,
            )

    def _make_rollout_buffer(self) -> sb3_buffers.RolloutBuffer:
        """Our buffer in place of SB3's own two, any other class as it was given."""
        kind: Any = self.rollout_buffer_class
        is_dict = isinstance(self.observation_space, spaces.Dict)
        if kind in (None, sb3_buffers.RolloutBuffer) or (kind is sb3_buffers.DictRolloutBuffer and is_dict):
            kind = RolloutBuffer
        buffer: sb3_buffers.RolloutBuffer = kind(
            self.n_steps,
            self.observation_space,
            self.action_space,
            device=self.device,
            gamma=self.gamma,
            gae_lambda=self.gae_lambda,
            n_envs=self.n_envs,
            **self.rollout_buffer_kwargs,
        )
        return buffer

    @property
    def network(self) -> Network:
        """The policy as the algorithm sees it; made anew when ``policy`` is replaced."""
        if self._network is None or self._network.policy is not self.policy:
            self._network = make_network(self.policy, self.engine)
        return self._network

    def _refreshed_network(self) -> Network:
        """The network for the next rollout or update, whatever has been done to the policy since the last."""
        if not self.network.refresh():
            self._network = None
        return self.network

    def _coefficient(self, name: str) -> float:
        """The present value of a coefficient that may be a schedule."""
        return evaluate_schedule(name, getattr(self, name), self._current_progress_remaining)

    def _update_learning_rate(self, optimizers: list[th.optim.Optimizer] | th.optim.Optimizer) -> None:
        evaluate_schedule("learning_rate", self.lr_schedule, self._current_progress_remaining)
        super()._update_learning_rate(optimizers)

    def _update_current_progress_remaining(self, num_timesteps: int, total_timesteps: int) -> None:
        # The last rollout may run past total_timesteps; a linear schedule must not go below its end then.
        super()._update_current_progress_remaining(min(num_timesteps, total_timesteps), total_timesteps)

    # -------------------------------------------------------------------- act

    def collect_rollouts(
        self, env: VecEnv, callback: BaseCallback, rollout_buffer: sb3_buffers.RolloutBuffer, n_rollout_steps: int
    ) -> bool:
        """Act in the environments until the rollout is complete, then judge it.

        :param env: the training environments
        :param callback: called at every step and at the start and end of the rollout
        :param rollout_buffer: filled with the rollout
        :param n_rollout_steps: steps per environment
        :return: False if the callback stopped training
        :raises NonFiniteError: an observation, action or reward was not finite
        """
        assert self._last_obs is not None, "No previous observation was provided"
        self.policy.set_training_mode(False)
        network = self._refreshed_network()
        self._start_rollout(env, rollout_buffer)
        if self.use_sde:
            self.policy.reset_noise(env.num_envs)
        callback.on_rollout_start()

        while not self._rollout_is_complete(rollout_buffer, n_rollout_steps):
            n_steps = rollout_buffer.pos
            if self.use_sde and self.sde_sample_freq > 0 and n_steps % self.sde_sample_freq == 0:
                self.policy.reset_noise(env.num_envs)
            try:
                actions, known = network.act(self._last_obs)
                clipped_actions = self._to_action_space(actions)
                new_obs, rewards, dones, infos = env.step(clipped_actions)
            except Exception:
                self._explain_failed_step(n_steps)
                raise
            values, log_probs = known or (None, None)
            self.num_timesteps += env.num_envs
            callback.update_locals(locals())
            keep_going = callback.on_step()

            # Recorded before the callback is obeyed, so that stopping here loses neither this step nor the next.
            self._update_info_buffer(infos, dones)
            self._note_truncations(n_steps, dones, infos)
            self._record(rollout_buffer, dones, actions, rewards, values, log_probs)
            self._last_obs, self._last_episode_starts = new_obs, dones  # type: ignore[assignment]
            if not keep_going:
                self._rollout_is_unfinished = True
                return False

        self._rollout_is_unfinished = False
        values = self.judge(rollout_buffer, self._last_obs, self._last_episode_starts)  # type: ignore[arg-type]
        log_probs = rollout_buffer.log_probs
        callback.update_locals(locals())
        callback.on_rollout_end()
        return True

    def _start_rollout(self, env: VecEnv, rollout_buffer: sb3_buffers.RolloutBuffer) -> None:
        """Empty the buffer, unless a callback interrupted this very rollout and it can be completed."""
        if not self._rollout_is_unfinished:
            rollout_buffer.reset()
            self._truncations: list[tuple[int, int, Any]] = []

    def _rollout_is_complete(self, rollout_buffer: sb3_buffers.RolloutBuffer, n_rollout_steps: int) -> bool:
        return rollout_buffer.pos >= n_rollout_steps

    def _to_action_space(self, actions: np.ndarray) -> np.ndarray:
        """What the environment is given: Gaussian samples clipped, squashed ones scaled to the bounds."""
        if not isinstance(self.action_space, spaces.Box):
            return actions
        if self.policy.squash_output:
            return self.policy.unscale_action(actions)
        # np.clip checks its arguments for longer than these two take.
        clipped: np.ndarray = np.minimum(np.maximum(actions, self.action_space.low), self.action_space.high)
        return clipped

    def _note_truncations(self, step: int, dones: np.ndarray, infos: list[dict[str, Any]]) -> None:
        """Remember the last observations of episodes cut by a time limit; their values are added when judging."""
        if not np.count_nonzero(dones):  # quicker than ``any`` on a few
            return
        for env in np.flatnonzero(dones):
            info = infos[env]
            if info.get("TimeLimit.truncated", False) and info.get("terminal_observation") is not None:
                self._truncations.append((step, int(env), info["terminal_observation"]))

    def _record(
        self,
        buffer: sb3_buffers.RolloutBuffer,
        dones: np.ndarray,
        actions: np.ndarray,
        rewards: np.ndarray,
        values: th.Tensor | None,
        log_probs: th.Tensor | None,
    ) -> None:
        if values is None and not isinstance(buffer, RolloutBuffer):
            values = log_probs = th.zeros(self.n_envs)  # SB3's buffers insist on them; judging writes the true ones
        starts: Any = self._last_episode_starts
        buffer.add(self._last_obs, actions, rewards, starts, values, log_probs)  # type: ignore[arg-type]

    def _explain_failed_step(self, step: int) -> None:
        """When the policy or an environment fails on an observation that is not finite, say that instead."""
        observations: Any = self._last_obs
        row = {k: v[None] for k, v in observations.items()} if isinstance(observations, dict) else observations[None]
        require_finite("observation", row, step)

    # ------------------------------------------------------------------ judge

    def judge(self, buffer: sb3_buffers.RolloutBuffer, new_obs: Any, dones: np.ndarray) -> th.Tensor:
        """Give a complete rollout its values, log-probabilities, returns and advantages.

        :param buffer: the rollout, of which observations, actions, rewards and episode starts are known
        :param new_obs: the observations after the last step
        :param dones: whether the last step ended an episode, (n_envs,)
        :return: V(new_obs), (n_envs,)
        :raises NonFiniteError: an observation, action or reward is not finite, or the policy's answer to one
        """
        n = buffer.pos
        used = {name: take(getattr(buffer, name), slice(0, n)) for name in ("observations", "actions", "rewards")}
        for name, x in used.items():
            require_finite(name[:-1], x)
        if not self.network.judges_while_acting:
            observations, actions, *_ = flat_arrays(buffer)
            values, log_probs = self.network.judge(observations, actions)
            buffer.values[:n] = values.reshape(n, -1)
            buffer.log_probs[:n] = log_probs.reshape(n, -1)
        require_finite("value", buffer.values[:n])
        require_finite("log-probability", buffer.log_probs[:n])
        # A policy may have a say in the rewards, as one that is kept near a reference has.
        shape_rewards: Any = getattr(self.policy, "shape_rewards", None)
        if shape_rewards is not None:
            for name, value in shape_rewards(buffer, dones).items():
                self.logger.record(name, value)
        last_values = self._bootstrap(buffer, new_obs)
        buffer.compute_returns_and_advantage(last_values=last_values, dones=dones)
        return last_values

    def _bootstrap(self, buffer: sb3_buffers.RolloutBuffer, new_obs: Any) -> th.Tensor:
        """Value the last observations, and those at which a time limit cut an episode, in one batch.

        The reward of a truncated step gets ``gamma * V(terminal observation)`` (SB3 issue 633).
        """
        cut = [terminal for _, _, terminal in self._truncations]
        values = self.network.values(_with_rows(new_obs, cut))
        n_envs = len(values) - len(cut)
        for (step, env, _), value in zip(self._truncations, values[n_envs:], strict=True):
            if not np.isfinite(value):
                found = np.where(np.arange(n_envs) == env, value, 0.0)
                require_finite("value of the terminal observation", found[None], step)
            buffer.rewards[step, env] += self.gamma * value
        self._truncations = []
        require_finite("value after the last step", values[None, :n_envs], buffer.pos)
        return th.as_tensor(values[:n_envs])

    # ------------------------------------------------------------------- step

    def _normalized(self, advantages: Array) -> Array:
        """Advantages with mean 0 and standard deviation 1; one alone is left as it is (SB3 issue 325)."""
        if len(advantages) < 2:
            return advantages
        centered = advantages - advantages.sum() / len(advantages)
        deviation = math.sqrt(inner(centered, centered) / (len(advantages) - 1))
        return centered / (deviation + 1e-8)

    def _take_step(self, batch: Batch, max_grad_norm: float | None, *, hold_actor: bool = False) -> None:
        """Let the optimizer move the parameters by the gradients just made.

        :raises NonFiniteError: a gradient is not finite; nothing was moved
        """
        norm = self.network.step(max_grad_norm, hold_actor=hold_actor)
        if not np.isfinite(norm):
            self._explain_bad_gradient(batch, norm)

    def _explain_bad_gradient(self, batch: Batch, norm: float) -> None:
        """Name the parameters with a non-finite gradient and the sample behind it."""
        parameters = ", ".join(
            name for name, p in self.policy.named_parameters() if p.grad is not None and not p.grad.isfinite().all()
        )
        log_prob, _, values = self.network.evaluate(batch.observations, batch.actions)
        log_ratio = None if log_prob is None else log_prob - batch.old_log_prob
        columns = (log_prob, log_ratio, values, batch.advantages, batch.returns)
        bad = ~np.all([np.isfinite(to_numpy(x)) for x in columns if x is not None], axis=0)
        step, env = divmod(int(batch.rows[bad.argmax()]), self.n_envs)
        where = f"environment {env} at step {step} of this rollout"
        cause = f"from {where}" if bad.any() else f"in the minibatch that begins with {where}"
        raise NonFiniteError(
            f"The gradient of {parameters or 'the parameters'} is not finite (norm {norm}): {cause}. The policy "
            "keeps its last good parameters and can be saved. Lower `learning_rate`, clip gradients "
            "(`max_grad_norm`), or bring rewards and observations to a usual scale (VecNormalize)."
        )

    def _record_common(self) -> None:
        """Log what every algorithm logs after an update."""
        n = self.rollout_buffer.pos
        values, returns = self.rollout_buffer.values[:n], self.rollout_buffer.returns[:n]
        self.logger.record("train/explained_variance", explained_variance(values.flatten(), returns.flatten()))
        log_std = getattr(self.policy, "log_std", None)
        if log_std is not None:
            self.logger.record("train/std", th.exp(log_std).mean().item())
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")

    # ------------------------------------------------------------------ learn

    @threads_to_choose()
    def learn(
        self: SelfAlgorithm,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 1,
        tb_log_name: str = "PolicyGradient",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfAlgorithm:
        """Act, judge and step until ``total_timesteps`` environment steps are made.

        :param total_timesteps: steps over all environments; whole rollouts are made, so it may be a few more
        :param callback: SB3 callback(s), called at every step
        :param log_interval: updates between two log lines; the last update is always logged
        :param tb_log_name: name of the run for TensorBoard
        :param reset_num_timesteps: False continues the step count, the episodes and an interrupted rollout
        :param progress_bar: show one (needs tqdm and rich)
        :return: the model itself
        :raises NonFiniteError: a number was not finite; the policy keeps its last good parameters
        """
        if self.env is None:
            raise ArgumentError("The model has no environment to learn from: call set_env(env) or load(path, env=env).")
        if reset_num_timesteps or self._last_obs is None:
            self._rollout_is_unfinished = False
        total_timesteps, callback = self._setup_learn(
            total_timesteps, callback, reset_num_timesteps, tb_log_name, progress_bar
        )
        callback.on_training_start(locals(), globals())
        iteration, last_logged, recorded = 0, 0, {}
        try:
            while self.num_timesteps < total_timesteps:
                if not self.collect_rollouts(self.env, callback, self.rollout_buffer, self.n_steps):
                    break
                iteration += 1
                self._update_current_progress_remaining(self.num_timesteps, total_timesteps)
                self.train()
                is_last = self.num_timesteps >= total_timesteps
                if log_interval is not None and (is_last or iteration % log_interval == 0):
                    recorded, last_logged = dict(self.logger.name_to_value), iteration
                    self.dump_logs(iteration)
        except NonFiniteError:
            self._last_obs = None  # the environments may be broken: reset them before learning goes on
            raise
        if log_interval is not None and last_logged < iteration:  # stopped by a callback between two log lines
            recorded = dict(self.logger.name_to_value)
            self.dump_logs(iteration)
        # SB3 leaves the last update's values in the logger, where programs read them.
        for name, value in recorded.items():
            self.logger.name_to_value.setdefault(name, value)
        callback.on_training_end()
        return self

    # ------------------------------------------------------------ save and load

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_network", "_truncations", "_rollout_is_unfinished"]

    def save(
        self,
        path: str | pathlib.Path | io.BufferedIOBase,
        exclude: Iterable[str] | None = None,
        include: Iterable[str] | None = None,
    ) -> None:
        """SB3's. A policy made from files is saved so that it can be loaded without them."""
        given, portable_kwargs = self.policy_kwargs, getattr(self.policy, "portable_kwargs", dict)
        self.policy_kwargs = portable_kwargs(given)
        try:
            super().save(path, exclude, include)
        finally:
            self.policy_kwargs = given

    def set_parameters(
        self, load_path_or_dict: str | TensorDict, exact_match: bool = True, device: th.device | str = "auto"
    ) -> None:
        """SB3's, and an interrupted rollout is forgotten: it was acted by the parameters before."""
        super().set_parameters(load_path_or_dict, exact_match, device)
        self._rollout_is_unfinished = False

    @classmethod
    def load(
        cls: type[SelfAlgorithm],
        path: str | pathlib.Path | io.BufferedIOBase,
        env: GymEnv | None = None,
        device: th.device | str = "auto",
        custom_objects: dict[str, Any] | None = None,
        print_system_info: bool = False,
        force_reset: bool = True,
        **kwargs: Any,
    ) -> SelfAlgorithm:
        """Load an archive of this algorithm, or of its counterpart in SB3 or sb3-contrib. Arguments are SB3's.

        :raises ArgumentError: the archive holds another algorithm
        :raises ValueError: the archive's spaces are not those of ``env``
        """
        holds = _algorithm_in(path)
        if holds is not None and holds != cls.archive_name:
            raise ArgumentError(
                f"{path} is an archive of {holds}, but {cls.__name__}.load() reads archives of {cls.archive_name}. "
                f"Load it with {holds}.load()."
            )
        return super().load(path, env, device, custom_objects, print_system_info, force_reset, **kwargs)


def _algorithm_in(path: Any) -> str | None:
    """Which algorithm an archive holds, from the names of its attributes; None if that can't be told."""
    file = open_path(path, "r", suffix="zip")
    start = file.tell()
    try:
        with zipfile.ZipFile(file) as archive:
            names = json.loads(archive.read("data")).keys()
    except (zipfile.BadZipFile, KeyError, json.JSONDecodeError):
        return None  # SB3's own loading says what is wrong
    finally:
        file.seek(start)
        if file is not path:
            file.close()
    return next((algorithm for algorithm, mark in _ARCHIVE_MARKS.items() if mark in names), None)


def _with_rows(observations: Any, more: list[Any]) -> Any:
    """A batch of observations with single observations appended."""
    if isinstance(observations, dict):
        return {key: _with_rows(x, [row[key] for row in more]) for key, x in observations.items()}
    rows = [np.asarray(row).reshape(1, *observations.shape[1:]) for row in more]
    return np.concatenate([observations, *rows]) if rows else observations


def to_numpy(x: Array) -> np.ndarray:
    """An array of any network as NumPy."""
    return x.detach().cpu().numpy() if isinstance(x, th.Tensor) else np.asarray(x)

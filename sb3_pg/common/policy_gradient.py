"""The base of the three algorithms: act, judge, step.

Act: step the environments and only sample actions (:meth:`PolicyGradientAlgorithm.collect_rollouts`).
Judge: when the rollout is complete, values, log-probabilities and advantages in one batched pass
(:meth:`PolicyGradientAlgorithm.judge`). Step: each algorithm's own ``train``.
"""

import inspect
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common import buffers as sb3_buffers
from stable_baselines3.common.base_class import maybe_make_env
from stable_baselines3.common.callbacks import BaseCallback, ConvertCallback
from stable_baselines3.common.env_util import is_wrapped
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, Schedule
from stable_baselines3.common.vec_env import VecEnv

from sb3_pg.common import workers
from sb3_pg.common.acting import Horizon, Steps, WholeEpisodes, longest_episode
from sb3_pg.common.advantages import SAME_START, Baseline, moving_average
from sb3_pg.common.archive.archived import Archived
from sb3_pg.common.archive.peers import unmasked
from sb3_pg.common.archive.resume import resuming
from sb3_pg.common.arrays import Array, Column, as_tensors, take
from sb3_pg.common.batch import Batch, epoch, weighted
from sb3_pg.common.buffers import RolloutBuffer
from sb3_pg.common.closing import closing, for_a_copy, is_learning, learning_alone, screen_logger
from sb3_pg.common.data_parallel import DataParallel
from sb3_pg.common.diagnosis import (
    LastGood,
    explain_bad_gradient,
    explained,
    require_sound_parameters,
    require_sound_policy,
    unsound,
)
from sb3_pg.common.distributions.box import deviation
from sb3_pg.common.engines.choice import make_engine
from sb3_pg.common.engines.protocol import Acted, Engine, Judged, Seen
from sb3_pg.common.errors import (
    ArgumentError,
    EnvironmentNumberError,
    NonFiniteError,
    PolicyError,
    arguments_of,
    evaluate_schedule,
    is_finite,
    require_finite,
    require_finite_given,
    require_finite_of,
    without_wrappers,
)
from sb3_pg.common.estimation import estimate_by_comparison, estimate_by_values, share_without_signal
from sb3_pg.common.figures import Figures
from sb3_pg.common.groups import MaxGradNorm, check_optimizer, group_critic, has_critic_group
from sb3_pg.common.masks import masks_of, masks_of_caller
from sb3_pg.common.objectives import squared_error
from sb3_pg.common.options import (
    check_base_arguments,
    check_callback,
    check_common,
    check_device,
    check_learning,
    check_starts,
)
from sb3_pg.common.policies import (
    POLICIES,
    check_policy,
    class_of,
    detach_distribution,
    make_policy,
    predict,
    reset_noise,
    usual_optimizer,
)
from sb3_pg.common.registry import BUFFER_PLACES, entered_for
from sb3_pg.common.returned import checked_observations, checked_step, is_usual
from sb3_pg.common.rollout import Rollout, Step
from sb3_pg.common.sequences import Memory
from sb3_pg.common.spaces import check_spaces, checked_environment, environments_own, shifted
from sb3_pg.common.threads import threads_to_choose
from sb3_pg.common.vec_env import DummyVecEnv, as_vec_env, take_over
from sb3_pg.common.vec_env.adapters import is_vectorised

#: The square of a larger gradient is not finite, and Adam and RMSprop would not forget it.
LARGEST_GRADIENT = 1e18

#: Excludes a figure from all of SB3's formats.
_WRITTEN = ("stdout", "log", "json", "csv", "tensorboard")

SelfAlgorithm = TypeVar("SelfAlgorithm", bound="PolicyGradientAlgorithm")


class PolicyGradientAlgorithm(Archived, DataParallel):
    """Acting and judging, shared by REINFORCE, TRPO and PPO; a subclass adds ``train``.

    Arguments are SB3's, with the same names; each algorithm documents its own. What differs from
    ``OnPolicyAlgorithm``, all of it by design:

    - values and log-probabilities are computed after the rollout in one pass, not at each step;
    - logs are written after the update they belong to, so that the last update's are written too;
    - schedules stop at their end value, they do not run past it;
    - stopping or an exception in a callback keeps the last observation and the unfinished rollout, which a following
      ``learn(reset_num_timesteps=False)`` completes;
    - a number that is not finite stops training with its environment and step, before it reaches the policy;
    - whatever else stops it, ctrl-C too, what is there is whole: an exception within a step of the environments, whose
      rollout is dropped, resets them before learning goes on, and one within an update takes the update back. (Of
      policies with more than 2^24 parameters no copy is kept: there it keeps the last whole step of the optimizer.)
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = POLICIES

    #: Attributes that an update changes, beside the policy and its optimizer.
    _changed_by_updates: ClassVar[tuple[str, ...]] = (
        "_n_updates",
        "_return_ema",
        "_advantage_square",
        "learning_rate",
        "lr_schedule",
    )

    #: How to learn from rollouts that are not of whole episodes, for errors.
    _without_episodes: ClassVar[str] = "leave out `n_episodes` and use baseline='value'"

    rollout_buffer_class: type[sb3_buffers.RolloutBuffer] | None
    normalize_advantage: bool | str
    max_grad_norm: MaxGradNorm  # type: ignore[assignment]

    def __init__(
        self,
        policy: str | type[ActorCriticPolicy],
        env: GymEnv | str | None,
        *,
        policy_kwargs: dict[str, Any] | None,
        baseline: str | Baseline | None,
        scale_rewards: str | None,
        ema_decay: float,
        loss_average: str | int,
        n_episodes: int | None,
        max_episode_steps: int | None,
        use_masking: bool,
        sequence_length: int | None,
        engine: str,
        critic_learning_rate: float | Schedule | None = None,
        critic_optimizer_kwargs: dict[str, Any] | None = None,
        **arguments: Any,
    ) -> None:
        workers.join()
        policy = unmasked(policy)
        if is_vectorised(env):
            env = as_vec_env(env)
        check_device(arguments.get("device", "auto"))
        check_base_arguments(arguments)
        check_policy(policy, getattr(env, "observation_space", None), policy_kwargs)
        # SB3 writes into nested dictionaries of policy_kwargs, so the caller's are copied first.
        policy_kwargs = {k: dict(v) if isinstance(v, dict) else v for k, v in (policy_kwargs or {}).items()}
        super().__init__(class_of(policy), env, policy_kwargs=policy_kwargs, _init_setup_model=False, **arguments)  # type: ignore[arg-type]
        self.baseline = baseline
        self.scale_rewards = scale_rewards
        self.ema_decay = ema_decay
        self.loss_average = loss_average
        self.n_episodes = n_episodes
        self.max_episode_steps = max_episode_steps
        self.use_masking = use_masking
        self.sequence_length = sequence_length
        self.engine = engine
        self.critic_learning_rate = critic_learning_rate
        self.critic_optimizer_kwargs = critic_optimizer_kwargs
        self._is_masked = False  # in the last rollout
        self._return_ema: float | None = None  # of baseline="ema"; saved and restored like any attribute
        self._advantage_square: float | None = None  # of normalize_advantage="running", likewise
        self._network: Engine | None = None
        self._rollout: Rollout | None = None
        self._last_memory: Memory | None = None
        self._resume: dict[str, Any] | None = None  # of the archive, until learning goes on

    # ------------------------------------------------------------------ setup

    def _get_policy_from_name(self, policy_name: str) -> type[BasePolicy]:
        return class_of(policy_name)

    @staticmethod
    def _wrap_env(env: GymEnv, verbose: int = 0, monitor_wrapper: bool = True) -> VecEnv:
        """SB3's wrappers, with our DummyVecEnv around a single environment, and the methods of our VecNormalize.

        Vectorised environments of gymnasium and EnvPool are adapted.
        """
        env = maybe_make_env(env, verbose)
        if is_vectorised(env):
            env = as_vec_env(env)
        if not isinstance(env, VecEnv):
            single = checked_environment(env)
            check_spaces(single.observation_space, single.action_space)
            if monitor_wrapper and not is_wrapped(single, Monitor):
                if verbose >= 1:
                    print("Wrapping the env with a `Monitor` wrapper")
                single = Monitor(single)
            env = DummyVecEnv([lambda: single])
        take_over(env)
        check_spaces(env.observation_space, env.action_space)
        return OnPolicyAlgorithm._wrap_env(env, verbose, monitor_wrapper)

    def set_env(self, env: GymEnv, force_reset: bool = True) -> None:
        """SB3's ``set_env``; what the environment's actions tell besides what is compared holds from here on.

        :raises ArgumentError: a callback of ``learn`` calls it, whose rollout is of the environments before
        """
        if force_reset and is_learning(self):
            raise ArgumentError(
                "`set_env` cannot be called while learn() runs, whose rollout is of the environments before. Let the "
                "callback return False, call set_env(env) then, and learn(..., reset_num_timesteps=False)."
            )
        super().set_env(env, force_reset)
        assert self.env is not None
        self.action_space = self.policy.action_space = environments_own(self.action_space, self.env.action_space)

    def _setup_model(self) -> None:
        if getattr(self, "observation_space", None) is None:
            raise ArgumentError("`env` is None: pass an environment or the id of a registered one.")
        if th.get_default_dtype() not in (th.float32, th.float64):
            raise ArgumentError(
                f"torch's default type is {th.get_default_dtype()}, in which no policy can be initialised: call "
                "torch.set_default_dtype(torch.float32)."
            )
        self._read_arguments()
        self._setup_lr_schedule()
        self.set_random_seed(self.seed)
        self.rollout_buffer = self._make_rollout_buffer()
        self.policy_class = unmasked(self.policy_class)
        check_policy(self.policy_class, self.observation_space, self.policy_kwargs)
        if self.policy_kwargs.keys() & {"optimizer_class", "optimizer_kwargs"}:
            kind = self.policy_kwargs.get("optimizer_class") or usual_optimizer(self.policy_class)
            options = self.policy_kwargs.get("optimizer_kwargs") or {}
            if kind is not None:
                check_optimizer("policy_kwargs: optimizer_kwargs", kind, options, self.device)
        arguments = self.observation_space, self.action_space, self.lr_schedule, self.use_sde, self.policy_kwargs
        self.policy = make_policy(self.policy_class, *arguments).to(self.device)
        self._group_parameters()
        detach_distribution(self.policy)
        self._maybe_recommend_cpu()
        names = arguments_of(type(self)).keys() & vars(self).keys()
        self._applied = {name: getattr(self, name) for name in names - _OBJECTS}
        self._network = self._rollout = self._last_memory = None
        if self.verbose >= 1:
            print(f"Using the {self.network.description} network")

    def _group_parameters(self) -> None:
        """Give the critic's parameters a group of their own, if it has a learning rate or options of its own."""
        is_apart = self.critic_learning_rate is not None or self.critic_optimizer_kwargs is not None
        if not is_apart and not has_critic_group(self.policy.optimizer):
            return
        group_critic(self.policy, self.critic_optimizer_kwargs or {})
        if self.critic_learning_rate is not None:
            self.policy.optimizer.param_groups[1]["lr"] = self._coefficient("critic_learning_rate")

    def _read_arguments(self) -> None:
        """Make numbers of other libraries Python's and lists pairs, and refuse what cannot work."""
        for name in arguments_of(type(self)).keys() & vars(self).keys():
            value = getattr(self, name)
            if isinstance(value, np.number | np.ndarray | th.Tensor) and np.ndim(value) == 0:
                setattr(self, name, value.item())
        if isinstance(self.max_grad_norm, list):  # of YAML and JSON
            self.max_grad_norm = tuple(self.max_grad_norm)
        self._check_arguments()

    def _apply_changes(self) -> None:
        """Check and pass on what has been set since ``_setup_model``, also by callbacks amid learning.

        What was set on schedule or buffer itself stays.

        :raises ArgumentError: it cannot work, or not any more
        """
        changed = [name for name, applied in self._applied.items() if not _is_same(getattr(self, name), applied)]
        if "use_sde" in changed:
            raise ArgumentError(
                f"`use_sde={self.use_sde!r}` comes too late, for the policy is made: pass it to the constructor."
            )
        if changed:
            self._read_arguments()
        for name in changed:
            value = self._applied[name] = getattr(self, name)
            if name == "learning_rate":
                self._setup_lr_schedule()
            elif name == "engine":
                self._network = None
            elif name in ("gamma", "gae_lambda"):
                setattr(self.rollout_buffer, name, value)
        if changed:
            self._group_parameters()

    def _check_arguments(self) -> None:
        """Refuse arguments that cannot work. Called by ``_setup_model``, so also for loaded and changed ones.

        :raises ArgumentError: naming the argument, its value and what is allowed
        """
        check_common(self)

    def _make_rollout_buffer(self) -> sb3_buffers.RolloutBuffer:
        """Our buffer in place of SB3's own two, any other class as it was given."""
        if self.rollout_buffer_class and self.rollout_buffer_class.__module__ == "sb3_contrib.common.maskable.buffers":
            self.rollout_buffer_class = None  # of an archive of MaskablePPO
        kind: Any = self.rollout_buffer_class
        is_dict = isinstance(self.observation_space, spaces.Dict)
        if kind in (None, sb3_buffers.RolloutBuffer) or (kind is sb3_buffers.DictRolloutBuffer and is_dict):
            kind = entered_for(class_of(self.policy_class), BUFFER_PLACES) or RolloutBuffer
        buffer: sb3_buffers.RolloutBuffer = kind(
            self.n_steps or 512,  # of whole episodes a first guess: the buffer grows
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
    def network(self) -> Engine:
        """The engine that computes the policy; made anew when ``policy`` is replaced."""
        if self._network is None or self._network.policy is not self.policy:
            self._network = make_engine(self.policy, self.engine)
        return self._network

    def _refreshed_network(self) -> Engine:
        """Return the engine for the next rollout or update, whatever has been done to the policy since the last."""
        if not self.network.refresh():
            self._network = None
        return self.network

    # ---------------------------------------------------------------- horizon

    @property
    def _learns_from_episodes(self) -> bool:
        """True if rollouts are of whole episodes: without a value network nothing else stands in for their rest."""
        return self.n_episodes is not None or self.baseline != "value"

    def _needs_log_probs(self, rollout: Rollout) -> bool:
        """Return whether the update compares log-probabilities with those of the policy that acted."""
        return True

    @property
    def _episodes_per_env(self) -> int:
        return -(-(self.n_episodes or 1) // self.n_envs)

    @property
    def horizon(self) -> Horizon:
        """How long rollouts are, and which of their samples count."""
        if not self._learns_from_episodes:
            return Steps(self.n_steps)
        return WholeEpisodes(
            None if self.n_episodes is None else self._episodes_per_env,
            self.n_steps or 1,
            longest_episode(self.max_episode_steps, self._total_timesteps),
            type(self).__name__,
            self._without_episodes,
        )

    def _coefficient(self, name: str) -> float:
        """Return the present value of a coefficient that may be a schedule."""
        return evaluate_schedule(name, getattr(self, name), self._current_progress_remaining)

    def _update_learning_rate(self, optimizers: list[th.optim.Optimizer] | th.optim.Optimizer) -> None:
        evaluate_schedule("learning_rate", self.lr_schedule, self._current_progress_remaining)
        super()._update_learning_rate(optimizers)
        self._group_parameters()
        if self.critic_learning_rate is not None:
            self.logger.record("train/critic_learning_rate", self.policy.optimizer.param_groups[1]["lr"])

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
        if self._last_obs is None:
            raise ArgumentError("There are no observations to act on (None): call learn(), and look at env.reset().")
        self.policy.set_training_mode(False)
        horizon = self.horizon if self._learns_from_episodes else Steps(n_rollout_steps)
        rollout, env_is_usual = self._start_rollout(env, rollout_buffer, horizon), is_usual(env)
        ask_masks = masks_of(env) if self.use_masking else None
        self._is_masked = ask_masks is not None
        if rollout.n_judged:
            return True  # a callback at its end was the last to be asked
        is_watched = type(callback) is not ConvertCallback or callback.callback is not None
        callback.on_rollout_start()
        network = self._refreshed_network()
        n_workers = workers.size()
        n_before = self.num_timesteps - self._steps_of_all(rollout)

        keep_going = True
        with self._whole_steps(rollout):
            while not horizon.is_complete(rollout):
                n_steps = rollout_buffer.pos
                if self.use_sde and self.sde_sample_freq > 0 and n_steps % self.sde_sample_freq == 0:
                    reset_noise(self.policy, env.num_envs)
                action_masks = ask_masks and ask_masks(n_steps)
                seen = Seen(self._last_obs, action_masks, self._last_episode_starts, self._last_memory)  # type: ignore[arg-type]
                actions, values, log_probs, memory = self._act(network, seen, n_steps)
                clipped_actions = self._to_action_space(actions)
                rollout.is_paused = False
                returned: Any = env.step(clipped_actions)
                new_obs, rewards, dones, infos = returned if env_is_usual else checked_step(env, returned)
                require_finite_of(None, "observation", new_obs, n_steps + 1)
                self.num_timesteps += env.num_envs * n_workers
                if is_watched:
                    obs_tensor = as_tensors(self._last_obs)  # SB3's name for what was acted on
                    callback.update_locals(locals())
                step = Step(actions, rewards, dones, infos, new_obs, values, log_probs, memory, action_masks)
                rollout.unrecorded, rollout.is_paused = step, True
                keep_going = callback.on_step()
                rollout.is_paused = False
                n_steps += 1
                self._record(rollout, step)  # before the callback is obeyed: a stop loses neither this nor the next
                if is_watched and not (self.network is network and network.is_current()):
                    network = self._replaced(network, rollout)
                rollout.is_paused = True
                if not keep_going:
                    break

        all_go_on = workers.agree(keep_going)
        self.num_timesteps = n_before + self._steps_of_all(rollout)
        if not all_go_on:
            rollout.is_paused = True
            return False
        self._apply_changes()  # of callbacks at its steps
        judged = self.judge(rollout)
        self._last_memory = judged.memory
        self.network.adapt(judged.figures)
        values, log_probs = th.as_tensor(judged.final_values[: env.num_envs]), th.as_tensor(rollout_buffer.log_probs)
        callback.update_locals(locals())
        callback.on_rollout_end()
        rollout.is_paused = False
        return True

    def _steps_of_all(self, rollout: Rollout) -> int:
        """Return how many steps all workers have made in a rollout, which may be of different lengths."""
        return int(workers.total([rollout.n_steps * rollout.n_envs])[0])

    def _start_rollout(self, env: VecEnv, buffer: sb3_buffers.RolloutBuffer, horizon: Horizon) -> Rollout:
        """Return an empty rollout, unless this very one was interrupted and can be completed."""
        rollout = self._rollout
        is_same = rollout is not None and rollout.buffer is buffer and self.use_masking == rollout.may_be_masked
        if rollout is not None and is_same and self._learns_from_episodes:  # perhaps only since it was interrupted
            is_same = bool((buffer.episode_starts[0] if rollout.n_steps else rollout.last_dones).all())
        if rollout is not None and rollout.is_paused and rollout.unrecorded is not None:
            self._record(rollout, rollout.unrecorded)  # it was made, though the callback failed, or saved the model
        if rollout is not None and rollout.is_paused and is_same:
            return rollout
        buffer.reset()
        starts: Any = self._last_episode_starts
        observations, self._last_obs, self._rollout = self._last_obs, None, None  # until the environments are ready
        observations, self._last_episode_starts = horizon.prepare(env, observations, starts)
        observations = checked_observations(env.observation_space, observations, env.num_envs)
        require_finite_of(None, "observation", observations, 0)
        self._last_obs = observations
        self._rollout = Rollout(buffer, observations, self._last_episode_starts)
        self._rollout.memory, self._rollout.sequence_length = self._last_memory, self.sequence_length
        self._rollout.may_be_masked, self._rollout.is_paused = self.use_masking, True
        if self.use_sde:
            reset_noise(self.policy, env.num_envs)
        return self._rollout

    @contextmanager
    def _whole_steps(self, rollout: Rollout) -> Iterator[None]:
        """Have the environments reset before learning goes on if a step stays half done in the block."""
        try:
            yield
        except BaseException as failure:
            if not rollout.is_paused:
                self._last_obs = None
            if isinstance(failure, EnvironmentNumberError):
                raise failure.at(rollout.n_steps) from failure
            raise

    @property
    def rollout(self) -> Rollout:
        """The rollout to learn from: the one that was judged last, or else what has been put into the buffer.

        :raises ArgumentError: there is none
        """
        rollout, buffer = self._rollout, self.rollout_buffer
        n_judged = None if rollout is None or rollout.buffer is not buffer else rollout.n_judged
        if buffer.pos == 0 or n_judged == 0:
            raise ArgumentError("There is no complete rollout to learn from: call learn() or collect_rollouts().")
        if rollout is not None and n_judged == buffer.pos:
            return rollout
        starts: Any = self._last_episode_starts
        starts = np.ones(self.n_envs, dtype=bool) if starts is None else starts
        return Rollout(buffer, self._last_obs, starts)  # type: ignore[arg-type]

    def _to_action_space(self, actions: np.ndarray) -> np.ndarray:
        """Return what the environment is given: Gaussian samples clipped, squashed ones scaled to the bounds."""
        if not isinstance(self.action_space, spaces.Box):
            return shifted(self.action_space, actions)
        if self.policy.squash_output:
            return self.policy.unscale_action(actions)
        # np.clip checks its arguments for longer than these two take.
        clipped: np.ndarray = np.minimum(np.maximum(actions, self.action_space.low), self.action_space.high)
        return clipped

    def _replaced(self, network: Engine, rollout: Rollout) -> Engine:
        """Return the engine to go on with when a callback has replaced the policy, or where its parameters are.

        What another policy has done is judged by that.
        """
        if self.network is not network:
            judged = network.judge(rollout)
            self._write_judgement(rollout, judged)
            rollout.n_known, rollout.replaced = rollout.n_steps, (rollout.n_steps, judged.memory)
        return self._refreshed_network()

    def _record(self, rollout: Rollout, step: Step) -> None:
        """Add a step to the rollout, and go on from where it has led to."""
        actions, rewards, dones, infos, observations, values, log_probs, memory, masks = step
        rollout.unrecorded, buffer = None, rollout.buffer
        require_finite_of(None, "reward", rewards, buffer.pos)  # here, for a callback may have changed them
        self._update_info_buffer(infos, dones)
        if np.count_nonzero(dones):  # quicker than ``any`` on a few
            rollout.note(dones, infos)
        rollout.n_known += values is not None and rollout.n_known == buffer.pos
        if values is None and not isinstance(buffer, RolloutBuffer):
            values = log_probs = th.zeros(self.n_envs)  # SB3's buffers insist on them; judging writes the true ones
        starts: Any = self._last_episode_starts
        buffer.add(self._last_obs, actions, rewards, starts, values, log_probs)  # type: ignore[arg-type]
        if masks is not None:
            rollout.masks.append(masks)
        self._last_memory = memory
        self._last_obs, self._last_episode_starts = rollout.last_observations, rollout.last_dones = observations, dones

    def _act(self, network: Engine, seen: Seen, step: int) -> Acted:
        """Choose actions for the last observations.

        :raises NonFiniteError: these, or the policy's parameters or actions, are not finite
        """
        try:
            acted = network.act(seen)
        except Exception:
            self._blame_observations(step)
            raise
        if not is_finite(acted.actions):
            self._blame_observations(step)
            require_sound_policy(self.policy, "action", acted.actions[None], step)
        return acted

    def predict(
        self,
        observation: np.ndarray | dict[str, np.ndarray],
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
        action_masks: np.ndarray | None = None,
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        """Return actions for one or several observations. Arguments are SB3's and sb3-contrib's.

        They are elements of the action space also if that has a start other than 0.

        :param action_masks: True for what is allowed, (n, options), see :mod:`sb3_pg.common.masks`. None allows all,
            unless SB3's ``evaluate_policy`` asks, whose environment then tells
        :raises ArgumentError: the masks are of the wrong shape, or allow nothing
        :raises NonFiniteError: an observation is not finite
        """
        if action_masks is None and self.use_masking:
            action_masks = masks_of_caller(self.observation_space, observation)
        try:
            actions, state = predict(self.policy, observation, state, episode_start, deterministic, action_masks)
        except ValueError:  # of torch's distributions
            require_finite_given("observation", observation)
            raise
        return shifted(self.action_space, actions), state

    def _blame_observations(self, step: int) -> None:
        """When the policy or an environment fails on observations that are not finite, say that instead."""
        observations: Any = self._last_obs
        row = {k: v[None] for k, v in observations.items()} if isinstance(observations, dict) else observations[None]
        require_finite("observation", row, step)

    # ------------------------------------------------------------------ judge

    def judge(self, rollout: Rollout) -> Judged:
        """Give a complete rollout its values, log-probabilities, returns and advantages.

        :param rollout: with observations, actions, rewards and episode starts
        :return: what the engine has found
        :raises NonFiniteError: an observation, action or reward is not finite, or the policy's answer to one
        """
        buffer, n = rollout.buffer, rollout.n_steps
        for name in ("observation", "reward"):
            require_finite(name, take(getattr(buffer, f"{name}s"), slice(0, n)))
        require_sound_policy(self.policy, "action", buffer.actions[:n])
        rollout.needs_values, rollout.needs_log_probs = self.baseline == "value", self._needs_log_probs(rollout)
        with rollout.changing_rewards():
            judged = self.network.judge(rollout)
            judged = judged._replace(figures=workers.mean_of(judged.figures))
            self._write_judgement(rollout, judged)
            self._check_final_values(rollout, judged.final_values)
            if judged.rewards is not None:
                buffer.rewards[:n] = judged.rewards
            if self.baseline == "value":
                estimate_by_values(rollout, judged.final_values, self.gamma)
            else:
                keep, average = self._compared(rollout), self._return_ema
                estimate_by_comparison(rollout, keep, self.baseline, self.gamma, average, self.scale_rewards)
        rollout.n_judged, rollout.figures, self._rollout = n, judged.figures, rollout
        rollout.starting_memory, rollout.reference_log_probs = judged.starting_memory, judged.reference_log_probs
        for name, value in judged.figures.items():
            self.logger.record(name, value)
        return judged

    def _compared(self, rollout: Rollout) -> np.ndarray:
        """Return which samples a baseline without values compares, bool (n_steps, n_envs)."""
        keep = self.horizon.keep(rollout)
        assert keep is not None  # only whole episodes can be compared
        return keep

    def _write_judgement(self, rollout: Rollout, judged: Judged) -> None:
        n, buffer = rollout.n_steps, rollout.buffer
        require_sound_policy(self.policy, "value", judged.values)
        require_sound_policy(self.policy, "log-probability", judged.log_probs)
        buffer.values[:n], buffer.log_probs[:n] = judged.values, judged.log_probs

    def _check_final_values(self, rollout: Rollout, values: np.ndarray) -> None:
        require_sound_policy(self.policy, "value", values[None, : rollout.n_envs], rollout.n_steps)
        for cut, value in zip(rollout.cuts, values[rollout.n_envs :], strict=True):
            if not math.isfinite(value):
                raise unsound(self.policy, "value after the last step", cut.env, cut.step, value)

    # ------------------------------------------------------------------- step

    def _batch(self, rollout: Rollout) -> Batch:
        """Return the samples of a judged rollout that are learned from, weighted as ``loss_average`` says."""
        if not rollout.needs_log_probs and self._needs_log_probs(rollout):  # arguments have been changed since
            self.judge(rollout)
        batch = self.network.batch(rollout, self.horizon.keep(rollout))
        return weighted(batch, rollout, self.network.asarray, self.loss_average)

    def _first_look(self, rollout: Rollout, minibatch: Batch, log_prob: Array) -> None:
        """Take the log-probabilities before an update's only step for those of the policy that acted, as they are.

        What judging has left to this look is logged, see ``Rollout.needs_log_probs``.
        """
        minibatch.old_log_prob = log_prob
        figures = self.network.figures(rollout, minibatch)
        if figures:
            figures = workers.mean_of(figures)
            rollout.figures = {**rollout.figures, **figures}
            for name, value in figures.items():
                self.logger.record(name, value)

    def _may_leave_out(self, batch: Batch) -> bool:
        """Return whether samples whose advantages are zero can be left out of minibatches without changing the others.

        They cannot where a penalty depends on their log-probabilities, or what the policy says of others on them.
        """
        return batch.reference_log_prob is None and not any(
            isinstance(its, th.nn.modules.batchnorm._BatchNorm) for its in self.policy.modules()
        )

    def _fit_critic(
        self,
        batch: Batch,
        losses: Column,
        n_epochs: int,
        batch_size: int | None,
        max_grad_norm: MaxGradNorm,
        *,
        even: bool = False,
    ) -> None:
        """Regress V on the returns by minibatches; whatever the actor uses too stays as it is.

        :param losses: where each sample's loss is noted
        :param even: spread a shorter last minibatch over all
        """
        batch = batch.for_critic()
        for _ in range(n_epochs):
            for minibatch in epoch(batch, self.rollout, self.network, batch_size, even=even):
                evaluation = self.network.evaluate_critic(minibatch)
                loss, d_value = squared_error(evaluation.value, minibatch.returns)
                evaluation.backward(d_value=d_value)
                self._take_step(minibatch, max_grad_norm)
                losses.add(loss, minibatch.weight, minibatch.share)

    def _normalized(self, batch: Batch) -> Array:
        """Return the advantages of a rollout with mean 0 and deviation 1 or, by "running", a smaller one.

        Once a task is solved, advantages are the critic's noise, except in the rollouts with a failure. Each divided by
        its own deviation, noise moves the policy as far as failures do, until it has lost what it had learned.
        "running" divides by the root mean square of the deviations of past rollouts where that is larger.
        """
        if self.normalize_advantage != "running":
            return batch.normalized()
        mean, deviation = batch.moments()
        self._advantage_square = moving_average(self._advantage_square, deviation**2, self.ema_decay)
        return batch.normalized((mean, max(deviation, math.sqrt(self._advantage_square))))

    def _take_step(self, batch: Batch, max_grad_norm: MaxGradNorm) -> None:
        """Let the optimizer move the parameters by the gradients just made.

        :raises NonFiniteError: a gradient is not finite, or its square is not, which optimizers remember
        """
        norm = self.network.step(max_grad_norm, batch.share)
        limits = max_grad_norm if isinstance(max_grad_norm, tuple) else (max_grad_norm,)
        if not (math.isfinite(norm) and min(norm, sum(its or math.inf for its in limits)) < LARGEST_GRADIENT):
            raise explain_bad_gradient(self.network, self.rollout, batch, norm)

    def _end_update(self, rollout: Rollout, figures: Figures) -> None:
        """Complete the figures of an update by what all algorithms log, and log them."""
        n, buffer = rollout.n_steps, rollout.buffer
        if self.baseline == "ema":  # for the next rollout
            returns = buffer.returns[:n][self._compared(rollout)]
            now = float(workers.mean(float(returns.mean()), len(returns)))
            self._return_ema = moving_average(self._return_ema, now, self.ema_decay)
        # flat already if SB3's ``get`` was asked
        values, returns = (x.reshape(-1)[: n * self.n_envs] for x in (buffer.values, buffer.returns))
        figures.explained_variance = self.explained_variance(values, returns)
        std = deviation(self.policy)
        figures.std = None if std is None else std.mean().item()
        if self.baseline in SAME_START:
            figures.frac_reward_zero_std = share_without_signal(rollout, self._compared(rollout))
        figures.n_updates = self._n_updates
        figures.record(self.logger)

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

        Until it returns, torch uses a single thread where that is faster, also in callbacks and environments.

        :param total_timesteps: steps over all environments; whole rollouts are made, so it may be a few more. With
            ``reset_num_timesteps=False`` so many more than before, and schedules progress over the whole: to end a run
            of a million steps that was stopped, ``learn(1_000_000 - model.num_timesteps, reset_num_timesteps=False)``
        :param callback: SB3 callback(s), called at every step
        :param log_interval: updates between two log lines; the last update is always logged
        :param tb_log_name: name of the run for TensorBoard
        :param reset_num_timesteps: False continues the step count, the episodes and an interrupted rollout; after
            ``load`` with all that the archive holds, random numbers and environments too, see ``load``
        :param progress_bar: show one (needs tqdm and rich)
        :return: the model itself
        :raises NonFiniteError: a number was not finite; the policy keeps its last good parameters
        :raises ArgumentError: the model is learning already
        """
        check_learning(total_timesteps, log_interval)
        check_callback(callback)
        total_timesteps = total_timesteps if total_timesteps == math.inf else math.ceil(float(total_timesteps))
        if self.env is None:
            raise ArgumentError("The model has no environment to learn from: call set_env(env) or load(path, env=env).")
        with learning_alone(self):
            self._apply_changes()
            check_starts(self)
            if reset_num_timesteps or self._last_obs is None:
                self._rollout = self._last_obs = None
            with resuming(self, reset_num_timesteps):
                total_timesteps, callback = self._setup_learn(
                    total_timesteps, callback, reset_num_timesteps, tb_log_name, progress_bar
                )
            iteration = 0  # for callbacks, as in SB3
            with closing(callback, None if self._custom_logger else self.logger):
                callback.on_training_start(locals(), globals())
                self._learn(total_timesteps, callback, log_interval)
                callback.on_training_end()
        return self

    def _learn(self, total_timesteps: int, callback: BaseCallback, log_interval: int | None) -> None:
        iteration, last_logged = 0, 0
        self._refreshed_network()  # chooses the threads that copies of the parameters take, too
        self.begin_together()
        with workers.together(), self._last_good() as good:
            while self.num_timesteps < total_timesteps or self._is_amid_rollout:
                with self.sharing_statistics():
                    is_complete = self.collect_rollouts(self.env, callback, self.rollout_buffer, self.n_steps)  # type: ignore[arg-type]
                if not is_complete:
                    break
                iteration += 1
                self.require_equal_policies(iteration)
                self._update_current_progress_remaining(self.num_timesteps, total_timesteps)
                self._rollout.is_paused = True  # type: ignore[union-attr]
                self._apply_changes()  # of callbacks at the rollout's end
                with good.whole(), np.errstate(all="ignore"):  # what underflows is right, what is not finite is named
                    self.train()
                self._rollout.is_paused = False  # type: ignore[union-attr]
                self.network.end_update()
                detach_distribution(self.policy)
                is_last = self.num_timesteps >= total_timesteps
                if log_interval is not None and (is_last or iteration % log_interval == 0):
                    last_logged = iteration
                    self._write_log(iteration)
        if log_interval is not None and last_logged < iteration:  # stopped by a callback between two log lines
            self._write_log(iteration)

    @contextmanager
    def _last_good(self) -> Iterator[LastGood]:
        """Return to the last good parameters, and say so, if the policy or its gradient fails in the block."""
        try:
            require_sound_parameters(self.policy)
            good = LastGood(self, self._changed_by_updates)
        except PolicyError as error:
            raise PolicyError(f"{error} Load an archive, or mend the policy before learning goes on.") from None
        try:
            yield good
        except Exception as failure:
            explanation = explained(failure, self.policy)
            if isinstance(explanation, NonFiniteError):
                self._last_obs = None  # the environments may be broken: reset them before learning goes on
            if isinstance(explanation, PolicyError):
                raise PolicyError(f"{explanation} {good.returned()}") from failure
            if explanation is not failure:
                raise explanation from failure
            raise

    def _setup_learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        reset_num_timesteps: bool = True,
        tb_log_name: str = "run",
        progress_bar: bool = False,
    ) -> tuple[int, BaseCallback]:
        """SB3's, without its folder for logs where none are written."""
        arguments = total_timesteps, callback, reset_num_timesteps, tb_log_name, progress_bar
        if self._custom_logger or self.tensorboard_log is not None:
            return super()._setup_learn(*arguments)
        self._logger, self._custom_logger = screen_logger(self.verbose), True
        try:
            return super()._setup_learn(*arguments)
        finally:
            self._custom_logger = False

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        if "_logger" in state:
            state["_logger"] = for_a_copy(self._logger)
            state["_custom_logger"] &= state["_logger"].output_formats == self._logger.output_formats
        return state

    def _write_log(self, iteration: int) -> None:
        """Write the log, but leave the update's figures in the logger, where SB3 has them until the next rollout's end.

        They are marked as written, so that whoever dumps the log next does not write them again.
        """
        values, excluded = self.logger.name_to_value, self.logger.name_to_excluded
        judged = {} if self._rollout is None else self._rollout.figures
        names = {name for name in values if name.startswith("train/")} | (judged.keys() & values.keys())
        figures = {name: values[name] for name in names if excluded[name] != _WRITTEN}
        self.dump_logs(iteration)
        for name, value in figures.items():
            self.logger.record(name, value, exclude=_WRITTEN)


#: Arguments that are only for the constructor.
_OBJECTS = {"policy", "env", "policy_kwargs", "rollout_buffer_class", "rollout_buffer_kwargs", "_init_setup_model"}


def _is_same(value: Any, before: Any) -> bool:
    """Return whether an argument is what it was, wrapped by SB3 or not."""
    if value is before:
        return True
    value, before = without_wrappers(value), without_wrappers(before)
    return value is before or bool(not callable(value) and type(value) is type(before) and value == before)


#: The arguments of SB3's constructor and those added to them.
_SHARED = [
    name
    for kind in (OnPolicyAlgorithm, PolicyGradientAlgorithm)
    for name, its in inspect.signature(kind).parameters.items()
    if its.kind is not inspect.Parameter.VAR_KEYWORD and name != "_init_setup_model"
]


def shared(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return those arguments of an algorithm's constructor, given as its ``locals()``, that all algorithms have."""
    return {name: arguments[name] for name in _SHARED if name in arguments}

"""REINFORCE: make each action more likely in proportion to how much better than expected it turned out."""

from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch as th
from stable_baselines3.common import buffers as sb3_buffers
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, Schedule
from stable_baselines3.common.vec_env import VecEnv

from sb3_pg.common.arrays import Column, take
from sb3_pg.common.buffers import Batch, RolloutBuffer, flat_arrays, random_order, whole_batch
from sb3_pg.common.errors import ArgumentError, check_choice, check_count, check_number
from sb3_pg.common.objectives import policy_gradient, squared_error
from sb3_pg.common.policy_gradient import PolicyGradientAlgorithm
from sb3_pg.common.returns import episode_numbers, leave_one_out, leave_one_out_within, reward_to_go

SelfREINFORCE = TypeVar("SelfREINFORCE", bound="REINFORCE")

#: (observations, returns) to the baseline of each sample; see the argument ``baseline``
Baseline = Callable[[Any, np.ndarray], np.ndarray]

_BASELINES = ("value", "leave_one_out", "leave_one_out_same_start", "ema", None)

#: An episode longer than the whole of ``learn``, within these limits, is taken for one that never ends.
_SHORTEST_ENDLESS, _LONGEST = 10_000, 200_000


class REINFORCE(PolicyGradientAlgorithm):
    """The score-function policy gradient on whole episodes (Williams 1992, https://doi.org/10.1007/BF00992696).

    Ascends ``E[sum_t A_t grad log pi(a_t|s_t)]`` where ``A_t`` is the discounted reward-to-go less a baseline.
    Every sample is used once for the policy. Each update takes the same number of whole episodes from every
    environment: taking the first that finish would favour short ones. Environments that finish early are stepped
    on with the others, but what they do then is not learned from, and all are reset before the next update. A
    ``TextVecEnv`` lets them rest instead.

    An episode cut by a time limit is completed by the value network if ``baseline="value"``; the other baselines
    have none and take the cut for the end.

    Arguments of A2C are accepted where they can mean something, see ``n_steps`` and ``use_rms_prop``.

    :param policy: "MlpPolicy", "CnnPolicy", "MultiInputPolicy" or a subclass of ActorCriticPolicy
    :param env: an environment, vectorised or not, or its registered id; None only for loading
    :param learning_rate: of the optimizer, a number or schedule. Higher learns faster and less stably
    :param n_episodes: episodes per update, over all environments; rounded up to the same number from each. More
        have less variance, fewer give more updates
    :param n_steps: None, or the length of a rollout per environment as in A2C; then returns that the rollout cuts
        off are completed by the value network, which environments without an end need
    :param gamma: discount factor in [0, 1]. Higher looks further ahead, with more variance
    :param gae_lambda: 1 is REINFORCE. Lower trusts the value network for what comes later: less variance, more bias
    :param ent_coef: weight of the entropy bonus, a number or schedule. Higher explores more
    :param vf_coef: weight of the value loss in the joint step, a number or schedule
    :param max_grad_norm: gradients are scaled down to this norm; None does not clip. Lower is steadier and slower
    :param rms_prop_eps: RMSprop's epsilon, if ``use_rms_prop``. Higher makes smaller steps
    :param use_rms_prop: A2C's optimizer instead of the policy's (Adam)
    :param use_sde: generalised state-dependent exploration (Box actions only)
    :param sde_sample_freq: new gSDE noise every so many steps; -1 only at the start of a rollout
    :param rollout_buffer_class: a subclass of SB3's, or of ours for whole episodes; None chooses
    :param rollout_buffer_kwargs: its arguments
    :param normalize_advantage: whether advantages get mean 0 and deviation 1 over the batch
    :param stats_window_size: episodes over which the logged return and length are averaged
    :param tensorboard_log: folder for TensorBoard; None writes none
    :param policy_kwargs: arguments of the policy class; not changed
    :param verbose: 0 says nothing, 1 says what runs and logs to the screen, 2 more
    :param seed: of all random generators; the same seed gives the same run
    :param device: "cpu", "cuda" or "auto"
    :param _init_setup_model: False leaves the networks to be made by ``load``
    :param baseline: what the return is compared with. "value": the value network. "leave_one_out": the mean
        return of the batch's other episodes (:func:`sb3_pg.common.returns.leave_one_out`).
        "leave_one_out_same_start": of those of them that began with the same observation, as the responses to one
        prompt do. "ema": a moving average of past returns. None: nothing. Or a function from (observations of the
        batch, their returns-to-go, (n,)) to (n,) numbers; to add no bias it must not use the returns of the same
        episode
    :param ema_decay: in [0, 1), of "ema". Higher remembers longer
    :param batch_size: samples per gradient step of the policy, in one pass over the batch. None makes a single
        step, as in the paper; smaller makes more, noisier steps
    :param n_critic_updates: further passes that fit the value network only. More fit it better
    :param critic_batch_size: minibatch of those passes
    :param max_episode_steps: raise an error when an episode is longer. None takes the length of ``learn``, at least
        10,000 and at most 200,000
    :param engine: "auto" takes the fastest network that computes the same; "autograd" always takes torch's
    :raises ArgumentError: an argument that cannot work, or two that contradict each other
    """

    archive_name: ClassVar[str] = "REINFORCE"
    n_steps: int | None  # type: ignore[assignment]

    def __init__(
        self,
        policy: str | type[ActorCriticPolicy],
        env: GymEnv | str | None,
        learning_rate: float | Schedule = 5e-3,
        n_episodes: int = 8,
        n_steps: int | None = None,
        gamma: float = 0.99,
        gae_lambda: float = 1.0,
        ent_coef: float | Schedule = 0.0,
        vf_coef: float | Schedule = 0.5,
        max_grad_norm: float | None = 0.5,
        rms_prop_eps: float = 1e-5,
        use_rms_prop: bool = False,
        use_sde: bool = False,
        sde_sample_freq: int = -1,
        rollout_buffer_class: type[sb3_buffers.RolloutBuffer] | None = None,
        rollout_buffer_kwargs: dict[str, Any] | None = None,
        normalize_advantage: bool = True,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
        _init_setup_model: bool = True,
        *,
        baseline: str | Baseline | None = "value",
        ema_decay: float = 0.9,
        batch_size: int | None = None,
        n_critic_updates: int = 4,
        critic_batch_size: int = 64,
        max_episode_steps: int | None = None,
        engine: str = "auto",
    ) -> None:
        super().__init__(
            policy,
            env,
            learning_rate=learning_rate,
            n_steps=n_steps,  # type: ignore[arg-type]
            gamma=gamma,
            gae_lambda=gae_lambda,
            ent_coef=ent_coef,
            vf_coef=vf_coef,
            max_grad_norm=max_grad_norm,
            use_sde=use_sde,
            sde_sample_freq=sde_sample_freq,
            rollout_buffer_class=rollout_buffer_class,
            rollout_buffer_kwargs=rollout_buffer_kwargs,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            policy_kwargs=policy_kwargs,
            verbose=verbose,
            seed=seed,
            device=device,
            engine=engine,
        )
        self.n_episodes = n_episodes
        self.baseline = baseline
        self.ema_decay = ema_decay
        self.batch_size = batch_size
        self.n_critic_updates = n_critic_updates
        self.critic_batch_size = critic_batch_size
        self.normalize_advantage = normalize_advantage
        self.max_episode_steps = max_episode_steps
        self._return_ema: float | None = None  # of baseline="ema"; saved and restored like any attribute
        if use_rms_prop and "optimizer_class" not in self.policy_kwargs:
            self.policy_kwargs["optimizer_class"] = th.optim.RMSprop
            self.policy_kwargs["optimizer_kwargs"] = {"alpha": 0.99, "eps": rms_prop_eps, "weight_decay": 0}
        if _init_setup_model:
            self._setup_model()

    def _check_arguments(self) -> None:
        super()._check_arguments()
        check_count("n_episodes", self.n_episodes)
        for name in ("n_steps", "batch_size", "max_episode_steps"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name))
        check_count("n_critic_updates", self.n_critic_updates, low=0)
        check_count("critic_batch_size", self.critic_batch_size)
        check_number("ema_decay", self.ema_decay)
        if not self.ema_decay < 1:
            raise ArgumentError(f"`ema_decay` must be below 1, not {self.ema_decay!r}: the average would never move.")
        if not callable(self.baseline):
            check_choice("baseline", self.baseline, _BASELINES)
        if self.baseline != "value":
            for name, neutral in (("n_steps", None), ("gae_lambda", 1.0)):
                if getattr(self, name) != neutral:
                    raise ArgumentError(
                        f"`{name}={getattr(self, name)!r}` needs the value network, but baseline={self.baseline!r} "
                        f"has none. Use baseline='value', or leave out {name}."
                    )
        if self.n_steps is None and self.rollout_buffer_class is not None:
            ours = (sb3_buffers.RolloutBuffer, sb3_buffers.DictRolloutBuffer)
            if self.rollout_buffer_class not in ours and not issubclass(self.rollout_buffer_class, RolloutBuffer):
                raise ArgumentError(
                    f"`rollout_buffer_class={self.rollout_buffer_class.__name__}` has a fixed length, but whole "
                    "episodes differ in theirs. Derive it from sb3_pg.common.buffers.RolloutBuffer, or pass n_steps."
                )

    def _make_rollout_buffer(self) -> sb3_buffers.RolloutBuffer:
        length, self.n_steps = self.n_steps, self.n_steps or 512  # a first guess: the buffer of episodes grows
        buffer = super()._make_rollout_buffer()
        self.n_steps = length
        return buffer

    # -------------------------------------------------------------------- act

    def _start_rollout(self, env: VecEnv, rollout_buffer: sb3_buffers.RolloutBuffer) -> None:
        if self.n_steps is None and not self._rollout_is_unfinished:
            # An environment that can rest after its episodes spares the steps of which nothing is learned.
            rest_after = getattr(env, "rest_after", None)
            if rest_after is not None or not np.all(self._last_episode_starts):
                self._last_obs = env.reset()  # type: ignore[assignment]
                self._last_episode_starts = np.ones(env.num_envs, dtype=bool)
            if rest_after is not None:
                rest_after(self._episodes_per_env)
            self._n_finished = np.zeros(env.num_envs, dtype=int)
            self._n_running = np.zeros(env.num_envs, dtype=int)
            self._longest_episode = self.max_episode_steps or min(
                max(self._total_timesteps, _SHORTEST_ENDLESS), _LONGEST
            )
        super()._start_rollout(env, rollout_buffer)

    def _record(self, buffer: sb3_buffers.RolloutBuffer, dones: np.ndarray, *recorded: Any) -> None:
        super()._record(buffer, dones, *recorded)
        if self.n_steps is not None:
            return
        self._n_running += 1
        if dones.any():
            self._n_running[dones] = 0
            self._n_finished += dones
        elif buffer.pos > self._longest_episode:
            self._check_endless()

    def _rollout_is_complete(self, rollout_buffer: sb3_buffers.RolloutBuffer, n_rollout_steps: int) -> bool:
        if self.n_steps is not None:
            return super()._rollout_is_complete(rollout_buffer, n_rollout_steps)
        return int(self._n_finished.min()) >= self._episodes_per_env

    @property
    def _episodes_per_env(self) -> int:
        return -(-self.n_episodes // self.n_envs)

    def _check_endless(self) -> None:
        env = int(self._n_running.argmax())
        if self._n_running[env] > self._longest_episode:
            raise ArgumentError(
                f"Environment {env} has not ended its episode in {self._n_running[env]} steps, and REINFORCE learns "
                "from whole episodes. Wrap it in gymnasium.wrappers.TimeLimit, pass `n_steps` to learn from rollouts "
                f"of that length, or raise `max_episode_steps` (now {self._longest_episode}) if they are that long."
            )

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_n_finished", "_n_running"]

    # ------------------------------------------------------------------ judge

    def _bootstrap(self, buffer: sb3_buffers.RolloutBuffer, new_obs: Any) -> th.Tensor:
        if self.baseline == "value":
            return super()._bootstrap(buffer, new_obs)
        self._truncations = []  # no value network: a cut episode ends there
        return th.zeros(buffer.n_envs)

    # ------------------------------------------------------------------- step

    def train(self) -> None:
        """Make one pass over the episodes with the policy, then fit the value network."""
        self.policy.set_training_mode(True)
        self._update_learning_rate(self.policy.optimizer)
        network = self._refreshed_network()
        keep = self._samples_to_use()
        advantages = self._advantages(keep)
        batch = whole_batch(self.rollout_buffer, network, keep)
        batch.advantages = network.asarray(advantages.astype(np.float32))
        if self.normalize_advantage:
            batch.advantages = self._normalized(batch.advantages)
        ent_coef, vf_coef = self._coefficient("ent_coef"), self._coefficient("vf_coef")
        if self.baseline != "value":
            vf_coef = 0.0

        policy_losses, value_losses, entropies = (Column(batch.returns) for _ in range(3))
        order = None if self.batch_size is None else random_order(batch, self.rollout_buffer)
        for minibatch in batch.minibatches(self.batch_size, order, even=True):
            n = len(minibatch)
            log_prob, entropy, value = network.evaluate(minibatch.observations, minibatch.actions)
            loss, d_log_prob = policy_gradient(log_prob, minibatch.advantages)
            value_loss, d_value = squared_error(value, minibatch.returns)
            network.backward(d_log_prob / n, -ent_coef / n, d_value * (vf_coef / n) if vf_coef else None)
            self._take_step(minibatch, self.max_grad_norm)
            policy_losses.add(loss)
            value_losses.add(value_loss)
            entropies.add(entropy)
        if self.baseline == "value":
            self._fit_critic(batch, value_losses)

        self._n_updates += 1
        self.logger.record("train/entropy_loss", -entropies.mean())
        self.logger.record("train/policy_loss", policy_losses.mean())
        self.logger.record("train/value_loss", value_losses.mean())
        self.logger.record("train/samples_used", len(batch) / keep.size)
        self._record_common()

    def _samples_to_use(self) -> np.ndarray:
        """Which steps of the rollout belong to the episodes that each environment was asked for, (n_steps, n_envs)."""
        n_steps, n_envs = self.rollout_buffer.pos, self.rollout_buffer.n_envs
        if self.n_steps is not None:
            return np.ones((n_steps, n_envs), dtype=bool)
        keep: np.ndarray = episode_numbers(self._dones())[0] < self._episodes_per_env
        return keep

    def _dones(self) -> np.ndarray:
        n_steps, last = self.rollout_buffer.pos, np.asarray(self._last_episode_starts)
        return np.concatenate([self.rollout_buffer.episode_starts[1:n_steps], last[None]]).astype(bool)

    def _advantages(self, keep: np.ndarray) -> np.ndarray:
        """Reward-to-go less the baseline, of the samples in use, (n,)."""
        buffer, n_steps = self.rollout_buffer, len(keep)
        advantages: np.ndarray
        if self.baseline == "value":
            advantages = buffer.advantages[:n_steps][keep]
            return advantages
        dones = self._dones()
        returns = reward_to_go(buffer.rewards[:n_steps], dones, self.gamma)
        buffer.returns[:n_steps] = returns
        episode, step = episode_numbers(dones)
        episode = episode + self._episodes_per_env * np.arange(dones.shape[1])
        advantages = returns[keep] - self._baseline_of(returns[keep], episode[keep], step[keep], keep)
        return advantages

    def _baseline_of(self, returns: np.ndarray, episode: np.ndarray, step: np.ndarray, keep: np.ndarray) -> Any:
        """What each return is compared with, if not the value network: (n,) or one number."""
        if self.baseline == "leave_one_out":
            return leave_one_out(returns, episode, step)[0]
        if self.baseline == "leave_one_out_same_start":
            return leave_one_out_within(self._starts(episode, step, keep), returns, episode, step)
        if self.baseline == "ema":
            # The average of *earlier* batches, so that it does not depend on this one's actions.
            before, now = self._return_ema, float(returns.mean())
            self._return_ema = now if before is None else self.ema_decay * before + (1 - self.ema_decay) * now
            return before or 0.0
        if not callable(self.baseline):
            return 0.0
        observations = take(flat_arrays(self.rollout_buffer)[0], np.flatnonzero(keep))
        baseline = np.asarray(self.baseline(observations, returns), dtype=np.float64)
        if baseline.shape != returns.shape or not np.isfinite(baseline).all():
            raise ArgumentError(
                f"`baseline` must return one finite number for each of the {len(returns)} samples, but gave an "
                f"array of shape {baseline.shape} with {int((~np.isfinite(baseline)).sum())} that are not finite."
            )
        return baseline

    def _starts(self, episode: np.ndarray, step: np.ndarray, keep: np.ndarray) -> np.ndarray:
        """A number for each sample, the same in episodes that began with the same observation, (n,)."""
        is_first = step == 0
        first: Any = take(flat_arrays(self.rollout_buffer)[0], np.flatnonzero(keep)[is_first])
        parts = first.values() if isinstance(first, dict) else [first]
        rows = np.concatenate([x.reshape(len(x), -1) for x in parts], axis=1)
        of_episode = np.zeros(int(episode.max()) + 1, dtype=np.int64)
        of_episode[episode[is_first]] = np.unique(rows, axis=0, return_inverse=True)[1].reshape(-1)
        group: np.ndarray = of_episode[episode]
        return group

    def _fit_critic(self, batch: Batch, losses: Column) -> None:
        """Further passes for the value network alone; whatever the actor uses too stays as it is."""
        self.network.find_actor(batch.observations, batch.actions)
        if self.n_critic_updates:
            losses.take()  # of the value network before them
        batch = batch.for_critic()
        for _ in range(self.n_critic_updates):
            order = random_order(batch, self.rollout_buffer)
            for minibatch in batch.minibatches(self.critic_batch_size, order, even=True):
                _, _, value = self.network.evaluate(minibatch.observations, None)
                loss, d_value = squared_error(value, minibatch.returns)
                self.network.backward(None, None, d_value / len(minibatch))
                self._take_step(minibatch, self.max_grad_norm, hold_actor=True)
                losses.add(loss)

    def learn(
        self: SelfREINFORCE,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 1,
        tb_log_name: str = "REINFORCE",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfREINFORCE:
        """See :meth:`PolicyGradientAlgorithm.learn`."""
        return super().learn(total_timesteps, callback, log_interval, tb_log_name, reset_num_timesteps, progress_bar)

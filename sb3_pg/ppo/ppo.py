"""PPO: several epochs of minibatch steps on an objective that loses interest when the policy has moved enough."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, TypeVar

import torch as th
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, Schedule
from stable_baselines3.common.utils import ConstantSchedule, FloatSchedule, update_learning_rate

from sb3_pg.common.arrays import Array, Column, namespace
from sb3_pg.common.buffers import Batch, epoch, whole_batch
from sb3_pg.common.errors import ArgumentError, check_choice, check_count, check_number
from sb3_pg.common.networks import Network
from sb3_pg.common.objectives import (
    clipped_squared_error,
    clipped_surrogate,
    kl_penalty,
    simple_policy_optimization,
    squared_error,
    surrogate,
)
from sb3_pg.common.policy_gradient import PolicyGradientAlgorithm

SelfPPO = TypeVar("SelfPPO", bound="PPO")

#: (log_ratio, advantage) to (loss, d loss / d log_prob), arrays of shape (n,)
Objective = Callable[[Array, Array], tuple[Array, Array]]


def adapted_kl_coef(kl_coef: float, kl: float, desired_kl: float) -> float:
    """The rule of the paper's second algorithm (Schulman et al. 2017, section 4)."""
    if kl > 1.5 * desired_kl:
        return 2.0 * kl_coef
    return kl_coef / 2.0 if kl < desired_kl / 1.5 else kl_coef


def adapted_learning_rate(learning_rate: float, kl: float, desired_kl: float) -> float:
    """The rule of rsl_rl and rl_games: keep the KL within a factor of two of the desired one."""
    if kl > 2.0 * desired_kl:
        return max(learning_rate / 1.5, 1e-5)
    return min(learning_rate * 1.5, 1e-2) if kl < desired_kl / 2.0 else learning_rate


class EarlyStopping:
    """Stop the policy when the KL of a minibatch exceeds 1.5 ``target_kl``, and take back the step that led there.

    The factor is SB3's. The step is noticed by the next minibatch, so the parameters before each step are kept
    until then; the critic goes on without the policy.

    :param network: whose actor is watched
    :param target_kl: in nats; None never stops and costs nothing
    """

    def __init__(self, network: Network, target_kl: float | None) -> None:
        self.network = network
        self.limit = None if target_kl is None else 1.5 * target_kl
        self.stopped = False
        self._before_step: Array | None = None

    def begin(self, batch: Batch) -> None:
        """Look up what belongs to the actor."""
        if self.limit is not None:
            self.network.find_actor(batch.observations, batch.actions)

    def allows(self, log_ratio: Array) -> bool:
        """Whether the policy may take a step on the minibatch with these log-ratios."""
        if self.limit is None or self.stopped:
            return not self.stopped
        if float(kl_penalty(log_ratio)[0].mean()) > self.limit:
            self.stopped = True
            if self._before_step is not None:
                self.network.set_actor(self._before_step)
        else:
            self._before_step = self.network.get_actor()
        return not self.stopped

    def end(self, minibatch: Batch) -> None:
        """The update's last step has no next minibatch that could notice it, so it is checked on its own."""
        if self.limit is not None and not self.stopped:
            log_prob, _, _ = self.network.evaluate(minibatch.observations, minibatch.actions)
            self.allows(log_prob - minibatch.old_log_prob)


#: The numbers of so many samples are kept for logging before they are summed up.
_KEPT_SAMPLES = 1 << 14


class Record:
    """What an update logs of its minibatches, as means over all their samples.

    :param like: an array with one row for each sample of the rollout
    :param clip_range: ratios further from one than this count as clipped
    """

    def __init__(self, like: Array, clip_range: float) -> None:
        self.value_loss, self._log_ratio, self._loss, self._entropy = (Column(like[:_KEPT_SAMPLES]) for _ in range(4))
        self._clip_range = clip_range
        self._sums = dict.fromkeys(("value_loss", "loss", "entropy", "kl", "clip_fraction"), 0.0)
        self._counts = dict.fromkeys(self._sums, 0)
        self._at_last_end = (0.0, 0)

    def add(self, log_ratio: Array, loss: Array, entropy: Array) -> None:
        """Of a minibatch on which the policy takes a step."""
        self._log_ratio.add(log_ratio)
        self._loss.add(loss)
        self._entropy.add(entropy)
        if len(self._loss) >= _KEPT_SAMPLES:
            self._sum_up()

    def end_epoch(self) -> float:
        """The KL of the steps since the last epoch's end, NaN if the policy took none."""
        self._sum_up()
        kl, n = self._sums["kl"], self._counts["kl"]
        (kl_before, n_before), self._at_last_end = self._at_last_end, (kl, n)
        return (kl - kl_before) / (n - n_before) if n > n_before else math.nan

    def _sum_up(self) -> None:
        log_ratio = self._log_ratio.take()
        kl, _ = kl_penalty(log_ratio)
        columns = (self.value_loss.take(), self._loss.take(), self._entropy.take(), kl, self._outside(log_ratio))
        for name, x in zip(self._sums, columns, strict=True):
            self._sums[name] += float(x.sum())
            self._counts[name] += len(x)

    def means(self) -> dict[str, float]:
        """Over all epochs; NaN of what no minibatch contributed to."""
        return {name: x / self._counts[name] if self._counts[name] else math.nan for name, x in self._sums.items()}

    def _outside(self, log_ratio: Array) -> Array:
        xp = namespace(log_ratio)
        return xp.astype(xp.abs(xp.expm1(log_ratio)) > self._clip_range, log_ratio.dtype)


class PPO(PolicyGradientAlgorithm):
    """Proximal policy optimization (Schulman et al. 2017, https://arxiv.org/abs/1707.06347).

    With default arguments every update is SB3's PPO's. The arguments after ``_init_setup_model`` are ours; they
    choose an objective or a rule and combine freely unless said otherwise.

    :param policy: "MlpPolicy", "CnnPolicy", "MultiInputPolicy" or a subclass of ActorCriticPolicy
    :param env: an environment, vectorised or not, or its registered id; None only for loading
    :param learning_rate: of the optimizer, a number or schedule. Higher learns faster and less stably
    :param n_steps: steps per environment and update. More give better estimates, fewer give more updates
    :param batch_size: samples per gradient step. Smaller makes more, noisier steps
    :param n_epochs: passes over each rollout. More use the samples better until the policy has left them behind
    :param gamma: discount factor in [0, 1]. Higher looks further ahead, with more variance
    :param gae_lambda: in [0, 1]. Lower has less variance and more bias from the critic
    :param clip_range: how far the probability ratio may leave one before its gradient stops, a number or
        schedule. Lower is more cautious
    :param clip_range_vf: how far the value may move from its old prediction, in units of the return; the loss is
        the larger of the clipped and the unclipped one. None does not clip
    :param normalize_advantage: True or "minibatch" gives advantages mean 0 and deviation 1 in each minibatch,
        "batch" over the whole rollout, False leaves them
    :param ent_coef: weight of the entropy bonus, a number or schedule. Higher explores more
    :param vf_coef: weight of the value loss, a number or schedule. Matters where features are shared, and by
        way of ``max_grad_norm``
    :param max_grad_norm: gradients are scaled down to this norm; None does not clip. Lower is steadier and slower
    :param use_sde: generalised state-dependent exploration (Box actions only)
    :param sde_sample_freq: new gSDE noise every so many steps; -1 only at the start of a rollout
    :param rollout_buffer_class: a subclass of SB3's; None chooses
    :param rollout_buffer_kwargs: its arguments
    :param target_kl: stop the policy's part of an update when the estimated KL of a minibatch exceeds 1.5 times
        this, and take back the step that led there; the critic finishes its epochs. None never stops
    :param stats_window_size: episodes over which the logged return and length are averaged
    :param tensorboard_log: folder for TensorBoard; None writes none
    :param policy_kwargs: arguments of the policy class; not changed
    :param verbose: 0 says nothing, 1 says what runs and logs to the screen, 2 more
    :param seed: of all random generators; the same seed gives the same run
    :param device: "cpu", "cuda" or "auto"
    :param _init_setup_model: False leaves the networks to be made by ``load``
    :param objective: "clip" (PPO's), "spo" (a parabola in place of the clip, Xie et al. 2024), "surrogate" (no
        clip; for use with ``kl_coef``), or a function from (log_ratio, advantage) to (loss, derivative of the loss
        with respect to the log-probability), see :mod:`sb3_pg.common.objectives`
    :param clip_range_high: a different clip range above one (``clip_range`` then holds below one only). Higher
        lets actions of low probability grow faster
    :param dual_clip: bound on the loss of bad actions in units of their advantage, above 1; None has no bound.
        Lower is more cautious
    :param kl_coef: weight of a KL(old || new) penalty, a number or schedule. Higher keeps closer to the old policy
    :param adaptive_kl_coef: double or halve ``kl_coef`` after each update to keep the KL near ``desired_kl``
    :param adaptive_lr: multiply or divide the learning rate by 1.5 after each epoch to keep the KL near
        ``desired_kl``, within [1e-5, 1e-2], starting from ``learning_rate``
    :param desired_kl: what both adapt to, in nats per update. Higher makes larger updates
    :param engine: "auto" takes the fastest network that computes the same; "autograd" always takes torch's
    :raises ArgumentError: an argument that cannot work, or two that contradict each other
    """

    archive_name: ClassVar[str] = "PPO"

    def __init__(
        self,
        policy: str | type[ActorCriticPolicy],
        env: GymEnv | str | None,
        learning_rate: float | Schedule = 3e-4,
        n_steps: int = 2048,
        batch_size: int = 64,
        n_epochs: int = 10,
        gamma: float = 0.99,
        gae_lambda: float = 0.95,
        clip_range: float | Schedule = 0.2,
        clip_range_vf: float | Schedule | None = None,
        normalize_advantage: bool | str = True,
        ent_coef: float | Schedule = 0.0,
        vf_coef: float | Schedule = 0.5,
        max_grad_norm: float | None = 0.5,
        use_sde: bool = False,
        sde_sample_freq: int = -1,
        rollout_buffer_class: type[RolloutBuffer] | None = None,
        rollout_buffer_kwargs: dict[str, Any] | None = None,
        target_kl: float | Schedule | None = None,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
        _init_setup_model: bool = True,
        *,
        objective: str | Objective = "clip",
        clip_range_high: float | Schedule | None = None,
        dual_clip: float | None = None,
        kl_coef: float | Schedule = 0.0,
        adaptive_kl_coef: bool = False,
        adaptive_lr: bool = False,
        desired_kl: float = 0.01,
        engine: str = "auto",
    ) -> None:
        super().__init__(
            policy,
            env,
            learning_rate=learning_rate,
            n_steps=n_steps,
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
        self.batch_size = batch_size
        self.n_epochs = n_epochs
        self.clip_range = clip_range
        self.clip_range_vf = clip_range_vf
        self.normalize_advantage = normalize_advantage
        self.target_kl = target_kl
        self.objective = objective
        self.clip_range_high = clip_range_high
        self.dual_clip = dual_clip
        self.kl_coef = kl_coef
        self.adaptive_kl_coef = adaptive_kl_coef
        self.adaptive_lr = adaptive_lr
        self.desired_kl = desired_kl
        # What the two rules have arrived at; None until they have moved. Saved and restored like any attribute.
        self._adapted_kl_coef: float | None = None
        self._adapted_lr: float | None = None
        if _init_setup_model:
            self._setup_model()

    def _setup_model(self) -> None:
        super()._setup_model()
        # Functions from here on, as SB3 leaves them.
        self.clip_range = FloatSchedule(self.clip_range)
        if self.clip_range_vf is not None:
            self.clip_range_vf = FloatSchedule(self.clip_range_vf)

    def _check_arguments(self) -> None:
        super()._check_arguments()
        for name in ("n_steps", "batch_size", "n_epochs"):
            check_count(name, getattr(self, name))
        check_number("clip_range", self.clip_range, above_low=True, or_schedule=True)
        for name in ("clip_range_vf", "clip_range_high", "target_kl"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), above_low=True, or_schedule=True)
        if self.dual_clip is not None:
            check_number("dual_clip", self.dual_clip, low=1.0, above_low=True)
        check_number("kl_coef", self.kl_coef, or_schedule=True)
        check_number("desired_kl", self.desired_kl, above_low=True)
        check_choice("normalize_advantage", self.normalize_advantage, (True, False, "minibatch", "batch"))
        if not callable(self.objective):
            check_choice("objective", self.objective, ("clip", "spo", "surrogate"))
        self._check_contradictions()
        if self.env is not None:
            self._check_rollout_size()

    def _check_contradictions(self) -> None:
        if self.objective != "clip" and (self.clip_range_high is not None or self.dual_clip is not None):
            raise ArgumentError(
                f"`clip_range_high` and `dual_clip` belong to objective='clip', not {self.objective!r}. Leave them out."
            )
        if self.adaptive_lr and not _is_constant(self.learning_rate):
            raise ArgumentError(
                "`adaptive_lr=True` and a schedule for `learning_rate` contradict each other: both set the learning "
                "rate. Pass a number, or adaptive_lr=False."
            )
        if self.adaptive_kl_coef and (not _is_constant(self.kl_coef) or self.kl_coef == 0.0):
            raise ArgumentError(
                f"`adaptive_kl_coef=True` needs a number above 0 to start from, not kl_coef={self.kl_coef!r}; "
                "the paper uses 1."
            )

    def _check_rollout_size(self) -> None:
        rollout_size = self.n_steps * self.n_envs
        if self.normalize_advantage and rollout_size < 2:
            raise ArgumentError(
                "`n_steps * n_envs` must be greater than 1 to normalise advantages. Currently "
                f"n_steps={self.n_steps} and n_envs={self.n_envs}; raise one or pass normalize_advantage=False."
            )
        if self.normalize_advantage in (True, "minibatch") and self.batch_size < 2:
            raise ArgumentError(
                f"`batch_size` must be greater than 1 to normalise advantages in it, not {self.batch_size} "
                "(SB3 issue 440). Raise it or pass normalize_advantage='batch' or False."
            )
        self._check_batch_size(self.batch_size, rollout_size)

    def train(self) -> None:
        """Improve policy and critic by ``n_epochs`` passes over the rollout."""
        self.policy.set_training_mode(True)
        self._set_learning_rate()
        network = self._refreshed_network()
        batch = whole_batch(self.rollout_buffer, network)
        if self.normalize_advantage == "batch":
            batch.advantages = self._normalized(batch.advantages)
        stopping = EarlyStopping(network, None if self.target_kl is None else self._coefficient("target_kl"))
        stopping.begin(batch)
        objective, value_loss = self._make_objective(), self._make_value_loss()
        ent_coef, vf_coef = self._coefficient("ent_coef"), self._coefficient("vf_coef")

        record = Record(batch.old_log_prob, self._coefficient("clip_range"))
        for _ in range(self.n_epochs):
            for minibatch in epoch(batch, self.rollout_buffer, network, self.batch_size):
                n = len(minibatch)
                advantages = minibatch.advantages
                if self.normalize_advantage in (True, "minibatch"):
                    advantages = self._normalized(advantages)
                log_prob, entropy, value = network.evaluate(minibatch.observations, minibatch.actions)
                log_ratio = log_prob - minibatch.old_log_prob
                loss, d_log_prob = objective(log_ratio, advantages)
                v_loss, d_value = value_loss(value, minibatch)
                record.value_loss.add(v_loss)
                if stopping.allows(log_ratio):
                    record.add(log_ratio, loss, entropy)
                    network.backward(d_log_prob / n, -ent_coef / n, d_value * (vf_coef / n))
                else:
                    network.backward(None, None, d_value * (vf_coef / n))
                self._take_step(minibatch, self.max_grad_norm, hold_actor=stopping.stopped)
            self._n_updates += 1
            kl = record.end_epoch()
            if self.adaptive_lr and not math.isnan(kl):
                self._adapt_learning_rate(kl)
        stopping.end(minibatch)
        if self.target_kl is not None:
            self.logger.record("train/early_stop", float(stopping.stopped))
        last_loss = loss.mean() - ent_coef * entropy.mean() + vf_coef * v_loss.mean()
        self._record_update(record.means(), float(last_loss))

    # ---------------------------------------------------------------- options

    def _make_objective(self) -> Objective:
        """The objective with the coefficients of this update."""
        clip_range = self._coefficient("clip_range")
        if callable(self.objective):
            objective = self.objective
        elif self.objective == "spo":
            objective = partial(simple_policy_optimization, epsilon=clip_range)
        elif self.objective == "surrogate":
            objective = surrogate
        else:
            high = clip_range if self.clip_range_high is None else self._coefficient("clip_range_high")
            objective = partial(clipped_surrogate, low=clip_range, high=high, dual_clip=self.dual_clip)
        kl_coef = self._present_kl_coef()
        return objective if kl_coef == 0.0 else _with_kl_penalty(objective, kl_coef)

    def _make_value_loss(self) -> Callable[[Array, Batch], tuple[Array, Array]]:
        if self.clip_range_vf is None:
            return lambda value, batch: squared_error(value, batch.returns)
        clip_range = self._coefficient("clip_range_vf")
        return lambda value, batch: clipped_squared_error(value, batch.returns, batch.old_values, clip_range)

    def _present_kl_coef(self) -> float:
        return self._coefficient("kl_coef") if self._adapted_kl_coef is None else self._adapted_kl_coef

    def _set_learning_rate(self) -> None:
        self._update_learning_rate(self.policy.optimizer)
        if self.adaptive_lr and self._adapted_lr is not None:
            update_learning_rate(self.policy.optimizer, self._adapted_lr)

    def _adapt_learning_rate(self, kl: float) -> None:
        present = self._coefficient("learning_rate") if self._adapted_lr is None else self._adapted_lr
        self._adapted_lr = adapted_learning_rate(present, kl, self.desired_kl)
        update_learning_rate(self.policy.optimizer, self._adapted_lr)
        self.logger.record("train/learning_rate", self._adapted_lr)

    def _record_update(self, means: dict[str, float], last_loss: float) -> None:
        """Log the means over all minibatches of the update, SB3's ``loss`` of the last; adapt the KL coefficient."""
        record = self.logger.record
        record("train/entropy_loss", -means["entropy"])
        record("train/policy_gradient_loss", means["loss"])
        record("train/value_loss", means["value_loss"])
        record("train/approx_kl", means["kl"])
        record("train/clip_fraction", means["clip_fraction"])
        record("train/loss", last_loss)
        record("train/clip_range", self._coefficient("clip_range"))
        if self.clip_range_vf is not None:
            record("train/clip_range_vf", self._coefficient("clip_range_vf"))
        if self._present_kl_coef() > 0.0:
            record("train/kl_coef", self._present_kl_coef())
        if self.adaptive_kl_coef:
            self._adapted_kl_coef = adapted_kl_coef(self._present_kl_coef(), means["kl"], self.desired_kl)
        self._record_common()

    def learn(
        self: SelfPPO,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 1,
        tb_log_name: str = "PPO",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfPPO:
        """See :meth:`PolicyGradientAlgorithm.learn`."""
        return super().learn(total_timesteps, callback, log_interval, tb_log_name, reset_num_timesteps, progress_bar)


def _with_kl_penalty(objective: Objective, kl_coef: float) -> Objective:
    def penalised(log_ratio: Array, advantage: Array) -> tuple[Array, Array]:
        loss, derivative = objective(log_ratio, advantage)
        penalty, d_penalty = kl_penalty(log_ratio)
        return loss + kl_coef * penalty, derivative + kl_coef * d_penalty

    return penalised


def _is_constant(value: Any) -> bool:
    """Whether a coefficient is a number, perhaps wrapped as SB3 and the zoo wrap constants."""
    while isinstance(value, FloatSchedule):
        value = value.value_schedule
    return isinstance(value, ConstantSchedule) or not callable(value)

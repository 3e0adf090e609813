"""PPO: several epochs of minibatch steps on an objective that loses interest when the policy has moved enough."""

import math
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import torch as th
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, Schedule
from stable_baselines3.common.utils import FloatSchedule

from sb3_pg.common import workers
from sb3_pg.common.advantages import Baseline
from sb3_pg.common.arrays import Array
from sb3_pg.common.batch import Batch, episode_parts, epoch, has_own_get
from sb3_pg.common.groups import MaxGradNorm
from sb3_pg.common.objectives import clipped_squared_error, squared_error
from sb3_pg.common.policy_gradient import PolicyGradientAlgorithm, shared
from sb3_pg.common.presets import takes_preset
from sb3_pg.common.rollout import Rollout
from sb3_pg.ppo.figures import Means
from sb3_pg.ppo.options import Objective, check_arguments, clip_ranges, learns_from_advantages_alone, make_objective
from sb3_pg.ppo.stopping import EarlyStopping, adapted_kl_coef, adapted_learning_rate

SelfPPO = TypeVar("SelfPPO", bound="PPO")


class PPO(PolicyGradientAlgorithm):
    """Proximal policy optimization (Schulman et al. 2017, https://arxiv.org/abs/1707.06347).

    With default arguments every update is SB3's PPO's. The arguments after ``_init_setup_model`` are ours; they
    choose an objective or a rule and combine freely unless said otherwise.

    :param policy: "MlpPolicy", "CnnPolicy", "MultiInputPolicy", one of the same with a memory ("MlpLstmPolicy",
        "MlpGruPolicy" and so on), a language model ("CausalLMPolicy", "Seq2SeqLMPolicy"), or a subclass of
        ActorCriticPolicy
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
        the larger of the clipped and the unclipped one. Lower is slower and steadier; None does not clip
    :param normalize_advantage: True or "minibatch" gives advantages mean 0 and deviation 1 in each minibatch,
        "batch" over the whole rollout, False leaves them. "running" is "batch", but divides by the root mean square of
        the deviations of past rollouts where that is larger, so that a rollout without news moves the policy little:
        slower, but what is learned stays learned
    :param ent_coef: weight of the entropy bonus, a number or schedule. Higher explores more
    :param vf_coef: weight of the value loss, a number or schedule. Matters where features are shared, and by
        way of ``max_grad_norm``
    :param max_grad_norm: gradients are scaled down to this norm; None does not clip. A pair is for the actor's and the
        critic's gradients apart. Lower is steadier and slower
    :param use_sde: generalised state-dependent exploration (Box actions only)
    :param sde_sample_freq: new gSDE noise every so many steps; -1 only at the start of a rollout. Higher explores more
        smoothly
    :param rollout_buffer_class: a subclass of SB3's; None chooses
    :param rollout_buffer_kwargs: its arguments
    :param target_kl: stop the policy's part of an update when the estimated KL of a minibatch exceeds 1.5 times
        this, and take back the step that led there; the critic finishes its epochs. Lower stops sooner; None never
    :param stats_window_size: episodes over which the logged return and length are averaged. Higher is smoother
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
    :param adaptive_lr: multiply or divide ``learning_rate`` by 1.5 after each epoch to keep the KL near
        ``desired_kl``, within [1e-5, 1e-2]
    :param desired_kl: what both adapt to, in nats per update. Higher makes larger updates
    :param ratio: of what probabilities the objective takes the ratio. "step": of each action. "sequence": the geometric
        mean of those of all actions of an episode (GSPO, Zheng et al. 2025), which is nearer to one, so ``clip_range``
        should be a hundredth of the usual; minibatches are then made of whole episodes
    :param baseline: what the return is compared with. "value": the value network (GAE). The others compare whole
        episodes and leave the value network alone, see :class:`sb3_pg.REINFORCE`; "group" makes this GRPO
    :param scale_rewards: what the differences of baseline="group" are divided by, with TRL's names. "group": their
        deviation in the group, so that groups count alike. "batch": that of all returns, so that groups whose returns
        differ more count for more. None: nothing (Dr. GRPO). Refused with other baselines
    :param ema_decay: in [0, 1), of the baseline "ema" and of normalize_advantage="running". Higher remembers longer
    :param loss_average: how the samples of policy and value loss are averaged. "step": all alike. "sequence": over each
        episode, then over episodes, so that a step of a long one counts for less. A whole number L: the sum over each
        episode, divided by L, then over episodes; a larger L makes smaller gradients.
    :param n_episodes: None, or learn from rollouts of so many whole episodes, over all environments, rounded up to
        the same number from each, instead of ``n_steps``. A baseline other than "value" without it takes all episodes
        that begin within ``n_steps``
    :param max_episode_steps: raise an error when an episode is longer, where whole ones are learned from. None takes
        the length of ``learn``, at least 10,000 and at most 200,000
    :param use_masking: choose and learn among allowed actions only, where the environment has a method
        ``action_masks()``, see :mod:`sb3_pg.common.masks`. False ignores it
    :param sequence_length: a recurrent policy learns from stretches of episodes of at most so many steps, each from the
        memory that it began with. None learns from whole ones. Shorter is faster and forgets how older steps
        matter. Refused for policies without a memory
    :param critic_learning_rate: of the critic alone, a number or schedule; what it shares with the actor learns with
        ``learning_rate``. None takes that for both. Higher fits the values faster
    :param critic_optimizer_kwargs: options of the optimizer for the critic in place of ``optimizer_kwargs``, such as
        {"weight_decay": 1e-3}; None has none
    :param engine: "auto" takes the fastest engine that computes the same; "autograd" always takes torch's
    :raises ArgumentError: an argument that cannot work, or two that contradict each other
    """

    archive_name: ClassVar[str] = "PPO"
    _changed_by_updates: ClassVar[tuple[str, ...]] = (*PolicyGradientAlgorithm._changed_by_updates, "kl_coef")

    @takes_preset
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
        max_grad_norm: MaxGradNorm = 0.5,
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
        ratio: str = "step",
        baseline: str | Baseline | None = "value",
        scale_rewards: str | None = "group",
        ema_decay: float = 0.9,
        loss_average: str | int = "step",
        n_episodes: int | None = None,
        max_episode_steps: int | None = None,
        use_masking: bool = True,
        sequence_length: int | None = None,
        engine: str = "auto",
        critic_learning_rate: float | Schedule | None = None,
        critic_optimizer_kwargs: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(**shared(locals()))
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
        self.ratio = ratio
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
        check_arguments(self)

    def _needs_log_probs(self, rollout: Rollout) -> bool:
        """Return False if the update is a single step, from the very policy that acted."""
        n_pieces = -(-rollout.n_steps * rollout.n_envs // self.batch_size)
        is_single = self.n_epochs == 1 and self.target_kl is None and workers.least(n_pieces) == 1
        return not is_single or rollout.n_known > 0 or has_own_get(type(rollout.buffer))

    def train(self) -> None:
        """Improve policy and critic by ``n_epochs`` passes over the rollout."""
        rollout, engine = self.rollout, self._refreshed_network()
        self.policy.set_training_mode(True)
        self._update_learning_rate(self.policy.optimizer)
        batch = self._batch(rollout)
        if self.ratio == "sequence" and batch.sequences is None:
            batch.sequences = episode_parts(rollout)[batch.rows]
        normalize = self.normalize_advantage in (True, "minibatch")
        if self.normalize_advantage in ("batch", "running"):
            batch.advantages = self._normalized(batch)
        stopping = EarlyStopping(engine, batch, None if self.target_kl is None else self._coefficient("target_kl"))
        kl_coef = self._coefficient("kl_coef")
        objective, value_loss = make_objective(self, kl_coef), self._make_value_loss()
        ent_coef = self._coefficient("ent_coef")
        has_critic = self.baseline == "value"
        vf_coef = self._coefficient("vf_coef") if has_critic else 0.0

        means = Means(batch.returns, *clip_ranges(self), by_sequence=self.ratio == "sequence")
        alone = learns_from_advantages_alone(self, kl_coef, ent_coef) and self._may_leave_out(batch)
        for _ in range(self.n_epochs):
            minibatches = epoch(batch, rollout, engine, self.batch_size, normalize=normalize, only_advantages=alone)
            for minibatch in minibatches:
                # r = pi(a|s) / pi_old(a|s), by its logarithm
                evaluation = engine.evaluate(minibatch)
                if minibatch.old_log_prob is None:
                    self._first_look(rollout, minibatch, evaluation.log_prob)
                log_ratio: Any = evaluation.log_prob - minibatch.old_log_prob
                loss, d_log_prob = objective(log_ratio, minibatch)
                v_loss, d_v_loss = value_loss(evaluation.value, minibatch)
                d_value = vf_coef * d_v_loss if has_critic else None
                means.value_loss.add(v_loss, minibatch.weight, minibatch.share)
                if stopping.allows(log_ratio):
                    means.add(minibatch, log_ratio, loss, evaluation.entropy)
                    evaluation.backward(d_log_prob, -ent_coef, d_value)
                else:
                    evaluation.backward(d_value=d_value)
                self._take_step(minibatch, self.max_grad_norm)
            self._n_updates += 1
            if self.adaptive_lr:
                self._adapt_learning_rate(means.end_epoch())
        stopping.end(minibatch)

        figures = means.figures()
        if not has_critic:
            figures.value_loss = None
        figures.loss = minibatch.mean(loss - ent_coef * evaluation.entropy + vf_coef * v_loss)
        figures.clip_range = self._coefficient("clip_range")
        figures.clip_range_vf = None if self.clip_range_vf is None else self._coefficient("clip_range_vf")
        figures.kl_coef = kl_coef or None
        figures.early_stop = None if self.target_kl is None else float(stopping.stopped)
        self._end_update(rollout, figures)
        if self.adaptive_kl_coef:
            self.kl_coef = adapted_kl_coef(kl_coef, figures.approx_kl, self.desired_kl)

    # ---------------------------------------------------------------- options

    def _make_value_loss(self) -> Callable[[Array, Batch], tuple[Array, Array]]:
        if self.clip_range_vf is None:
            return lambda value, batch: squared_error(value, batch.returns)
        clip_range = self._coefficient("clip_range_vf")
        return lambda value, batch: clipped_squared_error(value, batch.returns, batch.old_values, clip_range)

    def _adapt_learning_rate(self, kl: float) -> None:
        if math.isnan(kl):
            return  # the policy has stopped
        self.learning_rate = adapted_learning_rate(self._coefficient("learning_rate"), kl, self.desired_kl)
        self._setup_lr_schedule()
        self._update_learning_rate(self.policy.optimizer)

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

"""REINFORCE: make each action more likely in proportion to how much better than expected it turned out."""

from collections.abc import Iterator
from typing import Any, ClassVar, TypeVar

import torch as th
from stable_baselines3.common import buffers as sb3_buffers
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, Schedule

from sb3_pg.common import workers
from sb3_pg.common.advantages import Baseline, normalized
from sb3_pg.common.arrays import Array, Column
from sb3_pg.common.batch import Batch, has_own_get, own_samples, random_order
from sb3_pg.common.errors import check_choice, check_number
from sb3_pg.common.groups import MaxGradNorm
from sb3_pg.common.objectives import policy_gradient, squared_error, surrogate
from sb3_pg.common.policy_gradient import PolicyGradientAlgorithm, shared
from sb3_pg.common.presets import takes_preset
from sb3_pg.common.rollout import Rollout
from sb3_pg.reinforce.figures import REINFORCEFigures
from sb3_pg.reinforce.options import check_arguments
from sb3_pg.reinforce.step_limit import StepLimit

SelfREINFORCE = TypeVar("SelfREINFORCE", bound="REINFORCE")


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

    :param policy: "MlpPolicy", "CnnPolicy", "MultiInputPolicy", one of the same with a memory ("MlpLstmPolicy",
        "MlpGruPolicy" and so on), a language model ("CausalLMPolicy", "Seq2SeqLMPolicy"), or a subclass of
        ActorCriticPolicy
    :param env: an environment, vectorised or not, or its registered id; None only for loading
    :param learning_rate: of the optimizer, a number or schedule. Higher learns faster and less stably
    :param n_episodes: episodes per update, over all environments; rounded up to the same number from each. More
        have less variance, fewer give more updates
    :param n_steps: None, or the length of a rollout per environment as in A2C; then returns that the rollout cuts
        off are completed by the value network, which environments without an end need
    :param gamma: discount factor in [0, 1]. Higher looks further ahead, with more variance
    :param gae_lambda: 1 is REINFORCE. Lower trusts the value network for what comes later: less variance, more bias
    :param ent_coef: weight of the entropy bonus, a number or schedule. Higher explores more
    :param vf_coef: weight of the value loss in the joint step, a number or schedule. Matters where features are
        shared, and by way of ``max_grad_norm``
    :param max_grad_norm: gradients are scaled down to this norm; None does not clip. A pair is for the actor's and the
        critic's gradients apart. Lower is steadier and slower
    :param rms_prop_eps: RMSprop's epsilon, if ``use_rms_prop``. Higher makes smaller steps
    :param use_rms_prop: A2C's optimizer instead of the policy's (Adam)
    :param use_sde: generalised state-dependent exploration (Box actions only)
    :param sde_sample_freq: new gSDE noise every so many steps; -1 only at the start of a rollout. Higher explores more
        smoothly
    :param rollout_buffer_class: a subclass of SB3's, or of ours for whole episodes; None chooses
    :param rollout_buffer_kwargs: its arguments
    :param normalize_advantage: True gives advantages mean 0 and deviation 1 over the batch, False leaves them.
        "running" divides them by the root mean square of the deviations of past batches where that is larger, so that
        a batch without news moves the policy little: slower, but what is learned stays learned
    :param stats_window_size: episodes over which the logged return and length are averaged. Higher is smoother
    :param tensorboard_log: folder for TensorBoard; None writes none
    :param policy_kwargs: arguments of the policy class; not changed
    :param verbose: 0 says nothing, 1 says what runs and logs to the screen, 2 more
    :param seed: of all random generators; the same seed gives the same run
    :param device: "cpu", "cuda" or "auto"
    :param _init_setup_model: False leaves the networks to be made by ``load``
    :param baseline: what the return is compared with. "value": the value network. "leave_one_out": the mean
        return of the batch's other episodes (:func:`sb3_pg.common.advantages.leave_one_out`).
        "leave_one_out_same_start": of those of them that began with the same observation, as the responses to one
        prompt do. "group": the mean of all that did, and the difference is divided by their deviation, as in GRPO
        (Shao et al. 2024). "ema": a moving average of past returns. None: nothing. Or a function from (observations
        of the batch, their returns-to-go, (n,)) to (n,) numbers; to add no bias it must not use the returns of the
        same episode
    :param scale_rewards: what the differences of baseline="group" are divided by, with TRL's names. "group": their
        deviation in the group, so that groups count alike. "batch": that of all returns, so that groups whose returns
        differ more count for more. None: nothing (Dr. GRPO). Refused with other baselines
    :param ema_decay: in [0, 1), of the baseline "ema" and of normalize_advantage="running". Higher remembers longer
    :param loss_average: how the samples of policy and value loss are averaged. "step": all alike. "sequence": over each
        episode, then over episodes, so that a step of a long one counts for less. A whole number L: the sum over each
        episode, divided by L, then over episodes; a larger L makes smaller gradients.
    :param batch_size: samples per gradient step of the policy, in one pass over the batch. None makes a single
        step, as in the paper; smaller makes more, noisier steps. The samples of later steps are weighted by how much
        more or less probable their actions have become since they were taken
    :param n_critic_updates: further passes that fit the value network only. More fit it better
    :param critic_batch_size: minibatch of those passes. Smaller makes more, noisier steps
    :param max_episode_steps: raise an error when an episode is longer. None takes the length of ``learn``, at least
        10,000 and at most 200,000
    :param use_masking: choose and learn among allowed actions only, where the environment has a method
        ``action_masks()``, see :mod:`sb3_pg.common.masks`. False ignores it
    :param sequence_length: a recurrent policy learns from stretches of episodes of at most so many steps, each from the
        memory that it began with. None learns from whole ones. Shorter is faster and forgets how older steps
        matter. Refused for policies without a memory
    :param critic_learning_rate: of the critic alone, a number or schedule; what it shares with the actor learns with
        ``learning_rate``. None takes that for both. Higher fits the values faster
    :param critic_optimizer_kwargs: options of the optimizer for the critic in place of ``optimizer_kwargs``, such as
        {"weight_decay": 1e-3}; None has none
    :param target_kl: the largest KL(old || new) of an update, in nats of the joint action, a number or schedule. An
        update that goes further is shortened to it. Lower is steadier and slower; None does not look
    :param engine: "auto" takes the fastest engine that computes the same; "autograd" always takes torch's
    :raises ArgumentError: an argument that cannot work, or two that contradict each other
    """

    archive_name: ClassVar[str] = "REINFORCE"
    _without_episodes: ClassVar[str] = "pass `n_steps` to learn from rollouts of that length"
    n_steps: int | None  # type: ignore[assignment]

    @takes_preset
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
        max_grad_norm: MaxGradNorm = 0.5,
        rms_prop_eps: float = 1e-5,
        use_rms_prop: bool = False,
        use_sde: bool = False,
        sde_sample_freq: int = -1,
        rollout_buffer_class: type[sb3_buffers.RolloutBuffer] | None = None,
        rollout_buffer_kwargs: dict[str, Any] | None = None,
        normalize_advantage: bool | str = True,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
        _init_setup_model: bool = True,
        *,
        baseline: str | Baseline | None = "value",
        scale_rewards: str | None = "group",
        ema_decay: float = 0.9,
        loss_average: str | int = "step",
        batch_size: int | None = None,
        n_critic_updates: int = 4,
        critic_batch_size: int = 64,
        max_episode_steps: int | None = None,
        use_masking: bool = True,
        sequence_length: int | None = None,
        engine: str = "auto",
        critic_learning_rate: float | Schedule | None = None,
        critic_optimizer_kwargs: dict[str, Any] | None = None,
        target_kl: float | Schedule | None = None,
    ) -> None:
        super().__init__(**shared(locals()))
        self.batch_size = batch_size
        self.n_critic_updates = n_critic_updates
        self.critic_batch_size = critic_batch_size
        self.normalize_advantage = normalize_advantage
        self.target_kl = target_kl
        check_choice("use_rms_prop", use_rms_prop, (True, False))
        check_number("rms_prop_eps", rms_prop_eps)
        if use_rms_prop and "optimizer_class" not in self.policy_kwargs:
            self.policy_kwargs["optimizer_class"] = th.optim.RMSprop
            given = self.policy_kwargs.get("optimizer_kwargs") or {}
            self.policy_kwargs["optimizer_kwargs"] = {"alpha": 0.99, "eps": rms_prop_eps, "weight_decay": 0, **given}
        if _init_setup_model:
            self._setup_model()

    @property
    def _learns_from_episodes(self) -> bool:
        return self.n_steps is None

    def _needs_log_probs(self, rollout: Rollout) -> bool:
        return self.batch_size is not None

    def _check_arguments(self) -> None:
        check_arguments(self)
        super()._check_arguments()

    def train(self) -> None:
        """Make one pass over the episodes with the policy, then fit the value network."""
        rollout, engine = self.rollout, self._refreshed_network()
        self.policy.set_training_mode(True)
        self._update_learning_rate(self.policy.optimizer)
        batch: Any = self._batch(rollout)
        if self.normalize_advantage:
            batch.advantages = self._normalized(batch)
        ent_coef = self._coefficient("ent_coef")
        vf_coef = self._coefficient("vf_coef") if self.baseline == "value" else 0.0

        policy_losses, value_losses, entropies = (Column(batch.returns) for _ in range(3))
        only_advantages = self.baseline != "value" and not ent_coef and self._may_leave_out(batch)
        limit = StepLimit(engine, batch, None if self.target_kl is None else self._coefficient("target_kl"))
        for minibatch in self._policy_batches(batch, only_advantages=only_advantages):
            evaluation = engine.evaluate(minibatch)
            if minibatch.old_log_prob is None:
                self._first_look(rollout, minibatch, evaluation.log_prob)
            loss, d_log_prob = self._policy_loss(evaluation.log_prob, minibatch)
            value_loss, d_value = squared_error(evaluation.value, minibatch.returns)
            evaluation.backward(d_log_prob, -ent_coef, vf_coef * d_value if vf_coef else None)
            self._take_step(minibatch, self.max_grad_norm)
            policy_losses.add(loss, minibatch.weight, minibatch.share)
            value_losses.add(value_loss, minibatch.weight, minibatch.share)
            entropies.add(evaluation.entropy)
        kl, step_share = limit.keep() or (None, None)
        if self.baseline == "value":
            if self.n_critic_updates:
                value_losses.take()  # of the value network before the fit
            epochs, batch_size = self.n_critic_updates, self.critic_batch_size
            self._fit_critic(batch, value_losses, epochs, batch_size, self.max_grad_norm, even=True)

        self._n_updates += 1
        self._end_update(
            rollout,
            REINFORCEFigures(
                entropy_loss=-entropies.mean(),
                policy_loss=policy_losses.mean(),
                value_loss=value_losses.mean() if self.baseline == "value" else None,
                samples_used=workers.mean(len(batch) / (rollout.n_steps * rollout.n_envs), rollout.n_steps),
                kl_divergence_loss=kl,
                step_share=step_share,
            ),
        )

    def _policy_loss(self, log_prob: Array, minibatch: Batch) -> tuple[Array, Array]:
        """Return each sample's loss, and its derivative by the log-probability.

        The first step of an update sees the policy that acted, the later ones another: their samples are weighted by
        ``pi(a|s) / pi_old(a|s)``. Unweighted, ``-A log pi`` of a bad action has no lower end. The less probable it has
        become, the harder it pushes, until the mean is far outside of the action space.
        """
        if self.batch_size is None:
            return policy_gradient(log_prob, minibatch.advantages)
        return surrogate(log_prob - minibatch.old_log_prob, minibatch.advantages)

    def _policy_batches(self, batch: Batch, *, only_advantages: bool) -> Iterator[Batch]:
        """Return the pieces of the batch on which the policy makes a step each.

        :param only_advantages: leave out the samples whose advantages are zero
        """
        if not has_own_get(type(self.rollout_buffer)):
            order = None if self.batch_size is None else random_order(batch, self.rollout)
            yield from batch.minibatches(self.batch_size, order, even=True, only_advantages=only_advantages)
            return
        for samples in own_samples(self.rollout, self.network, self.batch_size):
            if self.normalize_advantage:
                samples.advantages = normalized(samples.advantages)
            yield samples

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

"""TRPO: the largest step of the natural gradient that stays in a trust region."""

import math
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import torch as th
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, Schedule

from sb3_pg.common import workers
from sb3_pg.common.advantages import Baseline
from sb3_pg.common.arrays import Array, Column
from sb3_pg.common.batch import Batch, has_own_get, joined, own_samples
from sb3_pg.common.engines.protocol import Actor, Look
from sb3_pg.common.interrupts import uninterrupted
from sb3_pg.common.objectives import surrogate
from sb3_pg.common.policy_gradient import PolicyGradientAlgorithm, shared
from sb3_pg.common.presets import takes_preset
from sb3_pg.common.products import inner
from sb3_pg.trpo.figures import TRPOFigures
from sb3_pg.trpo.options import check_arguments
from sb3_pg.trpo.trust_region import Accepted, backtracking_line_search, conjugate_gradient

SelfTRPO = TypeVar("SelfTRPO", bound="TRPO")


class TRPO(PolicyGradientAlgorithm):
    """Trust region policy optimization (Schulman et al. 2015, https://arxiv.org/abs/1502.05477).

    Maximises the surrogate ``E[r A]`` subject to ``E[KL(old || new)] <= target_kl``, where the KL is that of the
    joint action, i.e. *summed* over action dimensions. sb3-contrib averages over the dimensions of Box and
    MultiBinary actions instead, so its trust region is that many times wider: to keep a tuned one, multiply its
    ``target_kl`` and its ``cg_damping`` by the number of action dimensions. Nothing changes for Discrete and
    MultiDiscrete actions.

    The step is the natural gradient found by conjugate gradient, scaled to the trust region's edge and shortened
    until the surrogate improves inside it; if that fails, or the curvature is not positive, or a number is not
    finite, the policy stays as it was and ``train/policy_step`` in the log says why. The critic is fitted
    separately and leaves alone everything that the policy depends on. Batch normalisation and dropout are in
    evaluation mode throughout: a KL can only be bounded for a policy that does not change by itself.

    :param policy: "MlpPolicy", "CnnPolicy", "MultiInputPolicy", one of the same with a memory ("MlpLstmPolicy",
        "MlpGruPolicy" and so on), a language model ("CausalLMPolicy", "Seq2SeqLMPolicy"), or a subclass of
        ActorCriticPolicy
    :param env: an environment, vectorised or not, or its registered id; None only for loading
    :param learning_rate: of the critic's optimizer; the policy has none. Higher fits faster and less stably
    :param n_steps: steps per environment and update. More give a better estimate of gradient and curvature,
        fewer give more updates
    :param batch_size: minibatch of the critic. Smaller makes more, noisier steps
    :param gamma: discount factor in [0, 1]. Higher looks further ahead, with more variance
    :param cg_max_steps: most conjugate-gradient iterations. More follow the natural gradient more closely and
        cost one Fisher-vector product each
    :param cg_damping: added to the Fisher matrix's diagonal. Higher is steadier and closer to the plain gradient
    :param line_search_shrinking_factor: in (0, 1). Higher searches more finely
    :param line_search_max_iter: step lengths tried before the update is given up. More give up fewer, for shorter steps
    :param n_critic_updates: passes of the critic over the rollout. More fit it better and may overfit
    :param gae_lambda: in [0, 1]. Lower has less variance and more bias from the critic
    :param use_sde: generalised state-dependent exploration (Box actions only)
    :param sde_sample_freq: new gSDE noise every so many steps; -1 only at the start of a rollout. Higher explores more
        smoothly
    :param rollout_buffer_class: a subclass of SB3's; None chooses
    :param rollout_buffer_kwargs: its arguments
    :param normalize_advantage: True gives advantages mean 0 and deviation 1 over the rollout, False leaves them.
        "running" divides them by the root mean square of the deviations of past rollouts where that is larger, and
        shortens the step alike, so that a rollout without news moves the policy little: slower, but what is learned
        stays learned
    :param target_kl: radius of the trust region in nats, a number or schedule: the largest mean KL between policies of
        successive updates. Higher learns faster until it breaks. Usual are 0.005 to 0.05 for Discrete and MultiDiscrete
        actions, and as much for each dimension of Box and MultiBinary ones: 0.24 is 0.04 for each of six
    :param sub_sampling_factor: use every n-th observation for the curvature only. Higher is cheaper and noisier
    :param ent_coef: weight of the entropy bonus in the surrogate, a number or schedule. Higher explores more
    :param stats_window_size: episodes over which the logged return and length are averaged. Higher is smoother
    :param tensorboard_log: folder for TensorBoard; None writes none
    :param policy_kwargs: arguments of the policy class; not changed
    :param verbose: 0 says nothing, 1 says what runs and logs to the screen, 2 more
    :param seed: of all random generators; the same seed gives the same run
    :param device: "cpu", "cuda" or "auto"
    :param baseline: what the return is compared with. "value": the value network (GAE). The others compare whole
        episodes and leave the value network alone, see :class:`sb3_pg.REINFORCE`
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
    :param engine: "auto" takes the fastest engine that computes the same; "autograd" always takes torch's
    :param _init_setup_model: False leaves the networks to be made by ``load``
    :raises ArgumentError: an argument that cannot work, with its name and value
    """

    archive_name: ClassVar[str] = "TRPO"

    @takes_preset
    def __init__(
        self,
        policy: str | type[ActorCriticPolicy],
        env: GymEnv | str | None,
        learning_rate: float | Schedule = 1e-3,
        n_steps: int = 2048,
        batch_size: int = 128,
        gamma: float = 0.99,
        cg_max_steps: int = 15,
        cg_damping: float = 0.1,
        line_search_shrinking_factor: float = 0.8,
        line_search_max_iter: int = 10,
        n_critic_updates: int = 10,
        gae_lambda: float = 0.95,
        use_sde: bool = False,
        sde_sample_freq: int = -1,
        rollout_buffer_class: type[RolloutBuffer] | None = None,
        rollout_buffer_kwargs: dict[str, Any] | None = None,
        normalize_advantage: bool | str = True,
        target_kl: float | Schedule = 0.01,
        sub_sampling_factor: int = 1,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
        _init_setup_model: bool = True,
        *,
        ent_coef: float | Schedule = 0.0,
        baseline: str | Baseline | None = "value",
        scale_rewards: str | None = "group",
        ema_decay: float = 0.9,
        loss_average: str | int = "step",
        n_episodes: int | None = None,
        max_episode_steps: int | None = None,
        use_masking: bool = True,
        sequence_length: int | None = None,
        engine: str = "auto",
    ) -> None:
        # The critic is fitted separately, and its gradients are not clipped, as in sb3-contrib.
        super().__init__(**shared(locals()), vf_coef=0.0, max_grad_norm=0.0)
        self.batch_size = batch_size
        self.cg_max_steps = cg_max_steps
        self.cg_damping = cg_damping
        self.line_search_shrinking_factor = line_search_shrinking_factor
        self.line_search_max_iter = line_search_max_iter
        self.n_critic_updates = n_critic_updates
        self.normalize_advantage = normalize_advantage
        self.target_kl = target_kl
        self.sub_sampling_factor = sub_sampling_factor
        if _init_setup_model:
            self._setup_model()

    def _check_arguments(self) -> None:
        super()._check_arguments()
        check_arguments(self)

    def train(self) -> None:
        """Take one natural-gradient step with the policy, then fit the critic."""
        rollout, engine = self.rollout, self._refreshed_network()
        self.policy.set_training_mode(False)
        self._update_learning_rate(self.policy.optimizer)
        batch = self._batch(rollout)
        has_own = has_own_get(type(rollout.buffer))
        samples = joined(list(own_samples(rollout, engine, None))) if has_own else batch
        if self.normalize_advantage:
            samples.advantages = self._normalized(samples)
        # The longest step does not depend on the scale of the advantages: it is shortened in proportion to them.
        shortened = samples.moments()[1] if self.normalize_advantage == "running" else 1.0
        figures = self._improve_policy(samples, shortened)
        if self.baseline == "value":
            losses = Column(batch.returns)
            self._fit_critic(batch, losses, self.n_critic_updates, self.batch_size, max_grad_norm=None)
            figures.value_loss = losses.mean()
        self._n_updates += 1
        self._end_update(rollout, figures)

    def _improve_policy(self, batch: Batch, shortened: float) -> TRPOFigures:
        """Maximise ``g.x`` subject to ``x.F x / 2 <= target_kl``, then search along x (section 6, appendix C).

        :param shortened: fraction of the radius of the trust region to go
        """
        actor, ent_coef = self.network.actor(batch), self._coefficient("ent_coef")

        def objective(look: Look) -> float:
            """Return the surrogate ``E[r A]`` plus the entropy bonus, less the engine's penalty."""
            loss, _ = surrogate(look.log_prob - batch.old_log_prob, batch.advantages)
            return batch.mean(ent_coef * look.entropy - loss - look.penalty)

        # g: the gradient of the surrogate (and entropy bonus), at ratio one.
        old = actor.old
        _, d_log_prob = surrogate(old.log_prob - batch.old_log_prob, batch.advantages)
        gradient: Any = -workers.mean(actor.gradient(d_log_prob, -ent_coef), batch.share)

        # x: the natural gradient F^-1 g.
        fisher, share = actor.fisher(every=self.sub_sampling_factor), batch.share

        def damped(vector: Array) -> Array:
            curved: Array = workers.mean(fisher(vector), share) + self.cg_damping * vector
            return curved

        direction, iterations, residual = conjugate_gradient(damped, gradient, self.cg_max_steps)
        curvature = inner(direction, gradient)  # x.F x, without another product
        outcome, accepted = _why_no_step(inner(gradient, gradient), curvature), None
        if outcome is None:
            # The longest step in the quadratic model of the KL: x.F x / 2 = target_kl.
            target_kl = self._coefficient("target_kl") * shortened**2
            step = math.sqrt(2.0 * target_kl / curvature) * direction
            accepted = self._search(batch, actor, step, target_kl, objective)
            outcome = "accepted" if accepted else "line search failed"

        taken = accepted or Accepted(0.0, self.line_search_max_iter, 0.0, 0.0)
        return TRPOFigures(
            policy_step=outcome,
            is_line_search_success=float(accepted is not None),
            policy_objective=objective(old) + taken.improvement,
            kl_divergence_loss=taken.kl,
            surrogate_improvement=taken.improvement,
            surrogate_predicted=taken.fraction * inner(gradient, step) if accepted else 0.0,
            step_length=taken.fraction * math.sqrt(inner(step, step)) if accepted else 0.0,
            backtracks=taken.backtracks,
            cg_iterations=iterations,
            cg_residual=residual,
            entropy_loss=-batch.mean_of_samples(old.entropy),
        )

    def _search(
        self, batch: Batch, actor: Actor, step: Any, target_kl: float, objective: Callable[[Look], float]
    ) -> Accepted | None:
        """Move the actor along a step as far as the objective improves inside the trust region; else not at all."""
        start, old_objective = actor.vector, objective(actor.old)

        def attempt(fraction: float) -> tuple[float, float]:
            actor.vector = start + fraction * step
            look = actor.look()
            return objective(look) - old_objective, batch.mean(look.kl)

        accepted = None
        try:
            accepted = backtracking_line_search(
                attempt, target_kl, self.line_search_shrinking_factor, self.line_search_max_iter
            )
        finally:
            if accepted is None:  # after an exception, too
                with uninterrupted():
                    actor.vector = start
        return accepted

    def learn(
        self: SelfTRPO,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 1,
        tb_log_name: str = "TRPO",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfTRPO:
        """See :meth:`PolicyGradientAlgorithm.learn`."""
        return super().learn(total_timesteps, callback, log_interval, tb_log_name, reset_num_timesteps, progress_bar)


def _why_no_step(squared: float, curvature: float) -> str | None:
    """Return why there is no direction to step along, None if there is one.

    :param squared: g.g
    :param curvature: x.F x
    """
    if not math.isfinite(squared):
        return "gradient not finite"
    if squared == 0.0:
        return "zero gradient"
    return None if curvature > 0.0 and math.isfinite(curvature) else "no positive curvature"

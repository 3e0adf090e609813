"""TRPO: the largest step of the natural gradient that stays in a trust region."""

import math
from typing import Any, ClassVar, TypeVar

import torch as th
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, Schedule

from sb3_pg.common.arrays import Array, Column, take
from sb3_pg.common.buffers import Batch, epoch, whole_batch
from sb3_pg.common.distributions import Parameters
from sb3_pg.common.errors import ArgumentError, check_count, check_number
from sb3_pg.common.objectives import squared_error, surrogate
from sb3_pg.common.policy_gradient import PolicyGradientAlgorithm
from sb3_pg.common.products import inner
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

    :param policy: "MlpPolicy", "CnnPolicy", "MultiInputPolicy" or a subclass of ActorCriticPolicy
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
    :param line_search_max_iter: step lengths tried before the update is given up
    :param n_critic_updates: passes of the critic over the rollout. More fit it better and may overfit
    :param gae_lambda: in [0, 1]. Lower has less variance and more bias from the critic
    :param use_sde: generalised state-dependent exploration (Box actions only)
    :param sde_sample_freq: new gSDE noise every so many steps; -1 only at the start of a rollout
    :param rollout_buffer_class: a subclass of SB3's; None chooses
    :param rollout_buffer_kwargs: its arguments
    :param normalize_advantage: whether advantages get mean 0 and deviation 1 over the rollout
    :param target_kl: radius of the trust region in nats, the largest mean KL between policies of successive
        updates. Higher learns faster until it breaks; usual values are 0.005 to 0.05
    :param sub_sampling_factor: use every so-manieth observation for the curvature only. Higher is cheaper and noisier
    :param ent_coef: weight of the entropy bonus in the surrogate, a number or schedule. Higher explores more
    :param stats_window_size: episodes over which the logged return and length are averaged
    :param tensorboard_log: folder for TensorBoard; None writes none
    :param policy_kwargs: arguments of the policy class; not changed
    :param verbose: 0 says nothing, 1 says what runs and logs to the screen, 2 more
    :param seed: of all random generators; the same seed gives the same run
    :param device: "cpu", "cuda" or "auto"
    :param engine: "auto" takes the fastest network that computes the same; "autograd" always takes torch's
    :param _init_setup_model: False leaves the networks to be made by ``load``
    :raises ArgumentError: an argument that cannot work, with its name and value
    """

    archive_name: ClassVar[str] = "TRPO"

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
        normalize_advantage: bool = True,
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
            vf_coef=0.0,  # the critic is fitted separately
            max_grad_norm=0.0,  # and its gradients are not clipped, as in sb3-contrib
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
        for name in ("n_steps", "batch_size", "cg_max_steps", "line_search_max_iter", "sub_sampling_factor"):
            check_count(name, getattr(self, name))
        check_count("n_critic_updates", self.n_critic_updates, low=0)
        check_number("cg_damping", self.cg_damping)
        check_number("target_kl", self.target_kl, above_low=True, or_schedule=True)
        check_number("line_search_shrinking_factor", self.line_search_shrinking_factor, above_low=True)
        if self.line_search_shrinking_factor >= 1:
            raise ArgumentError(
                f"`line_search_shrinking_factor` must be below 1, not {self.line_search_shrinking_factor}: "
                "the search would try the same step again."
            )
        if self.env is not None:
            rollout_size = self.n_steps * self.n_envs
            if self.normalize_advantage and rollout_size < 2:
                raise ArgumentError(
                    "`n_steps * n_envs` must be greater than 1 to normalise advantages. Currently "
                    f"n_steps={self.n_steps} and n_envs={self.n_envs}; raise one or pass normalize_advantage=False."
                )
            self._check_batch_size(self.batch_size, rollout_size)

    def train(self) -> None:
        """Take one natural-gradient step with the policy, then fit the critic."""
        self.policy.set_training_mode(False)
        self._update_learning_rate(self.policy.optimizer)
        self._refreshed_network()
        batch = whole_batch(self.rollout_buffer, self.network)
        advantages = self._normalized(batch.advantages) if self.normalize_advantage else batch.advantages
        self.network.find_actor(batch.observations, batch.actions)

        self._improve_policy(batch, advantages)
        value_loss = self._fit_critic(batch)

        self._n_updates += 1
        self.logger.record("train/value_loss", value_loss)
        self._record_common()

    def _improve_policy(self, batch: Batch, advantages: Array) -> None:
        """Maximise ``g.x`` subject to ``x.F x / 2 <= target_kl``, then search along x (section 6, appendix C)."""
        network, n = self.network, len(batch)
        ent_coef = self._coefficient("ent_coef")
        log_prob, entropy, distribution = network.actor(batch.observations, batch.actions)
        old_objective = self._objective(log_prob, entropy, batch, advantages, ent_coef)

        # g: the gradient of the surrogate (and entropy bonus), at ratio one.
        _, d_log_prob = surrogate(log_prob - batch.old_log_prob, advantages)
        gradient = -network.actor_gradient(batch.observations, batch.actions, d_log_prob / n, -ent_coef / n)

        # x: the natural gradient F^-1 g.
        some = slice(None, None, self.sub_sampling_factor)
        fisher = network.fisher(batch.observations if some.step == 1 else take(batch.observations, some))

        def damped(vector: Array) -> Array:
            return fisher(vector) + self.cg_damping * vector

        direction, iterations, residual = conjugate_gradient(damped, gradient, self.cg_max_steps)
        curvature = inner(direction, gradient)  # x.F x, without another product

        squared = inner(gradient, gradient)
        if not math.isfinite(squared):
            outcome, accepted, step = "gradient not finite", None, 0.0 * direction
        elif squared == 0.0:
            outcome, accepted, step = "zero gradient", None, 0.0 * direction
        elif not (curvature > 0.0 and math.isfinite(curvature)):
            outcome, accepted, step = "no positive curvature", None, 0.0 * direction
        else:
            # The longest step in the quadratic model of the KL: x.F x / 2 = target_kl.
            step = math.sqrt(2.0 * self._coefficient("target_kl") / curvature) * direction
            accepted = self._search_along(step, batch, advantages, ent_coef, old_objective, distribution)
            outcome = "accepted" if accepted else "line search failed"

        self.logger.record("train/policy_step", outcome, exclude="tensorboard")
        self.logger.record("train/cg_iterations", iterations)
        self.logger.record("train/cg_residual", residual)
        self.logger.record("train/entropy_loss", -float(entropy.mean()))
        self._record_step(accepted, step, gradient, old_objective)

    def _search_along(
        self,
        step: Array,
        batch: Batch,
        advantages: Array,
        ent_coef: float,
        old_objective: float,
        old_distribution: Parameters,
    ) -> Accepted | None:
        """Move the policy by the largest fraction of ``step`` that improves it in the trust region, or not at all."""
        network = self.network
        old = network.get_actor()

        def attempt(fraction: float) -> tuple[float, float]:
            network.set_actor(old + fraction * step)
            log_prob, entropy, distribution = network.actor(batch.observations, batch.actions)
            objective = self._objective(log_prob, entropy, batch, advantages, ent_coef)
            return objective - old_objective, float(network.kl(old_distribution, distribution).mean())

        accepted = backtracking_line_search(
            attempt, self._coefficient("target_kl"), self.line_search_shrinking_factor, self.line_search_max_iter
        )
        if accepted is None:
            network.set_actor(old)
        return accepted

    def _record_step(self, accepted: Accepted | None, step: Array, gradient: Array, old_objective: float) -> None:
        record, taken = self.logger.record, accepted or Accepted(0.0, self.line_search_max_iter, 0.0, 0.0)
        record("train/is_line_search_success", float(accepted is not None))
        record("train/policy_objective", old_objective + taken.improvement)
        record("train/kl_divergence_loss", taken.kl)
        record("train/surrogate_improvement", taken.improvement)
        record("train/surrogate_predicted", taken.fraction * inner(gradient, step) if accepted else 0.0)
        record("train/step_length", taken.fraction * math.sqrt(inner(step, step)) if accepted else 0.0)
        record("train/backtracks", taken.backtracks)

    @staticmethod
    def _objective(log_prob: Array, entropy: Array, batch: Batch, advantages: Array, ent_coef: float) -> float:
        """The surrogate ``E[r A]`` plus the entropy bonus."""
        loss, _ = surrogate(log_prob - batch.old_log_prob, advantages)
        return float((ent_coef * entropy - loss).mean())

    def _fit_critic(self, batch: Batch) -> float:
        """Regress V on the returns by minibatches; the mean loss."""
        losses, batch = Column(batch.returns), batch.for_critic()
        for _ in range(self.n_critic_updates):
            for minibatch in epoch(batch, self.rollout_buffer, self.network, self.batch_size):
                _, _, value = self.network.evaluate(minibatch.observations, None)
                loss, d_value = squared_error(value, minibatch.returns)
                self.network.backward(None, None, d_value / len(minibatch))
                # Whatever the actor shares with the critic stays: moving it would move the policy as well.
                self._take_step(minibatch, max_grad_norm=None, hold_actor=True)
                losses.add(loss)
        return losses.mean()

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

"""What an algorithm asks of a network; nothing else about policies is known to it."""

from typing import Any, Protocol

import numpy as np
from stable_baselines3.common.policies import ActorCriticPolicy

from sb3_pg.common.arrays import Array
from sb3_pg.common.distributions import Parameters

#: values and log-probabilities of shape (n_envs,), known while acting only if the policy's own ``forward`` acts
KnownEarly = tuple[Any, Any]


class Fisher(Protocol):
    """A Fisher information matrix averaged over observations, as a function on flat vectors."""

    def __call__(self, vector: Array) -> Array: ...


class Network(Protocol):
    """An actor and a critic that can act, judge and step.

    Arrays are of the network's own kind (``asarray``): NumPy or torch. The torch parameters of ``policy`` are the
    one truth; a network holds no weights of its own.
    """

    policy: ActorCriticPolicy
    description: str  # what runs and why, for ``verbose=1``
    judges_while_acting: bool  # whether ``act`` gives values and log-probabilities, so that ``judge`` is not needed
    sequential: bool  # whether it works best on whole stretches of episodes; minibatches are then made of such

    def refresh(self) -> bool:
        """Look at the policy's parameters anew; called before every rollout and every update.

        :return: False if the policy has become one that this network cannot compute
        """

    # Act
    def act(self, observations: Any) -> tuple[np.ndarray, KnownEarly | None]:
        """Sample an action for each environment, (n_envs, *action_shape), not clipped.

        :return: the actions, and values and log-probabilities if the policy's own ``forward`` gave them
        """

    # Judge
    def asarray(self, x: Any) -> Array:
        """A recorded NumPy array (or dictionary of them) in the network's kind and place."""

    def actions(self, x: np.ndarray) -> Array:
        """Recorded actions, (n, action_dim), in the form that ``evaluate`` takes."""

    def values(self, observations: Any) -> np.ndarray:
        """V of each row of recorded observations, float32 (n,), without gradients."""

    def judge(self, observations: Any, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """V and log pi(a|s) of each row of a recorded rollout, float32 (n,) each, without gradients."""

    # Step
    def evaluate(self, observations: Array, actions: Array | None) -> tuple[Array, Array, Array]:
        """Log pi(a|s), entropy and V of each row, (n,) each, remembering what ``backward`` needs.

        Without actions only the critic runs, and the first two are None.
        """

    def backward(self, d_log_prob: Array | None, d_entropy: float | None, d_value: Array | None) -> None:
        """Push the derivatives of the loss by the three outputs of ``evaluate`` into the parameters' gradients.

        Replaces earlier gradients. None means that the loss does not depend on that output.
        """

    def step(self, max_grad_norm: float | None, *, hold_actor: bool = False) -> float:
        """Scale the gradients to at most ``max_grad_norm`` and let the policy's optimizer move the parameters.

        :param hold_actor: leave everything that the actor depends on as it is
        :return: the norm of the gradients before scaling; if it is not finite, nothing was moved
        """

    # The actor's parameters as one vector
    def find_actor(self, observations: Array, actions: Array) -> None:
        """Find out which parameters log pi(a|s) depends on, until the next ``refresh``.

        To be called before the methods below and before ``step(hold_actor=True)``.
        """

    def get_actor(self) -> Array:
        """A copy of the actor's parameters as one flat vector."""

    def set_actor(self, vector: Array) -> None:
        """Write a flat vector into the actor's parameters."""

    # Natural gradient
    def actor_gradient(self, observations: Array, actions: Array, d_log_prob: Array, d_entropy: float | None) -> Array:
        """The gradient of a loss with respect to the actor's parameters, flat; shapes as in ``backward``."""

    def fisher(self, observations: Array) -> Fisher:
        """The actor's Fisher information matrix at its present parameters, averaged over observations."""

    def actor(self, observations: Array, actions: Array) -> tuple[Array, Array, Parameters]:
        """Log pi(a|s), entropy and the distribution's parameters of each row, without gradients."""

    def kl(self, old: Parameters, new: Parameters) -> Array:
        """KL(old || new) of each row in nats, summed over action dimensions, (n,)."""

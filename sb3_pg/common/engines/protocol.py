"""What an algorithm asks of an engine, and what it is given back; nothing else about policies is known to it.

A batch goes in, an evaluation comes out. Nothing is remembered between two calls but in the objects returned and,
as everywhere in torch, in the gradients of the policy's parameters between ``backward`` and ``step``.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
import torch as th
from stable_baselines3.common.policies import ActorCriticPolicy

from sb3_pg.common.arrays import Array, Observations
from sb3_pg.common.groups import MaxGradNorm
from sb3_pg.common.sequences import Memory

if TYPE_CHECKING:
    from sb3_pg.common.batch import Batch
    from sb3_pg.common.rollout import Rollout


class Seen(NamedTuple):
    """What acting is given, one row per environment."""

    observations: Observations
    masks: np.ndarray | None = None  #: True for allowed actions, (n_envs, sum of options); None allows all
    starts: np.ndarray | None = None  #: True where an episode begins, (n_envs,)
    memory: Memory | None = None  #: what the policy remembers of each environment; None is nothing yet


class Acted(NamedTuple):
    """What acting gives back."""

    actions: np.ndarray  #: (n_envs, ...), not clipped
    #: V and log-probabilities, (n_envs,) each, if acting found them anyway; None leaves them to ``judge``
    values: th.Tensor | None = None
    log_probs: th.Tensor | None = None
    memory: Memory | None = None  #: what the policy will remember of each environment


class Judged(NamedTuple):
    """What judging a rollout finds out."""

    values: np.ndarray  #: V(s_t), float32 (n_steps, n_envs)
    log_probs: np.ndarray  #: log pi(a_t|s_t), float32 (n_steps, n_envs)
    final_values: np.ndarray  #: V of ``Rollout.final_observations``, float32
    rewards: np.ndarray | None = None  #: in place of the environment's, (n_steps, n_envs)
    memory: Memory | None = None  #: after the last step, of each environment
    starting_memory: Memory | None = None  #: with which each of ``Rollout.stretches`` begins
    #: log-probabilities under a reference that the loss keeps the policy near to, float32 (n_steps, n_envs)
    reference_log_probs: np.ndarray | None = None
    figures: Mapping[str, float] = {}  #: to be logged


class Evaluation(Protocol):
    """A batch as the present parameters see it."""

    @property
    def log_prob(self) -> Array:
        """Return log pi(a|s), (n,)."""

    @property
    def entropy(self) -> Array:
        """Return the entropy in nats, (n,)."""

    @property
    def value(self) -> Array:
        """Return V(s), (n,)."""

    def backward(
        self, d_log_prob: Array | None = None, d_entropy: float | None = None, d_value: Array | None = None
    ) -> None:
        """Write the gradient of the mean loss into the parameters, in place of earlier gradients. Once only.

        Each sample counts with ``batch.scale``, by default 1 / n. Without derivatives by log-probability and
        entropy the critic alone gets a gradient: what the actor depends on too is left alone.

        :param d_log_prob: derivative of each sample's loss by its log-probability, (n,). What the engine itself adds to
            the loss, as the penalty of a language model's reference, is added here
        :param d_entropy: by its entropy, the same number for all
        :param d_value: by its value, (n,)
        """


class Look(NamedTuple):
    """The actor on a batch: where it is now, and how far that is from where it was."""

    log_prob: Array  #: (n,)
    entropy: Array  #: nats, (n,)
    kl: Array  #: KL(old || now) in nats, summed over action dimensions, (n,)
    penalty: Array | float = 0.0  #: what the engine itself adds to each sample's loss, (n,)


#: A Fisher information matrix averaged over a batch, as a function on flat vectors.
Fisher = Callable[[Array], Array]


class Actor(Protocol):
    """The actor's parameters as one vector, and what a trust region needs to know of them on one batch.

    *Old* are the parameters when the actor was first asked for anything but ``vector``.
    """

    @property
    def vector(self) -> Array:
        """Return a copy of the present parameters, flat. Setting it writes them."""

    @vector.setter
    def vector(self, vector: Array) -> None: ...

    @property
    def old(self) -> Look:
        """Return the look at the old parameters."""

    def gradient(self, d_log_prob: Array, d_entropy: float) -> Array:
        """Return the gradient of the mean loss at the old parameters, flat; derivatives as in ``backward``."""

    def fisher(self, every: int = 1) -> Fisher:
        """Return the Fisher matrix at the old parameters, averaged over every n-th sample."""

    def look(self) -> Look:
        """Look at the present parameters."""


class Engine(Protocol):
    """An actor and a critic that can act, judge and step.

    Arrays are of the engine's own kind: NumPy or torch. The torch parameters of ``policy`` are the one truth; an
    engine holds no weights of its own.
    """

    policy: ActorCriticPolicy
    description: str  #: what runs and why, for ``verbose=1``

    def refresh(self) -> bool:
        """Look at the policy's parameters anew; called before every rollout and every update.

        :return: False if the policy has become one that needs another engine
        """

    def is_current(self) -> bool:
        """Return whether the parameters are still where ``refresh`` found them; quick enough to ask at each step."""

    def act(self, seen: Seen, deterministic: bool = False) -> Acted:
        """Choose an action for each environment: sample it, or take the most likely one."""

    def judge(self, rollout: "Rollout") -> Judged:
        """Find values and log-probabilities of a complete rollout, and values of its final observations."""

    def adapt(self, figures: Mapping[str, float]) -> None:
        """Adapt what the policy adapts by itself, once a rollout with these figures has been accepted."""

    def end_update(self) -> None:
        """Change what the policy changes by itself, once an update has been made."""

    def batch(self, rollout: "Rollout", keep: np.ndarray | None = None) -> "Batch":
        """Return a judged rollout as one batch of this engine's arrays, in time order.

        :param keep: which samples to use, boolean (n_steps, n_envs); None takes all
        """

    def figures(self, rollout: "Rollout", batch: "Batch") -> Mapping[str, float]:
        """Return what is to be logged of samples whose log-probabilities the update has found, and judging has not."""

    def asarray(self, x: np.ndarray) -> Array:
        """Return numbers of NumPy as an array of this engine's kind, type and place."""

    def actions(self, x: np.ndarray) -> Array:
        """Return recorded actions, (n, action_dim), in the form of ``Batch.actions``."""

    def evaluate(self, batch: "Batch") -> Evaluation:
        """Evaluate actor and critic on a batch."""

    def evaluate_critic(self, batch: "Batch") -> Evaluation:
        """Evaluate the critic alone: ``log_prob`` and ``entropy`` are not known."""

    def actor(self, batch: "Batch") -> Actor:
        """Return the actor as it is now; what it knows of the batch is computed when it is asked for."""

    def step(self, max_grad_norm: MaxGradNorm, share: float) -> float:
        """Scale the gradients to at most ``max_grad_norm`` and let the policy's optimizer move the parameters.

        Parameters without a gradient stay. With several workers the gradients are first averaged over them.

        :param max_grad_norm: of all gradients together; a pair is of the actor's and of the critic's alone
        :param share: what the gradients count for among those of all workers, see ``Batch.share``
        :return: the norm of the gradients before scaling; if it is not finite, nothing was moved
        """

"""SB3's MlpPolicy on the CPU, differentiated by hand in NumPy.

On networks as small as this one, a torch call takes longer than its arithmetic. Here actor and critic are each an
:class:`~sb3_pg.common.engines.mlp.Mlp`, the actor's outputs are the parameters of the action distribution (a
*family*), and a Fisher-vector product is J^T M J v: the tangent pass, the family's own Fisher matrix, the backward
pass.

The torch parameters stay the one truth. Weights are views of their memory, gradients are written where their
``.grad`` looks, and the state of the policy's own torch optimizer is what moves them.
"""

import math
from collections.abc import Callable, Iterable
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.preprocessing import is_image_space

from sb3_pg.common import workers
from sb3_pg.common.arrays import Array
from sb3_pg.common.batch import Batch
from sb3_pg.common.distributions import Categorical, Likelihood, Parameters, draw, masked
from sb3_pg.common.distributions.family import column
from sb3_pg.common.engines.blueprint import DTYPES, Blueprint, Layers, Unsuitable
from sb3_pg.common.engines.mlp import ACTIVATIONS, Mlp, Pieces, Trace, row_of_ones
from sb3_pg.common.engines.optimizer import QuickOptimizer, is_quick, use_fused_adam
from sb3_pg.common.engines.protocol import Acted, Fisher, Look, Seen
from sb3_pg.common.engines.rows import RowEngine
from sb3_pg.common.errors import ArgumentError
from sb3_pg.common.groups import MaxGradNorm
from sb3_pg.common.products import blas_has_one_thread, inner, product
from sb3_pg.common.threads import choose_threads

Function = TypeVar("Function", bound=Callable[..., Any])

#: log_std, if there is one, and weights and biases of the actor
ActorPieces = tuple[np.ndarray | None, Pieces]


def quiet(function: Function) -> Function:
    """Let a caller's ``np.seterr(all="raise")`` not reach into a function.

    What its numbers underflow to is right, and the algorithm itself looks for those that are not finite.
    """
    return np.errstate(all="ignore")(function)


class Encoder:
    """What SB3's preprocessing and FlattenExtractor make of observations: flat numbers; choices become one-hot.

    :param space: Box, Discrete, MultiDiscrete or MultiBinary
    :param normalize_images: divide an image's bytes by 255
    :param dtype: of the result
    """

    def __init__(self, space: spaces.Space[Any], normalize_images: bool, dtype: Any) -> None:
        self.dtype = dtype
        self._divisor = 255.0 if normalize_images and is_image_space(space) else None
        self._space, sizes = space, np.empty(0, np.intp)
        if isinstance(space, spaces.Discrete | spaces.MultiDiscrete):
            sizes = np.atleast_1d(space.n if isinstance(space, spaces.Discrete) else space.nvec)
        self._sizes, self._width, self._offsets = sizes.astype(np.uintp), int(sizes.sum()), np.cumsum(sizes) - sizes

    def __call__(self, x: Any) -> np.ndarray:
        flat: np.ndarray = x if x.ndim == 2 else x.reshape(len(x), -1)
        if self._width:
            choices = flat.astype(np.intp)
            if np.count_nonzero(choices.view(np.uintp) >= self._sizes):  # negative ones are large then
                raise ArgumentError(f"An observation of {self._space} is outside of it: {x[:1]}.")
            encoded = np.zeros((len(x), self._width), self.dtype)
            choices += self._offsets
            if len(x) == 1:
                encoded[0, choices[0]] = 1.0
            else:
                encoded[np.arange(len(x))[:, None], choices] = 1.0
            return encoded
        numbers: np.ndarray = flat if flat.dtype == self.dtype else flat.astype(self.dtype)
        if self._divisor is not None:
            numbers = np.divide(numbers, self._divisor)
        return numbers if numbers.flags.carray else numbers.copy()  # torch takes no other


class ClosedFormEngine(RowEngine):
    """Acts, judges and steps by NumPy on the memory of the policy's parameters.

    :param policy: SB3's MlpPolicy with nothing replaced, on the CPU
    :raises Unsuitable: the policy is not of that kind
    """

    def __init__(self, policy: ActorCriticPolicy) -> None:
        self.policy = policy
        self.description = "closed-form"
        use_fused_adam(policy.optimizer)
        self._errors_raise = True
        self._quick: QuickOptimizer | None = None  # until ``refresh``
        self._build(self.blueprint())

    def blueprint(self) -> Blueprint:
        """Return the parts of the policy.

        :raises Unsuitable: it needs autograd
        """
        return Blueprint(self.policy)

    def nets(self, blueprint: Any) -> tuple[Any, Any]:
        """Return actor and critic as NumPy sees them."""
        return mlp_of(blueprint.actor), mlp_of(blueprint.critic)

    def inputs(self, batch: Batch) -> Any:
        """Return a batch in the form that actor and critic read."""
        return self.encode(batch.observations)

    def chunks(self, batch: Batch) -> list[slice]:
        """Return which rows of a batch to pass over at a time."""
        return _chunks(len(batch))

    def _build(self, blueprint: Blueprint) -> None:
        """Make views of the parameters and of one flat vector of all gradients, the actor's first."""
        parameters = self._trained = blueprint.parameters
        self._addresses = [p.data_ptr() for p in parameters]
        self._fingerprint = blueprint.fingerprint()
        self.family = blueprint.family
        self.dtype = DTYPES[parameters[0].dtype]
        self._action_shape: tuple[int, ...] = self.policy.action_space.shape  # type: ignore[assignment]
        self.actor_net, self.critic_net = self.nets(blueprint)
        self.log_std = None if blueprint.log_std is None else view(blueprint.log_std)
        self.encode = Encoder(self.policy.observation_space, self.policy.normalize_images, self.dtype)

        self.actor_size = self.actor_net.size + (0 if self.log_std is None else self.log_std.size)
        self.gradient = np.zeros(self.actor_size + self.critic_net.size, self.dtype)
        self._actor_gradient = self.split(self.gradient)
        self._critic_gradient = self.critic_net.split(self.gradient[self.actor_size :])
        pieces = th.split(th.from_numpy(self.gradient), [p.numel() for p in parameters])
        offered = [(p, g.view_as(p)) for p, g in zip(parameters, pieces, strict=True)]
        n_actor = len(blueprint.actor_parameters)
        self._offered = (offered[:n_actor], offered[n_actor:])
        self.offer(actor=False, critic=False)

    def refresh(self) -> bool:
        choose_threads(0.0)  # torch computes what is too large for one thread of NumPy's BLAS, on one of its own
        self._errors_raise = not {"ignore", "warn"}.issuperset(np.geterr().values())
        try:
            blueprint = self.blueprint()
        except Unsuitable:
            self.offer(actor=False, critic=False)
            return False
        if blueprint.fingerprint() != self._fingerprint:
            self._build(blueprint)
        self.actor_net.blas_has_one_thread = self.critic_net.blas_has_one_thread = blas_has_one_thread()
        optimizer = self.policy.optimizer
        self._quick = QuickOptimizer(optimizer) if is_quick(optimizer) else None
        return True

    def is_current(self) -> bool:
        return [p.data_ptr() for p in self._trained] == self._addresses

    # Act

    def act(self, seen: Seen, deterministic: bool = False) -> Acted:
        return (self._act_quietly if self._errors_raise else self._act)(seen, deterministic)

    def _act(self, seen: Seen, deterministic: bool) -> Acted:
        x = self.encode(seen.observations)
        return Acted(self.drawn(self.parameters(self.actor_net(x), seen.masks), deterministic, len(x)))

    _act_quietly = quiet(_act)  # takes as much longer as one of the layers

    def drawn(self, parameters: Parameters, deterministic: bool, n: int) -> np.ndarray:
        """Return actions for n observations, as the action space has them, in single precision."""
        actions: np.ndarray = draw(self.family, parameters, deterministic)
        if actions.dtype == np.float64:
            actions = actions.astype(np.float32)
        return actions.reshape(n, *self._action_shape)

    def parameters(self, outputs: np.ndarray, masks: Any = None) -> Parameters:
        """Turn the actor's outputs into its distribution's parameters."""
        if self.log_std is not None:
            return outputs, self.log_std
        return (outputs if masks is None else masked(outputs, masks),)

    # Judge

    def asarray(self, x: np.ndarray) -> np.ndarray:
        return x.astype(self.dtype, copy=False) if x.dtype.kind == "f" else x

    def actions(self, x: np.ndarray) -> np.ndarray:
        if isinstance(self.family, Categorical):
            choices: np.ndarray = x.astype(np.intp, copy=False)
            return choices.reshape(-1) if isinstance(self.policy.action_space, spaces.Discrete) else choices
        return x.astype(self.dtype, copy=False)

    @quiet
    def row_values(self, observations: Any) -> np.ndarray:
        found = [self.critic_net(self.encode(observations[chunk])) for chunk in _chunks(len(observations))]
        return np.concatenate(found, dtype=np.float32).reshape(-1)

    @quiet
    def judge_rows(
        self, observations: Any, actions: np.ndarray, masks: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        log_probs: list[Any] = []
        for chunk in _chunks(len(observations)):
            allowed = None if masks is None else masks[chunk]
            parameters = self.parameters(self.actor_net(self.encode(observations[chunk])), allowed)
            log_probs.append(self.family.log_prob(parameters, self.actions(actions[chunk])))
        return self.row_values(observations), np.concatenate(log_probs, dtype=np.float32)

    # Step

    @quiet
    def evaluate(self, batch: Batch) -> "ClosedFormEvaluation":
        x = self.inputs(batch)
        outputs, actor_trace = self.actor_net.forward(x)
        likelihood = self.family.evaluate(self.parameters(outputs, batch.masks), batch.actions)
        values, critic_trace = self.critic_net.forward(x)
        return ClosedFormEvaluation(self, batch, values, critic_trace, likelihood, actor_trace)

    @quiet
    def evaluate_critic(self, batch: Batch) -> "ClosedFormEvaluation":
        return ClosedFormEvaluation(self, batch, *self.critic_net.forward(self.inputs(batch)))

    def actor(self, batch: Batch) -> "ClosedFormActor":
        return ClosedFormActor(self, batch)

    def write_gradient(self, actor: tuple[Trace, Parameters] | None, critic: tuple[Trace, np.ndarray] | None) -> None:
        """Write gradients where the parameters' ``.grad`` looks.

        :param actor: the forward pass, and the derivative by each row's parameters of the distribution
        :param critic: the forward pass, and the derivative by each value, (n, 1)
        """
        if actor is not None:
            self.actor_backward(*actor, self._actor_gradient)
        if critic is not None:
            self.critic_net.backward(*critic, self._critic_gradient)
        self.offer(actor=actor is not None, critic=critic is not None)

    def actor_backward(self, trace: Trace, d: Any, gradient: ActorPieces) -> None:
        """Write the actor's gradient, from the derivative by each row's parameters."""
        d_log_std, pieces = gradient
        if d_log_std is not None:
            product(row_of_ones(len(d[1]), d[1].dtype), d[1], d_log_std[None])
        self.actor_net.backward(trace, d[0], pieces)

    def split(self, flat: np.ndarray) -> ActorPieces:
        """Return views of a flat vector of the actor's parameters: log_std, and weights and biases."""
        if self.log_std is None:
            return None, self.actor_net.split(flat)
        n = self.log_std.size
        return flat[:n], self.actor_net.split(flat[n:])

    def offer(self, *, actor: bool, critic: bool) -> None:
        """Show the optimizer the gradients of those that move, and None for the others: momentum would move zeros."""
        for offered, moves in zip(self._offered, (actor, critic), strict=True):
            first, its_gradient = offered[0]
            if first.grad is (its_gradient if moves else None):
                continue  # seen by one of them, to save time: whoever replaces gradients replaces all
            for parameter, gradient in offered:
                parameter.grad = gradient if moves else None

    @quiet
    def step(self, max_grad_norm: MaxGradNorm, share: float) -> float:
        actor_moves, critic_moves = (offered[0][0].grad is not None for offered in self._offered)
        if not (actor_moves or critic_moves):
            return 0.0
        moving = self.gradient[0 if actor_moves else self.actor_size : None if critic_moves else self.actor_size]
        if workers.size() > 1:
            moving[...] = workers.mean(moving, share)
        norm = math.sqrt(inner(moving, moving))
        if not math.isfinite(norm):
            return norm
        if isinstance(max_grad_norm, tuple):
            halves = self.gradient[: self.actor_size], self.gradient[self.actor_size :]
            for half, moves, limit in zip(halves, (actor_moves, critic_moves), max_grad_norm, strict=True):
                if moves:
                    _scale_down(half, math.sqrt(inner(half, half)), limit)
        else:
            _scale_down(moving, norm, max_grad_norm)
        if self._quick is not None:
            self._quick.step((actor_moves, critic_moves))
            return norm
        self.policy.optimizer.step()
        if not self.is_current():  # not torch's own, but some replace ``p.data``
            self._build(self.blueprint())
        return norm

    # The actor's parameters as one vector

    @property
    def actor_arrays(self) -> list[np.ndarray]:
        """Return views of the actor's parameters, in the order of ``split``."""
        first = [] if self.log_std is None else [self.log_std]
        return first + [x for piece in self.actor_net.pieces for x in piece]


class ClosedFormEvaluation:
    """A batch as the present parameters see it, with the forward passes that led there.

    :param values: (n, 1)
    :param likelihood: of the actions; None if only the critic was evaluated
    """

    log_prob: Array
    entropy: Array

    def __init__(
        self,
        engine: ClosedFormEngine,
        batch: Batch,
        values: np.ndarray,
        critic_trace: Trace,
        likelihood: Likelihood | None = None,
        actor_trace: Trace | None = None,
    ) -> None:
        self._engine, self._batch = engine, batch
        self.value: Array = values.reshape(-1)
        self._passes: tuple[Any, ...] = critic_trace, actor_trace, likelihood
        if likelihood is not None:
            self.log_prob, self.entropy = likelihood.log_prob, likelihood.entropy

    @quiet
    def backward(self, d_log_prob: Any = None, d_entropy: float | None = None, d_value: Any = None) -> None:
        # What the passes have left is let go of, so that the next evaluation finds its memory in the cache.
        (critic_trace, actor_trace, likelihood), self._passes = self._passes, ()
        scale, actor, critic = self._batch.scale, None, None
        if d_log_prob is not None or d_entropy:
            assert likelihood is not None, "only the critic was evaluated"
            weighted = None if d_log_prob is None else np.asarray(d_log_prob * scale, self._engine.dtype)
            actor = actor_trace, likelihood.pull(weighted, d_entropy * scale if d_entropy else None)
        if d_value is not None:
            critic = critic_trace, np.asarray(d_value * scale, self._engine.dtype).reshape(-1, 1)
        self._engine.write_gradient(actor, critic)


class Part(NamedTuple):
    """Some rows of a batch, so few that what passes over them leave stays in the cache, and the first such pass."""

    batch: Batch
    scale: Any  #: of each row, or one number for all
    rows: slice
    trace: Trace
    parameters: Parameters  #: of each row's distribution, before any step

    @property
    def zeros(self) -> np.ndarray:
        """Return the KL of the old parameters from themselves."""
        return np.zeros(len(self.batch), np.float64)


class ClosedFormActor:
    """The actor's parameters as one vector, looked at in closed form on one batch."""

    def __init__(self, engine: ClosedFormEngine, batch: Batch) -> None:
        self._engine, self._batch = engine, batch

    @property
    def vector(self) -> Array:
        """Return the present parameters, flat."""
        return np.concatenate([x.reshape(-1) for x in self._engine.actor_arrays])

    @vector.setter
    def vector(self, vector: Array) -> None:
        start = 0
        for x in self._engine.actor_arrays:
            x[...] = vector[start : start + x.size].reshape(x.shape)
            start += x.size

    @cached_property
    def _parts(self) -> list[Part]:
        """Return the forward pass at the old parameters; a trust-region step asks three times for the same."""
        engine, parts, scale = self._engine, [], self._batch.scale
        for rows in engine.chunks(self._batch):
            batch = self._batch[rows]
            outputs, trace = engine.actor_net.forward(engine.inputs(batch))
            parameters = tuple(x.copy() for x in engine.parameters(outputs, batch.masks))  # type: ignore[union-attr]
            parts.append(Part(batch, scale if isinstance(scale, float) else scale[rows], rows, trace, parameters))
        return parts

    @property
    @quiet
    def old(self) -> Look:
        """Return the look at the old parameters."""
        family = self._engine.family
        return _joined(
            (family.log_prob(part.parameters, part.batch.actions), family.entropy(part.parameters), part.zeros)
            for part in self._parts
        )

    @quiet
    def look(self) -> Look:
        return _joined(map(self._look, self._parts))

    def _look(self, part: Part) -> tuple[Any, Any, Any]:
        engine, batch = self._engine, part.batch
        outputs = engine.actor_net(engine.inputs(batch))
        now = engine.parameters(outputs, batch.masks)
        # In float64: rounding to float32 is as large as a small trust region's KL is exact.
        exact = [tuple(np.asarray(x, np.float64) for x in parameters) for parameters in (part.parameters, now)]
        family = engine.family
        return family.log_prob(now, batch.actions), family.entropy(now), family.kl(*exact)

    @quiet
    def gradient(self, d_log_prob: Any, d_entropy: float) -> Array:
        engine = self._engine

        def d_parameters(part: Part) -> Parameters:
            weighted = np.asarray(d_log_prob[part.rows] * part.scale, engine.dtype)
            likelihood = engine.family.evaluate(part.parameters, part.batch.actions)
            return likelihood.pull(weighted, d_entropy * part.scale)

        return self._pulled_back((part, d_parameters(part)) for part in self._parts)

    def _pulled_back(self, derivatives: Iterable[tuple[Part, Parameters]]) -> np.ndarray:
        """Return J^T d, from the derivatives by the parameters of each part's distributions."""
        engine = self._engine
        total = np.zeros(engine.actor_size, engine.dtype)
        of_part = np.empty_like(total)
        pieces = engine.split(of_part)
        for part, d in derivatives:
            engine.actor_backward(part.trace, d, pieces)
            total += of_part
        return total

    @quiet
    def fisher(self, every: int = 1) -> Fisher:
        """Return products ``J^T M J v``, averaged, where M is the family's own Fisher matrix of each row."""
        engine, batch, parts = self._engine, self._batch, self._parts
        if every > 1:
            parts = ClosedFormActor(engine, batch[engine.thinned(batch, every)])._parts
        of_family = [engine.family.fisher(part.parameters) for part in parts]

        @quiet
        def times(vector: Any) -> np.ndarray:
            d_log_std, change = engine.split(np.asarray(vector, engine.dtype))

            def weighted(part: Part, fisher: Callable[[Parameters], Parameters]) -> Parameters:
                tangent: Parameters = (engine.actor_net.tangent(part.trace, change),)
                if d_log_std is not None:
                    tangent = (tangent[0], np.broadcast_to(d_log_std, tangent[0].shape))
                return tuple(x * column(part.scale) for x in fisher(tangent))

            return self._pulled_back((part, weighted(part, f)) for part, f in zip(parts, of_family, strict=True))

        return times


def _scale_down(gradient: np.ndarray, norm: float, limit: float | None) -> None:
    """Scale a gradient, whose norm is given, down to at most a limit, as torch does."""
    if limit is not None and norm + 1e-6 > limit:
        gradient *= limit / (norm + 1e-6)


def _joined(looks: Iterable[tuple[Any, Any, Any]]) -> Look:
    """Return the looks at the parts of a batch as one."""
    return Look(*(x[0] if len(x) == 1 else np.concatenate(x) for x in zip(*looks, strict=True)))


#: Rows of one pass over many, so that its activations take little memory and stay in the cache.
_CHUNK_ROWS = 1 << 11


def _chunks(n: int) -> list[slice]:
    return [slice(start, start + _CHUNK_ROWS) for start in range(0, n, _CHUNK_ROWS)]


def view(parameter: th.Tensor) -> np.ndarray:
    """Return a parameter's memory as NumPy sees it."""
    array: np.ndarray = parameter.detach().numpy()
    return array


def mlp_of(layers: Layers) -> Mlp:
    """Return a chain of layers as NumPy sees it."""
    return Mlp(
        [(view(linear.weight), view(linear.bias)) for linear, _ in layers],
        [None if f is None else ACTIVATIONS[type(f)](f) for _, f in layers],
    )

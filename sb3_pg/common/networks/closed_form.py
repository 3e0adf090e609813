"""SB3's MlpPolicy on the CPU, differentiated by hand in NumPy.

On networks as small as this one, a torch call takes longer than its arithmetic. Here actor and critic are each an
:class:`~sb3_pg.common.networks.mlp.Mlp`, the actor's outputs are the parameters of the action distribution (a
*family*), and a Fisher-vector product is J^T M J v: the tangent pass, the family's own Fisher matrix, the backward
pass.

The torch parameters stay the one truth. Weights are views of their memory, gradients are written where their
``.grad`` looks, and the state of the policy's own torch optimizer is what moves them.
"""

import math
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.preprocessing import is_image_space

from sb3_pg.common.arrays import Array
from sb3_pg.common.distributions import Categorical, Parameters, d_parameters
from sb3_pg.common.networks.adam import QuickAdam, is_plain_adam
from sb3_pg.common.networks.autograd import use_fused_adam
from sb3_pg.common.networks.blueprint import DTYPES, Blueprint, Layers, Unsuitable
from sb3_pg.common.networks.mlp import ACTIVATIONS, Mlp, Pieces, Trace
from sb3_pg.common.networks.protocol import Fisher, KnownEarly
from sb3_pg.common.products import inner, product
from sb3_pg.common.threads import choose_threads

Function = TypeVar("Function", bound=Callable[..., Any])

#: log_std, if there is one, and weights and biases of the actor
ActorPieces = tuple[np.ndarray | None, Pieces]


def _quiet(function: Function) -> Function:
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
        sizes = np.atleast_1d(getattr(space, "nvec", getattr(space, "n", 0)))
        self._is_choice = isinstance(space, spaces.Discrete | spaces.MultiDiscrete)
        self._width = int(sizes.sum())
        self._offsets = np.cumsum(sizes) - sizes

    def __call__(self, x: Any) -> np.ndarray:
        flat: np.ndarray = x.reshape(len(x), -1)
        if self._is_choice:
            encoded = np.zeros((len(x), self._width), self.dtype)
            encoded[np.arange(len(x))[:, None], flat.astype(np.intp) + self._offsets] = 1.0
            return encoded
        numbers: np.ndarray = flat.astype(self.dtype, copy=False)
        if self._divisor is not None:
            numbers = np.divide(numbers, self._divisor)
        return numbers if numbers.flags.carray else numbers.copy()  # torch takes no other


class ClosedFormNetwork:
    """Acts, judges and steps by NumPy on the memory of the policy's parameters.

    :param policy: SB3's MlpPolicy with nothing replaced, on the CPU
    :raises Unsuitable: the policy is not of that kind
    """

    judges_while_acting = False
    sequential = False

    #: what ``evaluate`` remembers for ``backward``
    _critic_trace: Trace | None
    _acted: tuple[Trace, Parameters, np.ndarray] | None
    #: the actor's last forward pass and the observations that it was for, as long as the actor stands still
    _passed: tuple[Any, np.ndarray, Trace] | None = None
    _stands_still = False

    def __init__(self, policy: ActorCriticPolicy) -> None:
        self.policy = policy
        self.description = "closed-form"
        use_fused_adam(policy.optimizer)
        self._errors_raise = True
        self._adam: QuickAdam | None = None  # until ``refresh``
        self._build(Blueprint(policy))

    def _build(self, blueprint: Blueprint) -> None:
        """Make views of the parameters and of one flat vector of all gradients, the actor's first."""
        parameters = self._trained = blueprint.parameters
        self._memory = [p.data_ptr() for p in parameters]
        self._fingerprint = blueprint.fingerprint()
        self._family = blueprint.family
        self._dtype = DTYPES[parameters[0].dtype]
        self._action_shape: tuple[int, ...] = self.policy.action_space.shape  # type: ignore[assignment]
        self._actor, self._critic = _mlp(blueprint.actor), _mlp(blueprint.critic)
        self._log_std = None if blueprint.log_std is None else _view(blueprint.log_std)
        self._encode = Encoder(self.policy.observation_space, self.policy.normalize_images, self._dtype)

        self._actor_size = self._actor.size + (0 if self._log_std is None else self._log_std.size)
        self._gradient = np.zeros(self._actor_size + self._critic.size, self._dtype)
        self._actor_gradient = self._split(self._gradient)
        self._critic_gradient = self._critic.split(self._gradient[self._actor_size :])
        pieces = th.split(th.from_numpy(self._gradient), [p.numel() for p in parameters])
        offered = [(p, g.view_as(p)) for p, g in zip(parameters, pieces, strict=True)]
        n_actor = len(parameters) - 2 * len(blueprint.critic)
        self._offered = (offered[:n_actor], offered[n_actor:])
        self._offer((False, False))
        self._forget()

    def refresh(self) -> bool:
        choose_threads(0.0)  # torch computes what is too large for one thread of NumPy's BLAS, on one of its own
        self._moved()
        self._errors_raise = not {"ignore", "warn"}.issuperset(np.geterr().values())
        try:
            blueprint = Blueprint(self.policy)
        except Unsuitable:
            self._offer((False, False))
            return False
        if blueprint.fingerprint() != self._fingerprint:
            self._build(blueprint)
        optimizer = self.policy.optimizer
        self._adam = QuickAdam(optimizer) if is_plain_adam(optimizer) else None
        return True

    def __reduce__(self) -> Any:
        # Copies of views would be of no use: a copied or unpickled network is made anew for its own policy.
        from sb3_pg.common.networks import make_network

        return make_network, (self.policy,)

    # Act

    def act(self, observations: Any) -> tuple[np.ndarray, KnownEarly | None]:
        return (self._act_quietly if self._errors_raise else self._act)(observations)

    def _act(self, observations: Any) -> tuple[np.ndarray, KnownEarly | None]:
        x = self._encode(observations)
        n = len(x)
        actions = self._family.sample(self._parameters(self._actor(x)), self._family.noise(n))
        if actions.dtype == np.float64:
            actions = actions.astype(np.float32)
        return actions.reshape(n, *self._action_shape), None

    _act_quietly = _quiet(_act)  # takes as much longer as one of the layers

    def _parameters(self, outputs: np.ndarray) -> Parameters:
        return (outputs,) if self._log_std is None else (outputs, self._log_std)

    # Judge

    def asarray(self, x: Any) -> Array:
        x = np.asarray(x)
        return x.astype(self._dtype, copy=False) if x.dtype.kind == "f" else x

    def actions(self, x: np.ndarray) -> np.ndarray:
        if isinstance(self._family, Categorical):
            choices: np.ndarray = x.astype(np.intp, copy=False)
            return choices.reshape(-1) if isinstance(self.policy.action_space, spaces.Discrete) else choices
        return x.astype(self._dtype, copy=False)

    @_quiet
    def values(self, observations: Any) -> np.ndarray:
        found = [self._critic(self._encode(observations[chunk])) for chunk in _chunks(len(observations))]
        return np.concatenate(found, dtype=np.float32).reshape(-1)

    @_quiet
    def judge(self, observations: Any, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        log_probs = []
        for chunk in _chunks(len(observations)):
            parameters = self._parameters(self._actor(self._encode(observations[chunk])))
            log_probs.append(self._family.log_prob(parameters, self.actions(actions[chunk])))
        return self.values(observations), np.concatenate(log_probs, dtype=np.float32)

    # Step

    @_quiet
    def evaluate(self, observations: Array, actions: Array | None) -> tuple[Array, Array, Array]:
        self._forget()
        x = self._encode(observations)
        values, self._critic_trace = self._critic.forward(x)
        log_prob, entropy = (None, None) if actions is None else self._evaluate_actor(x, actions)
        return log_prob, entropy, values.reshape(-1)

    def _evaluate_actor(self, x: np.ndarray, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        outputs, trace = self._actor.forward(x)
        parameters = self._parameters(outputs)
        self._acted = (trace, parameters, actions)
        return self._family.log_prob(parameters, actions), self._family.entropy(parameters)

    def _forget(self) -> None:
        self._critic_trace = None
        self._acted = None

    @_quiet
    def backward(self, d_log_prob: Array | None, d_entropy: float | None, d_value: Array | None) -> None:
        actor_moves = critic_moves = False
        if self._acted is not None:
            trace, parameters, actions = self._acted
            d_log_prob = None if d_log_prob is None else np.asarray(d_log_prob, self._dtype)
            d_outputs = d_parameters(self._family, parameters, actions, d_log_prob, d_entropy)
            if d_outputs is not None:
                actor_moves = True
                self._actor_backward(trace, d_outputs, self._actor_gradient)
        if self._critic_trace is not None and d_value is not None:
            critic_moves = True
            d = np.asarray(d_value, self._dtype).reshape(-1, 1)
            self._critic.backward(self._critic_trace, d, self._critic_gradient)
        self._offer((actor_moves, critic_moves))
        self._forget()

    def _actor_backward(self, trace: Trace, d: Parameters, gradient: ActorPieces) -> None:
        """Write the actor's gradient, from the derivative by each row's parameters."""
        d_log_std, pieces = gradient
        if d_log_std is not None:
            product(np.ones((1, len(d[1])), d[1].dtype), d[1], d_log_std[None])
        self._actor.backward(trace, d[0], pieces)

    def _split(self, flat: np.ndarray) -> ActorPieces:
        """Views of a flat vector of the actor's parameters: log_std, and weights and biases."""
        if self._log_std is None:
            return None, self._actor.split(flat)
        n = self._log_std.size
        return flat[:n], self._actor.split(flat[n:])

    def _offer(self, moves: tuple[bool, bool]) -> None:
        """Show the optimizer the gradients of those that move, and None for the others: momentum would move zeros.

        :param moves: whether actor and critic move
        """
        for offered, its in zip(self._offered, moves, strict=True):
            first, its_gradient = offered[0]
            if first.grad is (its_gradient if its else None):
                continue  # seen by one of them, to save time: whoever replaces gradients replaces all
            for parameter, gradient in offered:
                parameter.grad = gradient if its else None
        self._moves = moves
        start = 0 if moves[0] else self._actor_size
        self._moving = self._gradient[start : len(self._gradient) if moves[1] else self._actor_size]

    @_quiet
    def step(self, max_grad_norm: float | None, *, hold_actor: bool = False) -> float:
        self._moved()
        if hold_actor and self._moves[0]:
            self._offer((False, self._moves[1]))
        norm = math.sqrt(inner(self._moving, self._moving))
        if not math.isfinite(norm):
            return norm
        if max_grad_norm is not None and norm + 1e-6 > max_grad_norm:
            self._moving *= max_grad_norm / (norm + 1e-6)
        if self._adam is not None:
            self._adam.step(self._moves)
            return norm
        self.policy.optimizer.step()
        if [p.data_ptr() for p in self._trained] != self._memory:  # not torch's own, but some replace ``p.data``
            self._build(Blueprint(self.policy))
        return norm

    # The actor's parameters as one vector

    def find_actor(self, observations: Array, actions: Array) -> None:
        self._stands_still = True  # which parameters are the actor's is known from the policy's layout

    def _moved(self) -> None:
        self._stands_still, self._passed = False, None

    def _pass(self, observations: Array) -> tuple[np.ndarray, Trace]:
        """The actor's outputs and what its derivatives need; a trust-region step asks three times for the same."""
        if self._passed is None or self._passed[0] is not observations:
            found = (observations, *self._actor.forward(self._encode(observations)))
            if not self._stands_still:
                return found[1:]
            self._passed = found
        return self._passed[1:]

    def get_actor(self) -> np.ndarray:
        return np.concatenate([x.reshape(-1) for x in self._actor_arrays()])

    def set_actor(self, vector: Array) -> None:
        self._moved()
        start = 0
        for x in self._actor_arrays():
            x[...] = vector[start : start + x.size].reshape(x.shape)
            start += x.size

    def _actor_arrays(self) -> list[np.ndarray]:
        first = [] if self._log_std is None else [self._log_std]
        return first + [x for piece in self._actor.pieces for x in piece]

    # Natural gradient

    @_quiet
    def actor_gradient(self, observations: Array, actions: Array, d_log_prob: Array, d_entropy: float | None) -> Array:
        self._forget()
        outputs, trace = self._pass(observations)
        self._acted = (trace, self._parameters(outputs), actions)
        self.backward(d_log_prob, d_entropy, None)
        self._offer((False, False))
        return self._gradient[: self._actor_size].copy()

    @_quiet
    def fisher(self, observations: Array) -> Fisher:
        """Products ``J^T M J v / n``, where M is the family's own Fisher matrix of each of n rows."""
        outputs, trace = self._pass(observations)
        parameters, n = self._parameters(outputs), len(outputs)

        @_quiet
        def product(vector: np.ndarray) -> np.ndarray:
            d_log_std, pieces = self._split(np.asarray(vector, self._dtype))
            tangent = self._parameters(self._actor.tangent(trace, pieces))
            if d_log_std is not None:
                tangent = (tangent[0], np.broadcast_to(d_log_std, outputs.shape))
            weighted = tuple(x / n for x in self._family.fisher(parameters, tangent))
            result = np.empty(self._actor_size, self._dtype)
            self._actor_backward(trace, weighted, self._split(result))
            return result

        return product

    @_quiet
    def actor(self, observations: Array, actions: Array) -> tuple[Array, Array, Parameters]:
        outputs = self._pass(observations)[0] if self._stands_still else self._actor(self._encode(observations))
        parameters: Parameters = (outputs,) if self._log_std is None else (outputs, self._log_std.copy())
        return self._family.log_prob(parameters, actions), self._family.entropy(parameters), parameters

    @_quiet
    def kl(self, old: Parameters, new: Parameters) -> Array:
        # In float64: rounding to float32 is as large as a small trust region's KL is exact.
        exact = [tuple(x.astype(np.float64) for x in distribution) for distribution in (old, new)]
        return self._family.kl(*exact)


#: Rows of one chunk of a judging pass, so that its activations take little memory and stay in the cache.
_CHUNK_ROWS = 1 << 13


def _chunks(n: int) -> list[slice]:
    return [slice(start, start + _CHUNK_ROWS) for start in range(0, n, _CHUNK_ROWS)]


def _view(parameter: th.Tensor) -> np.ndarray:
    view: np.ndarray = parameter.detach().numpy()
    return view


def _mlp(layers: Layers) -> Mlp:
    """The layers as NumPy sees them."""
    return Mlp(
        [(_view(linear.weight), _view(linear.bias)) for linear, _ in layers],
        [None if f is None else ACTIVATIONS[type(f)](f) for _, f in layers],
    )

"""SB3's MlpPolicy on the CPU, differentiated by hand in NumPy.

On networks as small as this one, a torch call takes longer than its arithmetic. Here actor and critic are chains of
layers ``h_l = f_l(z_l)``, ``z_l = h_(l-1) W_l^T + b_l`` with one row per observation, and three passes over such a
chain (:class:`Mlp`) are all there is:

- forward: the outputs, which are the parameters of the action distribution (a *family*), or the value;
- backward: from the derivative of a loss by the outputs to its gradient, J^T u;
- tangent: from a change of the weights to the change of the outputs, J v, for Fisher-vector products J^T M J v.

The torch parameters stay the one truth. Weights are views of their memory, gradients are written where their
``.grad`` looks, and the policy's own torch optimizer moves them.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common import distributions as sb3
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.torch_layers import FlattenExtractor, MlpExtractor
from torch import nn

from sb3_pg.common.arrays import Array
from sb3_pg.common.distributions import Bernoulli, Categorical, Family, Gaussian, Parameters
from sb3_pg.common.networks.autograd import AutogradNetwork, use_fused_adam
from sb3_pg.common.networks.protocol import Fisher, KnownEarly

Function = TypeVar("Function", bound=Callable[..., Any])


def _quiet(function: Function) -> Function:
    """Let a caller's ``np.seterr(all="raise")`` not reach into a function.

    What its numbers underflow to is right, and the algorithm itself looks for those that are not finite.
    """
    return np.errstate(all="ignore")(function)


# ---------------------------------------------------------------- activations


class Activation(NamedTuple):
    """A function of each number, and its derivative.

    ``function`` may overwrite its argument z if ``slope`` does not need it.
    """

    function: Callable[[np.ndarray], np.ndarray]  # z to h
    slope: Callable[[np.ndarray, np.ndarray], np.ndarray]  # z and h to dh / dz


def _tanh(_: Any) -> Activation:
    return Activation(lambda z: np.tanh(z, out=z), lambda z, h: 1.0 - h * h)


def _relu(_: Any) -> Activation:
    return Activation(lambda z: np.maximum(z, 0.0, out=z), lambda z, h: (h > 0.0).astype(h.dtype))


def _leaky_relu(module: Any) -> Activation:
    a = float(module.negative_slope)
    return Activation(lambda z: np.where(z > 0.0, z, a * z), lambda z, h: np.where(z > 0.0, 1.0, a).astype(z.dtype))


def _elu(module: Any) -> Activation:
    a = float(module.alpha)
    return Activation(
        lambda z: np.where(z > 0.0, z, a * np.expm1(np.minimum(z, 0.0))),
        lambda z, h: np.where(z > 0.0, np.ones_like(h), h + a),
    )


def _sigmoid(z: np.ndarray) -> np.ndarray:
    return 0.5 + 0.5 * np.tanh(0.5 * z)


def _silu(_: Any) -> Activation:
    def slope(z: np.ndarray, h: np.ndarray) -> np.ndarray:
        p = _sigmoid(z)
        return p + h * (1.0 - p)

    return Activation(lambda z: z * _sigmoid(z), slope)


def _gelu(module: Any) -> Activation:
    """``z Phi(z)`` with the normal distribution's Phi, or its usual approximation by tanh."""
    if module.approximate == "none":
        root = math.sqrt(0.5)

        def phi(z: np.ndarray) -> np.ndarray:  # NumPy has no error function
            erf: np.ndarray = th.erf(th.from_numpy(root * z)).numpy()
            return 0.5 + 0.5 * erf

        density = 1.0 / math.sqrt(2.0 * math.pi)
        return Activation(lambda z: z * phi(z), lambda z, h: phi(z) + density * z * np.exp(-0.5 * z * z))

    k, c = math.sqrt(2.0 / math.pi), 0.044715

    def gate(z: np.ndarray) -> Any:
        return np.tanh(k * (z + c * z * z * z))

    def slope(z: np.ndarray, h: np.ndarray) -> Any:
        t = gate(z)
        return 0.5 * (1.0 + t) + 0.5 * k * z * (1.0 - t * t) * (1.0 + 3.0 * c * z * z)

    return Activation(lambda z: 0.5 * z * (1.0 + gate(z)), slope)


#: By the exact class of the torch module.
ACTIVATIONS: dict[type[nn.Module], Callable[[Any], Activation]] = {
    nn.Tanh: _tanh,
    nn.ReLU: _relu,
    nn.LeakyReLU: _leaky_relu,
    nn.ELU: _elu,
    nn.SiLU: _silu,
    nn.GELU: _gelu,
}

# --------------------------------------------------------------------- layers

#: Weight and bias of each layer, or gradients or changes of them in the same shapes.
Pieces = list[tuple[np.ndarray, np.ndarray]]


class Trace(NamedTuple):
    """What a forward pass leaves for the other two: of each layer, its input and the slope of its activation."""

    inputs: list[np.ndarray]
    slopes: list[np.ndarray | None]


class Mlp:
    """A chain of linear layers with activations.

    :param pieces: weight, (outputs, inputs), and bias of each layer
    :param activations: one for each layer; None passes numbers on as they are
    """

    def __init__(self, pieces: Pieces, activations: list[Activation | None]) -> None:
        self.pieces = pieces
        self.activations = activations
        self.size = sum(weight.size + bias.size for weight, bias in pieces)
        self._steps = [
            (weight.T, bias, activation.function if activation else None)
            for (weight, bias), activation in zip(pieces, activations, strict=True)
        ]

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """The outputs, (n, outputs); ``x`` may also be a single row (inputs,), which is faster."""
        for weight, bias, function in self._steps:
            x = x.dot(weight)
            x += bias
            if function is not None:
                x = function(x)
        return x

    def forward(self, x: np.ndarray) -> tuple[np.ndarray, Trace]:
        """The outputs and what ``backward`` and ``tangent`` need."""
        trace = Trace([], [])
        for (weight, bias), activation in zip(self.pieces, self.activations, strict=True):
            trace.inputs.append(x)
            z = x.dot(weight.T)
            z += bias
            x = z if activation is None else activation.function(z)
            trace.slopes.append(None if activation is None else activation.slope(z, x))
        return x, trace

    def backward(self, trace: Trace, d: np.ndarray, gradient: Pieces) -> None:
        """J^T d: from the derivative by the outputs, (n, outputs), to the gradient.

        Per layer ``dz = dh f'(z)``, ``dW = dz^T h_before``, ``db = sum of dz``, ``dh_before = dz W``.

        :param gradient: where to write it
        """
        ones = np.ones(len(d), d.dtype)  # a product with it sums faster than ``sum``
        for layer in reversed(range(len(self.pieces))):
            slope = trace.slopes[layer]
            if slope is not None:
                d = d * slope
            d_weight, d_bias = gradient[layer]
            np.dot(d.T, trace.inputs[layer], out=d_weight)
            np.dot(ones, d, out=d_bias)
            if layer:
                d = d.dot(self.pieces[layer][0])

    def tangent(self, trace: Trace, change: Pieces) -> np.ndarray:
        """J v: how the outputs change with the weights. Per layer ``dh = f'(z) (dh_before W^T + h_before dW^T + db)``.

        :param change: of weights and biases
        """
        t = np.empty(0)
        for layer, (d_weight, d_bias) in enumerate(change):
            dz: np.ndarray = trace.inputs[layer].dot(d_weight.T)
            dz += d_bias
            if layer:  # observations do not change
                dz += t.dot(self.pieces[layer][0].T)
            slope = trace.slopes[layer]
            if slope is not None:
                dz *= slope
            t = dz
        return t

    def split(self, flat: np.ndarray) -> Pieces:
        """Views of a flat vector in the shapes of the weights and biases."""
        views, start = [], 0
        for weight, bias in self.pieces:
            middle, end = start + weight.size, start + weight.size + bias.size
            views.append((flat[start:middle].reshape(weight.shape), flat[middle:end]))
            start = end
        return views


# ------------------------------------------------------- observations and noise


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
        return numbers if self._divisor is None else np.divide(numbers, self._divisor)


class Noise:
    """Random rows for sampling actions, drawn many at once from NumPy's global generator, which SB3 seeds.

    Blocks double in size from ``_FIRST`` to ``_LARGEST`` rows, so that short rollouts do not draw much in vain.
    What is left at the end of a rollout is thrown away: then a seed set in between has its full effect.
    """

    _FIRST, _LARGEST = 64, 4096

    def __init__(self, family: Family, dtype: Any) -> None:
        self._draw = family.noise
        self._dtype = dtype
        self.reset()

    def reset(self) -> None:
        """Forget what was drawn."""
        self._block = np.empty((0, 0))
        self._used = 0
        self._next_size = self._FIRST

    def rows(self, n: int) -> np.ndarray:
        """The next ``n`` rows."""
        start = self._used
        if start + n > len(self._block):
            self._block = self._draw(max(n, self._next_size)).astype(self._dtype)
            self._next_size = min(2 * self._next_size, self._LARGEST)
            start = 0
        self._used = start + n
        return self._block[start : self._used]


class _Categorical(Categorical):
    """Remembers the log-softmax of the last logits, which all formulas on one minibatch share."""

    _last: tuple[Array, list[Array]] = (None, [])

    def _log_softmax(self, logits: Array) -> list[Array]:
        if self._last[0] is not logits:
            self._last = (logits, super()._log_softmax(logits))
        return self._last[1]


# ------------------------------------------------------ is a policy of this kind?


class Unsuitable(Exception):  # noqa: N818  # an answer, not an error
    """Why a policy cannot be computed in closed form."""


#: A linear layer and the activation after it.
Layers = list[tuple[nn.Linear, nn.Module | None]]

_METHODS = frozenset(name for name in dir(ActorCriticPolicy) if callable(getattr(ActorCriticPolicy, name)))
_OWN_CODE = frozenset(("forward", "forward_actor", "forward_critic"))
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_SPACES = (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)
_DTYPES = {th.float32: np.float32, th.float64: np.float64}


class Blueprint:
    """The parts of a policy that are computed with; made only if they are all there is to it.

    :param policy: any policy
    :raises Unsuitable: this one needs autograd
    """

    def __init__(self, policy: ActorCriticPolicy) -> None:
        _check_code(policy)
        _check_space(policy.observation_space)
        self.actor: Layers = [*_layers(policy.mlp_extractor.policy_net), (_linear(policy.action_net), None)]
        self.critic: Layers = [*_layers(policy.mlp_extractor.value_net), (_linear(policy.value_net), None)]
        self.family = _family(policy.action_dist)
        self.log_std: nn.Parameter | None = policy.log_std if isinstance(self.family, Gaussian) else None
        #: the actor's and then the critic's, each in the order of ``policy.parameters()``
        self.parameters: list[th.Tensor] = [] if self.log_std is None else [self.log_std]
        for layer, _ in [*self.actor, *self.critic]:
            self.parameters += (layer.weight, layer.bias)
        _check_parameters(self.parameters)

    def fingerprint(self) -> list[Any]:
        """Equal for two blueprints if views made for one are right for the other."""
        memory: list[Any] = [(id(p), p.data_ptr(), p.dtype) for p in self.parameters]
        activations = [f and (type(f), f.extra_repr()) for _, f in [*self.actor, *self.critic]]
        return [*memory, *activations, type(self.family), *vars(self.family).items()]


def _check_code(policy: ActorCriticPolicy) -> None:
    """Whether it is SB3's code, all of it and nothing else, that the policy runs."""
    if type(policy) is not ActorCriticPolicy:
        raise Unsuitable(f"{type(policy).__name__} is not SB3's MlpPolicy")
    if policy.use_sde:
        raise Unsuitable("generalised state-dependent exploration")
    for extractor in (policy.features_extractor, policy.pi_features_extractor, policy.vf_features_extractor):
        if type(extractor) is not FlattenExtractor:
            raise Unsuitable(f"the features extractor is {type(extractor).__name__}")
    if type(policy.mlp_extractor) is not MlpExtractor:
        raise Unsuitable(f"the MLP extractor is {type(policy.mlp_extractor).__name__}")
    if not _METHODS.isdisjoint(policy.__dict__):
        raise Unsuitable(f"the policy's {min(_METHODS & policy.__dict__.keys())} is replaced")
    for module in policy.modules():
        own = module.__dict__
        if any(own.get(name) for name in _HOOKS):
            raise Unsuitable(f"{type(module).__name__} has a hook")
        if not _OWN_CODE.isdisjoint(own):
            raise Unsuitable(f"{type(module).__name__}'s {min(_OWN_CODE & own.keys())} is replaced")


def _check_space(space: spaces.Space[Any]) -> None:
    """Whether observations of it can be encoded."""
    starts_elsewhere = np.any(getattr(space, "start", 0))  # SB3 one-hot encodes from 0 and refuses such observations
    if not isinstance(space, _SPACES) or starts_elsewhere:
        raise Unsuitable(f"observations are of {space}")


def _layers(net: nn.Module) -> Layers:
    """The hidden layers of an actor or critic."""
    if type(net) is not nn.Sequential:
        raise Unsuitable(f"the layers are in a {type(net).__name__}")
    layers: Layers = []
    for module in net:
        if type(module) in ACTIVATIONS and layers and layers[-1][1] is None:
            layers[-1] = (layers[-1][0], module)
        else:
            layers.append((_linear(module), None))
    return layers


def _linear(module: nn.Module) -> nn.Linear:
    if type(module) is not nn.Linear:
        raise Unsuitable(f"a layer is {type(module).__name__}")
    return module


def _family(distribution: sb3.Distribution) -> Family:
    if type(distribution) is sb3.DiagGaussianDistribution:
        return Gaussian(distribution.action_dim)
    if type(distribution) is sb3.CategoricalDistribution:
        return _Categorical([distribution.action_dim])
    if type(distribution) is sb3.MultiCategoricalDistribution:
        return _Categorical([int(size) for size in distribution.action_dims])
    if type(distribution) is sb3.BernoulliDistribution:
        return Bernoulli(distribution.action_dims)
    raise Unsuitable(f"the action distribution is {type(distribution).__name__}")


def _check_parameters(parameters: list[th.Tensor]) -> None:
    """Whether NumPy can see all of them, each in one place and trained by plain gradients."""
    if any(p is None for p in parameters):
        raise Unsuitable("a layer has no bias")
    if any(p.device.type != "cpu" for p in parameters):
        raise Unsuitable(f"the policy is on {parameters[0].device}")
    dtype = parameters[0].dtype
    if dtype not in _DTYPES or any(p.dtype is not dtype for p in parameters):
        raise Unsuitable(f"parameters are of {dtype}, or of several types")
    if not all(p.is_contiguous() for p in parameters):
        raise Unsuitable("parameters are not contiguous in memory")
    if not all(p.requires_grad for p in parameters):
        raise Unsuitable("parameters are frozen")
    if len({id(p) for p in parameters}) < len(parameters):
        raise Unsuitable("layers share parameters")
    if any(p._backward_hooks or getattr(p, "_post_accumulate_grad_hooks", None) for p in parameters):
        raise Unsuitable("a parameter has a hook")


# -------------------------------------------------------------------- network


class ClosedFormNetwork:
    """Acts, judges and steps by NumPy on the memory of the policy's parameters.

    :param policy: SB3's MlpPolicy with nothing replaced, on the CPU
    :raises Unsuitable: the policy is not of that kind
    """

    judges_while_acting = False

    #: what ``evaluate`` remembers for ``backward``
    _critic_trace: Trace | None
    _acted: tuple[Trace, Parameters, np.ndarray] | None

    def __init__(self, policy: ActorCriticPolicy) -> None:
        self.policy = policy
        self.description = "closed-form"
        use_fused_adam(policy.optimizer)
        self._build(Blueprint(policy))

    def _build(self, blueprint: Blueprint) -> None:
        """Make views of the parameters and of one flat vector of all gradients, the actor's first."""
        parameters = self._trained = blueprint.parameters
        self._memory = [p.data_ptr() for p in parameters]
        self._fingerprint = blueprint.fingerprint()
        self._family = blueprint.family
        self._dtype = _DTYPES[parameters[0].dtype]
        self._actor, self._critic = _mlp(blueprint.actor), _mlp(blueprint.critic)
        self._log_std = None if blueprint.log_std is None else _view(blueprint.log_std)
        self._encode = Encoder(self.policy.observation_space, self.policy.normalize_images, self._dtype)
        self._noise = Noise(self._family, self._dtype)

        self._actor_size = self._actor.size + (0 if self._log_std is None else self._log_std.size)
        self._gradient = np.zeros(self._actor_size + self._critic.size, self._dtype)
        self._critic_gradient = self._critic.split(self._gradient[self._actor_size :])
        pieces = th.split(th.from_numpy(self._gradient), [p.numel() for p in parameters])
        offered = [(p, g.view_as(p)) for p, g in zip(parameters, pieces, strict=True)]
        n_actor = len(parameters) - 2 * len(blueprint.critic)
        self._offered = (offered[:n_actor], offered[n_actor:])
        self._offer(actor=False, critic=False)
        self._forget()

    def refresh(self) -> None:
        """Look at the policy anew; if it has changed beyond closed form, be an autograd network from here on.

        The same object, because the algorithm is already holding it.
        """
        try:
            blueprint = Blueprint(self.policy)
        except Unsuitable as reason:
            policy = self.policy
            policy.zero_grad(set_to_none=True)
            self.__dict__.clear()
            self.__class__ = AutogradNetwork  # type: ignore[assignment]
            AutogradNetwork.__init__(self, policy, str(reason))  # type: ignore[arg-type]
            return
        if blueprint.fingerprint() != self._fingerprint:
            self._build(blueprint)
        self._noise.reset()

    def __getstate__(self) -> dict[str, Any]:
        # Copies of views would be of no use: a copied or unpickled network looks at its own policy.
        return {"policy": self.policy, "description": self.description, "_fingerprint": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.refresh()

    # Act

    @_quiet
    def act(self, observations: Any) -> tuple[np.ndarray, KnownEarly | None]:
        x = self._encode(observations)
        n = len(x)
        outputs = self._actor(x[0])[None] if n == 1 else self._actor(x)
        actions = self._family.sample(self._parameters(outputs), self._noise.rows(n))
        if actions.dtype == np.float64:
            actions = actions.astype(np.float32)
        return actions.reshape(n, *self.policy.action_space.shape), None  # type: ignore[misc]

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
        if self._acted is not None and (d_log_prob is not None or d_entropy):
            actor_moves = True
            self._actor_backward(self._acted[0], self._d_parameters(d_log_prob, d_entropy), self._gradient)
        if self._critic_trace is not None and d_value is not None:
            critic_moves = True
            d = np.asarray(d_value, self._dtype).reshape(-1, 1)
            self._critic.backward(self._critic_trace, d, self._critic_gradient)
        self._offer(actor=actor_moves, critic=critic_moves)
        self._forget()

    def _d_parameters(self, d_log_prob: Array | None, d_entropy: float | None) -> Parameters:
        """The derivative of the loss by the distribution's parameters, from those by log-probability and entropy."""
        assert self._acted is not None
        _, parameters, actions = self._acted
        total: Parameters | None = None
        if d_log_prob is not None:
            d = np.asarray(d_log_prob, self._dtype).reshape(-1, 1)
            total = tuple(d * x for x in self._family.d_log_prob(parameters, actions))
        if d_entropy:
            more = tuple(float(d_entropy) * x for x in self._family.d_entropy(parameters))
            total = more if total is None else tuple(a + b for a, b in zip(total, more, strict=True))
        assert total is not None
        return total

    def _actor_backward(self, trace: Trace, d: Parameters, gradient: np.ndarray) -> None:
        """Write the actor's gradient, from the derivative by each row's parameters, to the start of ``gradient``."""
        d_log_std, pieces = self._split(gradient)
        if d_log_std is not None:
            np.sum(d[1], axis=0, out=d_log_std)
        self._actor.backward(trace, d[0], pieces)

    def _split(self, flat: np.ndarray) -> tuple[np.ndarray | None, Pieces]:
        """Views of a flat vector of the actor's parameters: log_std, and weights and biases."""
        if self._log_std is None:
            return None, self._actor.split(flat)
        n = self._log_std.size
        return flat[:n], self._actor.split(flat[n:])

    def _offer(self, *, actor: bool, critic: bool) -> None:
        """Show the optimizer the gradients of those that move, and None for the others: momentum would move zeros."""
        for offered, moves in zip(self._offered, (actor, critic), strict=True):
            for parameter, gradient in offered:
                wanted = gradient if moves else None
                if parameter.grad is not wanted:
                    parameter.grad = wanted
        start = 0 if actor else self._actor_size
        self._moving = self._gradient[start : len(self._gradient) if critic else self._actor_size]

    @_quiet
    def step(self, max_grad_norm: float | None, *, hold_actor: bool = False) -> float:
        if hold_actor:
            self._offer(actor=False, critic=self._offered[1][0][0].grad is not None)
        norm = math.sqrt(self._moving.dot(self._moving))
        if not np.isfinite(norm):
            return norm
        if max_grad_norm is not None and norm + 1e-6 > max_grad_norm:
            self._moving *= max_grad_norm / (norm + 1e-6)
        self.policy.optimizer.step()
        if [p.data_ptr() for p in self._trained] != self._memory:  # not torch's own, but some replace ``p.data``
            self._build(Blueprint(self.policy))
        return norm

    # The actor's parameters as one vector

    def find_actor(self, observations: Array, actions: Array) -> None:
        pass  # known from the policy's layout

    def get_actor(self) -> np.ndarray:
        return np.concatenate([x.reshape(-1) for x in self._actor_arrays()])

    def set_actor(self, vector: Array) -> None:
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
        self._evaluate_actor(self._encode(observations), actions)
        self.backward(d_log_prob, d_entropy, None)
        self._offer(actor=False, critic=False)
        return self._gradient[: self._actor_size].copy()

    @_quiet
    def fisher(self, observations: Array) -> Fisher:
        """Products ``J^T M J v / n``, where M is the family's own Fisher matrix of each of n rows."""
        outputs, trace = self._actor.forward(self._encode(observations))
        parameters, n = self._parameters(outputs), len(outputs)

        @_quiet
        def product(vector: np.ndarray) -> np.ndarray:
            d_log_std, pieces = self._split(np.asarray(vector, self._dtype))
            tangent = self._parameters(self._actor.tangent(trace, pieces))
            if d_log_std is not None:
                tangent = (tangent[0], np.broadcast_to(d_log_std, outputs.shape))
            weighted = tuple(x / n for x in self._family.fisher(parameters, tangent))
            result = np.empty(self._actor_size, self._dtype)
            self._actor_backward(trace, weighted, result)
            return result

        return product

    @_quiet
    def actor(self, observations: Array, actions: Array) -> tuple[Array, Array, Parameters]:
        outputs = self._actor(self._encode(observations))
        parameters: Parameters = (outputs,) if self._log_std is None else (outputs, self._log_std.copy())
        return self._family.log_prob(parameters, actions), self._family.entropy(parameters), parameters

    @_quiet
    def kl(self, old: Parameters, new: Parameters) -> Array:
        # In float64: rounding to float32 is as large as a small trust region's KL is exact.
        exact = [tuple(x.astype(np.float64) for x in distribution) for distribution in (old, new)]
        return self._family.kl(*exact)


#: Rows of one chunk of a judging pass, to bound the memory of its activations.
_CHUNK_ROWS = 1 << 16


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

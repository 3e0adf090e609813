"""Any ActorCriticPolicy on any device, differentiated by torch."""

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.distributions import Distribution, kl_divergence
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import CombinedExtractor, FlattenExtractor, NatureCNN
from stable_baselines3.common.utils import obs_as_tensor

from sb3_pg.common.arrays import Array, length, take
from sb3_pg.common.distributions import Family, Gaussian, Parameters, d_parameters, describe
from sb3_pg.common.networks.blueprint import Unsuitable, family_of
from sb3_pg.common.networks.protocol import Fisher, KnownEarly
from sb3_pg.common.threads import choose_threads

#: The methods by which SB3's policy acts and judges. If a subclass changes one of them, its ``forward`` acts,
#: as in SB3, and what ``forward`` says about values and log-probabilities is believed.
_ACTING = ("forward", "evaluate_actions", "get_distribution", "predict_values", "extract_features")

#: Numbers in the observations of one chunk of a judging pass: 4 MB of float32, so that a rollout of images does
#: not become float32, and the activations of a convolution, all at once.
_CHUNK_NUMBERS = 1 << 20


#: Tensors in the graph with the derivatives of the loss by them.
Derivatives = list[tuple[th.Tensor, th.Tensor | None]]


class AutogradNetwork:
    """Acts, judges and steps through the policy's own methods.

    :param policy: any ActorCriticPolicy, SB3's or a subclass with its own modules, distributions or features
    """

    sequential = False

    def __init__(self, policy: ActorCriticPolicy, why: str = "") -> None:
        self.policy = policy
        self.description = "autograd" + (f" ({why})" if why else "")
        self._device = policy.device
        self._forward_acts = any(
            getattr(type(policy), name) is not getattr(ActorCriticPolicy, name) or name in policy.__dict__
            for name in _ACTING
        )
        self._family = None if self._forward_acts else _family_of(policy)
        extractors = {type(policy.pi_features_extractor), type(policy.vf_features_extractor)}
        # Where actor and critic share a convolution, what else acting could compute costs next to nothing.
        heads_are_cheap = policy.share_features_extractor and extractors != {FlattenExtractor}
        self.judges_while_acting = self._forward_acts or (self._family is not None and heads_are_cheap)
        #: from the derivatives by what ``evaluate`` returned to those by tensors in the graph
        self._push: Callable[[Array | None, float | None, Array | None], Derivatives] | None = None
        self._actor: list[th.nn.Parameter] = []
        use_fused_adam(policy.optimizer)
        self._arranged = channels_last if extractors <= {NatureCNN, CombinedExtractor} else lambda x: x
        self._largest_layer = largest_layer(policy)

    def refresh(self) -> bool:
        self._actor = []
        self._largest_layer = largest_layer(self.policy)
        self._family = None if self._forward_acts else _family_of(self.policy)
        return self.policy.device == self._device

    # Act

    def act(self, observations: Any) -> tuple[np.ndarray, KnownEarly | None]:
        choose_threads(length(observations) * self._largest_layer)
        with th.no_grad():
            tensor: Any = self._arranged(obs_as_tensor(observations, self.policy.device))
            if self._forward_acts:
                actions, values, log_prob = self.policy(tensor)
                return actions.cpu().numpy(), (values, log_prob)
            if self._family is not None:
                return self._act_by_formulas(self._family, tensor)
            actions = self.policy.get_distribution(tensor).get_actions()
        return self._in_shape(actions.cpu().numpy()), None

    def _act_by_formulas(self, family: Family, observations: Any) -> tuple[np.ndarray, KnownEarly | None]:
        values = None
        if self.judges_while_acting:
            outputs, values = self._outputs(observations)
        else:
            outputs = self._actor_outputs(observations)
        parameters = tuple(x.float().cpu().numpy() for x in outputs)
        actions = family.sample(parameters, family.noise(len(parameters[0])))
        known = None if values is None else (values, th.from_numpy(family.log_prob(parameters, actions)))
        return self._in_shape(actions), known

    def _in_shape(self, actions: np.ndarray) -> np.ndarray:
        shape: tuple[int, ...] = self.policy.action_space.shape or ()
        return actions.reshape(-1, *shape)

    def _actor_outputs(self, observations: Any) -> tuple[th.Tensor, ...]:
        """What ``policy.get_distribution`` makes a distribution of, which on a few rows takes longer than it does."""
        policy = self.policy
        features = super(ActorCriticPolicy, policy).extract_features(observations, policy.pi_features_extractor)
        return self._parameters(policy.action_net(policy.mlp_extractor.forward_actor(features)))

    def _parameters(self, outputs: th.Tensor) -> tuple[th.Tensor, ...]:
        if not isinstance(self._family, Gaussian):
            return (outputs,)
        log_std = self.policy.log_std.expand_as(outputs)
        if th.is_grad_enabled() and not log_std.requires_grad:
            log_std = log_std + 0.0 * outputs  # frozen, but in the graph like the rest
        return outputs, log_std

    # Judge

    def asarray(self, x: Any) -> Array:
        if isinstance(x, dict):
            return {key: self.asarray(value) for key, value in x.items()}
        return th.as_tensor(x, device=self.policy.device)

    def actions(self, x: np.ndarray) -> th.Tensor:
        space = self.policy.action_space
        if isinstance(space, spaces.Discrete | spaces.MultiDiscrete):
            choices = th.as_tensor(x, device=self.policy.device).long()
            return choices.flatten() if isinstance(space, spaces.Discrete) else choices
        return th.as_tensor(x.astype(np.float32, copy=False), device=self.policy.device)

    def values(self, observations: Any) -> np.ndarray:
        values = np.empty(length(observations), np.float32)
        with th.no_grad():
            for chunk in self._chunks(observations):
                found = self.policy.predict_values(self._arranged(self.asarray(take(observations, chunk))))
                values[chunk] = found.flatten().cpu().numpy()
        return values

    def judge(self, observations: Any, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        # Into memory made before: see Column about small arrays that stay.
        values, log_probs = (np.empty(length(observations), np.float32) for _ in range(2))
        with th.no_grad():
            for chunk in self._chunks(observations):
                v, log_prob, _ = self.policy.evaluate_actions(
                    self._arranged(self.asarray(take(observations, chunk))), self.actions(actions[chunk])
                )
                values[chunk] = v.flatten().cpu().numpy()
                log_probs[chunk] = log_prob.cpu().numpy()
        return values, log_probs

    def _chunks(self, observations: Any) -> list[slice]:
        """Pieces of a pass over many observations."""
        first = observations.values() if isinstance(observations, dict) else [observations]
        numbers = sum(int(np.prod(x.shape[1:])) for x in first)
        n, size = length(observations), max(1, _CHUNK_NUMBERS // max(numbers, 1))
        choose_threads(min(n, size) * self._largest_layer)
        return [slice(start, start + size) for start in range(0, n, size)]

    # Step

    def evaluate(self, observations: Array, actions: Array | None) -> tuple[Array, Array, Array]:
        choose_threads(length(observations) * self._largest_layer)
        observations = self._arranged(observations)
        if actions is None:
            values = self.policy.predict_values(observations).flatten()
            self._push = lambda d_log_prob, d_entropy, d_value: [(values, d_value)]
            return None, None, values.detach()
        return (self._evaluate_policy if self._family is None else self._evaluate_family)(observations, actions)

    def _evaluate_family(self, observations: Array, actions: Array) -> tuple[Array, Array, Array]:
        """The graph ends with the distribution's parameters; the rest is formulas, which take fewer calls."""
        family: Any = self._family
        outputs, values = self._outputs(observations)
        parameters = tuple(x.detach() for x in outputs)

        def push(d_log_prob: Array | None, d_entropy: float | None, d_value: Array | None) -> Derivatives:
            d_outputs = d_parameters(family, parameters, actions, d_log_prob, d_entropy)
            return [*zip(outputs, d_outputs or [None] * len(outputs), strict=True), (values, d_value)]

        self._push = push
        return family.log_prob(parameters, actions), family.entropy(parameters), values.detach()

    def _outputs(self, observations: Any) -> tuple[tuple[th.Tensor, ...], th.Tensor]:
        """Parameters of each row's distribution, and V."""
        policy = self.policy
        features = policy.extract_features(observations)
        if policy.share_features_extractor:
            latent_pi, latent_vf = policy.mlp_extractor(features)
        else:
            latent_pi, latent_vf = (
                policy.mlp_extractor.forward_actor(features[0]),
                policy.mlp_extractor.forward_critic(features[1]),
            )
        return self._parameters(policy.action_net(latent_pi)), policy.value_net(latent_vf).flatten()

    def _evaluate_policy(self, observations: Array, actions: Array) -> tuple[Array, Array, Array]:
        """By the policy's own method, for distributions of any kind."""
        values, log_prob, entropy = self.policy.evaluate_actions(observations, actions)
        values = values.flatten()
        if entropy is None:
            entropy = -log_prob  # no closed form (squashed Gaussian): its one-sample estimate, as in SB3

        def push(d_log_prob: Array | None, d_entropy: float | None, d_value: Array | None) -> Derivatives:
            d = th.full_like(entropy, d_entropy) if d_entropy and entropy.requires_grad else None
            return [(log_prob, d_log_prob), (entropy, d), (values, d_value)]

        self._push = push
        return log_prob.detach(), entropy.detach(), values.detach()

    def backward(self, d_log_prob: Array | None, d_entropy: float | None, d_value: Array | None) -> None:
        self.policy.optimizer.zero_grad(set_to_none=True)
        assert self._push is not None, "evaluate comes first"
        derivatives = self._push(d_log_prob, d_entropy, d_value)
        known = [(x, d) for x, d in derivatives if d is not None and x.requires_grad]  # actor or critic may be frozen
        if known:
            th.autograd.backward([x for x, _ in known], [d for _, d in known])
        self._push = None

    def step(self, max_grad_norm: float | None, *, hold_actor: bool = False) -> float:
        parameters = [p for p in self.policy.parameters() if p.grad is not None]
        if hold_actor:
            held = {id(p) for p in self._actor}
            for p in parameters:
                if id(p) in held:
                    p.grad = None
            parameters = [p for p in parameters if p.grad is not None]
        norm = th.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        size = float(norm)
        if not np.isfinite(size):
            return size
        if max_grad_norm is not None:
            th.nn.utils.clip_grads_with_norm_(parameters, max_grad_norm, norm)
        self.policy.optimizer.step()
        return size

    # The actor's parameters as one vector

    def find_actor(self, observations: Array, actions: Array) -> None:
        # From the graph and not from names: a Dict key "value_map" or a layer "query_key_value" may well act.
        if self._actor:
            return
        training = self.policy.training
        self.policy.set_training_mode(False)  # batch normalisation learns nothing from this one row
        row = take(observations, slice(0, 1))
        if self._family is not None:
            outputs = self._actor_outputs(row)
        else:
            outputs = (self.policy.evaluate_actions(row, actions[:1])[1],)
        self.policy.set_training_mode(training)
        trained = [p for p in self.policy.parameters() if p.requires_grad]
        gradients = th.autograd.grad([x.sum() for x in outputs], trained, allow_unused=True)
        self._actor = [p for p, g in zip(trained, gradients, strict=True) if g is not None]

    def get_actor(self) -> Array:
        return th.cat([p.detach().reshape(-1) for p in self._actor])

    def set_actor(self, vector: Array) -> None:
        with th.no_grad():
            for p, piece in zip(self._actor, _split(vector, self._actor), strict=True):
                p.copy_(piece)

    # Natural gradient

    def actor_gradient(self, observations: Array, actions: Array, d_log_prob: Array, d_entropy: float | None) -> Array:
        gradient = th.zeros(())
        for chunk in self._chunks(observations):
            self.evaluate(take(observations, chunk), actions[chunk])
            self.backward(d_log_prob[chunk], d_entropy, None)
            gradient = gradient + _flat([p.grad for p in self._actor], self._actor)
        self.policy.optimizer.zero_grad(set_to_none=True)
        return gradient

    def fisher(self, observations: Array) -> Fisher:
        choose_threads(length(observations) * self._largest_layer)
        if self._family is not None:
            family, outputs = self._family, self._actor_outputs(self._arranged(observations))
        else:
            distribution = self.policy.get_distribution(self._arranged(observations))
            described = describe(distribution)
            if described is None:
                return self._fisher_from_kl(distribution, length(observations))
            family, outputs = described
        values = tuple(z.detach() for z in outputs)
        # J v without forward-mode differentiation: the gradient g(u) = J^T u is linear in u, so differentiating
        # g . v with respect to u gives J v. One backward pass recorded here serves every product.
        probes = [th.zeros_like(z, requires_grad=True) for z in outputs]
        recorded = th.autograd.grad(outputs, self._actor, probes, create_graph=True, materialize_grads=True)

        def product(vector: th.Tensor) -> th.Tensor:
            pieces = _split(vector, self._actor)
            tangent = th.autograd.grad(recorded, probes, pieces, retain_graph=True, materialize_grads=True)
            weighted = [w / length(observations) for w in family.fisher(values, tangent)]
            back = th.autograd.grad(outputs, self._actor, weighted, retain_graph=True, materialize_grads=True)
            return _flat(list(back), self._actor)

        return product

    def _fisher_from_kl(self, distribution: Distribution, n: int) -> Fisher:
        """For a distribution of unknown kind: the Hessian of KL(old || new) at new = old, by double backward."""
        kl = self._torch_kl(_detached(distribution), distribution).sum() / n
        gradient = _flat(
            list(th.autograd.grad(kl, self._actor, create_graph=True, materialize_grads=True)), self._actor
        )

        def product(vector: th.Tensor) -> th.Tensor:
            back = th.autograd.grad(gradient @ vector, self._actor, retain_graph=True, materialize_grads=True)
            return _flat(list(back), self._actor)

        return product

    def actor(self, observations: Array, actions: Array) -> tuple[Array, Array, Parameters]:
        with th.no_grad():
            if self._family is not None:
                chunks = (self._arranged(take(observations, chunk)) for chunk in self._chunks(observations))
                outputs = tuple(map(th.cat, zip(*map(self._actor_outputs, chunks), strict=True)))
                family: Any = self._family
                return family.log_prob(outputs, actions), family.entropy(outputs), (family, outputs)
            distribution = self.policy.get_distribution(self._arranged(observations))
            log_prob = distribution.log_prob(actions)
            entropy = distribution.entropy()
            described = describe(distribution)
        # SB3's policies keep one distribution object and overwrite its inside; the inside is what to remember.
        parameters = described if described is not None else (None, _detached(distribution))
        return log_prob, -log_prob if entropy is None else entropy, parameters

    def kl(self, old: Any, new: Any) -> Array:
        family, parameters = new
        if family is None:
            return self._torch_kl(old[1], parameters)
        # In float64: rounding to float32 is as large as a small trust region's KL is exact.
        exact = [tuple(x.double() for x in distribution) for distribution in (old[1], parameters)]
        return family.kl(*exact)

    @staticmethod
    def _torch_kl(old: Distribution, new: Distribution) -> th.Tensor:
        per_dimension = kl_divergence(old, new)
        return per_dimension.flatten(1).sum(dim=1) if per_dimension.ndim > 1 else per_dimension


def largest_layer(policy: th.nn.Module) -> float:
    """Return the multiplications that one observation takes in the largest layer, at least.

    A convolution takes many times the number of its weights, and a GPU's threads are its own: both count as infinite.
    """
    weights = [p for p in policy.parameters() if p.ndim > 1]
    if any(p.ndim > 2 or p.device.type != "cpu" for p in weights):
        return math.inf
    return max((p.numel() for p in weights), default=0)


def _family_of(policy: ActorCriticPolicy) -> Family | None:
    """The formulas of the policy's distribution, if they are known and it is made of ``action_net`` alone."""
    method = "_get_action_dist_from_latent"
    if getattr(type(policy), method) is not getattr(ActorCriticPolicy, method) or method in policy.__dict__:
        return None
    try:
        return family_of(policy.action_dist)
    except Unsuitable:
        return None


def channels_last(x: Any) -> Any:
    """Images in the layout that convolutions, and above all their backward passes, run fastest in: the same numbers.

    Only for SB3's own convolutions, since it spreads to their outputs, of which ``view`` does not take every shape.
    """
    if isinstance(x, dict):
        return {key: channels_last(value) for key, value in x.items()}
    if x.ndim != 4:
        return x
    if x.shape[1] == 1 and x.is_contiguous():  # both layouts at once; torch takes the one that the strides spell
        _, _, height, width = x.shape
        return x.as_strided(x.shape, (height * width, 1, width, 1))
    return x.contiguous(memory_format=th.channels_last)


def _detached(distribution: Distribution) -> Distribution:
    """A copy of an SB3 distribution whose torch distribution is out of the graph."""
    twin = copy.copy(distribution)
    inner: Any = distribution.distribution
    arguments = {
        name: getattr(inner, name).detach()
        for name in inner.arg_constraints
        # Of two ways to say the same (logits or probs) a distribution holds one; the other is computed on demand.
        if name in inner.__dict__ or not {"logits", "probs"} & inner.__dict__.keys()
    }
    twin.distribution = type(inner)(**arguments)
    return twin


def _flat(pieces: list[Any], parameters: list[th.nn.Parameter]) -> th.Tensor:
    """One vector of gradients, zero where a parameter has none."""
    return th.cat([(th.zeros_like(p) if g is None else g).reshape(-1) for g, p in zip(pieces, parameters, strict=True)])


def _split(vector: th.Tensor, parameters: list[th.nn.Parameter]) -> list[th.Tensor]:
    """A flat vector in pieces of the parameters' shapes."""
    pieces = th.split(vector, [p.numel() for p in parameters])
    return [piece.view_as(p) for piece, p in zip(pieces, parameters, strict=True)]


def use_fused_adam(optimizer: th.optim.Optimizer) -> None:
    """Let Adam and AdamW update all parameters in one kernel: the same numbers in about a quarter of the time.

    Only before the optimizer's first step, because on a GPU a fused optimizer keeps its step counts elsewhere, and
    only where the user has not chosen an implementation.
    """
    if type(optimizer) not in (th.optim.Adam, th.optim.AdamW) or optimizer.state:
        return
    for group in optimizer.param_groups:
        chosen = group.get("fused") is not None or group.get("foreach") is not None
        supported = all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in group["params"])
        if supported and not chosen and not group.get("differentiable") and not group.get("capturable"):
            group["fused"] = True

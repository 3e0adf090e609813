"""Any ActorCriticPolicy on any device, differentiated by torch."""

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.distributions import Distribution, kl_divergence
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import CombinedExtractor, FlattenExtractor, NatureCNN
from stable_baselines3.common.utils import obs_as_tensor

from sb3_pg.common import workers
from sb3_pg.common.arrays import Array, length, mapped, take
from sb3_pg.common.batch import Batch
from sb3_pg.common.distributions import BoxPolicy, Family, Parameters, describe, draw, family_of, masked, masking
from sb3_pg.common.distributions.family import column
from sb3_pg.common.distributions.recognition import detached
from sb3_pg.common.engines.blueprint import reason_against
from sb3_pg.common.engines.optimizer import use_fused_adam
from sb3_pg.common.engines.protocol import Acted, Fisher, Look, Seen
from sb3_pg.common.engines.rows import RowEngine
from sb3_pg.common.groups import MaxGradNorm, critic_parameters
from sb3_pg.common.interrupts import uninterrupted
from sb3_pg.common.threads import choose_threads

#: The methods by which SB3's policy acts and judges. If a subclass changes one of them, its ``forward`` acts,
#: as in SB3, and what ``forward`` says about values and log-probabilities is believed.
ACTING = ("forward", "evaluate_actions", "get_distribution", "predict_values", "extract_features")

#: Numbers in the observations of one chunk of a judging pass: 4 MB of float32, so that a rollout of images does
#: not become float32, and the activations of a convolution, all at once.
_CHUNK_NUMBERS = 1 << 20


#: Tensors in the graph with the derivatives of the loss by them.
Derivatives = list[tuple[th.Tensor, Any]]


class GraphEvaluation:
    """A batch as the present parameters see it, with the graph that leads there.

    :param engine: which knows the policy, and which parameters are the actor's
    :param batch: for the samples' weights
    :param value: V, in the graph
    """

    log_prob: th.Tensor
    entropy: th.Tensor

    def __init__(self, engine: "AutogradEngine", batch: Batch, value: th.Tensor) -> None:
        self._engine, self._batch, self._value = engine, batch, value
        self.value = value.detach()

    def backward(
        self, d_log_prob: Array | None = None, d_entropy: float | None = None, d_value: Array | None = None
    ) -> None:
        policy, scale = self._engine.policy, self._batch.scale
        policy.optimizer.zero_grad(set_to_none=True)
        inputs, derivatives = None, Derivatives()
        if d_value is not None:
            derivatives.append((self._value, d_value * scale))
        if d_log_prob is None and not d_entropy:
            held = {id(p) for p in self._engine.actor_parameters(self._batch)}
            inputs = [p for p in policy.parameters() if p.requires_grad and id(p) not in held]
        else:
            weighted = None if d_log_prob is None else d_log_prob * scale
            derivatives += self._of_actor(weighted, d_entropy * scale if d_entropy else None)
        known = [(x, d) for x, d in derivatives if d is not None and x.requires_grad]  # some may be frozen
        if known and inputs != []:
            tensors, gradients = zip(*known, strict=True)
            th.autograd.backward(tensors, gradients, inputs=inputs)

    def _of_actor(self, d_log_prob: Any, d_entropy: Any) -> Derivatives:
        """Return tensors in the actor's graph with the derivatives of the loss by them."""
        raise AssertionError("only the critic was evaluated")


class FamilyEvaluation(GraphEvaluation):
    """The graph ends with the distribution's parameters; the rest is formulas, which take fewer calls."""

    def __init__(
        self, engine: "AutogradEngine", batch: Batch, value: th.Tensor, family: Family, outputs: Sequence[th.Tensor]
    ) -> None:
        super().__init__(engine, batch, value)
        self._outputs = outputs
        likelihood: Any = family.evaluate(tuple(x.detach() for x in outputs), batch.actions)
        self.log_prob, self.entropy, self._pull = likelihood

    def _of_actor(self, d_log_prob: Any, d_entropy: Any) -> Derivatives:
        return list(zip(self._outputs, self._pull(d_log_prob, d_entropy), strict=True))


class PolicyEvaluation(GraphEvaluation):
    """By the policy's own ``evaluate_actions``, for distributions of any kind."""

    def __init__(
        self, engine: "AutogradEngine", batch: Batch, value: th.Tensor, log_prob: th.Tensor, entropy: th.Tensor | None
    ) -> None:
        super().__init__(engine, batch, value.flatten())
        self._log_prob = log_prob
        # Without a closed form (squashed Gaussian): its one-sample estimate, as in SB3.
        self._entropy = -self._log_prob if entropy is None else entropy
        self.log_prob, self.entropy = self._log_prob.detach(), self._entropy.detach()

    def _of_actor(self, d_log_prob: Any, d_entropy: Any) -> Derivatives:
        if isinstance(d_entropy, float):
            d_entropy = th.full_like(self._entropy, d_entropy)
        return [(self._log_prob, d_log_prob), (self._entropy, d_entropy)]


class AutogradEngine(RowEngine):
    """Acts, judges and steps through the policy's own methods.

    :param policy: any ActorCriticPolicy, SB3's or a subclass with its own modules, distributions or features
    :param why: it and not the closed form, for the description
    :param is_stopgap: until ``why`` is no longer the reason against the closed form
    """

    #: so many samples tell which parameters act, until more are looked at
    _n_looked_at: ClassVar[int] = 64

    def __init__(self, policy: ActorCriticPolicy, why: str = "", *, is_stopgap: bool = False) -> None:
        self.policy = policy
        self._why, self._is_stopgap = why, is_stopgap
        self.description = "autograd" + (f" ({why})" if why else "")
        self._device = policy.device
        use_fused_adam(policy.optimizer)
        self.refresh()

    def refresh(self) -> bool:
        policy = self.policy
        self._forward_acts = is_replaced(policy, ActorCriticPolicy, *ACTING)
        extractors = {type(policy.pi_features_extractor), type(policy.vf_features_extractor)}
        # Where actor and critic share a convolution, what else acting could compute costs next to nothing.
        self._heads_are_cheap = policy.share_features_extractor and extractors != {FlattenExtractor}
        self._likes_channels_last = extractors <= {NatureCNN, CombinedExtractor}
        self._actor_parameters: list[th.nn.Parameter] | None = None  # until they are asked for
        self._of_critic = {id(p) for p in critic_parameters(policy)}
        self._largest_layer = largest_layer(policy)
        self._family = None if self._forward_acts else self.known_family()
        return policy.device == self._device and not (self._is_stopgap and self.reason_against() != self._why)

    def reason_against(self) -> str | None:
        """Return why the policy cannot be computed in closed form; None if it can."""
        return reason_against(self.policy)

    def known_family(self) -> Family | None:
        """Return the formulas of the policy's distribution, if they are known and ``action_net`` alone makes it."""
        kinds = ActorCriticPolicy, BoxPolicy
        is_own = all(is_replaced(self.policy, kind, "_get_action_dist_from_latent") for kind in kinds)
        return None if is_own else family_of(self.policy.action_dist)

    def _arranged(self, observations: Any) -> Any:
        return mapped(channels_last, observations) if self._likes_channels_last else observations

    # Act

    def act(self, seen: Seen, deterministic: bool = False) -> Acted:
        choose_threads(length(seen.observations) * self._largest_layer)
        with th.no_grad():
            observations: Any = self._arranged(obs_as_tensor(seen.observations, self.policy.device))  # type: ignore[arg-type]
            if self._family is not None:
                return self._act_by_formulas(self._family, Batch(observations, masks=seen.masks), deterministic)
            with self._masking(seen.masks) as policy:
                if self._forward_acts:
                    actions, values, log_prob = policy(observations, deterministic)
                    return Acted(actions.cpu().numpy(), values, log_prob)
                actions = policy.get_distribution(observations).get_actions(deterministic)
        return Acted(self._in_shape(actions.cpu().numpy()))

    def _act_by_formulas(self, family: Family, batch: Batch, deterministic: bool) -> Acted:
        values = None
        if self._heads_are_cheap:
            outputs, values = self._outputs(batch)
        else:
            outputs = self._actor_outputs(batch)
        parameters = tuple(x.float().cpu().numpy() for x in outputs)
        actions = draw(family, parameters, deterministic)
        if values is None:
            return Acted(self._in_shape(actions))
        log_prob: Any = family.log_prob(parameters, actions)
        return Acted(self._in_shape(actions), values, th.from_numpy(log_prob))

    def _masking(self, masks: Any) -> AbstractContextManager[Any]:
        return masking(self.policy, None if masks is None else self.asarray(masks))

    def _in_shape(self, actions: np.ndarray) -> np.ndarray:
        shape: tuple[int, ...] = self.policy.action_space.shape or ()
        return actions.reshape(-1, *shape)

    def _actor_outputs(self, batch: Batch) -> tuple[th.Tensor, ...]:
        """Return what ``policy.get_distribution`` makes a distribution of; on a few rows that takes longer."""
        policy, seen = self.policy, batch.observations
        features = super(ActorCriticPolicy, policy).extract_features(seen, policy.pi_features_extractor)  # type: ignore[arg-type]
        return self._parameters(policy.action_net(policy.mlp_extractor.forward_actor(features)), batch.masks)

    def _outputs(self, batch: Batch) -> tuple[tuple[th.Tensor, ...], th.Tensor]:
        """Return the parameters of each row's distribution, and V."""
        policy = self.policy
        features = policy.extract_features(batch.observations)  # type: ignore[arg-type]
        if policy.share_features_extractor:
            latent_pi, latent_vf = policy.mlp_extractor(features)
        else:
            latent_pi, latent_vf = (
                policy.mlp_extractor.forward_actor(features[0]),
                policy.mlp_extractor.forward_critic(features[1]),
            )
        return self._parameters(policy.action_net(latent_pi), batch.masks), policy.value_net(latent_vf).flatten()

    def _values(self, batch: Batch) -> th.Tensor:
        return self.policy.predict_values(batch.observations)  # type: ignore[arg-type]

    def _evaluated(self, batch: Batch) -> tuple[th.Tensor, th.Tensor, th.Tensor | None]:
        """Return V, log pi(a|s) and entropy by the policy's own method."""
        with self._masking(batch.masks) as policy:
            return policy.evaluate_actions(batch.observations, batch.actions)  # type: ignore[no-any-return]

    def _distribution(self, batch: Batch) -> Distribution:
        """Return the policy's own distribution of each row."""
        with self._masking(batch.masks) as policy:
            return policy.get_distribution(batch.observations)  # type: ignore[no-any-return]

    def _parameters(self, outputs: th.Tensor, masks: Any = None) -> tuple[th.Tensor, ...]:
        """Turn ``action_net``'s outputs into the distribution's parameters."""
        if self._family is None or not self._family.takes_log_std:
            allowed: Any = masked(outputs, None if masks is None else self.asarray(masks))
            return (allowed,)
        log_std = self.policy.log_std.expand_as(outputs)
        if th.is_grad_enabled() and log_std.requires_grad != outputs.requires_grad:
            # One of them is frozen, but in the graph like the other.
            outputs, log_std = outputs + 0.0 * log_std, log_std + 0.0 * outputs
        return outputs, log_std

    # Judge

    def asarray(self, x: Any) -> th.Tensor:
        return th.as_tensor(x, device=self.policy.device)

    def actions(self, x: np.ndarray) -> th.Tensor:
        space = self.policy.action_space
        if isinstance(space, spaces.Discrete | spaces.MultiDiscrete):
            choices = th.as_tensor(x, device=self.policy.device).long()
            return choices.flatten() if isinstance(space, spaces.Discrete) else choices
        return th.as_tensor(x.astype(np.float32, copy=False), device=self.policy.device)

    def row_values(self, observations: Any) -> np.ndarray:
        values = np.empty(length(observations), np.float32)
        with th.no_grad():
            for chunk in self._chunks(observations):
                found = self.policy.predict_values(self._arranged(self._asarrays(take(observations, chunk))))
                values[chunk] = found.flatten().cpu().numpy()
        return values

    def judge_rows(
        self, observations: Any, actions: np.ndarray, masks: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        # Into memory made before: see Column about small arrays that stay.
        values, log_probs = (np.empty(length(observations), np.float32) for _ in range(2))
        with th.no_grad():
            for chunk in self._chunks(observations):
                seen = self._arranged(self._asarrays(take(observations, chunk)))
                with self._masking(None if masks is None else masks[chunk]) as policy:
                    v, log_prob, _ = policy.evaluate_actions(seen, self.actions(actions[chunk]))
                values[chunk] = v.flatten().cpu().numpy()
                log_probs[chunk] = log_prob.cpu().numpy()
        return values, log_probs

    def _chunks(self, observations: Any) -> list[slice]:
        """Return the pieces of a pass over many observations."""
        arrays = observations.values() if isinstance(observations, dict) else [observations]
        numbers = sum(int(np.prod(x.shape[1:])) for x in arrays)
        n, size = length(observations), max(1, _CHUNK_NUMBERS // max(numbers, 1))
        choose_threads(min(n, size) * self._largest_layer)
        return [slice(start, start + size) for start in range(0, n, size)]

    def pieces(self, batch: Batch) -> list[Any]:
        """Return the rows of pieces in which a batch is looked at, so that they take little memory."""
        return self._chunks(batch.observations)

    # Step

    def evaluate(self, batch: Batch) -> GraphEvaluation:
        choose_threads(len(batch) * self._largest_layer)
        batch = self._arranged_batch(batch)
        if self._family is None:
            return PolicyEvaluation(self, batch, *self._evaluated(batch))
        outputs, values = self._outputs(batch)
        return FamilyEvaluation(self, batch, values, self._family, outputs)

    def evaluate_critic(self, batch: Batch) -> GraphEvaluation:
        choose_threads(len(batch) * self._largest_layer)
        batch = self._arranged_batch(batch)
        return GraphEvaluation(self, batch, self._values(batch).flatten())

    def _arranged_batch(self, batch: Batch) -> Batch:
        arranged = copy.copy(batch)
        arranged.observations = self._arranged(batch.observations)
        return arranged

    def actor_parameters(self, batch: Batch) -> list[th.nn.Parameter]:
        """Return the parameters that log pi(a|s) depends on, as far as they are known; else of the first samples.

        From the graph and not from names: a Dict key "value_map" or a layer "query_key_value" may well act.
        """
        if self._actor_parameters is None:
            self._actor_parameters = self._acting(batch[: self._n_looked_at])
        return self._actor_parameters

    def actor_parameters_of_all(self, batch: Batch) -> list[th.nn.Parameter]:
        """Return those of any sample of a batch: a policy may send different observations through different layers."""
        found = {id(p) for p in self._actor_parameters or ()}
        for piece in self.pieces(batch):
            found |= {id(p) for p in self._acting(self._arranged_batch(batch[piece]))}
        self._actor_parameters = [p for p in self.policy.parameters() if id(p) in found]
        return self._actor_parameters

    def _acting(self, batch: Batch) -> list[th.nn.Parameter]:
        """Return the parameters that log pi(a|s) of some samples depends on."""
        trained = [p for p in self.policy.parameters() if p.requires_grad]
        with _evaluating(self.policy), th.enable_grad():
            if self._family is not None:
                outputs = self._actor_outputs(batch)
            else:
                outputs = (self._distribution(batch).log_prob(batch.actions),)  # type: ignore[arg-type]
        known = [x.sum() for x in outputs if x.requires_grad]  # all or some may be frozen
        gradients = th.autograd.grad(known, trained, allow_unused=True) if known else [None] * len(trained)
        return [p for p, g in zip(trained, gradients, strict=True) if g is not None]

    def actor(self, batch: Batch) -> "GraphActor":
        return GraphActor(self, batch)

    def step(self, max_grad_norm: MaxGradNorm, share: float) -> float:
        parameters = [p for p in self.policy.parameters() if p.grad is not None]
        if not parameters:
            return 0.0
        if workers.size() > 1:
            mean = workers.mean(_flat([p.grad for p in parameters], parameters), share)
            for p, its in zip(parameters, _split(mean, parameters), strict=True):
                p.grad = its
        norm = th.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        size = float(norm)
        if not np.isfinite(size):
            return size
        if isinstance(max_grad_norm, tuple):
            of_critic = self._of_critic
            for is_its, limit in zip((False, True), max_grad_norm, strict=True):
                if limit is not None:
                    th.nn.utils.clip_grad_norm_([p for p in parameters if (id(p) in of_critic) == is_its], limit)
        elif max_grad_norm is not None:
            th.nn.utils.clip_grads_with_norm_(parameters, max_grad_norm, norm)
        with uninterrupted():
            self.policy.optimizer.step()
        return size


#: A family and each row's parameters, or one of SB3's distribution objects of a kind that we have no formulas for.
Described = tuple[Family, Parameters] | Distribution


class GraphActor:
    """The actor's parameters as one vector, looked at by torch on one batch.

    :param engine: of the policy
    :param batch: what it is looked at on
    """

    def __init__(self, engine: AutogradEngine, batch: Batch) -> None:
        self._engine, self._batch = engine, batch
        self._parameters = engine.actor_parameters_of_all(batch)

    @property
    def vector(self) -> Array:
        """Return the present parameters, flat."""
        return _flat([p.detach() for p in self._parameters], self._parameters)

    @vector.setter
    def vector(self, vector: Any) -> None:
        with th.no_grad():
            for p, piece in zip(self._parameters, _split(vector, self._parameters), strict=True):
                p.copy_(piece)

    @cached_property
    def _old(self) -> tuple[Described, Look]:
        described, log_prob, entropy = self._distribution(self._batch)
        return described, Look(log_prob, entropy, th.zeros_like(log_prob))

    @property
    def old(self) -> Look:
        """Return the look at the old parameters."""
        return self._old[1]

    def look(self) -> Look:
        old, look = self._old
        try:
            now, log_prob, entropy = self._distribution(self._batch)
        except ValueError:  # torch's of a distribution that is no number; at the old parameters there was none
            nothing = math.nan * look.log_prob
            return Look(nothing, nothing, nothing)
        return Look(log_prob, entropy, self._kl(old, now))

    @th.no_grad()
    def _distribution(self, batch: Batch) -> tuple[Described, th.Tensor, th.Tensor]:
        """Return the distribution of each row, log pi(a|s) and entropy, at the present parameters."""
        engine, actions = self._engine, batch.actions
        if engine._family is not None:
            family: Any = engine._family
            found = [engine._actor_outputs(engine._arranged_batch(batch[piece])) for piece in engine.pieces(batch)]
            outputs = tuple(map(th.cat, zip(*found, strict=True)))
            return (family, outputs), family.log_prob(outputs, actions), family.entropy(outputs)
        distribution = engine._distribution(engine._arranged_batch(batch))
        log_prob = distribution.log_prob(actions)  # type: ignore[arg-type]
        entropy = distribution.entropy()
        # SB3's policies keep one distribution object and overwrite its inside; the inside is what to remember.
        described = describe(distribution) or detached(distribution)
        return described, log_prob, -log_prob if entropy is None else entropy

    def _kl(self, old: Described, now: Described) -> th.Tensor:
        if isinstance(old, Distribution) or isinstance(now, Distribution):
            assert isinstance(old, Distribution) and isinstance(now, Distribution)
            return _torch_kl(old, now)
        # In float64: rounding to float32 is as large as a small trust region's KL is exact.
        (family, before), (_, after) = old, now
        kl: Any = family.kl(*(tuple(th.as_tensor(x).double() for x in parameters) for parameters in (before, after)))
        return kl  # type: ignore[no-any-return]

    def gradient(self, d_log_prob: Array, d_entropy: float) -> Array:
        engine, batch, total = self._engine, self._batch, th.zeros(())
        for rows in engine.pieces(batch):
            engine.evaluate(batch.part(rows)).backward(d_log_prob[rows], d_entropy)
            total = total + _flat([p.grad for p in self._parameters], self._parameters)
        engine.policy.optimizer.zero_grad(set_to_none=True)
        return total

    def fisher(self, every: int = 1) -> Fisher:
        if not self._parameters:  # all of the actor is frozen
            return lambda vector: vector
        return self._fisher(self._batch[self._engine.thinned(self._batch, every)])

    def _fisher(self, batch: Batch) -> Fisher:
        engine, scale = self._engine, column(batch.scale)
        choose_threads(len(batch) * engine._largest_layer)
        batch = engine._arranged_batch(batch)
        if engine._family is not None:
            family, outputs = engine._family, engine._actor_outputs(batch)
        else:
            distribution = engine._distribution(batch)
            described = describe(distribution)
            if described is None:
                return self._fisher_from_kl(distribution, batch.scale)
            family, outputs = described  # type: ignore[assignment]
        of_family = family.fisher(tuple(z.detach() for z in outputs))
        # J v without forward-mode differentiation: the gradient g(u) = J^T u is linear in u, so differentiating
        # g . v with respect to u gives J v. One backward pass recorded here serves every product.
        probes = [th.zeros_like(z, requires_grad=True) for z in outputs]
        recorded = th.autograd.grad(outputs, self._parameters, probes, create_graph=True, materialize_grads=True)

        def product(vector: Any) -> th.Tensor:
            pieces = _split(vector, self._parameters)
            tangent = th.autograd.grad(recorded, probes, pieces, retain_graph=True, materialize_grads=True)
            weighted: Any = [w * scale for w in of_family(tangent)]
            back = th.autograd.grad(outputs, self._parameters, weighted, retain_graph=True, materialize_grads=True)
            return _flat(list(back), self._parameters)

        return product

    def _fisher_from_kl(self, distribution: Distribution, scale: Any) -> Fisher:
        """Return the Hessian of KL(old || new) at new = old by double backward, for a distribution of unknown kind."""
        parameters = self._parameters
        kl = (_torch_kl(detached(distribution), distribution) * scale).sum()
        gradient = _flat(list(th.autograd.grad(kl, parameters, create_graph=True, materialize_grads=True)), parameters)

        def product(vector: Any) -> th.Tensor:
            back = th.autograd.grad(gradient @ vector, parameters, retain_graph=True, materialize_grads=True)
            return _flat(list(back), parameters)

        return product


@contextmanager
def _evaluating(policy: ActorCriticPolicy) -> Iterator[None]:
    """Let batch normalisation learn nothing within the block."""
    training = policy.training
    policy.set_training_mode(False)
    try:
        yield
    finally:
        policy.set_training_mode(training)


def largest_layer(policy: th.nn.Module) -> float:
    """Return the multiplications that one observation takes in the largest layer, at least.

    A convolution takes many times the number of its weights, and a GPU's threads are its own: both count as infinite.
    """
    weights = [p for p in policy.parameters() if p.ndim > 1]
    if any(p.ndim > 2 or p.device.type != "cpu" for p in weights):
        return math.inf
    return max((p.numel() for p in weights), default=0)


def is_replaced(policy: ActorCriticPolicy, kind: type[ActorCriticPolicy], *methods: str) -> bool:
    """Return whether a policy has one of its own in place of these methods of a class."""
    own = vars(policy).keys()
    return any(m in own or getattr(type(policy), m) is not getattr(kind, m) for m in methods)


def channels_last(x: Any) -> Any:
    """Return images in the layout that convolutions, and above all their backward passes, run fastest in.

    The numbers are the same. Only for SB3's own convolutions, since it spreads to their outputs, and ``view`` does not
    take every shape of it.
    """
    if x.ndim != 4:
        return x
    if x.shape[1] == 1 and x.is_contiguous():  # both layouts at once; torch takes the one that the strides spell
        _, _, height, width = x.shape
        return x.as_strided(x.shape, (height * width, 1, width, 1))
    return x.contiguous(memory_format=th.channels_last)


def _torch_kl(old: Distribution, new: Distribution) -> th.Tensor:
    per_dimension = kl_divergence(old, new)
    return per_dimension.flatten(1).sum(dim=1) if per_dimension.ndim > 1 else per_dimension


def _flat(pieces: list[Any], parameters: list[th.nn.Parameter]) -> th.Tensor:
    """Return one vector of gradients, zero where a parameter has none."""
    if not parameters:
        return th.zeros(0)
    return th.cat([(th.zeros_like(p) if g is None else g).reshape(-1) for g, p in zip(pieces, parameters, strict=True)])


def _split(vector: th.Tensor, parameters: list[th.nn.Parameter]) -> list[th.Tensor]:
    """Return a flat vector in pieces of the parameters' shapes."""
    pieces = th.split(vector, [p.numel() for p in parameters])
    return [piece.view_as(p) for piece, p in zip(pieces, parameters, strict=True)]

"""Actions of an MlpPolicy in closed form, one call at a time, whoever calls in between."""

import math
from typing import Any

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.preprocessing import is_image_space
from torch import nn
from torch.nn.modules import module as global_hooks

from sb3_pg.common.distributions import BoxDistribution, Parameters, draw, masked
from sb3_pg.common.engines.blueprint import DTYPES, Blueprint, Unsuitable
from sb3_pg.common.engines.closed_form import Encoder, mlp_of, view
from sb3_pg.common.products import inner

#: What a policy and its MLP extractor have that actions do not depend on.
_OF_THE_CRITIC = frozenset(("features_extractor", "vf_features_extractor", "value_net", "lstm_critic", "critic"))

#: What actions depend on besides modules and parameters.
_ATTRIBUTES = frozenset(
    ("action_dist", "action_space", "observation_space", "_squash_output", "negative_slope", "alpha", "approximate")
)


class Predictor:
    """The actor of a policy as NumPy sees it.

    :param policy: SB3's MlpPolicy
    :raises Unsuitable: it is not computed in closed form
    """

    def __init__(self, policy: ActorCriticPolicy) -> None:
        blueprint = self._blueprint(policy)
        if is_image_space(policy.observation_space):
            raise Unsuitable("images, whose channels SB3 looks for")
        distribution: Any = policy.action_dist
        self._squash = distribution.squash if isinstance(distribution, BoxDistribution) else None
        if policy.squash_output and self._squash is None:
            raise Unsuitable("SB3 scales the actions to the space")
        self._family, self._mlp = blueprint.family, mlp_of(blueprint.actor)
        self._log_std = None if blueprint.log_std is None else view(blueprint.log_std)
        dtype = DTYPES[blueprint.parameters[0].dtype]
        self._encode = Encoder(policy.observation_space, policy.normalize_images, dtype)
        self._shape: tuple[int, ...] = policy.observation_space.shape  # type: ignore[assignment]
        self._action_shape: tuple[int, ...] = policy.action_space.shape  # type: ignore[assignment]
        self._bounds: tuple[np.ndarray, np.ndarray] | None = None
        if isinstance(policy.action_space, spaces.Box):
            self._bounds = _one_if_equal(policy.action_space.low), _one_if_equal(policy.action_space.high)
        self._watch(self._modules_of(policy))

    def _blueprint(self, policy: ActorCriticPolicy) -> Blueprint:
        return Blueprint(policy, trained=False)

    def _modules_of(self, policy: Any) -> list[nn.Module]:
        """Return the modules that actions depend on."""
        of_actor = policy.pi_features_extractor, policy.mlp_extractor.policy_net
        return [policy, policy.mlp_extractor, policy.action_net, *(m for part in of_actor for m in part.modules())]

    def _watch(self, modules: list[nn.Module]) -> None:
        """Note what the actions are made of, for ``is_current``."""
        its = [vars(module) for module in modules]
        parts = [
            (table, name, part)
            for own in its
            for table in (own["_modules"], own["_parameters"])
            for name, part in table.items()
            if name not in _OF_THE_CRITIC
        ]
        self._parts = parts + [(own, name, own[name]) for own in its for name in _ATTRIBUTES & own.keys()]
        counted = [*its, *(vars(module)["_modules"] for module in modules if isinstance(module, nn.Sequential))]
        #: how many there are, so that a layer or a replaced method that is added shows
        self._sizes = [(table, len(table)) for table in counted]
        self._hooks = [own[kind] for own in its for kind in ("_forward_hooks", "_forward_pre_hooks")]
        self._hooks += [global_hooks._global_forward_hooks, global_hooks._global_forward_pre_hooks]
        self._addresses = [(part, part.data_ptr()) for _, _, part in parts if isinstance(part, nn.Parameter)]

    @classmethod
    def of(cls, policy: ActorCriticPolicy) -> "Predictor | None":
        """Return one, or None for a policy that is not computed in closed form."""
        try:
            return cls(policy)
        except Unsuitable:
            return None

    def is_current(self) -> bool:
        """Return whether the policy is still made of the same parts, in the same memory."""
        for table, size in self._sizes:
            if len(table) != size:
                return False
        for table, name, part in self._parts:
            if table.get(name) is not part:
                return False
        for parameter, address in self._addresses:
            if parameter.data_ptr() != address or not parameter.is_contiguous():
                return False
        return not any(self._hooks)

    def predict(
        self, observation: Any, state: Any, episode_start: Any, deterministic: bool, masks: np.ndarray | None = None
    ) -> tuple[np.ndarray, Any] | None:
        """Return what SB3's ``predict`` does; None for observations that are not plainly one or a batch of them."""
        if type(observation) is not np.ndarray or observation.dtype.kind not in "fiub":
            return None
        is_single = observation.shape == self._shape
        if not is_single and observation.shape[1:] != self._shape:
            return None
        x = self._encode(observation[None] if is_single else observation)
        try:
            outputs, state = self._read(x, state, episode_start)
            actions = self._act(outputs, deterministic, masks)
        except (FloatingPointError, Unsuitable):  # the first by ``np.seterr``; torch does not raise
            return None
        return None if actions is None else (actions[0, ...] if is_single else actions, state)

    def _read(self, x: np.ndarray, state: Any, episode_start: Any) -> tuple[np.ndarray, Any]:
        """Return the outputs, (n, k), for encoded observations, and the state after them.

        :raises Unsuitable: the state is not such as ``predict`` returns it
        """
        return self._mlp(x), state

    def _act(self, outputs: np.ndarray, deterministic: bool, masks: np.ndarray | None) -> np.ndarray | None:
        """Return actions of the space; None if the outputs are not finite."""
        numbers, log_std = outputs.ravel(), self._log_std
        size = inner(numbers, numbers) if log_std is None else inner(numbers, numbers) + log_std.dot(log_std)
        if not math.isfinite(size):
            return None  # SB3 says what is wrong
        parameters: Parameters = (masked(outputs, masks),) if log_std is None else (outputs, log_std)
        actions = draw(self._family, parameters, deterministic)
        if actions.shape[1:] != self._action_shape:
            actions = actions.reshape(-1, *self._action_shape)
        if self._squash is not None:
            actions = self._squash(actions)
        elif self._bounds is not None:
            low, high = self._bounds
            actions = np.minimum(np.maximum(actions, low), high)
        found: np.ndarray = actions
        return found


def _one_if_equal(bounds: np.ndarray) -> np.ndarray:
    """Return bounds that are all the same as one number, which is faster, others as they are."""
    return np.asarray(bounds.flat[0]) if (bounds == bounds.flat[0]).all() else bounds

"""Actions of an MlpPolicy in closed form, one call at a time, whoever calls in between."""

import math
from typing import Any

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.preprocessing import is_image_space
from torch import nn
from torch.nn.modules import module as global_hooks

from sb3_pg.common.distributions import Parameters, draw, masked
from sb3_pg.common.engines.blueprint import DTYPES, Blueprint, Unsuitable
from sb3_pg.common.engines.closed_form import Encoder, mlp_of, view
from sb3_pg.common.products import inner


class Predictor:
    """The actor of a policy as NumPy sees it.

    :param policy: SB3's MlpPolicy
    :raises Unsuitable: it is not computed in closed form
    """

    def __init__(self, policy: ActorCriticPolicy) -> None:
        blueprint = Blueprint(policy, trained=False)
        if is_image_space(policy.observation_space):
            raise Unsuitable("images, whose channels SB3 looks for")
        self._family, self._mlp = blueprint.family, mlp_of(blueprint.actor)
        self._log_std = None if blueprint.log_std is None else view(blueprint.log_std)
        dtype = DTYPES[blueprint.parameters[0].dtype]
        self._encode = Encoder(policy.observation_space, policy.normalize_images, dtype)
        self._shape: tuple[int, ...] = policy.observation_space.shape  # type: ignore[assignment]
        self._action_shape: tuple[int, ...] = policy.action_space.shape  # type: ignore[assignment]
        self._box = policy.action_space if isinstance(policy.action_space, spaces.Box) else None
        modules = [policy, policy.mlp_extractor, policy.action_net]
        modules += [*policy.pi_features_extractor.modules(), *policy.mlp_extractor.policy_net.modules()]
        its = [module.__dict__ for module in modules]
        tables = [*its, *(own[kind] for own in its for kind in ("_modules", "_parameters"))]
        parts = [(table, name, part) for table in tables[len(its) :] for name, part in table.items()]
        names = ("action_dist", "action_space", "observation_space", "negative_slope", "alpha", "approximate")
        #: how many there are of each, so that a layer or a replaced method that is added shows
        self._sizes = [(table, len(table)) for table in tables]
        self._parts = parts + [(own, name, own[name]) for own in its for name in names if name in own]
        self._hooks = [own[kind] for own in its for kind in ("_forward_hooks", "_forward_pre_hooks")]
        self._hooks += [global_hooks._global_forward_hooks, global_hooks._global_forward_pre_hooks]
        parameters = [part for _, _, part in parts if isinstance(part, nn.Parameter)]
        self._memory = [(p, p.data_ptr()) for p in parameters]

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
        for parameter, address in self._memory:
            if parameter.data_ptr() != address or not parameter.is_contiguous():
                return False
        return not any(self._hooks)

    def predict(self, observation: Any, deterministic: bool, masks: np.ndarray | None = None) -> np.ndarray | None:
        """Return what SB3's ``predict`` does; None for observations that are not plainly one or a batch of them."""
        if type(observation) is not np.ndarray or observation.dtype.kind not in "fiub":
            return None
        is_single = observation.shape == self._shape
        if not is_single and (observation.ndim != len(self._shape) + 1 or observation.shape[1:] != self._shape):
            return None
        x = self._encode(observation[None] if is_single else observation)
        try:
            outputs = self._mlp(x)
        except FloatingPointError:  # by ``np.seterr``; torch does not raise
            return None
        numbers, log_std = outputs.ravel(), self._log_std
        if not math.isfinite(inner(numbers, numbers)) or not (log_std is None or math.isfinite(log_std.dot(log_std))):
            return None  # SB3 says what is wrong
        parameters: Parameters = (masked(outputs, masks),) if log_std is None else (outputs, log_std)
        actions = draw(self._family, parameters, deterministic)
        actions = actions.reshape(-1, *self._action_shape)
        if self._box is not None:
            actions = np.minimum(np.maximum(actions, self._box.low), self._box.high)
        predicted: np.ndarray = actions[0, ...] if is_single else actions
        return predicted

"""Actions of an MlpPolicy in closed form, one call at a time, whoever calls in between."""

from typing import Any

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.preprocessing import is_image_space

from sb3_pg.common.engines.blueprint import DTYPES, Blueprint, Unsuitable
from sb3_pg.common.engines.closed_form import Encoder, mlp_of, view


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
        box = policy.action_space if isinstance(policy.action_space, spaces.Box) else None
        self._bounds = None if box is None else (box.low, box.high)
        self._policy, self._n_attributes = policy, len(policy.__dict__)
        modules = [policy, policy.mlp_extractor, policy.action_net]
        modules += [*policy.pi_features_extractor.modules(), *policy.mlp_extractor.policy_net.modules()]
        #: the modules' own attributes, and who is whose part: (parts by name, name, part)
        self._attributes = [module.__dict__ for module in modules]
        parts = [table for own in self._attributes for table in (own["_modules"], own["_parameters"])]
        self._parts = [(table, name, part) for table in parts for name, part in table.items()]
        its = [p for own in self._attributes for p in own["_parameters"].values() if p is not None]
        self._memory = [(p, p.data_ptr()) for p in its]

    @classmethod
    def of(cls, policy: ActorCriticPolicy) -> "Predictor | None":
        """Return one, or None for a policy that is not computed in closed form."""
        try:
            return cls(policy)
        except Unsuitable:
            return None

    def is_current(self) -> bool:
        """Return whether the policy is still made of the same parts, in the same memory."""
        if len(self._policy.__dict__) != self._n_attributes:  # a method may be replaced
            return False
        for table, name, part in self._parts:
            if table.get(name) is not part:
                return False
        for parameter, address in self._memory:
            if parameter.data_ptr() != address:
                return False
        for own in self._attributes:
            if own["_forward_hooks"] or own["_forward_pre_hooks"] or "forward" in own:
                return False
        return True

    def predict(self, observation: Any, deterministic: bool) -> np.ndarray | None:
        """Return what SB3's ``predict`` does; None for observations that are not plainly one or a batch of them."""
        if type(observation) is not np.ndarray or observation.dtype.kind not in "fiub":
            return None
        is_single = observation.shape == self._shape
        if not is_single and (observation.ndim != len(self._shape) + 1 or observation.shape[1:] != self._shape):
            return None
        x = self._encode(observation[None] if is_single else observation)
        with np.errstate(all="ignore"):
            outputs = self._mlp(x)
            parameters = (outputs,) if self._log_std is None else (outputs, self._log_std)
            if deterministic:
                actions: Any = self._family.mode(parameters)
            else:
                actions = self._family.sample(parameters, self._family.noise(len(x)))
        actions = actions.reshape(-1, *self._action_shape)
        if self._bounds is not None:
            actions = np.minimum(np.maximum(actions, self._bounds[0]), self._bounds[1])
        predicted: np.ndarray = actions[0, ...] if is_single else actions
        return predicted

"""Tell whether a policy is SB3's MlpPolicy to the letter, and what it is made of."""

import inspect
from typing import Any, ClassVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import FlattenExtractor, MlpExtractor
from torch import nn
from torch.nn.modules import module as global_hooks

from sb3_pg.common.distributions import Family, family_of
from sb3_pg.common.engines.mlp import ACTIVATIONS
from sb3_pg.common.spaces import PLAIN_SPACES, start_of


class Unsuitable(Exception):  # noqa: N818  # an answer, not an error
    """Why a policy cannot be computed in closed form."""


#: A linear layer and the activation after it.
Layers = list[tuple[nn.Linear, nn.Module | None]]

_METHODS = frozenset(name for name, _ in inspect.getmembers(ActorCriticPolicy, callable))
_OWN_CODE = frozenset(("forward", "forward_actor", "forward_critic"))
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
DTYPES = {th.float32: np.float32, th.float64: np.float64}

#: Policy classes that compute what SB3's MlpPolicy does.
PLAIN: set[type[ActorCriticPolicy]] = {ActorCriticPolicy}


class Blueprint:
    """The parts of a policy that are computed with; made only if they are all there is to it.

    :param policy: any policy
    :param trained: whether its parameters have to be such that gradients move them
    :raises Unsuitable: this one needs autograd
    """

    #: Policy classes that it is for.
    kinds: ClassVar[set[type[ActorCriticPolicy]]] = PLAIN

    def __init__(self, policy: ActorCriticPolicy, *, trained: bool = True) -> None:
        _check_code(policy, self.kinds)
        _check_space(policy.observation_space)
        self.actor: Layers = [*_layers(policy.mlp_extractor.policy_net), (linear(policy.action_net), None)]
        self.critic: Layers = [*_layers(policy.mlp_extractor.value_net), (linear(policy.value_net), None)]
        family = family_of(policy.action_dist)
        if family is None:
            raise Unsuitable(f"the action distribution is {type(policy.action_dist).__name__}")
        self.family: Family = family
        self.log_std: nn.Parameter | None = policy.log_std if family.takes_log_std else None
        first = [] if self.log_std is None else [self.log_std]
        self.actor_parameters: list[th.Tensor] = [*first, *self.before_actor(policy), *_of_layers(self.actor)]
        self.critic_parameters: list[th.Tensor] = [*self.before_critic(policy), *_of_layers(self.critic)]
        _check_parameters(self.parameters, trained)

    @property
    def parameters(self) -> list[th.Tensor]:
        """Return the actor's and then the critic's."""
        return self.actor_parameters + self.critic_parameters

    def before_actor(self, policy: Any) -> list[th.Tensor]:
        """Return the parameters of what comes before the actor's layers."""
        return []

    def before_critic(self, policy: Any) -> list[th.Tensor]:
        """Return the parameters of what comes before the critic's layers."""
        return []

    def fingerprint(self) -> list[Any]:
        """Return what is equal for two blueprints if views made for one are right for the other."""
        memory: list[Any] = [(id(p), p.data_ptr(), p.dtype) for p in self.parameters]
        activations = [f and (type(f), f.extra_repr()) for _, f in [*self.actor, *self.critic]]
        return [*memory, *activations, type(self.family), *vars(self.family).items()]


def reason_against(policy: ActorCriticPolicy, blueprint: "type[Blueprint]" = Blueprint) -> str | None:
    """Return why a policy cannot be computed in closed form; None if it can."""
    try:
        blueprint(policy)
    except Unsuitable as reason:
        return str(reason)
    return None


def _of_layers(layers: Layers) -> list[th.Tensor]:
    return [p for layer, _ in layers for p in (layer.weight, layer.bias)]


def _check_code(policy: ActorCriticPolicy, kinds: set[type[ActorCriticPolicy]]) -> None:
    """Refuse a policy that runs anything but SB3's code."""
    if type(policy) not in kinds:
        raise Unsuitable(f"{type(policy).__name__} is not SB3's MlpPolicy")
    if policy.use_sde:
        raise Unsuitable("generalised state-dependent exploration")
    for extractor in (policy.features_extractor, policy.pi_features_extractor, policy.vf_features_extractor):
        if type(extractor) is not FlattenExtractor:
            raise Unsuitable(f"the features extractor is {type(extractor).__name__}")
    if "proba_distribution" in vars(policy.action_dist):
        raise Unsuitable("the distribution's code is replaced")
    if type(policy.mlp_extractor) is not MlpExtractor:
        raise Unsuitable(f"the MLP extractor is {type(policy.mlp_extractor).__name__}")
    if not _METHODS.isdisjoint(policy.__dict__):
        raise Unsuitable(f"the policy's {min(_METHODS & policy.__dict__.keys())} is replaced")
    if global_hooks._global_forward_hooks or global_hooks._global_forward_pre_hooks:
        raise Unsuitable("all modules have a hook")
    for module in policy.modules():
        own = module.__dict__
        if any(own.get(name) for name in _HOOKS):
            raise Unsuitable(f"{type(module).__name__} has a hook")
        if not _OWN_CODE.isdisjoint(own):
            raise Unsuitable(f"{type(module).__name__}'s {min(_OWN_CODE & own.keys())} is replaced")


def _check_space(space: spaces.Space[Any]) -> None:
    """Refuse a space whose observations cannot be encoded."""
    # SB3 one-hot encodes from 0 and refuses observations that start elsewhere
    if not isinstance(space, PLAIN_SPACES) or np.any(start_of(space)):
        raise Unsuitable(f"observations are of {space}")


def _layers(net: nn.Module) -> Layers:
    """Return the hidden layers of an actor or critic."""
    if type(net) is not nn.Sequential:
        raise Unsuitable(f"the layers are in a {type(net).__name__}")
    layers: Layers = []
    for module in net:
        if type(module) in ACTIVATIONS and layers and layers[-1][1] is None:
            layers[-1] = (layers[-1][0], module)
        else:
            layers.append((linear(module), None))
    return layers


def linear(module: nn.Module) -> nn.Linear:
    """Return a module that is a linear layer and nothing else.

    :raises Unsuitable: this one is not
    """
    if type(module) is not nn.Linear:
        raise Unsuitable(f"a layer is {type(module).__name__}")
    return module


def _check_parameters(parameters: list[th.Tensor], trained: bool) -> None:
    """Refuse parameters unless NumPy sees all of them, each in one place and trained by plain gradients."""
    if any(p is None for p in parameters):
        raise Unsuitable("a layer has no bias")
    if any(p.device.type != "cpu" for p in parameters):
        raise Unsuitable(f"the policy is on {parameters[0].device}")
    dtype = parameters[0].dtype
    if dtype not in DTYPES or any(p.dtype is not dtype for p in parameters):
        raise Unsuitable(f"parameters are of {dtype}, or of several types")
    if not all(p.is_contiguous() for p in parameters):
        raise Unsuitable("parameters are not contiguous in memory")
    if not trained:
        return
    if not all(p.requires_grad for p in parameters):
        raise Unsuitable("parameters are frozen")
    if len({id(p) for p in parameters}) < len(parameters):
        raise Unsuitable("layers share parameters")
    if any(p._backward_hooks or p._post_accumulate_grad_hooks for p in parameters):
        raise Unsuitable("a parameter has a hook")

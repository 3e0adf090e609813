"""Which of our families one of SB3's distribution objects is."""

import copy
from typing import Any

import torch as th
from stable_baselines3.common import distributions as sb3
from torch import distributions as td

from sb3_pg.common.distributions.bernoulli import Bernoulli
from sb3_pg.common.distributions.categorical import Categorical
from sb3_pg.common.distributions.family import Family, Parameters
from sb3_pg.common.distributions.gaussian import Gaussian


def family_of(distribution: sb3.Distribution) -> Family | None:
    """Return the formulas of one of SB3's four plain distributions by its class, which also a policy's template has.

    None for any other, such as gSDE's, a squashed one, or a subclass with ideas of its own.
    """
    kind = type(distribution)
    if kind is sb3.DiagGaussianDistribution:
        return Gaussian(distribution.action_dim)  # type: ignore[attr-defined]
    if kind is sb3.CategoricalDistribution:
        return Categorical([distribution.action_dim])  # type: ignore[attr-defined]
    if kind is sb3.MultiCategoricalDistribution:
        return Categorical([int(size) for size in distribution.action_dims])  # type: ignore[attr-defined]
    return Bernoulli(distribution.action_dims) if kind is sb3.BernoulliDistribution else None  # type: ignore[attr-defined]


def describe(distribution: sb3.Distribution) -> tuple[Family, Parameters] | None:
    """Return family and parameters (in the graph) by the torch distribution inside; None if its kind is unknown.

    A squashed Gaussian is described before squashing: KL and Fisher matrix do not change under a bijection.
    """
    inner = distribution.distribution
    if isinstance(inner, td.Normal):
        return Gaussian(inner.loc.shape[-1]), (inner.loc, inner.scale.log())
    if isinstance(inner, td.Bernoulli):
        return Bernoulli(inner.logits.shape[-1]), (inner.logits,)
    choices = inner if isinstance(inner, list) else [inner]
    if all(isinstance(choice, td.Categorical) for choice in choices):
        logits: list[th.Tensor] = [choice.logits for choice in choices]  # type: ignore[attr-defined]
        return Categorical([x.shape[-1] for x in logits]), (th.cat(logits, dim=-1),)
    return None


def detached(distribution: sb3.Distribution) -> sb3.Distribution:
    """Return a copy of an SB3 distribution that is out of the graph."""
    twin = copy.copy(distribution)
    for name, value in vars(distribution).items():
        setattr(twin, name, _out_of_graph(value))
    return twin


def _out_of_graph(x: Any) -> Any:
    if isinstance(x, th.Tensor) and not isinstance(x, th.nn.Parameter):
        return x.detach()
    if isinstance(x, list):
        return [_out_of_graph(part) for part in x]
    if not isinstance(x, td.Distribution):
        return x
    # Of two ways to say the same (logits or probs) a distribution holds one; the other is computed on demand.
    said = {name for name in x.arg_constraints if name in x.__dict__} or set(x.arg_constraints)
    if {"logits", "probs"} <= said:
        said.remove("probs")
    arguments: dict[str, Any] = {name: getattr(x, name).detach() for name in said}
    return type(x)(**arguments)

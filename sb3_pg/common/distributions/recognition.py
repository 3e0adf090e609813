"""Which of our families one of SB3's distribution objects is."""

import copy
from typing import Any

import torch as th
from stable_baselines3.common import distributions as sb3
from torch import distributions as td

from sb3_pg.common.distributions.bernoulli import Bernoulli
from sb3_pg.common.distributions.box import BoxDistribution
from sb3_pg.common.distributions.categorical import Categorical
from sb3_pg.common.distributions.family import Family, Parameters
from sb3_pg.common.distributions.gaussian import Gaussian


def family_of(distribution: sb3.Distribution) -> Family | None:
    """Return the formulas of our distribution, or of SB3's four plain ones by the class, which a template has too.

    None for any other, such as gSDE's, a squashed one, or a subclass with ideas of its own.
    """
    kind = type(distribution)
    if isinstance(distribution, BoxDistribution):
        return distribution.family
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
    if isinstance(distribution, BoxDistribution):
        return distribution.family, distribution.parameters
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


def detached(x: Any) -> Any:
    """Return a copy of a distribution of SB3 or torch that is out of the graph; of what it is made of likewise."""
    if isinstance(x, th.Tensor):
        return x if isinstance(x, th.nn.Parameter) else x.detach()
    if isinstance(x, list | tuple):
        return type(x)(map(detached, x))
    if not isinstance(x, sb3.Distribution | td.Distribution):
        return x
    twin = copy.copy(x)
    twin.__dict__.update({name: detached(value) for name, value in vars(x).items()})
    return twin

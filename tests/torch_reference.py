"""A policy's distributions and parameters as torch and SB3 know them, to compare engines and updates with."""

import numpy as np
import torch as th
from torch import distributions as td


def reference(policy, observations):
    """The policy's action distributions as float64 torch distributions, one for each group of dimensions."""
    inner = policy.get_distribution(observations).distribution
    return [
        type(d)(**{k: getattr(d, k).double() for k in d.arg_constraints if k != "probs"})
        for d in (inner if isinstance(inner, list) else [inner])
    ]


def detached(distributions):
    return [type(d)(**{k: getattr(d, k).detach() for k in d.arg_constraints if k != "probs"}) for d in distributions]


def joint_kl(old, new):
    """KL(old || new) of the joint action, by torch's formulas, summed over action dimensions, (n,)."""
    each = [td.kl_divergence(p, q) for p, q in zip(old, new, strict=True)]
    return sum(x if x.ndim == 1 else x.sum(dim=-1) for x in each)


def actor_parameters(policy):
    """Of SB3's own policies, whose names tell."""
    critic = ("value_net", "vf_features_extractor")
    named = [(name, p) for name, p in policy.named_parameters() if not any(x in name for x in critic)]
    return [p for _, p in named]


def flat(tensors):
    return th.cat([x.detach().reshape(-1) for x in tensors])


def order_of(actor, parameters):
    """Where each number of these parameters stands in the actor's flat vector, of NumPy or torch."""
    before = actor.vector
    numbers = 0 * before
    numbers[:] = range(len(before)) if isinstance(before, np.ndarray) else th.arange(len(before))
    actor.vector = numbers
    order = flat(parameters).long()
    actor.vector = before
    assert sorted(order.tolist()) == list(range(len(before)))  # these parameters and no others
    return order


def dense_fisher(policy, observations, parameters, weight=None):
    """The Hessian of KL(old || new) at new = old, row by row.

    :param weight: of each sample, (n,), adding up to 1; None is 1 / n
    """
    new = reference(policy, observations)
    kl = joint_kl(detached(new), new)
    kl = kl.mean() if weight is None else (weight * kl).sum()
    gradient = th.autograd.grad(kl, parameters, create_graph=True, materialize_grads=True)
    rows = [
        flat(th.autograd.grad(g, parameters, retain_graph=True, materialize_grads=True))
        for g in th.cat([x.reshape(-1) for x in gradient])
    ]
    return th.stack(rows)

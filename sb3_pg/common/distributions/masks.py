"""Masks of allowed actions, which change logits before any formula sees them."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch as th
from stable_baselines3.common import distributions as sb3
from stable_baselines3.common.policies import ActorCriticPolicy

from sb3_pg.common.arrays import Array
from sb3_pg.common.errors import ArgumentError

Policy = TypeVar("Policy", bound=ActorCriticPolicy)

#: Logits of what is not allowed: every formula stays finite, and the derivative there is zero. Minus infinity gives
#: NaN in entropy and KL.
FORBIDDEN = -1e8

_OF_LOGITS = (sb3.CategoricalDistribution, sb3.MultiCategoricalDistribution, sb3.BernoulliDistribution)


def masked(logits: Array, masks: Array | None) -> Array:
    """Return the logits with those of forbidden actions far from all others.

    :param logits: (n, k)
    :param masks: True for what is allowed; (n, k) for choices, (n, 2 k) for yes/no actions, off before on; None allows
        all
    """
    if masks is None:
        return logits
    where: Any = np.where if isinstance(logits, np.ndarray) else th.where  # the standard's takes no single number
    if masks.shape == logits.shape:
        return where(masks, logits, FORBIDDEN)  # type: ignore[no-any-return]
    return where(masks[:, 1::2], where(masks[:, ::2], logits, -FORBIDDEN), FORBIDDEN)  # type: ignore[no-any-return]


@contextmanager
def masking(policy: Policy, masks: Array | None) -> Iterator[Policy]:
    """Yield a twin of a policy whose own methods choose only allowed actions.

    The twin has the policy's parts, but a distribution of its own, so that others may use the policy meanwhile. What
    it sets of itself becomes the policy's.

    :param masks: of the rows that the twin will be given, see :func:`masked`, on its device; None yields the policy
    :raises ArgumentError: the policy's actions are no choices, or not chosen by ``policy.action_dist``
    """
    if masks is None:
        yield policy
        return
    if not isinstance(policy.action_dist, _OF_LOGITS):
        kind = type(policy.action_dist).__name__
        raise ArgumentError(f"{type(policy).__name__} cannot be masked: its distribution is {kind}.")
    distribution: Any = copy.copy(policy.action_dist)
    make, allowed, made = type(distribution).proba_distribution, masks, []

    def proba_distribution(action_logits: Any) -> Any:
        made.append(True)
        return make(distribution, masked(action_logits, allowed))

    distribution.proba_distribution = proba_distribution
    given = {**vars(policy), "action_dist": distribution}
    twin = object.__new__(type(policy))
    vars(twin).update(given)
    yield twin
    vars(policy).update({name: x for name, x in vars(twin).items() if name not in given or x is not given[name]})
    if not made:
        raise ArgumentError(f"{type(policy).__name__} cannot be masked: it does not choose by `policy.action_dist`.")

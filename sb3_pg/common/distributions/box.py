"""Distributions of Box actions beside SB3's Gaussian, and policies that choose among them."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common import distributions as sb3
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.preprocessing import get_action_dim
from stable_baselines3.common.type_aliases import Schedule
from torch import distributions as td
from torch import nn

from sb3_pg.common.distributions.beta import Beta
from sb3_pg.common.distributions.family import Family, Parameters, draw
from sb3_pg.common.distributions.gaussian import Gaussian
from sb3_pg.common.distributions.outputs import AboveOne, Bounded, OfOutputs
from sb3_pg.common.distributions.squash import Squash
from sb3_pg.common.distributions.squashed_gaussian import SquashedGaussian
from sb3_pg.common.errors import ArgumentError, check_choice

DISTRIBUTIONS = ("gaussian", "squashed_gaussian", "beta")

#: Of logarithms of deviations, where nothing else is asked for and SB3 has no custom.
USUAL_BOUNDS = (-5.0, 2.0)

#: Within these neither deviation nor precision overflows float32.
_WIDEST_BOUNDS = (-20.0, 20.0)

#: Above it log(1 - tanh(u)^2) is so large that probability ratios lose their digits; tanh is a mere sign long before.
_HIGHEST_OF_SQUASHED = 5.0


@dataclass(frozen=True)
class BoxOptions:
    """Which distribution Box actions have.

    :param distribution: "gaussian", whose actions are clipped to the space; "squashed_gaussian", tanh of a Gaussian's,
        scaled to the space's bounds; "beta", scaled likewise
    :param state_dependent_std: let the network put out the deviation too, not one number for all states. Of a beta
        distribution both numbers are put out anyway
    :param log_std_bounds: the smallest and largest logarithm of the deviation, kept smoothly. Lower ends let the policy
        become more precise, higher ones explore more widely, up to 5 where actions are squashed. None takes (-5, 2),
        and none for the Gaussian with one deviation for all states, as SB3
    :param deterministic_action: "mode" or "mean", what ``deterministic=True`` takes. The mode of a squashed Gaussian is
        tanh of the Gaussian's, as in SB3
    """

    distribution: str = "gaussian"
    state_dependent_std: bool = False
    log_std_bounds: tuple[float, float] | None = None
    deterministic_action: str = "mode"

    @property
    def changed(self) -> dict[str, Any]:
        """Return the arguments that are not the defaults, with which the policy is SB3's."""
        return {name: value for name, value in asdict(self).items() if value != getattr(BoxOptions, name)}

    @property
    def of_parameters(self) -> dict[str, Any]:
        """Return what says how a policy's parameters are read: if it differs, the same ones are another policy."""
        if self.distribution == "beta":
            return {"distribution": "beta"}
        is_plain = self.distribution == "gaussian" and not self.state_dependent_std
        bounds = self.log_std_bounds or (() if is_plain else USUAL_BOUNDS)
        found = {"distribution": self.distribution, "state_dependent_std": self.state_dependent_std}
        return {**found, "log_std_bounds": np.ravel(bounds).tolist()}

    def make(self, space: spaces.Space[Any], use_sde: bool, log_std_init: float) -> "BoxDistribution | None":
        """Return the distribution; None leaves SB3's.

        :param space: of the actions
        :raises ArgumentError: it cannot be, naming the argument
        """
        self._check(space, use_sde)
        if not self.changed or not isinstance(space, spaces.Box):
            return None
        k, takes_mean = get_action_dim(space), self.deterministic_action == "mean"
        if self.distribution == "beta":
            beta = OfOutputs(Beta(k, takes_mean=takes_mean), [AboveOne()] * 2, takes_log_std=False)
            return BoxDistribution(k, beta, None, Squash(space))
        is_squashed = self.distribution == "squashed_gaussian"
        inner = SquashedGaussian(k, takes_mean=takes_mean) if is_squashed else Gaussian(k)
        squash = Squash(space) if is_squashed else None
        if self.log_std_bounds is None and not is_squashed and not self.state_dependent_std:
            return None  # the mean of a Gaussian is its mode
        bounded = self._bounded(log_std_init)
        family = OfOutputs(inner, [None, bounded], takes_log_std=not self.state_dependent_std)
        return BoxDistribution(k, family, bounded, squash)

    def _bounded(self, log_std_init: float) -> Bounded:
        """Return what keeps the bounds, between which ``log_std_init`` must be."""
        low, high = self.log_std_bounds or USUAL_BOUNDS
        if not low < log_std_init < high:
            raise ArgumentError(
                f"policy_kwargs: `log_std_init={log_std_init}` is not between `log_std_bounds={(low, high)}`. Change "
                "one of them."
            )
        return Bounded(float(low), float(high))

    def _check(self, space: spaces.Space[Any], use_sde: bool) -> None:
        check_choice("policy_kwargs: distribution", self.distribution, DISTRIBUTIONS)
        check_choice("policy_kwargs: state_dependent_std", self.state_dependent_std, (True, False))
        check_choice("policy_kwargs: deterministic_action", self.deterministic_action, ("mode", "mean"))
        _check_bounds(self.log_std_bounds, _HIGHEST_OF_SQUASHED if self.distribution == "squashed_gaussian" else None)
        for name, value in self.changed.items():
            if not isinstance(space, spaces.Box):
                raise ArgumentError(f"policy_kwargs: `{name}={value!r}` is for Box actions, not {space}. Leave it out.")
            if use_sde:
                raise ArgumentError(
                    f"policy_kwargs: `{name}={value!r}` and `use_sde=True`, which has a distribution of its own, "
                    "contradict each other. Leave out one."
                )
            if self.distribution == "beta" and name in ("state_dependent_std", "log_std_bounds"):
                raise ArgumentError(
                    f"policy_kwargs: `{name}={value!r}` is for Gaussians, but `distribution` is 'beta', whose two "
                    "numbers always depend on the state. Leave it out."
                )
        if self.distribution != "gaussian" and isinstance(space, spaces.Box) and not _is_bounded(space):
            raise ArgumentError(
                f"policy_kwargs: `distribution={self.distribution!r}` needs actions with finite bounds, not {space}. "
                "Give the environment's action space its bounds."
            )


def _is_bounded(space: spaces.Box) -> bool:
    return bool(np.isfinite(space.low).all() and np.isfinite(space.high).all())


def _check_bounds(bounds: Any, highest: float | None) -> None:
    if bounds is None:
        return
    lowest, highest = _WIDEST_BOUNDS[0], highest or _WIDEST_BOUNDS[1]
    is_pair = isinstance(bounds, tuple | list) and len(bounds) == 2
    if not (is_pair and all(isinstance(x, int | float | np.number) for x in bounds)) or not (
        lowest <= bounds[0] < bounds[1] <= highest
    ):
        raise ArgumentError(
            f"policy_kwargs: `log_std_bounds` is {bounds!r}, but must be two numbers (low, high) with "
            f"{lowest:g} <= low < high <= {highest:g}, such as {USUAL_BOUNDS}."
        )


class BoxDistribution(sb3.DiagGaussianDistribution):
    """One of our families as SB3's policies know distributions.

    They make it as they make their Gaussian: a layer, and ``log_std`` if the family takes one.

    :param n_dims: of the action space
    :param family: with parameters that are the layer's outputs, and perhaps ``log_std``
    :param bounded: what keeps the logarithm of a Gaussian's deviation within its bounds; None for others
    :param squash: from what is recorded to the space; None clips
    """

    parameters: Parameters

    def __init__(self, n_dims: int, family: Family, bounded: Bounded | None, squash: Squash | None) -> None:
        super().__init__(n_dims)
        self.family, self.bounded, self.squash = family, bounded, squash

    def proba_distribution_net(self, latent_dim: int, log_std_init: float = 0.0) -> tuple[nn.Module, Any]:
        """Return the layer that puts out the family's parameters, and ``log_std`` before its bounds, or None."""
        if self.bounded is None or not self.family.takes_log_std:
            return nn.Linear(latent_dim, 2 * self.action_dim), None
        return nn.Linear(latent_dim, self.action_dim), nn.Parameter(
            th.full((self.action_dim,), self.bounded.inverse(log_std_init))
        )

    def proba_distribution(self, mean_actions: th.Tensor, log_std: th.Tensor | None) -> "BoxDistribution":
        """Take on the parameters of a batch, row by row; they stay in the graph."""
        self.parameters = (mean_actions,) if log_std is None else (mean_actions, log_std + 0.0 * mean_actions)
        return self

    @property
    def distribution(self) -> td.Normal | td.Beta:  # type: ignore[override]
        """Return torch's distribution of each number before it is squashed, or of the share of the range for "beta".

        sb3-contrib's TRPO takes the KL of it, which squashing does not change.
        """
        family: Any = self.family
        first, second = family.parameters(self.parameters)
        return td.Beta(first, second) if isinstance(family.inner, Beta) else td.Normal(first, second.exp())

    def deviation(self, log_std: th.Tensor) -> th.Tensor:
        """Return the deviation of each dimension, (k,), that the policy's ``log_std`` stands for."""
        return (log_std if self.bounded is None else th.as_tensor(self.bounded(log_std))).exp()

    def log_prob(self, actions: th.Tensor) -> th.Tensor:
        """Return the log-probability of what was recorded of actions, (n,)."""
        return th.as_tensor(self.family.log_prob(self.parameters, actions))

    def entropy(self) -> th.Tensor:
        """Return the entropy, (n,), of squashed actions that of the action scaled to [-1, 1]."""
        return th.as_tensor(self.family.entropy(self.parameters))

    def sample(self) -> th.Tensor:
        """Return an action of each row as it is recorded; out of the graph."""
        first: Any = self.parameters[0]
        numbers = tuple(th.as_tensor(x).detach().cpu().numpy() for x in self.parameters)
        with np.errstate(all="ignore"):  # as torch's
            drawn = draw(self.family, numbers, deterministic=False)
        return th.as_tensor(drawn, dtype=first.dtype, device=first.device)

    def mode(self) -> th.Tensor:
        """Return the action of each row that is taken without chance, as it is recorded."""
        return th.as_tensor(self.family.mode(self.parameters))


class BoxPolicy(ActorCriticPolicy):
    """A policy that chooses the distribution of its Box actions; parameters are those of :class:`BoxOptions`."""

    action_dist: Any

    def __init__(
        self,
        *args: Any,
        distribution: str = BoxOptions.distribution,
        state_dependent_std: bool = BoxOptions.state_dependent_std,
        log_std_bounds: tuple[float, float] | None = BoxOptions.log_std_bounds,
        deterministic_action: str = BoxOptions.deterministic_action,
        **kwargs: Any,
    ) -> None:
        if isinstance(log_std_bounds, list | np.ndarray):  # of YAML and JSON
            log_std_bounds = tuple(log_std_bounds)
        # Before SB3's constructor, which builds the policy.
        self.box_options = BoxOptions(distribution, state_dependent_std, log_std_bounds, deterministic_action)
        super().__init__(*args, **kwargs)

    def _build(self, lr_schedule: Schedule) -> None:
        own = self.box_options.make(self.action_space, self.use_sde, self.log_std_init)
        if own is not None:
            self.action_dist, self._squash_output = own, own.squash is not None
        super()._build(lr_schedule)
        if own is not None and not own.family.takes_log_std:
            del self.log_std  # of policies that have one SB3 logs its exponential
            if own.bounded is not None:  # after the layer has been initialised
                bias: Any = self.action_net.bias
                with th.no_grad():
                    bias[own.action_dim :] += own.bounded.inverse(self.log_std_init)

    def _get_action_dist_from_latent(self, latent_pi: th.Tensor) -> sb3.Distribution:
        if not isinstance(self.action_dist, BoxDistribution):
            return super()._get_action_dist_from_latent(latent_pi)
        log_std = self.log_std if self.action_dist.family.takes_log_std else None
        return self.action_dist.proba_distribution(self.action_net(latent_pi), log_std)

    def unscale_action(self, scaled_action: np.ndarray) -> np.ndarray:
        """Return actions of the space, from what is recorded of squashed ones: of ours the number before squashing."""
        squash = self.action_dist.squash if isinstance(self.action_dist, BoxDistribution) else None
        return super().unscale_action(scaled_action) if squash is None else squash(scaled_action)

    def scale_action(self, action: np.ndarray) -> np.ndarray:
        """Return what is recorded of actions of the space."""
        squash = self.action_dist.squash if isinstance(self.action_dist, BoxDistribution) else None
        return super().scale_action(action) if squash is None else squash.inverse(action)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        its = {"share_features_extractor": self.share_features_extractor}  # which SB3 leaves out
        return {**super()._get_constructor_parameters(), **its, **self.box_options.changed}


def deviation(policy: ActorCriticPolicy) -> th.Tensor | None:
    """Return the standard deviation that a policy has in all states, before squashing; None if it has none."""
    log_std = getattr(policy, "log_std", None)  # SB3's policies have it for some distributions
    if log_std is None:
        return None
    distribution: Any = policy.action_dist
    return distribution.deviation(log_std) if isinstance(distribution, BoxDistribution) else log_std.exp()

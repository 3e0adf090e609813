"""Archives of SB3 and sb3-contrib: what they hold, and what becomes of it here."""

import base64
import importlib.util
import inspect
from collections.abc import Collection
from typing import Any, Protocol, runtime_checkable

from stable_baselines3.common.policies import (
    ActorCriticCnnPolicy,
    ActorCriticPolicy,
    BasePolicy,
    MultiInputActorCriticPolicy,
)

from sb3_pg.common.errors import ArgumentError, arguments_of, did_you_mean

#: What tells the archives of algorithms apart: the first of these whose attributes one has.
_MARKS = {
    "REINFORCE": "critic_batch_size",
    "TRPO": "cg_max_steps",
    "PPO": "clip_range",
    "ARS": "n_delta",
    "QRDQN": "n_quantiles",
    "DQN": "exploration_fraction",
    "TQC": "top_quantiles_to_drop_per_net",
    "CrossQ": "target_entropy policy_delay",
    "SAC": "target_entropy",
    "TD3 or DDPG": "policy_delay",
    "an off-policy algorithm": "buffer_size",
    "A2C": "gae_lambda",
}


@runtime_checkable
class Portable(Protocol):
    """A policy whose archive shall load where what it was made of is not."""

    def portable_kwargs(self, policy_kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments that make the policy of the archive, in place of those that made this one."""


@runtime_checkable
class MadeOfFiles(Protocol):
    """A policy with arguments that may name files."""

    @staticmethod
    def not_portable(policy_kwargs: dict[str, Any]) -> str | None:
        """Return which of the arguments would read or run what is elsewhere; None if none would."""

    @staticmethod
    def n_elsewhere(policy_kwargs: dict[str, Any]) -> int:
        """Return how many numbers at most are read from where the archive says that they are, by names of files."""


_MASKABLE = "sb3_contrib.common.maskable.policies"

#: sb3-contrib's policies that take masks, and those of SB3 with the same networks, which ours mask without more ado.
_UNMASKED: dict[str, type[BasePolicy]] = {
    "MaskableActorCriticPolicy": ActorCriticPolicy,
    "MaskableActorCriticCnnPolicy": ActorCriticCnnPolicy,
    "MaskableMultiInputActorCriticPolicy": MultiInputActorCriticPolicy,
}


def unmasked(kind: Any) -> Any:
    """Return SB3's policy in place of one of sb3-contrib's that take masks; any other class as it is."""
    is_contribs = inspect.isclass(kind) and kind.__module__ == _MASKABLE
    return _UNMASKED.get(kind.__name__, kind) if is_contribs else kind


def maskable(kind: Any) -> Any:
    """Return sb3-contrib's policy with the same networks that takes masks, if it is installed and has one."""
    name = next((name for name, plain in _UNMASKED.items() if plain is kind), None)
    if name is None or importlib.util.find_spec("sb3_contrib") is None:
        return kind
    return getattr(importlib.import_module(_MASKABLE), name)


def with_one_output(own: ActorCriticPolicy, parameters: dict[str, Any], n: int) -> dict[str, Any]:
    """Return parameters of sb3-contrib's masked MultiBinary actions for SB3's policy.

    That has one output for each number, the logit of on, where sb3-contrib's has two, whose difference it is. The
    optimizer's moments are those of on: that the difference grows is that its output does.

    :param own: the policy that they are for
    :param parameters: as in an archive; others are returned as they are
    :param n: numbers of the action space
    """
    policy = dict(parameters.get("policy", {}))
    if "action_net.bias" not in policy or len(policy["action_net.bias"]) != 2 * n:
        return parameters
    # The optimizer numbers parameters, and a shared extractor has several names, but only one number for each.
    index = [i for i, (name, _) in enumerate(own.named_parameters()) if name.startswith("action_net.")]
    for name in ("action_net.weight", "action_net.bias"):
        policy[name] = policy[name][1::2] - policy[name][::2]
    optimizer = dict(parameters.get("policy.optimizer", {}))
    if optimizer.get("state"):
        optimizer["state"] = {
            i: {key: x[1::2] if i in index and x.ndim else x for key, x in state.items()}
            for i, state in optimizer["state"].items()
        }
    return {**parameters, "policy": policy, "policy.optimizer": optimizer}


def with_own_extractors(own: ActorCriticPolicy, parameters: dict[str, Any]) -> dict[str, Any]:
    """Return parameters from before SB3 1.7 with the names that a shared features extractor has since."""
    policy = parameters.get("policy", {})
    names = {name: name.removeprefix("pi_").removeprefix("vf_") for name in own.state_dict().keys() - policy.keys()}
    if not names or not policy.keys() >= set(names.values()):
        return parameters
    return {**parameters, "policy": {**policy, **{name: policy[old] for name, old in names.items()}}}


def check_memory(policy: ActorCriticPolicy, parameters: dict[str, Any]) -> None:
    """Refuse the parameters of a recurrent policy for one that is not, and the other way round.

    :param parameters: as in an archive
    :raises ArgumentError: they are
    """
    kinds = ["ActorCriticPolicy, which has no memory", "RecurrentActorCriticPolicy, which has a memory"]
    given, own = (
        kinds[any(name.startswith("lstm_") for name in names)]
        for names in (parameters.get("policy", policy.state_dict()), policy.state_dict())
    )
    if given != own:
        raise ArgumentError(
            f"The parameters are those of a policy like {given}, but this model's {type(policy).__name__} is like "
            f"{own}. Load the archive with `load`, which makes a policy of its kind."
        )


#: Arguments that only a new model can have, and what there is in the archive.
OF_NEW_MODELS = {"use_rms_prop": "optimizer", "rms_prop_eps": "optimizer", "policy": "policy"}


def check_overrides(kind: type, names: Collection[str]) -> None:
    """Refuse arguments of ``load`` that would be without effect.

    :param kind: the algorithm
    :param names: of its arguments
    :raises ArgumentError: naming one that there is not, or that only a new model can have
    """
    known = arguments_of(kind)
    for name in names:
        if name in OF_NEW_MODELS and name in known:
            raise ArgumentError(
                f"`{name}` cannot be changed when loading: the archive has its own {OF_NEW_MODELS[name]}."
            )
        if name not in known:
            raise ArgumentError(f"`{name}` is not an argument of {kind.__name__}.{did_you_mean(name, known)}")


def algorithm_in(data: dict[str, Any]) -> str | None:
    """Return which algorithm an archive holds, from the names of its attributes; None if that can't be told."""
    return next((algorithm for algorithm, marks in _MARKS.items() if data.keys() >= set(marks.split())), None)


def without_contrib(data: dict[str, Any]) -> dict[str, Any]:
    """Return what to read in the archive of a masked PPO in place of sb3-contrib's classes, if there are none."""
    kind = data.get("policy_class")
    if not isinstance(kind, dict) or kind.get("__module__") != _MASKABLE or importlib.util.find_spec("sb3_contrib"):
        return {}
    pickled = base64.b64decode(kind[":serialized:"])
    found = next((plain for name, plain in _UNMASKED.items() if name.encode() in pickled), None)
    return {"policy_class": found, "rollout_buffer_class": None}

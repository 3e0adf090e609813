"""What an archive says of its policy besides parameters: what they mean, and which of them learn how."""

from dataclasses import fields
from typing import Any

from stable_baselines3.common.policies import ActorCriticPolicy

from sb3_pg.common.archive.container import Archive, ArchiveError
from sb3_pg.common.distributions import BoxOptions, BoxPolicy
from sb3_pg.common.errors import ArgumentError
from sb3_pg.common.groups import critics_differences, has_critic_group

#: As JSON has it.
Notes = dict[str, Any]

_KINDS: dict[str, type] = {"distribution": dict, "frozen": list, "critics_options": dict}


def notes_of(policy: ActorCriticPolicy) -> Notes:
    """Return what an archive is to say of a policy."""
    optimizer = policy.optimizer
    return {
        "distribution": _options(policy).of_parameters,
        "frozen": [name for name, p in policy.named_parameters() if not p.requires_grad],
        "critics_options": critics_differences(optimizer) if has_critic_group(optimizer) else {},
    }


def notes_in(archive: Archive) -> Notes:
    """Return what an archive says of its policy; if it is none of ours, what the arguments of the policy say.

    :raises ArchiveError: it is nothing that is said of one
    """
    if archive.seal is None:
        given = archive.data.get("policy_kwargs")
        known = {its.name for its in fields(BoxOptions)}
        options = {name: x for name, x in given.items() if name in known} if isinstance(given, dict) else {}
        return {"distribution": BoxOptions(**options).of_parameters}
    found: Notes = archive.seal.get("policy", {})
    are_known = isinstance(found, dict) and all(
        isinstance(found.get(name, kind()), kind) for name, kind in _KINDS.items()
    )
    if not are_known or not all(map(_is_option, found.get("critics_options", {}).values())):
        raise ArchiveError(f"{archive.name}: what it says of its policy is damaged ({found!r}).")
    return found


def _is_option(value: Any) -> bool:
    several = value if isinstance(value, list) else [value]
    return all(isinstance(x, bool | int | float | None) for x in several)


def check_distribution(file: str, policy: ActorCriticPolicy, notes: Notes) -> None:
    """Refuse parameters that fit a policy, but that would mean something else in it.

    :param file: its name
    :raises ArgumentError: naming both distributions
    """
    own = _options(policy).of_parameters
    given = notes.get("distribution", own)
    if given != own:
        theirs, ours = (" ".join(f"{name}={value!r}" for name, value in its.items()) for its in (given, own))
        raise ArgumentError(
            f"{file} has the parameters of a policy with {theirs}, but this one has {ours}, in which they would mean "
            "something else. Make a policy of that kind by policy_kwargs, or let `load` make it."
        )


def take_notes(policy: ActorCriticPolicy, notes: Notes, *, critics_options: bool) -> None:
    """Freeze what was frozen, and let the critic's parameters learn as they did.

    :param critics_options: False if it has been told how it shall
    """
    for name, p in policy.named_parameters():
        if name in notes.get("frozen", ()):
            p.requires_grad_(False)
    if critics_options and has_critic_group(policy.optimizer):
        of_critic = policy.optimizer.param_groups[1]
        for name, value in notes.get("critics_options", {}).items():
            if name in of_critic:
                of_critic[name] = tuple(value) if isinstance(value, list) else value


def _options(policy: ActorCriticPolicy) -> BoxOptions:
    return policy.box_options if isinstance(policy, BoxPolicy) else BoxOptions()

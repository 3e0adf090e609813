"""The critic's parameters as a group in the policy's optimizer, with a learning rate and options of its own.

Archives hold the optimizer as SB3 has it, with one group for all: what the critic's differs in follows from arguments.
"""

from typing import Any

import torch as th
from stable_baselines3.common.policies import ActorCriticPolicy

from sb3_pg.common.errors import ArgumentError, did_you_mean

#: What SB3, sb3-contrib and our policies call the modules that belong to the critic.
_OF_CRITIC = (
    "value_net.",
    "mlp_extractor.value_net.",
    "vf_features_extractor.",
    "lstm_critic.",
    "critic.",
    "value_head.",
)

#: What tells the critic's group from those that an optimizer of the user's has.
_MARK = "is_critics"

#: The state of an optimizer as ``state_dict`` returns it.
State = dict[str, Any]

#: The largest norm of all gradients together, or of the actor's and of the critic's; None does not clip.
MaxGradNorm = float | tuple[float | None, float | None] | None


def critic_parameters(policy: ActorCriticPolicy) -> list[th.nn.Parameter]:
    """Return the parameters of modules that are the critic's alone. What actor and critic share is the actor's."""
    names = policy.named_parameters(remove_duplicate=False)
    shared = {id(p) for name, p in names if not name.startswith(_OF_CRITIC)}
    return [p for p in policy.parameters() if id(p) not in shared]


def give_critic_a_group(policy: ActorCriticPolicy, options: dict[str, Any]) -> None:
    """Move the critic's parameters to a second group of the policy's optimizer, whose state stays.

    :param options: what this group has in place of the first one's, such as ``weight_decay``
    :raises ArgumentError: the policy has no such parameters or several groups already, or the optimizer no such option
    """
    groups, kind = policy.optimizer.param_groups, type(policy.optimizer).__name__
    if len(groups) != 1:
        raise ArgumentError(
            f"{type(policy).__name__} has an optimizer of {len(groups)} groups already: leave out "
            "`critic_learning_rate` and `critic_optimizer_kwargs`, and set the options of its groups."
        )
    for name in options:
        if name not in groups[0] or name in ("params", "lr"):
            hint = did_you_mean(name, groups[0].keys() - {"params", "lr"})
            advice = " Pass `critic_learning_rate`." if name == "lr" else hint
            raise ArgumentError(f"`critic_optimizer_kwargs` has {name!r}, which {kind} does not take here.{advice}")
    of_critic = {id(p) for p in critic_parameters(policy)}
    mine, its = ([p for p in groups[0]["params"] if (id(p) in of_critic) == is_its] for is_its in (False, True))
    if not its:
        raise ArgumentError(
            f"{type(policy).__name__} has no module that is known to be the critic's alone, such as `value_net`: leave "
            "out `critic_learning_rate` and `critic_optimizer_kwargs`."
        )
    groups[0]["params"] = mine
    groups.append({**groups[0], **options, _MARK: True, "params": its})


def has_critic_group(optimizer: th.optim.Optimizer) -> bool:
    """Return whether the critic's parameters are the optimizer's second group by ``give_critic_a_group``."""
    groups = optimizer.param_groups
    return len(groups) == 2 and _MARK in groups[1]


def _numbers(policy: ActorCriticPolicy) -> list[int]:
    """Return the number that each parameter of the optimizer, group by group, has if there is one group."""
    ordered = [id(p) for group in policy.optimizer.param_groups for p in group["params"]]
    grouped = set(ordered)
    place = {of: i for i, of in enumerate(id(p) for p in policy.parameters() if id(p) in grouped)}
    return [place[of] for of in ordered]


def with_one_group(policy: ActorCriticPolicy, state: State) -> State:
    """Return the state of the policy's optimizer of two groups as SB3's of one group has it."""
    number = _numbers(policy)
    groups = state["param_groups"]
    return {
        **state,
        "state": {number[i]: its for i, its in state["state"].items()},
        "param_groups": [{**groups[0], "params": sorted(number)}],
    }


def with_two_groups(policy: ActorCriticPolicy, state: State) -> State:
    """Return the state of an optimizer of one group for the policy's of two; other states as they are."""
    number, groups = _numbers(policy), state.get("param_groups")
    if not isinstance(groups, list) or len(groups) != 1 or groups[0].get("params") != sorted(number):
        return state
    place, n = {of: i for i, of in enumerate(number)}, len(policy.optimizer.param_groups[0]["params"])
    actor, critic = policy.optimizer.param_groups
    own = {name: its for name, its in critic.items() if name != "params" and its != actor.get(name)}
    of_actor = {**groups[0], "params": list(range(n))}
    of_critic = {**groups[0], **own, "params": list(range(n, len(number)))}
    return {
        **state,
        "state": {place[i]: its for i, its in state["state"].items()},
        "param_groups": [of_actor, of_critic],
    }

"""The critic's parameters as a group in the policy's optimizer, with a learning rate and options of its own.

Archives hold the optimizer as SB3 has it, with one group for all: what the critic's differs in follows from arguments.
"""

import inspect
from typing import Any

import torch as th
from stable_baselines3.common.policies import ActorCriticPolicy

from sb3_pg.common.errors import ArgumentError, did_you_mean, name_of

#: What SB3, sb3-contrib and our policies call the modules that belong to the critic.
_OF_CRITIC = (
    "value_net.",
    "mlp_extractor.value_net.",
    "vf_features_extractor.",
    "lstm_critic.",
    "critic.",
    "value_head.",
)

#: What tells the critic's group from those that an optimizer of the user's has: there are the options of its own.
_OWN = "critics_own"

#: The state of an optimizer as ``state_dict`` returns it.
State = dict[str, Any]

#: The largest norm of all gradients together, or of the actor's and of the critic's; None does not clip.
MaxGradNorm = float | tuple[float | None, float | None] | None


def critic_parameters(policy: ActorCriticPolicy) -> list[th.nn.Parameter]:
    """Return the parameters of modules that are the critic's alone. What actor and critic share is the actor's."""
    names = policy.named_parameters(remove_duplicate=False)
    shared = {id(p) for name, p in names if not name.startswith(_OF_CRITIC)}
    return [p for p in policy.parameters() if id(p) not in shared]


def group_critic(policy: ActorCriticPolicy, options: dict[str, Any]) -> None:
    """Have the critic's parameters in a second group of the policy's optimizer, whose state stays.

    :param options: what this group has in place of the first one's, such as ``weight_decay``; others that it had before
        it has no more
    :raises ArgumentError: the policy has no such parameters or several groups already, or the options cannot work
    """
    optimizer, is_grouped = policy.optimizer, has_critic_group(policy.optimizer)
    if is_grouped and optimizer.param_groups[1][_OWN] == options:
        return
    if not is_grouped:
        _require_one_group(policy)
    _check_options(optimizer, options)
    if not is_grouped:
        _divide(policy)
    actor, critic = optimizer.param_groups
    critic.update({**{name: actor[name] for name in critic[_OWN]}, **options, _OWN: dict(options)})


def _require_one_group(policy: ActorCriticPolicy) -> None:
    if len(policy.optimizer.param_groups) != 1:
        raise ArgumentError(
            f"{type(policy).__name__} has an optimizer of {len(policy.optimizer.param_groups)} groups already: leave "
            "out `critic_learning_rate` and `critic_optimizer_kwargs`, and set the options of its groups."
        )


def _check_options(optimizer: th.optim.Optimizer, options: dict[str, Any]) -> None:
    group, kind = optimizer.param_groups[0], type(optimizer)
    for name in options:
        if name not in group or name in ("params", "lr"):
            hint = did_you_mean(str(name), group.keys() - {"params", "lr"})
            advice = " Pass `critic_learning_rate`." if name == "lr" else hint
            raise ArgumentError(
                f"`critic_optimizer_kwargs` has {name!r}, which {kind.__name__} does not take here.{advice}"
            )
    if options:
        parameters = inspect.signature(kind).parameters
        takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
        known = (parameters.keys() | (optimizer.defaults.keys() if takes_any else ())) - {"params", "lr"}
        inherited = {name: its for name, its in group.items() if name in known}
        check_optimizer("critic_optimizer_kwargs", kind, options, group["params"][0].device, inherited)


def _divide(policy: ActorCriticPolicy) -> None:
    (group,) = policy.optimizer.param_groups
    of_critic = {id(p) for p in critic_parameters(policy)}
    mine, its = ([p for p in group["params"] if (id(p) in of_critic) == is_its] for is_its in (False, True))
    if not its:
        raise ArgumentError(
            f"{type(policy).__name__} has no module that is known to be the critic's alone, such as `value_net`: leave "
            "out `critic_learning_rate` and `critic_optimizer_kwargs`."
        )
    group["params"] = mine
    policy.optimizer.param_groups.append({**group, _OWN: {}, "params": its})


def check_optimizer(
    where: str, kind: Any, options: dict[str, Any], device: th.device, inherited: dict[str, Any] | None = None
) -> None:
    """Refuse an optimizer that cannot be made with some options, or that cannot take a step by gradients alone.

    :param where: the argument that holds the options, for the message
    :param kind: the optimizer's class, or whatever makes one
    :param device: that the parameters are on
    :param inherited: what it has besides these options
    :raises ArgumentError: says what the optimizer says
    """
    if "lr" in options:
        raise ArgumentError(f"`{where}` has 'lr', which is set by `learning_rate`. Leave it out.")
    parameters = [th.nn.Parameter(th.zeros(shape, device=device)) for shape in ((2, 2), (2,))]
    for p in parameters:
        p.grad = th.zeros_like(p)
    try:
        kind(parameters, lr=1e-3, **{**(inherited or {}), **options}).step()
    except Exception as error:  # whatever it is, learning would end with it
        raise ArgumentError(
            f"{name_of(kind)} with `{where}={options!r}` cannot take a step: {error}. Correct its options, or choose "
            "another optimizer."
        ) from error


def has_critic_group(optimizer: th.optim.Optimizer) -> bool:
    """Return whether the critic's parameters are the optimizer's second group by ``group_critic``."""
    groups = optimizer.param_groups
    return len(groups) == 2 and _OWN in groups[1]


def critics_differences(optimizer: th.optim.Optimizer) -> dict[str, Any]:
    """Return the options of the critic's group that follow neither from arguments nor from the actor's group."""
    actor, critic = optimizer.param_groups
    expected = {**actor, **critic[_OWN]}
    return {
        name: value
        for name, value in critic.items()
        if name not in ("params", "lr", _OWN)
        and isinstance(value, bool | int | float | tuple | None)
        and value != expected.get(name)
    }


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
    critic = policy.optimizer.param_groups[1]
    own = {name: critic[name] for name in ("lr", *critic[_OWN], _OWN)}
    of_actor = {**groups[0], "params": list(range(n))}
    of_critic = {**groups[0], **own, "params": list(range(n, len(number)))}
    return {
        **state,
        "state": {place[i]: its for i, its in state["state"].items()},
        "param_groups": [of_actor, of_critic],
    }

"""What is looked at in an archive before it becomes a model."""

import copy
import math
import threading
from collections import defaultdict, deque
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch.nn.modules.module import register_module_parameter_registration_hook

from sb3_pg.common.archive.container import ArchiveError
from sb3_pg.common.archive.peers import MadeOfFiles
from sb3_pg.common.errors import ArgumentError, as_number

#: What an attribute or argument of the policy must be, so that nothing else is called in its place.
_ATTRIBUTES: dict[str, type] = {"policy_class": BasePolicy, "rollout_buffer_class": RolloutBuffer}
_POLICY_KWARGS: dict[str, type] = {
    "activation_fn": th.nn.Module,
    "features_extractor_class": BaseFeaturesExtractor,
    "optimizer_class": th.optim.Optimizer,
}

#: What SB3 saves only if it is told to: making an environment of a name, for one, may import any module.
_NEVER_SAVED = ("env", "policy", "_custom_logger", "_logger", "_vec_normalize_env", "rollout_buffer", "device")

#: What a model counts, and what it remembers of its environments.
_COUNTED: tuple[str, ...] = (
    "num_timesteps",
    "n_envs",
    "start_time",
    "_total_timesteps",
    "_num_timesteps_at_start",
    "_n_updates",
)
_COUNTED += ("_episode_num", "_stats_window_size", "_current_progress_remaining")
_REMEMBERED: dict[str, tuple[type, ...]] = {
    "ep_info_buffer": (deque,),
    "ep_success_buffer": (deque,),
    "_last_obs": (np.ndarray, dict),
    "_last_original_obs": (np.ndarray, dict),
    "_last_episode_starts": (np.ndarray,),
}

#: Numbers in a policy beside those in its archive: made on the way, or shared by two names.
_MOST_TIMES, _MOST_NUMBERS = 4, 1 << 20


def check_attributes(file: str, model: type, data: dict[str, Any], given: Collection[str]) -> None:
    """Refuse attributes in whose place a file could put something else.

    :param file: its name, for errors
    :param model: the algorithm
    :param data: the attributes
    :param given: names of those that are not from the file
    :raises ArchiveError: naming one
    """
    for name in ("observation_space", "action_space"):
        if not isinstance(data.get(name), spaces.Space):
            raise ArchiveError(f"{file}: `{name}` is {data.get(name)!r}, but must be a space.")
    if not isinstance(data.get("policy_kwargs", {}), dict):
        raise ArchiveError(f"{file}: `policy_kwargs` is {data['policy_kwargs']!r}, but must be a dictionary.")
    for name in [name for name in data if name not in given]:
        if callable(getattr(model, name, None)) or name in _NEVER_SAVED:
            raise ArchiveError(
                f"{file}: `{name}` is nothing that a {model.__name__} saves, and is not taken from a file."
            )
    for name in [name for name in _COUNTED if name in data and name not in given]:
        if as_number(data[name]) is None:
            raise ArchiveError(f"{file}: `{name}` is {data[name]!r}, but must be a number.")
    for name, kinds in _REMEMBERED.items():
        if not isinstance(data.get(name), (*kinds, type(None))) and name not in given:
            raise ArchiveError(f"{file}: `{name}` is a {type(data[name]).__name__}, which it cannot be.")
    _check_classes(file, _ATTRIBUTES, {name: value for name, value in data.items() if name not in given})
    if "policy_kwargs" not in given:
        check_policy_kwargs(file, data.get("policy_class"), data.get("policy_kwargs", {}))


def check_policy_kwargs(file: str, policy: Any, kwargs: dict[str, Any]) -> None:
    """Refuse arguments of a policy that would call something else, or read what is not in the file.

    :param file: its name, for errors
    :param policy: the class that they are for
    :raises ArchiveError: naming one
    """
    _check_classes(file, _POLICY_KWARGS, kwargs)
    if isinstance(policy, type) and issubclass(policy, MadeOfFiles):
        fault = policy.not_portable(kwargs)
        if fault:
            raise ArchiveError(f"{file}: {fault}. Pass trusted=True if you know where it is from.")


def _check_classes(file: str, wanted: dict[str, type], values: dict[str, Any]) -> None:
    for name, kind in wanted.items():
        value = values.get(name)
        if value is not None and not (isinstance(value, type) and issubclass(value, kind)):
            raise ArchiveError(f"{file}: `{name}` is {value!r}, but must be a {kind.__name__}.")


def n_elsewhere(policy: Any, kwargs: dict[str, Any]) -> int:
    """Return how many numbers of a policy are not in its file, see :class:`sb3_pg.common.archive.peers.MadeOfFiles`."""
    return policy.n_elsewhere(kwargs) if isinstance(policy, type) and issubclass(policy, MadeOfFiles) else 0


@contextmanager
def limited(file: str, state: Any, elsewhere: int = 0) -> Iterator[None]:
    """Refuse to make a policy that is much larger than its state.

    A few numbers in a file ("net_arch") could otherwise ask for more memory than there is.

    :param file: its name, for errors
    :param state: the policy's, as ``state_dict`` returns it
    :param elsewhere: how many numbers of the policy are not in the file
    :raises ArchiveError: it is
    """
    values = state.values() if isinstance(state, dict) else ()
    there = sum(x.numel() for x in values if isinstance(x, th.Tensor))
    left, thread = _MOST_TIMES * (there + elsewhere) + _MOST_NUMBERS, threading.get_ident()

    def count(module: th.nn.Module, name: str, parameter: th.nn.Parameter | None) -> None:
        nonlocal left
        if parameter is not None and threading.get_ident() == thread:
            left -= parameter.numel()
            if left < 0:
                raise ArchiveError(f"{file}: its policy would be much larger than its {there} parameters.")

    hook = register_module_parameter_registration_hook(count)  # before memory is written to
    try:
        yield
    finally:
        hook.remove()


def check_parameters(file: str, model: Any, parameters: dict[str, Any], exact: bool) -> None:
    """Refuse parameters and optimizer states that do not fit, or that are not finite, before any is taken over.

    :param file: its name, for errors
    :param model: that they are for
    :param parameters: as ``get_parameters`` returns them
    :param exact: whether all must be there
    :raises ArchiveError: naming one that does not
    """
    expected = set(model._get_torch_save_params()[0])
    if not parameters.keys() <= expected or (exact and parameters.keys() != expected):
        raise ArchiveError(
            f"{file} has parameters of {_listed(parameters)}, but a {type(model).__name__} needs {_listed(expected)}."
        )
    if "policy" in parameters:
        check_policy_state(file, model.policy, parameters["policy"], exact)
    if "policy.optimizer" in parameters:
        _check_optimizer(file, model.policy.optimizer, parameters["policy.optimizer"])


def check_policy_state(file: str, policy: th.nn.Module, state: Any, exact: bool = True) -> None:
    """Refuse the state of a policy that does not fit, or that is not finite.

    :param file: its name, for errors
    :param exact: whether all must be there
    :raises ArchiveError: naming what does not
    """
    if not isinstance(state, dict):
        raise ArchiveError(f"{file}: the state of the policy is a {type(state).__name__}.")
    own, learned = policy.state_dict(), dict(policy.named_parameters())
    missing, unknown = own.keys() - state.keys(), state.keys() - own.keys()
    if exact and (missing or unknown):
        what = f"lacks {_listed(missing)}" if missing else f"has {_listed(unknown)}"
        raise ArchiveError(f"{file}: its policy {what}, unlike the {type(policy).__name__} that it is for.")
    for name in [name for name in own if name in state]:
        x = state[name]
        if not isinstance(x, th.Tensor) or x.shape != own[name].shape:
            shape = tuple(x.shape) if isinstance(x, th.Tensor) else type(x).__name__
            raise ArchiveError(f"{file}: {name} is of shape {shape}, but must be of {tuple(own[name].shape)}.")
        if name in learned and not x.isfinite().all():
            raise ArchiveError(f"{file}: {name} is not finite. The model has diverged before it was saved.")


def _check_optimizer(file: str, optimizer: th.optim.Optimizer, state: dict[str, Any]) -> None:
    shapes = [p.shape for group in optimizer.param_groups for p in group["params"]]
    what = f"{file}: the state of the optimizer"
    try:
        sizes = [len(group["params"]) for group in state["param_groups"]]
        settings = [(name, value) for group in state["param_groups"] for name, value in group.items()]
        items = [
            (_shape_of(key, shapes[i]), f"{key} of parameter {i}", x)
            for i, its in state["state"].items()
            for key, x in its.items()
        ]
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise ArchiveError(f"{what} does not fit ({type(error).__name__}: {error}).") from None
    if sizes != [len(group["params"]) for group in optimizer.param_groups]:
        raise ArchiveError(f"{what} is of {sizes} parameters, but must be of {len(shapes)}.")
    for name, value in settings:
        if isinstance(value, float) and math.isnan(value):
            raise ArchiveError(f"{what} has {name}={value}.")
    for shape, name, x in items:
        if isinstance(x, th.Tensor) and (not x.isfinite().all() or (x.numel() > 1 and x.shape != shape)):
            raise ArchiveError(f"{what} does not fit or is not finite: {name}.")


def _shape_of(key: str, shape: th.Size) -> th.Size:
    """Return the shape of what an optimizer keeps under a name for a parameter: Adafactor's are of rows and columns."""
    if key == "row_var":
        return th.Size([*shape[:-1], 1])
    return th.Size([*shape[:-2], 1, shape[-1]]) if key == "col_var" else shape


def check_optimizer_state(optimizer: th.optim.Optimizer, state: Any, file: str | None) -> None:
    """Refuse a state with which the optimizer could take no step, such as that of an optimizer of another class.

    It is tried on one parameter of each group.

    :param state: as ``state_dict`` returns it, or None
    :param file: the name of that which it is from, if it is
    :raises ArchiveError: it is from a file
    :raises ArgumentError: it is not
    """
    if not isinstance(state, dict) or not isinstance(state.get("param_groups"), list):
        return  # torch says what is wrong
    for own, given in zip(optimizer.param_groups, state["param_groups"], strict=False):
        numbers = dict(zip(given["params"], own["params"], strict=False))
        if not numbers or _step_alone(optimizer, own, own["params"][0], None) is not None:
            continue
        number = min(numbers, key=lambda i: (i not in state["state"], numbers[i].numel()))
        one = {"state": {0: state["state"].get(number, {})}, "param_groups": [{**given, "params": [0]}]}
        fault = _step_alone(optimizer, own, numbers[number], copy.deepcopy(one))
        if fault is not None:
            kind = ArgumentError if file is None else ArchiveError
            raise kind(
                f"{file or 'The dictionary'} has the state of another optimizer than this model's "
                f"{type(optimizer).__name__}, which cannot go on from it ({type(fault).__name__}: {fault}). Make the "
                "model with the same policy_kwargs={'optimizer_class': ...}."
            )


def _step_alone(
    optimizer: th.optim.Optimizer, group: dict[str, Any], parameter: th.nn.Parameter, state: Any
) -> Exception | None:
    """Return why an optimizer cannot take a step from a state, None if it can.

    :param group: one of its own, whose options it has
    :param parameter: for the shape
    :param state: None begins anew
    """
    p = th.nn.Parameter(th.zeros_like(parameter))
    p.grad = th.zeros_like(parameter)
    alone = copy.copy(optimizer)
    alone.state, alone.param_groups = defaultdict(dict), [{**group, "params": [p]}]
    try:
        if state is not None:
            alone.load_state_dict(state)
        alone.step()
    except Exception as error:  # whatever it is, learning would end with it
        return error
    return None


def _listed(names: Any) -> str:
    some = sorted(names)
    return ", ".join(some[:3]) + (f" and {len(some) - 3} more" if len(some) > 3 else "") or "nothing"

"""Default arguments that depend on the policy: those of the constructors are for small networks.

What is passed always wins. A package enters its presets in ``PRESET_PLACES`` of :mod:`sb3_pg.common.registry`.
"""

import functools
import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Concatenate, ParamSpec, TypeVar

from sb3_pg.common.policies import class_of
from sb3_pg.common.registry import PRESET_PLACES, entered_for

P = ParamSpec("P")
Model = TypeVar("Model")


@dataclass(frozen=True)
class Preset:
    """Arguments that an algorithm takes for a policy in place of its own defaults.

    :param name: what they are for, in words
    :param arguments: their values by name
    :param unless: for some of them the names of others. If one of those is passed, the argument keeps its own default,
        with which the other makes sense
    """

    name: str
    arguments: Mapping[str, Any]
    unless: Mapping[str, Collection[str]] = field(default_factory=dict)

    def chosen(self, passed: set[str]) -> dict[str, Any]:
        """Return the arguments that a call takes from the preset.

        :param passed: names of those that it has itself
        """
        return {
            name: value
            for name, value in self.arguments.items()
            if name not in passed and passed.isdisjoint(self.unless.get(name, ()))
        }


#: Returns the preset of a policy: from the algorithm's name and the policy's arguments.
PresetOf = Callable[[str, Mapping[str, Any]], Preset]


def takes_preset(init: Callable[Concatenate[Model, P], None]) -> Callable[Concatenate[Model, P], None]:
    """Let the constructor of an algorithm take what is not passed from the preset of the policy, if that has one.

    ``verbose=1`` prints what it takes. A model that is loaded has the arguments of its archive.
    """
    names = list(inspect.signature(init).parameters)[1:]

    @functools.wraps(init)
    def with_preset(model: Model, /, *args: P.args, **kwargs: P.kwargs) -> None:
        passed: dict[str, Any] = {**dict(zip(names, args, strict=False)), **kwargs}
        preset = _preset(type(model), passed)
        chosen = preset.chosen(set(passed)) if preset is not None else {}
        if preset is not None and passed.get("verbose", 0) >= 1:
            print(f"Defaults for {preset.name}: {', '.join(f'{name}={value!r}' for name, value in chosen.items())}")
        init(model, *args, **{**chosen, **kwargs})

    return with_preset


def _preset(algorithm: Any, passed: Mapping[str, Any]) -> Preset | None:
    policy, policy_kwargs = passed.get("policy"), passed.get("policy_kwargs") or {}
    if policy is None or not passed.get("_init_setup_model", True) or not isinstance(policy_kwargs, dict):
        return None
    kind: Any = class_of(policy)
    preset_of = entered_for(kind, PRESET_PLACES) if isinstance(kind, type) else None
    return None if preset_of is None else preset_of(algorithm.archive_name, policy_kwargs)

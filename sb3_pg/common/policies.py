"""SB3's policies under their names, with a faster ``predict``, and checks of what they are given."""

import inspect
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import fields
from typing import Any, ClassVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import (
    ActorCriticCnnPolicy,
    ActorCriticPolicy,
    BasePolicy,
    MultiInputActorCriticPolicy,
)
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.type_aliases import Schedule

from sb3_pg.common.archive.policy_files import SavedPolicy
from sb3_pg.common.distributions import BoxOptions, BoxPolicy, masking
from sb3_pg.common.distributions.recognition import detached
from sb3_pg.common.engines.blueprint import PLAIN
from sb3_pg.common.engines.prediction import Predictor
from sb3_pg.common.errors import ArgumentError, check_count, check_number, did_you_mean, is_whole, name_of
from sb3_pg.common.masks import checked_masks, n_rows
from sb3_pg.common.registry import OWN_PLACES, POLICY_PLACES, at, place_of

#: SB3's classes by the names that it has for them.
POLICIES: dict[str, type[BasePolicy]] = {
    "MlpPolicy": ActorCriticPolicy,
    "CnnPolicy": ActorCriticCnnPolicy,
    "MultiInputPolicy": MultiInputActorCriticPolicy,
}

_BOX_OPTIONS = [its.name for its in fields(BoxOptions)]

#: A policy that is not computed in closed form is asked again after so many predictions.
_ASKED_EVERY = 1000


class QuickMlpPolicy(SavedPolicy, BoxPolicy, ActorCriticPolicy):
    """SB3's MlpPolicy whose ``predict`` takes the closed form where that computes the same.

    Models are made with it in place of SB3's class. It takes the arguments of
    :class:`~sb3_pg.common.distributions.box.BoxOptions` too.
    """

    predictor_class: ClassVar[type[Predictor]] = Predictor

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._predictor: Predictor | None = None
        self._n_refused = 0

    def predict(
        self,
        observation: Any,
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
        action_masks: np.ndarray | None = None,
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        """Return actions and state as the ``predict`` of SB3's class does, the actions among those that masks allow."""
        masks = None
        if action_masks is not None:
            masks = checked_masks(self.action_space, action_masks, n_rows(self.observation_space, observation))
        if self._predictor is not None and not self._predictor.is_current():
            self._predictor, self._n_refused = None, 0
        if self._predictor is None:
            # To ask takes half as long as SB3's prediction, so not each time.
            self._predictor = self.predictor_class.of(self) if self._n_refused % _ASKED_EVERY == 0 else None
            self._n_refused += 1
        if self._predictor is not None:
            predicted = self._predictor.predict(observation, state, episode_start, deterministic, masks)
            if predicted is not None:
                if self.training:
                    self.set_training_mode(False)
                return predicted
        with masking(self, None if masks is None else th.as_tensor(masks, device=self.device)) as policy:
            return super(QuickMlpPolicy, policy).predict(observation, state, episode_start, deterministic)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_predictor": None}


class SavedCnnPolicy(SavedPolicy, BoxPolicy, ActorCriticCnnPolicy):
    """SB3's CnnPolicy with our files and distributions."""


class SavedMultiInputPolicy(SavedPolicy, BoxPolicy, MultiInputActorCriticPolicy):
    """SB3's MultiInputPolicy with our files and distributions."""


PLAIN.add(QuickMlpPolicy)
OWN_PLACES.update(
    {
        place_of(ActorCriticPolicy): place_of(QuickMlpPolicy),
        place_of(ActorCriticCnnPolicy): place_of(SavedCnnPolicy),
        place_of(MultiInputActorCriticPolicy): place_of(SavedMultiInputPolicy),
    }
)


def predict(
    policy: ActorCriticPolicy,
    observation: Any,
    state: tuple[np.ndarray, ...] | None,
    episode_start: np.ndarray | None,
    deterministic: bool,
    action_masks: Any,
) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
    """Return what any policy's ``predict`` does if it may choose only among allowed actions.

    :param action_masks: (n, options); None allows all
    :raises ArgumentError: the masks are of the wrong shape, or allow nothing, or the policy cannot be masked
    """
    if isinstance(policy, QuickMlpPolicy):
        return policy.predict(observation, state, episode_start, deterministic, action_masks)
    masks = None
    if action_masks is not None:
        n = n_rows(policy.observation_space, observation)
        masks = th.as_tensor(checked_masks(policy.action_space, action_masks, n), device=policy.device)
    with masking(policy, masks) as choosing:
        return choosing.predict(observation, state, episode_start, deterministic)


def detach_distribution(policy: ActorCriticPolicy) -> None:
    """Take what a policy's distribution remembers out of the graph, where it could not be copied."""
    policy.action_dist = detached(policy.action_dist)


def reset_noise(policy: ActorCriticPolicy, n_envs: int) -> None:
    """Draw new noise for gSDE, out of the graph: nothing is learned through it."""
    policy.reset_noise(n_envs)
    detach_distribution(policy)


def own_class(kind: Any) -> Any:
    """Return our class in place of one of SB3's or sb3-contrib's, any other as it is."""
    place = place_of(kind)
    return at(OWN_PLACES[place]) if place in OWN_PLACES else kind


def class_of(policy: Any) -> type[BasePolicy]:
    """Return the policy class that goes by a name. Of classes, take the one that ours stands for: archives name that.

    :raises ArgumentError: there is none; names those that there are
    """
    if not isinstance(policy, str):
        place = place_of(policy) if inspect.isclass(policy) else None
        given: type[BasePolicy] = next((at(given) for given, own in OWN_PLACES.items() if own == place), policy)
        return given
    try:
        found: type[BasePolicy] | None = at(POLICY_PLACES[policy]) if policy in POLICY_PLACES else POLICIES.get(policy)
    except ImportError as error:
        raise ArgumentError(
            f"`policy` {policy!r} needs a package that is not installed ({error.name}). Recurrent policies come with "
            "pip install 'sb3_pg[contrib]', language models with pip install 'sb3_pg[text]'."
        ) from error
    if found is not None:
        return found
    known = [*POLICIES, *sorted(POLICY_PLACES)]
    raise ArgumentError(
        f"`policy` is {policy!r}, but must be a subclass of ActorCriticPolicy or one of "
        f"{', '.join(map(repr, known))}.{did_you_mean(policy, known, suffix='policy')}"
    )


def check_policy(policy: Any, observation_space: spaces.Space[Any] | None, policy_kwargs: Any) -> None:
    """Refuse a policy or arguments of it that cannot work.

    :param policy: a name or a class
    :param observation_space: None if it is not known yet
    :raises ArgumentError: naming what is wrong and what to do
    """
    kind: Any = class_of(policy)
    if not inspect.isclass(kind):
        raise ArgumentError(f"`policy` must be a class derived from ActorCriticPolicy or a name, not {_short(policy)}.")
    if not issubclass(kind, ActorCriticPolicy):
        raise ArgumentError(f"`policy` must be a subclass of ActorCriticPolicy, not {kind.__name__}.")
    if not isinstance(policy_kwargs, dict | None):
        raise ArgumentError(f"`policy_kwargs` must be a dictionary or None, not {policy_kwargs!r}.")
    kwargs = policy_kwargs or {}
    for name in kwargs.keys() & {"observation_space", "action_space", "lr_schedule", "use_sde"}:
        where = {"use_sde": "Pass it to the algorithm", "lr_schedule": "Pass `learning_rate` to the algorithm"}
        raise ArgumentError(
            f"`policy_kwargs` has {name!r}, which the algorithm gives the policy. {where.get(name, 'Leave it out')}."
        )
    _check_names("policy_kwargs", kind, kwargs, _added_by(own_class(kind)))
    _check_values(kwargs)
    defaults = {name: p.default for name, p in inspect.signature(kind).parameters.items()}
    for part in ("optimizer", "features_extractor"):
        if not isinstance(kwargs.get(f"{part}_kwargs"), dict | None):
            its = kwargs[f"{part}_kwargs"]
            raise ArgumentError(f"policy_kwargs: `{part}_kwargs` must be a dictionary or None, not {its!r}.")
        function = kwargs.get(f"{part}_class", defaults.get(f"{part}_class"))
        _check_names(f"policy_kwargs: {part}_kwargs", function, kwargs.get(f"{part}_kwargs") or {})
    if observation_space is not None:
        _check_observations(kind, observation_space, kwargs)


def make_policy(
    policy: Any,
    observation_space: spaces.Space[Any],
    action_space: spaces.Space[Any],
    lr_schedule: Schedule,
    use_sde: bool,
    kwargs: dict[str, Any],
) -> ActorCriticPolicy:
    """Return a new policy of a class, or of ours in its place.

    :param kwargs: checked arguments, see ``check_policy``
    :raises ArgumentError: the class hands on its arguments to one that does not take them
    """
    try:
        made: ActorCriticPolicy = own_class(policy)(
            observation_space, action_space, lr_schedule, use_sde=use_sde, **kwargs
        )
    except TypeError as error:
        refused = re.search(r"(\w+)\.__init__.* (?:unexpected|values for) keyword argument '(\w+)'", str(error))
        by, name = refused.groups() if refused else (None, None)
        for part in ("optimizer_kwargs", "features_extractor_kwargs"):
            if name in (kwargs.get(part) or ()):
                raise _not_taken(f"policy_kwargs: {part}", name, by, ()) from error
        if name in kwargs:
            known = {parameter for base in policy.__mro__ for parameter in inspect.signature(base).parameters}
            raise _not_taken("policy_kwargs", name, policy.__name__, () if name in known else known) from error
        raise
    return made


def usual_optimizer(policy: Any) -> Any:
    """Return the class of the optimizer that a policy has if it is told nothing; None if its code alone knows."""
    for kind in class_of(policy).__mro__:
        if "__init__" in vars(kind):
            parameters = inspect.signature(kind).parameters
            if "optimizer_class" in parameters:
                return parameters["optimizer_class"].default
            if kind.__module__.split(".")[0] != "sb3_pg":  # which may give another to the next
                return None
    return None


def _added_by(own: type) -> list[str]:
    """Return the arguments that our class in place of another takes and that one does not."""
    return [*inspect.signature(own).parameters, *(_BOX_OPTIONS if issubclass(own, BoxPolicy) else [])]


def _not_taken(where: str, name: Any, by: str | None, known: Iterable[str]) -> ArgumentError:
    hint = did_you_mean(str(name), known)
    if where == "policy_kwargs" and name in _BOX_OPTIONS:
        hint = " Policies do whose first base is sb3_pg.common.distributions.BoxPolicy."
    return ArgumentError(f"`{where}` has {name!r}, which {by} does not take.{hint}")


def _check_names(where: str, function: Any, kwargs: dict[str, Any], added: Sequence[str] = ()) -> None:
    """Refuse arguments that a function has no parameters for, and that are not added; None is not known yet."""
    if function is None or not kwargs:
        return
    parameters = inspect.signature(function).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return
    for name in kwargs:
        if name not in parameters and name not in added:
            raise _not_taken(where, name, name_of(function), [*parameters, *added])


_CLASSES = {
    "activation_fn": "torch.nn.ReLU",
    "optimizer_class": "torch.optim.Adam",
    "features_extractor_class": "stable_baselines3.common.torch_layers.NatureCNN",
}


def _check_values(kwargs: dict[str, Any]) -> None:
    for name, example in _CLASSES.items():
        value = kwargs.get(name, dict)
        if not callable(value) or isinstance(value, th.nn.Module):
            raise ArgumentError(f"policy_kwargs: `{name}` is {value!r}, but must be a class such as {example}.")
    check_number("policy_kwargs: log_std_init", kwargs.get("log_std_init", 0.0), low=-20.0, high=20.0)
    check_number("policy_kwargs: forget_bias", kwargs.get("forget_bias", 0.0), low=-math.inf)
    if "net_arch" in kwargs and kwargs["net_arch"] is not None:
        _check_net_arch(kwargs["net_arch"])
    for name in ("lstm_hidden_size", "n_lstm_layers"):
        check_count(f"policy_kwargs: {name}", kwargs.get(name, 1))
    for name in kwargs.get("lstm_kwargs") or {}:
        if name not in ("bias", "dropout"):
            raise ArgumentError(f"policy_kwargs: `lstm_kwargs` has {name!r}; it may have 'bias' and 'dropout'.")
    if kwargs.get("forget_bias") and not (kwargs.get("lstm_kwargs") or {}).get("bias", True):
        raise ArgumentError("policy_kwargs: `forget_bias` needs biases. Leave it out, or lstm_kwargs={'bias': False}.")
    if kwargs.get("shared_lstm") and kwargs.get("enable_critic_lstm", True):
        raise ArgumentError(
            "policy_kwargs: `shared_lstm=True` and `enable_critic_lstm=True`, which is the default, contradict each "
            "other. Pass enable_critic_lstm=False."
        )


def _check_net_arch(net_arch: Any) -> None:
    parts = net_arch if isinstance(net_arch, dict) else {"pi": net_arch}
    for key, widths in parts.items():
        if key not in ("pi", "vf"):
            raise ArgumentError(f"policy_kwargs: `net_arch` has the key {key!r}; the keys are 'pi' and 'vf'.")
        if not isinstance(widths, list | tuple):
            raise ArgumentError(f"policy_kwargs: `net_arch` is {widths!r}, but must be a list such as [64, 64].")
        for width in widths:
            if isinstance(width, dict):
                continue  # SB3's older form, which it explains itself
            if not is_whole(width) or width < 1:
                raise ArgumentError(f"policy_kwargs: `net_arch` must be whole numbers >= 1, not {width!r}.")


#: SB3's, sb3-contrib's and our policies whose observations are known: what they read, and the rest of their names.
_READERS = {
    "ActorCriticPolicy": ("Mlp", "Policy"),
    "ActorCriticCnnPolicy": ("Cnn", "Policy"),
    "MultiInputActorCriticPolicy": ("MultiInput", "Policy"),
    "RecurrentActorCriticPolicy": ("Mlp", "LstmPolicy"),
    "RecurrentActorCriticCnnPolicy": ("Cnn", "LstmPolicy"),
    "RecurrentMultiInputActorCriticPolicy": ("MultiInput", "LstmPolicy"),
    "MlpGruPolicy": ("Mlp", "GruPolicy"),
    "CnnGruPolicy": ("Cnn", "GruPolicy"),
    "MultiInputGruPolicy": ("MultiInput", "GruPolicy"),
}


def _check_observations(kind: type, space: spaces.Space[Any], kwargs: dict[str, Any]) -> None:
    """Refuse observations that a policy's usual features extractor does not read."""
    is_known = kind.__module__.split(".")[0] in ("stable_baselines3", "sb3_contrib", "sb3_pg")
    if "features_extractor_class" in kwargs or not is_known or kind.__name__ not in _READERS:
        return
    reader, rest = _READERS[kind.__name__]
    name = f"{reader}{rest} ({kind.__name__})"
    is_dict = isinstance(space, spaces.Dict)
    normalized = not kwargs.get("normalize_images", True)
    is_image = is_image_space(space, normalized_image=normalized)
    if is_dict != (reader == "MultiInput"):
        other = "MultiInput" if is_dict else "Cnn" if is_image else "Mlp"
        raise ArgumentError(f"`policy` {name} does not read observations of {space}. Use '{other}{rest}'.")
    if reader == "MultiInput":
        for key, part in space.spaces.items():  # type: ignore[attr-defined]  # which is a Dict
            if is_image_space(part, normalized_image=normalized):
                _check_size(name, f"{key!r}: {part}", part)
    if reader != "Cnn":
        return
    if not is_image:
        advice = f"Use 'Mlp{rest}'."
        if isinstance(space, spaces.Box) and len(space.shape) == 3:
            advice = "If they are images divided by 255 already, pass policy_kwargs={'normalize_images': False}."
        raise ArgumentError(
            f"`policy` {name} reads images (Box of 3 dimensions, 0 to 255, uint8), not observations of {space}. "
            + advice
        )
    _check_size(name, str(space), space)


def _check_size(name: str, what: str, space: spaces.Space[Any]) -> None:
    """Refuse images that are too small for the convolutions of SB3's network.

    :param name: of the policy
    :param what: the space is, for the message
    """
    height, width = sorted(space.shape)[1:]  # type: ignore[arg-type]  # the smallest is the channels
    if min(height, width) < 36:
        raise ArgumentError(
            f"`policy` {name} needs images of at least 36 x 36 pixels, not observations of {what}. Enlarge them, or "
            "pass a `features_extractor_class`."
        )


def _short(x: Any) -> str:
    return f"a {type(x).__name__}" if isinstance(x, th.nn.Module) else repr(x)

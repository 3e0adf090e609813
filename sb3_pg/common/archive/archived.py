"""Algorithms that are saved to archives and loaded from them."""

import copy
import io
import pathlib
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, ClassVar, TypeVar

import cloudpickle
import torch as th
from gymnasium import spaces
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.preprocessing import get_action_dim
from stable_baselines3.common.save_util import recursive_setattr
from stable_baselines3.common.type_aliases import GymEnv, TensorDict
from stable_baselines3.common.utils import check_for_correct_spaces, get_system_info, update_learning_rate
from stable_baselines3.common.vec_env.patch_gym import _convert_space

from sb3_pg.common import workers
from sb3_pg.common.archive.atomic import written
from sb3_pg.common.archive.checks import (
    check_attributes,
    check_optimizer_state,
    check_parameters,
    limited,
    n_elsewhere,
)
from sb3_pg.common.archive.container import RESUME, Archive, ArchiveError, name_attribute, read_archive, seal
from sb3_pg.common.archive.notes import check_distribution, notes_in, notes_of, take_notes
from sb3_pg.common.archive.peers import (
    Portable,
    check_memory,
    check_overrides,
    maskable,
    with_one_output,
    with_own_extractors,
    without_contrib,
)
from sb3_pg.common.archive.resume import generators_kept, state_of, with_new_generators
from sb3_pg.common.distributions import BoxPolicy
from sb3_pg.common.errors import ArgumentError
from sb3_pg.common.groups import has_critic_group, with_one_group, with_two_groups
from sb3_pg.common.options import check_base_arguments
from sb3_pg.common.rollout import Rollout
from sb3_pg.common.sequences import Memory
from sb3_pg.common.spaces import environments_own

SelfArchived = TypeVar("SelfArchived", bound="Archived")


#: Arguments that the policy is made with, which must be the archive's.
_OF_THE_POLICY = {"policy_kwargs", "use_sde"}


class Archived(OnPolicyAlgorithm):
    """Saving and loading, with SB3's arguments and archives."""

    #: The name under which archives of this algorithm are known, see ``load``.
    archive_name: ClassVar[str]

    _is_masked: bool
    _rollout: Rollout | None
    _last_memory: Memory | None
    _resume: dict[str, Any] | None

    @property
    def _is_amid_rollout(self) -> bool:
        """True if a rollout was interrupted, which is to be completed and learned from."""
        return self._rollout is not None and self._rollout.is_paused

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_network", "_rollout", "_last_memory", "_applied", "_resume"]

    def save(
        self,
        path: str | pathlib.Path | io.BufferedIOBase,
        exclude: Iterable[str] | None = None,
        include: Iterable[str] | None = None,
    ) -> None:
        """SB3's, but what stands at ``path`` is replaced when all is written, and never lost.

        A policy made from files is saved so that it can be loaded without them. A PPO that learned with masks is saved
        so that MaskablePPO can load it, if that is installed. What ``learn(reset_num_timesteps=False)`` needs to go on
        exactly is saved too, see :mod:`sb3_pg.common.archive.resume`; ``exclude=["resume"]`` leaves it out.

        Of several workers only the first one saves.

        :raises ArgumentError: naming an attribute that cannot be pickled
        :raises OSError: naming ``path``
        """
        if workers.rank():
            return
        exclude = list(exclude or ())
        with self._portable(), written(path, "zip") as file:
            try:
                super().save(file, exclude, include)  # type: ignore[arg-type]
            except OSError:
                raise
            except Exception as error:
                left_out = {*exclude, *self._excluded_save_params()}
                saved = {name: value for name, value in vars(self).items() if name not in left_out}
                name_attribute(error, saved, cloudpickle.dumps, "Pass exclude=[{name!r}] to save without it.")
                raise
            seal(file, self.archive_name, notes_of(self.policy), None if RESUME in exclude else state_of(self))

    @contextmanager
    def _portable(self) -> Iterator[None]:
        given = self.policy_class, self.policy_kwargs
        if isinstance(self.policy, Portable):
            self.policy_kwargs = self.policy.portable_kwargs(self.policy_kwargs)
        if isinstance(self.policy, BoxPolicy) and self.policy.box_options.changed:
            self.policy_class = type(self.policy)  # SB3's takes no such arguments
        if self._is_masked and self.archive_name == "PPO" and not isinstance(self.action_space, spaces.MultiBinary):
            self.policy_class = maskable(self.policy_class)
        try:
            yield
        finally:
            self.policy_class, self.policy_kwargs = given

    def get_parameters(self) -> dict[str, dict[str, Any]]:
        """SB3's, with the state of an optimizer in which the critic has a group of its own as SB3 has it, with one."""
        found = super().get_parameters()
        if has_critic_group(self.policy.optimizer) and "policy.optimizer" in found:
            found["policy.optimizer"] = with_one_group(self.policy, found["policy.optimizer"])
        return found

    def set_parameters(
        self, load_path_or_dict: str | TensorDict, exact_match: bool = True, device: th.device | str = "auto"
    ) -> None:
        """SB3's, and an interrupted rollout is forgotten: it was acted by the parameters before.

        :raises ArgumentError: the parameters are of a policy with memory and this one has none, or the other way round;
            they are from a file of a policy with another distribution; the state is of another optimizer
        :raises ArchiveError: they are from a file and do not fit, or are not finite; the model is as it was
        """
        if isinstance(load_path_or_dict, dict):
            self._set_parameters(load_path_or_dict, exact_match, None)
        else:
            archive = read_archive(load_path_or_dict)
            check_distribution(archive.name, self.policy, notes_in(archive))
            self._set_parameters(archive.parameters(), exact_match, archive.name)

    def _set_parameters(self, parameters: dict[str, Any], exact_match: bool, file: str | None) -> None:
        check_memory(self.policy, parameters)
        parameters = with_own_extractors(self.policy, parameters)
        if isinstance(self.action_space, spaces.MultiBinary):
            parameters = with_one_output(self.policy, parameters, get_action_dim(self.action_space))
        state = parameters.get("policy.optimizer")
        if has_critic_group(self.policy.optimizer) and isinstance(state, dict):
            parameters = {**parameters, "policy.optimizer": with_two_groups(self.policy, state)}
        if file is not None:
            check_parameters(file, self, parameters, exact_match)
        check_optimizer_state(self.policy.optimizer, parameters.get("policy.optimizer"), file)
        super().set_parameters(copy.deepcopy(parameters), exact_match)  # optimizers keep what they are given
        self._rollout = None
        if self._resume is not None:
            self._resume.pop("rollout", None)

    def set_random_seed(self, seed: int | None = None) -> None:
        """SB3's, and a loaded model begins new streams of random numbers, and its environments new episodes."""
        super().set_random_seed(seed)
        if seed is not None:
            self._resume = with_new_generators(self._resume)

    @classmethod
    def load(
        cls: type[SelfArchived],
        path: str | pathlib.Path | io.BufferedIOBase,
        env: GymEnv | None = None,
        device: th.device | str = "auto",
        custom_objects: dict[str, Any] | None = None,
        print_system_info: bool = False,
        force_reset: bool = True,
        *,
        trusted: bool = False,
        **kwargs: Any,
    ) -> SelfArchived:
        """Load an archive of this algorithm, or of its counterpart in SB3 or sb3-contrib. Arguments are SB3's.

        With ``reset_num_timesteps=False`` the next ``learn`` goes on where the archive was saved: with its random
        numbers (also if torch or NumPy have been seeded since), unfinished rollout, statistics of VecNormalize and, if
        they can, environments; others are reset. ``seed``, or ``set_random_seed`` afterwards, outranks its random
        numbers, and ``force_reset=False`` leaves the environments as they are. Without ``env`` the random generators
        that all share stay as they are.

        Nothing that is in the file is run. An attribute that is code, such as a schedule that is a function or a policy
        that is a class of yours, is refused by name unless ``custom_objects`` has it.

        :param trusted: True runs the code that the file holds, as SB3 does: only for files whose origin you know
        :raises ArchiveError: the archive holds another algorithm, is damaged, or holds what is refused
        :raises ValueError: the archive's spaces are not those of ``env``
        """
        if print_system_info:
            print("== CURRENT SYSTEM INFO ==")
            get_system_info()
        archive = read_archive(path)
        if print_system_info and "system_info.txt" in archive.entries:
            print(f"== SAVED MODEL SYSTEM INFO ==\n{archive.entries['system_info.txt'].decode()}")
        cls._check_algorithm(archive)
        check_overrides(cls, kwargs)
        check_base_arguments(kwargs)
        overridden = {name: value for name, value in kwargs.items() if name not in _OF_THE_POLICY}
        data = cls._attributes(archive, {**(custom_objects or {}), **overridden}, trusted)
        if env is not None:
            env = cls._wrap_env(env, data.get("verbose", 0))
            check_for_correct_spaces(env, data["observation_space"], data["action_space"])
            data["action_space"] = environments_own(data["action_space"], env.action_space)
            data["n_envs"] = env.num_envs
            if force_reset:  # SB3 issue 597
                data["_last_obs"] = None
        env = env if env is not None else data.get("env")
        with nullcontext() if env is not None or kwargs.get("seed") is not None else generators_kept():
            model = cls._made_of(archive, data, env, device, kwargs)
        state = archive.resume()
        model._resume = with_new_generators(state) if kwargs.get("seed") is not None else state
        if "learning_rate" in kwargs:  # the optimizer has the archive's
            update_learning_rate(model.policy.optimizer, model.lr_schedule(1.0))
        if "stats_window_size" in kwargs:
            model._stats_window_size = kwargs["stats_window_size"]
            for name in ("ep_info_buffer", "ep_success_buffer"):
                setattr(model, name, deque(getattr(model, name) or (), maxlen=model._stats_window_size))
        return model

    @classmethod
    def _check_algorithm(cls, archive: Archive) -> None:
        holds = archive.algorithm
        if not archive.data:
            raise ArchiveError(f"{archive.name} has no `data`: it is no archive of a model, or not a whole one.")
        if holds is None:
            raise ArchiveError(f"{archive.name} is no archive of {cls.archive_name}: it has none of its arguments.")
        if holds != cls.archive_name:
            raise ArchiveError(
                f"{archive.name} is an archive of {holds}, but {cls.__name__}.load() reads archives of "
                f"{cls.archive_name}. Load it with {holds}.load()."
            )

    @classmethod
    def _attributes(cls, archive: Archive, custom_objects: dict[str, Any], trusted: bool) -> dict[str, Any]:
        """Return what the archive says the model's attributes are.

        :raises ArchiveError: one of them is refused
        """
        custom_objects = {**without_contrib(archive.data), **custom_objects}
        data = archive.decoded(custom_objects, trusted, {"lr_schedule", "_last_lstm_states"})  # both are made anew
        if trusted:
            data.update({name: _convert_space(data[name]) for name in ("observation_space", "action_space")})  # gym's
        else:
            check_attributes(archive.name, cls, data, custom_objects.keys())
        policy_kwargs = data.get("policy_kwargs", {})
        policy_kwargs.pop("device", None)
        match policy_kwargs.get("net_arch"):
            case [dict() as parts, *_]:  # before SB3 1.8
                policy_kwargs["net_arch"] = parts
        return data

    @classmethod
    def _made_of(
        cls: type[SelfArchived],
        archive: Archive,
        data: dict[str, Any],
        env: Any,
        device: th.device | str,
        kwargs: dict[str, Any],
    ) -> SelfArchived:
        """Return a model with these attributes, and the parameters of the archive.

        :raises ArchiveError: there can be none
        """
        for name in kwargs.keys() & _OF_THE_POLICY:
            if kwargs[name] != data.get(name):
                raise ArgumentError(
                    f"`{name}` cannot be changed when loading: {archive.name} has {data.get(name)}, not {kwargs[name]}."
                )
        parameters = archive.parameters()
        try:
            elsewhere = n_elsewhere(data["policy_class"], data.get("policy_kwargs", {}))
            with limited(archive.name, parameters.get("policy"), elsewhere):
                model = cls(policy=data["policy_class"], env=env, device=device, _init_setup_model=False)  # type: ignore[call-arg]
                model.__dict__.update(data)
                model.__dict__.update(kwargs)
                model._setup_model()
        except ArchiveError:
            raise
        except ArgumentError as error:
            raise ArgumentError(f"{archive.name}: {error}") from error
        except Exception as error:  # whatever constructors raise on arguments that nobody meant
            message = " ".join(str(error).split())
            raise ArchiveError(
                f"{archive.name}: no model can be made of it ({type(error).__name__}: {message})."
            ) from error
        notes = {} if archive.seal is None else notes_in(archive)  # SB3's are of the policy that they make
        check_distribution(archive.name, model.policy, notes)
        model._set_parameters(parameters, True, archive.name)
        take_notes(model.policy, notes, critics_options="critic_optimizer_kwargs" not in kwargs)
        for name, variable in archive.variables(model._get_torch_save_params()[1]).items():
            recursive_setattr(model, f"{name}.data", variable.data)
        if model.use_sde:
            model.policy.reset_noise()
        return model

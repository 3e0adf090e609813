"""Algorithms that are saved to archives and loaded from them."""

import io
import pathlib
from collections import deque
from collections.abc import Iterable
from typing import Any, ClassVar, TypeVar

import torch as th
from gymnasium import spaces
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.preprocessing import get_action_dim
from stable_baselines3.common.save_util import load_from_zip_file
from stable_baselines3.common.type_aliases import GymEnv, TensorDict
from stable_baselines3.common.utils import update_learning_rate

from sb3_pg.common import workers
from sb3_pg.common.archive.peers import (
    Portable,
    algorithm_in,
    check_memory,
    check_overrides,
    data_of,
    maskable,
    with_one_output,
    without_contrib,
)
from sb3_pg.common.errors import ArgumentError
from sb3_pg.common.rollout import Rollout

SelfArchived = TypeVar("SelfArchived", bound="Archived")


class Archived(OnPolicyAlgorithm):
    """Saving and loading, with SB3's arguments and archives."""

    #: The name under which archives of this algorithm are known, see ``load``.
    archive_name: ClassVar[str]

    _is_masked: bool
    _rollout: Rollout | None

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_network", "_rollout", "_last_memory", "_applied"]

    def save(
        self,
        path: str | pathlib.Path | io.BufferedIOBase,
        exclude: Iterable[str] | None = None,
        include: Iterable[str] | None = None,
    ) -> None:
        """SB3's. A policy made from files is saved so that it can be loaded without them.

        A PPO that learned with masks is saved so that MaskablePPO can load it, if that is installed. Of several
        workers only the first one saves.
        """
        if workers.rank():
            return
        given = self.policy_class, self.policy_kwargs
        if isinstance(self.policy, Portable):
            self.policy_kwargs = self.policy.portable_kwargs(self.policy_kwargs)
        if self._is_masked and self.archive_name == "PPO" and not isinstance(self.action_space, spaces.MultiBinary):
            self.policy_class = maskable(self.policy_class)
        try:
            super().save(path, exclude, include)
        finally:
            self.policy_class, self.policy_kwargs = given

    def set_parameters(
        self, load_path_or_dict: str | TensorDict, exact_match: bool = True, device: th.device | str = "auto"
    ) -> None:
        """SB3's, and an interrupted rollout is forgotten: it was acted by the parameters before.

        :raises ArgumentError: the parameters are of a policy with memory and this one has none, or the other way round
        """
        parameters: Any = load_path_or_dict
        if not isinstance(parameters, dict):
            _, parameters, _ = load_from_zip_file(parameters, device=device, load_data=False)
        check_memory(self.policy, parameters)
        if isinstance(self.action_space, spaces.MultiBinary):
            parameters = with_one_output(self.policy, parameters, get_action_dim(self.action_space))
        super().set_parameters(parameters, exact_match, device)
        self._rollout = None

    @classmethod
    def load(
        cls: type[SelfArchived],
        path: str | pathlib.Path | io.BufferedIOBase,
        env: GymEnv | None = None,
        device: th.device | str = "auto",
        custom_objects: dict[str, Any] | None = None,
        print_system_info: bool = False,
        force_reset: bool = True,
        **kwargs: Any,
    ) -> SelfArchived:
        """Load an archive of this algorithm, or of its counterpart in SB3 or sb3-contrib. Arguments are SB3's.

        :raises ArgumentError: the archive holds another algorithm
        :raises ValueError: the archive's spaces are not those of ``env``
        """
        data = data_of(path)
        holds = algorithm_in(data)
        if holds is not None and holds != cls.archive_name:
            raise ArgumentError(
                f"{path} is an archive of {holds}, but {cls.__name__}.load() reads archives of {cls.archive_name}. "
                f"Load it with {holds}.load()."
            )
        check_overrides(cls, kwargs)
        custom_objects = {**without_contrib(data), **(custom_objects or {})}
        model = super().load(path, env, device, custom_objects, print_system_info, force_reset, **kwargs)
        if "learning_rate" in kwargs:  # the optimizer has the archive's
            update_learning_rate(model.policy.optimizer, model.lr_schedule(1.0))
        if "stats_window_size" in kwargs:
            model._stats_window_size = kwargs["stats_window_size"]
            for name in ("ep_info_buffer", "ep_success_buffer"):
                setattr(model, name, deque(getattr(model, name) or (), maxlen=model._stats_window_size))
        return model

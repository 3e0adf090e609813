"""Policies that are saved to files of their own and loaded from them."""

import io
from pathlib import Path
from typing import IO, Any, TypeVar

import torch as th
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.utils import get_device

from sb3_pg.common.archive.atomic import replacing
from sb3_pg.common.archive.checks import check_policy_kwargs, check_policy_state, limited, n_elsewhere
from sb3_pg.common.archive.container import ArchiveError
from sb3_pg.common.archive.tensors import read_tensors
from sb3_pg.common.archive.unpickling import ForeignError
from sb3_pg.common.errors import ArgumentError

SelfSaved = TypeVar("SelfSaved", bound="SavedPolicy")


class SavedPolicy(BasePolicy):
    """SB3's ``save`` and ``load`` of a policy, with its files. What is saved is never lost, what is read is not run."""

    def save(self, path: str | Path | IO[bytes]) -> None:
        """Write parameters and arguments; what stood at ``path`` is replaced when all is written.

        :raises OSError: naming ``path``
        """
        arguments = self._get_constructor_parameters()  # first: a language model sees then what the state must hold
        written = {"state_dict": self.state_dict(), "data": arguments}
        if isinstance(path, str | Path):
            with replacing(path) as file:
                th.save(written, file)
        else:
            th.save(written, path)

    @classmethod
    def load(
        cls: type[SelfSaved],
        path: str | Path | IO[bytes],
        device: th.device | str = "auto",
        trusted: bool = False,
    ) -> SelfSaved:
        """Return the policy that a file of this class holds, without running anything that is in the file.

        :param trusted: True runs the code that the file holds, as SB3 does: only for files whose origin you know
        :raises ArchiveError: the file is damaged, or holds what is refused; names the file
        """
        if isinstance(path, str | Path) and Path(path).is_dir():
            raise ArchiveError(
                f"{path} is a folder: pass the file that `save` wrote. A language model's folder is read by the policy "
                "argument `model`."
            )
        name, file = (str(path), Path(path).read_bytes()) if isinstance(path, str | Path) else ("The file", path.read())
        try:
            held: Any = th.load(io.BytesIO(file), "cpu", weights_only=False) if trusted else read_tensors(file)
            state, arguments = held["state_dict"], dict(held["data"])
        except ForeignError as error:
            raise ArchiveError(
                f"{name} needs {error}, which is not known to be harmless. Pass trusted=True to run what it holds."
            ) from None
        except Exception as error:  # what nobody meant to be read fails in many ways
            raise ArchiveError(f"{name} is damaged or holds no policy ({type(error).__name__}: {error}).") from error
        if not trusted:
            check_policy_kwargs(name, cls, arguments)
        try:
            with limited(name, state, n_elsewhere(cls, arguments)):
                policy = cls(**arguments)
        except ArchiveError:
            raise
        except Exception as error:
            if isinstance(error, ArgumentError):
                raise ArgumentError(f"{name}: {error}") from error
            message = " ".join(str(error).split())
            raise ArchiveError(f"{name}: no {cls.__name__} can be made of it ({message}).") from error
        check_policy_state(name, policy, state)
        policy.load_state_dict(state)
        return policy.to(get_device(device))

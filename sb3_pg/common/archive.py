"""What an archive holds."""

import inspect
import json
import zipfile
from collections.abc import Collection
from typing import Any, Protocol, runtime_checkable

from stable_baselines3.common.save_util import open_path

from sb3_pg.common.errors import ArgumentError, did_you_mean

#: What tells the archives of algorithms apart: the first of these attributes that one has.
_MARKS = {
    "REINFORCE": "critic_batch_size",
    "TRPO": "cg_max_steps",
    "PPO": "clip_range",
    "DQN": "exploration_fraction",
    "SAC or TQC": "target_entropy",
    "TD3 or DDPG": "policy_delay",
    "an off-policy algorithm": "buffer_size",
    "A2C": "gae_lambda",
}


@runtime_checkable
class Portable(Protocol):
    """A policy that was made from files, and whose archive shall load where they are not."""

    def portable_kwargs(self, policy_kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return the policy's arguments with what is in the files in place of where they are."""


#: Arguments that only a new model can have: what they make is in the archive.
_OF_NEW_MODELS = ("use_rms_prop", "rms_prop_eps")


def check_overrides(kind: type, names: Collection[str]) -> None:
    """Refuse arguments of ``load`` that would be without effect.

    :param kind: the algorithm
    :param names: of its arguments
    :raises ArgumentError: naming one that there is not, or that only a new model can have
    """
    known = inspect.signature(kind).parameters
    for name in names:
        if name in _OF_NEW_MODELS and name in known:
            raise ArgumentError(f"`{name}` cannot be changed when loading: the archive has its own optimizer.")
        if name not in known:
            raise ArgumentError(f"`{name}` is not an argument of {kind.__name__}.{did_you_mean(name, known)}")


def algorithm_in(path: Any) -> str | None:
    """Return which algorithm an archive holds, from the names of its attributes; None if that can't be told."""
    file = open_path(path, "r", suffix="zip")
    start = file.tell()
    try:
        with zipfile.ZipFile(file) as archive:
            names = json.loads(archive.read("data")).keys()
    except (zipfile.BadZipFile, KeyError, json.JSONDecodeError):
        return None  # SB3's own loading says what is wrong
    finally:
        file.seek(start)
        if file is not path:
            file.close()
    return next((algorithm for algorithm, mark in _MARKS.items() if mark in names), None)

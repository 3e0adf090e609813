"""Files of VecNormalize: SB3's pickle, and behind it, where SB3 does not look, a line with its checksum."""

import json
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium import spaces
from stable_baselines3.common import vec_env as sb3
from stable_baselines3.common.running_mean_std import RunningMeanStd

from sb3_pg.common.archive.atomic import replacing
from sb3_pg.common.archive.container import (
    FORMAT,
    ArchiveError,
    LaterError,
    check_format,
    checksum,
    name_attribute,
)
from sb3_pg.common.archive.pickles import Name, UnreadableError, read
from sb3_pg.common.archive.unpickling import MAKERS, Builder, ForeignError
from sb3_pg.version import __version__

_KIND = Name("stable_baselines3.common.vec_env.vec_normalize", "VecNormalize")

_MAKERS = MAKERS | {_KIND: lambda call: call.state}


def write_statistics(path: str | Path, attributes: dict[str, Any]) -> None:
    """Write a file that SB3's ``VecNormalize.load`` reads; what stood there is replaced when all is written.

    :param attributes: of the VecNormalize
    :raises ArgumentError: naming an attribute that cannot be pickled
    :raises OSError: naming the file
    """
    twin = sb3.VecNormalize.__new__(sb3.VecNormalize)
    twin.__dict__ = attributes
    try:
        pickled = pickle.dumps(twin)
    except Exception as error:
        name_attribute(error, twin.__getstate__(), pickle.dumps, "Delete it before.")
        raise
    line = {"format": FORMAT, "version": __version__, "sha256": checksum(pickled)}
    with replacing(path) as file:
        file.write(pickled + b"\n" + json.dumps(line).encode() + b"\n")


def read_statistics(path: str | Path, trusted: bool) -> dict[str, Any]:
    """Return the attributes of the VecNormalize in a file.

    :param trusted: whether code in the file may run
    :raises ArchiveError: the file is damaged, has statistics that cannot be, or names what is not known to be harmless
    """
    file = Path(path).read_bytes()
    try:
        tree, end = read(file)
        _check_line(file[:end], file[end:])
        attributes = dict(vars(pickle.loads(file))) if trusted else Builder(end, _MAKERS).build(tree)
        if not isinstance(attributes, dict):
            raise UnreadableError("it is another object")
        attributes.pop("venv", None)  # of an object that is whole
        _check(attributes)
    except ForeignError as error:
        raise ArchiveError(
            f"{path} needs {error}, which is not known to be harmless. Pass trusted=True to run what the file holds."
        ) from None
    except LaterError as error:
        raise ArchiveError(f"{path} {error}") from None
    except Exception as error:  # what is no pickle, or one of something else, fails in many ways
        raise ArchiveError(
            f"{path} is damaged or no file of VecNormalize ({type(error).__name__}: {error})."
        ) from error
    return attributes


def _check_line(pickled: bytes, rest: bytes) -> None:
    """Compare a pickle with the line that ours have behind it; SB3's have none."""
    if not rest:
        return
    line = json.loads(rest)
    check_format(line)
    if line["sha256"] != checksum(pickled):
        raise UnreadableError("it is not what was saved")


def _check(attributes: dict[str, Any]) -> None:
    """Refuse statistics that cannot be, and attributes in whose place there are others.

    :raises UnreadableError: naming one
    """
    space = attributes["observation_space"]
    if not isinstance(space, spaces.Space) or not isinstance(attributes["action_space"], spaces.Space):
        raise UnreadableError("it has no spaces")
    for name in attributes:
        if callable(getattr(sb3.VecNormalize, name, None)):
            raise UnreadableError(f"{name!r} is a method")
    for name in ("clip_obs", "clip_reward", "gamma", "epsilon"):
        if not attributes[name] >= 0:
            raise UnreadableError(f"{name} is {attributes[name]!r}")
    _check_statistics("returns", attributes["ret_rms"], ())
    if attributes["norm_obs"] and isinstance(space, spaces.Dict):
        for key in attributes.get("norm_obs_keys") or space.spaces:
            _check_statistics(f"observations {key!r}", attributes["obs_rms"][key], space[key].shape)
    elif attributes["norm_obs"]:
        _check_statistics("observations", attributes["obs_rms"], space.shape)


def _check_statistics(of: str, statistics: Any, shape: Any) -> None:
    if not isinstance(statistics, RunningMeanStd):
        raise UnreadableError(f"the statistics of {of} are a {type(statistics).__name__}")
    for name, value in (("mean", statistics.mean), ("variance", statistics.var)):
        if np.shape(value) != shape:
            raise UnreadableError(f"the {name} of {of} is of shape {np.shape(value)}, not {shape}")
        if not np.isfinite(value).all() or (name == "variance" and np.min(value, initial=0.0) < 0):
            raise UnreadableError(f"the {name} of {of} is not finite, or less than 0")
    if not math.isfinite(statistics.count) or statistics.count < 0:
        raise UnreadableError(f"the count of {of} is {statistics.count}")

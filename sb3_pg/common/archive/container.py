"""The file of an archive: SB3's zip, with an entry more that says what it is and checks the others."""

import base64
import hashlib
import io
import json
import pathlib
import pickle
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO

import cloudpickle
import torch as th
from stable_baselines3.common.save_util import open_path

from sb3_pg.common.archive.peers import algorithm_in
from sb3_pg.common.archive.pickles import UnreadableError
from sb3_pg.common.archive.tensors import read_tensors
from sb3_pg.common.archive.unpickling import ForeignError, unpickle
from sb3_pg.common.errors import ArgumentError
from sb3_pg.version import __version__

#: The version of what is added to SB3's archives. A reader refuses later ones by name.
FORMAT = 1

#: The entry with the format, the algorithm and a checksum of each other entry. SB3 reads only names that it knows.
SEAL = "sb3_pg.json"

#: The entry with what a run needs to go on exactly, see :mod:`sb3_pg.common.archive.resume`.
RESUME = "resume"

#: SB3's entry for tensors that belong to no module.
_VARIABLES = "pytorch_variables.pth"

#: An archive may unpack to so many times its size, and so many bytes more. SB3 does not compress, people may.
MOST_TIMES, MOST_BYTES = 50, 1 << 24


class ArchiveError(ArgumentError):
    """An archive that cannot be read, or that asks to run code; names the file."""


@dataclass
class Archive:
    """What an archive holds. Nothing but its JSON has been decoded.

    :param name: of the file, for errors
    :param seal: what our entry says; None in archives of SB3 and sb3-contrib
    :param data: the attributes as JSON has them, pickles as texts
    :param entries: the other entries, whose checksums are right
    """

    name: str
    seal: dict[str, Any] | None
    data: dict[str, Any]
    entries: dict[str, bytes]

    @property
    def algorithm(self) -> str | None:
        """The algorithm whose archive it is; None if that cannot be told."""
        return algorithm_in(self.data) if self.seal is None else str(self.seal["algorithm"])

    def decoded(self, custom_objects: dict[str, Any], trusted: bool, without: set[str]) -> dict[str, Any]:
        """Return the attributes.

        :param custom_objects: what to take in place of some
        :param trusted: whether code in the file may run
        :param without: names of those not to read
        :raises ArchiveError: naming an attribute that is not known to be harmless, or that is damaged
        """
        found = {}
        for name in self.data:
            if name in custom_objects:
                found[name] = custom_objects[name]
            elif name not in without:
                found[name] = self._attribute(name, trusted)
        return found

    def _attribute(self, name: str, trusted: bool) -> Any:
        item = self.data[name]
        if not isinstance(item, dict) or ":serialized:" not in item:
            return item
        try:
            pickled = base64.b64decode(item[":serialized:"], validate=True)
            return cloudpickle.loads(pickled) if trusted else unpickle(pickled)
        except ForeignError as error:
            raise ArchiveError(
                f"{self.name}: `{name}` needs {error}, which is not known to be harmless. Pass "
                f"custom_objects={{{name!r}: ...}} to have yours in its place, or trusted=True to run what the file "
                "holds."
            ) from None
        except Exception as error:  # what a trusted file does, or a text that is no base64
            raise ArchiveError(
                f"{self.name}: `{name}` cannot be read ({error}). Pass custom_objects={{{name!r}: ...}} to have yours "
                "in its place."
            ) from error

    def tensors(self, name: str) -> Any:
        """Return what ``torch.save`` wrote as one entry, which is then forgotten.

        :raises ArchiveError: it is damaged
        """
        try:
            return read_tensors(self.entries.pop(name))
        except ForeignError as error:
            raise ArchiveError(f"{self.name}: {name} holds {error}, but may hold only tensors.") from None
        except Exception as error:
            raise ArchiveError(f"{self.name}: {name} is damaged ({error}).") from error

    def parameters(self) -> dict[str, Any]:
        """Return the state of each module and optimizer by its name, see :meth:`tensors`."""
        names = [name for name in self.entries if name.endswith(".pth") and name != _VARIABLES]
        found = {name.removesuffix(".pth"): self.tensors(name) for name in names}
        for name, state in found.items():
            if not isinstance(state, dict):
                raise ArchiveError(f"{self.name}: the state of {name} is a {type(state).__name__}.")
        return found

    def variables(self, names: list[str]) -> dict[str, th.Tensor]:
        """Return the tensors that belong to no module.

        :param names: those that the model has
        :raises ArchiveError: there are others, or they are damaged
        """
        found = self.tensors(_VARIABLES) if _VARIABLES in self.entries else {}
        for name, tensor in (found or {}).items():
            if name not in names or not isinstance(tensor, th.Tensor):
                raise ArchiveError(f"{self.name}: {_VARIABLES} has {name!r}, which the model has not.")
        return found or {}

    def resume(self) -> dict[str, Any] | None:
        """Return what a run needs to go on exactly; None if the archive does not have it.

        :raises ArchiveError: it is damaged
        """
        if RESUME not in self.entries:
            return None
        try:
            state = unpickle(self.entries[RESUME])
        except (ForeignError, UnreadableError) as error:
            raise ArchiveError(f"{self.name}: {RESUME} cannot be read ({error}).") from None
        if not isinstance(state, dict):
            raise ArchiveError(f"{self.name}: {RESUME} cannot be read (a {type(state).__name__}).")
        return state


def seal(
    file: BinaryIO | io.BytesIO, algorithm: str, policy: dict[str, Any], resume: dict[str, Any] | None = None
) -> None:
    """Add our entries to a zip that SB3 has written.

    :param file: open to be read and written
    :param algorithm: its name
    :param policy: what there is to say of it, as JSON
    :param resume: plain data and NumPy arrays that a run needs to go on exactly
    """
    with zipfile.ZipFile(file, "a") as archive:
        if resume is not None:
            archive.writestr(RESUME, pickle.dumps(resume, protocol=4))
        entries = {name: checksum(archive.read(name)) for name in archive.namelist()}
        written = {"format": FORMAT, "version": __version__, "algorithm": algorithm, "policy": policy}
        archive.writestr(SEAL, json.dumps(written | {"sha256": entries}, indent=1))


def checksum(entry: bytes) -> str:
    """Return the SHA-256 of an entry, in hexadecimal digits."""
    return hashlib.sha256(entry).hexdigest()


def name_attribute(error: Exception, attributes: dict[str, Any], dumps: Callable[[Any], Any], advice: str) -> None:
    """Raise an error that names the attribute for which pickling failed, if it is one alone.

    :param error: with which it failed
    :param dumps: pickles one
    :param advice: what to do; ``{name}`` stands for the attribute
    :raises ArgumentError: naming it
    """
    for name, value in attributes.items():
        try:
            dumps(value)
        except Exception:
            raise ArgumentError(
                f"The attribute `{name}` cannot be saved ({type(error).__name__}: {error}). {advice.format(name=name)}"
            ) from error


def read_archive(path: str | pathlib.Path | io.BufferedIOBase) -> Archive:
    """Read an archive of ours, SB3's or sb3-contrib's.

    :raises ArchiveError: it is no archive, damaged, from a later version, or unpacks to much more than its size
    :raises FileNotFoundError: there is none
    """
    beside = pathlib.Path(f"{path}.zip")
    if isinstance(path, str | pathlib.Path) and pathlib.Path(path).is_dir():
        if not beside.is_file():  # where ``save`` writes then
            raise ArchiveError(
                f"{path} is a folder, and there is no {beside}: pass the file that `save` wrote. A language model's "
                "folder is read by policy_kwargs={'model': ...}."
            )
        path = beside
    file = open_path(path, "r", suffix="zip")
    name = str(path) if isinstance(path, str | pathlib.Path) else "the archive"
    try:
        with zipfile.ZipFile(file) as archive:
            size = file.seek(0, io.SEEK_END)
            _check_entries(archive.infolist(), size)
            entries = {entry: archive.read(entry) for entry in archive.namelist()}
        found = _checked(entries)
        data = json.loads(entries.pop("data")) if "data" in entries else {}
        if not isinstance(data, dict):
            raise UnreadableError("its data are no attributes")
    except zipfile.BadZipFile as error:
        raise ArchiveError(f"{name} wasn't a zip-file, or is damaged ({error}).") from None
    except LaterError as error:
        raise ArchiveError(f"{name} {error}") from None
    except Exception as error:  # zipfile and json raise many kinds on what nobody meant to be read
        raise ArchiveError(f"{name} is damaged or no archive ({type(error).__name__}: {error}).") from error
    finally:
        if file is not path:
            file.close()
    return Archive(name, found, data, entries)


def _check_entries(entries: list[zipfile.ZipInfo], size: int) -> None:
    """Refuse what no archive has: the same name twice, names outside a folder, and much in little."""
    names = [entry.filename for entry in entries]
    for name in names:
        if names.count(name) > 1 or name.startswith(("/", "\\")) or ".." in name or ":" in name:
            raise UnreadableError(f"an entry is named {name!r}")
    for entry in entries:
        if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or entry.flag_bits & 1:
            raise UnreadableError(f"the entry {entry.filename!r} is packed in an unusual way")
    unpacked = sum(entry.file_size for entry in entries)
    if unpacked > MOST_TIMES * size + MOST_BYTES:
        raise UnreadableError(f"its {size} bytes unpack to {unpacked}")


def _checked(entries: dict[str, bytes]) -> dict[str, Any] | None:
    """Return what our entry says, after comparing all others with it; None if there is none."""
    if SEAL not in entries:
        return None
    found: dict[str, Any] = json.loads(entries.pop(SEAL))
    check_format(found)
    for name in sorted(found["sha256"].keys() | entries.keys()):
        if name not in entries:
            raise UnreadableError(f"its entry {name!r} is missing")
        if found["sha256"].get(name) != checksum(entries[name]):
            raise UnreadableError(f"its entry {name!r} is not what was saved")
    return found


class LaterError(ValueError):
    """A file from a later version; the file's name is to be put before the message."""


def check_format(written: dict[str, Any]) -> None:
    """Refuse a file of a later format.

    :param written: what the file says of itself
    :raises LaterError: it is
    """
    if written["format"] > FORMAT:
        raise LaterError(
            f"is in format {written['format']} of sb3_pg {written['version']}; this is sb3_pg {__version__}, "
            f"which reads up to format {FORMAT}. Install the later one."
        )

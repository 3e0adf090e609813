"""Files that are written whole or not at all."""

import errno
import io
import os
import secrets
import shutil
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from stable_baselines3.common.save_util import open_path


@contextmanager
def replacing(path: str | Path) -> Iterator[BinaryIO]:
    """Open a file to be written and read, which takes the place of ``path`` when the block ends without an error.

    Until then ``path`` is what it was, whatever happens, be it that the process is killed. It keeps its permissions,
    and what a link leads to is replaced, not the link. What is no plain file, such as a pipe, is written to as usual.

    :raises OSError: naming ``path``: it cannot be written, the disk is full
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        with target.open("wb") as file:
            yield file
        return
    beside = target.with_name(f"{target.name[:40]}.{secrets.token_hex(4)}.tmp")
    try:
        if target.exists() and not os.access(target, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        with beside.open("x+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if target.exists():
            beside.chmod(stat.S_IMODE(target.stat().st_mode))
        beside.replace(target)
        _to_disk(target.parent)
    except OSError as error:
        if error.errno is None or error.filename not in (None, str(beside)):
            raise  # about something else
        raise OSError(error.errno, f"{error.strerror} (nothing was changed)", str(path)) from error
    finally:
        with suppress(OSError):  # it is there only after an error
            beside.unlink()


@contextmanager
def filling(folder: str | Path) -> Iterator[Path]:
    """Open an empty folder, whose files take their places in ``folder`` when the block ends without an error.

    :raises OSError: naming ``folder``: it cannot be written to, the disk is full
    """
    target = Path(os.path.realpath(folder))
    target.mkdir(parents=True, exist_ok=True)
    beside = target / f"{secrets.token_hex(4)}.tmp"
    try:
        beside.mkdir()
        yield beside
        for file in sorted(beside.iterdir()):
            with file.open("rb") as to_disk:
                os.fsync(to_disk.fileno())
        for file in sorted(beside.iterdir()):
            file.replace(target / file.name)
        _to_disk(target)
    except OSError as error:
        if error.errno is None or not str(error.filename or beside).startswith(str(beside)):
            raise
        raise OSError(error.errno, error.strerror, str(folder)) from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _to_disk(folder: Path) -> None:
    """Have the names in a folder written, without which a power failure may bring back what a file has replaced."""
    with suppress(OSError):  # not every system opens folders
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


@contextmanager
def written(path: str | Path | io.BufferedIOBase, suffix: str) -> Iterator[BinaryIO]:
    """Open what SB3's ``save`` would write to; what stands there is replaced when the block ends without an error.

    :param path: a file that is open gets all at the end
    :param suffix: of a path that has none
    :raises OSError: see :func:`replacing`
    """
    if isinstance(path, str | Path):
        with replacing(_target(Path(path), suffix)) as file:
            yield file
    else:
        memory = io.BytesIO()
        yield memory
        open_path(path, "w").write(memory.getbuffer())


def _target(path: Path, suffix: str) -> Path:
    """Return where SB3 writes to if it is told to write to ``path``; makes the folder."""
    if not path.suffix:
        path = path.with_name(f"{path.name}.{suffix}")
    if path.is_dir():
        warnings.warn(f"Path '{path}' is a folder. Will save instead to {path}_2", stacklevel=5)
        return _target(path.with_name(f"{path.name}_2"), suffix)
    if not path.parent.exists():
        warnings.warn(f"Path '{path.parent}' does not exist. Will create it.", stacklevel=5)
        path.parent.mkdir(exist_ok=True, parents=True)
    return path

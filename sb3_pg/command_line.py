"""What the commands of this package share: numbers, folders and missing packages."""

import argparse
import re
import reprlib
import tempfile
from functools import partial
from pathlib import Path
from typing import NoReturn

import gymnasium as gym

from sb3_pg.common.archive.archived import Archived
from sb3_pg.common.archive.container import Archive, read_archive
from sb3_pg.common.errors import LAST_SEED

#: No number that an option takes has more.
MOST_DIGITS = 100

#: Packages that come with an extra of ours, and which.
EXTRAS = {"optuna": "zoo", "rl_zoo3": "zoo", "huggingface_sb3": "zoo", "box2d": "zoo", "moviepy": "zoo"}
EXTRAS |= {"pygame": "zoo", "seaborn": "zoo", "pytablewriter": "zoo", "sb3_contrib": "contrib", "mujoco": "mujoco"}
EXTRAS |= {"envpool": "envpool", "matplotlib": "extra", "rich": "extra", "tqdm": "extra", "tensorboard": "extra"}
EXTRAS |= dict.fromkeys(
    ("transformers", "tokenizers", "peft", "sacrebleu", "rouge_score", "num2words", "vadersentiment"), "text"
)


class CommandError(Exception):
    """Something the user can put right; the message is one line."""


class Parser(argparse.ArgumentParser):
    """Raises what is wrong, without the list of all options."""

    def error(self, message: str) -> NoReturn:
        raise CommandError(message)


def whole(text: str, low: int = 0, high: int | None = None, besides: int | None = None) -> int:
    """Return a whole number from ``low`` to ``high``, of an option.

    :param besides: a number that is allowed too, such as one that stands for none
    """
    if besides is not None and text == str(besides):
        return int(text)
    is_number = text.isdecimal() and len(text) <= MOST_DIGITS
    if not is_number or int(text) < low or (high is not None and int(text) > high):
        limits = f">= {low}" if high is None else f"from {low} to {high}"
        raise argparse.ArgumentTypeError(f"must be a whole number {limits}, not {reprlib.repr(text)}")
    return int(text)


seed_number = partial(whole, high=LAST_SEED)


def make_writable(folder: Path) -> None:
    """Make a folder, and try whether a file can be written there.

    :raises CommandError: it cannot
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise CommandError(f"cannot write to {folder}: {error.strerror}. Pass another folder by --out.") from None


def read_own(path: Path, algorithm: type[Archived]) -> Archive:
    """Return the archive of a run to go on with.

    :raises CommandError: it is another algorithm's
    """
    archive = read_archive(path)
    if archive.algorithm not in (None, algorithm.archive_name):  # what is no archive of a model, ``load`` says
        raise CommandError(f"{path} is of {archive.algorithm}: pass --algo {archive.algorithm.lower()}")
    return archive


def folder_to_write(text: str) -> str:
    """Return the folder of an option, which need not be there yet."""
    if not text:
        return text
    there = next(place for place in (Path(text).absolute(), *Path(text).absolute().parents) if place.exists())
    if not there.is_dir():
        raise argparse.ArgumentTypeError(f"cannot write to {text}: {there} is a file")
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise argparse.ArgumentTypeError(f"cannot write to {text}: {error.strerror}") from None
    return text


def file_to_read(text: str) -> str:
    """Return the file of an option; an empty one stands for none."""
    if text and not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"there is no file {text}")
    return text


def missing_package(error: ImportError | gym.error.DependencyNotInstalled) -> str:
    """Return what to install, as a sentence to go on with; nothing if no extra of ours has it, or the error says it."""
    if "sb3_pg[" in str(error):
        return ""
    names = [error.name or ""] if isinstance(error, ImportError) else re.findall(r"\w+", str(error))
    extras = [EXTRAS[name.split(".")[0].lower()] for name in names if name.split(".")[0].lower() in EXTRAS]
    return f" Install it with: pip install 'sb3_pg[{extras[0]}]'" if extras else ""

"""What ``learn`` leaves behind: no second one at the same time, no open progress bar, threads or folders."""

import copy
import datetime
import os
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from weakref import WeakSet

from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback, CallbackList, ProgressBarCallback
from stable_baselines3.common.logger import (
    CSVOutputFormat,
    HumanOutputFormat,
    JSONOutputFormat,
    Logger,
    TensorBoardOutputFormat,
)

from sb3_pg.common.errors import ArgumentError

_learning: "WeakSet[BaseAlgorithm]" = WeakSet()
_change = threading.Lock()


@contextmanager
def learning_alone(model: BaseAlgorithm) -> Iterator[None]:
    """Refuse a second ``learn`` of the same model within the block.

    :raises ArgumentError: this is the second
    """
    with _change:
        if model in _learning:
            raise ArgumentError(
                "This model is learning already: learn() cannot be called by a callback of its own learn(), nor by "
                "another thread, before that has returned. Learn with a copy (copy.deepcopy(model)) instead."
            )
        _learning.add(model)
    try:
        yield
    finally:
        _learning.discard(model)


def is_learning(model: BaseAlgorithm) -> bool:
    """Return whether ``learn`` of this model has not returned yet."""
    return model in _learning


@contextmanager
def closing(callback: BaseCallback, logger: Logger | None) -> Iterator[None]:
    """Close the progress bars and end the threads that they and TensorBoard have started, however the block ends.

    :param logger: whose files may be closed; TensorBoard's opens another one if something is logged later
    """
    try:
        yield
    finally:
        for bar in _bars(callback):
            if "pbar" in vars(bar):  # else it was not opened
                bar.on_training_end()
                if type(bar.pbar).monitor is not None and not type(bar.pbar)._instances:
                    type(bar.pbar).monitor.exit()
        for output in logger.output_formats if logger else ():
            if isinstance(output, TensorBoardOutputFormat):
                output.writer.close()


def _bars(callback: BaseCallback) -> Iterator[ProgressBarCallback]:
    if isinstance(callback, ProgressBarCallback):
        yield callback
    elif isinstance(callback, CallbackList):
        for part in callback.callbacks:
            yield from _bars(part)


#: SB3's formats with a file, or a screen, that only this process writes to.
_WITH_FILES = (HumanOutputFormat, JSONOutputFormat, CSVOutputFormat, TensorBoardOutputFormat)


def for_a_copy(logger: Logger) -> Logger:
    """Return a logger with the same figures, but without what only one of two models can write to."""
    its = copy.copy(logger)
    its.name_to_value, its.name_to_count = logger.name_to_value.copy(), logger.name_to_count.copy()
    its.name_to_excluded = logger.name_to_excluded.copy()
    its.output_formats = [x for x in logger.output_formats if not isinstance(x, _WITH_FILES)]
    return its


class ScreenLogger(Logger):
    """SB3's logger, but its folder is made only when somebody asks for it: it writes no files itself."""

    @property
    def dir(self) -> str:
        """Return the folder."""
        Path(self._dir).mkdir(parents=True, exist_ok=True)
        return self._dir

    @dir.setter
    def dir(self, folder: str) -> None:
        self._dir = folder


def screen_logger(verbose: int) -> Logger:
    """Return what SB3's ``configure_logger`` does without TensorBoard."""
    folder = os.environ.get("SB3_LOGDIR")
    if folder is None:
        name = datetime.datetime.now().strftime("SB3-%Y-%m-%d-%H-%M-%S-%f")
        folder = str(Path(tempfile.gettempdir()) / name)
    return ScreenLogger(folder, [HumanOutputFormat(sys.stdout)] if verbose else [])

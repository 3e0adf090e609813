"""Interrupts: kept waiting where they would leave something half done, and turned into an orderly end of a program."""

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, ClassVar

from stable_baselines3.common.callbacks import BaseCallback

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class _Postponed:
    """In place of the handlers of signals: lets the first signal that comes wait."""

    is_in_use: ClassVar[bool] = False

    def __init__(self) -> None:
        handlers = {number: signal.getsignal(number) for number in _SIGNALS}
        self._handlers: dict[int, Any] = {number: handler for number, handler in handlers.items() if callable(handler)}
        self._came: tuple[int, FrameType | None] | None = None
        self._time = 0.0  # when it came
        for number in self._handlers:
            signal.signal(number, self)
        _Postponed.is_in_use = True

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Note the first signal; one that comes a second later does not wait, since the block may never end."""
        if self._came is None:
            self._came, self._time = (number, frame), time.monotonic()
        elif time.monotonic() - self._time > 1.0:
            self._handlers[number](number, frame)

    def end(self) -> None:
        """Put the handlers back, and let the one whose signal came do its work."""
        _Postponed.is_in_use = False
        try:
            self._put_back()
        except BaseException:  # of a signal that came as soon as the first handler was back
            self._put_back()
            raise
        if self._came is not None:
            self._handlers[self._came[0]](*self._came)

    def _put_back(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Let ctrl-C and SIGTERM wait for the end of the block, or of the outermost of such blocks.

    Another one, a second or more after the first, does not wait, nor does a signal without a handler in Python, as
    SIGTERM is where the program gives it none: it ends the process at once.
    """
    # No handler of signals runs in any other thread than the main one.
    if _Postponed.is_in_use or threading.current_thread() is not threading.main_thread():
        yield
        return
    postponed = _Postponed()
    try:
        yield
    finally:
        postponed.end()


class Interrupted(BaseException):
    """Ctrl-C or SIGTERM in a program that saves what it has learned before it ends.

    Not a ``KeyboardInterrupt``, which rl_zoo3 takes for the end of training.

    :param number: of the signal
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"interrupted by {signal.Signals(number).name}")
        self.exit_status = 128 + number


@contextmanager
def _handled_by(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    before = {number: signal.signal(number, handler) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, its in before.items():
            signal.signal(number, its)


@contextmanager
def interrupts_raised() -> Iterator[None]:
    """Let ctrl-C and SIGTERM raise ``Interrupted`` within the block."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise Interrupted(number)

    with _handled_by(interrupt):
        yield


class AfterStep(BaseCallback):
    """Raises ``Interrupted`` once a step of the environments is whole, from where the run can go on exactly."""

    number: int | None = None  #: of the signal that has come

    def raise_if_asked(self) -> None:
        """Raise it now, if a signal has come."""
        if self.number is not None:
            number, self.number = self.number, None
            raise Interrupted(number)

    def _on_step(self) -> bool:
        self.raise_if_asked()
        return True


@contextmanager
def interrupts_after_steps() -> Iterator[AfterStep]:
    """Let ctrl-C and SIGTERM wait for a step's end within the block, for which ``learn`` is given the callback.

    A second one does not wait.
    """
    callback = AfterStep()

    def note(number: int, frame: FrameType | None) -> None:
        if callback.number is not None:
            callback.raise_if_asked()
        callback.number = number

    with _handled_by(note):
        yield callback
        callback.raise_if_asked()


@contextmanager
def saved_when_interrupted(save: Callable[[], str]) -> Iterator[None]:
    """Save what was learned when ctrl-C or SIGTERM ends the block, and say so in one line.

    :param save: saves, and returns where and how to go on
    """
    try:
        with interrupts_raised():
            yield
    except Interrupted:
        with uninterrupted():
            print(f"Interrupted: saved in {save()}", file=sys.stderr)
        raise

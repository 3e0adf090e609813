"""Interrupts: kept waiting where they would leave something half done, and turned into an orderly end of a program."""

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from stable_baselines3.common.callbacks import BaseCallback

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Let ctrl-C and SIGTERM wait for the end of the block."""
    if threading.current_thread() is not threading.main_thread():  # no handler of signals runs in any other
        yield
        return
    came: list[tuple[int, FrameType | None]] = []
    handlers: dict[int, Any] = {number: signal.getsignal(number) for number in _SIGNALS}
    handlers = {number: handler for number, handler in handlers.items() if callable(handler)}
    for number in handlers:
        signal.signal(number, lambda number, frame: came.append((number, frame)))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if came:
            handlers[came[0][0]](*came[0])


class Interrupted(BaseException):
    """Ctrl-C or SIGTERM in a program that saves what it has learned before it ends.

    Not a ``KeyboardInterrupt``, which rl_zoo3 takes for the end of training.

    :param number: of the signal
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"interrupted by {signal.Signals(number).name}")
        self.exit_status = 128 + number


@contextmanager
def interrupts_raised() -> Iterator[None]:
    """Let ctrl-C and SIGTERM raise ``Interrupted`` within the block."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise Interrupted(number)

    before = {number: signal.signal(number, interrupt) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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

    before = {number: signal.signal(number, note) for number in _SIGNALS}
    try:
        yield callback
        callback.raise_if_asked()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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

"""Interrupts: kept waiting where they would leave something half done, and turned into an orderly end of a program."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

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


class Terminated(KeyboardInterrupt):
    """SIGTERM, as an exception like that of ctrl-C."""


@contextmanager
def termination_raised() -> Iterator[None]:
    """Let SIGTERM raise ``Terminated`` within the block, so that a program can save what it has."""

    def terminate(number: int, frame: FrameType | None) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def exit_status(interrupt: KeyboardInterrupt) -> int:
    """Return what a shell expects of a program that a signal has ended: 128 and the signal's number."""
    return 128 + (signal.SIGTERM if isinstance(interrupt, Terminated) else signal.SIGINT)

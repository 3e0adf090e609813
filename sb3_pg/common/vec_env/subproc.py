"""SB3's SubprocVecEnv, which says so when one of its processes has ended, and is whole after an interrupt."""

import select
import signal
import sys
import time
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import numpy as np
from stable_baselines3.common import vec_env as sb3
from stable_baselines3.common.vec_env.base_vec_env import VecEnvStepReturn

from sb3_pg.common.errors import EnvironmentProcessError
from sb3_pg.common.interrupts import uninterrupted

#: Seconds that ``close`` gives processes when one of them has ended by itself; without that it waits as SB3 does.
_PATIENCE = 5.0


class Remote:
    """The connection to a process, which does not wait for one that has ended, as SB3's does.

    With the start method "fork" there is no end of file to notice: siblings hold the other end open.

    :param number: of the environment
    """

    def __init__(self, number: int, connection: Connection, process: BaseProcess) -> None:
        self._number, self._connection, self._process = number, connection, process
        self._sources: list[Any] = [connection, process.sentinel]
        self.fileno, self.close, self.poll = connection.fileno, connection.close, connection.poll
        self.n_owed = 0  # answers that have not been received
        if sys.platform != "win32":  # else ``wait`` makes such an object each time
            self._poll = select.poll()
            for source in self._sources:
                self._poll.register(source, select.POLLIN)

    def send(self, message: Any) -> None:
        """Send a command, after throwing away an answer to an earlier one that an interrupt has left there.

        :raises EnvironmentProcessError: the process has ended
        """
        self.forget()
        with uninterrupted():  # else half a message may be sent, or the count be wrong
            try:
                self._connection.send(message)
            except OSError:
                raise self._error() from None
            self.n_owed += 1

    def recv(self) -> Any:
        """Wait for an answer.

        :raises EnvironmentProcessError: the process has ended
        """
        self.wait()
        with uninterrupted():
            try:
                answer = self._connection.recv()
            except (EOFError, OSError):
                raise self._error() from None
            self.n_owed -= 1
            return answer

    def forget(self) -> None:
        """Throw away an answer that an interrupt has left there."""
        while self.n_owed:
            self.recv()

    def wait(self) -> None:
        """Wait until there is an answer.

        :raises EnvironmentProcessError: the process has ended without one
        """
        if sys.platform == "win32":
            has_answer = self._connection in wait(self._sources)
        else:
            has_answer = self._poll.poll()[0][0] == self._connection.fileno()
        if not has_answer:
            raise self._error()

    def _error(self) -> EnvironmentProcessError:
        self._process.join(1.0)  # it may be about to end
        return EnvironmentProcessError(self._number, "SubprocVecEnv", _how(self._process.exitcode))


def _how(exit_code: int | None) -> str:
    if exit_code is not None and exit_code < 0:
        return f"exit code {exit_code}: killed by {signal.Signals(-exit_code).name}"
    return f"exit code {exit_code}: look for its traceback above" if exit_code else f"exit code {exit_code}"


class SubprocVecEnv(sb3.SubprocVecEnv):
    """Steps each environment in a process of its own; arguments are SB3's.

    Its methods raise a ``EnvironmentProcessError`` that names the environment when a process has ended.
    """

    remotes: tuple[Any, ...]

    def __init__(self, env_fns: list[Any], start_method: str | None = None) -> None:
        super().__init__(env_fns, start_method)
        self.watch()

    def watch(self) -> None:
        """Put connections that notice the end of a process in place of SB3's."""
        pairs = zip(self.remotes, self.processes, strict=True)
        self.remotes = tuple(Remote(number, *pair) for number, pair in enumerate(pairs))
        for remote in self.remotes:
            remote.n_owed = int(self.waiting)

    def step_async(self, actions: np.ndarray) -> None:
        """Send the actions."""
        for remote in self.remotes:
            remote.forget()
        with uninterrupted():
            super().step_async(actions)

    def step_wait(self) -> VecEnvStepReturn:
        """Wait for the results; an interrupt meanwhile leaves all of them, to be thrown away."""
        for remote in self.remotes:
            remote.wait()
        with uninterrupted():
            return super().step_wait()

    def close(self) -> None:
        """End the processes, and after an error what is left of them."""
        if self.closed:
            return
        has_lost_one = not all(process.is_alive() for process in self.processes)
        end = time.monotonic() + _PATIENCE if has_lost_one else np.inf
        for remote in self.remotes:
            with suppress(EnvironmentProcessError):
                remote.send(("close", None))
        for process, remote in zip(self.processes, self.remotes, strict=True):
            while process.is_alive() and time.monotonic() < end:
                with suppress(EnvironmentProcessError, OSError):
                    if remote.poll(0.02):  # it may be waiting for us to take its answer
                        remote.recv()
                process.join(0.0)
            if process.is_alive():
                process.kill()
            process.join()
            remote.close()
        self.waiting, self.closed = False, True

"""Processes that need not import again what is imported here."""

import atexit
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


@contextmanager
def forking(work: Callable[[], Any]) -> Iterator[tuple[BaseProcess, Callable[[], list[str]]]]:
    """A forked process that does ``work`` and exits with what it returns, and what it has printed so far."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors:

        def working() -> None:
            for number, file in enumerate((out, errors), 1):
                os.dup2(file.fileno(), number)
            sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
            atexit._clear()  # multiprocessing calls nothing at the end of a process
            try:
                sys.exit(work())
            finally:
                atexit._run_exitfuncs()

        process = multiprocessing.get_context("fork").Process(target=working)
        process.start()
        try:
            yield process, lambda: [os.pread(file.fileno(), 1 << 20, 0).decode() for file in (out, errors)]
        finally:
            process.kill()
            process.join()


def forked(work: Callable[[], Any]) -> subprocess.CompletedProcess[str]:
    """The same when it has ended."""
    with forking(work) as (process, said):
        process.join()
        return subprocess.CompletedProcess(work, process.exitcode, *said())


def run_script(path: str | Path, *arguments: str) -> None:
    """Run a script here, as work of a forked process."""
    os.environ.update(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    sys.path.insert(0, str(Path(path).parent))
    sys.argv = [str(path), *arguments]
    runpy.run_path(str(path), run_name="__main__")


def forget(*packages: str) -> None:
    """Have packages imported anew, or found to be missing; for forked processes."""
    for name in [name for name in sys.modules if any(f"{name}.".startswith(f"{package}.") for package in packages)]:
        del sys.modules[name]

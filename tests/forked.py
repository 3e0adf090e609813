"""Processes that need not import again what is imported here."""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


def forked(work: Callable[[], Any]) -> subprocess.CompletedProcess[str]:
    """What a forked process prints while it does ``work``, and the code that it exits with."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:

        def working() -> None:
            for number, file in enumerate((out, errors), 1):
                os.dup2(file.fileno(), number)
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
            sys.exit(work())

        process = multiprocessing.get_context("fork").Process(target=working)
        process.start()
        process.join()
        said = [file.seek(0) or file.read() for file in (out, errors)]
    return subprocess.CompletedProcess(work, process.exitcode, *said)


def forked_script(path: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The same of a script of this repository."""

    def work() -> None:
        os.chdir(ROOT)
        os.environ.update(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
        sys.path.insert(0, str(Path(path).parent))
        sys.argv = [path, *arguments]
        runpy.run_path(path, run_name="__main__")

    return forked(work)

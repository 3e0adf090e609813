"""What a benchmark has to know of processes: their threads, their memory, their machine, and work in one of its own."""

import multiprocessing
import os
import platform
import resource
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any


def with_one_thread() -> None:
    """Begin the program again with one thread, which NumPy and torch have to know before they are imported."""
    if os.environ.get("OMP_NUM_THREADS") != "1":
        os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")
        os.execv(sys.executable, [sys.executable, *sys.argv])


def in_a_process(function: Callable[..., Any], *arguments: Any, start_method: str = "spawn") -> Any:
    """Return what a function returns where nothing has been compiled and no memory used before.

    :param start_method: "fork" spares it the imports
    """
    with multiprocessing.get_context(start_method).Pool(1) as pool:
        return pool.apply(function, arguments)


def highest_memory() -> float:
    """Return the most megabytes that this process has had; ``ru_maxrss`` begins with what its parent had."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    kilobytes = [int(line.split()[1]) for line in lines if line.startswith("VmHWM")]
    return (kilobytes or [resource.getrusage(resource.RUSAGE_SELF).ru_maxrss])[0] / 1024


def machine(*packages: str) -> str:
    """Return the processor and the versions of Python, torch and these packages."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    cpu = next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.processor())
    versions = [f"{package} {version(package)}" for package in ("torch", *packages)]
    return ", ".join([f"{cpu} ({os.cpu_count()} cores)", f"Python {platform.python_version()}", *versions])

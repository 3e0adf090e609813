"""Work in processes of its own."""

import multiprocessing
from collections.abc import Callable
from typing import Any


def in_a_process(function: Callable[..., Any], *arguments: Any, start_method: str = "spawn") -> Any:
    """Return what a function returns where nothing has been compiled and no memory used before.

    :param start_method: "fork" spares it the imports
    """
    with multiprocessing.get_context(start_method).Pool(1) as pool:
        return pool.apply(function, arguments)

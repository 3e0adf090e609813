"""The packages of the extra ``text``, imported when they are needed."""

from importlib import import_module
from typing import Any


def package(name: str) -> Any:
    """Return a module of a package that the extra ``text`` brings.

    :raises ModuleNotFoundError: it is not installed; says how to install it
    """
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        top = name.partition(".")[0]
        if (error.name or "").partition(".")[0] != top:
            raise
        raise ModuleNotFoundError(f"{top} is not installed: pip install 'sb3_pg[text]'", name=top) from None

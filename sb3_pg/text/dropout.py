"""Dropout for the supervised start. While acting and judging there is none, see LanguageModelPolicy."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch as th


@contextmanager
def dropping(lm: Any, rate: float) -> Iterator[None]:
    """Let a model drop numbers in the block, wherever its architecture has dropout.

    :param lm: a transformers model
    :param rate: probability of each; 0 changes nothing
    """
    if not rate:
        yield
        return
    modules = list(lm.modules())
    own = [(module, name, value) for module in modules for name, value in _rates(module)]
    for module, name, _ in own:
        setattr(module, name, rate)
    lm.train()
    try:
        yield
    finally:
        lm.eval()
        for module, name, value in own:
            setattr(module, name, value)


def _rates(module: th.nn.Module) -> list[tuple[str, float]]:
    """Return the rates that a module has; attention has them as numbers named so, and no module for it."""
    if isinstance(module, th.nn.Dropout):
        return [("p", module.p)]
    return [(name, x) for name, x in vars(module).items() if name.endswith("dropout") and isinstance(x, float)]

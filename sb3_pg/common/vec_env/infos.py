"""What ``gymnasium.vector`` says about all environments at once, as a dictionary for each of them."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Info = dict[str, Any]


def spread(info: Mapping[str, Any] | Sequence[Info], infos: Sequence[Info]) -> None:
    """Write what concerns each environment into its dictionary, in memory of its own.

    :param info: columns with a row for each environment; what stands in ``_name`` says which of them have one of
        ``name``. Or a dictionary for each, as DictInfoToList makes them
    :param infos: a dictionary for each environment
    """
    if not isinstance(info, Mapping):
        for own, more in zip(infos, info, strict=True):
            own.update(copy.deepcopy(more))
        return
    for key, column in info.items():
        if key[:1] == "_" and key[1:] in info:
            continue
        there = info.get(f"_{key}")
        with_it = infos if there is None else [infos[i] for i in np.flatnonzero(there).tolist()]
        for own, value in zip(with_it, _values(column, there, len(infos)), strict=True):
            own[key] = value


def _values(column: Any, there: np.ndarray | None, n: int) -> Sequence[Any]:
    """Return the values of a column where they are there; None means everywhere."""
    which = range(n) if there is None else np.flatnonzero(there)
    if isinstance(column, Mapping):
        parts: list[Info] = [{} for _ in range(n)]
        spread(column, parts)
        return [parts[i] for i in which]
    if np.ndim(column) == 0:  # one for all
        return [copy.deepcopy(column) for _ in which]
    if isinstance(column, list | tuple) or column.dtype == object:
        return [copy.deepcopy(column[i]) for i in which]
    numbers = np.array(column) if there is None else np.asarray(column)[there]
    values: Sequence[Any] = numbers.tolist() if numbers.ndim == 1 else list(numbers)
    return values

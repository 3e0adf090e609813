"""Pairs of responses for people to compare, who do not see which model wrote which."""

import csv
import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sb3_pg.common.errors import ArgumentError
from sb3_pg.text.prompts import Prompt, shown

#: Names of the two files in the folder: what people see and fill in, and what they must not see.
PAIRS, KEY = "pairs.csv", "key.csv"


def export_pairs(
    folder: str | Path,
    prompts: Sequence[Prompt],
    first: Sequence[str],
    second: Sequence[str],
    names: tuple[str, str] = ("first", "second"),
    seed: int = 0,
) -> Path:
    """Write pairs of responses in random order and with random sides, and apart from them the key.

    People write A, B or a tie into the column "better" of ``pairs.csv``; :func:`preferences` counts.

    :param folder: is made if there is none
    :param prompts: one for each pair, texts or conversations
    :param first: responses of one model
    :param second: of the other
    :param names: of the two models, for the key; "tie" is none
    :param seed: of order and sides
    :return: the path of ``pairs.csv``
    :raises ArgumentError: the numbers of texts differ or are 0, or the names are not two different ones
    """
    for name, given in {"prompts": prompts, "first": first, "second": second}.items():
        if isinstance(given, str):
            raise ArgumentError(f"`{name}` must be a list of texts, not one text: {given[:60]!r}.")
    if isinstance(names, str) or len(names) != 2 or len({*names, "tie"}) < 3:
        raise ArgumentError(f"`names` must be two different names, neither of them 'tie', not {names!r}.")
    if not len(prompts):
        raise ArgumentError("`prompts` is empty: there is nothing to compare.")
    if not len(prompts) == len(first) == len(second):
        raise ArgumentError(f"There are {len(prompts)} prompts, but {len(first)} and {len(second)} responses.")
    folder, rng = Path(folder), np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    pairs, key = [], []
    for number, i in enumerate(rng.permutation(len(prompts)).tolist()):
        swapped = bool(rng.integers(2))
        a, b = (second[i], first[i]) if swapped else (first[i], second[i])
        pairs.append([number, shown(prompts[i]), a, b, ""])
        key.append([number, *(reversed(names) if swapped else names)])
    _write(folder / KEY, ["number", "A", "B"], key)
    return _write(folder / PAIRS, ["number", "prompt", "A", "B", "better"], pairs)


def preferences(folder: str | Path) -> dict[str, float]:
    """Return how often each model was found better, and how often neither, 0 to 1, of the pairs that are filled in.

    :param folder: of :func:`export_pairs`
    :raises ArgumentError: there are none, none is filled in, or with something else than A, B and tie, or the files
        have other columns, rows or letters than :func:`export_pairs` has written
    """
    key = {row["number"]: row for row in _read(Path(folder) / KEY, ("number", "A", "B"))}
    first = next(iter(key.values()), {"A": "first", "B": "second"})
    counts = Counter({first["A"]: 0, first["B"]: 0, "tie": 0})
    for row in _read(Path(folder) / PAIRS, ("number", "better")):
        answer = row["better"].strip().upper()
        if answer not in ("", "A", "B", "TIE"):
            raise ArgumentError(f"Pair {row['number']} has {row['better']!r} as better: it must be A, B or tie.")
        if answer and row["number"] not in key:
            raise ArgumentError(f"{PAIRS} has a pair {row['number']!r}, which {KEY} does not have: keep the numbers.")
        if answer:
            counts["tie" if answer == "TIE" else key[row["number"]][answer]] += 1
    if not counts.total():
        raise ArgumentError(f"No pair of {Path(folder) / PAIRS} is filled in: write A, B or tie into its last column.")
    return {name: count / counts.total() for name, count in counts.items()}


def _write(path: Path, columns: list[str], rows: list[list[object]]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([columns, *rows])
    return path


def _read(path: Path, columns: tuple[str, ...]) -> list[dict[str, str]]:
    """Return the rows of a file as export_pairs writes it, or a spreadsheet: with a mark before it, with semicolons.

    :param columns: that it must have
    :raises ArgumentError: it is not there, or something else
    """
    if not path.exists():
        raise ArgumentError(f"`folder` {str(path.parent)!r} has no {path.name}: export_pairs writes it.")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ArgumentError(f"{path} is not in UTF-8. Save it as 'CSV UTF-8'.") from None
    delimiter = ";" if ";" in text.partition("\n")[0] else ","
    head, *rows = [row for row in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter) if row] or [[]]
    if not set(columns) <= set(head):
        raise ArgumentError(
            f"{path} has the columns {head}, but must have {', '.join(columns)}. Save it as CSV, with commas or "
            "semicolons."
        )
    for number, row in enumerate(rows, 1):
        if len(row) != len(head):
            raise ArgumentError(f"Row {number} of {path} has {len(row)} columns, not {len(head)}: keep the empty ones.")
    return [dict(zip(head, row, strict=True)) for row in rows]

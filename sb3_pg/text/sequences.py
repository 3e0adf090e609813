"""Rows of tokens, and which of them one forward pass can serve.

A rollout of a response of 20 tokens holds 20 observations, each one token longer than the one before. A language
model that reads the last of them has read them all: its hidden state at each token is what it would have been had
the row ended there. So the rows are gathered into chains, and only the end of each chain is read.
"""

import numpy as np

from sb3_pg.text.spaces import EMPTY


def prefix_chains(rows: np.ndarray, prompt_length: int) -> tuple[np.ndarray, np.ndarray]:
    """Find the rows that have to be read so that all are known.

    In lexicographic order, in which an empty column comes first, a row stands before those that continue it, so
    each chain of continuations is a run. The order and number of the given rows do not matter.

    :param rows: (n, prompt_length + response_length)
    :param prompt_length: columns that belong to the prompt
    :return: the numbers of the rows to read, (m,), and for each row the place in that list of one that continues
        it or is it, (n,)
    """
    order = np.lexsort(rows.T[::-1])
    shorter, longer = rows[order[:-1]], rows[order[1:]]
    same = shorter == longer
    same[:, prompt_length:] |= shorter[:, prompt_length:] == EMPTY
    is_last = np.append(~same.all(axis=1), True)
    chain = np.empty(len(rows), dtype=np.int64)
    chain[order] = np.cumsum(is_last) - is_last
    return order[is_last], chain


def listed(rows: np.ndarray) -> list[list[int]]:
    """Return the tokens of each row without its empty columns."""
    return [row[row != EMPTY].tolist() for row in rows]


def last_columns(rows: np.ndarray) -> np.ndarray:
    """Return the column of the last token of each row, (n,)."""
    columns: np.ndarray = rows.shape[1] - 1 - (rows[:, ::-1] != EMPTY).argmax(axis=1)
    return columns


def last_tokens(rows: np.ndarray, prompt_length: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the last token of each row, (n,), and how long its response is, (n,)."""
    columns = last_columns(rows)
    return rows[np.arange(len(rows)), columns], columns + 1 - prompt_length


def grown(before: np.ndarray, rows: np.ndarray, prompt_length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Compare rows with those before them, (n, width) each.

    :return: whether each is the same as before, (n,), whether it has one token more of its response, (n,), and the
        column of its last token, (n,)
    """
    n, last = len(rows), last_columns(rows)
    if before.shape != rows.shape:
        return np.zeros(n, dtype=bool), np.zeros(n, dtype=bool), last
    differs = before != rows
    n_changed, everything = np.count_nonzero(differs, axis=1), np.arange(n)
    more = (n_changed == 1) & differs[everything, last] & (last >= prompt_length)
    more &= (before[everything, last] == EMPTY) & (before[everything, last - 1] != EMPTY)
    return n_changed == 0, more, last


def flush_left(rows: np.ndarray, fill: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the tokens of each row from the first column on.

    :param rows: (n, width), the tokens of each in one stretch anywhere, at least one
    :param fill: what to write behind them
    :return: tokens, (n, length of the longest), and the number of tokens of each row, (n,)
    """
    filled = rows != EMPTY
    lengths = filled.sum(axis=1)
    columns = np.arange(lengths.max())
    source = np.minimum(filled.argmax(axis=1)[:, None] + columns, rows.shape[1] - 1)
    tokens = np.where(columns < lengths[:, None], np.take_along_axis(rows, source, axis=1), fill)
    return tokens, lengths


def flush_right(rows: np.ndarray, fill: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the tokens of each row up to the last column; otherwise as :func:`flush_left`."""
    tokens, lengths = flush_left(rows[:, ::-1], fill)
    return tokens[:, ::-1].copy(), lengths

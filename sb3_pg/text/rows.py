"""Rows of tokens that store each token once.

A rollout of a response of 20 tokens has 20 observations, each one token longer than the one before. Kept as rows they
repeat prompt and response 20 times; here a row is the number of a sequence, how much of its response is seen, and the
token that this ends with. Rows are written out for those who ask for an array: callbacks and SB3's own code.
"""

from collections.abc import Iterator
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch as th

from sb3_pg.common.buffers import RolloutBuffer
from sb3_pg.text.sequences import grown, prefix_chains
from sb3_pg.text.spaces import EMPTY, prompt_length_of


class Sequences(Protocol):
    """Prompts with their responses, by number."""

    @property
    def prompt_length(self) -> int:
        """Columns of the prompt."""

    def rows(self, numbers: np.ndarray) -> np.ndarray:
        """Write out some of them, (n, prompt_length + response_length)."""

    def prompt_sizes(self, numbers: np.ndarray) -> np.ndarray:
        """Return the number of tokens in their prompts, (n,)."""


class Table:
    """Sequences that are rows of an array."""

    def __init__(self, table: np.ndarray, prompt_length: int) -> None:
        self._table, self._prompt_length = table, prompt_length

    @property
    def prompt_length(self) -> int:
        return self._prompt_length

    def rows(self, numbers: np.ndarray) -> np.ndarray:
        rows: np.ndarray = self._table[numbers]
        return rows

    def prompt_sizes(self, numbers: np.ndarray) -> np.ndarray:
        return _sizes(self._table[numbers, : self.prompt_length])


def _sizes(columns: np.ndarray) -> np.ndarray:
    sizes: np.ndarray = (columns != EMPTY).sum(axis=1)
    return sizes


class Piece(NamedTuple):
    """Sequences to be read in one go, and which rows that serves."""

    sequences: np.ndarray  #: (k, prompt_length + response_length)
    members: np.ndarray  #: the numbers of the rows, (n,)
    source: np.ndarray  #: in which of the sequences each of them is, (n,)
    prompt: np.ndarray  #: tokens in its prompt, (n,)
    response: np.ndarray  #: tokens of the response that it sees, (n,)


class TokenRows(np.lib.mixins.NDArrayOperatorsMixin):
    """Rows of tokens, like an integer array of shape (..., prompt_length + response_length) that is only read.

    :param sequences: where the tokens are
    :param width: columns of a row
    :param number: the sequence of each row, (...)
    :param length: tokens of the response that it sees, (...)
    :param last: the token that it ends with, (...)
    """

    dtype = np.dtype(np.int32)

    def __init__(
        self, sequences: Sequences, width: int, number: np.ndarray, length: np.ndarray, last: np.ndarray
    ) -> None:
        self.sequences, self.width = sequences, width
        self.number, self.length, self.last = number, length, last

    @classmethod
    def of(cls, rows: Any, prompt_length: int) -> "TokenRows":
        """Return rows, an array or such as these, with prefixes of each other found."""
        if isinstance(rows, TokenRows):
            return rows
        array = np.asarray(rows)
        ends, chain = prefix_chains(array, prompt_length)
        length = _sizes(array[:, prompt_length:])
        last = array[np.arange(len(array)), prompt_length - 1 + length]
        return cls(Table(array[ends], prompt_length), array.shape[1], chain, length, last)

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.number.shape, self.width)

    @property
    def ndim(self) -> int:
        return self.number.ndim + 1

    @property
    def nbytes(self) -> int:
        """Bytes in memory, without those of the sequences."""
        return self.number.nbytes + self.length.nbytes + self.last.nbytes

    @property
    def prompt_length(self) -> int:
        """Columns of the prompt."""
        return self.sequences.prompt_length

    def with_more(self, more: "TokenRows") -> "TokenRows":
        """Return the rows, (n, ...), and others of the same sequences behind them."""
        pairs = ((self.number, more.number), (self.length, more.length), (self.last, more.last))
        return TokenRows(self.sequences, self.width, *(np.concatenate(pair) for pair in pairs))

    @cached_property
    def n_tokens(self) -> int:
        """Tokens that are read for them all."""
        _, _, prompt, response = self.sizes()
        return int((prompt + response).sum())

    @cached_property
    def n_longest(self) -> int:
        """Tokens in the longest."""
        _, _, prompt, response = self.sizes()
        return int((prompt + response).max(initial=1))

    def sizes(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Return the sequences that the rows are parts of, (k,), which of these each row is in, and how much is read.

        :return: numbers, (k,), places in that list, (n,), tokens of each sequence's prompt and response, (k,) each
        """
        used, place = np.unique(self.number, return_inverse=True)
        response = np.zeros(len(used), dtype=int)
        np.maximum.at(response, place, self.length)
        return used, place, self.sequences.prompt_sizes(used), response

    def __len__(self) -> int:
        return len(self.number)

    def __getitem__(self, index: Any) -> Any:
        """Return some of the rows; what goes into columns, or asks for a single row, is an array."""
        depth = sum(i is not Ellipsis and i is not None for i in index) if isinstance(index, tuple) else 1
        if isinstance(index, tuple) and (depth > self.number.ndim or len(index) > depth):
            return np.asarray(self)[index]
        if isinstance(index, th.Tensor):
            index = index.cpu().numpy()
        found = TokenRows(self.sequences, self.width, self.number[index], self.length[index], self.last[index])
        return found if np.ndim(found.number) else np.asarray(found)

    def reshape(self, *shape: Any) -> Any:
        """Return the rows in another shape; one that cuts them is an array."""
        new = shape[0] if len(shape) == 1 and isinstance(shape[0], tuple) else shape
        size = self.number.size
        if len(new) > 1 and new[-1] in (self.width, -1) and (-1 in new[:-1] or np.prod(new[:-1]) == size):
            columns = (x.reshape(new[:-1]) for x in (self.number, self.length, self.last))
            return TokenRows(self.sequences, self.width, *columns)
        return np.asarray(self).reshape(new)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        used, place = np.unique(self.number, return_inverse=True)
        rows = self.sequences.rows(used)[place.reshape(self.number.shape)].astype(dtype or self.dtype, copy=False)
        response = rows[..., self.prompt_length :]
        response[np.arange(response.shape[-1]) >= np.asarray(self.length)[..., None]] = EMPTY
        return rows

    def __getattr__(self, name: str) -> Any:
        """Return what an array has: its methods, for those who take the rows for one."""
        if name.startswith("_") or name in ("sequences", "width", "number", "length", "last"):  # while it is copied
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(np.asarray(self), name)

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
        arrays = [np.asarray(x) if isinstance(x, TokenRows) else x for x in inputs]
        return getattr(ufunc, method)(*arrays, **kwargs)

    def pieces(self, n_tokens: int) -> Iterator[Piece]:
        """Cut the rows into pieces of whole sequences, none read twice.

        :param n_tokens: in each piece, padding included; a longer sequence is a piece of its own
        """
        used, place, prompt, response = self.sizes()
        by_size = np.argsort(prompt + response, kind="stable")
        size, members = (prompt + response)[by_size], np.argsort(place, kind="stable")
        bounds = np.searchsorted(place[members], np.arange(len(used) + 1))
        start = 0
        while start < len(used):
            # The longest comes last and says how wide the piece is.
            fits = size[start:] * np.arange(1, len(used) - start + 1) <= n_tokens
            end = start + max(1, int(fits.sum()))
            chosen, start = by_size[start:end], end
            its = [members[bounds[i] : bounds[i + 1]] for i in chosen]
            rows, source = np.concatenate(its), np.repeat(np.arange(len(chosen)), [len(x) for x in its])
            sequences = self.sequences.rows(used[chosen])
            columns = sequences[:, self.prompt_length :]
            columns[np.arange(columns.shape[1]) >= response[chosen, None]] = EMPTY
            yield Piece(sequences, rows, source, prompt[chosen][source], self.length[rows])


class Recording(TokenRows):
    """The observations of a rollout, (n_steps, n_envs, prompt_length + response_length), recorded step by step.

    A row that is the one before it, or that with one token more, continues its sequence; any other begins a new one.

    :param n_steps: for which there is room
    :param n_envs: environments
    :param space: of one observation
    """

    def __init__(self, n_steps: int, n_envs: int, space: Any) -> None:
        self._prompt_length = prompt_length_of(space)
        columns = (np.zeros((n_steps, n_envs), np.int32) for _ in range(3))
        super().__init__(self, space.shape[0], *columns)
        self._forget()

    def _forget(self) -> None:
        self._n_steps = 0
        self._rows: np.ndarray = np.zeros((0, self.width), np.int32)  # of the last step
        self._heads: list[tuple[int, np.ndarray]] = []  # first column and tokens with which a sequence begins
        self._head_of: dict[bytes, int] = {}
        self._begins: list[tuple[int, int, int]] = []  # head, step and environment of each sequence
        self._ends: list[int] = []  # the last step of each
        self._after: dict[int, tuple[int, int]] = {}  # column and token that follow a sequence in no recorded row

    @property
    def prompt_length(self) -> int:
        return self._prompt_length

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return super().nbytes + sum(tokens.nbytes for _, tokens in self._heads)

    def enlarged(self, n_steps: int) -> "Recording":
        """Return the same with room for more steps."""
        for name in ("number", "length", "last"):
            old = getattr(self, name)
            new = np.zeros((n_steps, old.shape[1]), np.int32)
            new[: len(old)] = old
            setattr(self, name, new)
        return self

    def __setitem__(self, step: Any, rows: Any) -> None:
        """Record the rows of a step, (n_envs, width), or those of several."""
        if isinstance(step, slice):
            for one, its in zip(range(*step.indices(len(self))), rows, strict=True):
                self[one] = its
            return
        if 0 < step < self._n_steps:  # somebody changes what is recorded
            recorded = np.asarray(self[: self._n_steps])
            recorded[step] = rows
            self[: len(recorded)] = recorded
            return
        if step == 0:
            self._forget()
        rows = np.asarray(rows)
        same, more, columns = grown(self._rows, rows, self.prompt_length)
        known = (same | more) if step == self._n_steps and step else np.zeros(len(rows), dtype=bool)
        before = self.number[step - 1]
        self.number[step] = before
        for env in np.flatnonzero(~known):
            self.number[step, env] = self._begin(rows[env], step, int(env))
        for number in self.number[step].tolist():
            self._ends[number] = step
        self.length[step] = columns + 1 - self.prompt_length
        self.last[step] = rows[np.arange(len(rows)), columns]
        self._n_steps, self._rows = step + 1, rows.copy()

    def _begin(self, row: np.ndarray, step: int, env: int) -> int:
        filled = np.flatnonzero(row != EMPTY)
        first = int(filled[0])
        tokens = row[first : int(filled[-1]) + 1].astype(np.int32)
        key = first.to_bytes(4, "little") + tokens.tobytes()
        if key not in self._head_of:  # several environments begin with the same prompt
            self._head_of[key] = len(self._heads)
            self._heads.append((first, tokens))
        self._begins.append((self._head_of[key], step, env))
        self._ends.append(step)
        return len(self._begins) - 1

    def rows(self, numbers: np.ndarray) -> np.ndarray:
        rows = np.full((len(numbers), self.width), EMPTY, np.int32)
        for row, number in zip(rows, numbers.tolist(), strict=True):
            head, start, env = self._begins[number]
            first, tokens = self._heads[head]
            row[first : first + len(tokens)] = tokens
            steps = slice(start, self._ends[number] + 1)
            row[self.prompt_length - 1 + self.length[steps, env]] = self.last[steps, env]
            if number in self._after:
                column, token = self._after[number]
                row[column] = token
        return rows

    def prompt_sizes(self, numbers: np.ndarray) -> np.ndarray:
        return np.array([self.prompt_length - self._heads[self._begins[n][0]][0] for n in numbers.tolist()])

    def followed(self, steps: np.ndarray, envs: np.ndarray, rows: np.ndarray) -> TokenRows:
        """Return rows that follow others, (n, width), as continuations of the same sequences.

        :param steps: of the rows before them, and
        :param envs: their environments, (n,) each
        """
        before: TokenRows = self[steps, envs]
        same, more, columns = grown(np.asarray(before), rows, self.prompt_length)
        number, length = before.number.copy(), columns + 1 - self.prompt_length
        last = rows[np.arange(len(rows)), columns]
        for i in range(len(rows)):
            if more[i]:
                self._after[int(number[i])] = int(columns[i]), int(last[i])
            elif not same[i]:
                number[i] = self._begin(rows[i], int(steps[i]), int(envs[i]))
                self._ends[number[i]] = int(steps[i]) - 1  # there are no recorded rows of it
        return TokenRows(self, self.width, number, length.astype(np.int32), last.astype(np.int32))


class TextRolloutBuffer(RolloutBuffer):
    """A rollout of text, in which each token is stored once."""

    observations: Recording

    def _room_for_observations(self, enlarged: Any) -> Recording:
        old: Recording | None = self.__dict__.get("observations")
        if old is not None:
            return old.enlarged(self.buffer_size)
        return Recording(self.buffer_size, self.n_envs, self.observation_space)

    def to_torch(self, array: Any, copy: bool = True) -> th.Tensor:
        """Convert a column as SB3 does, rows of tokens too."""
        return super().to_torch(np.asarray(array), copy)

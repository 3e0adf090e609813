"""Acting with a key/value cache whose rows need not be in step.

The rows of a batch of environments differ in length, and some begin a new prompt while others go on. So each row's
last token stands in the last column of the cache, and the columns before its first token are masked. A token added
to every row is one more column; a row that begins anew is read on its own and spliced in.
"""

from typing import Any

import numpy as np
import torch as th
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from sb3_pg.text.sequences import grown


class GrowingLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """Keys and values of a layer, with room for a quarter more columns.

    Transformers' own copies all columns for each token, which is most of what acting takes at 512 tokens.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        #: by name: what has room, and the part of it that is in use
        self._rooms: dict[str, tuple[th.Tensor, th.Tensor]] = {}

    def update(
        self, key_states: th.Tensor, value_states: th.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[th.Tensor, th.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = self._appended("keys", self.keys, key_states)
        self.values = self._appended("values", self.values, value_states)
        return self.keys, self.values

    def _appended(self, name: str, old: Any, new: th.Tensor) -> th.Tensor:
        n_old = old.shape[-2] if old.numel() else 0
        n, (room, used) = n_old + new.shape[-2], self._rooms.pop(name, (new[..., :0, :], None))
        if used is not old or room.shape[-2] < n:  # it is another tensor after a selection
            room = new.new_empty(*new.shape[:-2], n + n // 4, new.shape[-1])
            if n_old:
                room[..., :n_old, :] = old
        room[..., n_old:n, :] = new
        used = room[..., :n, :]
        self._rooms[name] = room, used
        return used

    def batch_select_indices(self, indices: th.Tensor) -> None:
        self._rooms.clear()  # before the copy is made
        super().batch_select_indices(indices)


def growing_cache() -> DynamicCache:
    """Return an empty cache whose layers have room to grow."""
    cache = DynamicCache()
    cache.layer_class_to_replicate = GrowingLayer
    return cache


class Memory:
    """Keys and values of a batch of rows, each ending in the last column.

    :param cache: one layer of keys and values, (n, heads, columns, d), for each layer of the model
    :param lengths: how many of the last columns are in use, (n,)
    """

    def __init__(self, cache: DynamicCache, lengths: th.Tensor) -> None:
        self.cache = cache
        self.lengths = lengths

    def mask(self, more: int = 0) -> th.Tensor:
        """Return which columns are in use, (n, columns + more), the added ones included."""
        width = self.cache.get_seq_length() + more
        columns = th.arange(width, device=self.lengths.device)
        return (columns >= width - more - self.lengths[:, None]).long()

    def select(self, rows: th.Tensor) -> "Memory":
        """Return the memory of some rows."""
        self.cache.batch_select_indices(rows)
        return Memory(self.cache, self.lengths[rows])


def spliced(parts: list[tuple[th.Tensor, Memory]]) -> Memory:
    """Return one memory out of several, each given with the places of its rows in the whole."""
    n = sum(len(rows) for rows, _ in parts)
    lengths = th.zeros(n, dtype=th.long, device=parts[0][1].lengths.device)
    for rows, memory in parts:
        lengths[rows] = memory.lengths
    width = int(lengths.max())
    whole = growing_cache()
    for number in range(len(parts[0][1].cache.layers)):
        pair = []
        for kind in ("keys", "values"):
            first = getattr(parts[0][1].cache.layers[number], kind)
            out = first.new_zeros(n, first.shape[1], width, first.shape[3])
            for rows, memory in parts:
                x = getattr(memory.cache.layers[number], kind)
                used = min(width, x.shape[2])
                out[rows, :, width - used :] = x[:, :, x.shape[2] - used :]
            pair.append(out)
        whole.update(*pair, number)
    return Memory(whole, lengths)


class Decoder:
    """Reads observations one after the other, and of each row only what is new.

    Whatever it is given, it gives what reading the whole rows would: a row that is not the last one with one more
    token is read from its beginning, and so are all when the model's weights have changed. Responses that are over
    are not read, since nothing follows them.

    :param policy: the language model policy that reads
    """

    def __init__(self, policy: Any) -> None:
        self.policy = policy
        self.forget()

    def forget(self) -> None:
        """Read everything anew next time."""
        self._state: Any = None
        self._places: np.ndarray = np.empty(0, dtype=int)  # of each row in the state; -1 if it is not there
        self._rows: np.ndarray = np.empty((0, 0))
        self._weights: Any = None
        self._parameters: list[th.nn.Parameter] = []  # until they are read with

    def __getstate__(self) -> dict[str, Any]:
        return {"policy": self.policy}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.policy = state["policy"]
        self.forget()

    @th.no_grad()
    def read(self, rows: np.ndarray) -> th.Tensor:
        """Return the hidden state at the last token of each row, (n, d); zeros for responses that are over.

        :param rows: observations, (n, prompt_length + response_length)
        """
        self._parameters = self._parameters or list(self.policy.parameters())  # which takes as long as a small layer
        weights = [(p._version, p.data_ptr()) for p in self._parameters]  # changes whenever a weight does
        if weights != self._weights:
            self.forget()
        grown, ends = self._grown(rows)
        going = ~self.policy.is_over(rows)
        old, new = np.flatnonzero(grown & going), np.flatnonzero(~grown & going)
        old = old[np.argsort(self._places[old])] if len(old) else old  # as they stand in the state
        parts = []
        with self.policy.precision():
            if len(old):
                tokens = th.as_tensor(rows[old, ends[old]], device=self.policy.device).long()
                parts.append(self.policy.proceed(self._kept(old), tokens))
            self._state = None  # two caches need not fit into memory
            if len(new):
                parts.append(self.policy.begin(rows[new]))
        return self._joined(rows, np.concatenate([old, new]), parts, weights)

    def _kept(self, rows: np.ndarray) -> Any:
        """Return the state of these rows, which are in its order."""
        if len(rows) == (self._places >= 0).sum():
            return self._state
        places = th.as_tensor(self._places[rows], device=self.policy.device)
        return tuple(memory.select(places) for memory in self._state)

    def _joined(self, rows: np.ndarray, order: np.ndarray, parts: list[Any], weights: Any) -> th.Tensor:
        """Remember what has been read of the rows in ``order``; returns the hidden states of all rows."""
        self._rows, self._weights, self._places = np.array(rows), weights, np.full(len(rows), -1)
        self._places[order] = np.arange(len(order))
        if not parts:
            return th.zeros(len(rows), self.policy.hidden_size, device=self.policy.device)
        hidden: th.Tensor = th.cat([part for part, _ in parts])
        if len(parts) == 1:
            self._state = parts[0][1]
        else:
            columns, n_old = th.arange(len(order), device=hidden.device), len(parts[0][0])
            at = columns[:n_old], columns[n_old:]
            states = (state for _, state in parts)
            self._state = tuple(spliced(list(zip(at, memories, strict=True))) for memories in zip(*states, strict=True))
        if np.array_equal(order, np.arange(len(rows))):
            return hidden
        whole = hidden.new_zeros(len(rows), hidden.shape[1])
        whole[th.as_tensor(order, device=hidden.device)] = hidden
        return whole

    def _grown(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return which rows are the last ones with one token more, (n,), and the column of that token."""
        before = self._rows if self._state is not None else np.empty((0, 0))
        _, more, last = grown(before, rows, self.policy.prompt_length)
        return (more & (self._places >= 0) if len(self._places) == len(rows) else more), last

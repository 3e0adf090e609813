"""A stack of LSTM layers in NumPy: one step of it for acting, and the three passes over packed sequences.

Each layer has four gates ``z = x W_ih^T + b_ih + h_before W_hh^T + b_hh``, in torch's order i, f, g, o. With the
sigmoid of i, f and o and the tanh of g it remembers ``c = f c_before + i g``, and its output is ``h = o tanh(c)``.

Rows are those of torch's PackedSequence: of sequences sorted by length, longest first, first the first step of all,
then the second step of those that have one, and so on. Only the products with W_hh are made step by step; all others
are made once for all rows. Arrays of gates are (4, rows, H), so that each gate lies in one piece.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from sb3_pg.common.products import MATRIX_LIMIT, VECTOR_LIMIT, product

#: weight_ih, (4 H, inputs), weight_hh, (4 H, H), bias_ih and bias_hh, (4 H,), or what has their shapes
Layer = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]

#: Of each layer, or gradients or changes of them in the same shapes.
Pieces = list[Layer]

#: h and c, each (layers, sequences, H)
State = tuple[np.ndarray, np.ndarray]


class LayerTrace(NamedTuple):
    """What a forward pass leaves of one layer."""

    x: np.ndarray  # (N, inputs)
    h_before: np.ndarray  # (N, H)
    h: np.ndarray  # (N, H)
    c: np.ndarray  # (N, H)
    slopes: np.ndarray  # (6, N, H): dc / dz of i, f and g, dh / dz of o with c fixed, dc / dc_before, dh / dc


class Trace(NamedTuple):
    """What a forward pass leaves for the other two."""

    runs: list[tuple[int, slice]]  # of steps with as many sequences: how many, and the rows of all these steps
    layers: list[LayerTrace]


def state_after(trace: Trace, rows: slice | np.ndarray = np.s_[:]) -> State:
    """Return the state after each row, or after some of them."""
    h, c = zip(*((layer.h[rows], layer.c[rows]) for layer in trace.layers), strict=True)
    return np.stack(h), np.stack(c)


@functools.lru_cache(maxsize=1024)
def _width(n: int, k: int, m: int, blas_has_one_thread: bool) -> int:
    """Return of how many columns the blocks of a (k, m) matrix are to be, by which to multiply an (n, k) matrix.

    OpenBLAS multiplies with weights as they lie if a product has up to 1024 numbers, and else copies them first, which
    takes five times as long as to multiply few rows; measured, 64 columns are best or close. 0 stands for no blocks, as
    none that are worth it would stay on this thread.
    """
    limit = VECTOR_LIMIT - 1 if 1 in (n, m) else MATRIX_LIMIT
    most = min(m, 64, 1024 // n, limit // (n * k))
    width = next((w for w in range(most, 0, -1) if m % w == 0), 0)
    is_wide = width >= min(m, 16)  # else there are too many
    if blas_has_one_thread:
        return width if is_wide and n > 1 else m
    return width if is_wide else 0


def _by_gate(weight: np.ndarray) -> np.ndarray:
    """View (4 H, k) as (4, H, k)."""
    return weight.reshape(4, -1, weight.shape[1])


def _blocks(matrices: np.ndarray, width: int) -> np.ndarray:
    """View (4, k, m) as (4, m / width, k, width)."""
    gates, k, m = matrices.shape
    return matrices.reshape(gates, k, m // width, width).swapaxes(1, 2)


def _runs(sizes: list[int]) -> list[tuple[int, slice]]:
    """Return the runs of steps with as many sequences, as in a trace."""
    runs, start = [], 0
    for n, steps in itertools.groupby(sizes):
        end = start + n * len(list(steps))
        runs.append((n, slice(start, end)))
        start = end
    return runs


def _rows_before(sizes: list[int]) -> slice | np.ndarray:
    """Return where the state before each row lies, in that before the first step and after all rows."""
    total = sum(sizes)
    if sizes[0] == sizes[-1]:
        return slice(0, total)
    offsets = sizes[0] - np.array([sizes[0], *sizes[:-1]])
    rows: np.ndarray = np.arange(total) + offsets.repeat(sizes)
    return rows


def _by_step(array: np.ndarray, rows: slice, n: int) -> np.ndarray:
    """View a run of rows, (..., N, H), as (steps, ..., n, H)."""
    if array.ndim == 2:
        return array[rows].reshape(-1, n, array.shape[1])
    return array[:, rows].reshape(len(array), -1, n, array.shape[2]).swapaxes(0, 1)


class Lstm:
    """LSTM layers, one on the other.

    :param pieces: weights and biases of each layer
    """

    def __init__(self, pieces: Pieces) -> None:
        self.pieces = pieces
        self.size = sum(array.size for layer in pieces for array in layer)
        self.blas_has_one_thread = False  # so that its products need no care; to be set where that is looked at
        # Views of the weights, those of W_ih and those of W_hh, as z, (n, k) by (4, k, H), and its derivative take them
        self._weights = [(_by_gate(weight), _by_gate(weight_hh)) for weight, weight_hh, _, _ in pieces]
        self._turned = [(a.swapaxes(1, 2), b.swapaxes(1, 2)) for a, b in self._weights]
        self._h, self._dtype = pieces[0][1].shape[1], pieces[0][1].dtype
        self._tiles: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def step(self, x: np.ndarray, state: State) -> tuple[np.ndarray, State]:
        """Return the outputs (n, H) for inputs (n, inputs), a view of h of the last layer, and the state after them."""
        n = len(x)
        h, c = np.empty_like(state[0]), np.empty_like(state[1])
        for layer, (weight, weight_hh, bias, bias_hh) in enumerate(self.pieces):
            h_before = state[0][layer]
            if n == 1:  # of vectors is faster
                z = self._times_vector(weight_hh, h_before[0])
                z += self._times_vector(weight, x[0])
                z += bias
                z += bias_hh
                z = z.reshape(4, 1, -1)
            else:
                z, recurrent = np.empty((2, 4, n, self._h), self._dtype)
                turned, turned_hh = self._turned[layer]
                self._multiplier(turned, z)(x)
                self._multiplier(turned_hh, recurrent)(h_before)
                z += recurrent
                z += (bias + bias_hh).reshape(4, 1, -1)
            x = h[layer]
            _cell(z, self._tile(n), z, state[1][layer], c[layer], x, x)
        return x, (h, c)

    def forward(self, x: np.ndarray, sizes: Sequence[int], state: State) -> tuple[np.ndarray, Trace]:
        """Return the outputs, (N, H) and not to be written to, and what ``backward`` and ``tangent`` need.

        :param x: inputs, (N, inputs)
        :param sizes: how many sequences have a first step, a second, ...; N together
        :param state: before each sequence
        """
        counts = [int(n) for n in sizes]
        trace, before = Trace(_runs(counts), []), _rows_before(counts)
        for layer, start in enumerate(zip(*state, strict=True)):
            trace.layers.append(self._forward(layer, x, trace.runs, before, start))
            x = trace.layers[-1].h
        return x, trace

    def _forward(
        self,
        layer: int,
        x: np.ndarray,
        runs: list[tuple[int, slice]],
        before: slice | np.ndarray,
        start: tuple[np.ndarray, np.ndarray],
    ) -> LayerTrace:
        """Run one layer.

        :param before: where the state before each row lies
        :param start: state before each sequence
        """
        (weight, weight_hh), (_, _, bias, bias_hh), n_start = self._turned[layer], self.pieces[layer], len(start[0])
        state = np.empty((2, n_start + len(x), self._h), self._dtype)
        state[:, :n_start] = start
        (h_before, c_before), (h, c) = state[:, :n_start], state[:, n_start:]
        slopes = np.empty((6, len(x), self._h), self._dtype)
        gates, tanh_c = slopes[:4], slopes[5]
        self._multiplier(weight, gates)(x)
        gates += (bias + bias_hh).reshape(4, 1, -1)
        for n, rows in runs:
            z, tile = np.empty((4, n, self._h), self._dtype), self._tile(n)
            multiply = self._multiplier(weight_hh, z)
            h_before, c_before = h_before[:n], c_before[:n]
            for gate, h_now, c_now, t in zip(*(_by_step(a, rows, n) for a in (gates, h, c, tanh_c)), strict=True):
                multiply(h_before)
                z += gate
                _cell(z, tile, gate, c_before, c_now, t, h_now)
                h_before, c_before = h_now, c_now
        _differentiate(slopes, state[1, before], h)
        return LayerTrace(x, state[0, before], h, c, slopes)

    def backward(self, trace: Trace, d: np.ndarray, gradient: Pieces, wants_dx: bool = False) -> np.ndarray | None:
        """J^T d: from the derivative by the outputs, (N, H), to the gradient, back through each sequence.

        :param gradient: where to write it
        :param wants_dx: return the derivative by the inputs, (N, inputs)
        """
        for layer in range(len(self.pieces) - 1, -1, -1):
            x, h_before = trace.layers[layer][:2]
            d_weight, d_weight_hh, d_bias, d_bias_hh = gradient[layer]
            dz = self._backward(layer, trace, d)
            self._write_gradient(dz, x, d_weight)
            self._write_gradient(dz, h_before, d_weight_hh)
            np.add.reduce(dz, axis=1, out=d_bias.reshape(4, -1))
            d_bias_hh[...] = d_bias
            if layer or wants_dx:
                parts = np.empty((4, *x.shape), self._dtype)
                self._multiplier(self._weights[layer][0], parts)(dz[:, None])
                d = np.add.reduce(parts, axis=0)
        return d if wants_dx else None

    def _backward(self, layer: int, trace: Trace, d: np.ndarray) -> np.ndarray:
        """Return the derivative by z, (4, N, H)."""
        slopes, (_, weight_hh) = trace.layers[layer].slopes, self._weights[layer]
        dz = np.empty((4, *d.shape), self._dtype)
        dh_after, dc_after = np.zeros((2, trace.runs[0][0], self._h), self._dtype)  # 0 at the end of a sequence
        for n, rows in reversed(trace.runs):
            parts, dh_next, dc_next = np.empty((4, n, self._h), self._dtype), dh_after[:n], dc_after[:n]
            multiply = self._multiplier(weight_hh, parts)
            steps = zip(*(_by_step(a, rows, n)[::-1] for a in (slopes, dz, d)), strict=True)
            for (i, f, g, o, c_by_before, h_by_c), dz_now, d_now in steps:
                di, df, dg, do = dz_now
                dh_next += d_now
                dc = dh_next * h_by_c
                dc += dc_next
                np.multiply(dc, i, out=di)
                np.multiply(dc, f, out=df)
                np.multiply(dc, g, out=dg)
                np.multiply(dh_next, o, out=do)
                np.multiply(dc, c_by_before, out=dc_next)
                multiply(dz_now[:, None])
                np.add.reduce(parts, axis=0, out=dh_next)
        return dz

    def tangent(self, trace: Trace, change: Pieces, d_x: np.ndarray | None = None) -> np.ndarray:
        """J v: how the outputs, (N, H), change with the weights.

        :param change: of weights and biases
        :param d_x: of the inputs, (N, inputs); None for none
        """
        for layer, pieces in enumerate(change):
            d_x = self._tangent(layer, trace, pieces, d_x)
        assert d_x is not None
        return d_x

    def _tangent(self, layer: int, trace: Trace, change: Layer, d_x: np.ndarray | None) -> np.ndarray:
        x, h_before, _, _, slopes = trace.layers[layer]
        weight, weight_hh = self._turned[layer]
        dz, part = np.empty((2, 4, len(x), self._h), self._dtype)
        self._multiplier(_by_gate(change[0]).swapaxes(1, 2), dz)(x)
        self._multiplier(_by_gate(change[1]).swapaxes(1, 2), part)(h_before)
        dz += part
        if d_x is not None:
            self._multiplier(weight, part)(d_x)
            dz += part
        dz += (change[2] + change[3]).reshape(4, 1, -1)
        dh, (dh_before, dc) = np.empty_like(h_before), np.zeros((2, trace.runs[0][0], self._h), self._dtype)
        for n, rows in trace.runs:
            z, dc, dh_before = np.empty((4, n, self._h), self._dtype), dc[:n], dh_before[:n]
            multiply = self._multiplier(weight_hh, z)
            i, f, g, o = z
            for slope, dz_now, dh_now in zip(*(_by_step(a, rows, n) for a in (slopes, dz, dh)), strict=True):
                multiply(dh_before)
                z += dz_now
                z *= slope[:4]
                dc *= slope[4]
                dc += i
                dc += f
                dc += g
                np.multiply(dc, slope[5], out=dh_now)
                dh_now += o
                dh_before = dh_now
        return dh

    def split(self, flat: np.ndarray) -> Pieces:
        """Return views of a flat vector in the shapes of the weights and biases."""
        views, start = [], 0
        for layer in self.pieces:
            ends = start + np.cumsum([array.size for array in layer])
            parts = np.split(flat[start : ends[-1]], ends[:-1] - start)
            a, b, c, d = (part.reshape(array.shape) for part, array in zip(parts, layer, strict=True))
            views.append((a, b, c, d))
            start = ends[-1]
        return views

    def _tile(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """Return by what to multiply n rows of gates before and after the tanh, and what to add then.

        The sigmoid of z is 0.5 + 0.5 tanh(0.5 z), and so one call does for all gates.
        """
        if n > 16:
            n = 1
        if n not in self._tiles:
            scale = np.full((4, n, self._h), 0.5, self._dtype)  # in the shape of few rows, as that is twice as fast
            scale[2] = 1.0
            self._tiles[n] = scale, 1.0 - scale
        return self._tiles[n]

    # Products

    def _multiplier(self, b: np.ndarray, out: np.ndarray) -> Callable[[np.ndarray], None]:
        """Return what writes the products of a matrix (n, k), or of four as (4, 1, n, k), with four (k, m).

        :param out: where to, (4, n, m)
        """
        width = _width(out.shape[1], *b.shape[1:], self.blas_has_one_thread)

        def multiply(a: np.ndarray) -> None:
            np.matmul(a, b_blocks, out=out_blocks)

        def multiply_with_care(a: np.ndarray) -> None:
            for x, y, z in zip(a[:, 0] if a.ndim == 4 else [a] * 4, b, out, strict=True):
                product(x, y, z)

        if not width:
            return multiply_with_care
        b_blocks, out_blocks = _blocks(b, width), _blocks(out, width)
        return multiply

    def _times_vector(self, weight: np.ndarray, x: np.ndarray) -> np.ndarray:
        """Return the product of weights (4 H, k) with (k,)."""
        m, k = weight.shape
        width = m if self.blas_has_one_thread or weight.size < VECTOR_LIMIT else _width(1, k, m, False)
        if width == m:
            found: np.ndarray = weight.dot(x)
            return found
        found = np.matmul(weight.reshape(-1, width, k), x) if width else product(weight, x[:, None])
        return found.reshape(m)

    def _write_gradient(self, dz: np.ndarray, x: np.ndarray, out: np.ndarray) -> None:
        """Write the sum over all rows of dz (4, N, H) times x (N, k) to the weights' gradient, (4 H, k)."""
        n, k = x.shape
        width = _width(k, n, self._h, self.blas_has_one_thread)
        if width:
            blocks = dz.swapaxes(1, 2).reshape(4, self._h // width, width, n)
            np.matmul(blocks, x, out=out.reshape(4, -1, width, k))
        else:
            for d, where in zip(dz, out.reshape(4, -1, k), strict=True):
                product(d.T, x, where)


def _cell(
    z: np.ndarray,
    tile: tuple[np.ndarray, np.ndarray],
    gates: np.ndarray,
    c_before: np.ndarray,
    c: np.ndarray,
    tanh_c: np.ndarray,
    h: np.ndarray,
) -> None:
    """Compute what follows from z, which is overwritten; ``h`` may be ``tanh_c``."""
    scale, shift = tile
    z *= scale
    np.tanh(z, out=z)
    z *= scale
    np.add(z, shift, out=gates)
    i, f, g, o = gates
    np.multiply(f, c_before, out=c)
    c += i * g
    np.tanh(c, out=tanh_c)
    np.multiply(o, tanh_c, out=h)


def _differentiate(slopes: np.ndarray, c_before: np.ndarray, h: np.ndarray) -> None:
    """Overwrite i, f, g, o, c and tanh(c) by the slopes."""
    i, f, g, o, forget, tanh_c = slopes
    forget[...] = f
    ig = i * g
    np.subtract(i, ig * g, out=g)
    np.subtract(ig, ig * i, out=i)
    np.multiply(f, c_before, out=ig)
    np.subtract(ig, ig * f, out=f)
    np.subtract(o, h * tanh_c, out=tanh_c)
    np.subtract(h, h * o, out=o)

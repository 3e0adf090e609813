"""A chain of layers in NumPy and the three passes over it.

Each layer is ``h_l = f_l(z_l)`` with ``z_l = h_(l-1) W_l^T + b_l``, one row per observation:

- forward: the outputs;
- backward: from the derivative of a loss by the outputs to its gradient, J^T u;
- tangent: from a change of the weights to the change of the outputs, J v.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch as th
from torch import nn

from sb3_pg.common.products import MATRIX_LIMIT, VECTOR_LIMIT, product


class Activation(NamedTuple):
    """A function of each number, and its derivative."""

    function: Callable[[np.ndarray, np.ndarray | None], np.ndarray]  # z, and perhaps memory for the result, to h
    slope: Callable[[np.ndarray, np.ndarray], np.ndarray]  # z and h to dh / dz
    needs_z: bool = True  # whether ``slope`` does, so that h must not overwrite it


def _tanh(_: Any) -> Activation:
    def slope(_: np.ndarray, h: np.ndarray) -> np.ndarray:
        result: np.ndarray = h * h
        np.subtract(1.0, result, out=result)
        return result

    return Activation(np.tanh, slope, needs_z=False)


def _relu(_: Any) -> Activation:
    return Activation(lambda z, out: np.maximum(z, 0.0, out=out), lambda z, h: (h > 0.0).astype(h.dtype), needs_z=False)


def _leaky_relu(module: Any) -> Activation:
    a = float(module.negative_slope)
    return Activation(
        lambda z, out: np.multiply(z, np.where(z > 0.0, z.dtype.type(1.0), z.dtype.type(a)), out),
        lambda z, h: np.where(z > 0.0, h.dtype.type(1.0), h.dtype.type(a)),
    )


def _elu(module: Any) -> Activation:
    a = float(module.alpha)
    return Activation(
        lambda z, out: np.where(z > 0.0, z, a * np.expm1(np.minimum(z, 0.0))),
        lambda z, h: np.where(z > 0.0, np.ones_like(h), h + a),
    )


def _sigmoid(z: np.ndarray) -> np.ndarray:
    return 0.5 + 0.5 * np.tanh(0.5 * z)


def _silu(_: Any) -> Activation:
    def slope(z: np.ndarray, h: np.ndarray) -> np.ndarray:
        p = _sigmoid(z)
        return p + h * (1.0 - p)

    return Activation(lambda z, out: np.multiply(z, _sigmoid(z), out), slope)


def _gelu(module: Any) -> Activation:
    """Return ``z Phi(z)`` with the normal distribution's Phi, or its usual approximation by tanh."""
    if module.approximate == "none":
        root = math.sqrt(0.5)

        def phi(z: np.ndarray) -> np.ndarray:  # NumPy has no error function
            erf: np.ndarray = th.erf(th.from_numpy(root * z)).numpy()
            return 0.5 + 0.5 * erf

        density = 1.0 / math.sqrt(2.0 * math.pi)
        return Activation(
            lambda z, out: np.multiply(z, phi(z), out),
            lambda z, h: phi(z) + density * z * np.exp(-0.5 * z * z),
        )

    k, c = math.sqrt(2.0 / math.pi), 0.044715

    def gate(z: np.ndarray) -> Any:
        return np.tanh(k * (z + c * z * z * z))

    def slope(z: np.ndarray, h: np.ndarray) -> Any:
        t = gate(z)
        return 0.5 * (1.0 + t) + 0.5 * k * z * (1.0 - t * t) * (1.0 + 3.0 * c * z * z)

    return Activation(lambda z, out: np.multiply(0.5 * z, 1.0 + gate(z), out), slope)


#: By the exact class of the torch module.
ACTIVATIONS: dict[type[nn.Module], Callable[[Any], Activation]] = {
    nn.Tanh: _tanh,
    nn.ReLU: _relu,
    nn.LeakyReLU: _leaky_relu,
    nn.ELU: _elu,
    nn.SiLU: _silu,
    nn.GELU: _gelu,
}

#: Weight and bias of each layer, or gradients or changes of them in the same shapes.
Pieces = list[tuple[np.ndarray, np.ndarray]]

#: Of two matrices, the result perhaps into memory made before
Product = Callable[..., np.ndarray]


@functools.lru_cache(maxsize=16)
def row_of_ones(n: int, dtype: Any) -> np.ndarray:
    """Return ones, (1, n), not to be written to."""
    return np.ones((1, n), dtype)


class Trace(NamedTuple):
    """What a forward pass leaves for the other two: of each layer, its input and the slope of its activation."""

    inputs: list[np.ndarray]
    slopes: list[np.ndarray | None]


class Mlp:
    """A chain of linear layers with activations.

    :param pieces: weight, (outputs, inputs), and bias of each layer
    :param activations: one for each layer; None passes numbers on as they are
    """

    def __init__(self, pieces: Pieces, activations: list[Activation | None]) -> None:
        self.pieces = pieces
        self.activations = activations
        self.size = sum(weight.size + bias.size for weight, bias in pieces)
        self._layers = [(w.T, b, f) for (w, b), f in zip(pieces, activations, strict=True)]
        self._functions = [(w, b, f and f.function) for w, b, f in self._layers]
        self.blas_has_one_thread = False  # so that its products need no care; to be set where that is looked at
        self._largest = max(weight.size for weight, _ in pieces)
        self._widest = max(max(weight.shape) for weight, _ in pieces)

    def _dot(self, n: int) -> Product:
        """Return the product for n rows: NumPy's own where its BLAS takes one thread for that of every layer."""
        is_small = n * self._largest <= MATRIX_LIMIT and n * self._widest < VECTOR_LIMIT
        is_small = is_small and (n > 1 or self._largest < VECTOR_LIMIT)
        return np.ndarray.dot if is_small or self.blas_has_one_thread else product

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Return the outputs, (n, outputs)."""
        if len(x) == 1 and self._largest < VECTOR_LIMIT:
            return self._of_one(x[0])[None]
        dot = self._dot(len(x))
        for weight, bias, function in self._functions:
            x = dot(x, weight)
            x += bias
            if function is not None:
                x = function(x, x)
        return x

    def _of_one(self, x: np.ndarray) -> np.ndarray:
        """Return the outputs of a single row (inputs,), which as a vector is faster."""
        for weight, bias, function in self._functions:
            x = x.dot(weight)
            x += bias
            if function is not None:
                x = function(x, x)
        return x

    def forward(self, x: np.ndarray) -> tuple[np.ndarray, Trace]:
        """Return the outputs and what ``backward`` and ``tangent`` need."""
        trace, dot = Trace([], []), self._dot(len(x))
        for weight, bias, activation in self._layers:
            trace.inputs.append(x)
            x = dot(x, weight)
            x += bias
            slope = None
            if activation is not None:
                z = x
                x = activation.function(z, None if activation.needs_z else z)
                slope = activation.slope(z, x)
            trace.slopes.append(slope)
        return x, trace

    def backward(self, trace: Trace, d: np.ndarray, gradient: Pieces, wants_dx: bool = False) -> np.ndarray | None:
        """Write the gradient J^T d, from the derivative by the outputs, (n, outputs).

        Per layer ``dz = dh f'(z)``, ``dW = dz^T h_before``, ``db = sum of dz``, ``dh_before = dz W``.

        :param gradient: where to write it
        :param wants_dx: return the derivative by the inputs, (n, inputs)
        """
        ones, dot = row_of_ones(len(d), d.dtype), self._dot(len(d))  # a product with ones sums faster than ``sum``
        last = len(self.pieces) - 1
        for layer in range(last, -1, -1):
            slope = trace.slopes[layer]
            if slope is not None:
                d = np.multiply(d, slope, out=None if layer == last else d)  # not into the caller's
            d_weight, d_bias = gradient[layer]
            dot(d.T, trace.inputs[layer], d_weight)
            dot(ones, d, d_bias[None])
            if layer or wants_dx:
                d = dot(d, self.pieces[layer][0])
        return d if wants_dx else None

    def tangent(self, trace: Trace, change: Pieces, d_x: np.ndarray | None = None) -> np.ndarray:
        """Return J v, how the outputs change with the weights.

        Per layer ``dh = f'(z) (dh_before W^T + h_before dW^T + db)``.

        :param change: of weights and biases
        :param d_x: of the inputs, (n, inputs); None for none, as of observations
        """
        t, dot = d_x, self._dot(len(trace.inputs[0]))
        for layer, (d_weight, d_bias) in enumerate(change):
            slope = trace.slopes[layer]
            dz = dot(trace.inputs[layer], d_weight.T)
            dz += d_bias
            if t is not None:
                dz += dot(t, self.pieces[layer][0].T)
            if slope is not None:
                dz *= slope
            t = dz
        assert t is not None
        return t

    def split(self, flat: np.ndarray) -> Pieces:
        """Return views of a flat vector in the shapes of the weights and biases."""
        views, start = [], 0
        for weight, bias in self.pieces:
            middle, end = start + weight.size, start + weight.size + bias.size
            views.append((flat[start:middle].reshape(weight.shape), flat[middle:end]))
            start = end
        return views

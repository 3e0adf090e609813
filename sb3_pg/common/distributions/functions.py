"""Functions of each number that several families need, of NumPy and of torch."""

from collections.abc import Callable

import numpy as np
import torch as th

from sb3_pg.common.arrays import Array, namespace


def softplus(x: Array) -> Array:
    """Return log(1 + exp(x)) without overflow."""
    xp = namespace(x)
    size = xp.abs(x)
    return xp.log1p(xp.exp(-size)) + 0.5 * (x + size)


def sigmoid(x: Array) -> Array:
    """Return 1 / (1 + exp(-x)) without overflow."""
    return 0.5 * (1.0 + namespace(x).tanh(0.5 * x))


def gammaln(x: Array) -> Array:
    """Return the logarithm of the gamma function."""
    return _by_torch(th.special.gammaln, x)


def digamma(x: Array) -> Array:
    """Return the derivative of ``gammaln``."""
    return _by_torch(th.special.digamma, x)


def trigamma(x: Array) -> Array:
    """Return the derivative of ``digamma``, to nine digits."""
    return _by_torch(lambda its: th.special.polygamma(1, its), x)


def erf(x: Array) -> Array:
    """Return the error function."""
    return _by_torch(th.special.erf, x)


def _by_torch(function: Callable[[th.Tensor], th.Tensor], x: Array) -> Array:
    """Return torch's function of an array of either library: NumPy has none of these."""
    if not isinstance(x, np.ndarray):
        return function(x)
    found: np.ndarray = function(th.from_numpy(x)).numpy()
    return found


def as_float64(x: Array) -> Array:
    """Return numbers in double precision."""
    return x.astype(np.float64, copy=False) if isinstance(x, np.ndarray) else x.double()


def in_type_of(x: Array, like: Array) -> Array:
    """Return numbers in the precision of others."""
    return namespace(x).astype(x, like.dtype)

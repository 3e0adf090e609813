"""Products of arrays of NumPy that never wait for another thread of the BLAS, whatever number it is set to.

A BLAS with several threads decides by the size of a product whether they share it. OpenBLAS, which NumPy's wheels
bring, keeps matrix products of up to ``MATRIX_LIMIT`` multiplications and products with a vector of less than
``VECTOR_LIMIT`` on the calling thread (its interface/gemm.c and gemv.c). Larger ones go to torch if this thread has
one thread there, as it has while a model learns, and in pieces to NumPy otherwise.
"""

import functools
from typing import Any

import numpy as np
import torch as th
from threadpoolctl import ThreadpoolController

from sb3_pg.common.arrays import Array

MATRIX_LIMIT = 1 << 18
VECTOR_LIMIT = 9216

#: Numbers of two vectors whose inner product stays on one thread (its kernel/x86_64/ddot.c).
INNER_LIMIT = 10_000


def blas_has_one_thread() -> bool:
    """Return whether NumPy's BLAS, and any other, is set to one thread, so that no product needs care."""
    return all(library.num_threads == 1 for library in _blas_libraries())


@functools.cache
def _blas_libraries() -> list[Any]:
    found: list[Any] = ThreadpoolController().select(user_api="blas").lib_controllers
    return found


def product(a: np.ndarray, b: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """Return ``a @ b`` on one thread.

    :param a: (n, k)
    :param b: (k, m), of the same type
    :param out: where to write the result, (n, m), contiguous in memory
    """
    (n, k), m = a.shape, b.shape[1]
    size, is_thin = n * k * m, n == 1 or m == 1
    if size < VECTOR_LIMIT or (size <= MATRIX_LIMIT and not is_thin):
        return np.dot(a, b, out)
    if out is None:
        out = np.empty((n, m), a.dtype)
    if n == m == 1:
        out[0, 0] = inner(a[0], b[:, 0])
        return out
    if is_thin and 2 * size <= MATRIX_LIMIT:  # as a matrix product the limit is higher, and it is as fast
        out[...] = np.dot(a.repeat(2, axis=0), b)[:1] if n == 1 else np.dot(a, b.repeat(2, axis=1))[:, :1]
    elif th.get_num_threads() == 1:
        th.mm(th.from_numpy(a), th.from_numpy(b), out=th.from_numpy(out))
    else:
        _in_tiles(a, b, out)
    return out


def _in_tiles(a: np.ndarray, b: np.ndarray, out: np.ndarray) -> None:
    """Write ``a @ b`` piece by piece, each within the limits."""
    (n, k), m = a.shape, b.shape[1]
    height = min(n, max(2, MATRIX_LIMIT // (64 * k)))
    limit = MATRIX_LIMIT if height > 1 and m > 1 else VECTOR_LIMIT - 1
    width = max(1, limit // (height * k))
    for row in range(0, n, height):
        for column in range(0, m, width):  # the last piece is as large as the others, so it overlaps
            top, left = min(row, n - height), max(0, min(column, m - width))
            here = np.s_[top : top + height, left : left + width]
            np.matmul(a[here[0]], b[:, here[1]], out=out[here])


def inner(a: Array, b: Array) -> float:
    """Return the inner product of two vectors, of NumPy on one thread, of torch on those that it has."""
    if not isinstance(a, np.ndarray):
        return float(a @ b)
    if len(a) <= INNER_LIMIT:
        return float(a.dot(b))
    pieces = range(0, len(a), INNER_LIMIT)
    return sum(float(a[start : start + INNER_LIMIT].dot(b[start : start + INNER_LIMIT])) for start in pieces)


def row_sums(x: Array) -> Array:
    """Return the sum of each row of (n, k), (n,), of NumPy on one thread."""
    if not isinstance(x, np.ndarray):
        return x.sum(-1)
    is_small = x.size < VECTOR_LIMIT  # then a product is faster, on a few columns
    sums: np.ndarray = x.dot(np.ones(x.shape[1], x.dtype)) if is_small else np.einsum("ij->i", x)
    return sums

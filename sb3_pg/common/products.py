"""Products of arrays of NumPy that never wait for another thread of the BLAS, whatever number it is set to.

A BLAS with several threads decides by the size of a product whether they share it. OpenBLAS, which NumPy's wheels
bring, keeps matrix products of up to ``MATRIX_LIMIT`` multiplications and products with a vector of less than
``VECTOR_LIMIT`` on the calling thread (its interface/gemm.c and gemv.c). Larger ones go to torch if this thread has
one thread there, as it has while a model learns. What is not much larger, and all of it otherwise, goes to NumPy in
pieces.
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
    height = 0 if is_thin or k == 1 else MATRIX_LIMIT // (k * m) // 8 * 8
    if is_thin and n != m and 2 * size <= MATRIX_LIMIT:  # as a matrix product the limit is higher, and it is as fast
        out[...] = np.dot(a.repeat(2, axis=0), b)[:1] if n == 1 else np.dot(a, b.repeat(2, axis=1))[:, :1]
    elif th.get_num_threads() == 1 and not (height and size <= 4 * MATRIX_LIMIT):
        th.mm(th.from_numpy(a), th.from_numpy(b), out=th.from_numpy(out))
    elif height:
        _by_rows(a, b, out, height)
    else:
        _by_halves(a, b, out)
    return out


def _by_rows(a: np.ndarray, b: np.ndarray, out: np.ndarray, height: int) -> None:
    """Write ``a @ b`` for so many rows at a time at most, a multiple of 8, which the BLAS's kernels like."""
    (n, k), m = a.shape, b.shape[1]
    height = -(-n // -(-n // height) // 8) * 8  # as large as the others, if possible
    count = n // height
    end = count * height
    b = np.ascontiguousarray(b)  # is read anew for each piece
    np.matmul(a[:end].reshape(count, height, k), b, out=out[:end].reshape(count, height, m))
    if end < n:
        product(a[end:], b, out[end:])


def _by_halves(a: np.ndarray, b: np.ndarray, out: np.ndarray) -> None:
    """Write ``a @ b`` as two products, along the longest dimension."""
    (n, k), m = a.shape, b.shape[1]
    half = max(n, k, m) // 2
    if half == n // 2:
        product(a[:half], b, out[:half])
        product(a[half:], b, out[half:])
    elif half == k // 2:
        product(a[:, :half], b[:half], out)
        out += product(a[:, half:], b[half:])
    else:
        out[:, :half] = product(a, b[:, :half])
        out[:, half:] = product(a, b[:, half:])


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

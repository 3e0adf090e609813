"""The two solvers of a trust-region step, on flat vectors of NumPy or torch."""

import math
from collections.abc import Callable
from typing import NamedTuple

from sb3_pg.common.arrays import Array
from sb3_pg.common.products import inner


class Solution(NamedTuple):
    """An approximate solution ``x`` of ``A x = b``."""

    x: Array
    iterations: int
    residual: float  # |b - A x| / |b|


def conjugate_gradient(
    product: Callable[[Array], Array], b: Array, max_steps: int, tolerance: float = 1e-5
) -> Solution:
    """Solve ``A x = b`` for a positive definite ``A`` by products ``A v`` alone.

    Starts from zero, so that after k steps x is the best solution within the span of b, A b, ..., A^(k-1) b
    (Hestenes and Stiefel 1952). The residual is orthogonal to that span, so that ``x.A x = x.b`` however soon it stops.

    :param product: v to A v
    :param b: right-hand side, flat
    :param max_steps: more give a more exact solution and cost one product each
    :param tolerance: stop when the residual is this fraction of ``b``
    """
    x = 0.0 * b
    residual, direction = b, b
    squared = start = inner(b, b)
    iteration = 0
    while iteration < max_steps and squared > tolerance * tolerance * start:
        curved = product(direction)
        curvature = inner(direction, curved)
        if not curvature > 0.0:  # A is not positive definite, or a number is not finite: keep what is there
            x = x if iteration else math.nan * b
            break
        alpha = squared / curvature
        x = x + alpha * direction
        residual = residual - alpha * curved
        previous, squared = squared, inner(residual, residual)
        direction = residual + (squared / previous) * direction
        iteration += 1
    relative = math.sqrt(squared / start) if start > 0.0 else 0.0
    return Solution(x, iteration, relative)


class Accepted(NamedTuple):
    """What a successful line search found."""

    fraction: float  # of the full step
    backtracks: int
    improvement: float
    kl: float


def backtracking_line_search(
    attempt: Callable[[float], tuple[float, float]], max_kl: float, shrinking_factor: float, max_steps: int
) -> Accepted | None:
    """Find the first fraction of a step that improves the surrogate inside the trust region.

    :param attempt: takes the fraction of the step and returns (improvement of the surrogate, KL) there
    :param max_kl: the KL must be below this
    :param shrinking_factor: the fraction is multiplied by it after a failure; closer to one searches more finely
    :param max_steps: how many fractions to try
    :return: the accepted step, or None if all failed; comparisons with NaN fail
    """
    fraction = 1.0
    for backtracks in range(max_steps):
        improvement, kl = attempt(fraction)
        if improvement > 0.0 and kl < max_kl:
            return Accepted(fraction, backtracks, improvement, kl)
        fraction *= shrinking_factor
    return None

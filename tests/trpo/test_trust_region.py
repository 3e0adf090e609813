"""Conjugate gradient and line search."""

import math

import numpy as np
import pytest
import torch as th

from sb3_pg.trpo.trust_region import backtracking_line_search, conjugate_gradient


def positive_definite(n, seed=0):
    root = np.random.default_rng(seed).normal(size=(n, n))
    return root @ root.T + 0.1 * np.eye(n)


@pytest.mark.parametrize("asarray", [np.asarray, th.as_tensor], ids=["numpy", "torch"])
@pytest.mark.parametrize("n", [1, 2, 5, 12])
def test_conjugate_gradient_solves(n, asarray):
    a, b = positive_definite(n), np.random.default_rng(1).normal(size=n)
    found = conjugate_gradient(lambda v: asarray(a) @ v, asarray(b), max_steps=4 * n, tolerance=1e-12)
    np.testing.assert_allclose(found.x, np.linalg.solve(a, b), rtol=1e-8)
    assert found.residual <= 1e-12 and n <= found.iterations <= 4 * n


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_conjugate_gradient_stopped_early_is_best_in_its_subspace(steps):
    """The best solution in the span of b, A b, ...: what is left is orthogonal to the span."""
    a, b = positive_definite(6), np.arange(1.0, 7.0)
    found = conjugate_gradient(lambda v: a @ v, b, steps)
    span = np.stack([np.linalg.matrix_power(a, k) @ b for k in range(steps)])
    rest = b - a @ found.x
    np.testing.assert_allclose(span @ rest / (np.linalg.norm(span, axis=1) * np.linalg.norm(rest)), 0, atol=1e-9)
    assert found.residual == pytest.approx(np.linalg.norm(rest) / np.linalg.norm(b))
    assert found.x @ b == pytest.approx(found.x @ a @ found.x)
    assert found.iterations == steps


def test_conjugate_gradient_stops_at_its_tolerance():
    a, b = positive_definite(30), np.ones(30)
    found = conjugate_gradient(lambda v: a @ v, b, 1000, tolerance=0.1)
    assert found.iterations < 30 and np.linalg.norm(b - a @ found.x) <= 0.1 * np.linalg.norm(b)


def test_conjugate_gradient_of_zero_is_zero():
    found = conjugate_gradient(lambda v: v, np.zeros(3), 10)
    assert (found.x == 0).all() and found.iterations == 0 and found.residual == 0


@pytest.mark.parametrize("bad", [-1.0, 0.0, math.nan])
def test_conjugate_gradient_without_curvature_has_no_solution(bad):
    found = conjugate_gradient(lambda v: bad * v, np.ones(3), 10)
    assert np.isnan(found.x).all() and found.iterations == 0


def test_conjugate_gradient_keeps_what_it_had_when_curvature_turns_negative():
    a, b = np.diag([10.0, -1.0]), np.array([1.0, 0.1])
    found = conjugate_gradient(lambda v: a @ v, b, 10)
    np.testing.assert_allclose(found.x, b * (b @ b) / (b @ a @ b))  # steepest descent, the first iteration
    assert found.iterations == 1


def test_line_search_takes_the_longest_step_that_qualifies():
    tried = []

    def attempt(fraction):
        tried.append(fraction)
        return {1.0: (1.0, 2.0), 0.5: (-1.0, 0.1), 0.25: (math.nan, 0.1), 0.125: (1.0, math.nan)}.get(
            fraction, (0.3, 0.2)
        )

    assert backtracking_line_search(attempt, 1.0, 0.5, 10) == (1 / 16, 4, 0.3, 0.2)
    assert backtracking_line_search(attempt, 1.0, 0.5, 4) is None
    assert tried == [1.0, 0.5, 0.25, 0.125, 0.0625] + [1.0, 0.5, 0.25, 0.125]

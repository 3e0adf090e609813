"""The distributions of Box actions against torch.distributions, numerical integrals and numerical differentiation."""

import itertools

import numpy as np
import pytest
import torch as th
from torch import distributions as td

from sb3_pg.common.distributions import Beta, Gaussian, SquashedGaussian
from sb3_pg.common.distributions.outputs import AboveOne, Bounded, OfOutputs

N = 5  # rows
BOUNDED = Bounded(-2.0, 1.0)


def squashed(mean, log_std):
    return td.TransformedDistribution(td.Normal(mean, log_std.exp()), [td.TanhTransform()])


def scaled_beta(alpha, beta):
    return td.TransformedDistribution(td.Beta(alpha, beta), [td.AffineTransform(-1.0, 2.0)])


def bounded(x):
    return -0.5 + 1.5 * th.tanh((x + 0.5) / 1.5)


def above_one(x):
    return 1.0 + th.nn.functional.softplus(x)


def halves(function, first, second):
    return lambda x: function(first(x[:, : x.shape[1] // 2]), second(x[:, x.shape[1] // 2 :]))


def same(x):
    return x


#: The family of k dimensions, its torch counterpart on squashed actions, how many numbers it takes for each dimension.
CASES = {
    "squashed": (SquashedGaussian, squashed, [1, 1]),
    "beta": (Beta, lambda a, b: scaled_beta(1.0 + a.exp(), 1.0 + b.exp()), [1, 1]),
    "beta of outputs": (
        lambda k: OfOutputs(Beta(k), [AboveOne()] * 2, takes_log_std=False),
        halves(scaled_beta, above_one, above_one),
        [2],
    ),
    "squashed of outputs": (
        lambda k: OfOutputs(SquashedGaussian(k), [None, BOUNDED], takes_log_std=False),
        halves(squashed, same, bounded),
        [2],
    ),
    "gaussian of outputs": (
        lambda k: OfOutputs(Gaussian(k), [None, BOUNDED], takes_log_std=False),
        halves(lambda mean, log_std: td.Normal(mean, log_std.exp()), same, bounded),
        [2],
    ),
    "bounded": (
        lambda k: OfOutputs(Gaussian(k), [None, BOUNDED], takes_log_std=True),
        lambda mean, x: td.Normal(mean, bounded(x).exp()),
        [1, 1],
    ),
}


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


@pytest.fixture(params=["numpy", "torch"])
def kind(request):
    return (lambda x: x) if request.param == "torch" else (lambda x: x.detach().numpy())


def draw(sizes, k=2, n=N, scale=1.0):
    return [scale * th.randn(n, size * k, dtype=th.float64) for size in sizes]


def of_family(case, leaves):
    """The parameters that the family takes; drawn are logarithms of what alpha and beta have above one."""
    return tuple(1.0 + x.exp() for x in leaves) if case is CASES["beta"] else tuple(leaves)


def action_of(case, u):
    """What torch's distribution knows of a recorded action."""
    return u if "gaussian" in name_of(case) or case is CASES["bounded"] else th.tanh(u)


def name_of(case):
    return next(name for name, its in CASES.items() if its is case)


#: How exact a mean under a squashed Gaussian is.
QUADRATURE = 4e-6


def close(found, expected, tolerance=1e-9):
    found, expected = (th.as_tensor(x).detach().double() for x in (found, expected))
    th.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def log_prob_of(reference, actions):
    return reference.log_prob(actions).sum(-1)


def test_log_prob(case, kind):
    make, reference, sizes = case
    leaves, u = draw(sizes), 1.5 * th.randn(N, 2, dtype=th.float64)
    expected = log_prob_of(reference(*leaves), action_of(case, u))
    parameters = tuple(map(kind, of_family(case, leaves)))
    close(make(2).log_prob(parameters, kind(u)), expected)
    close(make(2).evaluate(parameters, kind(u)).log_prob, expected)


def grid(case, parameters):
    """Recorded actions of one dimension, (points, 1), and what to sum over them with for means, (points,)."""
    u = th.linspace(-40.0, 40.0, 40_001, dtype=th.float64)[:, None]
    family = case[0](1)
    repeated = tuple(x.expand(len(u), -1) for x in parameters)
    log_p = family.log_prob(repeated, u)
    stretch = th.zeros(()) if action_of(case, u) is u else 2.0 * (np.log(2.0) - u - th.nn.functional.softplus(-2.0 * u))
    weights = (log_p + stretch.sum(-1)).exp() * (u[1] - u[0])
    close(weights.sum(), 1.0, 1e-9)
    return u, weights.detach(), log_p, repeated


def test_entropy_and_kl_are_integrals(case):
    make, _, sizes = case
    for _ in range(4):
        old, new = (of_family(case, draw(sizes, k=1, n=1)) for _ in range(2))
        u, weights, log_p, _ = grid(case, old)
        tolerance = QUADRATURE if "squashed" in name_of(case) else 1e-7
        close(make(1).entropy(old), [-(weights @ log_p)], tolerance)
        log_q = make(1).log_prob(tuple(x.expand(len(u), -1) for x in new), u)
        close(make(1).kl(old, new), [weights @ (log_p - log_q)], 1e-7)


@pytest.mark.parametrize("std", [0.01, 0.1, 0.5, 0.99, 1.01, 2.0, 3.0, np.exp(2.0), 20.0, np.exp(5.0)])
@pytest.mark.parametrize("mean", [0.0, 0.2, -1.3, 4.0, 12.0])
def test_means_of_a_squashed_gaussian_are_nearly_exact(mean, std, kind):
    """Entropy, its derivatives, and the mean action, however narrow or wide it is."""
    u = th.linspace(mean - 9 * std, mean + 9 * std, 200_001, dtype=th.float64)
    p = td.Normal(mean, std).log_prob(u).exp() * (u[1] - u[0])
    log_slope = 2.0 * (np.log(2.0) - u - th.nn.functional.softplus(-2.0 * u))
    parameters = tuple(kind(th.tensor([[x]], dtype=th.float64)) for x in (mean, np.log(std)))
    family = SquashedGaussian(1, takes_mean=True)
    close(family.entropy(parameters), [td.Normal(mean, std).entropy() + p @ log_slope], QUADRATURE)
    d_mean, d_log_std = family.evaluate(parameters, parameters[0]).pull(None, 1.0)
    close(d_mean, [[-2.0 * p @ u.tanh()]], QUADRATURE)
    close(d_log_std, [[1.0 - 2.0 * p @ ((u - mean) * u.tanh())]], QUADRATURE * max(1.0, std))
    close(np.tanh(np.asarray(family.mode(parameters))), [[p @ u.tanh()]], QUADRATURE)


def test_some_dimensions_may_be_wide_and_others_narrow(kind):
    mean, log_std = th.randn(N, 2, dtype=th.float64), th.tensor([-1.0, 2.0], dtype=th.float64)
    both = SquashedGaussian(2).entropy((kind(mean), kind(log_std)))
    parts = [SquashedGaussian(1).entropy((kind(mean[:, [i]]), kind(log_std[[i]]))) for i in (0, 1)]
    close(both, parts[0] + parts[1])


def test_kl_is_that_of_torch(case, kind):
    make, reference, sizes = case
    old, new = draw(sizes), draw(sizes)
    p, q = reference(*old), reference(*new)
    bases = [getattr(d, "base_dist", d) for d in (p, q)]  # a one-to-one function changes nothing
    mine, its = (tuple(map(kind, of_family(case, x))) for x in (old, new))
    close(make(2).kl(mine, its), td.kl_divergence(*bases).sum(-1))
    assert (make(2).kl(its, its) == 0).all()


def test_derivatives(case, kind):
    make, reference, sizes = case
    leaves, u = draw(sizes), th.randn(N, 2, dtype=th.float64)
    family, inputs = make(2), [x.requires_grad_() for x in of_family(case, leaves)]
    if case is CASES["beta"]:
        log_prob = scaled_beta(*inputs).log_prob(th.tanh(u)).sum(-1)
    else:
        log_prob = log_prob_of(reference(*inputs), action_of(case, u))
    entropy = family.entropy(tuple(inputs))
    pull = family.evaluate(tuple(kind(x.detach()) for x in inputs), kind(u)).pull
    ones, (d_log_prob, d_entropy) = th.ones(N, dtype=th.float64), th.randn(2, N, dtype=th.float64)
    for found, value in [
        (pull(kind(ones), None), log_prob),
        (pull(None, 1.0), entropy),
        (pull(kind(d_log_prob), kind(d_entropy)), d_log_prob * log_prob + d_entropy * entropy),
        (pull(kind(d_log_prob), -0.3), d_log_prob * log_prob - 0.3 * entropy),
        (pull(None, None), 0.0 * log_prob),
    ]:
        expected = th.autograd.grad(value.sum(), inputs, retain_graph=True, materialize_grads=True)
        for d, e in zip(found, expected, strict=True):
            close(d, e, QUADRATURE if "squashed" in name_of(case) else 1e-7)


def test_derivatives_are_differences(case):
    make, _, sizes = case
    family, parameters = make(2), [x.numpy() for x in of_family(case, draw(sizes))]
    u, rng, step = np.random.default_rng(0).normal(size=(N, 2)), np.random.default_rng(1), 1e-6
    direction = [rng.normal(size=x.shape) for x in parameters]
    ahead, behind = (tuple(x + s * d for x, d in zip(parameters, direction, strict=True)) for s in (step, -step))
    pull = family.evaluate(tuple(parameters), u).pull
    for found, function in [
        (pull(np.ones(N), None), lambda p: family.log_prob(p, u)),
        (pull(None, 1.0), family.entropy),
    ]:
        expected = (function(ahead) - function(behind)) / (2 * step)
        close(sum((a * d).sum(-1) for a, d in zip(found, direction, strict=True)), expected, QUADRATURE)


def test_fisher_is_the_expected_outer_product_of_scores(case, kind):
    make, _, sizes = case
    parameters = of_family(case, draw(sizes, k=1, n=1))
    leaves = [x.detach().requires_grad_() for x in parameters]
    _, weights, log_p, rows = grid(case, leaves)
    scores = th.cat(th.autograd.grad(log_p.sum(), rows, materialize_grads=True), dim=-1)
    dense = scores.T @ (weights[:, None] * scores)
    for i, one in enumerate(th.eye(sum(sizes), dtype=th.float64)):
        tangent = tuple(kind(x) for x in one[None].split(sizes, dim=-1))
        found = make(1).fisher(tuple(kind(x) for x in leaves))(tangent)
        close(th.cat([th.as_tensor(x) for x in found], dim=-1)[0], dense[i], 1e-6)


def test_fisher_is_the_hessian_of_kl(case):
    make, _, sizes = case
    family, widths = make(2), [2 * size for size in sizes]
    old, tangent = th.cat(of_family(case, draw(sizes, n=1)), dim=-1), th.randn(1, sum(widths), dtype=th.float64)
    _, expected = th.autograd.functional.hvp(
        lambda new: family.kl(old.split(widths, dim=-1), new.split(widths, dim=-1)).sum(), old, tangent
    )
    found = th.cat(family.fisher(old.split(widths, dim=-1))(tangent.split(widths, dim=-1)), dim=-1)
    close(found, expected, 1e-7)


def test_samples_follow_the_distribution(case):
    make, _, sizes = case
    n, (parameters,) = 40_000, [of_family(case, draw(sizes, k=1, n=1))]
    u, weights, _, _ = grid(case, parameters)
    edges = np.interp(np.linspace(0.0, 1.0, 21)[1:-1], weights.cumsum(0), u[:, 0])  # twentieths
    samples = make(1).sample(tuple(x.expand(n, -1).numpy() for x in parameters))
    counts = np.bincount(np.searchsorted(edges, samples[:, 0]), minlength=20)
    assert abs(((counts - n / 20) ** 2 / (n / 20)).sum() - 19) < 5 * np.sqrt(2 * 19)


def test_samples_repeat_with_the_seed(case):
    make, _, sizes = case
    parameters = tuple(x.numpy() for x in of_family(case, draw(sizes)))
    first, second = (th.manual_seed(3) and make(2).sample(parameters) for _ in range(2))
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("distribution", ["squashed", "beta"])
def test_mean_and_mode(distribution, kind):
    case = CASES[distribution]
    kinds = {"squashed": SquashedGaussian, "beta": Beta}
    parameters = of_family(case, draw(case[2], k=1, n=1))
    u, weights, log_p, _ = grid(case, parameters)
    its = tuple(map(kind, parameters))
    mean = kinds[distribution](1, takes_mean=True).mode(its)
    close(th.tanh(th.as_tensor(mean)), [[weights @ th.tanh(u[:, 0])]], 1e-5)
    mode = th.as_tensor(kinds[distribution](1).mode(its))
    # The most likely action of the beta distribution; of the squashed Gaussian, as in SB3, tanh of the Gaussian's.
    close(mode, u[log_p.argmax()][None] if distribution == "beta" else parameters[0], 2e-3)


def test_the_mode_of_a_uniform_beta_is_the_middle():
    ones = np.ones((1, 1), np.float32)
    assert Beta(1).mode((ones, ones)) == 0.0
    assert np.isfinite(Beta(1).mode((ones, 2.0 * ones))).all()


@pytest.mark.parametrize("dtype", [th.float32, th.float64])
@pytest.mark.parametrize("name", ["beta of outputs", "squashed of outputs", "gaussian of outputs"])
@pytest.mark.filterwarnings("error")
def test_extreme_outputs_and_actions_give_finite_numbers(name, kind, dtype):
    family = CASES[name][0](2)
    rows = th.tensor(list(itertools.product([-100.0, 0.0, 100.0], repeat=4)), dtype=dtype)
    p, q, ones = (kind(rows),), (kind(-rows),), kind(th.ones(len(rows), dtype=dtype))
    for size in (-20.0, 0.0, 20.0):  # where tanh rounds to the bounds
        actions = kind(th.full((len(rows), 2), size, dtype=dtype))
        log_prob, entropy, pull = family.evaluate(p, actions)
        for x in [log_prob, entropy, *pull(ones, None), *pull(None, 1.0), family.kl(p, q), *family.fisher(p)(p)]:
            assert th.as_tensor(x).isfinite().all()
            assert th.as_tensor(x).dtype is dtype
    assert (family.kl(p, q) >= 0).all()
    drawn = family.sample((rows.numpy(),)), family.mode((rows.numpy(),))
    assert all(np.isfinite(x).all() for x in drawn)


def test_bounds_have_a_slope_where_the_bound_is_all_that_single_precision_knows(kind):
    x = kind(th.tensor([-60.0, -35.0, 35.0, 60.0]))
    slope = th.as_tensor(BOUNDED.slope(x))
    assert slope.dtype is th.float32
    exact = 1.0 / th.cosh((th.tensor([-60.0, -35.0, 35.0, 60.0], dtype=th.float64) + 0.5) / 1.5) ** 2
    close(slope, exact, 1e-5)
    assert (slope > 0.0).all()


def test_bounds_are_kept_and_never_without_a_slope():
    x = th.linspace(-12.0, 12.0, 101, dtype=th.float64, requires_grad=True)
    found, slope = BOUNDED(x), BOUNDED.slope(x)
    assert (found > -2.0).all()
    assert (found < 1.0).all()
    assert (slope > 0.0).all()
    close(slope, th.autograd.grad(found.sum(), x)[0])
    extremes = BOUNDED(np.array([-np.inf, -1e30, 1e30, np.inf], np.float32))
    np.testing.assert_array_equal(extremes, [-2.0, -2.0, 1.0, 1.0])
    for y in (-1.9, 0.0, 0.9):
        assert BOUNDED(th.tensor(BOUNDED.inverse(y), dtype=th.float64)) == pytest.approx(y)


def test_one_log_std_serves_all_rows(kind):
    for family in (CASES["bounded"][0](2), SquashedGaussian(2)):
        mean, log_std = draw([1])[0], th.randn(2, dtype=th.float64)
        actions = kind(th.randn(N, 2, dtype=th.float64))
        once, repeated = ((kind(mean), kind(x)) for x in (log_std, log_std.expand(N, -1)))
        evaluated, expected = (family.evaluate(parameters, actions) for parameters in (once, repeated))
        for a, b in zip(evaluated[:2], expected[:2], strict=True):
            close(a, b)
        ones = kind(th.ones(N, dtype=th.float64))
        for a, b in zip(evaluated.pull(ones, 1.0), expected.pull(ones, 1.0), strict=True):
            close(a, b)

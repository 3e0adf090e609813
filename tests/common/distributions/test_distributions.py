"""Each family's formulas against torch.distributions, autograd, and sums over all actions."""

import itertools
import threading

import numpy as np
import pytest
import torch as th
from stable_baselines3.common import distributions as sb3
from torch import distributions as td

from sb3_pg.common.distributions import Bernoulli, Categorical, Gaussian, describe, family_of
from sb3_pg.common.distributions import draw as draw_actions

N = 7  # rows


def normal(mean, log_std):
    return [td.Normal(mean, log_std.exp())]


def categorical(*sizes):
    return lambda logits: [td.Categorical(logits=block) for block in logits.split(sizes, dim=-1)]


def bernoulli(logits):
    return [td.Bernoulli(logits=logits)]


#: family, its torch counterpart (a list of independent distributions), sizes of its parameters
CASES = {
    "gaussian": (Gaussian(2), normal, [2, 2]),
    "categorical": (Categorical([5]), categorical(5), [5]),
    "multicategorical": (Categorical([2, 3, 1]), categorical(2, 3, 1), [6]),
    "bernoulli": (Bernoulli(3), bernoulli, [3]),
}


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


@pytest.fixture(params=["numpy", "torch"])
def kind(request):
    """What the family is given: torch tensors or NumPy arrays."""
    return (lambda x: x) if request.param == "torch" else (lambda x: x.detach().numpy())


def draw(sizes, n=N, scale=1.5):
    return [scale * th.randn(n, size, dtype=th.float64) for size in sizes]


def total(parts):
    """The sum over action dimensions of quantities of independent distributions, (n,)."""
    return sum(x if x.ndim == 1 else x.sum(dim=-1) for x in parts)


def actions_of(reference):
    """Random actions in the form that the family takes."""
    samples = [d.sample() for d in reference]
    return samples[0] if len(samples) == 1 else th.stack(samples, dim=-1)


def log_prob_of(reference, actions):
    each = [actions] if len(reference) == 1 else actions.unbind(dim=-1)
    return total(d.log_prob(a) for d, a in zip(reference, each, strict=True))


def close(found, expected, tolerance=1e-10):
    th.testing.assert_close(th.as_tensor(found), expected.detach(), rtol=tolerance, atol=tolerance)


def test_values(case, kind):
    family, torch_counterpart, sizes = case
    old, new = draw(sizes), draw(sizes)
    p, q = torch_counterpart(*old), torch_counterpart(*new)
    actions = actions_of(q)
    mine, its = tuple(map(kind, old)), tuple(map(kind, new))
    log_prob, entropy, _ = family.evaluate(its, kind(actions))
    for found in (family.log_prob(its, kind(actions)), log_prob):
        close(found, log_prob_of(q, actions))
    for found in (family.entropy(its), entropy):
        close(found, total(d.entropy() for d in q))
    close(family.kl(mine, its), total(td.kl_divergence(a, b) for a, b in zip(p, q, strict=True)))
    assert (family.kl(its, its) == 0).all()
    modes = [d.mode for d in q]
    close(family.mode(its), modes[0] if len(modes) == 1 else th.stack(modes, dim=-1))


def test_derivatives(case, kind):
    family, torch_counterpart, sizes = case
    leaves = [x.requires_grad_() for x in draw(sizes)]
    reference = torch_counterpart(*leaves)
    actions = actions_of(reference)
    pull = family.evaluate(tuple(kind(x.detach()) for x in leaves), kind(actions)).pull
    log_prob, entropy = log_prob_of(reference, actions), total(d.entropy() for d in reference)
    ones, (d_log_prob, d_entropy) = th.ones(N, dtype=th.float64), th.randn(2, N, dtype=th.float64)
    for found, value in [
        (pull(kind(ones), None), log_prob),
        (pull(None, 1.0), entropy),
        (pull(None, kind(ones)), entropy),
        (pull(kind(d_log_prob), kind(d_entropy)), d_log_prob * log_prob + d_entropy * entropy),
        (pull(kind(d_log_prob), -0.3), d_log_prob * log_prob - 0.3 * entropy),
        (pull(None, None), 0.0 * log_prob),
    ]:
        expected = th.autograd.grad(value.sum(), leaves, retain_graph=True, materialize_grads=True)
        for d, e in zip(found, expected, strict=True):
            close(d, e)


def all_actions(family, reference):
    """Every action and its probability, (n_actions, n, ...) and (n_actions, n); for a Gaussian the nodes and
    weights of a quadrature that is exact for the polynomials in question.
    """
    if isinstance(family, Gaussian):
        nodes, weights = (th.as_tensor(x) for x in np.polynomial.hermite_e.hermegauss(5))
        grid = [list(ij) for ij in itertools.product(range(5), repeat=2)]
        actions = th.stack([reference[0].mean + reference[0].stddev * nodes[ij] for ij in grid])
        return actions.detach(), th.stack([weights[ij].prod().expand(N) / (2 * np.pi) for ij in grid])
    actions = [joint(family, option) for option in itertools.product(*map(range, choices(family)))]
    actions = th.stack([a.expand(N, *a.shape[1:]) for a in actions])
    return actions, th.stack([log_prob_of(reference, a).exp() for a in actions]).detach()


def choices(family):
    """How many options each dimension of a discrete action has."""
    return [2] * family.n_dims if isinstance(family, Bernoulli) else [b.stop - b.start for b in family.blocks]


def joint(family, option):
    """One row of actions, in the form that the family takes."""
    if isinstance(family, Bernoulli):
        return th.tensor([option], dtype=th.float64)
    return th.tensor(option) if len(option) == 1 else th.tensor([option])


def test_fisher_is_the_expected_outer_product_of_scores(case, kind):
    family, torch_counterpart, sizes = case
    leaves = [x.requires_grad_() for x in draw(sizes)]
    reference = torch_counterpart(*leaves)
    actions, weights = all_actions(family, reference)
    assert th.allclose(weights.sum(dim=0), th.ones(N, dtype=weights.dtype))
    tangent = draw(sizes)
    expected = th.zeros(N, sum(sizes), dtype=th.float64)
    for action, weight in zip(actions, weights, strict=True):
        score = th.cat(th.autograd.grad(log_prob_of(reference, action).sum(), leaves, retain_graph=True), dim=-1)
        expected += weight[:, None] * score * (score * th.cat(tangent, dim=-1)).sum(dim=-1, keepdim=True)
    found = family.fisher(tuple(kind(x) for x in leaves))(tuple(map(kind, tangent)))
    close(th.cat([th.as_tensor(x).detach() for x in found], dim=-1), expected)


def test_fisher_is_the_hessian_of_kl(case):
    family, _, sizes = case
    (old,), tangent = draw([sum(sizes)], n=1), draw([sum(sizes)], n=1)[0]

    def kl(new):
        return family.kl(old.split(sizes, dim=-1), new.split(sizes, dim=-1)).sum()

    _, expected = th.autograd.functional.hvp(kl, old, tangent)
    found = th.cat(family.fisher(old.split(sizes, dim=-1))(tangent.split(sizes, dim=-1)), dim=-1)
    close(found, expected)


def chi_square_is_plausible(counts, probabilities):
    """Whether frequencies could come from these probabilities: a statistic 5 deviations out has one chance in 1e5."""
    expected = counts.sum() * probabilities
    used = expected > 0
    assert counts[~used].sum() == 0
    degrees = used.sum() - 1
    statistic = ((counts - expected)[used] ** 2 / expected[used]).sum()
    return abs(statistic - degrees) < 5 * np.sqrt(2 * degrees)


@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_samples_follow_the_distribution(case, scale):
    family, torch_counterpart, sizes = case
    n = 40_000
    row = draw(sizes, n=1, scale=scale)
    reference = torch_counterpart(*row)
    samples = th.as_tensor(family.sample(tuple(x.expand(n, -1).numpy() for x in row)))
    if isinstance(family, Gaussian):  # uniform on the cells of a grid of quantiles
        cells = (reference[0].cdf(samples) * 6).long().clamp(max=5)
        counts, probabilities = th.bincount(cells[:, 0] * 6 + cells[:, 1], minlength=36), np.full(36, 1 / 36)
    else:
        options = list(itertools.product(*map(range, choices(family))))
        probabilities = np.array([log_prob_of(reference, joint(family, x)).exp().item() for x in options])
        counts = th.tensor([(samples.reshape(n, -1) == th.tensor(x)).all(dim=1).sum() for x in options])
    assert chi_square_is_plausible(counts.numpy(), probabilities)


def test_samples_repeat_with_the_seed(case):
    family, *_ = case
    th.manual_seed(3)
    first = family.noise(4).copy()
    th.manual_seed(3)
    np.testing.assert_array_equal(first, family.noise(4))


@pytest.mark.parametrize("dtype", [th.float32, th.float64])
@pytest.mark.parametrize("size", [1e2, 1e3])
@pytest.mark.parametrize("name", ["categorical", "multicategorical", "bernoulli"])
@pytest.mark.filterwarnings("error")
def test_extreme_logits_give_finite_numbers(name, kind, size, dtype):
    family, torch_counterpart, (n_logits,) = CASES[name]
    signs = th.tensor(list(itertools.product([-1.0, 0.0, 1.0], repeat=n_logits)), dtype=dtype)
    p, q = (kind(size * signs),), (kind(-size * signs),)
    actions = kind(actions_of(torch_counterpart(0.0 * signs)))
    tangent = (kind(th.ones_like(signs)),)
    log_prob, entropy, pull = family.evaluate(p, actions)
    for x in [
        family.log_prob(p, actions),
        log_prob,
        *pull(kind(th.ones(len(signs), dtype=dtype)), None),
        family.entropy(p),
        entropy,
        *pull(None, 1.0),
        family.kl(p, q),
        *family.fisher(p)(tangent),
    ]:
        assert th.as_tensor(x).isfinite().all()
    assert (family.entropy(p) > -1e-6).all() and (family.kl(p, q) >= 0).all()


def test_one_log_std_serves_all_rows(kind):
    """The closed form passes it once, not once per row."""
    family = Gaussian(2)
    mean, other, log_std = *draw([2, 2]), th.randn(2, dtype=th.float64)
    actions = kind(th.randn(N, 2, dtype=th.float64))
    once, repeated = ((kind(mean), kind(x)) for x in (log_std, log_std.expand(N, -1)))
    close(family.log_prob(once, actions), th.as_tensor(family.log_prob(repeated, actions)))
    close(family.entropy(once), th.as_tensor(family.entropy(repeated)))
    evaluated, expected = (family.evaluate(parameters, actions) for parameters in (once, repeated))
    for a, b in zip(evaluated[:2], expected[:2], strict=True):
        close(a, th.as_tensor(b))
    ones = kind(th.ones(N, dtype=th.float64))
    for ds in [(ones, None), (None, 1.0), (ones, ones)]:
        for a, b in zip(evaluated.pull(*ds), expected.pull(*ds), strict=True):
            close(a, th.as_tensor(b))
    kl = family.kl((kind(other), once[1]), once)
    close(kl, th.as_tensor(family.kl((kind(other), repeated[1]), repeated)))


def on_leaves(distribution, *shapes):
    """The distribution with random parameters, and those."""
    leaves = [th.randn(N, *shape, dtype=th.float64, requires_grad=True) for shape in shapes]
    return distribution.proba_distribution(*leaves), leaves


def state_dependent(squash_output):
    distribution = sb3.StateDependentNoiseDistribution(2, full_std=True, squash_output=squash_output)
    _, log_std = distribution.proba_distribution_net(latent_dim=4, log_std_init=-0.5)
    mean, latent = (th.randn(N, k, requires_grad=True) for k in (2, 4))
    return distribution.proba_distribution(mean, log_std, latent), [mean, log_std]


@pytest.mark.parametrize(
    ("make", "family"),
    [
        (lambda: on_leaves(sb3.DiagGaussianDistribution(2), (2,), (2,)), Gaussian),
        (lambda: on_leaves(sb3.CategoricalDistribution(4), (4,)), Categorical),
        (lambda: on_leaves(sb3.MultiCategoricalDistribution([2, 3]), (5,)), Categorical),
        (lambda: on_leaves(sb3.BernoulliDistribution(3), (3,)), Bernoulli),
        (lambda: state_dependent(squash_output=False), Gaussian),
    ],
)
def test_describe_keeps_values_and_graph(make, family):
    distribution, leaves = make()
    found, parameters = describe(distribution)
    assert type(found) is family
    actions = distribution.sample()
    close(found.log_prob(parameters, actions).detach(), distribution.log_prob(actions), 1e-5)
    close(found.entropy(parameters).detach(), distribution.entropy(), 1e-5)
    for theirs, ours in zip(
        th.autograd.grad(distribution.log_prob(actions).sum(), leaves, retain_graph=True),
        th.autograd.grad(found.log_prob(parameters, actions).sum(), leaves),
        strict=True,
    ):
        close(ours, theirs, 1e-5)


@pytest.mark.parametrize(
    "make",
    [
        lambda: on_leaves(sb3.SquashedDiagGaussianDistribution(2), (2,), (2,)),
        lambda: state_dependent(squash_output=True),
    ],
)
def test_squashed_gaussians_are_described_before_squashing(make):
    """A bijection changes neither KL nor Fisher matrix."""
    distribution, _ = make()
    found, (mean, log_std) = describe(distribution)
    assert type(found) is Gaussian
    close(mean.detach(), distribution.distribution.mean)
    close(log_std.detach().exp(), distribution.distribution.stddev, 1e-6)


def test_an_unknown_distribution_is_not_described():
    distribution = sb3.DiagGaussianDistribution(2)
    distribution.distribution = td.Beta(th.ones(N, 2), th.ones(N, 2))
    assert describe(distribution) is None


class OwnCategorical(sb3.CategoricalDistribution):
    pass


@pytest.mark.parametrize(
    ("distribution", "family"),
    [
        (sb3.DiagGaussianDistribution(2), Gaussian),
        (sb3.CategoricalDistribution(4), Categorical),
        (sb3.MultiCategoricalDistribution([2, 3]), Categorical),
        (sb3.BernoulliDistribution(3), Bernoulli),
        (sb3.SquashedDiagGaussianDistribution(2), type(None)),
        (sb3.StateDependentNoiseDistribution(2), type(None)),
        (OwnCategorical(4), type(None)),
    ],
)
def test_families_are_known_by_the_class_alone(distribution, family):
    """Before the distribution has any parameters, as in a policy that has not acted."""
    found = family_of(distribution)
    assert type(found) is family
    if family is Categorical:
        assert found.blocks[-1].stop == sum(getattr(distribution, "action_dims", [4]))
    elif family is not type(None):
        assert found.n_dims == getattr(distribution, "action_dim", 3)


def test_noise_that_another_thread_draws_leaves_ours_alone(case):
    family = case[0]
    noise = family.noise(N)
    before = noise.copy()
    other = threading.Thread(target=family.noise, args=(N,))
    other.start()
    other.join()
    np.testing.assert_array_equal(noise, before)


@pytest.mark.parametrize("deterministic", [True, False])
def test_draw(case, deterministic):
    family, _, sizes = case
    parameters = tuple(x.numpy() for x in draw(sizes))
    th.manual_seed(0)
    expected = family.mode(parameters) if deterministic else family.sample(parameters)
    th.manual_seed(0)
    np.testing.assert_array_equal(draw_actions(family, parameters, deterministic), expected)

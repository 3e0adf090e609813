"""Masks of allowed actions on both engines: what is forbidden has no probability and no gradient."""

import itertools

import numpy as np
import pytest
import torch as th
from conftest import ACTION_SPACES
from engine_cases import N, assert_same_gradients, close, draw, gradients, make_batch, make_policy
from torch import distributions as td
from torch_reference import actor_parameters, flat, order_of

from sb3_pg.common.distributions import Categorical, masked
from sb3_pg.common.engines.autograd import AutogradEngine
from sb3_pg.common.engines.choice import make_engine
from sb3_pg.common.engines.closed_form import ClosedFormEngine
from sb3_pg.common.engines.protocol import Seen

ENGINES = {"auto": ClosedFormEngine, "autograd": AutogradEngine}
SIZES = {"discrete": [3], "multidiscrete": [2, 4]}


@pytest.fixture(params=itertools.product(SIZES, ENGINES), ids="-".join)
def case(request, double):
    """A float64 policy and its engine, a masked batch of allowed actions, and the sizes of the choices."""
    kind, name = request.param
    policy = double(make_policy(kind))
    sizes = SIZES[kind]
    engine = make_engine(policy, name)
    assert type(engine) is ENGINES[name]
    observations, _ = draw(policy)
    masks, actions = some_masks(sizes)
    return policy, engine, make_batch(engine, observations, actions, masks=masks), sizes


def some_masks(sizes, n=N):
    """Every pattern in turn that leaves each choice an option, and an allowed action for each row."""
    patterns = [[p for p in itertools.product([True, False], repeat=size) if any(p)] for size in sizes]
    rng = np.random.default_rng(0)
    blocks = [np.array(p)[rng.permutation(np.arange(n) % len(p))] for p in patterns]
    actions = [[rng.choice(np.flatnonzero(row)) for row in block] for block in blocks]
    return np.concatenate(blocks, axis=1), np.array(actions).T


def logits_of(policy, observations):
    features = policy.extract_features(th.as_tensor(observations))
    return policy.action_net(policy.mlp_extractor.forward_actor(features))


def allowed_only(logits, masks, sizes):
    """For each row and choice a torch distribution over the allowed options, and the numbers of those."""
    rows = []
    for row, mask in zip(logits, th.as_tensor(masks), strict=True):
        blocks = zip(row.split(sizes), mask.split(sizes), strict=True)
        rows.append([(td.Categorical(logits=x[m]), th.nonzero(m).flatten().tolist()) for x, m in blocks])
    return rows


def likelihood(rows, actions):
    """Log-probability and entropy of each row, (n,)."""
    actions = np.asarray(actions).reshape(len(rows), -1)
    log_prob = [
        sum(d.log_prob(th.tensor(options.index(a))) for (d, options), a in zip(row, action, strict=True))
        for row, action in zip(rows, actions, strict=True)
    ]
    return th.stack(log_prob), th.stack([sum(d.entropy() for d, _ in row) for row in rows])


def kl(old, new):
    """KL(old || new) of each row, (n,)."""
    pairs = [zip(x, y, strict=True) for x, y in zip(old, new, strict=True)]
    return th.stack([sum(td.kl_divergence(p, q) for (p, _), (q, _) in row) for row in pairs])


def test_likelihoods_are_those_among_the_allowed(case):
    policy, engine, batch, sizes = case
    evaluation = engine.evaluate(batch)
    log_prob, entropy = likelihood(
        allowed_only(logits_of(policy, batch.observations), batch.masks, sizes), batch.actions
    )
    close(evaluation.log_prob, log_prob)
    close(evaluation.entropy, entropy)
    assert (evaluation.entropy > -1e-12).all()
    old = engine.actor(batch).old
    close(old.log_prob, log_prob)
    close(old.entropy, entropy)
    with_others = engine.evaluate(make_batch(engine, batch.observations, batch.actions))
    assert (with_others.log_prob < evaluation.log_prob + 1e-12).all()
    assert np.abs(with_others.log_prob - evaluation.log_prob).max() > 0.1
    np.testing.assert_array_equal(with_others.value, evaluation.value)


def test_gradients_are_autograds_among_the_allowed(case):
    policy, engine, batch, sizes = case
    d_log_prob, d_value = np.random.default_rng(1).normal(size=(2, N))
    rows = allowed_only(logits_of(policy, batch.observations), batch.masks, sizes)
    log_prob, entropy = likelihood(rows, batch.actions)
    value = policy.predict_values(th.as_tensor(batch.observations)).flatten()
    loss = (th.as_tensor(d_log_prob) * log_prob - 0.3 * entropy + th.as_tensor(d_value) * value).mean()
    policy.zero_grad(set_to_none=True)
    loss.backward()
    expected = gradients(policy)
    d_log_prob, d_value = engine.asarray(d_log_prob), engine.asarray(d_value)
    engine.evaluate(batch).backward(d_log_prob, -0.3, d_value)
    assert_same_gradients(gradients(policy), expected)
    actor, parameters = engine.actor(batch), actor_parameters(policy)
    its = [expected[name] for name, p in policy.named_parameters() if any(p is x for x in parameters)]
    close(actor.gradient(d_log_prob, -0.3)[order_of(actor, parameters)], flat(its))


def test_kl_and_fisher_matrix_are_those_among_the_allowed(case):
    policy, engine, batch, sizes = case
    actor, parameters = engine.actor(batch), actor_parameters(policy)
    order = order_of(actor, parameters)
    new = allowed_only(logits_of(policy, batch.observations), batch.masks, sizes)
    old = [[(td.Categorical(logits=d.logits.detach()), options) for d, options in row] for row in new]
    gradient = th.autograd.grad(kl(old, new).mean(), parameters, create_graph=True)
    product = actor.fisher()
    for seed in range(3):
        vector = th.as_tensor(np.random.default_rng(seed).normal(size=len(order)))[order]
        inner = (th.cat([x.reshape(-1) for x in gradient]) * vector).sum()
        expected = flat(th.autograd.grad(inner, parameters, retain_graph=True))
        full = np.empty(len(order))
        full[order] = vector
        close(product(engine.asarray(full))[order], expected)
    assert (actor.look().kl == 0).all()
    actor.vector = actor.vector + engine.asarray(0.3 * np.random.default_rng(9).normal(size=len(order)))
    with th.no_grad():
        moved = allowed_only(logits_of(policy, batch.observations), batch.masks, sizes)
    close(actor.look().kl, kl(old, moved))
    assert actor.look().kl.max() > 1e-3
    close(actor.look().log_prob, likelihood(moved, batch.actions)[0])


def test_masks_that_allow_everything_change_nothing(case):
    policy, engine, batch, _ = case
    d = engine.asarray(np.random.default_rng(1).normal(size=N))
    found = []
    for masks in ({}, {"masks": np.ones_like(batch.masks)}):
        evaluation = engine.evaluate(make_batch(engine, batch.observations, batch.actions, **masks))
        evaluation.backward(d, -0.3, d)
        found.append(gradients(policy) | {"log_prob": evaluation.log_prob, "entropy": evaluation.entropy})
    for name, x in found[0].items():
        np.testing.assert_array_equal(x, found[1][name])
    observations = np.asarray(batch.observations)
    acted = []
    for masks in (None, np.ones_like(batch.masks)):
        th.manual_seed(3)
        acted.append(engine.act(Seen(observations, masks)).actions)
    np.testing.assert_array_equal(*acted)


@pytest.mark.parametrize("scale", [1.0, 300.0])
@pytest.mark.parametrize("action", SIZES)
@pytest.mark.filterwarnings("error")
def test_numbers_stay_finite_in_float32(action, scale):
    """Also where only one action is allowed, and where the forbidden ones are those that the policy wants."""
    policy, sizes = make_policy(action), SIZES[action]
    with th.no_grad():
        policy.action_net.weight *= scale
        policy.action_net.bias.copy_(scale * th.linspace(-1, 1, sum(sizes)))
    engine = make_engine(policy)
    n = 60
    observations, _ = draw(policy, n)
    masks, actions = some_masks(sizes, n)
    single = masks.sum(axis=1) == len(sizes)
    assert single.any()
    batch = make_batch(engine, observations, actions, masks=masks)
    with np.errstate(all="raise"):
        evaluation = engine.evaluate(batch)
        evaluation.backward(np.ones(n, np.float32), -0.1, np.ones(n, np.float32))
        actor = engine.actor(batch)
        gradient = actor.gradient(np.ones(n, np.float32), -0.1)
        product = actor.fisher()(np.ones_like(gradient))
        look = actor.look()
    for x in (evaluation.log_prob, evaluation.entropy, gradient, product, *look):
        assert np.isfinite(x).all()
    assert all(np.isfinite(p.grad.numpy()).all() for p in policy.parameters())
    assert (evaluation.log_prob[single] == 0).all()
    assert (evaluation.entropy[single] == 0).all()
    assert (look.kl == 0).all()


@pytest.mark.parametrize("action", SIZES)
def test_rows_with_one_allowed_action_give_no_gradient(action):
    policy, sizes = make_policy(action), SIZES[action]
    engine = make_engine(policy)
    masks, actions = some_masks(sizes, 60)
    single = masks.sum(axis=1) == len(sizes)
    masks, actions = masks[single], actions[single]
    batch = make_batch(engine, draw(policy, len(masks))[0], actions, masks=masks)
    engine.evaluate(batch).backward(np.ones(len(masks), np.float32), -0.1)
    assert all((p.grad == 0).all() for p in actor_parameters(policy))


@pytest.mark.parametrize("action", SIZES)
def test_forbidden_actions_are_never_chosen(action):
    """And the others as often as the distribution among them says."""
    policy, sizes, n = make_policy(action), SIZES[action], 40
    engine = make_engine(policy)
    ends = np.cumsum(sizes)
    for mask, _ in zip(some_masks(sizes, n)[0], range(8), strict=False):
        row = draw(policy, 1)[0]
        masks = np.tile(mask, (n, 1))
        seen = Seen(row.repeat(n, axis=0), masks)
        samples = np.concatenate([engine.act(seen).actions for _ in range(100)]).reshape(100 * n, -1)
        with th.no_grad():
            (distributions,) = allowed_only(logits_of(policy, row), mask[None], sizes)
        best = engine.act(seen, deterministic=True).actions.reshape(n, -1)
        for i, (distribution, options) in enumerate(distributions):
            assert set(np.unique(samples[:, i])) <= set(options)
            frequency = np.array([(samples[:, i] == option).mean() for option in options])
            p = distribution.probs.numpy()
            assert (np.abs(frequency - p) < 4 * np.sqrt(p * (1 - p) / len(samples)) + 1e-4).all()
            assert (best[:, i] == options[int(p.argmax())]).all()
            assert mask[ends[i] - sizes[i] : ends[i]][best[0, i]]


def test_each_environment_has_its_own_mask():
    policy = make_policy("discrete")
    engine = make_engine(policy)
    masks = np.eye(3, dtype=bool)
    observations, _ = draw(policy, 3)
    for deterministic in (False, True):
        np.testing.assert_array_equal(engine.act(Seen(observations, masks), deterministic).actions, [0, 1, 2])


@pytest.mark.parametrize("asarray", [np.asarray, th.as_tensor], ids=["numpy", "torch"])
def test_masked_logits(asarray):
    logits = np.random.default_rng(0).normal(size=(4, 3))
    masks = np.array([[1, 1, 1], [1, 0, 1], [0, 0, 1], [0, 1, 0]], dtype=bool)
    before = logits.copy()
    assert masked(logits, None) is logits
    found = masked(asarray(logits), asarray(masks))
    np.testing.assert_array_equal(logits, before)
    np.testing.assert_array_equal(np.asarray(found)[masks], logits[masks])
    family = Categorical([3])
    for action in range(3):
        p = np.exp(np.asarray(family.log_prob((found,), asarray(np.full(4, action)))))
        np.testing.assert_array_equal(p > 0, masks[:, action])


def test_all_masks_are_tried():
    masks, actions = some_masks([2, 4], 60)
    assert len(np.unique(masks[:, 2:], axis=0)) == 15
    assert masks[np.arange(60), actions[:, 0]].all()
    assert masks[np.arange(60), 2 + actions[:, 1]].all()
    assert set(SIZES) <= set(ACTION_SPACES)

"""Samples that count differently: every gradient and mean is that of the weighted mean."""

import numpy as np
import pytest
import torch as th
from conftest import ACTION_SPACES
from engine_cases import N, assert_same_gradients, close, draw, gradients, make_batch, make_policy
from torch_reference import actor_parameters, dense_fisher, flat, order_of

from sb3_pg.common.engines import autograd
from sb3_pg.common.engines.choice import make_engine

WEIGHT = np.random.default_rng(7).dirichlet(np.ones(N))
SOME_ZERO = np.where(np.arange(N) % 3 == 1, 0.0, WEIGHT)
SOME_ZERO /= SOME_ZERO.sum()
D_LOG_PROB, D_VALUE = np.random.default_rng(8).normal(size=(2, N))
D_ENTROPY = -0.3

ENGINES = pytest.mark.parametrize("engine", ["auto", "autograd"])
ACTIONS = pytest.mark.parametrize("action", ACTION_SPACES)


@pytest.fixture(params=ACTION_SPACES)
def policy(request, double):
    return double(make_policy(request.param))


def weighted_loss(policy, batch, weight):
    """The loss whose derivatives by each sample's numbers are those above."""
    value, log_prob, entropy = policy.evaluate_actions(th.as_tensor(batch.observations), th.as_tensor(batch.actions))
    actor = th.as_tensor(D_LOG_PROB) * log_prob + D_ENTROPY * entropy
    weight = th.as_tensor(weight)
    return (weight * actor).sum(), (weight * th.as_tensor(D_VALUE) * value.flatten()).sum()


@ENGINES
@pytest.mark.parametrize("weight", [WEIGHT, SOME_ZERO, None], ids=["positive", "some zero", "none"])
def test_backward_is_the_gradient_of_the_weighted_mean(policy, engine, weight):
    engine = make_engine(policy, engine)
    batch = make_batch(engine, *draw(policy), **({} if weight is None else {"weight": weight}))
    expected = {}
    for part, loss in zip(
        ("actor", "critic"), weighted_loss(policy, batch, np.full(N, 1 / N) if weight is None else weight), strict=True
    ):
        policy.zero_grad(set_to_none=True)
        loss.backward()
        expected[part] = gradients(policy)
    expected["both"] = {k: expected["critic"][k] if x is None else x for k, x in expected["actor"].items()}
    d_log_prob, d_value = map(engine.asarray, (D_LOG_PROB, D_VALUE))
    engine.evaluate(batch).backward(d_log_prob, D_ENTROPY, d_value)
    assert_same_gradients(gradients(policy), expected["both"])
    engine.evaluate(batch).backward(d_value=d_value)
    assert_same_gradients(gradients(policy), expected["critic"])
    engine.evaluate_critic(batch).backward(d_value=d_value)
    assert_same_gradients(gradients(policy), expected["critic"])
    engine.evaluate(batch).backward(d_log_prob, D_ENTROPY)
    assert_same_gradients(gradients(policy), expected["actor"])


@ENGINES
@pytest.mark.parametrize("chunk", [1 << 20, 4 * 3])
@pytest.mark.parametrize("weight", [WEIGHT, SOME_ZERO, None], ids=["positive", "some zero", "none"])
def test_the_actors_gradient_is_that_of_the_weighted_mean(policy, engine, weight, chunk, monkeypatch):
    """On autograd it is made piece by piece, and the pieces are not all of the same length."""
    monkeypatch.setattr(autograd, "_CHUNK_NUMBERS", chunk)
    engine = make_engine(policy, engine)
    batch = make_batch(engine, *draw(policy), **({} if weight is None else {"weight": weight}))
    actor, parameters = engine.actor(batch), actor_parameters(policy)
    loss, _ = weighted_loss(policy, batch, np.full(N, 1 / N) if weight is None else weight)
    expected = flat(th.autograd.grad(loss, parameters, materialize_grads=True))
    found = actor.gradient(engine.asarray(D_LOG_PROB), D_ENTROPY)
    close(found[order_of(actor, parameters)], expected)
    assert len(batch) == N
    assert weight is not None or batch.weight is None  # the batch is left as it was


@ENGINES
@pytest.mark.parametrize("every", [1, 2])
def test_the_fisher_matrix_is_the_weighted_mean(policy, engine, every):
    engine = make_engine(policy, engine)
    observations, actions = draw(policy)
    actor = engine.actor(make_batch(engine, observations, actions, weight=WEIGHT))
    parameters = actor_parameters(policy)
    order = order_of(actor, parameters)
    weight = th.as_tensor(WEIGHT[::every] / WEIGHT[::every].sum())
    dense = dense_fisher(policy, th.as_tensor(observations[::every]), parameters, weight)
    product = actor.fisher(every)
    for seed in range(3):
        vector = np.random.default_rng(seed).normal(size=len(order))
        close(product(engine.asarray(vector))[order], dense @ th.as_tensor(vector)[order], 1e-9)


@ENGINES
def test_zero_weights_leave_samples_out(policy, engine):
    engine = make_engine(policy, engine)
    observations, actions = draw(policy)
    kept = SOME_ZERO > 0
    batches = [
        (make_batch(engine, observations, actions, weight=SOME_ZERO), np.ones(N, dtype=bool)),
        (make_batch(engine, observations[kept], actions[kept], weight=SOME_ZERO[kept]), kept),
    ]
    found = []
    for batch, rows in batches:
        d_log_prob, d_value = (engine.asarray(x[rows]) for x in (D_LOG_PROB, D_VALUE))
        evaluation, actor = engine.evaluate(batch), engine.actor(batch)
        vector = engine.asarray(np.random.default_rng(0).normal(size=len(actor.vector)))
        numbers = [batch.mean(x) for x in (evaluation.log_prob, evaluation.entropy, evaluation.value)]
        at_once = [actor.gradient(d_log_prob, D_ENTROPY), actor.fisher()(vector), engine.asarray(np.array(numbers))]
        engine.evaluate(batch).backward(d_log_prob, D_ENTROPY, d_value)
        found.append((gradients(policy), at_once))
    assert_same_gradients(found[0][0], found[1][0])
    for x, y in zip(found[0][1], found[1][1], strict=True):
        close(x, y)


@ENGINES
@ACTIONS
def test_repeating_samples_is_weighing_them(action, engine, double):
    """Counted twice, or there twice."""
    policy = double(make_policy(action))
    engine = make_engine(policy, engine)
    observations, actions = draw(policy)
    times = np.arange(N) % 3 + 1
    again = np.repeat(np.arange(N), times)
    weighed = make_batch(engine, observations, actions, weight=times / times.sum())
    repeated = make_batch(engine, observations[again], actions[again])
    found = []
    for batch, rows in ((weighed, np.arange(N)), (repeated, again)):
        engine.evaluate(batch).backward(engine.asarray(D_LOG_PROB[rows]), D_ENTROPY, engine.asarray(D_VALUE[rows]))
        actor = engine.actor(batch)
        its = gradients(policy)
        old = batch.mean(actor.old.log_prob)
        start = actor.vector
        actor.vector = start + 0.1
        kl = batch.mean(actor.look().kl)
        actor.vector = start
        found.append((its, [old, kl]))
    assert_same_gradients(found[0][0], found[1][0])
    np.testing.assert_allclose(found[0][1], found[1][1], rtol=1e-10)

"""Policies, samples, and everything that an engine answers about them, for tests that compare engines."""

import numpy as np
import torch as th
from conftest import ACTION_SPACES, OBSERVATION_SPACES
from gymnasium import spaces

from sb3_pg.common.batch import Batch
from sb3_pg.common.engines.autograd import AutogradEngine
from sb3_pg.common.engines.choice import make_engine
from sb3_pg.common.engines.closed_form import ClosedFormEngine
from sb3_pg.common.policies import QuickMlpPolicy

N = 9  # rows


def make_policy(action="box", observation="box", **kwargs):
    """A policy whose outputs are far from zero, so that nothing agrees by accident."""
    space = OBSERVATION_SPACES[observation] if isinstance(observation, str) else observation
    action_space = ACTION_SPACES[action] if isinstance(action, str) else action
    policy = QuickMlpPolicy(space, action_space, lambda _: 1e-2, **{"net_arch": [8, 8], **kwargs})
    with th.no_grad():
        for p in policy.parameters():
            p.copy_(0.5 * th.randn_like(p))
    return policy


def draw(policy, n=N):
    """Recorded observations and actions, as a rollout buffer holds them."""
    rng = np.random.default_rng(1)
    policy.observation_space.seed(2)
    observations = np.stack([np.reshape(policy.observation_space.sample(), (-1,)) for _ in range(n)])
    observations = observations.reshape(n, *(policy.observation_space.shape or (1,)))
    space = policy.action_space
    if isinstance(space, spaces.Box):
        return observations, rng.normal(size=(n, 2)).astype(np.float32)
    sizes = {spaces.Discrete: lambda: [space.n], spaces.MultiDiscrete: lambda: space.nvec}
    sizes = sizes.get(type(space), lambda: [2] * space.n)()
    return observations, rng.integers(sizes, size=(n, len(sizes)))


def close(found, expected, tolerance=1e-10):
    found, expected = (np.asarray(x.detach() if isinstance(x, th.Tensor) else x) for x in (found, expected))
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)


def gradients(policy):
    return {name: None if p.grad is None else p.grad.clone() for name, p in policy.named_parameters()}


def assert_same_gradients(found, expected, tolerance=1e-10):
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (found[name] is None) == (gradient is None), name
        if gradient is not None:
            close(found[name], gradient, tolerance)


def both(policy):
    """The closed-form and the autograd engine of a policy."""
    engines = make_engine(policy), make_engine(policy, "autograd")
    assert [type(engine) for engine in engines] == [ClosedFormEngine, AutogradEngine], engines[0].description
    return engines


def make_batch(engine, observations, actions, **columns):
    """Samples in the engine's arrays, all of the policy's precision."""
    a = engine.actions(actions)
    if isinstance(a, th.Tensor) and a.is_floating_point():
        a = a.to(engine.policy.value_net.weight.dtype)
    return Batch(engine.asarray(observations), a, **{name: engine.asarray(x) for name, x in columns.items()})


def outputs_and_gradients(engine, observations, actions, d_entropy):
    """What an engine makes of a minibatch, and the gradient of the sum over it."""
    rng, n = np.random.default_rng(3), len(observations)
    d_log_prob, d_value = (n * engine.asarray(rng.normal(size=n)) for _ in range(2))
    evaluation = engine.evaluate(make_batch(engine, observations, actions))
    evaluation.backward(d_log_prob, None if d_entropy is None else n * d_entropy, d_value)
    return (evaluation.log_prob, evaluation.entropy, evaluation.value), gradients(engine.policy)


def assert_same(closed, autograd, observations, actions, tolerance=1e-10):
    """Every answer of the two engines is the same."""
    for d_entropy in (0.0, None, -0.3):
        found, its = outputs_and_gradients(closed, observations, actions, d_entropy)
        expected, gradient = outputs_and_gradients(autograd, observations, actions, d_entropy)
        for x, y in zip(found, expected, strict=True):
            close(x, y, tolerance)
        assert_same_gradients(its, gradient, tolerance)
    for x, y in zip(closed.judge_rows(observations, actions), autograd.judge_rows(observations, actions), strict=True):
        assert x.dtype == np.float32
        close(x, y, 1e-5)
    close(closed.row_values(observations), autograd.row_values(observations), 1e-5)
    natural = [natural_gradient(engine, observations, actions) for engine in (closed, autograd)]
    for x, y in zip(*natural, strict=True):
        close(x, y, tolerance)


def natural_gradient(engine, observations, actions):
    """Everything that a trust-region step asks for."""
    n = len(observations)
    d_log_prob = n * engine.asarray(np.random.default_rng(4).normal(size=n))
    engine.refresh()
    engine.policy.optimizer.zero_grad()
    batch = make_batch(engine, observations, actions)
    actor = engine.actor(batch)
    gradient = actor.gradient(d_log_prob, -0.2 * n)
    assert all(p.grad is None for p in engine.policy.parameters())
    old, before = actor.vector, actor.old
    assert (before.kl == 0).all()
    direction = engine.asarray(np.random.default_rng(5).normal(size=len(old)))
    product = actor.fisher()
    products = [product(direction), product(direction - 0.5 * old)]
    actor.vector = old + 0.1 * direction
    after, moved = actor.look(), engine.actor(batch)
    close(moved.old.log_prob, after.log_prob)
    actor.vector = old
    assert (actor.look().kl == 0).all()
    return [gradient, old, *before[:2], *products, *after, moved.look().kl]

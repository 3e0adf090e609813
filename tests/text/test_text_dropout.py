"""Dropout and weight decay of the supervised start."""

import numpy as np
import pytest
import torch as th
from text_models import SHAPES, letters_task, make
from tiny_models import weights

from sb3_pg.common.errors import ArgumentError
from sb3_pg.text.dropout import dropping
from sb3_pg.text.supervised import examples, steps_of, train

TASK = {"references": ["a a", "c c", "a", "d e f", "g"]}


def log_prob(policy, task):
    observations, actions = steps_of(examples(task), policy.prompt_length)
    return policy.evaluate_actions(observations, th.as_tensor(actions))[1]


@pytest.mark.parametrize("shape", SHAPES)
def test_numbers_are_dropped_in_the_block_alone(shape):
    task = letters_task(**TASK)
    policy = make(shape, task=task).policy
    with th.no_grad():
        before = log_prob(policy, task)
        with dropping(policy.language_model, 0.5):
            first, second = log_prob(policy, task), log_prob(policy, task)
        assert not th.allclose(first, second) and not th.allclose(first, before)
        assert th.equal(log_prob(policy, task), before)
    assert not any(module.training for module in policy.language_model.modules())


def test_the_gradient_in_parts_is_that_of_one_draw():
    """A piece that is read again drops the same numbers: the derivative is that of the value."""
    task = letters_task(**TASK)
    policy = make("gpt2", task=task, policy_kwargs={"micro_batch_tokens": 4}).policy
    p = policy.lm.transformer.h[0].mlp.c_fc.bias

    def value(shift):
        with th.no_grad():
            p[0] += shift
        with dropping(policy.language_model, 0.5):
            th.manual_seed(0)
            x = log_prob(policy, task).sum()
            if not shift:
                policy.zero_grad()
                x.backward()
        with th.no_grad():
            p[0] -= shift
        return float(x)

    value(0.0)
    assert float(p.grad[0]) == pytest.approx((value(1e-2) - value(-1e-2)) / 2e-2, rel=2e-2)


def test_training_with_them():
    task = letters_task(**TASK)
    found = {}
    for name, options in {"plain": {}, "dropout": {"dropout": 0.3}, "decay": {"weight_decay": 1.0}}.items():
        policy = make("gpt2", task=task, policy_kwargs={"temperature": 1.0}).policy
        losses = train(policy, task, 30, 10, 1e-2, **options)
        assert losses[-1] < losses[0]
        found[name] = weights(policy)
        with th.no_grad():
            assert th.equal(log_prob(policy, task), log_prob(policy, task))
    assert not np.allclose(found["plain"], found["dropout"], atol=1e-3)
    assert np.linalg.norm(found["decay"]) < 0.95 * np.linalg.norm(found["plain"])
    for options in ({"dropout": 1.0}, {"dropout": -0.1}, {"weight_decay": -1.0}):
        with pytest.raises(ArgumentError, match=f"`{next(iter(options))}`"):
            train(policy, task, 1, **options)

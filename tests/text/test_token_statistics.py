"""Log-probabilities and entropies from logits, their gradients, and what is kept for these."""

import gc
import itertools

import pytest
import torch as th
from text_models import act, make

from sb3_pg.text.token_statistics import TokenStatistics
from sb3_pg.text.truncation import IMPOSSIBLE


def by_torch(logits, chosen):
    distribution = th.distributions.Categorical(logits=logits)
    return distribution.log_prob(chosen), distribution.entropy()


@pytest.mark.parametrize("weights", [(1.3, 0.0), (0.0, -0.4), (1.3, -0.4)])
@pytest.mark.parametrize("is_narrowed", [False, True])
def test_values_and_gradients_are_torchs(weights, is_narrowed):
    logits, chosen = 3.0 * th.randn(5, 7, dtype=th.float64), th.tensor([0, 6, 2, 2, 5])
    if is_narrowed:
        logits[:, 1] = logits[1, 3] = IMPOSSIBLE
    rows, found = th.randn(5, dtype=th.float64), []
    for function in (by_torch, TokenStatistics.apply):
        leaf = logits.clone().requires_grad_()
        numbers = function(leaf, chosen)
        sum((w * rows * x).sum() for w, x in zip(weights, numbers, strict=True) if w).backward()
        found.append([*(x.detach() for x in numbers), leaf.grad])
    for x, y in zip(*found, strict=True):
        th.testing.assert_close(x, y, rtol=1e-10, atol=1e-10)


def test_no_logits_of_an_earlier_piece_stay(monkeypatch):
    """Where the gradient reads the pieces again one after the other, each has let go of its logits before the next."""
    model = make("llama", policy_kwargs={"micro_batch_tokens": 30})
    act(model)
    batch, policy, alive = model.network.batch(model.rollout), model.policy, []
    original = policy.read_sequences

    def reading(lm, rows):
        gc.collect()
        sizes = [x.shape for x in gc.get_objects() if type(x) is th.Tensor]
        alive.append(sum(shape[-1:] == (policy.n_tokens,) for shape in sizes))
        return original(lm, rows)

    monkeypatch.setattr(policy, "read_sequences", reading)
    gc.freeze()  # leaves little to look through
    try:
        evaluation = model.network.evaluate(batch)
        n_pieces = len(alive)
        evaluation.backward(th.ones(len(batch)))
    finally:
        gc.unfreeze()
    assert len(alive) == 2 * n_pieces > 6
    assert [n for n, _ in itertools.groupby(alive)] == alive[:1]

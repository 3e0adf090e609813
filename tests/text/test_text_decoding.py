"""The key/value cache of acting."""

import torch as th
from text_models import make
from transformers import DynamicCache

from sb3_pg.text.decoding import growing_cache

HEADS, SIZE = 2, 3


def tokens(rng, n_rows, n):
    return th.rand(n_rows, HEADS, n, SIZE, generator=rng), th.rand(n_rows, HEADS, n, SIZE, generator=rng)


def test_a_growing_cache_holds_what_transformers_does():
    ours, theirs, rng = growing_cache(), DynamicCache(), th.Generator().manual_seed(0)
    n_rows = 4
    for step, n_new in enumerate([7, *[1] * 20]):
        if step in (4, 12):  # some rows end
            kept = th.arange(n_rows).flip(0)[: n_rows - 1]
            ours.batch_select_indices(kept)
            theirs.batch_select_indices(kept)
            n_rows -= 1
        for layer in range(2):
            keys, values = tokens(rng, n_rows, n_new)
            for ours_now, theirs_now in zip(
                ours.update(keys, values, layer), theirs.update(keys.clone(), values.clone(), layer), strict=True
            ):
                th.testing.assert_close(ours_now, theirs_now, rtol=0, atol=0)
        assert ours.get_seq_length() == theirs.get_seq_length() == 7 + step


def test_a_token_is_added_without_copying_those_before():
    cache, rng = growing_cache(), th.Generator().manual_seed(0)
    n_copied, place = 0, None
    for step in range(300):
        keys, _ = cache.update(*tokens(rng, 1, 40 if step == 0 else 1), 0)
        n_copied, place = n_copied + (keys.data_ptr() != place), keys.data_ptr()
    assert n_copied <= 11  # 40 columns grow by a quarter nine times until there are 339
    assert keys.shape[2] == 339


def test_what_was_shown_before_stays():
    """A selection makes a cache of its own; the tensors that were shown are not written to."""
    cache, rng = growing_cache(), th.Generator().manual_seed(0)
    before, _ = cache.update(*tokens(rng, 2, 8), 0)
    was = before.clone()
    cache.update(*tokens(rng, 2, 1), 0)
    cache.batch_select_indices(th.tensor([1]))
    after, _ = cache.update(*tokens(rng, 1, 1), 0)
    th.testing.assert_close(before, was, rtol=0, atol=0)
    th.testing.assert_close(after[:, :, :8], was[1:], rtol=0, atol=0)


def test_tokens_are_drawn_with_their_probabilities():
    policy = make("llama").policy
    hidden = th.randn(1, policy.hidden_size, generator=th.Generator().manual_seed(0)).expand(40_000, -1)
    th.manual_seed(0)
    with th.no_grad():
        tokens, right = policy.choose(hidden), th.softmax(policy.logits(hidden[:1]).double(), dim=-1)[0]
    drawn = th.bincount(tokens, minlength=policy.n_tokens) / len(tokens)
    assert (right > 0.02).sum() >= 3
    deviations = (right * (1 - right) / len(tokens)).sqrt()
    assert ((drawn - right).abs() <= 4 * deviations).all()


def test_a_token_that_may_not_be_chosen_is_not_drawn():
    policy = make("llama", policy_kwargs={"top_k": 2}).policy
    hidden = th.randn(1, policy.hidden_size, generator=th.Generator().manual_seed(0)).expand(5_000, -1)
    th.manual_seed(0)
    with th.no_grad():
        tokens, logits = policy.choose(hidden, lengths=th.zeros(5_000)), policy.logits(hidden[:1])[0]
    assert set(tokens.tolist()) == set(logits.topk(2).indices.tolist())

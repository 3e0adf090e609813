"""Top-k, top-p, min-p and a least length: one distribution wherever probabilities are computed."""

import copy
import math

import numpy as np
import pytest
import torch as th
from text_models import SHAPES, act, make
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from sb3_pg import PPO, REINFORCE, TRPO
from sb3_pg.common.batch import random_order
from sb3_pg.common.engines.protocol import Seen
from sb3_pg.text.truncation import Truncation

pytestmark = pytest.mark.filterwarnings("ignore:You have specified a mini-batch size")

#: By name, what the policy takes.
KINDS = {
    "top_k": {"top_k": 3},
    "top_p": {"top_p": 0.6},
    "min_p": {"min_p": 0.3},
    "min_new_tokens": {"min_new_tokens": 3},
    "all": {"top_k": 5, "top_p": 0.8, "min_p": 0.1, "min_new_tokens": 2},
}
EACH = pytest.mark.parametrize("name", KINDS)


def transformers_kept(logits, length, kinds, end):
    """Which tokens transformers leaves possible, one row."""
    prompt, ids = 4, th.zeros(1, 4 + length, dtype=th.long)
    warpers = LogitsProcessorList()
    if "min_new_tokens" in kinds:
        warpers.append(MinNewTokensLengthLogitsProcessor(prompt, kinds["min_new_tokens"], end))
    for name, kind in (("top_k", TopKLogitsWarper), ("top_p", TopPLogitsWarper), ("min_p", MinPLogitsWarper)):
        if name in kinds:
            warpers.append(kind(kinds[name]))
    return th.isfinite(warpers(ids, logits[None]))[0]


@EACH
def test_the_tokens_kept_are_transformers(name):
    logits, lengths = 2 * th.randn(50, 12), th.arange(50) % 5
    found = Truncation((3, 7), **KINDS[name]).kept(logits, lengths)
    for row in range(50):
        expected = transformers_kept(logits[row], int(lengths[row]), KINDS[name], [3, 7])
        assert th.equal(found[row], expected)
    assert found.any(1).all()
    assert not found.all()
    chosen = th.randint(12, (50,))
    again = Truncation((3, 7), **KINDS[name]).kept(logits, lengths, chosen)
    assert again.gather(1, chosen[:, None]).all()
    again.scatter_(1, chosen[:, None], found.gather(1, chosen[:, None]))
    assert th.equal(again, found)


@EACH
def test_acting_has_the_probabilities_that_are_judged(name):
    model = make("llama", policy_kwargs=KINDS[name])
    rows = np.repeat(model.env.task.observations([0]), 4000, axis=0)
    tokens = model.network.act(Seen(rows)).actions
    found = np.bincount(tokens, minlength=model.policy.n_tokens) / len(tokens)
    every = th.arange(model.policy.n_tokens)
    lengths = model.policy.response_lengths(rows[: len(every)])
    kept = model.policy.truncation.kept(model.policy.logits(model.policy.hidden_states(rows[:1])), lengths[:1])[
        0
    ].numpy()
    with th.no_grad():
        log_prob = model.policy.evaluate_actions(rows[: len(every)], every)[1].numpy()
        assert np.isfinite(log_prob).all()
        assert np.exp(log_prob[kept]).sum() == pytest.approx(1.0, abs=1e-5)
        probs = model.policy.get_distribution(rows[:1]).distribution.probs[0].numpy()
    np.testing.assert_allclose(probs[kept], np.exp(log_prob[kept]), rtol=1e-5, atol=1e-6)
    assert not found[~kept].any()
    assert not probs[~kept].any()
    assert np.abs(found - probs).max() < 0.03
    assert 1 < kept.sum() < len(kept)


@EACH
@pytest.mark.parametrize("shape", SHAPES)
def test_acting_judging_and_the_first_minibatch_agree(shape, name):
    model = make(shape, policy_kwargs=KINDS[name])
    log_probs, _ = act(model)
    buffer = model.rollout_buffer
    np.testing.assert_allclose(log_probs, buffer.log_probs[: buffer.pos], atol=1e-5)
    batch = model.network.batch(model.rollout)
    for minibatch in batch.minibatches(16, random_order(batch, model.rollout)):
        evaluation = model.network.evaluate(minibatch)
        np.testing.assert_allclose(evaluation.log_prob, minibatch.old_log_prob, atol=1e-5)
        assert th.isfinite(evaluation.entropy).all()
    if "min_new_tokens" in KINDS[name]:
        length = np.asarray(batch.observations.length) + 1
        ends = batch.actions.numpy() == model.policy.end_token
        assert (length[ends] >= KINDS[name]["min_new_tokens"]).all()


@EACH
def test_generate_samples_as_acting_does(name):
    model = make("gpt2", policy_kwargs=KINDS[name])
    rows = np.repeat(model.env.task.observations([1]), 3000, axis=0)
    with th.no_grad():
        probs = model.policy.get_distribution(rows[:1]).distribution.probs[0].numpy()
    first = model.policy.generate(rows, do_sample=True)[:, 0]
    found = np.bincount(first, minlength=len(probs)) / len(rows)
    assert not found[probs == 0].any()
    assert np.abs(found - probs).max() < 0.03
    every = model.policy.generate(rows[:200], do_sample=True)
    assert (every >= 0).sum(1).min() >= KINDS[name].get("min_new_tokens", 1)


def test_predict_may_not_end_either():
    model = make("gpt2", policy_kwargs={"min_new_tokens": 3})
    with th.no_grad():
        model.policy.lm.lm_head.weight[model.policy.end_token] *= 0
        model.policy.lm.transformer.ln_f.bias += model.policy.lm.lm_head.weight.sum(0)
    rows, end = model.env.reset(), model.policy.end_token
    logits = model.policy.logits(model.policy.hidden_states(rows)).detach()
    for deterministic in (True, False):
        assert (model.predict(rows, deterministic=deterministic)[0] != end).all()
    expected = logits.clone()
    expected[:, end] = -math.inf
    np.testing.assert_array_equal(model.predict(rows, deterministic=True)[0], expected.argmax(1))


@EACH
def test_the_reference_is_asked_about_the_same_tokens(name):
    """It is the policy's equal at the beginning, and its probabilities of the tokens kept add up to one."""
    model = make("llama", policy_kwargs=KINDS[name])
    policy, rows = model.policy, model.env.task.observations()[:1]
    every = np.arange(policy.n_tokens)
    repeated = np.repeat(rows, len(every), axis=0)
    kept = policy.truncation.kept(policy.logits(policy.hidden_states(rows)), policy.response_lengths(rows))[0].numpy()
    found = policy.reference_log_prob(repeated, every)
    assert np.isfinite(found).all()
    own = policy.evaluate_actions(repeated, th.as_tensor(every))[1].detach().numpy()
    assert np.abs(own - found)[kept].max() > 1e-2  # the policy was sharpened, the reference was not
    assert np.exp(found[kept]).sum() == pytest.approx(1.0, abs=1e-5)
    policy.reference.load_state_dict(policy.language_model.state_dict())
    np.testing.assert_allclose(policy.reference_log_prob(repeated, every), own, atol=1e-5)


@pytest.mark.parametrize("lora", [None, {"r": 2, "target_modules": ["q_proj", "lm_head"]}], ids=["full", "lora"])
def test_the_kl_is_zero_before_anything_is_learned(lora):
    task_kwargs = {"lora": lora, **KINDS["all"]}
    model = make("llama", policy_kwargs=task_kwargs)
    policy = model.policy
    if lora is None:
        policy.reference.load_state_dict(policy.language_model.state_dict())
    else:
        for key, p in policy.named_parameters():
            if "lora_B" in key:
                p.data.zero_()
    act(model)
    assert model.logger.name_to_value["text/kl"] == pytest.approx(0.0, abs=1e-5)


@EACH
@pytest.mark.parametrize("kind", [PPO, TRPO, REINFORCE])
def test_every_algorithm_learns_with_it(kind, name):
    more = {"n_episodes": 8, "baseline": None} if kind is REINFORCE else {"n_episodes": 8, "baseline": "ema"}
    if kind is PPO:
        more |= {"learning_rate": 3e-2, "n_epochs": 4}  # far enough for other tokens to be kept
    if kind is TRPO:
        more |= {"sub_sampling_factor": 1}
    model = make("llama", kind, policy_kwargs={**KINDS[name], "reference_kl_in": "loss"}, **more)
    before = copy.deepcopy(model.policy.state_dict())
    model.learn(150)
    assert any(not th.equal(x, before[key]) for key, x in model.policy.state_dict().items())
    log = model.logger.name_to_value
    assert all(
        math.isfinite(x)
        for key, x in log.items()
        if isinstance(x, float) and "explained" not in key and "value_loss" not in key
    )
    if kind is TRPO:
        assert 0 < log["train/kl_divergence_loss"] < 0.01
        assert log["train/policy_step"] == "accepted"


@EACH
def test_trpo_compares_old_and_new_on_the_tokens_that_the_old_one_kept(name):
    model = make("llama", TRPO, policy_kwargs=KINDS[name])
    act(model)
    batch = model.network.batch(model.rollout)
    actor = model.network.actor(batch)
    start, policy = actor.vector, model.policy
    rows = batch.observations
    old_logits = policy.logits(policy.hidden_states(rows)).detach().double()
    kept = policy.truncation.kept(old_logits.float(), policy.response_lengths(rows))
    assert actor.old.kl.max() == 0.0
    actor.vector = start + 0.05 * th.randn(len(start))
    now_logits = policy.logits(policy.hidden_states(rows)).detach().double()
    old, now = (x.masked_fill(~kept, -math.inf).log_softmax(1) for x in (old_logits, now_logits))
    terms = th.where(kept, old.exp() * (old - now), 0.0)
    look = actor.look()
    assert look.kl.max() > 1e-3
    np.testing.assert_allclose(look.kl, terms.sum(1), atol=1e-5)
    np.testing.assert_allclose(look.log_prob, now.gather(1, batch.actions[:, None])[:, 0], atol=1e-4)


def test_it_survives_saving(tmp_path):
    model = make("gpt2", policy_kwargs=KINDS["all"])
    model.save(tmp_path / "model")
    assert PPO.load(tmp_path / "model").policy.truncation == model.policy.truncation
    model.policy.save(tmp_path / "policy.pt")
    assert type(model.policy).load(tmp_path / "policy.pt", device="cpu").truncation == model.policy.truncation
    assert copy.deepcopy(model).policy.truncation == model.policy.truncation

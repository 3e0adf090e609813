"""Acting, judging and stepping of language models are the same computation."""

import numpy as np
import pytest
import torch as th
from conftest import silent
from text_models import SHAPES, act, config_of, letters_task, make, sharpen

from sb3_pg import PPO, REINFORCE, TRPO
from sb3_pg.common.batch import random_order
from sb3_pg.common.engines.autograd import AutogradEngine
from sb3_pg.common.engines.protocol import Seen
from sb3_pg.text import TextVecEnv
from sb3_pg.text.engine import TextEngine
from sb3_pg.text.sequences import flush_left, flush_right, prefix_chains

pytestmark = pytest.mark.filterwarnings("ignore:You have specified a mini-batch size")


def whole_batch(model):
    """The rollout as one batch."""
    return model.network.batch(model.rollout)


@pytest.mark.parametrize("shape", SHAPES)
def test_acting_judging_and_the_first_minibatch_agree(shape):
    model = make(shape)
    for _ in range(2):  # the second rollout begins in the middle of responses
        log_probs, values = act(model)
    buffer = model.rollout_buffer
    starts = buffer.episode_starts[1 : buffer.pos]
    assert starts.any()
    assert (starts.any(axis=1) & ~starts.all(axis=1)).any()  # out of step
    assert log_probs.std() > 0.3
    np.testing.assert_allclose(log_probs, buffer.log_probs[: buffer.pos], atol=1e-5)
    np.testing.assert_allclose(values, buffer.values[: buffer.pos], atol=1e-5)

    batch = whole_batch(model)
    for minibatch in batch.minibatches(16, random_order(batch, model.rollout)):
        evaluation = model.network.evaluate(minibatch)
        np.testing.assert_allclose(evaluation.log_prob, minibatch.old_log_prob, atol=1e-5)
        np.testing.assert_allclose(evaluation.value, minibatch.old_values, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_log_probability_is_that_of_the_plain_model(shape):
    """One row at a time, by the model's own forward, without padding."""
    model = make(shape)
    act(model)
    batch, policy = whole_batch(model), model.policy
    for row in range(0, len(batch), 5):
        observation = th.as_tensor(batch.observations[row])
        prompt, response = observation[: policy.prompt_length], observation[policy.prompt_length :]
        prompt, response = prompt[prompt >= 0][None].long(), response[response >= 0][None].long()
        with th.no_grad():
            if shape == "t5":
                start = th.cat([th.zeros(1, 1, dtype=th.long), response], dim=1)
                logits = policy.lm(input_ids=prompt, decoder_input_ids=start).logits
            else:
                logits = policy.lm(input_ids=th.cat([prompt, response], dim=1)).logits
        expected = th.log_softmax(logits[0, -1] / 0.7, dim=-1)[batch.actions[row]]
        assert batch.old_log_prob[row] == pytest.approx(float(expected), abs=1e-5)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_of_whole_sequences_are_those_of_one_token_at_a_time(shape, weighted):
    model = make(shape)
    act(model)
    batch, policy = whole_batch(model), model.policy
    d_log_prob, d_value = th.randn(len(batch)), th.randn(len(batch))
    weight = th.rand(len(batch)).softmax(0) if weighted else th.full((len(batch),), 1 / len(batch))
    if weighted:
        batch.weight = weight

    model.network.evaluate(batch).backward(d_log_prob, -0.3, d_value)
    together = {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}

    policy.optimizer.zero_grad()
    for row in range(len(batch)):
        observation, action = batch.observations[row : row + 1], batch.actions[row : row + 1]
        values, log_prob, entropy = policy.evaluate_actions(observation, action)
        loss = d_log_prob[row] * log_prob - 0.3 * entropy + d_value[row] * values.flatten()
        (weight[row] * loss).sum().backward()
    for name, p in policy.named_parameters():
        if p.requires_grad:
            np.testing.assert_allclose(together[name], p.grad, atol=1e-3 * float(p.grad.abs().max()), err_msg=name)


@pytest.mark.parametrize("shape", SHAPES)
def test_one_forward_per_sequence(shape):
    model = make(shape)
    act(model)
    read = []
    original = model.policy.read_sequences
    model.policy.read_sequences = lambda lm, rows: read.append(len(rows)) or original(lm, rows)
    batch = whole_batch(model)
    order = random_order(batch, model.rollout)
    n_sequences = len(np.unique(batch.sequences))
    assert n_sequences < len(batch) / 3
    minibatches = list(batch.minibatches(16, order))
    assert len(minibatches) > 1
    for minibatch in minibatches:
        model.network.evaluate(minibatch)
    assert sum(read) <= n_sequences


def test_minibatches_do_not_cut_sequences():
    model = make("gpt2")
    act(model)
    batch = whole_batch(model)
    assert np.array_equal(batch.rows, np.arange(len(batch)))  # in time order until shuffled
    for even in (False, True):
        minibatches = list(batch.minibatches(16, random_order(batch, model.rollout), even=even))
        assert sorted(np.concatenate([m.rows for m in minibatches])) == list(range(len(batch)))
        held = [set(m.sequences) for m in minibatches]
        assert sum(map(len, held)) == len(set.union(*held))
        assert all(len(m) < 16 + 6 for m in minibatches)  # responses have up to six tokens
        for m in minibatches:
            same = np.diff(m.sequences) == 0
            assert (np.diff(m.rows)[same] == model.n_envs).all()


def test_prefix_chains():
    e = -1
    rows = np.array(
        [[5, 6, 1, 2, e], [5, 6, e, e, e], [e, 6, e, e, e], [5, 6, 1, e, e], [5, 6, 3, e, e], [5, 6, 1, 2, e]]
    )
    ends, chain = prefix_chains(rows, 2)
    for row, end in zip(rows, ends[chain], strict=True):
        used = np.r_[True, True, row[2:] != e]
        assert np.array_equal(row[used], rows[end][used])
    assert len(ends) == 3  # the two long ones are the same; an empty prompt column is not a shorter prompt


def test_flush():
    e = -1
    rows = np.array([[e, 4, 5, e], [1, 2, 3, e], [e, e, e, 7]])
    left, lengths = flush_left(rows, 0)
    assert left.tolist() == [[4, 5, 0], [1, 2, 3], [7, 0, 0]]
    assert lengths.tolist() == [2, 3, 1]
    assert flush_right(rows, 0)[0].tolist() == [[0, 4, 5], [1, 2, 3], [0, 0, 7]]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_cache_notices_changed_weights_and_strange_rows(shape):
    model = make(shape)
    policy, decoder = model.policy, model.network._decoder
    rows = model.env.reset()

    def check():
        np.testing.assert_allclose(decoder.read(rows), policy.hidden_states(rows).detach(), atol=1e-5)

    check()
    rows[:, policy.prompt_length] = [3, 4, 5, 6]
    check()
    with th.no_grad():
        next(iter(policy.lm.parameters())).mul_(1.5)
    rows[:, policy.prompt_length + 1] = 4
    check()
    rows[1, policy.prompt_length] = 7  # its past has changed
    rows[:, policy.prompt_length + 2] = 8
    check()
    rows[2] = model.env.task.observations([1])[0]
    check()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("weighted", [False, True])
def test_chunks_change_nothing(shape, weighted, monkeypatch):
    model = make(shape, TRPO)
    act(model)
    batch, engine = whole_batch(model), model.network
    n = len(batch)
    if weighted:
        batch.weight = th.rand(n).softmax(0)
    start = engine.actor(batch).vector
    vector = th.randn(len(start))

    def everything():
        actor, evaluation = engine.actor(batch), engine.evaluate(batch)
        evaluation.backward(n * th.ones(n), n * 0.1, n * th.ones(n))  # the sum, where all weigh the same
        gradient = th.cat([p.grad.flatten() for p in engine.actor_parameters(batch)])
        found = [evaluation.log_prob, evaluation.entropy, gradient, actor.old.log_prob, actor.old.entropy]
        found += [actor.gradient(n * th.ones(n), n * 0.1), actor.fisher()(vector)]
        actor.vector = start + 0.1 * vector
        look = actor.look()
        actor.vector = start
        assert look.kl.mean() > 0.05
        return [*found, *look[:3]]

    whole = everything()
    monkeypatch.setattr("sb3_pg.text.language_model.CHUNK_TOKENS", 20)
    monkeypatch.setattr("sb3_pg.text.language_model.CHUNK_LOGITS", 90)
    monkeypatch.setattr("sb3_pg.text.engine.CHUNK_LOGITS", 90)
    assert len(engine.pieces(batch)) > 3
    for expected, found in zip(whole, everything(), strict=True):
        np.testing.assert_allclose(found.detach(), expected.detach(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_fisher_is_that_of_autograd_and_the_curvature_of_the_kl(shape):
    model = make(shape, TRPO)
    act(model)
    actor = model.network.actor(whole_batch(model))
    start = actor.vector
    vector = th.randn(len(start))
    fisher = actor.fisher()
    assert model.policy.lm.config._attn_implementation == "sdpa"
    assert not actor.old.kl.any()
    curvature = float(vector @ fisher(vector))
    step = 0.01 / curvature**0.5
    kl = []
    for sign in (1, -1):
        actor.vector = start + sign * step * vector
        kl.append(float(actor.look().kl.mean()))
    assert np.mean(kl) == pytest.approx(0.5 * step**2 * curvature, rel=0.05)


def test_engine_of_all_policies_computes_the_same():
    model = make("llama")
    act(model)
    batch = whole_batch(model)
    engine = AutogradEngine(model.policy, "to compare with")
    np.testing.assert_allclose(engine.evaluate(batch).log_prob, batch.old_log_prob, atol=1e-5)


def test_dropout_is_off_in_training():
    task = letters_task()
    model = make("gpt2", task=task, policy_kwargs={"model": config_of("gpt2", task, resid_pdrop=0.5, embd_pdrop=0.5)})
    act(model)
    batch = whole_batch(model)
    model.policy.set_training_mode(True)
    np.testing.assert_allclose(model.network.evaluate(batch).log_prob, batch.old_log_prob, atol=1e-5)


@pytest.mark.parametrize("algorithm", [PPO, TRPO, REINFORCE])
def test_the_critic_is_fitted_without_the_actor(algorithm):
    model = make("gpt2", algorithm)
    act(model) if algorithm is not REINFORCE else model.learn(1)
    batch, parameters = whole_batch(model), dict(model.policy.named_parameters())
    held = {id(p) for p in model.network.actor_parameters(batch)}
    free = [name for name, p in parameters.items() if p.requires_grad and id(p) not in held]
    assert free == ["value_head.weight", "value_head.bias"]
    evaluations = model.network.evaluate(batch), model.network.evaluate_critic(batch)
    np.testing.assert_allclose(evaluations[0].value, evaluations[1].value, atol=1e-5)
    for evaluation in evaluations:
        evaluation.backward(d_value=th.ones(len(batch)))
        assert [name for name, p in parameters.items() if p.grad is not None] == free


@pytest.mark.parametrize("shape", SHAPES)
def test_responses_that_are_over_are_not_read(shape):
    model = make(shape)
    policy, decoder = model.policy, model.network._decoder
    rows = model.env.reset()
    end, at = policy.end_token, policy.prompt_length
    read = []
    begin, proceed = policy.begin, policy.proceed
    policy.begin = lambda rows: read.append(("begin", len(rows))) or begin(rows)
    policy.proceed = lambda state, tokens: read.append(("proceed", len(tokens))) or proceed(state, tokens)

    def check(over, *expected):
        read.clear()
        hidden = decoder.read(rows)
        assert read == list(expected)
        assert not hidden[over].any()
        going = np.setdiff1d(np.arange(4), over)
        if len(going):
            np.testing.assert_allclose(hidden[going], policy.hidden_states(rows[going]).detach(), atol=1e-5)

    check([], ("begin", 4))
    rows[:, at] = [3, end, 5, 6]
    check([1], ("proceed", 3))
    rows[[0, 2, 3], at + 1] = 4
    rows[2] = model.env.task.observations([1])[0]  # a new prompt among those that go on
    check([1], ("proceed", 2), ("begin", 1))
    rows[0, at + 2 :] = 5  # full
    rows[2, at], rows[3, at + 2] = 7, 7
    check([0, 1], ("proceed", 2))
    rows[1] = model.env.task.observations([0])[0]
    rows[2, at + 1], rows[3, at + 3] = end, 3
    check([0, 2], ("proceed", 1), ("begin", 1))
    rows[1, at], rows[3, at + 4] = end, end
    check([0, 1, 2, 3])
    assert (model.network.act(Seen(rows)).actions == end).all()


def test_reinforce_learns_the_same_from_environments_at_rest():
    """Log-probabilities of acting are those of judging, and what the update uses is whole responses only."""
    task = letters_task()
    env = TextVecEnv(task, 8, 4, seed=3)
    kwargs = {"model": config_of("llama", task), "temperature": 0.7, "reference_kl_coef": 0.5}
    model = silent(REINFORCE("CausalLMPolicy", env, n_episodes=16, baseline=None, policy_kwargs=kwargs, device="cpu"))
    sharpen(model.policy)
    _, callback = model._setup_learn(1)
    model.collect_rollouts(model.env, callback, model.rollout_buffer, 0)
    buffer, n, keep = model.rollout_buffer, model.rollout_buffer.pos, model.horizon.keep(model.rollout)
    assert not keep.all()
    over = model.policy.is_over(buffer.observations[:n].reshape(n * 8, -1)).reshape(n, 8)
    assert np.array_equal(over, ~keep)  # at rest as soon as nothing is learned from it
    rows, actions = buffer.observations[:n][keep], buffer.actions[:n][keep]
    _, log_prob, _ = model.policy.evaluate_actions(rows, th.as_tensor(actions))
    np.testing.assert_allclose(buffer.log_probs[:n][keep], log_prob.detach(), atol=1e-5)
    log_ratio = log_prob.detach().numpy() - model.policy.reference_log_prob(rows, actions)
    length = model.logger.name_to_value["text/response_length"]
    assert model.logger.name_to_value["text/kl"] == pytest.approx(log_ratio.mean() * length, rel=1e-3)
    assert len(model.ep_info_buffer) == 16


@pytest.mark.parametrize("algorithm", [PPO, TRPO, REINFORCE])
def test_autograd_asked_for_is_the_engine_of_language_models(algorithm):
    """Any other one would leave the penalty for leaving the reference out."""
    model = algorithm("CausalLMPolicy", TextVecEnv(letters_task(), 2), engine="autograd", n_episodes=4)
    assert isinstance(model.network, TextEngine)

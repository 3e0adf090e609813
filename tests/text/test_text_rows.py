"""Rollouts of text: each token stored once, and each response read once."""

import copy
import pickle

import numpy as np
import pytest
import torch as th
from conftest import silent
from text_models import SHAPES, act, config_of, letters_task, make, sharpen

from sb3_pg import PPO, REINFORCE, TRPO
from sb3_pg.common import buffers
from sb3_pg.text import TextVecEnv
from sb3_pg.text.rows import Recording, TextRolloutBuffer, TokenRows
from sb3_pg.text.sequences import grown
from sb3_pg.text.spaces import Vocabulary, text_space

E = -1
pytestmark = pytest.mark.filterwarnings("ignore:You have specified a mini-batch size")


def random_steps(n_steps, n_envs, prompt, response, seed=0):
    """Rows as environments out of step show them, some of them resting or doing strange things."""
    rng = np.random.default_rng(seed)
    rows = np.full((n_envs, prompt + response), E, np.int32)
    lengths = np.full(n_envs, response)
    for step in range(n_steps):
        for env in range(n_envs):
            if lengths[env] == response or rng.random() < 0.1:
                rows[env] = E
                rows[env, prompt - rng.integers(1, prompt + 1) : prompt] = rng.integers(0, 3)
                lengths[env] = rng.choice((0, 0, 0, 2))
                rows[env, prompt : prompt + lengths[env]] = 7
            elif rng.random() < 0.8:
                rows[env, prompt + lengths[env]] = rng.integers(0, 50)
                lengths[env] += 1
        if step % 17 == 16:
            rows[0, prompt - 1] = 40  # the past of a response changes
        yield rows.copy()


@pytest.fixture
def recorded():
    steps = list(random_steps(60, 5, 4, 6))
    recording = Recording(60, 5, text_space(4, 6, 50))
    for number, rows in enumerate(steps):
        recording[number] = rows
    return recording, np.array(steps)


def test_a_recording_reads_like_the_array_of_its_rows(recorded):
    recording, steps = recorded
    assert recording.shape == steps.shape
    assert recording.dtype == steps.dtype == np.int32
    assert len(recording) == len(steps)
    rng = np.random.default_rng(1)
    indices = [3, slice(5, 20), slice(None, None, 7), rng.integers(0, 60, 9), rng.random(60) < 0.3]
    indices += [(4, 2), (slice(3, 9), 1), (rng.integers(0, 60, 9), rng.integers(0, 5, 9)), rng.random((60, 5)) < 0.2]
    indices += [(3, 4, 5), (slice(None), slice(None), 3), (..., 0), np.int64(7), -1]
    for index in indices:
        assert np.array_equal(np.asarray(recording[index]), steps[index]), index
    flat = recording[:30].reshape(150, -1)
    assert isinstance(flat, TokenRows)
    assert np.array_equal(np.asarray(flat[::7]), steps[:30].reshape(150, 10)[::7])
    assert np.array_equal(recording.reshape(-1), steps.reshape(-1))
    assert np.array_equal(recording + 1, steps + 1)
    assert np.array_equal(recording.swapaxes(0, 1), steps.swapaxes(0, 1))
    assert np.array_equal(recording[3].astype(float), steps[3].astype(float))
    assert [row.tolist() for row in recording[7]] == steps[7].tolist()
    assert np.array_equal(th.as_tensor(np.asarray(recording[:2])), steps[:2])
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = recording.nothing
    assert (recording >= 0).sum() == (steps >= 0).sum()
    assert np.array_equal(np.concatenate([recording, recording]), np.concatenate([steps, steps]))
    for again in (copy.deepcopy(recording), pickle.loads(pickle.dumps(recording))):
        assert np.array_equal(np.asarray(again), steps)


def test_a_recording_can_be_changed_and_begun_anew(recorded):
    recording, steps = recorded
    steps[10] = steps[3]
    recording[10] = steps[3]
    assert np.array_equal(np.asarray(recording), steps)
    recording[:20] = steps[40:60]
    recording = recording.enlarged(100)
    recording[20] = steps[0]
    assert np.array_equal(np.asarray(recording[:21]), np.concatenate([steps[40:60], steps[:1]]))


def test_pieces_serve_each_row_once_and_read_each_sequence_once(recorded):
    recording, steps = recorded
    rows, flat = recording.reshape(300, 10), steps.reshape(300, 10)
    for chosen in (np.arange(300), np.random.default_rng(0).permutation(300)[:90]):
        for given in (rows[chosen], TokenRows.of(flat[chosen], 4)):
            for size in (1, 30, 10_000):
                pieces, served = list(given.pieces(size)), []
                for piece in pieces:
                    lengths = (piece.sequences != E).sum(axis=1)
                    assert len(lengths) == 1 or len(lengths) * lengths.max() <= size
                    for row, source, prompt, response in zip(*piece[1:], strict=True):
                        expected = flat[chosen][row]
                        assert (expected != E).sum() == prompt + response
                        seen = piece.sequences[source].copy()
                        seen[4 + response :] = E
                        assert np.array_equal(seen, expected)
                    served += piece.members.tolist()
                assert sorted(served) == list(range(len(chosen)))
                n_tokens = sum((piece.sequences != E).sum() for piece in pieces)
                assert n_tokens == given.n_tokens
                assert len(pieces) == 1 or size < 10_000


def test_what_follows_a_recorded_row_continues_its_sequence(recorded):
    recording, steps = recorded
    before = recording[59, :]
    final = np.asarray(before).copy()
    going = np.flatnonzero((final[:, 4:] == E).any(axis=1))
    final[going, 4 + before.length[going]] = 11
    n_sequences = before.sizes()[0].size
    both = before.with_more(recording.followed(np.full(5, 59), np.arange(5), final))
    assert np.array_equal(np.asarray(both), np.concatenate([steps[59], final]))
    assert both.sizes()[0].size == n_sequences
    assert np.array_equal(np.asarray(recording), steps)
    final[2, 0:4] = [9, 8, 7, 6]  # another prompt
    assert np.array_equal(np.asarray(recording.followed(np.full(5, 59), np.arange(5), final)), final)
    assert np.array_equal(np.asarray(recording), steps)


def test_grown():
    before = np.array([[E, 1, E, E], [E, 1, 5, E], [E, 1, 5, E], [E, 1, 5, E], [E, 1, E, E], [E, 1, 5, 6]])
    rows = np.array([[E, 1, 5, E], [E, 1, 5, E], [E, 2, 5, 6], [E, 1, 6, E], [E, 1, E, 3], [E, 1, 5, E]])
    same, more, last = grown(before, rows, 2)
    assert same.tolist() == [False, True, False, False, False, False]
    assert more.tolist() == [True, False, False, False, False, False]
    assert last.tolist() == [2, 2, 3, 2, 3, 2]


def rollout_memory(n_envs, prompt, response, mean_length):
    """Bytes of a rollout whose responses have that length on average."""
    space, rng = text_space(prompt, response, 1000), np.random.default_rng(0)
    buffer = TextRolloutBuffer(response, space, Vocabulary(1000, 1), n_envs=n_envs)
    rows = np.full((n_envs, prompt + response), E, np.int32)
    lengths, zeros = np.full(n_envs, response), np.zeros(n_envs)
    for _ in range(response):
        for env in np.flatnonzero(lengths == response):
            rows[env] = E
            rows[env, :prompt], lengths[env] = rng.integers(0, 1000, prompt), 0
        buffer.add(rows, zeros, zeros, zeros)
        rows[np.arange(n_envs), prompt + lengths] = 5
        lengths = np.where(rng.random(n_envs) < 1 / mean_length, response, lengths + 1)
    columns = sum(x.nbytes for x in vars(buffer).values() if isinstance(x, np.ndarray))
    return columns + len(pickle.dumps(buffer.observations))


def test_memory_grows_with_the_text_and_not_with_its_prefixes():
    # 64 x (1024 + 2048) took 1.6 GB; a quarter of the environments stands for them all
    assert 4 * rollout_memory(16, 1024, 2048, 1e9) < 10e6
    assert 4 * rollout_memory(16, 1024, 2048, 400) < 10e6


def test_policies_have_buffers_of_their_own_unless_another_is_asked_for():
    assert type(make("gpt2").rollout_buffer) is TextRolloutBuffer
    assert type(make("gpt2", rollout_buffer_class=buffers.RolloutBuffer).rollout_buffer) is buffers.RolloutBuffer


# -------------------------------------------------------------------- judging


def count_tokens(policy, monkeypatch):
    """Note how many tokens the model reads whenever it reads whole rows, and with gradients or not."""
    read, original = [], policy.read_sequences

    def counting(lm, rows):
        read.append(int((rows != E).sum()))
        return original(lm, rows)

    monkeypatch.setattr(policy, "read_sequences", counting)
    return read


def tokens_of(model, final=True):
    """Tokens that each environment has shown since the rollout began, each once; the last observations' too."""
    rollout, policy, total = model.rollout, model.policy, 0
    shown = np.asarray(rollout.buffer.observations[: rollout.n_steps])
    last = np.where(rollout.last_dones[:, None], shown[-1], rollout.last_observations)[None]
    for rows in np.concatenate([shown, last] if final else [shown]).swapaxes(0, 1):
        before = np.full_like(rows[0], E)
        for row in rows[~policy.is_over(rows)]:
            more = row != before
            total += (
                1 if more.sum() == 1 and before[more] == E and (before != E).any() else (row != E).sum() * more.any()
            )
            before = row
    return total


def rolled_out(algorithm, shape="gpt2", **options):
    task = letters_task()
    kwargs = {"model": config_of(shape, task), "temperature": 0.7, **options.pop("policy_kwargs", {})}
    model = algorithm(
        SHAPES[shape][0], TextVecEnv(task, 8, 4, seed=3), seed=1, device="cpu", policy_kwargs=kwargs, **options
    )
    sharpen(silent(model).policy)
    _, callback = model._setup_learn(1000)
    model.collect_rollouts(model.env, callback, model.rollout_buffer, model.n_steps)
    return model


@pytest.mark.parametrize("shape", SHAPES)
def test_judging_reads_each_response_once(shape, monkeypatch):
    monkeypatch.setattr("sb3_pg.common.engines.autograd._CHUNK_NUMBERS", 30)  # the cut that re-read prefixes
    monkeypatch.setattr("sb3_pg.text.language_model.CHUNK_TOKENS", 40)
    model = make(shape, policy_kwargs={"reference_kl_coef": None})
    act(model)
    log_probs = model.rollout_buffer.log_probs[: model.rollout.n_steps].copy()
    read = count_tokens(model.policy, monkeypatch)
    judged = model.judge(model.rollout)
    assert len(read) > 2
    assert sum(read) == tokens_of(model)
    np.testing.assert_array_equal(judged.log_probs, log_probs)
    unfinished = ~model.rollout.last_dones
    final = model.policy.predict_values(model.rollout.last_observations).detach().numpy()[:, 0]
    np.testing.assert_allclose(judged.final_values[:4][unfinished], final[unfinished], rtol=1e-5, atol=1e-6)
    assert unfinished.any()


NEEDED = [
    (REINFORCE, {"n_episodes": 8, "baseline": None}, None, ""),
    (REINFORCE, {"n_episodes": 8, "baseline": None}, 0.1, "log_probs, reference"),
    (REINFORCE, {"n_episodes": 8, "baseline": "value"}, None, "values"),
    (PPO, {"n_episodes": 8, "baseline": "group"}, None, "log_probs"),
    (PPO, {"n_steps": 12, "batch_size": 32}, None, "values, log_probs"),
    (TRPO, {"n_episodes": 8, "baseline": "group"}, 0.1, "log_probs, reference"),
]


@pytest.mark.parametrize("algorithm, options, coef, needed", NEEDED, ids=lambda x: getattr(x, "__name__", str(x)))
def test_only_what_is_needed_is_judged(algorithm, options, coef, needed, monkeypatch):
    model = rolled_out(algorithm, policy_kwargs={"reference_kl_coef": coef}, **options)
    with th.no_grad():
        model.policy.value_head.bias.fill_(1.0)
    read = count_tokens(model.policy, monkeypatch)
    judged = model.judge(model.rollout)
    going = ~model.policy.is_over(model.rollout.column("observations")).reshape(judged.values.shape)
    assert judged.log_probs[going].all() == ("log_probs" in needed)
    assert judged.values[going].all() == ("values" in needed)
    final = "values" in needed
    assert sum(read) == (tokens_of(model, final) if needed else 0) + ("reference" in needed) * tokens_of(model, False)
    model.train()
    assert np.isfinite(model.logger.name_to_value["train/value_loss" if final else "train/entropy_loss"])


def test_trpo_reads_each_response_once_for_its_gradient(monkeypatch):
    monkeypatch.setattr("sb3_pg.common.engines.autograd._CHUNK_NUMBERS", 30)
    model = make("gpt2", TRPO, policy_kwargs={"reference_kl_coef": None, "micro_batch_tokens": 30})
    act(model)
    batch = model.network.batch(model.rollout)
    actor, n = model.network.actor(batch), len(batch)
    read = count_tokens(model.policy, monkeypatch)
    actor.gradient(th.ones(n), 0.0)
    assert len(read) > 3
    assert sum(read) == tokens_of(model, final=False)


def test_trpo_thins_whole_responses(monkeypatch):
    model = make("gpt2", TRPO, policy_kwargs={"reference_kl_coef": None})
    act(model)
    batch = model.network.batch(model.rollout)
    thinned = batch[model.network.thinned(batch, 3)]
    numbers = np.unique(batch.sequences)
    assert np.array_equal(np.unique(thinned.sequences), numbers[::3])
    assert len(thinned) == np.isin(batch.sequences, numbers[::3]).sum()


@pytest.mark.parametrize("shape", ["gpt2", "t5"])
def test_a_buffer_of_plain_rows_gives_the_same_update(shape):
    """That of users, or of SB3."""
    found = []
    for kind in (None, buffers.RolloutBuffer):
        model = make(shape, rollout_buffer_class=kind)
        act(model)
        batch = model.network.batch(model.rollout)
        model.network.evaluate(batch).backward(batch.advantages, -0.1, batch.returns)
        found.append([batch.advantages, *(p.grad for p in model.policy.parameters() if p.grad is not None)])
    for x, y in zip(*found, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)


def test_sb3_reads_the_buffer_its_way():
    model = make("gpt2")
    act(model)
    buffer, n = model.rollout_buffer, 0
    for samples in buffer.get(16):
        assert samples.observations.shape[1] == 10
        _, log_prob, _ = model.policy.evaluate_actions(samples.observations, samples.actions)
        np.testing.assert_allclose(log_prob.detach(), samples.old_log_prob, atol=1e-5)
        n += len(samples.observations)
    assert n == buffer.pos * 4

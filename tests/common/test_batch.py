"""Batches, how they are cut into minibatches, and in which order."""

import numpy as np
import pytest
import torch as th
from conftest import make_envs, silent
from hypothesis import given
from hypothesis import strategies as st
from stable_baselines3.common import buffers as sb3_buffers

from sb3_pg import PPO
from sb3_pg.common.advantages import normalized
from sb3_pg.common.batch import Batch, epoch, random_order, weighted
from sb3_pg.common.buffers import RolloutBuffer
from sb3_pg.common.rollout import Rollout

KINDS = pytest.mark.parametrize("kind", [np.asarray, th.as_tensor], ids=["numpy", "torch"])


def numbered(n, kind=np.asarray, **columns):
    """A batch whose observations are the numbers of its samples."""
    numbers = np.arange(n, dtype=np.float64)
    return Batch({"a": kind(numbers), "b": kind(10 * numbers)}, kind(100 * numbers), rows=np.arange(n), **columns)


def rows_of(pieces):
    return [[int(x) for x in piece.observations["a"]] for piece in pieces]


@KINDS
def test_every_column_is_cut_alike(kind):
    n, rng = 7, np.random.default_rng(0)
    names = ("masks", "old_values", "old_log_prob", "advantages", "returns", "weight")
    columns = {name: kind(rng.normal(size=n)) for name in names}
    batch = numbered(n, kind, sequences=np.arange(n) // 2, **columns)
    for index in (slice(1, 4), np.array([5, 0, 6])):
        piece = batch[index]
        rows = np.arange(n)[index]
        assert len(piece) == 3
        np.testing.assert_array_equal(piece.rows, rows)
        np.testing.assert_array_equal(piece.sequences, rows // 2)
        np.testing.assert_array_equal(piece.observations["b"], 10 * rows)
        np.testing.assert_array_equal(piece.actions, 100 * rows)
        for name, column in columns.items():
            np.testing.assert_array_equal(getattr(piece, name), column[rows])
    assert numbered(n)[:2].returns is None
    critic = batch.for_critic()
    assert critic.old_values is critic.old_log_prob is critic.advantages is None
    assert critic.returns is batch.returns
    assert batch.advantages is not None


@given(st.integers(1, 30), st.integers(1, 35) | st.none(), st.booleans(), st.booleans())
def test_minibatches_are_the_samples_in_the_order_asked_for(n, size, even, has_order):
    order = np.random.default_rng(n).permutation(n) if has_order else None
    pieces = rows_of(numbered(n).minibatches(size, order, even=even))
    assert [x for piece in pieces for x in piece] == (list(range(n)) if order is None else order.tolist())
    lengths = [len(piece) for piece in pieces]
    assert len(lengths) == -(-n // (size or n))
    assert max(lengths) <= (size or n)
    if even:
        assert max(lengths) - min(lengths) <= 1
    else:
        assert set(lengths[:-1]) <= {size}


@given(
    st.lists(st.integers(1, 5), min_size=1, max_size=8), st.integers(1, 20) | st.none(), st.booleans(), st.booleans()
)
def test_sequences_are_not_cut(lengths, size, even, has_order):
    sequences = np.repeat(np.arange(len(lengths)), lengths)
    batch = numbered(len(sequences), sequences=sequences)
    order = None
    if has_order:
        order = random_order(batch, None)
        kept = sequences[order]
        assert sorted(order.tolist()) == list(range(len(sequences)))
        assert (np.diff(order)[np.diff(kept) == 0] == 1).all()  # together and in time order
        assert len(np.flatnonzero(np.diff(kept))) == len(lengths) - 1
    pieces = rows_of(batch.minibatches(size, order, even=even))
    assert [x for piece in pieces for x in piece] == (list(range(len(sequences))) if order is None else order.tolist())
    for piece in pieces:
        for number in set(sequences[piece]):
            assert (sequences[piece] == number).sum() == lengths[number]
    if not even and size is not None:  # none is longer than up to the end of the sequence in which it is full
        for piece in pieces:
            assert len(piece) - lengths[sequences[piece[-1]]] < size


@KINDS
@pytest.mark.parametrize("order", [None, np.array([3, 1, 4, 0, 2, 6, 5])])
@pytest.mark.parametrize("size", [2, 3, 7, None])
def test_the_weights_of_a_minibatch_add_up_to_one(size, order, kind):
    weight = np.random.default_rng(0).dirichlet(np.ones(7))
    for piece in numbered(7, kind, weight=kind(weight)).minibatches(size, order):
        its = weight[piece.rows]
        np.testing.assert_allclose(piece.scale, its / its.sum())
        assert piece.share == pytest.approx(its.sum())
        x = np.random.default_rng(1).normal(size=len(piece))
        assert piece.mean(kind(x)) == pytest.approx(np.average(x, weights=its))


@KINDS
def test_without_weights_all_count_the_same(kind):
    for piece in numbered(7, kind).minibatches(3):
        assert piece.weight is None
        assert piece.scale == 1 / len(piece)
        assert piece.share == len(piece)
        x = np.random.default_rng(1).normal(size=len(piece))
        assert piece.mean(kind(x)) == pytest.approx(x.mean())


@KINDS
@pytest.mark.parametrize("counted", [False, True])
def test_a_part_counts_as_in_the_whole(counted, kind):
    rng = np.random.default_rng(0)
    columns = {name: kind(rng.random(7)) for name in ("weight", "count")} if counted else {}
    batch, x = numbered(7, kind, **columns), rng.normal(size=7)
    parts = [batch.part(rows) for rows in (slice(0, 3), np.array([5, 3]), np.array([4, 6]))]
    assert sum(part.mean(kind(x[part.rows])) for part in parts) == pytest.approx(batch.mean(kind(x)))
    if counted:
        assert batch.mean(kind(x)) == pytest.approx(float((batch.weight * kind(x)).sum() / batch.count.sum()))
    assert len(batch.part(slice(0, 3))[:2]) == 2
    assert batch.part(slice(0, 3))[:2].divisor is None


@KINDS
def test_a_batch_in_which_nothing_counts_has_a_mean(kind):
    batch = numbered(3, kind, weight=kind(np.zeros(3)))
    assert batch.mean(kind(np.ones(3))) == 0.0
    np.testing.assert_array_equal(batch.scale, 0.0)


SEQUENCES = pytest.mark.parametrize("sequences", [None, np.array([0, 0, 1, 1, 2, 2, 3])], ids=["samples", "sequences"])


@KINDS
@SEQUENCES
@pytest.mark.parametrize("size", [3, None])
def test_samples_without_advantage_are_left_out_and_still_counted(size, sequences, kind):
    advantages = np.array([0.0, 0.0, 1.0, 0.0, -2.0, 0.0, 0.0])
    batch = numbered(7, kind, advantages=kind(advantages), sequences=sequences)
    whole = list(batch.minibatches(size))
    pieces = list(batch.minibatches(size, only_advantages=True))
    assert len(pieces) == len(whole)
    kept = [2, 3, 4, 5] if sequences is not None else [2, 4] if size is None else [2, 4, 6]  # none is left empty
    assert [x for piece in rows_of(pieces) for x in piece] == kept
    for piece, all_of_it in zip(pieces, whole, strict=True):
        assert piece.share == all_of_it.share == len(all_of_it)
        assert piece.mean(piece.advantages) == pytest.approx(all_of_it.mean(all_of_it.advantages))


@KINDS
def test_samples_without_weight_are_left_out_of_minibatches_and_of_normalising(kind):
    weight, advantages = np.array([1.0, 0.0, 1.0, 1.0, 0.0]), np.array([3.0, 99.0, 1.0, 2.0, -99.0])
    batch = numbered(5, kind, weight=kind(weight), advantages=kind(advantages))
    (piece,) = batch.minibatches(None, normalize=True)
    assert rows_of([piece]) == [[0, 2, 3]]
    np.testing.assert_allclose(piece.advantages, [1.0, -1.0, 0.0], atol=1e-7)
    assert piece.share == 3.0
    np.testing.assert_allclose(batch.normalized()[[0, 2, 3]], piece.advantages)
    assert batch.moments() == (2.0, 1.0)
    np.testing.assert_allclose(batch.normalized((1.0, 4.0))[[0, 2, 3]], [0.5, 0.0, 0.25], atol=1e-7)


@pytest.mark.parametrize("average", ["step", "sequence", 10])
def test_weights_average_over_steps_sequences_or_a_length(average):
    """Against means of means, whole and in minibatches of whole sequences."""
    model = recorded(n_steps=14)
    rollout = model.rollout
    keep = np.arange(14)[:, None] + np.zeros((1, 3)) < 12
    batch = model.network.batch(rollout, keep)
    number = rollout.stretches.numbers.ravel()[batch.rows]
    x = np.random.default_rng(0).normal(size=len(batch)).astype(np.float32)
    found = weighted(batch, rollout, model.network.asarray, average)
    found.sequences = number
    assert len(set(np.bincount(number).tolist())) > 2  # of several lengths
    for piece in [found, *found.minibatches(12, random_order(found, rollout))]:
        its = x[np.searchsorted(batch.rows, piece.rows)]
        of_sequences = [its[piece.sequences == n] for n in np.unique(piece.sequences)]
        expected = {
            "step": its.mean(),
            "sequence": np.mean([y.mean() for y in of_sequences]),
            10: np.mean([y.sum() / 10 for y in of_sequences]),
        }[average]
        assert piece.mean(its) == pytest.approx(expected, rel=1e-5)
        assert piece.share == pytest.approx(len(its) if average == "step" else len(of_sequences))


def recorded(kind=None, n_steps=6, n_envs=3):
    """A model whose buffer holds a rollout."""
    model = PPO("MlpPolicy", make_envs(n_envs=n_envs), n_steps=n_steps, batch_size=6, rollout_buffer_class=kind)
    _, callback = silent(model)._setup_learn(n_steps)
    model.collect_rollouts(model.env, callback, model.rollout_buffer, n_steps)
    return model


@pytest.mark.parametrize("n_envs", [1, 3])
def test_the_order_is_sb3s(n_envs):
    """Its numbers count environment by environment, ours step by step."""
    model = recorded(n_envs=n_envs)
    batch = model.network.batch(model.rollout)
    np.random.seed(3)
    found = np.concatenate([x.observations for x in epoch(batch, model.rollout, model.network, 4)])
    theirs = sb3_buffers.RolloutBuffer(6, model.observation_space, model.action_space, "cpu", n_envs=n_envs)
    for name in ("observations", "actions", "values", "log_probs", "advantages", "returns"):
        getattr(theirs, name)[:] = getattr(model.rollout_buffer, name)
    theirs.full = True
    np.random.seed(3)
    expected = np.concatenate([x.observations.numpy() for x in theirs.get(4)])
    np.testing.assert_array_equal(found, expected)


def test_a_batch_holds_the_kept_samples_in_time_order():
    model = recorded()
    rollout, buffer = model.rollout, model.rollout_buffer
    keep = np.random.default_rng(0).random((6, 3)) < 0.5
    batch = model.network.batch(rollout, keep)
    assert len(batch) == keep.sum()
    np.testing.assert_array_equal(batch.rows, np.flatnonzero(keep))
    for name, column in [
        ("observations", "observations"),
        ("actions", "actions"),
        ("old_values", "values"),
        ("old_log_prob", "log_probs"),
        ("advantages", "advantages"),
        ("returns", "returns"),
    ]:
        np.testing.assert_array_equal(getattr(batch, name), getattr(buffer, column)[keep])
    pieces = list(epoch(batch, rollout, model.network, 4))
    assert sorted(np.concatenate([x.rows for x in pieces]).tolist()) == batch.rows.tolist()
    for everything in (None, np.ones((6, 3), dtype=bool)):
        np.testing.assert_array_equal(model.network.batch(rollout, everything).rows, np.arange(18))


class Backwards(RolloutBuffer):
    """Gives out two minibatches, the last samples first."""

    def get(self, batch_size=None):
        whole = next(super().get(None))
        for rows in (slice(9, 18), slice(0, 9)):
            yield type(whole)(*[x[rows] for x in whole])


@pytest.mark.parametrize("engine", ["auto", "autograd"])
def test_a_buffer_with_a_way_of_its_own_is_asked(engine):
    model = recorded(Backwards)
    model.engine = engine
    model._network = None
    batch = model.network.batch(model.rollout)
    np.random.seed(3)
    pieces = list(epoch(batch, model.rollout, model.network, 4))
    assert [len(x) for x in pieces] == [9, 9]
    np.random.seed(3)
    for found, expected in zip(pieces, model.rollout_buffer.get(), strict=True):
        assert found.rows is None
        np.testing.assert_array_equal(found.observations, expected.observations)
        np.testing.assert_array_equal(found.advantages, expected.advantages)
        np.testing.assert_array_equal(found.old_values, expected.old_values)
        np.testing.assert_array_equal(found.old_log_prob, expected.old_log_prob)
        np.testing.assert_array_equal(found.returns, expected.returns)
        np.testing.assert_array_equal(np.asarray(found.actions), expected.actions)


def test_stretches_number_the_pieces_of_episodes():
    buffer = RolloutBuffer(5, make_envs().observation_space, make_envs().action_space, "cpu", n_envs=2)
    starts = np.array([[1, 0], [0, 0], [1, 0], [1, 1], [0, 0]])
    for row in starts:
        buffer.add(np.zeros((2, 3)), np.zeros((2, 2)), np.zeros(2), row)
    rollout = Rollout(buffer, np.zeros((2, 3)), np.zeros(2, dtype=bool))
    found = rollout.stretches.numbers
    groups = {}
    for (step, env), number in np.ndenumerate(found):
        groups.setdefault(number, []).append((step, env))
    assert sorted(groups.values()) == [
        [(0, 0), (1, 0)],
        [(0, 1), (1, 1), (2, 1)],
        [(2, 0)],
        [(3, 0), (4, 0)],
        [(3, 1), (4, 1)],
    ]


@KINDS
def test_normalized(kind):
    x = np.random.default_rng(0).normal(3.0, 2.0, size=50)
    np.testing.assert_allclose(normalized(kind(x)), (x - x.mean()) / (x.std(ddof=1) + 1e-8), rtol=1e-10)
    np.testing.assert_array_equal(normalized(kind(x[:1])), x[:1])
    assert (np.asarray(normalized(kind(np.ones(5)))) == 0).all()

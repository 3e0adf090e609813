"""Stretches of episodes and how they are packed."""

import numpy as np
import pytest
import torch as th

from sb3_pg.common.sequences import Stretches, at_starts, packed


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("seed", range(20))
def test_packing_is_torchs(seed, mixed):
    """Also if the samples of several sequences alternate."""
    random = np.random.default_rng(seed)
    lengths = random.integers(1, 9, random.integers(1, 7))
    numbers = np.sort(random.permutation(50)[: len(lengths)])
    sequences = np.repeat(numbers, lengths)
    sequences = random.permutation(sequences) if mixed else sequences
    x = th.as_tensor(random.normal(size=(len(sequences), 2)))
    pieces = [x[sequences == number] for number in numbers]
    expected = th.nn.utils.rnn.pack_sequence(pieces, enforce_sorted=False)
    packing = packed(sequences)
    np.testing.assert_array_equal(x[packing.rows], expected.data)
    np.testing.assert_array_equal(packing.sizes, expected.batch_sizes)
    np.testing.assert_array_equal(np.asarray(x[packing.rows])[packing.back], x)
    np.testing.assert_array_equal(packing.numbers, numbers[expected.sorted_indices])
    ends = [np.flatnonzero(sequences == number)[-1] for number in packing.numbers]
    np.testing.assert_array_equal(packing.rows[packing.last], ends)


@pytest.mark.parametrize("length", [None, 1, 2, 3, 100])
@pytest.mark.parametrize("seed", range(5))
def test_stretches_against_a_loop(seed, length):
    random = np.random.default_rng(seed)
    starts = random.random((11, 3)) < 0.3
    stretches = Stretches(starts, length)
    number = -1
    for env in range(3):
        since, level = 0, 0
        for step in range(11):
            begins = step == 0 or starts[step, env]
            if begins:
                since = level = 0
            if begins or (length and since % length == 0):
                number += 1
                assert (stretches.first[0][number], stretches.first[1][number]) == (step, env)
                assert stretches.goes_on[number] == (not starts[step, env])
                assert stretches.level[number] == level
                level += 1
            assert stretches.numbers[step, env] == number
            since += 1
    assert stretches.numbers.max() == number


def test_memory_is_wiped_where_episodes_begin():
    memory = tuple(np.random.default_rng(0).normal(size=(2, 3, 4)) for _ in range(2))
    copies = [x.copy() for x in memory]
    found = at_starts(memory, np.array([True, False, True]))
    for x, before, now in zip(memory, copies, found, strict=True):
        np.testing.assert_array_equal(x, before)
        np.testing.assert_array_equal(now[:, 1], before[:, 1])
        assert not now[:, [0, 2]].any()
    assert at_starts(memory, np.zeros(3, bool)) is memory

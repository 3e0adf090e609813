"""How many threads a policy of a given size is worth."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch as th
from threadpoolctl import threadpool_limits

#: Multiplications of one layer on one batch from which a second thread gains more than it costs. Measured on two
#: cores: 256 rows through 256x256 weights (17 million) took 8 % longer with two threads and twice the CPU time,
#: through 1024x1024 (268 million) they took 24 % less.
WORTH_A_THREAD = 1 << 26


@contextmanager
def suitable_threads(policy: th.nn.Module, n_rows: int) -> Iterator[None]:
    """Use one thread while a network too small for more is trained on the CPU; leave larger ones as they are set.

    Idle threads of a BLAS or of OpenMP wait in a loop, so they cost time even where they have nothing to do.

    :param policy: whose layers are looked at; convolutions always count as large
    :param n_rows: observations in one pass
    """
    weights = [p for p in policy.parameters() if p.ndim > 1]
    small = all(p.ndim == 2 and p.numel() * n_rows < WORTH_A_THREAD and p.device.type == "cpu" for p in weights)
    before = th.get_num_threads()
    if not small or before == 1:
        yield
        return
    th.set_num_threads(1)
    try:
        with threadpool_limits(1, user_api="blas"):
            yield
    finally:
        th.set_num_threads(before)

"""How many threads a pass through a network is worth, without a switch that others in the process would notice.

Threads of a BLAS or of OpenMP wait for each other in a loop. If one of them does not get a core at once, since a
neighbour has it, a product of 50 microseconds takes milliseconds. So small products run on the calling thread:
those of NumPy by their size (:mod:`sb3_pg.common.products`), those of torch by its count of threads, which torch
keeps for each thread.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch as th

Result = TypeVar("Result")

#: Multiplications of one layer in one pass from which a second thread is worth while. Measured on two cores: where
#: neighbours keep both busy, a product on two threads takes 8 to 16 ms however small it is, and on one thread as long
#: as its size asks for, 0.9 ms for 2^26 multiplications. From 2^30 on the two are alike, and a free core halves it.
WORTH_A_THREAD = 1 << 30

_CHANGE = threading.Lock()


class _Present(threading.local):
    """What the calling thread had before :func:`threads_to_choose`; None outside of it."""

    usual: int | None = None


_present = _Present()


@contextmanager
def threads_to_choose() -> Iterator[None]:
    """Let :func:`choose_threads` decide within the block; torch's count of threads is then as it was before.

    Both change it for the calling thread alone.
    """
    with _CHANGE:  # a thread that is new to torch asks for its count now, and not while another one's is being changed
        outer, before = _present.usual, th.get_num_threads()
    _present.usual = before if outer is None else outer
    try:
        yield
    finally:
        _present.usual = outer
        _set_count(before)


def choose_threads(multiplications: float) -> None:
    """Use one thread for a small pass, the usual number for a large one; nothing outside of ``threads_to_choose``.

    :param multiplications: of the pass's largest layer
    """
    if _present.usual is not None:
        _set_count(1 if multiplications < WORTH_A_THREAD else _present.usual)


def _set_count(count: int) -> None:
    """Set torch's count for this thread only: by itself torch makes it the count of threads that are to come, too."""
    if th.get_num_threads() == count:
        return
    with _CHANGE:
        of_new_threads = _in_a_new_thread(th.get_num_threads)
        th.set_num_threads(count)
        if of_new_threads != count:
            _in_a_new_thread(lambda: th.set_num_threads(of_new_threads))


def _in_a_new_thread(function: Callable[[], Result]) -> Result:
    results: list[Result] = []
    thread = threading.Thread(target=lambda: results.append(function()))
    thread.start()
    thread.join()
    return results[0]

"""Several processes that learn one policy together, on one machine or on several, by ``torch.distributed``.

``torchrun`` starts them and tells each its rank; models join the others when they are made. Each worker has its own
environments and rollouts, and all take the same steps: what a step depends on is summed over the workers here.
In a single process every function is an identity, and costs as much as asking how many there are.

All workers must ask the same in the same order, since each waits for the others.
"""

import atexit
import logging
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from typing import Any, TypeVar
from zlib import crc32

import numpy as np
import torch as th
import torch.distributed as dist

from sb3_pg.common.errors import ArgumentError

T = TypeVar("T")

_MOST_ON_A_CORE = 8


class WorkerError(RuntimeError):
    """Another worker has stopped, or has gone another way."""


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def start(n: int, module: str, arguments: list[str]) -> int:
    """Run a module in so many workers on this machine; return the exit code of the first that fails, or 0.

    :param arguments: of its command line
    :raises ArgumentError: far more workers than cores, which would fill the memory before they learn anything
    """
    if n > (most := _MOST_ON_A_CORE * cores()):
        raise ArgumentError(
            f"{n} workers on {cores()} core(s) only get into each other's way, and fill the memory: ask for at "
            f"most {most}, best one for each core"
        )
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # The workers themselves say what is wrong.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        run.main(["--standalone", f"--nproc-per-node={n}", "-m", module, *arguments])
    except ChildFailedError as error:
        return abs(error.get_first_failure()[1].exitcode)
    return 0


def join() -> None:
    """Join the other workers if ``torchrun`` has started this process; once is enough.

    Messages are sent by gloo, those between GPUs by nccl; each worker of a machine takes the GPU of its number.
    """
    is_one_of_several = "MASTER_ADDR" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1
    if not is_one_of_several or not dist.is_available() or dist.is_initialized():
        return
    backend = "gloo"
    if th.cuda.is_available():
        backend = "cpu:gloo,cuda:nccl"
        th.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % th.cuda.device_count())
    if sys.platform == "linux":
        with suppress(OSError):  # where it is forbidden, messages take longer
            _keep_out_of_the_others_way()
    # Its functions hold the group that there is when they are imported, which importing an optimizer does; the group's
    # threads would then outlive ``leave``, and now and then abort the process at its end.
    import_module("torch.distributed.nn.functional")
    dist.init_process_group(backend)
    atexit.register(leave)
    # torch begins with the same random numbers in every process, in which models without a seed would act alike.
    th.manual_seed(th.initial_seed() + rank())


def _keep_out_of_the_others_way() -> None:
    """Let no thread that handles a message wait for one that computes.

    A message goes through several threads of each worker. As a batch job none of them waits for the end of another's
    time slice (4 ms), which makes a message's mean several times its median otherwise. If there is one worker for each
    core, each keeps to its own: its threads then run while it waits for the message, and not on another's core.
    """
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    own = sorted(os.sched_getaffinity(0))
    if len(own) == int(os.environ.get("LOCAL_WORLD_SIZE", "0")):
        os.sched_setaffinity(0, {own[int(os.environ["LOCAL_RANK"])]})


def size() -> int:
    """Return how many workers there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return this worker's number; the first, 0, logs, evaluates and saves."""
    return dist.get_rank() if size() > 1 else 0


@contextmanager
def _message() -> Iterator[None]:
    """Say in one line what it means that a message does not arrive."""
    try:
        yield
    except RuntimeError as error:
        raise WorkerError(
            f"Worker {rank()} of {size()} has lost the others: one of them has stopped (its own message says why). "
            f"Start all of them again from the last archive. ({str(error).splitlines()[0]})"
        ) from error


def add(x: np.ndarray | th.Tensor) -> None:
    """Sum an array over all workers, in its own memory; its bits are the same everywhere then."""
    if size() > 1:
        with _message():
            dist.all_reduce(th.from_numpy(x) if isinstance(x, np.ndarray) else x)


def total(numbers: Sequence[float]) -> list[float]:
    """Return the sum of each number over all workers."""
    if size() == 1:
        return list(numbers)
    sums = np.array(numbers, np.float64)
    add(sums)
    found: list[float] = sums.tolist()
    return found


def least(number: int) -> int:
    """Return the smallest of the workers' numbers."""
    if size() == 1:
        return number
    message = th.tensor(number)
    with _message():
        dist.all_reduce(message, dist.ReduceOp.MIN)
    return int(message)


def mean(x: Any, n: float) -> Any:
    """Return the mean of what each worker has found on ``n`` samples of its own: a number or an array."""
    if size() == 1:
        return x
    if not isinstance(x, np.ndarray | th.Tensor):
        of_all, n_all = total([x * n, n]) if n else total([0.0, 0.0])
        return of_all / n_all if n_all else float("nan")
    if isinstance(x, np.ndarray):
        message: Any = np.append(x * n, n).astype(x.dtype)
    else:
        message = th.cat([x * n, x.new_tensor([n])])
    add(message)
    return message[:-1] / message[-1]


def mean_of(figures: Mapping[str, float]) -> dict[str, float]:
    """Return the mean of each figure over the workers that have it."""
    if size() == 1:
        return dict(figures)
    found: dict[str, list[float]] = {}
    for its in gathered(dict(figures)):
        for name, value in its.items():
            found.setdefault(name, []).append(value)
    return {name: sum(values) / len(values) for name, values in found.items()}


def gathered(x: T) -> list[T]:
    """Return what each worker has, in the order of their ranks: anything that can be pickled."""
    if size() == 1:
        return [x]
    found: list[Any] = [None] * size()
    with _message():
        dist.all_gather_object(found, x)
    return found


def agree(keep_going: bool) -> bool:
    """Return whether all workers want to go on."""
    return total([not keep_going])[0] == 0.0


@th.no_grad()
def broadcast(tensors: Iterable[th.Tensor]) -> None:
    """Give all workers the numbers that the first one has."""
    if size() > 1:
        with _message():
            for tensor in tensors:
                dist.broadcast(tensor.data, src=0)


def require_equal(what: str, tensors: Iterable[th.Tensor]) -> None:
    """Check that all workers have the same numbers, to the bit.

    :param what: they are, for the message
    :raises WorkerError: they have not
    """
    if size() == 1:
        return
    own = 0
    for tensor in tensors:
        own = crc32(tensor.detach().cpu().contiguous().view(-1).view(th.uint8).numpy().tobytes(), own)
    of_all = gathered(own)
    if len(set(of_all)) > 1:
        other = next(i for i, x in enumerate(of_all) if x != of_all[0])
        raise WorkerError(
            f"{what} of worker {other} are no longer those of worker 0. All workers must make the same changes to the "
            "model: look for callbacks that change it on some of them, or by random numbers."
        )


def leave() -> None:
    """Leave the other workers, whose next message then fails."""
    if size() > 1:
        dist.destroy_process_group()


@contextmanager
def together() -> Iterator[None]:
    """Leave the others if the block fails, so that they learn of it with their next message instead of waiting.

    Otherwise wait for them at its end: when a process ends, what another has not yet read of its last message is lost.
    """
    try:
        yield
    except BaseException:
        leave()
        raise
    with suppress(WorkerError):  # one has ended already, so all had read the last message
        add(np.zeros(1))

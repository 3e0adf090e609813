"""The closed-form LSTM against torch's, on packed sequences."""

import copy
import os
import subprocess
import sys

import numpy as np
import pytest
import torch as th
from conftest import pairs
from threadpoolctl import threadpool_limits
from torch.nn.utils.rnn import PackedSequence

from sb3_pg.common.engines.lstm import Lstm, _width, state_after
from sb3_pg.common.products import MATRIX_LIMIT, VECTOR_LIMIT

LENGTHS = [[7, 4, 4, 2, 1], [1, 1, 1], [9], [1], [5, 5, 5, 5]]
TOLERANCES = {th.float64: {"rtol": 1e-10, "atol": 1e-12}, th.float32: {"rtol": 1e-4, "atol": 1e-5}}


class Case:
    """Both of them with the same weights, and random inputs, memory, derivatives and changes."""

    def __init__(self, lengths, layers=1, dtype=th.float64, inputs=3, width=5):
        self.torch = th.nn.LSTM(inputs, width, layers, dtype=dtype)
        self.parameters = list(self.torch.parameters())
        arrays = [p.detach().numpy() for p in self.parameters]
        self.lstm = Lstm([tuple(arrays[start : start + 4]) for start in range(0, len(arrays), 4)])
        self.lengths, self.sizes = lengths, [sum(step < n for n in lengths) for step in range(lengths[0])]
        n = sum(lengths)
        self.x, self.d_x, self.d = th.randn(n, inputs), th.randn(n, inputs), th.randn(n, width)
        self.h, self.c = th.randn(2, layers, len(lengths), width)
        for name in ("x", "d_x", "d", "h", "c"):
            setattr(self, name, getattr(self, name).to(dtype))
        self.change = [th.randn_like(p) for p in self.parameters]
        self.tolerance = TOLERANCES[dtype]

    @property
    def memory(self):
        return self.h.numpy(), self.c.numpy()

    def run_torch(self, x, lstm=None):
        """The outputs and the memory after the last step of each sequence."""
        packed, memory = PackedSequence(x, th.tensor(self.sizes)), (self.h.to(x.dtype), self.c.to(x.dtype))
        outputs, memory = (lstm or self.torch)(packed, memory)
        return outputs.data, memory

    def forward(self):
        return self.lstm.forward(self.x.numpy(), self.sizes, self.memory)

    def check(self, found, expected):
        expected = expected.detach().numpy()
        assert found.dtype == expected.dtype
        np.testing.assert_allclose(found, expected, **self.tolerance)

    def check_passes(self):
        outputs, trace = self.forward()
        x = self.x.clone().requires_grad_()
        expected, _ = self.run_torch(x)
        self.check(outputs, expected)
        *by_parameters, by_x = th.autograd.grad(expected, [*self.parameters, x], self.d)
        self.check_backward(trace, th.cat([g.flatten() for g in by_parameters]), by_x)
        self.check_tangent(trace)

    def check_backward(self, trace, by_parameters, by_x):
        gradient, again = np.full((2, self.lstm.size), np.nan, self.x.numpy().dtype)
        assert self.lstm.backward(trace, self.d.numpy(), self.lstm.split(gradient)) is None
        self.check(self.lstm.backward(trace, self.d.numpy(), self.lstm.split(again), wants_dx=True), by_x)
        self.check(gradient, by_parameters)
        np.testing.assert_array_equal(gradient, again)

    def check_tangent(self, trace):
        """Torch has no forward mode here: J v is the derivative of v J^T u by u, which its double backward knows."""
        lstm = copy.deepcopy(self.torch).double()
        x, u = self.x.double().requires_grad_(), th.zeros(self.d.shape, dtype=th.float64, requires_grad=True)
        outputs, _ = self.run_torch(x, lstm)
        gradients = th.autograd.grad(outputs, [*lstm.parameters(), x], u, create_graph=True)
        change = self.lstm.split(th.cat([v.flatten() for v in self.change]).numpy())
        for d_x, v in ((None, self.change), (self.d_x.numpy(), [*self.change, self.d_x])):
            inner = sum((a * b).sum() for a, b in zip(gradients, v, strict=False))  # the last may be missing
            (expected,) = th.autograd.grad(inner, u, retain_graph=True)
            self.check(self.lstm.tangent(trace, change, d_x), expected.to(self.x.dtype))


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_the_three_passes(lengths, layers, dtype):
    Case(lengths, layers, dtype).check_passes()


# 67 columns cannot be divided into blocks; of 96 and of 256, few rows and many are multiplied by different blocks.
WIDTHS = [(3, 1), (1, 67), (4, 96), (4, 256)]


THREADS = ["one", "one of torch", "two"]


@pytest.fixture
def has_one_thread(request):
    """Whether the BLAS has; torch, which takes large products then if it has one itself, may have two as well."""
    before = th.get_num_threads()
    th.set_num_threads(2 if request.param == "two" else 1)
    with threadpool_limits(1 if request.param == "one" else 2, user_api="blas"):
        yield request.param == "one"
    th.set_num_threads(before)


@pytest.mark.parametrize(
    "lengths, widths, has_one_thread",
    pairs([[6] + [3] * 40 + [2] * 40, [12, 9, 5, 4, 2, 2, 1]], WIDTHS, THREADS),
    indirect=["has_one_thread"],
)
def test_layers_of_any_width_on_any_number_of_threads(lengths, widths, has_one_thread):
    inputs, width = widths
    case = Case(lengths, 2, inputs=inputs, width=width)
    case.lstm.blas_has_one_thread = has_one_thread
    case.check_passes()


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_state_after_each_row(lengths, layers):
    case = Case(lengths, layers)
    _, trace = case.forward()
    _, expected = case.run_torch(case.x)
    starts = np.cumsum([0, *case.sizes])
    ends = [starts[n - 1] + sequence for sequence, n in enumerate(lengths)]
    for found, some, memory in zip(state_after(trace), state_after(trace, np.array(ends)), expected, strict=True):
        assert found.shape == (layers, sum(lengths), 5)
        case.check(found[:, ends], memory)
        case.check(some, memory)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("n", [1, 2, 20])
def test_steps_are_those_of_the_forward_pass(n, layers, dtype):
    case = Case([6] * n, layers, dtype)
    outputs, trace = case.forward()
    h, c = state_after(trace)
    memory = case.memory
    for step in range(6):
        rows = slice(step * n, (step + 1) * n)
        output, memory = case.lstm.step(case.x.numpy()[rows], memory)
        for found, expected in zip((output, *memory), (outputs[rows], h[:, rows], c[:, rows]), strict=True):
            case.check(found, th.from_numpy(expected))


@pytest.mark.parametrize("inputs, width", [*WIDTHS, (10_000, 8)])
@pytest.mark.parametrize("n", [1, 8, 70])
@pytest.mark.parametrize("has_one_thread", THREADS, indirect=True)
def test_a_step_on_any_number_of_threads(n, inputs, width, has_one_thread):
    case = Case([1] * n, 2, inputs=inputs, width=width)
    case.lstm.blas_has_one_thread = has_one_thread
    output, memory = case.lstm.step(case.x.numpy(), case.memory)
    expected, expected_memory = case.run_torch(case.x)
    for found, right in zip((output, *memory), (expected, *expected_memory), strict=True):
        case.check(found, right)


CPU_TIME = """
import time
import numpy as np, torch as th
from sb3_pg.common.engines.lstm import Lstm
th.set_num_threads(1)
def share(inputs, width, sizes, passes, steps):
    lstm = Lstm([tuple(p.detach().numpy() for p in th.nn.LSTM(inputs, width).parameters())])
    x, d = np.ones((sum(sizes), inputs), np.float32), np.ones((sum(sizes), width), np.float32)
    memory, gradient = np.zeros((2, 1, sizes[0], width), np.float32), lstm.split(np.ones(lstm.size, np.float32))
    time.sleep(0.3)  # threads that have initialised the weights still wait for more
    process, thread = time.process_time(), time.thread_time()
    for _ in range(passes):
        _, trace = lstm.forward(x, sizes, memory)
        lstm.tangent(trace, gradient, x)
        lstm.backward(trace, d, gradient, wants_dx=True)
    for _ in range(steps):
        lstm.step(x[: sizes[0]], memory)
    thread = time.thread_time() - thread
    return (time.process_time() - process - thread) / thread
print(share(4, 256, [8] * 20 + [3] * 20, 10, 0))
print(share(4, 256, [1] * 60, 10, 0))
print(share(1, 64, [1] * 900, 5, 0))
print(share(4, 67, [30] * 5, 10, 0))
print(share(2000, 64, [2] * 5, 10, 0))
print(share(1024, 256, [1], 0, 100))
print(share(300, 128, [8], 0, 200))
"""


def test_no_other_thread_works():
    """By the processor's account, with no variable set: threads that wait in a loop show there too."""
    free = {name: value for name, value in os.environ.items() if "NUM_THREADS" not in name}
    command = [sys.executable, "-W", "ignore", "-c", CPU_TIME]
    shares = subprocess.run(command, env=free, capture_output=True, text=True, check=True).stdout.split()
    assert len(shares) == 7
    assert max(map(float, shares)) < 0.1, shares


@pytest.mark.parametrize("n", [1, 2, 7, 64, 65, 2000])
@pytest.mark.parametrize("k", [1, 4, 64, 256, 1000, 10_000])
@pytest.mark.parametrize("m", [1, 2, 67, 96, 256])
def test_products_of_blocks_stay_on_this_thread(n, k, m):
    width = _width(n, k, m, blas_has_one_thread=False)
    assert width == 0 or m % width == 0
    assert n * k * width <= (VECTOR_LIMIT - 1 if 1 in (n, width) else MATRIX_LIMIT)
    assert 1 <= _width(n, k, m, blas_has_one_thread=True) <= m


def test_nothing_given_is_written_to():
    case = Case([4, 2, 1], 2)
    flat = th.cat([v.flatten() for v in case.change]).numpy()
    given = [*case.memory, case.x.numpy(), case.d.numpy(), case.d_x.numpy(), flat]
    given += [array for layer in case.lstm.pieces for array in layer]
    for array in given:
        array.flags.writeable = False
    _, trace = case.forward()
    left = [array.copy() for layer in trace.layers for array in layer]
    case.lstm.backward(trace, case.d.numpy(), case.lstm.split(np.empty(case.lstm.size)), wants_dx=True)
    case.lstm.tangent(trace, case.lstm.split(flat), case.d_x.numpy())
    case.lstm.step(case.x.numpy()[:3], case.memory)
    for array, before in zip((array for layer in trace.layers for array in layer), left, strict=True):
        np.testing.assert_array_equal(array, before)


def test_weights_that_change_are_seen():
    case = Case([3, 2])
    case.forward()
    with th.no_grad():
        for p in case.parameters:
            p.mul_(2.0)
    case.check_passes()


def test_split():
    case = Case([1], 2)
    parameters = th.nn.utils.parameters_to_vector(case.parameters).detach().numpy()
    assert case.lstm.size == len(parameters)
    for views, layer in zip(case.lstm.split(parameters), case.lstm.pieces, strict=True):
        for view, array in zip(views, layer, strict=True):
            assert np.shares_memory(view, parameters)
            np.testing.assert_array_equal(view, array)

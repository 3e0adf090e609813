"""Small passes run on one thread, and nobody else's number of threads changes for it."""

import os
import subprocess
import sys
import threading
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from threadpoolctl import threadpool_info

from sb3_pg import PPO, REINFORCE, TRPO
from sb3_pg.common import products
from sb3_pg.common.products import MATRIX_LIMIT, VECTOR_LIMIT, inner, product, row_sums
from sb3_pg.common.threads import WORTH_A_THREAD, choose_threads, threads_to_choose


@pytest.fixture
def two_threads():
    before = th.get_num_threads()
    th.set_num_threads(2)
    yield
    th.set_num_threads(before)


SHAPES = [(1, 5, 3), (7, 5, 3), (64, 64, 64), (128, 64, 64), (257, 64, 6), (2048, 64, 64), (2048, 64, 1)]
SHAPES += [
    (64, 256, 17),
    (257, 64, 64),
    (64, 300, 64),
    (1, 1, 300_000),
    (2, 300_000, 1),
    (3, 65_537, 2),
    (65, 70_000, 3),
]
SHAPES += [
    (1, 140_000, 2),
    (70_000, 2, 3),
    (2, 3, 140_000),
    (1, 300_000, 1),
    (1, 256, 256),
    (1, 1024, 1024),
    (3, 1024, 1024),
    (1, 20_000, 64),
    (65, 20_000, 3),
    (1, 3000, 64),
]


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("n, k, m", SHAPES)
def test_product(n, k, m, dtype, count, two_threads):
    th.set_num_threads(count)
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(n, k)).astype(dtype), rng.normal(size=(m, k)).astype(dtype)
    expected = a.astype(np.float64) @ b.T.astype(np.float64)
    tolerance = 1e-12 if dtype is np.float64 else 1e-5
    out = np.empty((n, m), dtype)
    assert product(a, b.T, out) is out
    for found in (out, product(a, b.T), product(np.asfortranarray(a), b.T)):
        assert found.dtype == dtype
        np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * k)


@pytest.mark.parametrize("n, k, m", SHAPES)
def test_no_product_of_numpy_is_above_the_limits(n, k, m, two_threads, monkeypatch):
    """Not even where there is nothing but NumPy, since torch has several threads."""
    shapes = []

    def noting(function):
        return lambda a, b, *rest, **more: shapes.append((*a.shape[-2:], b.shape[-1])) or function(a, b, *rest, **more)

    monkeypatch.setattr(
        products, "np", SimpleNamespace(**{**vars(np), "dot": noting(np.dot), "matmul": noting(np.matmul)})
    )
    a, b = np.ones((n, k), np.float32), np.ones((k, m), np.float32)
    assert (product(a, b) == k).all()
    assert shapes
    for rows, depth, columns in shapes:
        size = rows * depth * columns
        assert size < VECTOR_LIMIT or (size <= MATRIX_LIMIT and rows > 1 and columns > 1)


@pytest.mark.parametrize("n", [0, 1, 8192, 8193, 30_000])
def test_inner_and_row_sums(n):
    x = np.random.default_rng(0).normal(size=(n, 3))
    assert inner(x[:, 0], x[:, 1]) == pytest.approx(float((x[:, 0] * x[:, 1]).sum()), abs=1e-10)
    assert inner(*map(th.from_numpy, (x[:, 0], x[:, 1]))) == pytest.approx(inner(x[:, 0], x[:, 1]))
    np.testing.assert_allclose(row_sums(x), x.sum(axis=1))


CPU_TIME = """
import sys, time
import numpy as np, torch as th
from stable_baselines3.common.env_util import make_vec_env
from sb3_pg import PPO, REINFORCE, TRPO
from sb3_pg.common.products import product, inner, row_sums
if sys.argv[1] == "one": th.set_num_threads(1)
def share(work):
    time.sleep(0.3)  # threads that have initialised the weights still wait for more
    process, thread = time.process_time(), time.thread_time()
    work()
    thread = time.thread_time() - thread
    return (time.process_time() - process - thread) / thread
def learn(algorithm, width, n_envs, **options):
    model = algorithm("MlpPolicy", make_vec_env("CartPole-v1", n_envs), policy_kwargs={"net_arch": [width, width]},
                      seed=0, device="cpu", **options)
    return share(lambda: model.learn(1))
rng = np.random.default_rng(0)
shapes = [(64, 64, 64), (256, 64, 64), (1, 256, 256), (2048, 64, 1), (1, 2048, 64), (5, 1024, 1024), (3, 3000, 64)]
pairs = [(rng.normal(size=(n, k)), rng.normal(size=(k, m))) for n, k, m in shapes]
def products():
    for a, b in pairs * 30:
        product(a, b), inner(b.ravel(), b.ravel()), row_sums(a)
print(share(products))
print(learn(PPO, 64, 8, n_steps=128, batch_size=256))
print(learn(PPO, 512, 2, n_steps=64, batch_size=64, n_epochs=2))
print(learn(TRPO, 256, 8, n_steps=64))
print(learn(REINFORCE, 256, 8))
print(learn(TRPO, 64, 2, n_steps=128, engine="autograd"))
"""


@pytest.mark.parametrize("torch_threads", ["one", "usual"])
def test_no_other_thread_works_for_small_networks(torch_threads):
    """By the processor's account, with no variable set: threads that wait in a loop show there too."""
    free = {name: value for name, value in os.environ.items() if "NUM_THREADS" not in name}
    command = [sys.executable, "-W", "ignore", "-c", CPU_TIME, torch_threads]
    shares = subprocess.run(command, env=free, capture_output=True, text=True, check=True).stdout.split()
    assert len(shares) == 6
    assert max(map(float, shares)) < 0.1, shares


def counts():
    blas = [library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"]
    found = []
    thread = threading.Thread(target=lambda: found.append(th.get_num_threads()))
    thread.start()
    thread.join()
    return blas, th.get_num_threads(), found, th.distributions.Distribution._validate_args


class Watch(BaseCallback):
    """Lets the main thread look while two trainings are under way."""

    def __init__(self, barrier):
        super().__init__()
        self.barrier = barrier

    def _on_step(self):
        if self.n_calls in (1, 20):
            self.barrier.wait(60)  # both are here
            self.barrier.wait(60)  # the main thread has looked
        return True


@pytest.mark.parametrize("policy_kwargs", [{}, {"use_expln": True}], ids=str)  # closed form, gSDE on autograd
def test_two_trainings_in_two_threads_change_nothing_for_others(policy_kwargs, two_threads):
    before, barrier = counts(), threading.Barrier(3)
    models = [
        PPO("MlpPolicy", "Pendulum-v1", n_steps=64, use_sde=bool(policy_kwargs), policy_kwargs=policy_kwargs),
        TRPO("MlpPolicy", "Pendulum-v1", n_steps=64, use_sde=bool(policy_kwargs), policy_kwargs=policy_kwargs),
    ]
    after = []

    def learn(model):
        model.learn(192, Watch(barrier))
        after.append(th.get_num_threads())

    threads = [threading.Thread(target=learn, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    for _ in range(2):
        barrier.wait(60)
        assert counts() == before
        barrier.wait(60)
    for thread in threads:
        thread.join(60)
    assert counts() == before
    assert after == [2, 2]


@pytest.mark.parametrize("algorithm", [PPO, TRPO, REINFORCE])
def test_learning_returns_the_threads_even_if_it_fails(algorithm, two_threads):
    seen = []

    def fail(locals_, _):
        seen.append(th.get_num_threads())
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        algorithm("MlpPolicy", gym.make("CartPole-v1")).learn(64, fail)
    assert seen == [1]
    assert th.get_num_threads() == 2


def test_large_passes_keep_the_usual_threads(two_threads):
    choose_threads(0)
    assert th.get_num_threads() == 2  # nobody has lent them
    with threads_to_choose():
        choose_threads(WORTH_A_THREAD - 1)
        assert th.get_num_threads() == 1
        with threads_to_choose():
            choose_threads(WORTH_A_THREAD)
            assert th.get_num_threads() == 2
        assert th.get_num_threads() == 1
    assert th.get_num_threads() == 2


def test_the_limits_are_those_of_the_blas_here():
    """Just above them OpenBLAS would use a second thread, so ``product`` must not leave it the choice."""
    assert MATRIX_LIMIT == 65536 * 4
    assert VECTOR_LIMIT == 2304 * 4

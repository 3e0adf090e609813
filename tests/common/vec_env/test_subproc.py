"""Processes that end are named, and closing returns."""

import gc
import os
import signal
import threading
from functools import partial

import gymnasium as gym
import numpy as np
import pytest
from conftest import FakeEnv
from stable_baselines3.common import vec_env as sb3
from tiny_models import tiny, weights

from sb3_pg import PPO
from sb3_pg.common.errors import EnvironmentProcessError
from sb3_pg.common.vec_env import SubprocVecEnv


class Dying(FakeEnv):
    """Raises in its fifth step."""

    def step(self, action):
        if self.episode == 0 and self.steps == 4:
            raise RuntimeError("it raises")
        return super().step(action)


@pytest.fixture(autouse=True)
def _no_hanging():
    def hang(*_):
        raise AssertionError("it hangs")

    signal.signal(signal.SIGALRM, hang)
    signal.alarm(60)
    yield
    signal.alarm(0)


def make(kind=sb3.SubprocVecEnv, method="fork", second=FakeEnv):
    return kind([FakeEnv, partial(second, lengths=(50,)), FakeEnv], start_method=method)


@pytest.mark.parametrize("method", ["fork", "forkserver"])
@pytest.mark.parametrize("which", [0, 2])
def test_a_process_that_is_killed(method, which):
    env = make(method=method)
    model = tiny(PPO, env)
    assert type(env) is SubprocVecEnv
    model.learn(96)
    os.kill(env.processes[which].pid, signal.SIGKILL)
    before = weights(model)
    with pytest.raises(
        EnvironmentProcessError, match=rf"process of environment {which} has ended \(exit code -9.*set_env"
    ):
        model.learn(96, reset_num_timesteps=False)
    np.testing.assert_array_equal(weights(model), before)
    env.close()
    assert not any(process.is_alive() for process in env.processes)
    model.set_env(make())
    model.learn(96, reset_num_timesteps=False)
    assert not np.array_equal(weights(model), before)
    model.env.close()


def test_a_process_whose_environment_raises():
    env = make(second=Dying)
    with pytest.raises(EnvironmentProcessError, match=r"environment 1 has ended .exit code 1: look for its traceback"):
        tiny(PPO, env).learn(96)
    env.close()


def test_a_stopped_process_can_be_closed_once_another_is_dead(monkeypatch):
    monkeypatch.setattr("sb3_pg.common.vec_env.subproc._PATIENCE", 0.2)
    env = make(SubprocVecEnv)
    env.reset()
    os.kill(env.processes[0].pid, signal.SIGKILL)
    os.kill(env.processes[1].pid, signal.SIGSTOP)
    env.processes[0].join()
    env.close()
    assert not any(process.is_alive() for process in env.processes)


def test_the_numbers_are_sb3s():
    envs = [make(kind) for kind in (sb3.SubprocVecEnv, SubprocVecEnv)]
    for env in envs:
        env.seed(3)
    results = [[env.reset(), *(env.step(np.zeros((3, 2), np.float32))[:3] for _ in range(9))] for env in envs]
    for ours, theirs in zip(*results, strict=True):
        np.testing.assert_equal(ours, theirs)
    for env in envs:
        env.close()


def test_after_an_interrupt_answers_that_were_not_read_are_thrown_away():
    env = make(SubprocVecEnv)
    env.reset()
    env.step_async(np.zeros((3, 2), np.float32))
    assert env.get_attr("render_mode") == [None] * 3
    env.step_async(np.zeros((3, 2), np.float32))
    assert env.reset().shape == (3, 3)
    env.close()


@pytest.mark.parametrize(
    "command", [("has_attr", "steps"), ("get_attr", "steps"), ("is_wrapped", FakeEnv), ("reset", (None, {}))]
)
def test_an_answer_that_an_interrupt_left_is_not_taken_for_the_next(command):
    envs = [make(SubprocVecEnv), make(SubprocVecEnv)]
    for env in envs:
        env.seed(3)
        env.reset()
        if command[0] == "reset":
            env.reset()
    envs[0].remotes[1].send(command)
    if command[0] == "reset":
        envs[1].remotes[1].send(command)
        envs[1].remotes[1].recv()
    results = [env.step(np.zeros((3, 2), np.float32))[:3] for env in envs]
    np.testing.assert_equal(*results)
    envs[0].remotes[2].send(command)
    assert envs[0].get_attr("render_mode") == [None] * 3
    for env in envs:
        env.close()


def in_gymnasiums_processes():
    return gym.vector.AsyncVectorEnv([FakeEnv] * 3, context="fork")


@pytest.mark.parametrize("make", [make, in_gymnasiums_processes])
def test_an_interrupt_in_learn(make):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background of shells
    gc.disable()  # an interrupt of somebody's callback of it would be lost
    model = tiny(PPO, make())
    model.learn(96)
    for delay in (0.02, 0.05, 0.09):
        threading.Timer(delay, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            model.learn(10**6, reset_num_timesteps=False)
        model.learn(96, reset_num_timesteps=False)
    gc.enable()
    signal.signal(signal.SIGINT, before)
    model.env.close()

"""After an exception what is there is whole, can be saved, and learning goes on."""

import importlib.util
import signal
import sys
import tempfile
import threading
from pathlib import Path

import numpy as np
import pytest
import torch as th
from conftest import OBSERVATION_SPACES, FakeEnv, make_envs, pairs
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from tiny_models import ALL, tiny, weights

from sb3_pg import PPO, REINFORCE, TRPO
from sb3_pg.common.closing import ScreenLogger
from sb3_pg.common.engines.autograd import AutogradEngine
from sb3_pg.common.errors import ArgumentError, NonFiniteError, PolicyError, is_finite
from sb3_pg.common.interrupts import Interrupted, interrupts_raised, saved_when_interrupted, uninterrupted

pytestmark = pytest.mark.filterwarnings("ignore")

_spec = importlib.util.spec_from_file_location("faults", Path(__file__).parents[2] / "benchmarks" / "faults.py")
faults = importlib.util.module_from_spec(_spec)
sys.modules["faults"] = faults  # dataclasses look there
_spec.loader.exec_module(faults)

SIDES = ["PPO", "TRPO, autograd", "REINFORCE"]
MOMENTS = {"reset raises": 25, "rollout start raises": 1, "rollout end raises": 1}


def check(result):
    answers = {name: getattr(result, name) for name in ("kept", "told", "saved", "goes_on")}
    assert all(answers.values()), (answers, result.notes, result.message)


@pytest.mark.parametrize("side, what, normalized", pairs(SIDES, faults.ENVIRONMENT, [False, True]))
def test_faults_of_environments(side, what, normalized):
    check(faults.run(side, what, MOMENTS.get(what, 40), normalized))


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("what", [*faults.CALLBACK, *faults.POLICY])
def test_faults_of_callbacks_and_policies(side, what):
    check(faults.run(side, what, MOMENTS.get(what, 20) if what in faults.CALLBACK else 0, False))


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("share", [0.3, 0.55, 0.8, 0.95])
def test_interrupts_at_any_line(side, share):
    check(faults.run(side, "interrupt", share, share > 0.5))


# ------------------------------------------------------------- the rollout goes on


class Failing(BaseCallback):
    """Raises once, at an event of a rollout."""

    def __init__(self, event, step=0):
        super().__init__()
        self.event, self.step, self.is_over, self.n = event, step, False, 0

    def _maybe(self, event):
        if event == self.event and not self.is_over and self.model.num_timesteps > 40 + self.step:
            self.is_over = True
            raise KeyboardInterrupt

    def _on_step(self):
        self._maybe("step")
        return True

    def _on_rollout_start(self):
        self._maybe("start")

    def _on_rollout_end(self):
        self._maybe("end")


@ALL
@pytest.mark.parametrize("event, step", [("step", 3), ("step", 6), ("start", 0), ("end", 0)])
def test_an_interrupted_rollout_is_completed(algorithm, event, step):
    plain = tiny(algorithm, make_envs(n_envs=2)).learn(300)
    model = tiny(algorithm, make_envs(n_envs=2))
    with pytest.raises(KeyboardInterrupt):
        model.learn(300, Failing(event, step))
    model.learn(300 - model.num_timesteps, reset_num_timesteps=False)
    np.testing.assert_array_equal(weights(model), weights(plain))


@ALL
def test_an_interrupted_update_is_made_again(algorithm, monkeypatch):
    plain = tiny(algorithm, make_envs(n_envs=2), learning_rate=1e-2, engine="autograd").learn(96)
    model = tiny(algorithm, make_envs(n_envs=2), learning_rate=1e-2, engine="autograd")
    count, step = [0], AutogradEngine.step

    def interrupted(self, *arguments):
        count[0] += 1
        if count[0] == 6:
            raise KeyboardInterrupt
        return step(self, *arguments)

    monkeypatch.setattr(AutogradEngine, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.learn(96)
    assert model._n_updates < plain._n_updates
    model.learn(96 - model.num_timesteps, reset_num_timesteps=False)
    assert model._n_updates == plain._n_updates
    # Minibatches are drawn anew.
    assert np.abs(weights(model) - weights(plain)).max() < 0.2


@pytest.mark.parametrize("engine", ["auto", "autograd"])
def test_a_trial_step_of_the_line_search_is_taken_back(engine, monkeypatch):
    """Also where nothing else is kept: ``train`` called by hand."""
    model = tiny(TRPO, make_envs(), engine=engine).learn(32)
    before = weights(model)

    def search(attempt, *more):
        attempt(9.0)
        assert not np.array_equal(weights(model), before)
        raise KeyboardInterrupt

    monkeypatch.setattr("sb3_pg.trpo.trpo.backtracking_line_search", search)
    with pytest.raises(KeyboardInterrupt):
        model.train()
    np.testing.assert_array_equal(weights(model), before)


# ------------------------------------------------------------------ numbers


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("shape", [(2,), (8, 3), (3, 4000)])
def test_is_finite(kind, shape):
    x = np.ones(shape, kind)
    assert is_finite(x)
    assert is_finite(np.full(shape, 60000, kind))
    for value in (np.nan, np.inf, -np.inf, *([1e39, -1e300] if kind is np.float64 else [])):
        for index in (0, -1):
            bad = x.copy()
            bad.flat[index] = value
            assert not is_finite(bad)
    if kind is not np.float16:
        assert is_finite(np.full(shape, -3e38, kind))
    assert is_finite(np.full(shape, 7, np.int64))


def test_observations_whose_squares_overflow_are_learned_from():
    env = make_envs()
    step = env.step_wait

    def large():
        observations, *rest = step()
        return observations * np.float32(1e25), *rest

    env.step_wait = large
    assert np.isfinite(weights(tiny(PPO, env).learn(64))).all()


@pytest.mark.parametrize("algorithm", [TRPO, REINFORCE])
def test_a_gradient_whose_square_overflows(algorithm):
    """Adam would take it, remember an infinite square, and never move that parameter again."""
    env = make_envs()
    step = env.step_wait

    def rich():
        observations, rewards, *rest = step()
        return observations, rewards * np.float32(3e18), *rest

    env.step_wait = rich
    options = {REINFORCE: {"max_grad_norm": None, "vf_coef": 0.0}}.get(algorithm, {})
    model = tiny(algorithm, env, **options)
    before = weights(model)
    with pytest.raises(PolicyError, match="last good"):
        model.learn(64)
    np.testing.assert_array_equal(weights(model), before)
    assert not model.policy.optimizer.state


@ALL
def test_a_broken_archive_is_named_before_the_environment_is_stepped(algorithm):
    model = tiny(algorithm, make_envs()).learn(32)
    with th.no_grad():
        model.policy.value_net.bias.fill_(np.nan)
    before = model.env.envs[0].unwrapped.steps
    model.num_timesteps = 0
    with pytest.raises(NonFiniteError, match=r"policy cannot act: its parameters value_net\.bias .*Load an archive"):
        model.learn(32, reset_num_timesteps=False)
    assert model.env.envs[0].unwrapped.steps == before


def test_a_policy_that_has_diverged_is_to_blame_for_what_its_actions_lead_to():
    class Fragile(FakeEnv):
        def step(self, action):
            observation, *rest = super().step(action)
            return observation * np.abs(action).max() ** 2, *rest

    env = Fragile(OBSERVATION_SPACES["float64"], spaces.Box(-3e38, 3e38, (2,), np.float32))
    model = tiny(PPO, env)
    with th.no_grad():
        model.policy.log_std.fill_(60.0)
    with pytest.raises(PolicyError, match=r"log_std.*observation of environment 0"):
        model.learn(64)


@ALL
@pytest.mark.parametrize("event, step", [("step", 3), ("start", 0), ("end", 0)])
def test_a_callback_that_replaces_the_environments_changes_nothing(algorithm, event, step):
    plain = tiny(algorithm, make_envs(n_envs=2)).learn(300)
    model = tiny(algorithm, make_envs(n_envs=2))

    class Replacing(Failing):
        def _maybe(self, event):
            try:
                super()._maybe(event)
            except KeyboardInterrupt:
                self.model.set_env(make_envs(n_envs=2))

    with pytest.raises(ArgumentError, match="`set_env` cannot be called while learn"):
        model.learn(300, Replacing(event, step))
    model.learn(300 - model.num_timesteps, reset_num_timesteps=False)
    np.testing.assert_array_equal(weights(model), weights(plain))


# ------------------------------------------------------------- what learn leaves


@ALL
def test_learning_in_another_thread_meanwhile(algorithm):
    model, errors = tiny(algorithm, make_envs()), []

    def learn():
        try:
            model.learn(32)
        except ArgumentError as error:
            errors.append(str(error))

    def meanwhile(*_):
        if not errors:
            thread = threading.Thread(target=learn)
            thread.start()
            thread.join()
        return True

    model.learn(64, meanwhile)
    assert "learning already" in errors[0]
    assert len(errors) == 1
    assert model.num_timesteps >= 64


def test_no_folders_and_threads_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = threading.enumerate()
    model = tiny(PPO, make_envs()).learn(32)
    model.verbose = 1
    model.learn(32, progress_bar=True)
    assert threading.enumerate() == before
    assert list(tmp_path.iterdir()) == []
    assert isinstance(model.logger, ScreenLogger)
    assert Path(model.logger.dir).is_dir()


def test_tensorboard_leaves_no_thread_and_can_be_written_to_afterwards(tmp_path):
    before = threading.enumerate()
    model = tiny(PPO, make_envs(), tensorboard_log=str(tmp_path)).learn(32)
    assert threading.enumerate() == before
    model.logger.record("mine", 1.0)
    model.logger.dump(100)
    for output in model.logger.output_formats:
        output.close()
    assert len(list(tmp_path.rglob("events*"))) == 2


def test_types_that_cannot_work():
    try:
        th.set_default_dtype(th.float16)
        with pytest.raises(ArgumentError, match=r"float16.*set_default_dtype"):
            tiny(PPO, make_envs())
        th.set_default_dtype(th.float64)
        assert np.isfinite(weights(tiny(PPO, make_envs()).learn(32))).all()
        with pytest.raises(ArgumentError, match=r"float64.*set_default_dtype"):
            tiny(PPO, make_envs(), engine="autograd").learn(32)
    finally:
        th.set_default_dtype(th.float32)


# -------------------------------------------------------------------- signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_for_the_end(number):
    done = []
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(Interrupted) as caught, interrupts_raised():
        with uninterrupted():
            signal.raise_signal(number)
            done.append(1)
        done.append(2)
    assert done == [1]
    assert caught.value.exit_status == 128 + number
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_second_signal_does_not_wait(monkeypatch):
    monkeypatch.setattr("sb3_pg.common.interrupts.time.monotonic", iter([0.0, 0.5, 1.5]).__next__)
    done = []
    with pytest.raises(Interrupted), interrupts_raised(), uninterrupted(), uninterrupted():
        for i in range(4):
            done.append(i)
            signal.raise_signal(signal.SIGINT)
    assert done == [0, 1, 2]


def test_a_signal_while_handlers_are_put_back_leaves_none_behind(monkeypatch):
    usual = {number: signal.signal(number, signal.default_int_handler) for number in (signal.SIGINT, signal.SIGTERM)}
    put, numbers = signal.signal, []

    def put_and_interrupt(number, handler):
        put(number, handler)
        numbers.append(number)
        if len(numbers) == 3:  # the first that is put back
            raise KeyboardInterrupt

    monkeypatch.setattr(signal, "signal", put_and_interrupt)
    with pytest.raises(KeyboardInterrupt), uninterrupted():
        pass
    monkeypatch.undo()
    left = [signal.signal(number, handler) for number, handler in usual.items()]
    assert left == [signal.default_int_handler] * 2


def test_interrupted_programs_save(capsys):
    with pytest.raises(Interrupted), saved_when_interrupted(lambda: "a; go on with b"):
        signal.raise_signal(signal.SIGTERM)
    assert capsys.readouterr().err == "Interrupted: saved in a; go on with b\n"


@ALL
@pytest.mark.parametrize("optimizer", [th.optim.Adam, th.optim.RMSprop])
def test_an_optimizer_that_fails_half_way(algorithm, optimizer, monkeypatch):
    model = tiny(algorithm, make_envs(), policy_kwargs={"optimizer_class": optimizer}, engine="autograd").learn(40)
    before, state = weights(model), faults.state_of(model)

    def fail(*args, **kwargs):
        with th.no_grad():
            for p in list(model.policy.parameters())[:3]:
                p.add_(1.0)
        for its in model.policy.optimizer.state.values():
            its["step"] += 1
        raise KeyboardInterrupt

    monkeypatch.setattr(model.policy.optimizer, "step", fail)
    with pytest.raises(KeyboardInterrupt):
        model.learn(64, reset_num_timesteps=False)
    np.testing.assert_array_equal(weights(model), before)
    assert faults.are_equal(faults.state_of(model), state)

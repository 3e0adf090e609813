"""Between two events of a run everything that SB3 leaves there can be read and used, and is logged once."""

import csv
import json

import matplotlib.figure
import numpy as np
import pytest
import stable_baselines3
from conftest import FakeEnv, make_envs
from stable_baselines3.common.callbacks import (
    BaseCallback,
    CallbackList,
    EvalCallback,
    EveryNTimesteps,
    LogEveryNTimesteps,
)
from stable_baselines3.common.logger import Figure, HParam, Image, configure
from stable_baselines3.common.vec_env import VecMonitor
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_models import ALGORITHMS, ALL, tiny

from sb3_pg import PPO, REINFORCE, TRPO
from sb3_pg.common.errors import NonFiniteError

FORMATS = ["csv", "tensorboard", "stdout", "json"]
TEXT_FORMATS = ("csv", "stdout", "log", "json")

#: What every update of an algorithm logs.
OF_AN_UPDATE = {
    PPO: {"train/loss", "train/approx_kl", "train/value_loss", "train/entropy_loss", "train/clip_range"},
    TRPO: {"train/policy_objective", "train/kl_divergence_loss", "train/value_loss", "train/is_line_search_success"},
    REINFORCE: {"train/policy_loss", "train/value_loss", "train/entropy_loss"},
}
OF_ALL = {"train/learning_rate", "train/explained_variance", "train/std", "train/n_updates"}


def monitored(action="box", n_envs=2):
    return VecMonitor(make_envs(action=action, n_envs=n_envs))


def logging_to(model, folder, formats=FORMATS):
    model.set_logger(configure(str(folder), formats))
    return model


def csv_rows(folder):
    """Of the csv file, without what a row has nothing of."""
    with (folder / "progress.csv").open() as file:
        return [{key: value for key, value in row.items() if value} for row in csv.DictReader(file)]


def json_rows(folder):
    return [json.loads(line) for line in (folder / "progress.json").read_text().splitlines()]


def tensorboard_scalars(folder):
    """{name: [(step, value), ...]}"""
    events = EventAccumulator(str(folder)).Reload()
    return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}


def updates_in(rows):
    return [float(row["train/n_updates"]) for row in rows if "train/n_updates" in row]


def n_updates(algorithm, iterations):
    """``train/n_updates`` after each iteration; PPO's counts epochs."""
    return [float(i * (2 if algorithm is PPO else 1)) for i in range(1, iterations + 1)]


class Reader(BaseCallback):
    """Remembers what the logger held at every event."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def _look(self, event):
        self.seen.append((event, self.model._n_updates, dict(self.logger.name_to_value)))

    def _on_training_start(self):
        self._look("training start")

    def _on_rollout_start(self):
        self._look("rollout start")

    def _on_step(self):
        self._look("step")
        return True

    def _on_rollout_end(self):
        self._look("rollout end")

    def _on_training_end(self):
        self._look("training end")


# ---------------------------------------------------------------------------- values


@ALL
def test_the_last_updates_values_can_be_read_at_every_event_until_the_next(algorithm, tmp_path):
    model, reader = logging_to(tiny(algorithm, monitored()), tmp_path, ["json"]), Reader()
    model.learn(100, reader)
    logged = {row["train/n_updates"]: row for row in json_rows(tmp_path)}
    assert len(logged) > 2
    events = [event for event, n, _ in reader.seen if n]
    assert {"rollout start", "step", "rollout end", "training end"} <= set(events)
    for event, n, values in reader.seen:
        if n:
            assert OF_AN_UPDATE[algorithm] | OF_ALL <= values.keys(), event
            for name in OF_AN_UPDATE[algorithm] | OF_ALL:
                assert values[name] == pytest.approx(logged[n][name], nan_ok=True), (event, name)
        else:
            assert not any(name.startswith("train/") for name in values)


def test_what_can_be_read_is_what_sb3_leaves_there():
    theirs, ours = seen_by_both(Reader, lambda: monitored())
    assert [x[:2] for x in ours] == [x[:2] for x in theirs]
    for (event, n, found), (_, _, expected) in zip(ours, theirs, strict=True):
        assert expected.keys() <= found.keys(), (event, n)
        for name in expected:
            assert found[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-4), (event, n, name)


@ALL
@pytest.mark.parametrize("log_interval", [2, None])
def test_values_can_be_read_however_seldom_they_are_written(algorithm, log_interval, tmp_path):
    model, reader = logging_to(tiny(algorithm, monitored()), tmp_path, ["json"]), Reader()
    model.learn(100, reader, log_interval=log_interval)
    for event, n, values in reader.seen:
        assert not n or values["train/n_updates"] == n, event
    assert model.logger.name_to_value["train/n_updates"] == model._n_updates
    if log_interval is None:
        assert json_rows(tmp_path) == []


@ALL
def test_values_can_be_read_by_a_callback_that_runs_now_and_then(algorithm):
    reader = Reader()
    tiny(algorithm, monitored()).learn(100, [EveryNTimesteps(20, reader), BaseCallbackThatDoesNothing()])
    steps = [values for event, n, values in reader.seen if event == "step" and n]
    assert steps
    assert all("train/value_loss" in values for values in steps)


class BaseCallbackThatDoesNothing(BaseCallback):
    def _on_step(self):
        return True


# --------------------------------------------------------------------------- written


@ALL
@pytest.mark.parametrize("log_interval", [1, 3])
def test_every_update_is_written_once(algorithm, log_interval, tmp_path):
    model = logging_to(tiny(algorithm, monitored()), tmp_path)
    for i in range(3):
        model.learn(70, log_interval=log_interval, reset_num_timesteps=i == 0)
    found = updates_in(csv_rows(tmp_path))
    assert found == updates_in(json_rows(tmp_path))
    assert found == sorted(set(found))
    assert found[-1] == model._n_updates
    if log_interval == 1:
        assert found == n_updates(algorithm, len(found))
    scalars = tensorboard_scalars(tmp_path)
    assert len(scalars["train/value_loss"]) == len(found)
    assert len({step for step, _ in scalars["train/value_loss"]}) == len(found)
    assert "train/n_updates" not in scalars
    assert "time/iterations" not in scalars


@ALL
def test_no_line_lacks_a_value(algorithm, tmp_path):
    model = logging_to(tiny(algorithm, monitored()), tmp_path, ["csv", "json"])
    for i in range(2):
        model.learn(100, reset_num_timesteps=i == 0)
    expected = OF_AN_UPDATE[algorithm] | OF_ALL
    expected |= {"rollout/ep_rew_mean", "rollout/ep_len_mean", "time/iterations", "time/total_timesteps", "time/fps"}
    for rows in (csv_rows(tmp_path), json_rows(tmp_path)):
        assert len(rows) > 4
        assert len({frozenset(row) for row in rows}) == 1
        assert expected <= rows[0].keys()


@ALL
def test_a_record_and_a_dump_after_learning(algorithm, tmp_path):
    model = logging_to(tiny(algorithm, monitored()), tmp_path).learn(100)
    before = updates_in(csv_rows(tmp_path))
    model.logger.record("mine/score", 7.5)
    model.logger.record("mine/hidden", 1.0, exclude=("csv", "tensorboard"))
    model.logger.dump(model.num_timesteps)
    rows = csv_rows(tmp_path)
    assert float(rows[-1]["mine/score"]) == 7.5
    assert "mine/hidden" not in rows[-1]
    assert json_rows(tmp_path)[-1]["mine/hidden"] == 1.0
    assert tensorboard_scalars(tmp_path)["mine/score"] == [(model.num_timesteps, 7.5)]
    assert updates_in(rows) == before
    model.learn(100, reset_num_timesteps=False)
    assert sum("mine/score" in row for row in csv_rows(tmp_path)) == 1
    model.dump_logs()


@ALL
def test_one_logger_for_several_runs_with_evaluations(algorithm, tmp_path, capsys):
    model = logging_to(tiny(algorithm, monitored()), tmp_path)
    for i in range(3):
        evaluation = EvalCallback(monitored(n_envs=1), eval_freq=7, n_eval_episodes=2, verbose=0)
        model.learn(100, evaluation, reset_num_timesteps=i == 0)
    rows = csv_rows(tmp_path)
    found = updates_in(rows)
    assert found == n_updates(algorithm, len(found))
    evaluated = [row for row in rows if "eval/mean_reward" in row]
    assert len(evaluated) >= 3 * (100 // 14)
    assert all("time/total_timesteps" in row for row in evaluated)
    of_updates = [row for row in rows if "time/iterations" in row]
    assert len(of_updates) == len(found)
    assert all(OF_AN_UPDATE[algorithm] <= row.keys() for row in rows if "train/n_updates" in row)
    assert capsys.readouterr().out.count("train/") >= len(found)


@ALL
def test_a_callback_that_writes_the_log_itself(algorithm, tmp_path):
    model = logging_to(tiny(algorithm, monitored()), tmp_path)
    model.learn(100, LogEveryNTimesteps(10), log_interval=None)
    rows = csv_rows(tmp_path)
    assert len(rows) >= 9
    found = updates_in(rows)
    assert len(found) >= 2
    assert found == n_updates(algorithm, len(found))


@ALL
def test_figures_images_and_hyperparameters(algorithm, tmp_path):
    class Drawing(BaseCallback):
        def _on_training_start(self):
            hparams = HParam({"algorithm": algorithm.__name__}, {"train/value_loss": 0.0})
            self.logger.record("hparams", hparams, exclude=TEXT_FORMATS)

        def _on_rollout_end(self):
            figure = matplotlib.figure.Figure(figsize=(1, 1))
            self.logger.record("mine/figure", Figure(figure, close=True), exclude=TEXT_FORMATS)
            image = Image(np.zeros((4, 4, 3), np.uint8), "HWC")
            self.logger.record("mine/image", image, exclude=TEXT_FORMATS)
            self.logger.record("mine/text", 'some, "text"', exclude="tensorboard")

        def _on_step(self):
            return True

    model = logging_to(tiny(algorithm, monitored()), tmp_path)
    for i in range(2):
        model.learn(70, Drawing(), reset_num_timesteps=i == 0)
    model.logger.record("mine/score", 1.0)
    model.logger.dump(model.num_timesteps)
    model.learn(
        40, EvalCallback(monitored(n_envs=1), eval_freq=5, n_eval_episodes=1, verbose=0), reset_num_timesteps=False
    )
    rows = csv_rows(tmp_path)
    drawn = [row for row in rows if "mine/text" in row]
    assert drawn
    assert all(row["mine/text"] == 'some, "text"' for row in drawn)
    assert not any({"hparams", "mine/figure", "mine/image"} & row.keys() for row in rows)
    images = EventAccumulator(str(tmp_path), {"images": 0}).Reload().Images("mine/figure")
    assert len(images) == len(drawn)


@ALL
def test_means_and_single_values_of_callbacks_are_not_carried_over(algorithm, tmp_path):
    class Counting(BaseCallback):
        once = True

        def _on_rollout_start(self):
            self.n, self.total = 0, 0

        def _on_step(self):
            self.n, self.total = self.n + 1, self.total + self.num_timesteps
            self.logger.record_mean("mine/mean", self.num_timesteps)
            if Counting.once:
                Counting.once = False
                self.logger.record("mine/once", 1)
            return True

        def _on_rollout_end(self):
            self.logger.record("mine/expected", self.total / self.n)

    model = logging_to(tiny(algorithm, monitored()), tmp_path, ["csv"])
    for i in range(2):
        model.learn(100, Counting(), reset_num_timesteps=i == 0)
    rows = csv_rows(tmp_path)
    assert len(rows) > 4
    for row in rows:
        assert float(row["mine/mean"]) == pytest.approx(float(row["mine/expected"]))
    assert [i for i, row in enumerate(rows) if "mine/once" in row] == [0]


@ALL
def test_a_run_that_is_stopped_between_two_lines(algorithm, tmp_path):
    class Stopping(BaseCallback):
        def _on_step(self):
            return self.model._n_updates < n_updates(algorithm, 3)[-1]

    model = logging_to(tiny(algorithm, monitored()), tmp_path)
    model.learn(10_000, Stopping(), log_interval=2)
    assert updates_in(csv_rows(tmp_path)) == n_updates(algorithm, 3)[1:]
    assert model.logger.name_to_value["train/n_updates"] == n_updates(algorithm, 3)[-1]
    model.logger.record("mine/score", 1.0)
    model.logger.dump(model.num_timesteps)
    model.learn(60, log_interval=1)
    found = updates_in(csv_rows(tmp_path))
    assert found == n_updates(algorithm, len(found) + 1)[1:]


@ALL
@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError, NonFiniteError])
def test_the_logger_after_a_run_that_failed(algorithm, error, tmp_path):
    class Failing(BaseCallback):
        def _on_step(self):
            if self.model._n_updates >= n_updates(algorithm, 2)[-1]:
                raise error("in a callback")
            return True

    model = logging_to(tiny(algorithm, monitored()), tmp_path)
    with pytest.raises(error):
        model.learn(10_000, Failing())
    assert model.logger.name_to_value["train/n_updates"] == n_updates(algorithm, 2)[-1]
    model.logger.record("mine/score", 1.0)
    model.logger.dump(model.num_timesteps)
    model.learn(100)
    found = updates_in(csv_rows(tmp_path))
    assert found == n_updates(algorithm, len(found))


# ------------------------------------------------------------- locals, buffers, counts


class Locals(BaseCallback):
    """Remembers copies of what a callback can read besides the logger."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def _look(self, event):
        found = {name: np.copy(x) if isinstance(x, np.ndarray) else x for name, x in self.locals.items()}
        self.seen.append((event, found, self._of_the_model()))

    def _of_the_model(self):
        model = self.model
        names = ("num_timesteps", "_n_updates", "_current_progress_remaining", "_total_timesteps", "_episode_num")
        found = {name: getattr(model, name) for name in names}
        found["_last_obs"] = model._last_obs
        found["_last_episode_starts"] = np.copy(model._last_episode_starts)
        found["episodes"] = [(e["r"], e["l"]) for e in model.ep_info_buffer]
        found["successes"] = list(model.ep_success_buffer)
        return found

    def _on_training_start(self):
        self._look("training start")

    def _on_rollout_start(self):
        self._look("rollout start")

    def _on_step(self):
        self._look("step")
        return True

    def _on_rollout_end(self):
        self._look("rollout end")

    def _on_training_end(self):
        self._look("training end")


class Successes(FakeEnv):
    def step(self, action):
        *rest, info = super().step(action)
        return (*rest, {**info, "is_success": bool(self.episode % 2)})


def seen_by_both(callback, env, **options):
    """What a callback saw of SB3's PPO and of ours, from the same weights and seed."""
    options = {
        "n_steps": 16,
        "batch_size": 16,
        "n_epochs": 1,
        "policy_kwargs": {"net_arch": [8]},
        "device": "cpu",
        **options,
    }
    models = [kind("MlpPolicy", env(), **options) for kind in (stable_baselines3.PPO, PPO)]
    models[1].policy.load_state_dict(models[0].policy.state_dict())
    callbacks = [callback() for _ in models]
    for model, its in zip(models, callbacks, strict=True):
        model.set_random_seed(5)
        for i in range(2):
            model.learn(64, its, reset_num_timesteps=i == 0)
    return [its.seen for its in callbacks]


@ALL
def test_the_locals_have_sb3s_names(algorithm):
    theirs, ours = Locals(), Locals()
    stable_baselines3.PPO("MlpPolicy", monitored(), n_steps=16, batch_size=16).learn(64, theirs)
    tiny(algorithm, monitored()).learn(64, ours)
    counters = {"idx", "done", "terminal_obs", "terminal_value"}  # of a loop within
    expected = {event: names.keys() - counters for event, names, _ in reversed(theirs.seen)}
    found = {event: names.keys() for event, names, _ in reversed(ours.seen)}
    missing = {event: sorted(expected[event] - found[event]) for event in expected if expected[event] - found[event]}
    assert not missing


@pytest.mark.parametrize("given", [64, 64.0, np.float32(64), 63.5])
def test_callbacks_find_a_whole_number_of_steps(given):
    class Looking(BaseCallback):
        def _on_training_start(self):
            self.found = self.locals["total_timesteps"]

        def _on_step(self):
            return True

    callback = Looking()
    model = tiny(PPO, monitored()).learn(given, callback)
    assert callback.found == model._total_timesteps == 64
    assert type(callback.found) is int


@pytest.mark.parametrize("action", ["box", "discrete"])
def test_the_locals_have_sb3s_values(action):
    theirs, ours = seen_by_both(Locals, lambda: monitored(action))
    names = ("n_steps", "total_timesteps", "new_obs", "rewards", "dones", "clipped_actions", "actions")
    assert [event for event, *_ in ours] == [event for event, *_ in theirs]
    for (event, found, _), (_, expected, _) in zip(ours, theirs, strict=True):
        for name in names if event == "step" else names[:2]:
            if name in expected and name in found:
                np.testing.assert_allclose(found[name], expected[name], atol=1e-4, err_msg=f"{name} at {event}")
        if event == "rollout end":
            np.testing.assert_allclose(found["values"].flatten(), expected["values"].flatten(), atol=1e-4)
            assert isinstance(found["rollout_buffer"], stable_baselines3.common.buffers.RolloutBuffer)


def test_counts_and_episodes_are_sb3s():
    theirs, ours = seen_by_both(Locals, Successes)
    for (event, _, found), (_, _, expected) in zip(ours, theirs, strict=True):
        for name in expected:
            np.testing.assert_allclose(found[name], expected[name], atol=1e-4, err_msg=f"{name} at {event}")


class Buffers(BaseCallback):
    """Copies of the rollout as it is at the end of each rollout, in shape (n_steps, n_envs, ...)."""

    NAMES = (
        "observations",
        "actions",
        "rewards",
        "episode_starts",
        "values",
        "log_probs",
        "advantages",
        "returns",
        "pos",
        "full",
    )

    def __init__(self):
        super().__init__()
        self.seen = []

    def _on_step(self):
        return True

    def _on_rollout_end(self):
        buffer = self.model.rollout_buffer
        self.seen.append({name: np.copy(getattr(buffer, name)) for name in self.NAMES})


@pytest.mark.parametrize("action", ["box", "discrete", "multidiscrete"])
def test_the_rollout_buffer_is_sb3s_at_the_end_of_a_rollout(action):
    theirs, ours = seen_by_both(Buffers, lambda: monitored(action))
    assert len(ours) == len(theirs) == 4
    for found, expected in zip(ours, theirs, strict=True):
        for name in Buffers.NAMES:
            np.testing.assert_allclose(found[name], expected[name], atol=1e-4, err_msg=name)


@ALL
def test_the_rollout_buffer_is_whole_at_every_event_after_a_rollout(algorithm):
    seen = []

    class Looking(BaseCallback):
        def _look(self):
            buffer = self.model.rollout_buffer
            n = buffer.size()
            rows = {name: getattr(buffer, name)[:n] for name in Buffers.NAMES[:-2]}
            seen.append(n)
            assert all(np.isfinite(x).all() for x in rows.values())
            np.testing.assert_allclose(rows["advantages"] + rows["values"], rows["returns"], atol=1e-5)
            assert rows["values"].any()
            assert rows["log_probs"].any()

        def _on_step(self):
            return True

        def _on_rollout_end(self):
            self._look()

        def _on_training_end(self):
            self._look()

    model = tiny(algorithm, monitored()).learn(100, CallbackList([Looking()]))
    assert len(seen) > 3
    assert sum(len(batch.observations) for batch in model.rollout_buffer.get(8)) == 2 * seen[-1]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_episodes_are_kept_between_runs(algorithm):
    model = tiny(algorithm, Successes()).learn(64)
    kept, n_successes = [e["r"] for e in model.ep_info_buffer], len(model.ep_success_buffer)
    assert len(kept) == n_successes > 0
    model.learn(32, reset_num_timesteps=False)
    assert [e["r"] for e in model.ep_info_buffer][: len(kept)] == kept
    assert len(model.ep_success_buffer) > n_successes
    model.learn(16)
    assert len(model.ep_info_buffer) < len(kept)

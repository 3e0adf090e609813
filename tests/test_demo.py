import contextlib
import importlib
import os
import pty
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
from forked import forget, forked
from tiny_models import weights

import sb3_pg.demo
from sb3_pg import PPO
from sb3_pg.common.errors import ArgumentError
from sb3_pg.demo import CONTINUOUS, DISCRETE, load, main, parse, running_mean


@pytest.fixture(autouse=True)
def two_episodes(monkeypatch):
    monkeypatch.setattr(sb3_pg.demo, "EVALUATION_EPISODES", 2)


@pytest.mark.parametrize("algo", ["reinforce", "trpo", "ppo"])
def test_demo_writes_its_files(algo, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["--algo", algo, "--env", "CartPole-v1", "--timesteps", "600", "--n-envs", "2", "--out", str(out)]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "the same" in printed and "NOT" not in printed
    for name in ("model.zip", "learning_curve.png", "progress.csv"):
        assert (out / name).stat().st_size > 100
        assert str(out / name) in printed
    assert not (out / "vecnormalize.pkl").exists()


def test_demo_saves_the_statistics_of_continuous_control(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(CONTINUOUS["trpo"], "n_steps", 256)
    arguments = ["--env", "Pendulum-v1", "--timesteps", "512", "--out", str(tmp_path)]
    assert main(arguments) == 0
    assert "the same" in capsys.readouterr().out
    assert (tmp_path / "vecnormalize.pkl").exists()


def test_a_run_without_a_finished_episode_has_an_empty_curve(tmp_path):
    arguments = ["--algo", "ppo", "--env", "Pendulum-v1", "--timesteps", "64", "--out", str(tmp_path)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(CONTINUOUS["ppo"], "n_steps", 32)
        assert main(arguments) == 0
    assert (tmp_path / "learning_curve.png").exists()


@pytest.mark.parametrize("stopped", ["by fewer steps", "by ctrl-C"])
def test_a_resumed_run_equals_the_whole(stopped, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(CONTINUOUS["ppo"], "n_steps", 128)
    arguments = ["--algo", "ppo", "--env", "Pendulum-v1", "--n-envs", "2"]
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    assert main([*arguments, "--timesteps", "768", "--out", str(whole)]) == 0
    if stopped == "by ctrl-C":
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(PPO, "train", interrupting(PPO.train))
            assert main([*arguments, "--timesteps", "768", "--out", str(resumed)]) == 130
    else:
        assert main([*arguments, "--timesteps", "256", "--out", str(resumed)]) == 0
    assert main([*arguments, "--timesteps", "768", "--out", str(resumed), "--resume"]) == 0
    first, second = (PPO.load(folder / "model.zip") for folder in (whole, resumed))
    np.testing.assert_array_equal(weights(first), weights(second))
    assert (whole / "episodes.csv").read_text() == (resumed / "episodes.csv").read_text()
    assert main([*arguments, "--timesteps", "768", "--out", str(resumed), "--resume"]) == 2
    assert "has 768 steps already" in capsys.readouterr().err


def interrupting(train):
    def then_interrupt(self):
        train(self)
        if self.num_timesteps == 256:
            signal.raise_signal(signal.SIGINT)

    return then_interrupt


def test_nothing_to_resume_is_one_line(tmp_path, capsys):
    assert main(["--algo", "ppo", "--env", "Pendulum-v1", "--out", str(tmp_path), "--resume"]) == 2
    assert "nothing to resume" in capsys.readouterr().err


@pytest.mark.parametrize(
    "others, says",
    [
        (["--algo", "trpo"], "is of PPO: pass --algo ppo"),
        (["--env", "Pendulum-v1"], "is no run of Pendulum-v1: pass the --env that it began with"),
        (["--env", "Acrobot-v1"], "is no run of Acrobot-v1: pass the --env that it began with"),
    ],
)
def test_resuming_another_run_is_one_line(others, says, tmp_path, capsys):
    run = ["--algo", "ppo", "--env", "CartPole-v1", "--out", str(tmp_path), "--resume"]
    PPO("MlpPolicy", "CartPole-v1").save(tmp_path / "model.zip")
    assert main([*run, *others]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1


def test_every_algorithm_has_settings():
    assert set(CONTINUOUS) == set(DISCRETE) == {"reinforce", "trpo", "ppo"}


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--algo", "a2c"], "a2c"),
        (["--env", "NoSuch-v1"], "NoSuch"),
        (["--env", "no such"], "no such"),
        (["--env", "Taxi-v3"], "Taxi-v4"),
        (["--env", "ALE/Pong-v5"], "ale_py:ALE/Pong-v5"),
        (["--env", "nosuchmodule:Env-v0"], "nosuchmodule"),
        (["--env", "Blackjack-v1"], "Tuple("),
        (["--timesteps", "0"], "timesteps"),
        (["--timesteps", "-1"], "timesteps"),
        (["--timesteps", "1e5"], "timesteps"),
        (["--timesteps", "many"], "many"),
        (["--n-envs", "-1"], "n-envs"),
        (["--n-envs", "0"], "n-envs"),
        (["--env", "CartPole-v1", "--n-envs", "1000000000"], "--n-envs 1000000000 cannot share --timesteps 50000"),
        (["--timesteps", "9" * 5000], "...99"),
        (["--workers", "0"], "workers"),
        (["--workers", "10000"], "10000 workers on"),
        (["--seed", "x"], "seed"),
        (["--seed", "4294967296"], "from 0 to 4294967295"),
        (["--colour", "red"], "colour"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(arguments, says, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("torch.distributed.run.main", None)  # no worker starts, should it not be noticed
    monkeypatch.chdir(tmp_path)
    try:
        code = main(arguments)
    except SystemExit as stop:
        code = stop.code
    printed = capsys.readouterr()
    assert code == 2
    assert says in printed.err and printed.err.count("\n") == 1
    assert printed.out == "" and list(tmp_path.iterdir()) == []


def test_an_environment_that_cannot_be_made_is_one_line(monkeypatch, capsys):
    def fails(name):
        raise RuntimeError("no such level")

    monkeypatch.setattr("gymnasium.make", fails)
    assert main(["--env", "CartPole-v1"]) == 2
    assert "cannot make environment 'CartPole-v1': RuntimeError: no such level\n" in capsys.readouterr().err


def test_the_case_of_an_algorithm_does_not_matter():
    assert parse(["--algo", "TRPO"]).algo == "trpo"


def test_folders_are_named_for_every_system():
    assert parse(["--env", "ale_py:ALE/Pong-v5"]).out.name == "trpo-ale_py_ALE_Pong-v5-1"


def demo_without(package, folder, *arguments):
    """Run the demo anew in the folder as if a package were not installed; for forked processes."""
    forget("sb3_pg.demo", "gymnasium.envs", package)
    sys.modules[package] = None
    os.chdir(folder)
    return importlib.import_module("sb3_pg.demo").main(list(arguments))


def test_an_error_names_the_extra_of_the_package_that_is_missing(tmp_path):
    done = forked(lambda: demo_without("Box2D", tmp_path, "--env", "LunarLander-v3"))
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "pip install 'sb3_pg[zoo]'" in done.stderr and "mujoco" not in done.stderr


def test_an_episode_without_end_is_cut_when_evaluating(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sb3_pg.demo, "EVALUATION_STEPS", 50)
    model = PPO("MlpPolicy", "CliffWalking-v1", n_steps=64)
    monkeypatch.setattr(PPO, "predict", lambda self, observation, **_: (np.full(len(observation), 3), None))
    assert sb3_pg.demo.evaluate(model, "CliffWalking-v1", 1) == (-50.0, 0.0)  # to the left, where it stays


def test_the_evaluations_are_announced_and_a_long_training_is_foreseen(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sb3_pg.demo, "PACE_SECONDS", 0.0)
    monkeypatch.setattr(sb3_pg.demo, "train", lambda *_: 1.0)
    arguments = ["--algo", "ppo", "--env", "CartPole-v1", "--out", str(tmp_path), "--timesteps"]
    assert main([*arguments, "1000000000"]) == 0
    printed = capsys.readouterr().out
    assert re.search("untrained, 2 episodes ...\nA step takes .* ms here, so 1,000,000,000 steps take", printed)
    assert "Evaluating it trained" in printed and printed.count("A step takes") == 1
    assert main([*arguments, "1000"]) == 0
    assert "A step takes" not in capsys.readouterr().out


def test_a_folder_that_cannot_be_written_to_is_noticed_before_anything_is_evaluated(capsys, monkeypatch):
    monkeypatch.setattr(sb3_pg.demo, "evaluate", None)
    assert main(["--env", "CartPole-v1", "--out", "/proc"]) == 2
    assert "cannot write to /proc: " in capsys.readouterr().err


def test_missing_mujoco_is_one_line_that_says_how_to_install_it(tmp_path):
    done = forked(lambda: demo_without("mujoco", tmp_path))
    assert done.returncode == 2
    assert "pip install 'sb3_pg[mujoco]'" in done.stderr
    assert "Traceback" not in done.stderr and done.stderr.count("\n") == 1


def test_a_file_in_place_of_the_folder_is_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    arguments = ["--env", "CartPole-v1", "--timesteps", "100", "--out", str(tmp_path / "file")]
    assert main(arguments) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_running_mean():
    assert running_mean([1.0, 2.0, 6.0, 10.0], 2).tolist() == [1.0, 1.5, 4.0, 8.0]


def test_ctrl_c_saves_and_leaves_the_terminal_whole(tmp_path):
    """With a real terminal and a real signal."""
    command = [sys.executable, "-W", "ignore", "-m", "sb3_pg.demo", "--algo", "ppo", "--env", "CartPole-v1"]
    parent, child = pty.openpty()
    process = subprocess.Popen(
        [*command, "--timesteps", "1000000", "--out", str(tmp_path)], stdin=child, stdout=child, stderr=child
    )
    os.close(child)
    shown = b""
    try:
        while b"it/s" not in shown:  # the progress bar has moved
            shown += os.read(parent, 4096)
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(OSError):  # the end of a terminal's output
            while chunk := os.read(parent, 4096):
                shown += chunk
        assert process.wait(60) == 130
    finally:
        process.kill()
        os.close(parent)
    *_, last = shown.decode().strip().splitlines()
    said = re.match(r"(\x1b\[\?25h)?Interrupted: saved in .*model\.zip after ([\d,]+) steps; go on with ", last)
    assert "--seed 1" in last
    assert "Traceback" not in shown.decode()
    assert shown.rfind(b"\x1b[?25h") > shown.rfind(b"\x1b[?25l") > 0  # the cursor is shown again
    model = PPO.load(tmp_path / "model.zip", env="CartPole-v1")
    assert said and model.num_timesteps == int(said[2].replace(",", ""))


def test_sigterm_saves(tmp_path, capsys, monkeypatch):
    def train(model, *_):
        model.learn(600)
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(sb3_pg.demo, "train", train)
    arguments = ["--algo", "ppo", "--env", "CartPole-v1", "--timesteps", "600", "--seed", "7", "--trusted"]
    assert main([*arguments, "--out", str(tmp_path)]) == 143
    error = capsys.readouterr().err
    assert error.startswith(f"Interrupted: saved in {tmp_path / 'model.zip'} after ")
    assert error.endswith(f"--out {tmp_path} --seed 7 --trusted\n")


def test_an_interrupt_before_anything_was_learned_is_one_line(tmp_path, capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(sb3_pg.demo, "evaluate", interrupted)
    assert main(["--env", "CartPole-v1", "--out", str(tmp_path)]) == 130
    assert capsys.readouterr().err.count("\n") == 1


class Harm:
    def __reduce__(self):
        return print, ("code ran",)


def test_what_is_loaded_is_not_run_unless_trusted(tmp_path, capsys):
    model = PPO("MlpPolicy", "CartPole-v1", n_steps=64)
    model.harm = Harm()
    model.save(tmp_path / "model.zip")
    with pytest.raises(ArgumentError, match="`harm` needs builtins"):
        load("ppo", "CartPole-v1", tmp_path)
    assert capsys.readouterr().out == ""
    load("ppo", "CartPole-v1", tmp_path, trusted=parse(["--trusted"]).trusted)
    assert capsys.readouterr().out == "code ran\n"

import subprocess
import sys

import pytest

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


def test_every_algorithm_has_settings():
    assert set(CONTINUOUS) == set(DISCRETE) == {"reinforce", "trpo", "ppo"}


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--algo", "a2c"], "a2c"),
        (["--env", "NoSuch-v1"], "NoSuch"),
        (["--env", "no such"], "no such"),
        (["--timesteps", "0"], "timesteps"),
        (["--timesteps", "many"], "many"),
        (["--n-envs", "-1"], "n-envs"),
        (["--seed", "x"], "seed"),
        (["--colour", "red"], "colour"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(arguments, says, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        code = main(arguments)
    except SystemExit as stop:
        code = stop.code
    printed = capsys.readouterr()
    assert code == 2
    assert says in printed.err and printed.err.count("\n") == 1
    assert printed.out == "" and list(tmp_path.iterdir()) == []


def test_missing_mujoco_is_one_line_that_says_how_to_install_it(tmp_path):
    hide = "import sys; sys.modules['mujoco'] = None; from sb3_pg.demo import main; sys.exit(main())"
    done = subprocess.run([sys.executable, "-c", hide], cwd=tmp_path, capture_output=True, text=True)
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

"""What wrong input to the commands gets."""

import argparse
import os
import re
import sys
from pathlib import Path

import pytest
from zoo_tools import python

from sb3_pg import PPO
from sb3_pg.zoo.__main__ import COMMANDS, add_checked, distributed, do_without_screen, explain, has_screen, main


@pytest.mark.parametrize(
    "arguments, says",
    [
        ("fly", "'fly'"),
        ("train --algo a2cc", "a2cc"),
        ("train --n-timesteps many", "many"),
        ("train --colour red", "colour"),
        ("train --env CartPool-v1", "CartPole-v1"),
        ("train -params lerning_rate:0.1", "'learning_rate'"),
        ("train -params n_env:2", "'n_envs'"),
        ("train -params seed:2", "--seed"),
        ("train -params tensorboard_log:'a'", "--tensorboard-log"),
        ("train -params gamma:'much'", "`gamma` must be a number, not 'much'"),
        ("train --algo trpo -params cg_damping:'lin_0.1'", "`cg_damping` must be a number, not"),
        ("train -params n_envs:0", "`n_envs`"),
        ("train -params n_envs:'two'", "`n_envs`"),
        ("train -params n_timesteps:'lots'", "`n_timesteps`"),
        ("train -params policy:'MlpPolice'", "MlpPolice"),
        ("train -params policy_kwargs:dict(net_arc=[8])", "net_arc"),
        ("train -params env_wrapper:'gymnasium.wrappers.Nosuch'", "Nosuch"),
        ("train -params normalize:dict(norm_ops=True)", "norm_ops"),
        ("train --env-kwargs colour:1", "colour"),
        ("train --device gpuu", "gpuu"),
        ("train --vec-env threads", "'async'"),
        ("train --vec-env envpool -params env_wrapper:'gymnasium.wrappers.RescaleAction'", "env_wrapper"),
        ("train --trial-id 3", "--storage"),
        ("train --storage nosuch/x.log --study-name s --trial-id 3", "nosuch/x.log"),
        ("train --gym-packages nosuch", "nosuch"),
        ("train -params batch_size:-1", "batch_size"),
        ("train -params ent_coef:lin_0.1", "quoted"),
        ("train -params ent_coef:'cos_0.1'", "ent_coef"),
        ("train -params ent_coef:'lin_'", "ent_coef"),
        ("train -c nosuch.yml", "nosuch.yml"),
        ("train -c nosuch", "nosuch"),
        ("train -c broken.yml", "broken.yml"),
        ("train -c empty.yml", "CartPole-v1"),
        ("train -c list.yml", "list.yml must hold"),
        ("train -c void.yml", "void.yml must hold"),
        ("train -c entry.yml", "entry.yml must hold"),
        ("train -c broken.py", "broken.py cannot be read"),
        ("train -c bare.py", "hyperparams"),
        ("train -c json", "json must hold"),
        ("train -c bare.yml", "n_timesteps"),
        ("train -c none.yml", "none.yml has no entry for CartPole-v1: add one"),
        ("train -i nosuch.zip", "-i/--trained-agent: there is no file nosuch.zip"),
        ("train -n -5", "-n/--n-timesteps: must be a whole number >= 1, not '-5'"),
        ("train -n 0", "-n/--n-timesteps: must be a whole number >= 1, not '0'"),
        ("train -optimize --n-trials 0", "--n-trials: must be a whole number >= 1, not '0'"),
        ("train -optimize --max-total-trials -1", "--max-total-trials"),
        ("train --n-eval-envs 0", "--n-eval-envs"),
        ("train --distributed 0", "--distributed: must be a whole number >= 1, not '0'"),
        ("train --distributed -2", "--distributed: must be a whole number >= 1, not '-2'"),
        ("train -optimize --n-jobs 0", "--n-jobs: must be a whole number >= 1, not '0'"),
        ("train --log-interval 0", "--log-interval"),
        ("train -params n_stepz:10", "-params: 'n_stepz' is neither an argument of ppo nor rl-zoo's. Did you mean"),
        ("train -f empty.yml", "empty.yml is a file"),
        ("train -f empty.yml/runs", "cannot write to empty.yml/runs"),
        ("record_video -o empty.yml", "empty.yml is a file"),
        ("record_video -o /proc/here", "cannot write to /proc/here"),
        ("train -n " + "9" * 5000, "...99"),
        ("train --distributed 10000", "10000 workers on"),
        ("enjoy --env CartPole-v1 -n 0", "--n-timesteps"),
        ("trian", "Did you mean 'train'?"),
        ("all_plots -a ppo", "needs -a, -e and -f"),
        ("all_plots -a PPO -e CartPole-v1 -f .", "nothing in . is named ppo/*CartPole-v1*/evaluations.npz"),
        ("all_plots -a ppo -e CartPole-v1 -f nosuch", "nothing in nosuch is named"),
        ("plot_train -a ppo -e CartPole-v1 -f .", "nothing in . is named ppo/*CartPole-v1*/*.monitor.csv"),
        ("train --storage nosuch.log --study-name s --trial-id 0", "no trial 0"),
        ("enjoy --env CartPole-v1 -f nosuch", "nosuch"),
        ("record_video --env CartPole-v1 -f nosuch", "nosuch"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(arguments, says, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("torch.distributed.run.main", None)  # no worker starts, should it not be noticed
    monkeypatch.chdir(tmp_path)
    Path("broken.yml").write_text("CartPole-v1: [")
    Path("empty.yml").write_text("Other-v1: {}")
    Path("none.yml").write_text("Other-v1: {policy: MlpPolicy}")
    Path("list.yml").write_text("[1, 2]")
    Path("void.yml").write_text("")
    Path("entry.yml").write_text("CartPole-v1:")
    Path("broken.py").write_text("hyperparams = lin_3e-4")
    Path("bare.py").write_text("settings = {}")
    Path("bare.yml").write_text("CartPole-v1: {policy: MlpPolicy}")
    try:
        code = main(arguments.split())
    except SystemExit as stop:
        code = stop.code
    error = capsys.readouterr().err
    assert code == 2
    assert says in error and error.count("\n") == 1 and "Traceback" not in error


def test_what_is_not_the_users_mistake_keeps_its_traceback(tmp_path, monkeypatch):
    def learn(self, *args, **kwargs):
        raise ValueError("a bug")

    monkeypatch.setattr(PPO, "learn", learn)
    with pytest.raises(ValueError, match="a bug"):
        main(["train", "--algo", "ppo", "-f", str(tmp_path), "--eval-freq", "-1"])


@pytest.mark.parametrize("module", ["rl_zoo3", "optuna"])
def test_missing_extra_is_one_line(module):
    done = python(
        f"import sys; sys.modules[{module!r}] = None\nfrom sb3_pg.zoo.__main__ import main; sys.exit(main())",
        "train",
    )
    assert done.returncode == 2
    assert "pip install 'sb3_pg[zoo]'" in done.stderr and done.stderr.count("\n") == 1


def test_other_missing_packages_are_not_blamed_on_the_extra(capsys):
    assert main(["train", "--gym-packages", "nosuch"]) == 2
    assert "pip install" not in capsys.readouterr().err


def test_settings_that_cannot_work_keep_their_traceback_when_asked(tmp_path):
    with pytest.raises(TypeError, match="norm_ops"):
        main(["train", "-f", str(tmp_path), "-params", "normalize:dict(norm_ops=True)", "--verbose", "2"])


def test_rl_zoos_number_for_as_many_steps_as_the_settings_say():
    parser = argparse.ArgumentParser()
    add = add_checked(argparse.ArgumentParser.add_argument)
    add(parser, "-n", "--n-timesteps", default=-1, type=int)
    add(parser, "--n-trials", default=None, type=int)
    assert parser.parse_args(["-n", "-1"]).n_timesteps == -1 and parser.parse_args(["-n", "7"]).n_timesteps == 7
    for wrong in (["-n", "-2"], ["--n-trials", "-1"], ["--n-trials", "None"]):
        with pytest.raises(SystemExit):
            parser.parse_args(wrong)


def test_help_needs_nothing_else_installed(monkeypatch, capsys):
    monkeypatch.setenv("PATH", "")
    for command in (["record_training", "--help"], ["all_plots"], ["plot_from_file"]):
        with pytest.raises(SystemExit) as stop:
            main(command)
        assert stop.value.code == 0 and "usage:" in capsys.readouterr().out


def without_screen(monkeypatch):
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "MUJOCO_GL"):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    monkeypatch.setattr(sys, "platform", "linux")


def test_the_zoo_asks_whether_there_is_a_screen(monkeypatch):
    pytest.importorskip("rl_zoo3")
    without_screen(monkeypatch)
    given = []
    monkeypatch.setattr("rl_zoo3.enjoy.enjoy", lambda: given.extend(sys.argv[1:]))
    main(["enjoy", "-n", "5"])
    assert given == ["-n", "5", "--no-render"]


def test_without_a_number_there_is_a_worker_for_each_core(monkeypatch):
    monkeypatch.setattr("sb3_pg.common.workers.cores", lambda: 3)
    assert distributed(["--distributed", "--env", "CartPole-v1"]) == (3, ["--env", "CartPole-v1"])
    assert distributed(["--distributed", "5", "-n", "9"]) == (5, ["-n", "9"])


def test_without_a_screen_nothing_is_rendered_to_one(monkeypatch, capsys):
    without_screen(monkeypatch)
    assert not has_screen()
    assert do_without_screen("enjoy", ["-n", "5"]) == ["-n", "5", "--no-render"]
    assert "There is no screen" in capsys.readouterr().out
    assert do_without_screen("plot_train", ["-a", "ppo"]) == ["-a", "ppo"]
    assert "There is no screen" in capsys.readouterr().out
    assert do_without_screen("enjoy", ["--no-render"]) == ["--no-render"]
    monkeypatch.setattr("sb3_pg.zoo.__main__.find_library", lambda name: name == "OSMesa")
    assert do_without_screen("record_video", ["-n", "5"]) == ["-n", "5"]
    assert os.environ["MUJOCO_GL"] == "osmesa"
    monkeypatch.setenv("MUJOCO_GL", "egl")
    do_without_screen("record_video", [])
    assert os.environ["MUJOCO_GL"] == "egl"
    monkeypatch.setenv("DISPLAY", ":0")
    assert has_screen()


def test_where_mujoco_cannot_draw_there_is_one_line():
    error = type("FatalError", (Exception,), {})("an OpenGL platform library has not been loaded into this process")
    assert "libegl1" in explain(error)


def test_help_says_what_each_command_does(capsys):
    assert main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for command in COMMANDS:
        assert any(re.match(rf"  {command} +\w+ .{{20}}", line) for line in lines)
    assert main([]) == 0 and capsys.readouterr().out.splitlines() == lines

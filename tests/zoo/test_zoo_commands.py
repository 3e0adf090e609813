"""The commands of the bridge to rl-zoo, and the files that they write."""

import importlib.util
import re
import shutil
import signal
import subprocess
import sys
from itertools import pairwise

import gymnasium as gym
import numpy as np
import pytest
import torch as th
import yaml
from stable_baselines3.common import vec_env as sb3
from stable_baselines3.common.policies import ActorCriticCnnPolicy
from tiny_models import weights
from zoo_tools import ALGORITHMS, ROOT, constructor, python

from sb3_pg import PPO, REINFORCE
from sb3_pg.common import vec_env as ours
from sb3_pg.common.errors import ArgumentError, NonFiniteError
from sb3_pg.zoo.__main__ import main, our_command
from sb3_pg.zoo.files import SettingsLoader

SMALL = """
Pendulum-v1: &small
  policy: 'MlpPolicy'
  n_timesteps: 512
  n_envs: 2
  n_steps: 128
  normalize: true
  learning_rate: lin_1e-3
  gamma: 0.9
CartPole-v1: *small
"""


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A configuration for runs of a second."""
    path = tmp_path_factory.mktemp("config") / "small.yml"
    path.write_text(SMALL)
    return str(path)


@pytest.fixture(scope="module")
def logs(tmp_path_factory, small):
    """The folder in which all three algorithms have trained."""
    folder = tmp_path_factory.mktemp("logs")
    for algo in ALGORITHMS:
        options = ["--algo", algo, "--env", "Pendulum-v1", "--seed", "1", "-c", small, "-f", str(folder)]
        options += ["--eval-freq", "200", "--eval-episodes", "2", "--save-freq", "200"]
        assert main(["train", *options]) == 0
    return folder


@pytest.fixture
def construct(tmp_path, monkeypatch):
    return constructor(tmp_path, monkeypatch)


# ---------------------------------------------------------------- registration


def test_registration_is_idempotent_and_only_when_asked_for():
    done = python("""
import sys
import sb3_pg, sb3_pg.zoo
assert "rl_zoo3" not in sys.modules and "optuna" not in sys.modules

import rl_zoo3.train
from rl_zoo3 import ALGOS, exp_manager, hyperparams_opt
tables = ALGOS, hyperparams_opt.HYPERPARAMS_SAMPLER, hyperparams_opt.HYPERPARAMS_CONVERTER
stock = [dict(table) for table in tables]
assert ALGOS["ppo"].__module__.startswith("stable_baselines3"), ALGOS["ppo"]

sb3_pg.zoo.register()
once = [dict(table) for table in tables], exp_manager.ExperimentManager
sb3_pg.zoo.register()
assert ([dict(table) for table in tables], exp_manager.ExperimentManager) == once
assert rl_zoo3.train.ExperimentManager is exp_manager.ExperimentManager
for table, before in zip(tables, stock, strict=True):
    assert set(table) - set(before) == {"reinforce"}
    changed = {name for name in before if table[name] is not before[name]}
    assert changed <= {"trpo", "ppo"}
    assert changed or table is hyperparams_opt.HYPERPARAMS_CONVERTER
assert [ALGOS[name] for name in ("reinforce", "trpo", "ppo")] == [sb3_pg.REINFORCE, sb3_pg.TRPO, sb3_pg.PPO]
assert exp_manager.ExperimentManager.__mro__[1].__module__ == "rl_zoo3.exp_manager"
""")
    assert done.returncode == 0, done.stderr


def test_other_algorithms_run_as_they_do_under_rl_zoo(construct):
    model = construct("a2c", "CartPole-v1")
    assert type(model).__module__ == "stable_baselines3.a2c.a2c"
    assert type(model.env) is sb3.DummyVecEnv


# ------------------------------------------------------ train, enjoy, continue


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_train_writes_rl_zoos_files(algo, logs):
    run = logs / algo / "Pendulum-v1_1"
    names = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    own = {f"Pendulum-v1/{name}" for name in ("args.yml", "command.txt", "config.yml", "vecnormalize.pkl")}
    assert names >= own | {"Pendulum-v1.zip", "best_model.zip", "evaluations.npz", "0.monitor.csv", "1.monitor.csv"}
    assert any(name.startswith("rl_model_") for name in names)
    assert type(ALGORITHMS[algo].load(run / "Pendulum-v1.zip")) is ALGORITHMS[algo]


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_statistics_are_those_of_sb3(algo, logs):
    path = logs / algo / "Pendulum-v1_1" / "Pendulum-v1" / "vecnormalize.pkl"
    assert b"sb3_pg" not in path.read_bytes()
    loaded = sb3.VecNormalize.load(str(path), sb3.DummyVecEnv([lambda: gym.make("Pendulum-v1")]))
    assert type(loaded) is sb3.VecNormalize and loaded.obs_rms.count > 500


def test_environments_are_ours(construct, small):
    model = construct("ppo", "Pendulum-v1", "-c", small)
    assert type(model.env) is ours.VecNormalize and type(model.env.venv) is ours.DummyVecEnv
    assert model.env.gamma == 0.9
    model = construct("ppo", "Pendulum-v1", "-c", small, "--vec-env", "subproc")
    assert type(model.env.venv) is ours.SubprocVecEnv
    model.env.close()


@pytest.mark.parametrize("name", ["sync", "async"])
def test_environments_of_gymnasium(name, small, tmp_path):
    options = ["--algo", "ppo", "--env", "Pendulum-v1", "--seed", "1", "-c", small, "-f", str(tmp_path)]
    options += ["--eval-freq", "200", "--eval-episodes", "2"]
    assert main(["train", *options, "--vec-env", name]) == main(["train", *options, "--vec-env", "dummy"]) == 0
    runs = [tmp_path / "ppo" / f"Pendulum-v1_{i}" for i in (1, 2)]
    for file in ("0.monitor.csv", "1.monitor.csv"):
        episodes, others = ([line.split(",")[:2] for line in (run / file).open()][2:] for run in runs)
        assert episodes == others and episodes
    networks, others = (PPO.load(run / "Pendulum-v1.zip").policy.state_dict() for run in runs)
    assert all(th.equal(networks[key], others[key]) for key in networks)


def test_environments_of_envpool(small, tmp_path, capsys):
    pytest.importorskip("envpool")
    options = ["--algo", "ppo", "--env", "Pendulum-v1", "--seed", "1", "-c", small, "-f", str(tmp_path)]
    assert main(["train", *options, "--eval-freq", "200", "--eval-episodes", "2", "--vec-env", "envpool"]) == 0
    lines = (tmp_path / "ppo" / "Pendulum-v1_1" / "0.monitor.csv").read_text().splitlines()
    assert [line.split(",")[1] for line in lines[2:]] == ["200"] * 2  # each environment made 256 steps


def test_a_game_that_envpool_alone_has(tmp_path, monkeypatch):
    """It has the settings of Atari games without their wrapper, whose work EnvPool does, and any seed."""
    pytest.importorskip("envpool")
    options = ["--vec-env", "envpool", "--seed", "4294967295", "-params", "n_envs:2"]
    model = constructor(tmp_path, monkeypatch)("ppo", "Breakout-v5", *options)
    assert isinstance(model.policy, ActorCriticCnnPolicy)
    assert (model.n_envs, model.batch_size, model.observation_space.shape) == (2, 256, (4, 84, 84))
    env, lives, rewards, found = model.env, 0, 0.0, set()
    env.reset()
    while not found & {"episode"} or not lives:
        _, reward, dones, infos = env.step(np.array([env.action_space.sample(), 0]))
        rewards, lives = rewards + reward[0], lives + dones[0]
        found |= infos[0].keys()
    assert lives == 5
    env.close()
    (row,) = (tmp_path / "ppo" / "Breakout-v5_1" / "0.monitor.csv").read_text().splitlines()[2:]
    assert float(row.split(",")[0]) == rewards


@pytest.mark.skipif(importlib.util.find_spec("envpool") is not None, reason="EnvPool is installed")
def test_envpool_is_asked_for(small, tmp_path, capsys):
    options = ["--algo", "ppo", "--env", "Pendulum-v1", "-c", small, "-f", str(tmp_path), "--vec-env", "envpool"]
    assert main(["train", *options]) == 2
    assert "pip install 'sb3_pg[envpool]'" in capsys.readouterr().err


@pytest.mark.parametrize("algo", ALGORITHMS)
@pytest.mark.parametrize("which", ["final", "best"])
def test_enjoy(algo, which, logs, capsys):
    options = ["--algo", algo, "--env", "Pendulum-v1", "-f", str(logs), "--no-render", "-n", "210", "--exp-id", "1"]
    assert main(["enjoy", *options, *["--load-best"] * (which == "best")]) == 0
    printed = capsys.readouterr().out
    assert "Loading running average" in printed and "Mean reward: -" in printed


class Harm:
    def __reduce__(self):
        return print, ("code ran",)


def add_line(file, harm):
    with file.open("a") as settings:
        settings.write(harm)


def test_settings_may_name_the_classes_that_archives_may_name():
    kind = "!!python/name:torch.nn.modules.activation.ReLU ''"
    assert yaml.load(kind, SettingsLoader) is th.nn.ReLU
    for name in ("builtins.print", "os.system", "print", "torch.nn.modules.activation.None"):
        with pytest.raises(ArgumentError, match=f"more than plain settings .*{name}"):
            yaml.load(f"!!python/name:{name} ''", SettingsLoader)


@pytest.mark.parametrize("what", ["model", "statistics", "args.yml", "config.yml"])
def test_enjoy_runs_no_code_unless_it_is_told_to(what, logs, tmp_path, capsys):
    run = tmp_path / "ppo" / "Pendulum-v1_1"
    shutil.copytree(logs / "ppo" / "Pendulum-v1_1", run)
    if what == "model":
        model = ALGORITHMS["ppo"].load(run / "Pendulum-v1.zip")
        model.harm = Harm()
        model.save(run / "Pendulum-v1.zip")
    elif what == "args.yml":
        add_line(run / "Pendulum-v1" / what, "  - - harm\n    - !!python/object/apply:builtins.print [code ran]\n")
    elif what == "config.yml":  # rl_zoo3 itself runs this text
        add_line(run / "Pendulum-v1" / what, "  - - normalize\n    - print('code ran') or {}\n")
    else:
        path = str(run / "Pendulum-v1" / "vecnormalize.pkl")
        statistics = ours.VecNormalize.load(path, ours.DummyVecEnv([lambda: gym.make("Pendulum-v1")]))
        statistics.harm = Harm()
        statistics.save(path)
    options = [
        "--algo",
        "ppo",
        "--env",
        "Pendulum-v1",
        "-f",
        str(tmp_path),
        "--no-render",
        "-n",
        "210",
        "--exp-id",
        "1",
    ]
    assert main(["enjoy", *options]) == 2
    printed = capsys.readouterr()
    assert "print" in printed.err and "--trusted" in printed.err and "code ran" not in printed.out
    assert printed.err.count("\n") == 1
    assert main(["enjoy", *options, "--trusted"]) == 0
    printed = capsys.readouterr()
    assert "code ran" in printed.out and "Mean reward: -" in printed.out
    assert main(["enjoy", *options]) == 2


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_continue(algo, logs, small, tmp_path, capsys):
    first = logs / algo / "Pendulum-v1_1"
    options = ["--algo", algo, "--env", "Pendulum-v1", "-c", small, "-f", str(tmp_path), "--eval-freq", "-1"]
    assert main(["train", *options, "-i", str(first / "Pendulum-v1.zip")]) == 0
    assert "Loading saved VecNormalize stats" in capsys.readouterr().out
    second = tmp_path / algo / "Pendulum-v1_1"
    before, after = (ALGORITHMS[algo].load(run / "Pendulum-v1.zip") for run in (first, second))
    assert after._n_updates == 2 * before._n_updates > 0
    envs = sb3.DummyVecEnv([lambda: gym.make("Pendulum-v1")])
    counts = [
        sb3.VecNormalize.load(str(run / "Pendulum-v1" / "vecnormalize.pkl"), envs).obs_rms.count
        for run in (first, second)
    ]
    assert counts[1] > counts[0] + 500


@pytest.mark.parametrize("rest", [["-n", "256"], []])
def test_continuing_equals_the_whole_run(rest, small, tmp_path, monkeypatch):
    options = ["--algo", "ppo", "--env", "Pendulum-v1", "-c", small, "--eval-freq", "-1"]
    run = "ppo/Pendulum-v1_1/Pendulum-v1.zip"
    assert main(["train", *options, "--seed", "1", "-n", "512", "-f", str(tmp_path / "whole")]) == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PPO, "train", interrupted_after(PPO.train))
        assert main(["train", *options, "--seed", "1", "-n", "512", "-f", str(tmp_path / "first")]) == 130
    first = tmp_path / "first" / run
    assert main(["train", *options, "-i", str(first), "-f", str(tmp_path / "rest"), *rest]) == 0
    whole, resumed = (PPO.load(tmp_path / name / run) for name in ("whole", "rest"))
    if not rest:  # the schedule of the learning rate goes on to the same end
        np.testing.assert_array_equal(weights(whole), weights(resumed))
        assert whole.num_timesteps == resumed.num_timesteps == 512
    else:
        assert PPO.load(first).num_timesteps + 256 <= resumed.num_timesteps


def interrupted_after(train):
    def then_interrupt(self):
        train(self)
        if self.num_timesteps == 256:
            signal.raise_signal(signal.SIGINT)

    return then_interrupt


def test_what_was_learned_is_saved_when_a_number_is_not_finite(small, tmp_path, monkeypatch, capsys):
    def learn(self, *args, **kwargs):
        raise NonFiniteError("The reward is not finite.")

    monkeypatch.setattr(PPO, "learn", learn)
    options = ["--algo", "ppo", "--env", "Pendulum-v1", "-c", small, "-f", str(tmp_path), "--eval-freq", "-1"]
    assert main(["train", *options]) == 2
    assert capsys.readouterr().err == "python -m sb3_pg.zoo train: The reward is not finite.\n"
    assert (tmp_path / "ppo" / "Pendulum-v1_1" / "Pendulum-v1.zip").exists()


# ----------------------------------------------------------- memory and masks


def test_lstm_policies_train_and_are_enjoyed_with_their_memory(tmp_path, monkeypatch, capsys):
    options = ["--algo", "ppo", "--env", "CartPoleNoVel-v1", "-f", str(tmp_path)]
    assert main(["train", *options, "-n", "1024", "--eval-freq", "400", "--eval-episodes", "1"]) == 0
    states, predict = [], PPO.predict

    def watched(self, observation, state=None, **arguments):
        action, after = predict(self, observation, state, **arguments)
        states.append((state, after))
        return action, after

    monkeypatch.setattr(PPO, "predict", watched)
    assert main(["enjoy", *options, "--no-render", "-n", "60"]) == 0
    assert "Mean reward" in capsys.readouterr().out
    assert len(states) == 60 and states[0][0] is None
    for (_, given), (taken, _) in pairwise(states):
        assert taken is given and taken[0].any()


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_taxis_are_masked_in_training_and_when_enjoyed(algo, tmp_path, monkeypatch, capsys):
    from sb3_pg.zoo.wrappers import TaxiMasks

    taken, step = [], TaxiMasks.step

    def watched(self, action):
        taken.append(self.action_masks()[action])
        return step(self, action)

    monkeypatch.setattr(TaxiMasks, "step", watched, raising=False)
    options = ["--algo", algo, "--env", "Taxi-v4", "-f", str(tmp_path)]
    assert main(["train", *options, "-n", "512", "--eval-freq", "256", "--eval-episodes", "1"]) == 0
    n_trained = len(taken)
    assert n_trained > 512 and all(taken)
    assert main(["enjoy", *options, "--no-render", "-n", "210"]) == 0
    assert len(taken) == n_trained + 210 and all(taken)
    assert "Mean reward" in capsys.readouterr().out


def test_without_masking_forbidden_actions_are_taken(tmp_path, monkeypatch):
    """So that the test above says something."""
    from sb3_pg.zoo.wrappers import TaxiMasks

    taken, step = [], TaxiMasks.step
    monkeypatch.setattr(
        TaxiMasks, "step", lambda self, action: taken.append(self.action_masks()[action]) or step(self, action)
    )
    options = ["--algo", "ppo", "--env", "Taxi-v4", "-f", str(tmp_path), "--eval-freq", "-1"]
    assert main(["train", *options, "-n", "256", "-params", "use_masking:False"]) == 0
    assert not all(taken)


# ------------------------------------------------- videos, plots and benchmark


def test_record_video(logs, tmp_path):
    options = ["--algo", "trpo", "--env", "Pendulum-v1", "-f", str(logs), "-o", str(tmp_path), "-n", "5"]
    assert main(["record_video", *options, "--exp-id", "1"]) == 0
    assert [path.name.split("-step")[0] for path in tmp_path.iterdir()] == ["final-model-trpo-Pendulum-v1"]


def test_children_keep_the_registration(logs, tmp_path, monkeypatch, capfd):
    """The benchmark starts one ``enjoy`` in a process of its own."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "only"
    shutil.copytree(logs / "reinforce", folder / "reinforce")
    call = subprocess.call
    options = ["--log-dir", str(folder), "--benchmark-dir", "results", "--no-hub", "--test-mode", "-n", "210"]
    assert main(["benchmark", *options]) == 0
    assert re.search(r"reinforce *\| *Pendulum-v1 *\|", (tmp_path / "results" / "benchmark.md").read_text())
    assert subprocess.call is call


def test_children_are_ours_and_other_programs_are_not():
    here = [sys.executable, "-m", "sb3_pg.zoo"]
    assert our_command(["python", "-m", "rl_zoo3.record_video", "-n", "5"]) == [*here, "record_video", "-n", "5"]
    assert our_command(["python", "enjoy.py", "-n", "5"]) == [*here, "enjoy", "-n", "5"]
    for other in (["ffmpeg", "-i", "a"], ["python", "-m", "http.server"], "ls"):
        assert our_command(other) == other


def test_record_training_says_that_it_needs_ffmpeg(logs, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "")
    assert main(["record_training", "--algo", "ppo", "--env", "Pendulum-v1", "-f", str(logs)]) == 2
    assert "ffmpeg" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore::UserWarning")  # that nothing is shown without a screen
def test_plots(logs, tmp_path, monkeypatch, capsys):
    import matplotlib

    matplotlib.use("Agg")
    monkeypatch.chdir(tmp_path)
    assert main(["plot_train", "-a", "reinforce", "-e", "Pendulum-v1", "-f", str(logs), "-w", "1"]) == 0
    for algo in ALGORITHMS:  # rl_zoo3 draws from two runs on
        for number in (1, 2):
            shutil.copytree(logs / algo / "Pendulum-v1_1", tmp_path / "logs" / algo / f"Pendulum-v1_{number}")
    options = ["-e", "Pendulum-v1", "-f", "logs", "-l", "ours", "-o", "results"]
    assert main(["all_plots", "-a", *ALGORITHMS, *options, "--no-display"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("REINFORCE", "TRPO", "PPO"))
    assert main(["plot_from_file", "-i", "results.pkl", "-b", "-o", "scores.png", "--format", "png"]) == 0
    assert (tmp_path / "scores.png").exists()
    matplotlib.pyplot.close("all")


# -------------------------------------------------------------------- optimize


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_optimize_and_train_with_a_trial(algo, construct, tmp_path, capsys, monkeypatch):
    import optuna

    log = str(tmp_path / "study.log")
    study = ["--storage", log, "--study-name", "s"]
    options = ["--algo", algo, "--env", "Pendulum-v1", "-f", str(tmp_path), "-n", "200", "--seed", "2", *study]
    options += ["-optimize", "--n-trials", "2", "--n-evaluations", "1", "--eval-episodes", "1", "--no-optim-plots"]
    assert main(["train", *options]) == 0
    assert list((tmp_path / algo).glob("report_*.csv"))

    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(log))
    trials = optuna.load_study(study_name="s", storage=storage).trials
    assert len(trials) == 2 and any(trial.state.name == "COMPLETE" for trial in trials)
    for number, trial in enumerate(trials):
        model = construct(algo, "Pendulum-v1", *study, "--trial-id", str(number))
        assert model.learning_rate == trial.params["learning_rate"]
        assert model.gamma == 1 - trial.params["one_minus_gamma"]
        assert model.policy.net_arch["pi"] == {"small": [64, 64], "medium": [256, 256]}[trial.params["net_arch"]]
        for name in ("batch_size", "n_steps"):
            if f"{name}_pow" in trial.params:
                assert getattr(model, name) == 2 ** trial.params[f"{name}_pow"]
    monkeypatch.undo()
    options = ["--algo", algo, "--env", "Pendulum-v1", "-f", str(tmp_path)]
    assert main(["train", *options, "-n", "64", *study, "--trial-id", "0", "--eval-freq", "-1"]) == 0
    assert main(["enjoy", *options, "--no-render", "-n", "10"]) == 0  # its settings have a class, activation_fn
    options += [*study, "--trial-id", "7"]
    assert main(["train", *options]) == 2
    assert "no trial 7" in capsys.readouterr().err


@pytest.mark.parametrize("n_actions", [0, 6])
def test_every_suggestion_is_an_argument(n_actions):
    import optuna

    from sb3_pg.zoo.manager import config_arguments
    from sb3_pg.zoo.search import CONVERTERS, SAMPLERS

    assert set(SAMPLERS) == set(CONVERTERS) == set(ALGORITHMS)
    for algo, sample in SAMPLERS.items():
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
        for _ in range(20):
            trial = study.ask()
            arguments = sample(trial, n_actions, 1, {})
            assert CONVERTERS[algo](trial.params) == arguments
            assert set(arguments) <= set(config_arguments(ALGORITHMS[algo]))
            ALGORITHMS[algo]("MlpPolicy", None, _init_setup_model=False, **arguments)
            if algo == "trpo":
                assert arguments["target_kl"] <= 0.05 * max(n_actions, 1)


def test_a_run_with_the_optimizer_of_a2c_goes_on(tmp_path, capsys):
    config = tmp_path / "a2c.yml"
    settings = "n_timesteps: 64, policy: MlpPolicy, n_steps: 16, use_rms_prop: true, rms_prop_eps: 1.0e-4"
    config.write_text(f"CartPole-v1: {{{settings}}}\n")
    options = ["--algo", "reinforce", "--env", "CartPole-v1", "-c", str(config), "--eval-freq", "-1"]
    assert main(["train", *options, "-f", str(tmp_path / "first")]) == 0
    first = tmp_path / "first" / "reinforce" / "CartPole-v1_1" / "CartPole-v1.zip"
    assert main(["train", *options, "-f", str(tmp_path / "rest"), "-i", str(first), "-n", "64"]) == 0
    loaded = REINFORCE.load(tmp_path / "rest" / "reinforce" / "CartPole-v1_1" / "CartPole-v1.zip")
    assert loaded.num_timesteps >= 128 and loaded.policy.optimizer.param_groups[0]["eps"] == 1e-4
    for change in ("use_rms_prop:False", "use_sde:True", "policy:'CnnPolicy'"):  # which only new models can have
        more = ["-f", str(tmp_path / "other"), "-i", str(first), "-params", change]
        assert main(["train", *options, *more]) == 2
        assert f"`{change.split(':')[0]}` cannot be changed" in capsys.readouterr().err


def test_a_run_without_the_exploration_of_its_entry_goes_on(tmp_path):
    config = tmp_path / "ppo.yml"
    config.write_text("Pendulum-v1: {n_timesteps: 64, policy: MlpPolicy, n_steps: 64, use_sde: true}\n")
    options = ["--algo", "ppo", "--env", "Pendulum-v1", "-c", str(config), "--eval-freq", "-1"]
    first = tmp_path / "first" / "ppo" / "Pendulum-v1_1" / "Pendulum-v1.zip"
    assert main(["train", *options, "-f", str(tmp_path / "first"), "-params", "use_sde:False"]) == 0
    assert main(["train", *options, "-f", str(tmp_path / "rest"), "-i", str(first)]) == 0

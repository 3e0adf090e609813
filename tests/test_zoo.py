"""The bridge to rl-zoo. rl_zoo3 is imported in the tests only, because it patches gymnasium for the whole process."""

import os
import re
import shutil
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import gymnasium as gym
import pytest
import yaml
from stable_baselines3.common import vec_env as sb3

from sb3_pg import PPO, REINFORCE, TRPO
from sb3_pg.common import vec_env as ours
from sb3_pg.common.errors import NonFiniteError
from sb3_pg.zoo import CONFIGS, register
from sb3_pg.zoo.__main__ import main, our_command

ROOT = Path(__file__).parent.parent
ALGORITHMS = {"reinforce": REINFORCE, "trpo": TRPO, "ppo": PPO}
CLASSIC = ("CartPole-v1", "Acrobot-v1", "MountainCar-v0", "MountainCarContinuous-v0", "Pendulum-v1")
BOX2D = ("LunarLander-v3", "LunarLanderContinuous-v3", "BipedalWalker-v3")
MUJOCO = (
    *("HalfCheetah-v5", "Hopper-v5", "Walker2d-v5", "Ant-v5", "Swimmer-v5", "Humanoid-v5", "Reacher-v5"),
    *("InvertedPendulum-v5", "InvertedDoublePendulum-v5"),
)

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
    """What ``train`` with these options would train."""
    register()
    models = []
    monkeypatch.setattr("rl_zoo3.exp_manager.ExperimentManager.learn", lambda self, model: models.append(model))
    monkeypatch.setattr("rl_zoo3.exp_manager.ExperimentManager.save_trained_model", lambda self, model: None)

    def construct(algo, env_id, *options):
        arguments = ["--algo", algo, "--env", env_id, "-f", str(tmp_path), "--eval-freq", "-1", *options]
        assert main(["train", *arguments]) == 0
        return models.pop()

    return construct


# --------------------------------------------------------------- registration


def python(code_or_module, *options, **environment):
    source = ["-c", code_or_module] if "\n" in code_or_module else ["-m", code_or_module]
    variables = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    return subprocess.run([sys.executable, *source, *options], capture_output=True, text=True, env=variables)


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


def test_environments_are_ours_but_subprocesses_are_sb3s(construct, small):
    model = construct("ppo", "Pendulum-v1", "-c", small)
    assert type(model.env) is ours.VecNormalize and type(model.env.venv) is ours.DummyVecEnv
    assert model.env.gamma == 0.9
    model = construct("ppo", "Pendulum-v1", "-c", small, "--vec-env", "subproc")
    assert type(model.env.venv) is sb3.SubprocVecEnv
    model.env.close()


@pytest.mark.parametrize("algo", ALGORITHMS)
@pytest.mark.parametrize("which", ["final", "best"])
def test_enjoy(algo, which, logs, capsys):
    options = ["--algo", algo, "--env", "Pendulum-v1", "-f", str(logs), "--no-render", "-n", "210", "--exp-id", "1"]
    assert main(["enjoy", *options, *["--load-best"] * (which == "best")]) == 0
    printed = capsys.readouterr().out
    assert "Loading running average" in printed and "Mean reward: -" in printed


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


def test_what_was_learned_is_saved_when_a_number_is_not_finite(small, tmp_path, monkeypatch, capsys):
    def learn(self, *args, **kwargs):
        raise NonFiniteError("The reward is not finite.")

    monkeypatch.setattr(PPO, "learn", learn)
    options = ["--algo", "ppo", "--env", "Pendulum-v1", "-c", small, "-f", str(tmp_path), "--eval-freq", "-1"]
    assert main(["train", *options]) == 2
    assert capsys.readouterr().err == "python -m sb3_pg.zoo train: The reward is not finite.\n"
    assert (tmp_path / "ppo" / "Pendulum-v1_1" / "Pendulum-v1.zip").exists()


# -------------------------------------------------- videos, plots and benchmark


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


# ------------------------------------------------------------------- optimize


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_optimize_and_train_with_a_trial(algo, construct, tmp_path, capsys):
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
    options = ["--algo", algo, "--env", "Pendulum-v1", "-f", str(tmp_path), *study, "--trial-id", "7"]
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


# ------------------------------------------------------------------ schedules


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_every_argument_that_takes_a_schedule_takes_one(algo, construct, tmp_path):
    from sb3_pg.zoo.manager import schedule_arguments

    names = schedule_arguments(ALGORITHMS[algo])
    some = {
        "ppo": {"learning_rate", "ent_coef", "vf_coef", "clip_range", "clip_range_vf", "clip_range_high", "kl_coef"},
        "trpo": {"learning_rate", "ent_coef", "target_kl"},
        "reinforce": {"learning_rate", "ent_coef", "vf_coef"},
    }
    assert set(names) >= some[algo]
    config = tmp_path / "schedules.yml"
    settings = {"policy": "MlpPolicy", "n_timesteps": 128, "n_steps": 128} | dict.fromkeys(names, "lin_2e-1")
    config.write_text(yaml.dump({"CartPole-v1": settings}))
    model = construct(algo, "CartPole-v1", "-c", str(config))
    for name in names:
        assert getattr(model, name)(0.5) == pytest.approx(0.1), name
    model.learn(128)


def test_numbers_that_yaml_takes_for_texts(construct, tmp_path):
    config = tmp_path / "texts.yml"
    config.write_text(
        "CartPole-v1: {policy: MlpPolicy, n_timesteps: 1e3, learning_rate: 1e-3, gamma: '0.9', clip_range: 3e-1}"
    )
    assert isinstance(yaml.safe_load(config.read_text())["CartPole-v1"]["learning_rate"], str)
    model = construct("ppo", "CartPole-v1", "-c", str(config))
    assert (model.learning_rate, model.gamma, model.clip_range(1)) == (1e-3, 0.9, 0.3)


def test_constants_stay_numbers_and_none_is_none(construct):
    model = construct("ppo", "CartPole-v1", "-params", "learning_rate:1e-3", "clip_range_vf:None", "adaptive_lr:True")
    assert model.learning_rate == 1e-3 and model.clip_range_vf is None


# -------------------------------------------------------------------- configs


def entries():
    for algo in ALGORITHMS:
        for name in yaml.safe_load((CONFIGS / f"{algo}.yml").read_text()):
            yield pytest.param(algo, name, id=f"{algo} {name}")


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_every_task_has_an_entry_that_says_whether_it_was_run(algo):
    text = (CONFIGS / f"{algo}.yml").read_text()
    settings = yaml.safe_load(text)
    assert set(settings) == {*CLASSIC, *BOX2D, *MUJOCO, "atari", "default"}
    ran = r"Not run\.|Run on \d{4}-\d\d-\d\d with seed \d+ for [\d,]+ steps(?: of [\w-]+)?: -?[\d.e+]+ \+/- [\d.e+]+\."
    for name in set(settings) - {"default"}:
        assert re.search(rf"^# (?:{ran}).*\n(?:# .*\n)*{re.escape(name)}:", text, re.MULTILINE), name


@pytest.mark.parametrize("algo, name", list(entries()))
def test_every_entry_makes_a_model(algo, name, construct):
    env_id = {"atari": "ALE/Pong-v5", "default": "FrozenLake-v1"}.get(name, name)
    for module, ids in (("Box2D", BOX2D), ("mujoco", MUJOCO), ("ale_py", ["ALE/Pong-v5"])):
        if env_id in ids:
            pytest.importorskip(module)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # of batch sizes that do not fit, among others
        warnings.filterwarnings("ignore", "You are trying to run PPO on the GPU|.*gymnasium|.*Overriding environment")
        model = construct(algo, env_id)
    given = yaml.safe_load((CONFIGS / f"{algo}.yml").read_text())[name]
    assert type(model) is ALGORITHMS[algo]
    for key, value in given.items():
        if isinstance(value, (int, float)) and hasattr(model, key) and key not in ("n_envs", "clip_range"):
            assert getattr(model, key) == value, key


def test_rl_zoos_own_settings_run_with_a_warning_where_target_kl_differs(construct):
    import rl_zoo3

    theirs = Path(rl_zoo3.__file__).parent / "hyperparams"
    pytest.importorskip("Box2D")
    lander = "LunarLanderContinuous-v3", "-c", str(theirs / "trpo.yml")
    says = r"target_kl=0.01 bounds the KL summed over the 2 .*: -params target_kl:0.02 cg_damping:0.2$"
    with pytest.warns(UserWarning, match=says):
        assert construct("trpo", *lander).n_critic_updates == 20
    says = r"target_kl=lin_0.03 bounds .*: -params target_kl:\"'lin_0.06'\" cg_damping:0.2$"
    with pytest.warns(UserWarning, match=says):
        construct("trpo", *lander, "-params", "target_kl:'lin_0.03'")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        construct("trpo", "CartPole-v1", "-c", str(theirs / "trpo.yml"))
        construct("trpo", "LunarLanderContinuous-v3")
        model = construct("ppo", "CartPole-v1", "-c", str(theirs / "ppo.yml"))
    assert model.clip_range(0.5) == 0.1


# --------------------------------------------------------------------- errors


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
        ("train -i nosuch.zip", "trained_agent"),
        ("train --storage nosuch.log --study-name s --trial-id 0", "no trial 0"),
        ("enjoy --env CartPole-v1 -f nosuch", "nosuch"),
        ("record_video --env CartPole-v1 -f nosuch", "nosuch"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(arguments, says, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("broken.yml").write_text("CartPole-v1: [")
    Path("empty.yml").write_text("Other-v1: {}")
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
        f"import sys; sys.modules[{module!r}] = None\nfrom sb3_pg.zoo.__main__ import main; sys.exit(main())", "train"
    )
    assert done.returncode == 2
    assert "pip install 'sb3_pg[zoo]'" in done.stderr and done.stderr.count("\n") == 1


def test_other_missing_packages_are_not_blamed_on_the_extra(capsys):
    assert main(["train", "--gym-packages", "nosuch"]) == 2
    assert "pip install" not in capsys.readouterr().err


def test_settings_that_cannot_work_keep_their_traceback_when_asked(tmp_path):
    with pytest.raises(ValueError, match="MlpPolice"):
        main(["train", "-f", str(tmp_path), "-params", "policy:'MlpPolice'", "--verbose", "2"])


def test_help_needs_nothing_else_installed(monkeypatch, capsys):
    monkeypatch.setenv("PATH", "")
    for command in (["record_training", "--help"], ["all_plots"], ["plot_from_file"]):
        with pytest.raises(SystemExit) as stop:
            main(command)
        assert stop.value.code == 0 and "usage:" in capsys.readouterr().out


def test_help_lists_the_commands(capsys):
    assert main(["--help"]) == 0 and main([]) == 0
    assert "record_training" in capsys.readouterr().out


# ---------------------------------------------------------------------- wheel


def test_an_installed_wheel_has_its_settings(tmp_path):
    source, site = tmp_path / "source", tmp_path / "site"
    source.mkdir()
    for name in ("sb3_pg", "zoo_configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = ["wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path), str(source)]
    subprocess.run([sys.executable, "-m", "pip", *build], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    assert "sb3_pg_zoo = sb3_pg.zoo.__main__:main" in next(site.glob("*.dist-info/entry_points.txt")).read_text()

    code = "import os, sys; os.chdir(sys.argv[1]); del sys.argv[1]\nfrom sb3_pg.zoo.__main__ import main; main()"
    options = ["--algo", "reinforce", "-f", "logs", "-n", "64", "--eval-freq", "-1"]
    done = python(code, str(tmp_path), "train", *options, PYTHONPATH=str(site))
    assert f"Loading hyperparameters from: {site / 'zoo_configs' / 'reinforce.yml'}" in done.stdout, done.stderr
    assert (tmp_path / "logs" / "reinforce" / "CartPole-v1_1" / "CartPole-v1.zip").exists(), done.stderr

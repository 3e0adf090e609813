"""The settings of zoo_configs/, and what becomes of settings on their way to the algorithms."""

import csv
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
from gymnasium import spaces
from zoo_tools import ALGORITHMS, ROOT, constructor, python

from sb3_pg.zoo import CONFIGS

CLASSIC = ("CartPole-v1", "Acrobot-v1", "MountainCar-v0", "MountainCarContinuous-v0", "Pendulum-v1")
MEMORY_AND_MASKS = ("CartPoleNoVel-v1", "PendulumNoVel-v1", "Taxi-v4")
BOX2D = ("LunarLander-v3", "LunarLanderContinuous-v3", "BipedalWalker-v3")
MUJOCO = (
    *("HalfCheetah-v5", "Hopper-v5", "Walker2d-v5", "Ant-v5", "Swimmer-v5", "Humanoid-v5", "Reacher-v5"),
    *("InvertedPendulum-v5", "InvertedDoublePendulum-v5"),
)
TEXT = ("Sentiment-v0",)


@pytest.fixture
def construct(tmp_path, monkeypatch):
    return constructor(tmp_path, monkeypatch)


# ------------------------------------------------------------------- schedules


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_every_argument_that_takes_a_schedule_takes_one(algo, construct, tmp_path):
    from sb3_pg.zoo.manager import schedule_arguments

    names = schedule_arguments(ALGORITHMS[algo])
    some = {
        "ppo": {"learning_rate", "ent_coef", "vf_coef", "clip_range", "clip_range_vf", "clip_range_high", "kl_coef"},
        "trpo": {"learning_rate", "ent_coef", "target_kl"},
        "reinforce": {"learning_rate", "ent_coef", "vf_coef", "target_kl"},
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
    config.write_text(
        "CartPole-v1: {policy: MlpPolicy, n_timesteps: 1e3, critic_optimizer_kwargs: {weight_decay: 1e-3}, "
        "max_grad_norm: [5e-1, 1e0]}"
    )
    model = construct("ppo", "CartPole-v1", "-c", str(config))
    assert (model.critic_optimizer_kwargs, model.max_grad_norm) == ({"weight_decay": 1e-3}, (0.5, 1.0))


def test_constants_stay_numbers_and_none_is_none(construct):
    model = construct("ppo", "CartPole-v1", "-params", "learning_rate:1e-3", "clip_range_vf:None", "adaptive_lr:True")
    assert model.learning_rate == 1e-3 and model.clip_range_vf is None


# --------------------------------------------------------------------- configs


def entries():
    for algo in ALGORITHMS:
        for name in yaml.safe_load((CONFIGS / f"{algo}.yml").read_text()):
            yield pytest.param(algo, name, id=f"{algo} {name}")


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_every_task_has_an_entry_that_says_whether_it_was_run(algo):
    text = (CONFIGS / f"{algo}.yml").read_text()
    settings = yaml.safe_load(text)
    assert set(settings) == {*CLASSIC, *MEMORY_AND_MASKS, *BOX2D, *MUJOCO, *TEXT, "atari", "default"}
    ran = r"Not run\.|Run on \d{4}-\d\d-\d\d with seed \d+ for [\d,]+ steps(?: of [\w-]+)?: -?[\d.e+]+ \+/- [\d.e+]+\."
    for name in set(settings) - {"default"}:
        assert re.search(rf"^# (?:{ran}).*\n(?:# .*\n)*{re.escape(name)}:", text, re.MULTILINE), name


@pytest.mark.parametrize("algo", sorted(ALGORITHMS))
def test_the_returns_of_the_general_settings_are_recorded_ones(algo):
    """As benchmarks/tuning.py wrote them, rounded; numbers of three digits that begin with 10 are seeds."""
    text = (CONFIGS / f"{algo}.yml").read_text()
    comment = text.split("# For environments without an entry")[1].split("\ndefault:")[0]
    with (ROOT / "benchmarks" / "learning" / "tuning.csv").open(newline="") as file:
        recorded = {f"{float(row['mean']):.0f}" for row in csv.DictReader(file) if row["side"] == algo}
    said = re.findall(r"(?<![\w.,-])(?!10\d\b|20\d\d-)\d{3,}(?![\d,]*\d|-)", comment)
    assert said
    assert set(said) <= recorded


@pytest.mark.parametrize("algo, name", list(entries()))
def test_every_entry_makes_a_model(algo, name, construct):
    env_id = {"atari": "ALE/Pong-v5", "default": "FrozenLake-v1"}.get(name, name)
    for module, ids in (("Box2D", BOX2D), ("mujoco", MUJOCO), ("ale_py", ["ALE/Pong-v5"]), ("transformers", TEXT)):
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


@pytest.mark.parametrize(("env_id", "of_numbers"), [("FrozenLake-v1", False), ("CartPole-v1", True)])
def test_only_observations_that_are_numbers_are_normalised(env_id, of_numbers, construct):
    normalized = construct("reinforce", env_id, "-params", "normalize:True").get_vec_normalize_env()
    assert (normalized.norm_obs, normalized.norm_reward) == (of_numbers, True)


def test_of_several_observations_only_numbers_are_normalised(construct):
    name = "SomeNumbers-v0"
    gym.register(name, entry_point=SomeNumbers, max_episode_steps=5)
    params = "normalize:True", "policy:'MultiInputPolicy'"
    normalized = construct("reinforce", name, "-params", *params).get_vec_normalize_env()
    assert normalized.norm_obs and normalized.norm_obs_keys == ["numbers"]
    del gym.registry[name]


class SomeNumbers(gym.Env):
    """Shows two numbers and a choice."""

    observation_space = spaces.Dict({"choice": spaces.Discrete(3), "numbers": spaces.Box(-1, 1, (2,))})
    action_space = spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        return self.observation_space.sample(), 0.0, False, False, {}


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


# ----------------------------------------------------------------------- wheel


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
    assert [x.name for x in site.iterdir() if x.suffix != ".dist-info"] == ["sb3_pg"]  # nothing that could collide
    assert "sb3_pg_zoo = sb3_pg.zoo.__main__:main" in next(site.glob("*.dist-info/entry_points.txt")).read_text()

    code = "import os, sys; os.chdir(sys.argv[1]); del sys.argv[1]\nfrom sb3_pg.zoo.__main__ import main; main()"
    options = ["--algo", "reinforce", "-f", "logs", "-n", "64", "--eval-freq", "-1"]
    done = python(code, str(tmp_path), "train", *options, PYTHONPATH=str(site))
    settings = site / "sb3_pg" / "zoo" / "configs" / "reinforce.yml"
    assert f"Loading hyperparameters from: {settings}" in done.stdout, done.stderr
    assert (tmp_path / "logs" / "reinforce" / "CartPole-v1_1" / "CartPole-v1.zip").exists(), done.stderr

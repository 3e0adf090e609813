"""What archives hold beside known data needs the caller's word: custom objects, or that the file is trusted."""

import base64
import copy
import io
import json
import pickle
import re
import subprocess
import sys
import zipfile

import cloudpickle
import gymnasium as gym
import numpy as np
import pytest
import sb3_contrib
import stable_baselines3
import torch as th
from conftest import make_envs
from gymnasium import spaces
from sb3_contrib.common.envs import InvalidActionEnvDiscrete
from stable_baselines3.common import utils
from stable_baselines3.common import vec_env as sb3
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import FlattenExtractor
from tiny_models import ALL, tiny, weights

from sb3_pg import PPO, REINFORCE, TRPO
from sb3_pg.common.archive.container import SEAL, ArchiveError
from sb3_pg.common.errors import ArgumentError
from sb3_pg.common.vec_env import VecNormalize

pytestmark = pytest.mark.filterwarnings("ignore:You have specified a mini-batch size")


def falling(progress_remaining):
    return 1e-3 * progress_remaining


class Own(ActorCriticPolicy):
    """A policy of the user's."""


class Features(FlattenExtractor):
    """A features extractor of the user's."""


#: Attributes that are code, and what to pass in their place.
CODE = {
    "learning_rate": {"learning_rate": lambda left: 1e-3 * left},
    "ent_coef": {"ent_coef": falling},
    "policy_class": {"policy_class": Own},
    "policy_kwargs": {"policy_kwargs": {"features_extractor_class": Features, "net_arch": [8]}},
}


@ALL
@pytest.mark.parametrize("name", CODE)
def test_code_is_refused_by_name_with_two_ways_out(algorithm, name, tmp_path):
    options = dict(CODE[name])
    model = tiny(algorithm, make_envs(), options.pop("policy_class", "MlpPolicy"), **options)
    model.save(tmp_path / "model")
    wanted = rf"^.*model: `{name}` needs .*custom_objects={{'{name}': \.\.\.}}.*, or trusted=True to run"
    with pytest.raises(ArchiveError, match=wanted) as error:
        algorithm.load(tmp_path / "model", device="cpu")
    assert "\n" not in str(error.value)
    for ways in ({"custom_objects": CODE[name]}, {"trusted": True}):
        loaded = algorithm.load(tmp_path / "model", device="cpu", **ways)
        np.testing.assert_array_equal(weights(loaded), weights(model))
        assert type(loaded.policy) is type(model.policy)


def test_an_argument_of_load_stands_for_code_too(tmp_path):
    tiny(PPO, make_envs(), learning_rate=falling).save(tmp_path / "model")
    assert PPO.load(tmp_path / "model", learning_rate=0.5).lr_schedule(1.0) == 0.5


@ALL
def test_schedules_that_are_objects_need_nothing(algorithm, tmp_path):
    schedule = utils.LinearSchedule(1e-3, 1e-4, 0.5)
    tiny(algorithm, make_envs(), learning_rate=schedule, ent_coef=schedule).save(tmp_path / "model")
    loaded = algorithm.load(tmp_path / "model")
    assert [loaded.lr_schedule(p) for p in (1.0, 0.7, 0.0)] == [schedule(p) for p in (1.0, 0.7, 0.0)]
    assert [loaded.ent_coef(p) for p in (1.0, 0.7)] == [schedule(p) for p in (1.0, 0.7)]


def with_attributes(file, **changes):
    """An archive with other attributes, as SB3 would write them."""
    with zipfile.ZipFile(io.BytesIO(file)) as archive:
        entries = {name: archive.read(name) for name in archive.namelist() if name != SEAL}
    data = json.loads(entries["data"])
    for name, value in changes.items():
        data[name] = value
        if not isinstance(value, (int, float, str, type(None))):
            data[name] = {":type:": "x", ":serialized:": base64.b64encode(cloudpickle.dumps(value)).decode()}
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, entry in {**entries, "data": json.dumps(data).encode()}.items():
            archive.writestr(name, entry)
    return out


def saved(model):
    file = io.BytesIO()
    model.save(file)
    return file.getvalue()


@pytest.mark.filterwarnings("ignore:.*deprecated")
def test_archives_of_earlier_versions_of_sb3():
    """Schedules were functions of SB3's, which are saved as code, whatever the arguments."""
    theirs = stable_baselines3.PPO("MlpPolicy", "CartPole-v1", n_steps=64, device="cpu").learn(64)
    constant, wrapped = utils.constant_fn(0.15), utils.get_schedule_fn(0.15)
    for clip_range in (constant, wrapped):
        file = with_attributes(saved(theirs), clip_range=clip_range, clip_range_vf=constant, lr_schedule=wrapped)
        loaded = PPO.load(file, env=gym.make("CartPole-v1"), device="cpu")
        assert loaded.clip_range(0.3) == loaded.clip_range_vf(0.3) == 0.15
        assert loaded.lr_schedule(0.3) == theirs.lr_schedule(0.3)
        np.testing.assert_array_equal(weights(loaded), weights(theirs))
        loaded.learn(64)
    with pytest.raises(ArchiveError, match=r"`clip_range` needs the code of the function .*<lambda>"):
        PPO.load(with_attributes(saved(theirs), clip_range=lambda left: 0.1))


@pytest.mark.parametrize(
    "reader, writer, policy, env",
    [
        (PPO, stable_baselines3.PPO, "MlpPolicy", "CartPole-v1"),
        (PPO, stable_baselines3.PPO, "MlpPolicy", "Pendulum-v1"),
        (TRPO, sb3_contrib.TRPO, "MlpPolicy", "Pendulum-v1"),
        (PPO, sb3_contrib.MaskablePPO, "MlpPolicy", "CartPole-v1"),
        (PPO, sb3_contrib.RecurrentPPO, "MlpLstmPolicy", "CartPole-v1"),
    ],
)
def test_archives_of_the_peers_need_nothing(reader, writer, policy, env):
    if writer is sb3_contrib.MaskablePPO:
        env = InvalidActionEnvDiscrete(dim=4, n_invalid_actions=2)
    theirs = writer(policy, env, n_steps=64, device="cpu").learn(128)
    loaded = reader.load(io.BytesIO(saved(theirs)), device="cpu")
    np.testing.assert_array_equal(weights(loaded), weights(theirs))


@pytest.mark.parametrize("name", ["env", "policy", "_logger", "predict", "rollout_buffer"])
def test_a_file_sets_no_methods_and_makes_no_environments(name, tmp_path, monkeypatch):
    (tmp_path / "harm.py").write_text("raise SystemExit('code ran')")
    monkeypatch.syspath_prepend(tmp_path)
    file = saved(tiny(PPO, make_envs()))
    with pytest.raises(ArchiveError, match=f"`{name}` is nothing that a PPO saves"):
        PPO.load(with_attributes(file, **{name: "harm:Env-v0"}))


IN_MAIN = """
import sys
import numpy as np
from stable_baselines3.common.policies import ActorCriticPolicy
from sb3_pg import PPO
class Mine(ActorCriticPolicy):
    print("class made")
if sys.argv[2] == "save":
    PPO(Mine, "CartPole-v1", n_steps=64).save(sys.argv[1])
"""


def test_a_class_of_a_script(tmp_path):
    path = tmp_path / "model.zip"
    subprocess.run([sys.executable, "-W", "ignore", "-c", IN_MAIN, str(path), "save"], check=True, capture_output=True)
    with pytest.raises(ArchiveError, match="`policy_class` needs the code of a class"):
        PPO.load(path)
    assert PPO.load(path, custom_objects={"policy_class": ActorCriticPolicy}).policy_class is ActorCriticPolicy
    assert PPO.load(path, trusted=True).policy_class.__name__ == "Mine"


def test_parameters_of_a_file_are_taken_over_together_or_not_at_all(tmp_path):
    model, other = tiny(PPO, make_envs(), seed=1).learn(64), tiny(PPO, make_envs(), seed=2).learn(64)
    spoilt = other.policy.state_dict()
    spoilt["value_net.bias"][0] = float("nan")
    other.policy.load_state_dict(spoilt)
    other.save(tmp_path / "spoilt")
    before, moments = weights(model), model.policy.optimizer.state_dict()["state"][0]["exp_avg"].clone()
    with pytest.raises(ArchiveError, match=r"spoilt: value_net\.bias is not finite"):
        model.set_parameters(str(tmp_path / "spoilt"))
    with pytest.raises(ArchiveError, match=r"spoilt: value_net\.bias is not finite"):
        PPO.load(tmp_path / "spoilt")
    tiny(PPO, make_envs(), policy_kwargs={"net_arch": [9]}).save(tmp_path / "wider")
    with pytest.raises(ArchiveError, match=r"wider: mlp_extractor\.policy_net\.0\.weight is of shape \(9"):
        model.set_parameters(tmp_path / "wider")
    np.testing.assert_array_equal(weights(model), before)
    th.testing.assert_close(model.policy.optimizer.state_dict()["state"][0]["exp_avg"], moments, rtol=0, atol=0)
    tiny(PPO, make_envs(), seed=3).save(tmp_path / "good")
    model.set_parameters(tmp_path / "good")
    assert not np.array_equal(weights(model), before)


def test_other_threads_may_make_modules_while_a_model_is_loaded(tmp_path):
    tiny(PPO, make_envs()).save(tmp_path / "model")
    PPO.load(tmp_path / "model")
    th.nn.Linear(2000, 2000)  # the limit is gone


# -------------------------------------------------------------------------------------------------- policies' files


@pytest.mark.parametrize(
    "policy, observation",
    [("MlpPolicy", "box"), ("CnnPolicy", "image"), ("MultiInputPolicy", "dict"), ("MlpGruPolicy", "box")],
)
def test_policies_are_read_without_running_them(policy, observation, tmp_path):
    made = tiny(PPO, make_envs(observation), policy).policy
    made.save(tmp_path / "policy.pt")
    loaded = type(made).load(tmp_path / "policy.pt", device="cpu")
    np.testing.assert_array_equal(weights(loaded), weights(made))
    memory = io.BytesIO()
    loaded.save(memory)
    memory.seek(0)
    np.testing.assert_array_equal(weights(type(made).load(memory)), weights(made))
    if policy != "MlpGruPolicy":  # of which SB3 has none
        next(kind for kind in type(made).__mro__ if "sb3_pg" not in kind.__module__).load(tmp_path / "policy.pt")

    file = (tmp_path / "policy.pt").read_bytes()
    (tmp_path / "policy.pt").write_bytes(file[: len(file) // 2])
    with pytest.raises(ArchiveError, match=r"policy\.pt is damaged"):
        type(made).load(tmp_path / "policy.pt")


@pytest.mark.parametrize(
    "policy, observation",
    [("CnnPolicy", "image"), ("MultiInputPolicy", "dict"), ("CnnLstmPolicy", "image"), ("CnnGruPolicy", "image")],
)
def test_policies_with_two_features_extractors_are_read_as_they_are(policy, observation, tmp_path):
    """SB3 forgets that there are two, and takes the critic's for both."""
    made = tiny(PPO, make_envs(observation), policy, policy_kwargs={"share_features_extractor": False}).policy
    made.save(tmp_path / "policy.pt")
    loaded = type(made).load(tmp_path / "policy.pt", device="cpu")
    np.testing.assert_array_equal(weights(loaded), weights(made))
    seen = make_envs(observation).reset()
    for a, b in zip(made.predict(seen, deterministic=True), loaded.predict(seen, deterministic=True), strict=True):
        np.testing.assert_equal(a, b)


class Calls:
    def __reduce__(self):
        return print, ("code ran",)


def test_code_in_a_policys_file(tmp_path, capsys):
    policy = tiny(PPO, make_envs()).policy
    th.save({"state_dict": policy.state_dict(), "data": Calls()}, tmp_path / "policy.pt")
    with pytest.raises(ArchiveError, match=r"policy\.pt needs builtins\.print.*trusted=True"):
        type(policy).load(tmp_path / "policy.pt")
    data = {**policy._get_constructor_parameters(), "activation_fn": Own}
    th.save({"state_dict": policy.state_dict(), "data": data}, tmp_path / "policy.pt")
    with pytest.raises(ArchiveError, match=r"needs test_archive_trust\.Own"):
        type(policy).load(tmp_path / "policy.pt")
    data = {**policy._get_constructor_parameters(), "net_arch": [10**6, 10**6]}
    th.save({"state_dict": policy.state_dict(), "data": data}, tmp_path / "policy.pt")
    with pytest.raises(ArchiveError, match="much larger than its"):
        type(policy).load(tmp_path / "policy.pt")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "more, wanted",
    [
        ({"model": "someone/model"}, "loaded from elsewhere"),
        ({"model_kwargs": {"trust_remote_code": True}}, "loaded from elsewhere"),
        ({"model": {"model_type": "llama", "auto_map": {"AutoConfig": "x--y.Z"}}}, "auto_map"),
        ({"model": {"model_type": "llama", "_attn_implementation": "someone/kernel"}}, "_attn_implementation"),
        ({"lora": {"r": 1, "megatron_core": "a.module"}}, "megatron_core"),
    ],
)
def test_language_models_come_from_nowhere_but_the_file(more, wanted):
    from text_models import make  # needs the extra `text`

    model = make("llama")
    kwargs = model.policy.portable_kwargs(model.policy_kwargs) | more
    with pytest.raises(ArchiveError, match=re.escape(wanted)):
        PPO.load(with_attributes(saved(model), policy_kwargs=kwargs))


def test_archives_hold_text_and_no_object_in_place_of_the_tokenizer():
    """A file could name anything there."""
    from text_models import make  # needs the extra `text`

    model = make("gpt2")
    space = copy.copy(model.action_space)
    space.kept_tokenizer = print
    with pytest.raises(ArchiveError, match=r"builtins\.print"):
        PPO.load(with_attributes(saved(model), action_space=space))
    space.kept_tokenizer = 3
    with pytest.raises(ArchiveError, match="action_space"):
        PPO.load(with_attributes(saved(model), action_space=space))


# ------------------------------------------------------------------------------------------------------- statistics


@pytest.mark.parametrize("writer", [sb3.VecNormalize, VecNormalize])
def test_statistics_are_read_without_running_them(writer, tmp_path, capsys):
    env = writer(make_vec_env("Pendulum-v1", 2, seed=0))
    env.reset()
    env.step(np.zeros((2, 1)))
    env.save(str(tmp_path / "statistics.pkl"))
    loaded = VecNormalize.load(str(tmp_path / "statistics.pkl"), make_vec_env("Pendulum-v1", 3))
    observations = np.random.default_rng(0).normal(size=(4, 3))
    np.testing.assert_array_equal(loaded.normalize_obs(observations), env.normalize_obs(observations))
    loaded.reset()

    env.metadata = {"x": Calls()}
    env.save(str(tmp_path / "statistics.pkl"))
    with pytest.raises(ArchiveError, match=r"statistics\.pkl needs builtins\.print.*trusted=True"):
        VecNormalize.load(tmp_path / "statistics.pkl", make_vec_env("Pendulum-v1", 2))
    assert capsys.readouterr().out == ""
    VecNormalize.load(tmp_path / "statistics.pkl", make_vec_env("Pendulum-v1", 2), trusted=True)
    assert capsys.readouterr().out == "code ran\n"


def test_statistics_of_dict_observations_and_of_other_spaces(tmp_path):
    env = VecNormalize(make_envs("dict"), norm_obs_keys=["vector"])
    env.reset()
    env.save(tmp_path / "statistics.pkl")
    loaded = VecNormalize.load(tmp_path / "statistics.pkl", make_envs("dict"))
    assert loaded.norm_obs_keys == ["vector"] and loaded.obs_rms["vector"].count == env.obs_rms["vector"].count
    with pytest.raises((AssertionError, ValueError), match="space"):
        VecNormalize.load(tmp_path / "statistics.pkl", make_envs("box"))
    env = VecNormalize(make_envs("discrete"), norm_obs=False)
    env.save(tmp_path / "rewards.pkl")
    assert isinstance(
        VecNormalize.load(tmp_path / "rewards.pkl", make_envs("discrete")).observation_space, spaces.Discrete
    )


def test_an_attribute_of_statistics_is_named(tmp_path):
    env = VecNormalize(make_vec_env("Pendulum-v1", 2))
    env.function = lambda x: x
    with pytest.raises(ArgumentError, match="`function` cannot be saved"):
        env.save(tmp_path / "statistics.pkl")
    assert list(tmp_path.iterdir()) == []


def test_statistics_are_sb3s_pickle_with_a_line_behind(tmp_path):
    env = VecNormalize(make_vec_env("Pendulum-v1", 2))
    env.save(tmp_path / "statistics.pkl")
    with (tmp_path / "statistics.pkl").open("rb") as file:
        assert type(pickle.load(file)) is sb3.VecNormalize
        line = json.loads(file.read())
    assert line["format"] == 1 and len(line["sha256"]) == 64


def test_a_moving_average_of_returns_is_read(tmp_path):
    model = tiny(REINFORCE, make_envs(), baseline="ema").learn(64)
    model.save(tmp_path / "model")
    assert REINFORCE.load(tmp_path / "model")._return_ema == model._return_ema

"""Every algorithm on every action space and every observation space trains, saves, loads, predicts and goes on."""

import numpy as np
import pytest
import torch as th
from conftest import ACTION_SPACES, OBSERVATION_SPACES, make_envs, pairs, policy_for
from torch.nn.utils import parameters_to_vector

from sb3_pg import PPO, REINFORCE, TRPO

ALGORITHMS = {
    "reinforce": (REINFORCE, {"n_episodes": 4, "n_critic_updates": 1, "batch_size": 8}),
    "trpo": (TRPO, {"n_steps": 8, "batch_size": 8, "n_critic_updates": 1, "cg_max_steps": 2}),
    "ppo": (PPO, {"n_steps": 8, "batch_size": 4, "n_epochs": 1}),
}


def small(observation, **more):
    """Arguments of a small policy; NatureCNN is 100 times slower than all else here."""
    extractor = {}
    if observation == "image":
        extractor = {"features_extractor_kwargs": {"features_dim": 8}}
    elif observation == "dict":
        extractor = {"features_extractor_kwargs": {"cnn_output_dim": 8}}
    return {"net_arch": [8], **extractor, **more}


def make(algorithm, env, observation, policy_kwargs=None, **options):
    kind, defaults = ALGORITHMS[algorithm]
    policy = policy_for(OBSERVATION_SPACES[observation])
    options = {**defaults, "seed": 0, "device": "cpu", **options}
    return kind(policy, env, policy_kwargs=small(observation, **(policy_kwargs or {})), **options)


def weights(model):
    return parameters_to_vector(model.policy.parameters()).detach().clone()


def check_life(model, path, **of_load):
    """Train, save, load, predict the same, train on from there."""
    env = model.get_env()
    before = weights(model)
    model.learn(8)
    trained = weights(model)
    assert model.num_timesteps >= 8
    assert not th.equal(trained, before) and trained.isfinite().all()

    model.save(path)
    loaded = type(model).load(path, env=env, device="cpu", **of_load)
    assert th.equal(weights(loaded), trained)
    observations = env.reset()
    actions, _ = model.predict(observations, deterministic=True)
    np.testing.assert_array_equal(loaded.predict(observations, deterministic=True)[0], actions)
    assert all(env.action_space.contains(a) for a in loaded.predict(observations)[0])

    steps = loaded.num_timesteps
    loaded.learn(8, reset_num_timesteps=False)
    assert loaded.num_timesteps >= steps + 8
    assert not th.equal(weights(loaded), trained) and weights(loaded).isfinite().all()
    assert th.equal(weights(model), trained)


@pytest.mark.parametrize(
    "algorithm, action, observation, n_envs", pairs(ALGORITHMS, ACTION_SPACES, OBSERVATION_SPACES, [1, 2])
)
def test_spaces(algorithm, action, observation, n_envs, tmp_path):
    check_life(make(algorithm, make_envs(observation, action, n_envs), observation), tmp_path / "model")


@pytest.mark.parametrize("observation", ["box", "dict", "image"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_separate_features(algorithm, observation, tmp_path):
    model = make(algorithm, make_envs(observation), observation, {"share_features_extractor": False})
    check_life(model, tmp_path / "model")


@pytest.mark.parametrize("algorithm, squash_output, observation", pairs(ALGORITHMS, [False, True], ["box", "image"]))
def test_gsde(algorithm, squash_output, observation, tmp_path):
    env = make_envs(observation, n_envs=2)
    options = {"use_sde": True, "sde_sample_freq": 4, "policy_kwargs": {"squash_output": squash_output}}
    check_life(make(algorithm, env, observation, **options), tmp_path / "model")


@pytest.mark.parametrize("algorithm, action, engine", pairs(ALGORITHMS, ACTION_SPACES, ["auto", "autograd"]))
def test_the_same_seed_gives_the_same_run(algorithm, action, engine):
    runs = [make(algorithm, make_envs("box", action, 2), "box", engine=engine).learn(32) for _ in range(2)]
    other = make(algorithm, make_envs("box", action, 2), "box", engine=engine, seed=1).learn(32)
    assert th.equal(*map(weights, runs))
    assert not th.equal(weights(runs[0]), weights(other))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_custom_policy_class(algorithm, tmp_path):
    """A subclass whose ``forward`` is its own is believed, not taken apart."""
    kind, options = ALGORITHMS[algorithm]
    env = make_envs("box", "discrete", 2)
    model = kind(OwnForwardPolicy, env, policy_kwargs=small("box"), device="cpu", **options)
    check_life(model, tmp_path / "model", custom_objects={"policy_class": OwnForwardPolicy})
    assert OwnForwardPolicy.n_calls > 0


class OwnForwardPolicy(PPO.policy_aliases["MlpPolicy"]):
    n_calls = 0

    def forward(self, obs, deterministic=False):
        OwnForwardPolicy.n_calls += 1
        return super().forward(obs, deterministic)

"""With default arguments, and all that SB3 knows, every update is SB3's."""

import numpy as np
import pytest
import stable_baselines3 as sb3
import torch as th
from conftest import ACTION_SPACES, OBSERVATION_SPACES, make_envs, pairs, policy_for, silent, spelled

from sb3_pg import PPO
from sb3_pg.ppo import figures

ENGINES = ["auto", "autograd"]
# 24 * n_envs samples in minibatches of 10: the last one of an epoch is smaller.
OPTIONS = {"n_steps": 24, "batch_size": 10, "n_epochs": 4, "learning_rate": 1e-3, "seed": 0, "device": "cpu"}

pytestmark = pytest.mark.filterwarnings("ignore:You have specified a mini-batch size")


def pair(observation, action, n_envs, engine, **options):
    """SB3's PPO and ours on the same environments with the same weights."""
    options = {**OPTIONS, **options}
    policy = policy_for(OBSERVATION_SPACES[observation])
    theirs = sb3.PPO(policy, make_envs(observation, action, n_envs), **options)
    ours = PPO(policy, make_envs(observation, action, n_envs), engine=engine, **options)
    ours.policy.load_state_dict(theirs.policy.state_dict())
    return silent(theirs), silent(ours)


def copy_rollout(theirs, ours):
    """Let SB3 act, and give ours the very same rollout."""
    _, callback = theirs._setup_learn(OPTIONS["n_steps"])
    theirs.collect_rollouts(theirs.env, callback, theirs.rollout_buffer, theirs.n_steps)
    source, target = theirs.rollout_buffer, ours.rollout_buffer
    target.reset()
    values, log_probs = th.as_tensor(source.values), th.as_tensor(source.log_probs)
    for t in range(theirs.n_steps):
        observations = source.observations
        row = {k: v[t] for k, v in observations.items()} if isinstance(observations, dict) else observations[t]
        target.add(row, source.actions[t], source.rewards[t], source.episode_starts[t], values[t], log_probs[t])
    target.advantages[:], target.returns[:] = source.advantages, source.returns


def check_same(theirs, ours, tolerance=1e-5):
    expected, found = theirs.policy.state_dict(), ours.policy.state_dict()
    assert expected.keys() == found.keys()
    for key in expected:
        np.testing.assert_allclose(found[key], expected[key], rtol=0, atol=tolerance, err_msg=key)


def check_update(observation, action, n_envs, engine, **options):
    """After several epochs on the same rollout the parameters are the same; returns what the two logged."""
    theirs, ours = pair(observation, action, n_envs, engine, **options)
    before = th.nn.utils.parameters_to_vector(ours.policy.parameters()).detach()
    copy_rollout(theirs, ours)
    for model in (theirs, ours):
        model._current_progress_remaining = 0.5  # for schedules
        np.random.seed(1)
        model.train()
    check_same(theirs, ours)
    moved = (th.nn.utils.parameters_to_vector(ours.policy.parameters()) - before).abs().max()
    assert moved > 1e-3  # a hundred times the tolerance
    return theirs.logger.name_to_value, ours.logger.name_to_value


@pytest.mark.parametrize("action, n_envs, ent_coef, engine", pairs(ACTION_SPACES, [1, 3], [0.0, 0.1], ENGINES))
def test_action_spaces(action, n_envs, ent_coef, engine):
    check_update("box", action, n_envs, engine, ent_coef=ent_coef)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "options",
    [
        {"normalize_advantage": False},
        {"max_grad_norm": 0.01},
        {"max_grad_norm": 100.0},
        {"clip_range": 0.01},
        {"vf_coef": 2.0},
        {"batch_size": 2},
        {"batch_size": 1000},  # all at once
        {"batch_size": 71},  # a minibatch of one sample, which is not normalised (SB3 issue 325)
        {"learning_rate": lambda progress: 2e-3 * progress, "clip_range": lambda progress: 0.1 * progress},
        {"policy_kwargs": {"net_arch": [], "log_std_init": -1.0}},
        {"policy_kwargs": {"net_arch": {"pi": [8], "vf": [5, 4]}, "activation_fn": th.nn.ReLU}},
        {"policy_kwargs": {"optimizer_class": th.optim.SGD, "optimizer_kwargs": {"momentum": 0.9}}},
        {"policy_kwargs": {"optimizer_kwargs": {"weight_decay": 0.1, "eps": 1e-3}}},
    ],
    ids=spelled,
)
def test_options(options, engine):
    check_update("box", "box", 3, engine, **options)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("observation", "action"),
    [
        ("float64", "box"),
        ("discrete", "discrete"),
        ("multidiscrete", "multidiscrete"),
        ("multibinary", "multibinary"),
        ("image", "discrete"),
        ("dict", "box"),
    ],
)
def test_observation_spaces(observation, action, engine):
    check_update(observation, action, 1, engine, n_epochs=2)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("squash_output", [False, True])
def test_gsde(squash_output, engine):
    options = {"use_sde": True, "sde_sample_freq": 4, "ent_coef": 0.1}
    check_update("box", "box", 1, engine, policy_kwargs={"squash_output": squash_output}, **options)


@pytest.mark.parametrize("n_kept", [4, 1 << 14])
@pytest.mark.parametrize("action", ACTION_SPACES)
def test_log(action, n_kept, monkeypatch):
    monkeypatch.setattr(figures, "_KEPT_SAMPLES", n_kept)
    theirs, ours = check_update("box", action, 1, "auto", batch_size=8, ent_coef=0.1, clip_range=0.01, n_epochs=1)
    assert set(theirs) <= set(ours)
    assert theirs["train/clip_fraction"] > 0
    for name in theirs:
        assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-5), name


@pytest.mark.parametrize("action, n_envs, engine", pairs([*ACTION_SPACES, "box, gSDE"], [1, 3], ENGINES))
def test_learning(action, n_envs, engine):
    """Acting and judging included: from the same seed, several updates of learning are SB3's.

    Episodes end and are truncated within the rollouts and at their ends.
    """
    options = {"policy_kwargs": {"net_arch": [8]}, "learning_rate": lambda progress: 2e-3 * progress}
    if action == "box, gSDE":
        options |= {"use_sde": True, "sde_sample_freq": 4}
    theirs, ours = pair("box", action.split(",")[0], n_envs, engine, **options)
    for model in (theirs, ours):
        model.set_random_seed(5)
        model.learn(3 * 24 * n_envs)
    for name in ("rewards", "advantages", "returns", "values", "log_probs"):
        expected, found = (getattr(model.rollout_buffer, name) for model in (theirs, ours))
        if expected.shape != found.shape:  # SB3's buffer is flattened, environment by environment
            found = found.swapaxes(0, 1).reshape(expected.shape)
        np.testing.assert_allclose(found, expected, atol=1e-4, err_msg=name)
    check_same(theirs, ours, 1e-4)
    assert theirs.num_timesteps == ours.num_timesteps
    assert [e["r"] for e in theirs.ep_info_buffer] == [e["r"] for e in ours.ep_info_buffer]

"""Recurrent policies as users meet them: beside RecurrentPPO, in archives, in prediction."""

import copy
import pickle
import warnings

import cloudpickle
import numpy as np
import pytest
import torch as th
from conftest import ACTION_SPACES, OBSERVATION_SPACES, FakeEnv, pairs
from gymnasium import spaces
from sb3_contrib import RecurrentPPO
from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import SimpleMultiObsEnv
from stable_baselines3.common.evaluation import evaluate_policy
from tiny_models import OwnGet

from sb3_pg import PPO, REINFORCE, TRPO
from sb3_pg.common.errors import ArgumentError

SETTINGS = {
    PPO: {"n_steps": 32, "batch_size": 32, "n_epochs": 2},
    TRPO: {"n_steps": 32, "batch_size": 32, "n_critic_updates": 2},
    REINFORCE: {"n_episodes": 4, "n_critic_updates": 1},
}
ALL = pytest.mark.parametrize("algorithm", SETTINGS)
SMALL = {"lstm_hidden_size": 8, "net_arch": [8]}


def make(algorithm, env="CartPole-v1", policy="MlpLstmPolicy", policy_kwargs=None, **arguments):
    options = {**SMALL, **(policy_kwargs or {})}
    return algorithm(policy, env, seed=0, policy_kwargs=options, **{**SETTINGS[algorithm], **arguments})


@pytest.mark.parametrize("env, n_envs, clip_range_vf", pairs(["CartPole-v1", "Pendulum-v1"], [1, 3], [None, 0.2]))
def test_the_run_is_recurrent_ppos_where_both_do_the_same(env, n_envs, clip_range_vf, monkeypatch):
    """A minibatch is the whole rollout, which RecurrentPPO cuts at a random place: here at the start."""
    n_steps = 60
    arguments = {"n_steps": n_steps, "batch_size": n_steps * n_envs, "n_epochs": 3, "seed": 0, "learning_rate": 1e-3}
    arguments |= {"policy_kwargs": SMALL, "ent_coef": 0.01}
    found = []
    for kind in (RecurrentPPO, PPO):
        monkeypatch.setattr(np.random, "randint", lambda *_: 0)
        model = kind("MlpLstmPolicy", make_vec_env(env, n_envs, seed=0), **arguments)
        model.learn(3 * n_steps * n_envs)
        found.append((model.policy.parameters_to_vector(), model._last_obs))
    (theirs, their_last), (ours, our_last) = found
    np.testing.assert_allclose(our_last, their_last, atol=1e-4)
    np.testing.assert_allclose(ours, theirs, atol=2e-5)


@ALL
def test_archives(algorithm, tmp_path):
    model = make(algorithm).learn(64)
    model.save(tmp_path / "model")
    again = algorithm.load(tmp_path / "model", env="CartPole-v1")
    assert_same_predictions(model, again)
    again.learn(64, reset_num_timesteps=False)


def test_archives_of_recurrent_ppo(tmp_path):
    theirs = RecurrentPPO("MlpLstmPolicy", "CartPole-v1", n_steps=32, policy_kwargs=SMALL).learn(64)
    theirs.save(tmp_path / "theirs")
    ours = PPO.load(tmp_path / "theirs", env="CartPole-v1")
    assert_same_predictions(theirs, ours)
    ours.learn(64, reset_num_timesteps=False)
    ours.save(tmp_path / "ours")
    back = RecurrentPPO.load(tmp_path / "ours", env=make_vec_env("CartPole-v1"))
    assert_same_predictions(ours, back)
    back.learn(64)


def assert_same_predictions(one, other):
    env, states, starts = make_vec_env("CartPole-v1", 2, seed=0), [None, None], np.ones(2, bool)
    observations = env.reset()
    for _ in range(60):
        found = [
            model.predict(observations, state, starts, deterministic=True)
            for model, state in zip((one, other), states, strict=True)
        ]
        np.testing.assert_array_equal(found[0][0], found[1][0])
        states = [state for _, state in found]
        for x, y in zip(*states, strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)
        observations, _, starts, _ = env.step(found[0][0])


@ALL
def test_archives_of_another_kind_are_refused(algorithm, tmp_path):
    make(algorithm).save(tmp_path / "lstm")
    algorithm("MlpPolicy", "CartPole-v1", **SETTINGS[algorithm]).save(tmp_path / "mlp")
    mlp, lstm = (algorithm.load(tmp_path / name, env="CartPole-v1") for name in ("mlp", "lstm"))
    with pytest.raises(ArgumentError, match=r"RecurrentActorCriticPolicy.*ActorCriticPolicy"):
        mlp.set_parameters(str(tmp_path / "lstm"))
    with pytest.raises(ArgumentError, match=r"ActorCriticPolicy.*RecurrentActorCriticPolicy"):
        lstm.set_parameters(str(tmp_path / "mlp"))


@ALL
def test_evaluation_carries_the_memory(algorithm, tmp_path):
    model = make(algorithm, make_vec_env("CartPole-v1", 2))
    callback = EvalCallback(make_vec_env("CartPole-v1", 1), eval_freq=20, n_eval_episodes=2, verbose=0)
    model.learn(100, callback)
    mean, _ = evaluate_policy(model, make_vec_env("CartPole-v1", 1), n_eval_episodes=2)
    assert mean > 0


@ALL
def test_a_stopped_rollout_goes_on_with_its_memory(algorithm):
    def run(stop):
        model = make(algorithm, make_vec_env("CartPole-v1", 2, seed=0))
        if stop:
            calls = []
            model.learn(64, lambda *_: calls.append(1) or len(calls) < 9)
            model.learn(1, reset_num_timesteps=False)
        else:
            model.learn(64)
        n = model.rollout.n_steps
        return {x: getattr(model.rollout_buffer, x)[:n].copy() for x in ("observations", "values", "log_probs")}

    stopped, whole = run(True), run(False)
    for name, x in whole.items():
        np.testing.assert_allclose(stopped[name], x, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"policy": "MlpLstmPolcy"}, "Did you mean 'MlpLstmPolicy'"),
        ({"policy": "CnnLstmPolicy"}, "Use 'MlpLstmPolicy'"),
        ({"policy": "MultiInputGruPolicy"}, "Use 'MlpGruPolicy'"),
        ({"env": SimpleMultiObsEnv()}, "Use 'MultiInputLstmPolicy'"),
        ({"policy_kwargs": {"lstm_hiden_size": 3}}, "lstm_hidden_size"),
        ({"policy": "MlpGruPolicy", "policy_kwargs": {"lstm_hiden_size": 3}}, "lstm_hidden_size"),
        ({"policy": "MlpGruPolicy", "policy_kwargs": {"forget_bias": 3.0}}, "MlpGruPolicy does not take"),
        ({"policy": "CnnGruPolicy", "policy_kwargs": {"net_arc": []}}, "net_arch"),
        ({"policy_kwargs": {"lstm_hidden_size": 0}}, "`policy_kwargs: lstm_hidden_size` must be a whole number >= 1"),
        ({"policy_kwargs": {"shared_lstm": True}}, "Pass enable_critic_lstm=False"),
        ({"sequence_length": 0}, "`sequence_length` must be a whole number >= 1"),
        ({"policy_kwargs": {"forget_bias": "3"}}, "forget_bias` must be a number, not '3'"),
        ({"policy_kwargs": {"forget_bias": 3.0, "lstm_kwargs": {"bias": False}}}, "`forget_bias` needs biases"),
        ({"use_masking": "yes"}, "`use_masking` must be one of True, False"),
        ({"rollout_buffer_class": OwnGet, "n_steps": 32}, "samples follow each other"),
    ],
)
@ALL
def test_what_cannot_work_is_named(algorithm, arguments, message):
    with pytest.raises(ArgumentError, match=message):
        make(algorithm, **arguments).learn(64)


@pytest.mark.parametrize("memory", ["Lstm", "Gru"])
@pytest.mark.parametrize(
    "options",
    [{"n_lstm_layers": 2}, {"shared_lstm": True, "enable_critic_lstm": False}, {"enable_critic_lstm": False}],
    ids=["layers", "shared", "actor"],
)
def test_files_of_policies_hold_the_memorys_size(memory, options, tmp_path):
    policy = make(PPO, policy=f"Mlp{memory}Policy", policy_kwargs=options).policy
    policy.save(tmp_path / "policy.pt")
    loaded = type(policy).load(tmp_path / "policy.pt")
    observations, starts = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32), np.ones(3, bool)
    for one, other in zip(
        *(its.predict(observations, None, starts, deterministic=True) for its in (policy, loaded)), strict=True
    ):
        np.testing.assert_array_equal(one, other)
    assert loaded.lstm_hidden_state_shape == policy.lstm_hidden_state_shape
    assert all(th.equal(x, y) for x, y in zip(policy.parameters(), loaded.parameters(), strict=True))


@ALL
def test_copies(algorithm):
    model = make(algorithm).learn(64)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), cloudpickle.loads(cloudpickle.dumps(model))):
        assert_same_predictions(model, twin)
        twin.learn(64)


@ALL
def test_generalised_exploration(algorithm):
    model = make(algorithm, "Pendulum-v1", use_sde=True)
    before = model.policy.parameters_to_vector()
    model.learn(500)
    assert not np.array_equal(model.policy.parameters_to_vector(), before)


@ALL
def test_sequence_length_without_a_memory_is_refused(algorithm):
    with pytest.raises(
        ArgumentError, match=r"`sequence_length=5` is for policies with a memory.*ActorCriticPolicy has"
    ):
        algorithm("MlpPolicy", "CartPole-v1", sequence_length=5)


@pytest.mark.parametrize("algorithm", [PPO, TRPO])
def test_a_shorter_last_minibatch_is_warned_of_where_there_is_one(algorithm):
    with pytest.warns(UserWarning, match="truncated"):
        algorithm("MlpPolicy", "CartPole-v1", n_steps=32, batch_size=24)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make(algorithm, batch_size=24)


@pytest.mark.parametrize("policy", ["MlpLstmPolicy", "MlpGruPolicy"])
@ALL
def test_several_choices_are_read(algorithm, policy):
    make(algorithm, FakeEnv(OBSERVATION_SPACES["multidiscrete"]), policy).learn(64)


LSTMS = {
    "own critic": {},
    "shared": {"shared_lstm": True, "enable_critic_lstm": False},
    "no critic LSTM": {"enable_critic_lstm": False},
    "two layers": {"n_lstm_layers": 2},
}


def predictions(policy, predict, observations, steps=4, **arguments):
    """Actions and states of several steps, each from the state that the one before has left."""
    th.manual_seed(0)
    found, state = [], None
    for _ in range(steps):
        actions, state = predict(policy, observations, state, **arguments)
        found += [actions, *state]
    return found


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("n", [None, 1, 3])
@pytest.mark.parametrize(
    "observations, actions",
    [(x, "box") for x in OBSERVATION_SPACES if x not in ("dict", "image")] + [("box", x) for x in ACTION_SPACES],
)
def test_predictions_in_closed_form_are_sb3_contribs(observations, actions, n, deterministic):
    space = OBSERVATION_SPACES[observations]
    policy = make(PPO, FakeEnv(space, ACTION_SPACES[actions])).policy
    space.seed(0)
    x = np.asarray(space.sample()) if n is None else np.stack([space.sample() for _ in range(n)])
    check_same_predictions(policy, x, deterministic=deterministic)
    starts = np.arange(n or 1) % 2 == 0
    check_same_predictions(policy, x, deterministic=deterministic, episode_start=starts)


def check_same_predictions(policy, x, quick=True, **arguments):
    ours = predictions(policy, type(policy).predict, x, **arguments)
    assert (policy._predictor is not None) == quick
    theirs = predictions(policy, RecurrentActorCriticPolicy.predict, x, **arguments)
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)
        assert (type(one), one.dtype, one.shape) == (type(other), other.dtype, other.shape)


@pytest.mark.parametrize("kind", LSTMS)
def test_predictions_of_every_kind_of_lstm(kind):
    policy = make(PPO, FakeEnv(), policy_kwargs=LSTMS[kind]).policy
    x = np.random.default_rng(0).normal(size=(3, 3)).astype(np.float32)
    check_same_predictions(policy, x)
    assert not policy.training


def test_predictions_follow_what_is_done_to_the_memory():
    policy = make(PPO, FakeEnv()).policy
    x = np.random.default_rng(0).normal(size=(3, 3)).astype(np.float32)
    check_same_predictions(policy, x)
    policy.lstm_actor.weight_hh_l0.data = policy.lstm_actor.weight_hh_l0.data * 3.0
    check_same_predictions(policy, x)
    policy.lstm_actor = th.nn.LSTM(3, 8)
    check_same_predictions(policy, x)
    policy.lstm_actor.register_forward_hook(lambda module, x, y: (y[0] + 1.0, y[1]))
    check_same_predictions(policy, x, quick=False)


@pytest.mark.parametrize("starts", [[True, False, True], np.array([1, 0, 1]), np.array([1.0, 0.0, 1.0], np.float32)])
def test_forms_of_episode_starts(starts):
    policy = make(PPO, FakeEnv()).policy
    check_same_predictions(policy, np.ones((3, 3), np.float32), episode_start=starts)


def test_a_state_of_another_shape_is_refused_as_in_sb3_contrib():
    policy = make(PPO, FakeEnv()).policy
    with pytest.raises(RuntimeError, match="shape"):
        policy.predict(np.ones((3, 3), np.float32), (np.zeros((1, 2, 8)), np.zeros((1, 2, 8))))


def test_masked_predictions_of_a_recurrent_policy_are_allowed_and_follow_the_memory():
    model = make(PPO, FakeEnv(action_space=spaces.Discrete(5)))
    x, masks = np.ones((40, 3), np.float32), np.eye(5, dtype=bool)[np.arange(40) % 5]
    for engine in ("closed form", "torch"):
        if engine == "torch":
            model.policy.lstm_actor.register_forward_hook(lambda *_: None)
        actions, state = model.predict(x, action_masks=masks)
        np.testing.assert_array_equal(actions, np.arange(40) % 5)
        assert [s.shape for s in state] == [(1, 40, 8)] * 2
        np.testing.assert_allclose(state, model.predict(x)[1], rtol=1e-5, atol=1e-6)


@ALL
@pytest.mark.parametrize("kind", LSTMS)
def test_forget_bias_opens_the_forget_gates_and_nothing_else(algorithm, kind, tmp_path):
    plain, opened = (make(algorithm, policy_kwargs={**LSTMS[kind], **more}) for more in ({}, {"forget_bias": 3.0}))
    n_changed = 0
    for (name, x), y in zip(plain.policy.named_parameters(), opened.policy.parameters(), strict=True):
        expected = x.detach().clone()
        if "bias_hh" in name:
            expected[8:16] += 3.0
            n_changed += 1
        th.testing.assert_close(y.detach(), expected)
    assert n_changed == {"own critic": 2, "two layers": 4}.get(kind, 1)
    opened.learn(64).save(tmp_path / "opened")
    assert opened.policy_kwargs["forget_bias"] == 3.0
    assert_same_predictions(opened, algorithm.load(tmp_path / "opened", env="CartPole-v1"))
    if algorithm is PPO:
        assert_same_predictions(opened, RecurrentPPO.load(tmp_path / "opened"))

"""Recurrent policies as users meet them: beside RecurrentPPO, in archives, in prediction."""

import copy
import pickle

import cloudpickle
import numpy as np
import pytest
from sb3_contrib import RecurrentPPO
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import SimpleMultiObsEnv
from stable_baselines3.common.evaluation import evaluate_policy

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


@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1"])
@pytest.mark.parametrize("n_envs", [1, 3])
@pytest.mark.parametrize("clip_range_vf", [None, 0.2])
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
            np.testing.assert_allclose(x, y, atol=1e-6)
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
        np.testing.assert_allclose(stopped[name], x, atol=1e-6)


class OwnGet(RolloutBuffer):
    """Gives out samples in its own way."""

    def get(self, batch_size=None):
        yield from super().get(batch_size)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"policy": "MlpLstmPolcy"}, "Did you mean 'MlpLstmPolicy'"),
        ({"policy": "CnnLstmPolicy"}, "Use 'MlpLstmPolicy'"),
        ({"policy": "MultiInputGruPolicy"}, "Use 'MlpGruPolicy'"),
        ({"env": SimpleMultiObsEnv()}, "Use 'MultiInputLstmPolicy'"),
        ({"policy_kwargs": {"lstm_hiden_size": 3}}, "lstm_hidden_size"),
        ({"policy_kwargs": {"lstm_hidden_size": 0}}, "`policy_kwargs: lstm_hidden_size` must be a whole number >= 1"),
        ({"policy_kwargs": {"shared_lstm": True}}, "Pass enable_critic_lstm=False"),
        ({"sequence_length": 0}, "`sequence_length` must be a whole number >= 1"),
        ({"use_masking": "yes"}, "`use_masking` must be one of True, False"),
        ({"rollout_buffer_class": OwnGet, "n_steps": 32}, "samples follow each other"),
    ],
)
@ALL
def test_what_cannot_work_is_named(algorithm, arguments, message):
    with pytest.raises(ArgumentError, match=message):
        make(algorithm, **arguments).learn(64)


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

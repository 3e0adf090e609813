"""Each algorithm learns: short runs on CartPole and Pendulum, and what the defaults of REINFORCE promise."""

import pytest
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecNormalize

from sb3_pg import PPO, REINFORCE, TRPO


def score(model, env_id, n_episodes=20):
    return evaluate_policy(model, make_vec_env(env_id, 1, seed=100), n_episodes)[0]


@pytest.mark.parametrize(
    "algorithm, options, steps, at_least",
    [
        (PPO, {"n_steps": 256, "batch_size": 64, "learning_rate": 1e-3}, 25_000, 400),
        (TRPO, {"n_steps": 256, "target_kl": 0.03}, 25_000, 400),
        (REINFORCE, {}, 60_000, 400),
        (REINFORCE, {"baseline": "leave_one_out"}, 60_000, 250),
        (REINFORCE, {"n_steps": 128, "gae_lambda": 0.95}, 60_000, 250),
    ],
)
def test_cartpole(algorithm, options, steps, at_least):
    model = algorithm("MlpPolicy", make_vec_env("CartPole-v1", 4, seed=1), seed=1, **options).learn(steps)
    assert score(model, "CartPole-v1") >= at_least


#: An untrained policy scores about -1300 on Pendulum.
@pytest.mark.parametrize(
    "algorithm, options",
    [
        (PPO, {"n_steps": 512, "batch_size": 64, "gamma": 0.9, "learning_rate": 1e-3}),
        (TRPO, {"n_steps": 512, "gamma": 0.9, "target_kl": 0.03, "n_critic_updates": 15}),
        (REINFORCE, {"n_episodes": 4, "gamma": 0.9, "gae_lambda": 0.95, "batch_size": 64, "learning_rate": 1e-3}),
    ],
)
def test_pendulum(algorithm, options):
    env = VecNormalize(make_vec_env("Pendulum-v1", 4, seed=1), norm_obs=False, gamma=0.9)
    model = algorithm("MlpPolicy", env, seed=1, **options).learn(60_000)
    assert score(model, "Pendulum-v1") > -900

"""Everything an SB3 user already has: archives, callbacks, wrappers, loggers, seeds."""

import gymnasium as gym
import numpy as np
import pytest
import sb3_contrib
import stable_baselines3
import torch as th
from stable_baselines3.common.callbacks import (
    BaseCallback,
    CheckpointCallback,
    EvalCallback,
    EveryNTimesteps,
    StopTrainingOnMaxEpisodes,
    StopTrainingOnRewardThreshold,
)
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import configure
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.vec_env import SubprocVecEnv, VecFrameStack, VecMonitor, VecNormalize

from sb3_pg import PPO, REINFORCE, TRPO

ALGORITHMS = [PPO, TRPO, REINFORCE]
ALL = pytest.mark.parametrize("algorithm", ALGORITHMS)


def small(algorithm, env="CartPole-v1", **kwargs):
    kwargs = {"policy_kwargs": {"net_arch": [16]}, "seed": 0, **kwargs}
    if algorithm in (REINFORCE, stable_baselines3.A2C):
        return algorithm("MlpPolicy", env, **kwargs)
    return algorithm("MlpPolicy", env, n_steps=64, batch_size=64, **kwargs)


def observations(env_id, n=32):
    space = gym.make(env_id).observation_space
    space.seed(1)
    return np.stack([np.clip(space.sample(), -5, 5) for _ in range(n)])


@pytest.mark.parametrize(
    "writer, reader",
    [
        (stable_baselines3.PPO, PPO),
        (PPO, stable_baselines3.PPO),
        (sb3_contrib.TRPO, TRPO),
        (TRPO, sb3_contrib.TRPO),
        (PPO, PPO),
        (TRPO, TRPO),
        (REINFORCE, REINFORCE),
    ],
)
@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1"])
def test_archives_cross_over(writer, reader, env_id, tmp_path):
    model = small(writer, env_id).learn(128)
    model.save(tmp_path / "model")
    loaded = reader.load(tmp_path / "model", env=gym.make(env_id))
    obs = observations(env_id)
    by_sb3 = [ActorCriticPolicy.predict(x.policy, obs, deterministic=True)[0] for x in (model, loaded)]
    np.testing.assert_array_equal(*by_sb3)
    own = [x.predict(obs, deterministic=True)[0] for x in (model, loaded)]  # in closed form it rounds in another way
    np.testing.assert_allclose(own, by_sb3, atol=1e-6, rtol=0)
    if writer is reader:
        np.testing.assert_array_equal(*own)
    for ours, theirs in zip(
        model.policy.optimizer.state_dict()["state"].values(),
        loaded.policy.optimizer.state_dict()["state"].values(),
        strict=True,
    ):
        th.testing.assert_close(ours["exp_avg"], theirs["exp_avg"])
    loaded.learn(128, reset_num_timesteps=False)
    assert loaded.num_timesteps >= model.num_timesteps + 128
    assert not np.array_equal(loaded.policy.parameters_to_vector(), model.policy.parameters_to_vector())


@ALL
def test_set_parameters_and_exclude(algorithm, tmp_path):
    model, other = small(algorithm).learn(64), small(algorithm, seed=5)
    obs = th.as_tensor(observations("CartPole-v1"))
    other.set_parameters(model.get_parameters())
    th.testing.assert_close(other.policy.predict_values(obs), model.policy.predict_values(obs))
    other.learn(64)
    model.save(tmp_path / "without", exclude=["learning_rate"], include=["_logger"] if False else None)
    assert algorithm.load(tmp_path / "without", custom_objects={"gamma": 0.5}).gamma == 0.5
    with pytest.raises(ValueError, match="invalid object name"):
        other.set_parameters({"nothing": {}})


def test_adapted_quantities_are_saved_and_restored(tmp_path):
    model = small(PPO, learning_rate=3e-3, adaptive_lr=True, kl_coef=1.0, adaptive_kl_coef=True).learn(256)
    assert model.learning_rate != 3e-3
    assert model.kl_coef != 1.0
    model.save(tmp_path / "model")
    loaded = PPO.load(tmp_path / "model", env=gym.make("CartPole-v1"))
    assert (loaded.learning_rate, loaded.kl_coef) == (model.learning_rate, model.kl_coef)
    rates, used = [], loaded.learning_rate
    loaded.policy.optimizer.register_step_pre_hook(lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"]))
    loaded.learn(64)
    assert rates[0] == used
    ema = small(REINFORCE, baseline="ema").learn(64)
    ema.save(tmp_path / "ema")
    assert REINFORCE.load(tmp_path / "ema")._return_ema == ema._return_ema is not None


@ALL
@pytest.mark.parametrize("n_envs", [1, 2])
def test_the_same_seed_gives_the_same_run(algorithm, n_envs):
    def run(seed):
        env = make_vec_env("CartPole-v1", n_envs, seed=seed)
        return small(algorithm, env, seed=seed).learn(300).policy.parameters_to_vector()

    np.testing.assert_array_equal(run(3), run(3))
    assert not np.array_equal(run(3), run(4))


@ALL
def test_sb3_callbacks(algorithm, tmp_path):
    seen = []

    def own(locals_, globals_):
        seen.append(locals_["self"].num_timesteps)
        for name in ("env", "rollout_buffer", "n_steps", "actions", "new_obs", "rewards", "dones", "infos"):
            assert name in locals_
        return True

    model = small(algorithm, make_vec_env("CartPole-v1", 2))
    eval_env = make_vec_env("CartPole-v1", 1)
    best = StopTrainingOnRewardThreshold(reward_threshold=1e9)
    evaluation = EvalCallback(eval_env, best, eval_freq=50, best_model_save_path=str(tmp_path), warn=False)
    checkpoint = CheckpointCallback(100, str(tmp_path), save_vecnormalize=True)
    every = EveryNTimesteps(64, CheckpointCallback(1, str(tmp_path), "event"))
    model.learn(300, [evaluation, checkpoint, every], progress_bar=True)
    assert (tmp_path / "best_model.zip").exists()
    assert (tmp_path / "rl_model_200_steps.zip").exists()
    assert list(tmp_path.glob("event_*_steps.zip"))
    model.learn(100, own)
    assert seen == list(range(2, seen[-1] + 1, 2))
    episodes = StopTrainingOnMaxEpisodes(3)
    model.learn(10_000, episodes)
    assert model.num_timesteps < 10_000


@ALL
def test_wrappers_and_loggers(algorithm, tmp_path):
    processes = SubprocVecEnv([lambda: gym.make("Pendulum-v1")] * 2, start_method="fork")
    env = VecNormalize(VecFrameStack(VecMonitor(processes), 3))
    model = small(algorithm, env, tensorboard_log=str(tmp_path))
    model.learn(450, tb_log_name="run")
    assert list(tmp_path.glob("run_1/events*"))
    model.set_logger(configure(str(tmp_path), ["csv", "json"]))
    model.learn(450, reset_num_timesteps=False)
    assert "train/value_loss" in (tmp_path / "progress.csv").read_text()
    assert np.isfinite(evaluate_policy(model, env, 1)[0])
    assert len(model.ep_info_buffer) > 0
    env.close()


@ALL
def test_the_callers_environment_and_new_ones(algorithm):
    model = small(algorithm).learn(64)
    model.set_env(gym.make("CartPole-v1"))
    model.learn(64, reset_num_timesteps=False)
    with pytest.raises(ValueError, match="spaces do not match"):
        model.set_env(gym.make("Pendulum-v1"))


@ALL
def test_every_coefficient_may_be_a_schedule(algorithm):
    seen = {}

    def schedule(name, value):
        def present(progress_remaining):
            seen.setdefault(name, []).append(progress_remaining)
            return value * progress_remaining

        return present

    values = {"learning_rate": 1e-3, "ent_coef": 0.01}
    if algorithm is not TRPO:
        values["vf_coef"] = 0.5
    if algorithm is not PPO:
        values["target_kl"] = 0.01
    if algorithm is PPO:
        values |= {"clip_range": 0.2, "clip_range_vf": 10.0, "clip_range_high": 0.3, "kl_coef": 0.1, "target_kl": 1.0}
    schedules = {name: schedule(name, value) for name, value in values.items()}
    small(algorithm, **schedules).learn(200)
    assert seen.keys() == values.keys()
    assert min(min(progress) for progress in seen.values()) >= 0.0


@pytest.mark.parametrize("algorithm", [PPO, TRPO, REINFORCE])
@pytest.mark.parametrize(
    "frozen",
    [
        "log_std",
        "action_net",
        "value_net",
        ("mlp_extractor.policy_net", "action_net"),
        ("log_std", "mlp_extractor.policy_net", "action_net"),
    ],
    ids=str,
)
def test_frozen_parameters_stay(algorithm, frozen):
    model = algorithm("MlpPolicy", "Pendulum-v1", n_steps=64, batch_size=32, seed=0)
    frozen_ones = [p for name, p in model.policy.named_parameters() if name.startswith(frozen)]
    for p in frozen_ones:
        p.requires_grad_(False)
    before = {name: p.clone() for name, p in model.policy.named_parameters()}
    model.learn(128)
    moved = {name for name, p in model.policy.named_parameters() if not p.equal(before[name])}
    assert moved and not any(name.startswith(frozen) for name in moved)
    assert "autograd" in model.network.description


class Independent(ActorCriticPolicy):
    """Its distribution is one that torch makes of others."""

    def _get_action_dist_from_latent(self, latent_pi):
        distribution = super()._get_action_dist_from_latent(latent_pi)
        distribution.distribution = th.distributions.Independent(distribution.distribution, 0)
        return distribution


@ALL
def test_distributions_made_of_others(algorithm):
    model = algorithm(Independent, "Pendulum-v1", n_steps=64, batch_size=32, seed=0)
    before = model.policy.parameters_to_vector()
    model.learn(128)
    assert not np.array_equal(model.policy.parameters_to_vector(), before)


class OwnForward(ActorCriticPolicy):
    """Its values and log-probabilities are known while acting."""

    def forward(self, obs, deterministic=False):
        return super().forward(obs, deterministic)


@pytest.mark.parametrize("first, second", [(ActorCriticPolicy, OwnForward), (OwnForward, ActorCriticPolicy)])
def test_a_rollout_that_two_kinds_of_policies_have_acted_is_judged_whole(first, second):
    class Replacing(BaseCallback):
        def _on_step(self):
            if self.num_timesteps == 20:
                old = self.model.policy
                self.model.policy = second(old.observation_space, old.action_space, self.model.lr_schedule)
                self.model.policy.load_state_dict(old.state_dict())
            return True

    model = PPO(first, "Pendulum-v1", n_steps=64, batch_size=64, n_epochs=1, learning_rate=0.0, seed=0)
    model.learn(64, Replacing())
    buffer, policy = model.rollout_buffer, model.policy
    with th.no_grad():
        found = policy.evaluate_actions(th.as_tensor(buffer.observations[:, 0]), th.as_tensor(buffer.actions[:, 0]))
    np.testing.assert_allclose(buffer.values[:, 0], found[0].flatten(), atol=1e-5)
    np.testing.assert_allclose(buffer.log_probs[:, 0], found[1], atol=1e-5)

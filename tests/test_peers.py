"""What SB3 and sb3-contrib get wrong, and ours must not: each test also runs on the peer and must fail there."""

import csv
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import sb3_contrib
import stable_baselines3
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import RolloutBuffer as PeerBuffer
from stable_baselines3.common.logger import configure
from stable_baselines3.common.vec_env import DummyVecEnv
from tiny_models import AtRolloutEnd

from sb3_pg import PPO, REINFORCE, TRPO
from sb3_pg.common.buffers import RolloutBuffer

TINY = {"net_arch": [8]}


def ours_and_peer(ours, peer):
    """The test must pass on ours and fail on the peer's; ``strict`` makes a peer that was mended a failure too."""
    return pytest.mark.parametrize(
        "kind",
        [pytest.param(ours, id="ours"), pytest.param(peer, id="peer", marks=pytest.mark.xfail(strict=True))],
    )


class Target(gym.Env):
    """Reward for hitting a target that the observation shows; episodes of ``length`` steps."""

    def __init__(self, action_space=None, length=16, seed=0):
        self.action_space = action_space or spaces.Box(-1, 1, (6,), np.float32)
        self.observation_space = spaces.Box(-1, 1, (3,), np.float32)
        self.length, self.random = length, np.random.default_rng(seed)

    def reset(self, *, seed=None, options=None):
        self.steps = 0
        return self._observe(), {}

    def _observe(self):
        self.observation = self.random.uniform(-1, 1, 3).astype(np.float32)
        return self.observation

    def step(self, action):
        self.steps += 1
        reward = -float(np.abs(np.asarray(action, dtype=float) - self.observation[0]).mean())
        return self._observe(), reward, self.steps >= self.length, False, {}


@ours_and_peer(TRPO, sb3_contrib.TRPO)
def test_01_joint_kl_stays_in_the_trust_region(kind):
    model = kind("MlpPolicy", Target(), n_steps=256, batch_size=128, policy_kwargs=TINY, seed=0)
    joint_kl, before = [], {}

    def remember(model):
        before["obs"] = th.as_tensor(model.rollout_buffer.observations.reshape(-1, 3).copy())
        with th.no_grad():
            inner = model.policy.get_distribution(before["obs"]).distribution
        before["dist"] = th.distributions.Normal(inner.loc.clone(), inner.scale.clone())

    def compare():
        with th.no_grad():
            new = model.policy.get_distribution(before["obs"]).distribution
        joint_kl.append(th.distributions.kl_divergence(before["dist"], new).sum(1).mean().item())

    train = model.train
    model.train = lambda: (train(), compare())
    model.learn(1024, callback=AtRolloutEnd(remember))
    assert len(joint_kl) == 4
    assert 0 < max(joint_kl) <= 0.01


@ours_and_peer(PPO, stable_baselines3.PPO)
def test_03_schedules_stop_at_their_end(kind):
    seen = []

    def linear(progress_remaining):
        seen.append(progress_remaining)
        return 3e-4 * progress_remaining

    kind("MlpPolicy", Target(), linear, n_steps=64, clip_range=lambda p: 0.01 + p, policy_kwargs=TINY).learn(100)
    assert min(seen) == 0.0


@ours_and_peer(PPO, stable_baselines3.PPO)
def test_04_integer_box_actions_are_not_truncated(kind):
    env = Target(spaces.Box(-10, 10, (2,), np.int64))
    model = kind("MlpPolicy", env, n_steps=64, policy_kwargs=TINY, seed=0)
    ratios = []

    def first_ratio(model):
        batch = next(model.rollout_buffer.get(64))
        _, log_prob, _ = model.policy.evaluate_actions(batch.observations, batch.actions)
        ratios.append((log_prob - batch.old_log_prob).exp().detach().numpy())

    model.learn(64, callback=AtRolloutEnd(first_ratio))
    np.testing.assert_allclose(ratios[0], 1.0, atol=1e-4)


@pytest.mark.parametrize("algorithm", [PPO, TRPO, REINFORCE])
def test_05_stopping_in_a_callback_loses_no_step(algorithm):
    check_stop_and_go(algorithm, {} if algorithm is REINFORCE else {"n_steps": 64})


@pytest.mark.xfail(strict=True)
def test_05_fails_on_the_peer():
    check_stop_and_go(stable_baselines3.PPO, {"n_steps": 64})


def check_stop_and_go(algorithm, kwargs):
    env = Target()
    model = algorithm("MlpPolicy", env, policy_kwargs=TINY, seed=0, **kwargs)
    model.learn(1000, callback=lambda locals_, _: model.num_timesteps < 40)
    assert model.num_timesteps == 40
    np.testing.assert_array_equal(model._last_obs[0], env.observation)
    buffer = model.rollout_buffer
    assert buffer.pos == 40  # the unfinished rollout waits to be completed
    first = buffer.observations[:40].copy()
    completed = []
    keep = AtRolloutEnd(lambda m: completed.append(m.rollout_buffer.observations[:40].copy()))
    model.learn(64, reset_num_timesteps=False, callback=keep)
    np.testing.assert_array_equal(completed[0], first)


@ours_and_peer(PPO, stable_baselines3.PPO)
def test_06_the_last_update_is_logged(kind, tmp_path: Path):
    model = kind("MlpPolicy", Target(), n_steps=64, n_epochs=3, policy_kwargs=TINY)
    model.set_logger(configure(str(tmp_path), ["csv"]))
    model.learn(128)
    with (tmp_path / "progress.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert rows[-1]["train/n_updates"] == "6"


@ours_and_peer(PPO, stable_baselines3.PPO)
def test_07_early_stopping_undoes_the_step_that_overshot(kind):
    model = kind(
        "MlpPolicy", Target(), 3e-2, n_steps=256, batch_size=64, target_kl=0.01, policy_kwargs=TINY, seed=0, n_epochs=4
    )
    steps = count_steps(model.policy.optimizer)
    model.learn(256)
    data = next(model.rollout_buffer.get(256))
    _, log_prob, _ = model.policy.evaluate_actions(data.observations, data.actions)
    log_ratio = (log_prob - data.old_log_prob).detach()
    # Stopped on minibatches, so the whole rollout's KL is near the limit rather than exactly below it.
    assert (log_ratio.exp() - 1 - log_ratio).mean() < 2.5 * 0.01
    assert len(steps) == 4 * 4, "the critic finishes its epochs"


def count_steps(optimizer):
    steps = []
    optimizer.register_step_post_hook(lambda *_: steps.append(1))
    return steps


def test_07_approx_kl_is_the_mean_over_all_epochs():
    model = PPO("MlpPolicy", Target(), 1e-2, n_steps=128, batch_size=128, n_epochs=5, policy_kwargs=TINY, seed=0)
    evaluated = []
    evaluate = model.network.evaluate

    def spy(batch):
        evaluation = evaluate(batch)
        evaluated.append((batch.observations, evaluation.log_prob))
        return evaluation

    model.network.evaluate = spy
    model.learn(128)
    buffer = model.rollout_buffer
    kls = []
    for observations, log_prob in evaluated:
        rows = [int(np.flatnonzero((buffer.observations[:, 0] == o).all(1))[0]) for o in np.asarray(observations)]
        log_ratio = np.asarray(log_prob) - buffer.log_probs[rows, 0]
        kls.append((np.exp(log_ratio) - 1 - log_ratio).mean())
    assert kls[0] < 1e-6 < kls[-1]
    assert model.logger.name_to_value["train/approx_kl"] == pytest.approx(np.mean(kls), rel=1e-3)


@ours_and_peer(RolloutBuffer, PeerBuffer)
def test_09_get_leaves_no_array_in_another_order(kind):
    n_steps, n_envs = 3, 2
    buffer = kind(n_steps, spaces.Box(-9, 9, (1,)), spaces.Discrete(2), device="cpu", n_envs=n_envs)
    for step in range(n_steps):
        number = np.array([10.0 * step, 10.0 * step + 1])
        zero = th.zeros(n_envs)
        buffer.add(number[:, None], np.zeros((n_envs, 1)), number, np.zeros(n_envs), zero, zero)
    list(buffer.get(2))
    np.testing.assert_array_equal(buffer.rewards.flatten(), buffer.observations.flatten())


def test_10_every_environment_gives_the_same_number_of_whole_episodes():
    lengths = (3, 12, 5)
    env = DummyVecEnv([lambda n=n: Target(length=n) for n in lengths])
    model = REINFORCE("MlpPolicy", env, n_episodes=6, policy_kwargs=TINY)
    used = []
    model.learn(200, callback=AtRolloutEnd(lambda m: used.append(m.horizon.keep(m.rollout))))
    assert used
    for keep in used:
        np.testing.assert_array_equal(keep.sum(axis=0), [2 * n for n in lengths])


@pytest.mark.parametrize(
    "algorithm, arguments",
    [
        (REINFORCE, {"use_rms_prop": True}),
        (PPO, {}),
        (TRPO, {}),
        pytest.param(stable_baselines3.A2C, {}, marks=pytest.mark.xfail(strict=True)),
    ],
)
def test_11_policy_kwargs_are_the_callers(algorithm, arguments):
    policy_kwargs = {"net_arch": [8], "normalize_images": False, "features_extractor_kwargs": {}}
    algorithm("MlpPolicy", "CartPole-v1", policy_kwargs=policy_kwargs, **arguments)
    assert policy_kwargs == {"net_arch": [8], "normalize_images": False, "features_extractor_kwargs": {}}


@ours_and_peer(PPO, stable_baselines3.PPO)
def test_12_a_bad_gradient_does_not_reach_the_policy(kind):
    options = {"engine": "autograd"} if kind is PPO else {}
    model = kind("MlpPolicy", Target(), n_steps=64, policy_kwargs=TINY, **options)
    model.policy.action_net.weight.register_hook(lambda gradient: gradient * float("nan"))
    if kind is PPO:
        with pytest.raises(ValueError, match=r"gradient of action_net\.weight is not finite.*environment 0 at step"):
            model.learn(64)
    else:
        model.learn(64)
    assert all(p.isfinite().all() for p in model.policy.parameters())

"""The base algorithm: what happens between acting, judging and stepping."""

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.policies import ActorCriticPolicy

from sb3_pg import PPO, REINFORCE, TRPO
from sb3_pg.common.errors import ArgumentError, NonFiniteError
from sb3_pg.common.vec_env import DummyVecEnv


class Cut(gym.Env):
    """Episodes that end after so many steps, by a time limit or not; rewards are the number of the step."""

    observation_space = spaces.Box(-1.0, 1.0, (3,))
    action_space = spaces.Discrete(4, start=-2)

    def __init__(self, length=5, reward=None):
        self.length, self.reward = length, reward

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return self.np_random.uniform(-1, 1, 3).astype(np.float32), {}

    def step(self, action):
        assert self.action_space.contains(action), action
        self.t += 1
        reward = float(self.t) if self.reward is None else self.reward
        observation = self.np_random.uniform(-1, 1, 3).astype(np.float32)
        return observation, reward, False, self.t == self.length, {}


def envs(**options):
    return DummyVecEnv([lambda: Cut(5, **options), lambda: Cut(7, **options)])


SETTINGS = {
    "ppo": (PPO, {"n_steps": 16, "batch_size": 8, "n_epochs": 1}),
    "trpo": (TRPO, {"n_steps": 16, "batch_size": 8}),
    "reinforce": (REINFORCE, {"n_episodes": 4}),
}


def make(name, env=None, policy="MlpPolicy", **arguments):
    kind, settings = SETTINGS[name]
    return kind(policy, env or envs(), seed=0, **{**settings, **arguments})


ALGORITHMS = pytest.mark.parametrize("name", SETTINGS)


COLUMNS = ("rewards", "values", "log_probs", "advantages", "returns")


@ALGORITHMS
@pytest.mark.parametrize("baseline", ["value", "ema", "leave_one_out"])
def test_to_judge_again_changes_nothing(name, baseline):
    """Neither the rewards, which judging completes where a time limit cuts, nor the moving average."""

    class Twice(BaseCallback):
        def _on_step(self):
            return True

        def columns(self):
            return [getattr(self.model.rollout_buffer, x)[: self.model.rollout.n_steps].copy() for x in COLUMNS]

        def _on_rollout_end(self):
            assert self.model.rollout.cuts
            before, average = self.columns(), self.model._return_ema
            self.model.judge(self.model.rollout)
            for x, y in zip(self.columns(), before, strict=True):
                np.testing.assert_array_equal(x, y)
            assert self.model._return_ema == average
            self.n_judged = getattr(self, "n_judged", 0) + 1

    callback = Twice()
    make(name, baseline=baseline).learn(80, callback)
    assert callback.n_judged > 1


def test_judging_again_sees_rewards_that_were_changed():
    model = make("ppo", learning_rate=0.0, gae_lambda=1.0, gamma=0.9)
    model.learn(32)
    rollout, buffer = model.rollout, model.rollout_buffer
    cut = rollout.cuts[0]
    completed = buffer.rewards[cut.step, cut.env]
    buffer.rewards[0] += 100.0
    advantages = buffer.advantages[:16].copy()
    model.judge(rollout)
    assert buffer.rewards[cut.step, cut.env] == pytest.approx(completed)
    np.testing.assert_allclose(buffer.advantages[0] - advantages[0], 100.0, rtol=1e-4)
    np.testing.assert_allclose(buffer.advantages[1:16], advantages[1:], atol=1e-4)


class Other(ActorCriticPolicy):
    """Computed by autograd."""


@ALGORITHMS
@pytest.mark.parametrize("kinds", [("MlpPolicy", ActorCriticPolicy), ("MlpPolicy", Other), (Other, ActorCriticPolicy)])
def test_actions_are_judged_by_the_policy_that_chose_them(name, kinds):
    """Also if a callback replaces it within the rollout."""
    first, second = kinds
    policies = []

    class Replacing(BaseCallback):
        def _on_step(self):
            if self.n_calls == 6:
                old = self.model.policy
                new = second(old.observation_space, old.action_space, self.model.lr_schedule)
                policies.extend([old, new])
                self.model.policy = new
            return True

        def _on_rollout_end(self):
            n = self.model.rollout.n_steps
            self.columns = [getattr(self.model.rollout_buffer, x)[:n].copy() for x in columns]

    columns = ("observations", "actions", "values", "log_probs")
    model, callback = make(name, policy=first, learning_rate=0.0), Replacing()
    model.learn(1, callback)
    observations, actions, values, log_probs = callback.columns
    for policy, steps in zip(policies, (slice(6), slice(6, None)), strict=True):
        x = th.as_tensor(observations[steps].reshape(-1, 3))
        with th.no_grad():
            v, log_prob, _ = ActorCriticPolicy.evaluate_actions(policy, x, th.as_tensor(actions[steps].reshape(-1)))
        np.testing.assert_allclose(values[steps].ravel(), v.ravel(), atol=1e-5)
        if name != "trpo" or policy is policies[0]:
            np.testing.assert_allclose(log_probs[steps].ravel(), log_prob, atol=1e-5)


@ALGORITHMS
@pytest.mark.parametrize("how", ["data", "share_memory"])
def test_parameters_may_move_to_other_memory(name, how):
    """By a callback: the next action is chosen by what is there."""

    class Moving(BaseCallback):
        def _on_step(self):
            if self.n_calls == 6:
                policy = self.model.policy
                if how == "share_memory":
                    policy.share_memory()
                for p in policy.action_net.parameters():
                    numbers = th.zeros_like(p)
                    if p.ndim == 1:
                        numbers[2] = 100.0
                    if how == "data":
                        p.data = numbers
                    else:
                        p.data.copy_(numbers)
            elif self.n_calls > 6:
                assert (self.locals["actions"] == 2).all()
            return True

    model = make(name, learning_rate=0.0)
    model.learn(1, Moving())
    assert model.network.description == "closed-form"


def test_archives_name_sb3s_policy_whatever_was_given(tmp_path):
    first = make("ppo")
    PPO(type(first.policy), envs()).save(tmp_path / "model")
    assert PPO.load(tmp_path / "model").policy_class is ActorCriticPolicy


class StopAt(BaseCallback):
    """Stops after so many calls, after something was done."""

    def __init__(self, n_calls, first=lambda model: None):
        super().__init__()
        self.last, self.first = n_calls, first

    def _on_step(self):
        if self.n_calls == self.last:
            self.first(self.model)
            return False
        return True


@ALGORITHMS
def test_parameters_set_by_a_callback_that_stops_forget_the_rollout(name):
    def replace_parameters(model):
        parameters = model.get_parameters()
        model.set_parameters({**parameters, "policy": {k: v * 0.5 for k, v in parameters["policy"].items()}})

    model, seen = make(name), []
    model.learn(64, StopAt(6, replace_parameters))

    class Lengths(BaseCallback):
        def _on_step(self):
            return True

        def _on_rollout_start(self):
            seen.append(self.model.rollout_buffer.pos)

    model.learn(1, Lengths(), reset_num_timesteps=False)
    assert seen[0] == 0


@ALGORITHMS
def test_a_stopped_rollout_goes_on(name):
    model = make(name)
    model.learn(64, StopAt(6))
    observations = model.rollout_buffer.observations[:6].copy()
    model.learn(1, reset_num_timesteps=False)
    np.testing.assert_array_equal(model.rollout_buffer.observations[:6], observations)
    assert model.rollout.n_steps > 6


@ALGORITHMS
def test_a_rollout_that_could_not_be_judged_is_not_learned_from(name):
    class Spoiling(BaseCallback):
        def _on_step(self):
            self.model.rollout_buffer.rewards[self.model.rollout_buffer.pos - 1, 0] = np.nan
            return True

    model = make(name)
    model.learn(40)
    parameters = model.policy.parameters_to_vector()
    with pytest.raises(NonFiniteError, match="reward of environment 0"):
        model.learn(40, Spoiling())
    with pytest.raises(ArgumentError, match="no complete rollout"):
        model.train()
    np.testing.assert_array_equal(model.policy.parameters_to_vector(), parameters)
    model.learn(40, reset_num_timesteps=False)
    model.train()


@ALGORITHMS
def test_the_engine_may_be_changed_later(name):
    model = make(name)
    model.learn(40)
    assert model.network.description == "closed-form"
    model.engine = "autograd"
    model.learn(40)
    assert model.network.description.startswith("autograd")
    model.engine = "auto"
    model.learn(40)
    assert model.network.description == "closed-form"


@ALGORITHMS
@pytest.mark.parametrize("engine", ["auto", "autograd"])
def test_single_actions_are_arrays_as_sb3s(name, engine):
    model = make(name, engine=engine)
    action, _ = model.predict(np.zeros(3, np.float32), deterministic=True)
    assert type(action) is np.ndarray
    assert action.shape == ()
    assert model.action_space.contains(action.item())
    actions, _ = model.predict(np.zeros((5, 3), np.float32), deterministic=True)
    np.testing.assert_array_equal(actions, np.full(5, action))

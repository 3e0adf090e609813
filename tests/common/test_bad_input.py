"""Bad input gets an error that names the argument, its value and what to do; nothing learned is lost."""

import re

import gymnasium as gym
import numpy as np
import pytest
import sb3_contrib
import stable_baselines3
from gymnasium import spaces
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_pg import PPO, REINFORCE, TRPO
from sb3_pg.common.archive.container import ArchiveError
from sb3_pg.common.errors import ArgumentError, NonFiniteError

ALL = pytest.mark.parametrize("algorithm", [PPO, TRPO, REINFORCE])
TINY = {"net_arch": [8]}


class Faulty(gym.Env):
    """Gives ``bad`` observations or rewards from step ``at`` on; episodes of ``length`` steps."""

    def __init__(self, bad=None, value=np.nan, at=5, length=8, strict=False):
        self.observation_space = spaces.Box(-np.inf, np.inf, (3,), np.float32)
        self.action_space = spaces.Box(-1, 1, (2,), np.float32)
        self.bad, self.value, self.at, self.length, self.strict = bad, value, at, length, strict
        self.total = 0

    def reset(self, *, seed=None, options=None):
        self.steps = 0
        return np.zeros(3, np.float32), {}

    def step(self, action):
        if self.strict and not np.isfinite(action).all():
            raise RuntimeError("the simulation exploded")
        self.steps, self.total = self.steps + 1, self.total + 1
        wrong = self.total == self.at + 1
        observation = np.full(3, self.value if wrong and self.bad == "observation" else 0.1, np.float32)
        reward = self.value if wrong and self.bad == "reward" else 1.0
        return observation, reward, self.steps == self.length, False, {}


@ALL
@pytest.mark.parametrize(
    "name, value",
    [
        ("learning_rate", -1e-3),
        ("learning_rate", float("nan")),
        ("gamma", 1.5),
        ("gamma", "0.9"),
        ("gae_lambda", -0.1),
        ("ent_coef", float("inf")),
        ("ent_coef", -0.01),
        ("ent_coef", "high"),
        ("n_steps", 0),
        ("engine", "jax"),
    ],
)
def test_wrong_coefficients_name_themselves(algorithm, name, value):
    with pytest.raises(ArgumentError, match=rf"`{name}` must be .*not {value!r}"):
        algorithm("MlpPolicy", Faulty(), **{name: value})


@ALL
@pytest.mark.parametrize("name", ["gamma", "gae_lambda"])
def test_a_schedule_where_none_is_taken(algorithm, name):
    with pytest.raises(ArgumentError, match=rf"`{name}` must be a number, not <function"):
        algorithm("MlpPolicy", Faulty(), **{name: lambda progress_remaining: 0.9})


@pytest.mark.parametrize(
    "algorithm, arguments, message",
    [
        (PPO, {"batch_size": 1}, "`batch_size` must be greater than 1"),
        (PPO, {"n_steps": 1, "batch_size": 2}, r"`n_steps \* n_envs` must be greater than 1"),
        (PPO, {"clip_range": 0}, "`clip_range` must be"),
        (PPO, {"clip_range_vf": -0.2}, "`clip_range_vf` must be"),
        (PPO, {"dual_clip": 1.0}, "`dual_clip` must be"),
        (PPO, {"objective": "cilp"}, "`objective` must be one of 'clip', 'spo', 'surrogate', not 'cilp'"),
        (PPO, {"objective": "spo", "dual_clip": 3.0}, "belong to objective='clip', not 'spo'"),
        (PPO, {"adaptive_lr": True, "learning_rate": lambda p: 1e-3 * p}, "contradict each other"),
        (PPO, {"adaptive_kl_coef": True}, "needs a number above 0"),
        (PPO, {"normalize_advantage": "always"}, "`normalize_advantage` must be one of"),
        (PPO, {"target_kl": 0.0}, "`target_kl` must be"),
        (TRPO, {"target_kl": 0.0}, "`target_kl` must be"),
        (REINFORCE, {"target_kl": 0.0}, "`target_kl` must be"),
        (TRPO, {"n_steps": 1}, r"`n_steps \* n_envs` must be greater than 1"),
        (TRPO, {"line_search_shrinking_factor": 1.0}, "must be below 1"),
        (TRPO, {"cg_damping": float("nan")}, "`cg_damping` must be"),
        (TRPO, {"sub_sampling_factor": 0}, "`sub_sampling_factor` must be"),
        (REINFORCE, {"n_episodes": 0}, "`n_episodes` must be"),
        (
            REINFORCE,
            {"baseline": "mean"},
            "`baseline` must be one of 'value', 'leave_one_out', 'leave_one_out_same_start', 'group', 'ema', None",
        ),
        (REINFORCE, {"baseline": "ema", "gae_lambda": 0.9}, "needs the value network"),
        (REINFORCE, {"baseline": None, "n_steps": 8}, "needs the value network"),
        (REINFORCE, {"ema_decay": 1.0}, "`ema_decay` must be below 1"),
    ],
)
def test_options_that_cannot_work(algorithm, arguments, message):
    with pytest.raises(ArgumentError, match=message):
        algorithm("MlpPolicy", Faulty(), **arguments)


@ALL
def test_unknown_argument_and_policy(algorithm):
    with pytest.raises(TypeError, match="n_step"):
        algorithm("MlpPolicy", Faulty(), n_step=3)
    with pytest.raises(ValueError, match="MlpPolcy"):
        algorithm("MlpPolcy", Faulty())


@ALL
def test_unsupported_action_space(algorithm):
    env = Faulty()
    env.action_space = spaces.Tuple([spaces.Discrete(2), spaces.Discrete(3)])
    with pytest.raises(AssertionError, match="Tuple"):
        algorithm("MlpPolicy", env)


@pytest.mark.parametrize("name", ["ent_coef", "learning_rate", "clip_range"])
def test_a_schedule_that_turns_negative_is_named(name):
    schedule = {name: lambda progress_remaining: progress_remaining - 0.9}
    model = PPO("MlpPolicy", Faulty(), n_steps=8, batch_size=8, policy_kwargs=TINY, **schedule)
    with pytest.raises(ArgumentError, match=rf"schedule of `{name}` gave -0\.\d+ at progress_remaining=0\.5"):
        model.learn(16)


@ALL
def test_learning_without_an_environment(algorithm, tmp_path):
    algorithm("MlpPolicy", "CartPole-v1").save(tmp_path / "model")
    with pytest.raises(ArgumentError, match="no environment"):
        algorithm.load(tmp_path / "model").learn(10)


@ALL
@pytest.mark.parametrize("bad", ["observation", "reward"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_non_finite_numbers_are_named_and_nothing_is_lost(algorithm, bad, value, tmp_path):
    env = DummyVecEnv([Faulty, lambda: Faulty(bad, value, at=20)])
    kwargs = {"n_episodes": 4} if algorithm is REINFORCE else {"n_steps": 16, "batch_size": 16}
    model = algorithm("MlpPolicy", env, policy_kwargs=TINY, seed=0, **kwargs)
    good = {}

    def remember(*_):
        if model.num_timesteps == 34:  # the second rollout has begun
            good.update({k: v.clone() for k, v in model.policy.state_dict().items()})
        return True

    # Step 20 of environment 1 is step 4 of the second rollout; its observation is seen one step later.
    step = 5 if bad == "observation" else 4
    with pytest.raises(NonFiniteError, match=rf"The {bad} of environment 1 at step {step} of this rollout"):
        model.learn(1000, callback=remember)
    assert model.num_timesteps > 32
    for name, parameter in model.policy.state_dict().items():
        assert parameter.equal(good[name])
    model.save(tmp_path / "model")
    model.learn(64)  # the fault was a passing one: learning can go on
    algorithm.load(tmp_path / "model", env=env).learn(64)


def test_an_environment_that_fails_on_a_non_finite_action():
    model = PPO("MlpPolicy", Faulty("observation", strict=True), n_steps=64, policy_kwargs=TINY)
    with pytest.raises(NonFiniteError, match="observation of environment 0 at step 6"):
        model.learn(64)


@pytest.mark.parametrize("algorithm, arguments", [(TRPO, {}), (REINFORCE, {"n_critic_updates": 1, "vf_coef": 0.0})])
def test_a_critic_whose_gradient_overflows(algorithm, arguments):
    env = DummyVecEnv([lambda: Faulty(length=8), lambda: Faulty("reward", 1e30, at=5, length=8)])
    model = algorithm("MlpPolicy", env, n_steps=8, policy_kwargs=TINY, **arguments)
    with pytest.raises(NonFiniteError, match=r"is not finite \(norm inf\).* of this rollout"):
        model.learn(16)
    assert all(p.isfinite().all() for p in model.policy.parameters())


def test_an_environments_own_error_is_not_covered_up():
    env = Faulty()
    env.step = lambda action: 1 / 0
    with pytest.raises(ZeroDivisionError):
        PPO("MlpPolicy", env, policy_kwargs=TINY).learn(64)


def test_environments_that_never_end():
    endless = Faulty(length=-1)
    model = REINFORCE("MlpPolicy", endless, max_episode_steps=1500, policy_kwargs=TINY)
    with pytest.raises(
        ArgumentError, match=r"Environment 0 has not ended its episode in 1501 steps.*TimeLimit.*n_steps"
    ):
        model.learn(5000)
    REINFORCE("MlpPolicy", endless, n_steps=32, policy_kwargs=TINY).learn(64)


@pytest.mark.parametrize(
    "archive, loader, message",
    [
        (lambda: TRPO("MlpPolicy", "CartPole-v1"), PPO, r"archive of TRPO, but PPO\.load"),
        (lambda: PPO("MlpPolicy", "CartPole-v1"), TRPO, r"archive of PPO, but TRPO\.load"),
        (lambda: REINFORCE("MlpPolicy", "CartPole-v1"), PPO, r"archive of REINFORCE, but PPO\.load"),
        (lambda: stable_baselines3.A2C("MlpPolicy", "CartPole-v1"), PPO, r"archive of A2C, but PPO\.load"),
        (lambda: stable_baselines3.DQN("MlpPolicy", "CartPole-v1"), PPO, r"archive of DQN, but PPO\.load"),
        (lambda: stable_baselines3.SAC("MlpPolicy", "Pendulum-v1"), TRPO, r"archive of SAC, but TRPO\.load"),
        (lambda: stable_baselines3.TD3("MlpPolicy", "Pendulum-v1"), PPO, r"archive of TD3 or DDPG, but PPO\.load"),
        (lambda: sb3_contrib.TQC("MlpPolicy", "Pendulum-v1"), PPO, r"archive of TQC, but PPO\.load"),
        (lambda: sb3_contrib.CrossQ("MlpPolicy", "Pendulum-v1"), PPO, r"archive of CrossQ, but PPO\.load"),
        (lambda: sb3_contrib.QRDQN("MlpPolicy", "CartPole-v1"), PPO, r"archive of QRDQN, but PPO\.load"),
        (lambda: sb3_contrib.ARS("LinearPolicy", "CartPole-v1"), REINFORCE, r"archive of ARS, but REINFORCE\.load"),
        (lambda: sb3_contrib.TRPO("MlpPolicy", "CartPole-v1"), REINFORCE, r"archive of TRPO, but REINFORCE\.load"),
    ],
)
def test_archives_of_another_algorithm(archive, loader, message, tmp_path):
    archive().save(tmp_path / "model")
    with pytest.raises(ArgumentError, match=message):
        loader.load(tmp_path / "model")


def test_archives_of_another_space(tmp_path):
    PPO("MlpPolicy", "CartPole-v1").save(tmp_path / "model")
    with pytest.raises(ValueError, match=r"Observation spaces do not match: Box.*!= Box"):
        PPO.load(tmp_path / "model", env=gym.make("Pendulum-v1"))
    with pytest.raises(ValueError, match="wasn't a zip-file"):
        (tmp_path / "broken.zip").write_text("not an archive")
        PPO.load(tmp_path / "broken.zip")


@pytest.mark.parametrize(
    ("answer", "what"),
    [
        (lambda obs, returns: 0.0, "float of shape (), 0 of them not finite"),
        (lambda obs, returns: returns * np.nan, "ndarray of shape (16,), 16 of them not finite"),
        (lambda obs, returns: [[1.0], [1.0, 2.0]], "list that is no array of numbers"),
    ],
)
def test_a_baseline_of_the_users_that_answers_wrongly(answer, what):
    model = REINFORCE("MlpPolicy", Faulty(), baseline=answer, n_episodes=2, policy_kwargs=TINY)
    wanted = "`baseline` must return one finite number for each of the 16 samples"
    with pytest.raises(ArgumentError, match=re.escape(f"{wanted}, but gave a {what}")):
        model.learn(16)


def test_a_bad_last_observation_names_its_environment():
    class BadEnd(Faulty):
        def step(self, action):
            observation, reward, *_ = super().step(action)
            return (
                np.full(3, np.nan, np.float32) if self.steps == 8 else observation,
                reward,
                False,
                self.steps == 8,
                {},
            )

    env = DummyVecEnv([lambda: Faulty(length=8), BadEnd, lambda: Faulty(length=8)])
    model = PPO("MlpPolicy", env, n_steps=16, batch_size=16, policy_kwargs=TINY)
    with pytest.raises(NonFiniteError, match="value of the terminal observation of environment 1 at step 7"):
        model.learn(48)


@pytest.mark.parametrize(
    ("env", "message"),
    [
        (object(), "`env` must be an environment of gymnasium, a VecEnv, or the id .* not a object"),
        (gym.Env, r"`env` is the class Env: pass an environment, Env\(\.\.\.\)"),
        (["CartPole-v1"], "not a list"),
    ],
)
def test_what_is_no_environment(env, message):
    with pytest.raises(ArgumentError, match=message):
        PPO("MlpPolicy", env)
    with pytest.raises(ArgumentError, match=message):
        PPO("MlpPolicy", "CartPole-v1").set_env(env)


def test_a_folder_in_place_of_a_file(tmp_path):
    for load in (PPO.load, PPO("MlpPolicy", "CartPole-v1").policy.load):
        with pytest.raises(ArchiveError, match=f"{tmp_path} is a folder.*pass the file that `save` wrote"):
            load(tmp_path)

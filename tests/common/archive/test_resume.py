"""Learning that goes on from an archive is what it would have been without the break, bit for bit."""

import enum
import functools
import json
import os
import subprocess
import sys
import threading
from collections import OrderedDict, deque
from dataclasses import dataclass, field
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from conftest import FakeEnv, make_envs, policy_for
from gymnasium import spaces, wrappers
from stable_baselines3.common import vec_env as sb3
from stable_baselines3.common.callbacks import BaseCallback, CheckpointCallback
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.utils import LinearSchedule
from text_models import config_of, letters_task
from tiny_models import ALL, tiny, weights

from sb3_pg import PPO, REINFORCE, TRPO
from sb3_pg.common.archive.plain import LARGEST_ARRAY, LARGEST_STATE, UnstorableError, Writer, plain, value
from sb3_pg.common.archive.settings import settings_of
from sb3_pg.common.archive.simulations import go_on, prepare_reset, state_of
from sb3_pg.common.vec_env import DummyVecEnv, VecNormalize

TOTAL = 160


class Saving(BaseCallback):
    """Saves once, at a step, a rollout's start or end; or stops at the step."""

    def __init__(self, path, where="step", at=11):
        super().__init__()
        self.path, self.where, self.at, self.n_rollouts = path, where, at, 0

    def _save_if(self, now):
        if now:
            self.model.save(self.path)

    def _on_step(self):
        now = self.n_calls == self.at
        self._save_if(now and self.where == "step")
        return not (now and self.where == "stop")

    def _on_rollout_start(self):
        self.n_rollouts += 1
        self._save_if(self.where == "start" and self.n_rollouts == 2)

    def _on_rollout_end(self):
        self._save_if(self.where == "end" and self.n_rollouts == 2)


def numbers(model):
    """Parameters, optimizer, statistics, steps and episodes of a model as one vector."""
    state = model.policy.optimizer.state_dict()
    moments = [x for its in state["state"].values() for x in its.values()]
    found = [weights(model), [model.num_timesteps, model._n_updates, state["param_groups"][0]["lr"]]]
    found += [x.numpy().ravel() for x in moments if isinstance(x, th.Tensor)]
    found += [[episode["r"], episode["l"]] for episode in model.ep_info_buffer]
    normalize = model.get_vec_normalize_env()
    if normalize is not None:
        its = normalize.obs_rms.values() if isinstance(normalize.obs_rms, dict) else [normalize.obs_rms]
        found += [np.append(rms.mean, rms.var) for rms in (*its, normalize.ret_rms)] + [normalize.returns]
    return np.concatenate([np.asarray(x, np.float64).ravel() for x in found])


def spoil_generators():
    np.random.seed(987)
    th.manual_seed(987)


def go_on_with(model, total=TOTAL):
    return model.learn(max(total - model.num_timesteps, 0), reset_num_timesteps=False)


def run(algorithm, make_env, path, where="step", total=TOTAL, reset=False, at=11, **options):
    """Return the numbers of the uninterrupted run, and those of one that goes on from an archive."""
    model = tiny(algorithm, make_env(0), **options)
    if where == "between":
        model.learn(total // 2).save(path)
    else:
        model.learn(total, callback=Saving(path, where, at))
        if where == "stop":
            model.save(path)
    if reset:
        model.set_env(model.get_env())
    whole = numbers(go_on_with(model, total))
    spoil_generators()
    resumed = algorithm.load(path, env=make_env(1000), device="cpu")
    return whole, numbers(go_on_with(resumed, total))


def check(*arguments, **options):
    whole, resumed = run(*arguments, **options)
    np.testing.assert_array_equal(whole, resumed)


def of(env_id, wrapper=lambda env: env, vec_wrapper=lambda env: env, n_envs=2):
    """A function from a seed to environments."""

    def make(seed):
        single = gym.make if isinstance(env_id, str) else (lambda kind: kind())
        env = DummyVecEnv([lambda: Monitor(wrapper(single(env_id)))] * n_envs)
        env.seed(seed)
        return vec_wrapper(env)

    return make


CARTPOLE, PENDULUM = of("CartPole-v1"), of("Pendulum-v1", vec_wrapper=VecNormalize)
WHERE = pytest.mark.parametrize("where", ["between", "step", "start", "end", "stop"])


# ------------------------------------------------- algorithms, engines, policies


@ALL
@WHERE
def test_a_resumed_run_is_the_uninterrupted_one(algorithm, where, tmp_path):
    options = {"n_episodes": 2} if algorithm is REINFORCE else {}
    check(algorithm, CARTPOLE, tmp_path / "model.zip", where, **options)


@ALL
@pytest.mark.parametrize("where", ["between", "step", "end"])
def test_autograd(algorithm, where, tmp_path):
    check(algorithm, CARTPOLE, tmp_path / "model.zip", where, engine="autograd")


@pytest.mark.parametrize("algorithm", [PPO, TRPO])
@pytest.mark.parametrize("where", ["between", "step", "start", "end"])
def test_normalised_environments_need_no_file_of_statistics(algorithm, where, tmp_path):
    check(algorithm, PENDULUM, tmp_path / "model.zip", where)


def test_episodes_that_begin_with_the_next_step(tmp_path):
    pytest.importorskip("sb3_contrib")
    short = of(lambda: FakeEnv(action_space=spaces.Discrete(2), lengths=(1, -1)))
    check(PPO, short, tmp_path / "model.zip", "between", policy="MlpLstmPolicy", policy_kwargs={"lstm_hidden_size": 4})


@pytest.mark.parametrize("policy", ["MlpLstmPolicy", "MlpGruPolicy"])
@pytest.mark.parametrize(("algorithm", "where"), [(PPO, "between"), (PPO, "step"), (TRPO, "end"), (REINFORCE, "step")])
def test_memory(policy, algorithm, where, tmp_path):
    pytest.importorskip("sb3_contrib")
    check(algorithm, CARTPOLE, tmp_path / "model.zip", where, policy=policy, policy_kwargs={"lstm_hidden_size": 4})


@pytest.mark.parametrize(("algorithm", "where"), [(PPO, "step"), (TRPO, "start"), (PPO, "stop")])
@pytest.mark.parametrize("sample_freq", [-1, 4])
def test_gsde_noise(algorithm, where, sample_freq, tmp_path):
    check(algorithm, PENDULUM, tmp_path / "model.zip", where, use_sde=True, sde_sample_freq=sample_freq)


class Masked(FakeEnv):
    def action_masks(self):
        return np.array([True, self.steps % 2 == 0, self.steps % 2 == 1])

    def __init__(self):
        super().__init__(action_space=spaces.Discrete(3))


@pytest.mark.parametrize("where", ["between", "step", "end"])
@ALL
def test_masks(algorithm, where, tmp_path):
    check(algorithm, of(Masked), tmp_path / "model.zip", where)


@pytest.mark.parametrize("observation", ["dict", "discrete"])
@pytest.mark.parametrize("action", ["multidiscrete", "multibinary"])
def test_spaces_with_generators_of_their_own(observation, action, tmp_path):
    policy = policy_for(make_envs(observation).observation_space)
    check(PPO, lambda seed: make_envs(observation, action, 2, seed), tmp_path / "model.zip", policy=policy, total=64)


@pytest.mark.parametrize("where", ["between", "step"])
@pytest.mark.parametrize(
    "options",
    [
        {"adaptive_lr": True},
        {"kl_coef": 0.1, "adaptive_kl_coef": True},
        {"learning_rate": LinearSchedule(1e-2, 1e-3, 1.0), "ent_coef": LinearSchedule(0.1, 0.0, 1.0)},
        {"n_episodes": 4, "baseline": "ema"},
        {"n_episodes": 4, "baseline": "leave_one_out"},
        {"target_kl": 1e-3},
    ],
)
def test_what_adapts(options, where, tmp_path):
    check(PPO, CARTPOLE, tmp_path / "model.zip", where, **options)


@pytest.mark.parametrize("shape", ["gpt2", "t5"])
@pytest.mark.parametrize(("algorithm", "where"), [(PPO, "between"), (PPO, "step"), (REINFORCE, "end")])
def test_text_with_an_adapted_weight_of_the_reference(shape, algorithm, where, tmp_path):
    pytest.importorskip("transformers")
    from sb3_pg.text import TextVecEnv

    task = letters_task()
    name = "Seq2SeqLMPolicy" if shape == "t5" else "CausalLMPolicy"
    kwargs = {
        "model": config_of(shape, task),
        "reference_kl_coef": 0.5,
        "reference_kl_target": 1e-3,
    }

    def make_env(seed):
        return TextVecEnv(task, 4, completions_per_prompt=2, seed=seed)

    options = {PPO: {"n_steps": 8, "batch_size": 16}, REINFORCE: {"n_episodes": 8}}[algorithm]
    policy = {"policy": name, "policy_kwargs": kwargs, "seed": 0, "device": "cpu", **options}
    model = algorithm(env=make_env(0), **policy)
    path = tmp_path / "model.zip"
    if where == "between":
        model.learn(64).save(path)
    else:
        model.learn(128, callback=Saving(path, where, at=5))
    coefficient = float(go_on_with(model, 128).policy.reference_kl_coef)
    spoil_generators()
    resumed = algorithm.load(path, env=make_env(1000), device="cpu")
    go_on_with(resumed, 128)
    assert float(resumed.policy.reference_kl_coef) == coefficient != 0.5
    np.testing.assert_array_equal(weights(model), weights(resumed))


# ----------------------------------------------------------------- environments


class Kind(enum.Enum):
    LEFT = -1.0
    RIGHT = 1.0


@dataclass
class Part:
    speed: np.ndarray = field(default_factory=lambda: np.zeros(4))
    age: int = 0


class ManyKinds(gym.Env):
    """Attributes of many kinds, in which the state is."""

    observation_space, action_space = spaces.Box(-99, 99, (4,)), spaces.Discrete(2)

    def __init__(self):
        self.memory, self.parts, self.kind = np.zeros(6), [Part(), Part()], Kind.LEFT
        self.view = self.memory[1:5]
        self.own, self.old = np.random.default_rng(7), np.random.RandomState(7)
        self.draw = self.own.normal  # bound to the generator
        self.last, self.named, self.few, self.large = deque(maxlen=3), OrderedDict(), set(), 10**30
        self.single, self.tensor, self.nothing = np.float32(0), th.zeros(2), None
        self.itself, self.action_space = self, spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.memory[:] = self.np_random.normal(size=6)
        self.parts[0].age = 0
        self.few.clear()
        return self.view.astype(np.float32), {}

    def step(self, action):
        first, second = self.parts
        first.age += 1
        first.speed += self.draw(size=4)
        second.speed = second.speed + self.old.normal(size=4)
        self.kind = Kind.RIGHT if self.old.random_sample() < 0.5 else Kind.LEFT
        self.memory[2:] += 0.1 * (first.speed + second.speed) * self.kind.value
        np.clip(self.memory, -99, 99, out=self.memory)
        self.last.append(float(self.view[0]))
        self.named[first.age] = self.last[0]
        self.few.add(int(action))
        self.large += int(self.action_space.sample())
        self.single = np.float32(self.single + np.float32(0.1))
        self.tensor = self.tensor + float(self.single)
        self.nothing = (first.age, {"a": [self.large % 7]})
        reward = sum(self.named.values()) + len(self.few) + float(self.tensor[0]) * 0.01 + self.nothing[1]["a"][0]
        over = self.old.random_sample() < 0.1
        return self.view.astype(np.float32), reward, bool(over), False, {"is_success": bool(over)}


class Told(gym.Env):
    """Tells its state, which is elsewhere."""

    observation_space, action_space = spaces.Box(-99, 99, (2,)), spaces.Box(-1, 1, (1,))
    elsewhere: dict = {}  # noqa: RUF012

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.elsewhere[id(self)] = {"x": self.np_random.normal(size=2), "own": np.random.default_rng(5)}
        return self._seen(), {}

    def _seen(self):
        return self.elsewhere[id(self)]["x"].astype(np.float32)

    def step(self, action):
        its = self.elsewhere[id(self)]
        its["x"] = np.clip(its["x"] + its["own"].normal(size=2) + action, -99, 99)
        return self._seen(), float(its["x"][0]), bool(its["own"].random() < 0.1), False, {}

    def get_state(self):
        return self.elsewhere[id(self)]

    def set_state(self, state):
        self.elsewhere[id(self)] = dict(state)


ENVIRONMENTS = {
    "many kinds of attributes": of(ManyKinds),
    "get_state": of(Told),
    "Acrobot": of("Acrobot-v1"),
    "FrozenLake": of("FrozenLake-v1"),
    "time limit": of(ManyKinds, lambda env: wrappers.TimeLimit(env, 7)),
    "delayed observations": of("CartPole-v1", lambda env: wrappers.DelayObservation(env, 2)),
    "frames": of("CartPole-v1", lambda env: wrappers.FrameStackObservation(env, 3)),
    "normalised by a wrapper": of("CartPole-v1", wrappers.NormalizeObservation),
    "sticky actions": of("CartPole-v1", lambda env: wrappers.StickyAction(env, 0.4)),
    "VecFrameStack": of("CartPole-v1", vec_wrapper=lambda env: VecNormalize(sb3.VecFrameStack(env, 2))),
    "VecMonitor": of("CartPole-v1", vec_wrapper=sb3.VecMonitor),
    "SB3's VecNormalize": of("CartPole-v1", vec_wrapper=sb3.VecNormalize),
}


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_environments_go_on_where_they_were(name, tmp_path):
    check(PPO, ENVIRONMENTS[name], tmp_path / "model.zip", "step")


@pytest.mark.parametrize("env_id", ["HalfCheetah-v5", "Ant-v5"])
def test_mujoco(env_id, tmp_path):
    pytest.importorskip("mujoco")
    check(PPO, of(env_id, vec_wrapper=VecNormalize), tmp_path / "model.zip", "step", total=96)


class Subproc(sb3.SubprocVecEnv):
    def __init__(self, kind, seed):
        super().__init__([lambda: Monitor(wrappers.TimeLimit(kind(), 9))] * 2, start_method="fork")
        self.seed(seed)


@pytest.mark.parametrize("where", ["between", "step"])
def test_environments_in_other_processes_that_tell_their_state(where, tmp_path):
    check(PPO, lambda seed: Subproc(Told, seed), tmp_path / "model.zip", where)


class ToldMuch(Told):
    """Its state has a large array that changes, and many numbers."""

    def reset(self, *, seed=None, options=None):
        found = super().reset(seed=seed, options=options)
        its = self.elsewhere[id(self)]
        its |= {"large": np.full(LARGEST_ARRAY // 8 + 1, its["x"][0]), "many": list(range(LARGEST_STATE))}
        return found

    def _seen(self):
        its = self.elsewhere[id(self)]
        return (its["x"] + its.get("large", its["x"])[-1]).astype(np.float32)


@pytest.mark.parametrize("make", [of(ToldMuch), lambda seed: Subproc(ToldMuch, seed)], ids=["dummy", "subproc"])
def test_a_large_state_that_is_told(make, tmp_path):
    check(PPO, make, tmp_path / "model.zip")


def test_many_environments():
    """The limit is for each of them."""
    make = of(functools.partial(CountsMuch), n_envs=3)
    env, other = make(0), make(0)
    env.reset()
    state = state_of(env)
    assert go_on(other, state) is None
    assert other.envs[0].unwrapped.many == env.envs[0].unwrapped.many


class CountsMuch(FakeEnv):
    def reset(self, *, seed=None, options=None):
        self.many = list(range(LARGEST_STATE * 2 // 3))
        return super().reset(seed=seed, options=options)


@ALL
@pytest.mark.parametrize("at", [1, 45])
def test_a_model_saved_after_a_failed_step_goes_on_as_it_does_itself(algorithm, at, tmp_path):
    class Failing(gym.Wrapper):
        left = at

        def step(self, action):
            Failing.left -= 1
            if Failing.left == 0:
                raise OSError
            return self.env.step(action)

    make = of("CartPole-v1", Failing, VecNormalize)
    model = tiny(algorithm, make(0))
    with pytest.raises(OSError):
        model.learn(200)
    model.save(tmp_path / "model.zip")
    whole = numbers(model.learn(96, reset_num_timesteps=False))
    spoil_generators()
    loaded = algorithm.load(tmp_path / "model.zip", env=make(1000), device="cpu")
    np.testing.assert_array_equal(whole, numbers(loaded.learn(96, reset_num_timesteps=False)))


class Locked(ManyKinds):
    """A lock is no plain data."""

    def __init__(self):
        super().__init__()
        self.lock = threading.Lock()

    def reset(self, *, seed=None, options=None):
        super().__init__()
        self.action_space.seed(3)
        return super().reset(seed=seed)


@pytest.mark.parametrize("make", [of(Locked), lambda seed: Subproc(Locked, seed)], ids=["lock", "other processes"])
@pytest.mark.parametrize("where", ["between", "stop"])
def test_environments_that_cannot_go_on_are_reset_with_their_generators(make, where, tmp_path, capsys):
    check(PPO, make, tmp_path / "model.zip", where, reset=True)
    model = PPO.load(tmp_path / "model.zip", env=make(1000), verbose=1)
    model.learn(16, reset_num_timesteps=False)
    reason = "envs[0].env.lock, a lock, is not plain data"
    expected = reason if model.env.unwrapped.__class__ is DummyVecEnv else "neither get_state() nor set_state()"
    assert expected in capsys.readouterr().out.split("The environments begin new episodes: ")[1]


def test_environments_whose_generators_are_out_of_sight_get_a_new_seed(tmp_path):
    def make():
        return gym.make_vec("CartPole-v1", num_envs=2, vectorization_mode="async")

    def first(path):
        model = PPO.load(path, env=make(), verbose=1)
        model.learn(0, reset_num_timesteps=False)
        model.env.close()
        return model._last_obs

    model, seen = tiny(PPO, make()), []
    for path in (tmp_path / "1.zip", tmp_path / "2.zip"):
        model.learn(32)
        model.save(path)
        seen += [first(path), first(path)]
    model.env.close()
    np.testing.assert_array_equal(seen[0], seen[1])
    np.testing.assert_array_equal(seen[2], seen[3])
    assert not np.array_equal(seen[0], seen[2])


class Level(gym.Wrapper):
    """Ends an episode after so many steps, which may also be set from outside."""

    def __init__(self, env, level=5):
        super().__init__(env)
        self.level, self.n = level, 0

    def reset(self, **kwargs):
        self.n = 0
        return super().reset(**kwargs)

    def step(self, action):
        self.n += 1
        observation, reward, _, truncated, info = super().step(action)
        return observation, reward, self.n >= self.level, truncated, info


def lengths(model):
    return [episode["l"] for episode in model.ep_info_buffer]


def test_settings_of_an_environment_are_those_of_whoever_goes_on(tmp_path):
    path = tmp_path / "model.zip"
    tiny(PPO, of("CartPole-v1", Level)(0)).learn(46 * 2, callback=Saving(path)).save(path)
    resumed = PPO.load(path, env=of("CartPole-v1", lambda env: Level(env, 3))(0))
    resumed.ep_info_buffer.clear()
    resumed.learn(32, reset_num_timesteps=False)
    assert set(lengths(resumed)[2:]) == {3}
    env = of("CartPole-v1")(0)
    assert {"gravity", "tau"} <= settings_of(env.envs[0].unwrapped, ())
    assert "steps_beyond_terminated" not in settings_of(env.envs[0].unwrapped, ())


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (of("CartPole-v1", lambda env: wrappers.TimeLimit(env, 9)), "was made with other arguments"),
        (of("Pendulum-v1"), "was made with other arguments"),
        (of(Told), "is a "),
        (of("CartPole-v1", vec_wrapper=VecNormalize), "1 wrappers, but had 0"),
    ],
)
def test_other_environments_are_not_written_into(make, why, tmp_path):
    env = of("CartPole-v1")(0)
    env.reset()
    state = state_of(env)
    other = make(0)
    other.reset()
    before = json.dumps(state_of(other), default=repr)
    found = go_on(other, state)
    assert found is not None and why in found
    assert json.dumps(state_of(other), default=repr) == before


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1", "FrozenLake-v1", "HalfCheetah-v5"])
@pytest.mark.parametrize(
    "make", [str, gym.make, functools.partial(gym.make, render_mode="rgb_array")], ids=["id", "env", "shown"]
)
def test_how_an_environment_is_shown_does_not_matter(env_id, make, tmp_path):
    """SB3 makes one from its id so that it can be filmed."""
    model = tiny(PPO, env_id).learn(40, callback=Saving(None, "stop"))
    model.save(tmp_path / "model")
    model.learn(40, reset_num_timesteps=False)
    resumed = PPO.load(tmp_path / "model", env=make(env_id)).learn(40, reset_num_timesteps=False)
    assert resumed.num_timesteps == model.num_timesteps
    np.testing.assert_array_equal(weights(resumed), weights(model))
    assert resumed.env.render_mode == (None if make is gym.make else "rgb_array")


def test_an_environment_made_with_other_arguments_begins_anew(tmp_path):
    env = DummyVecEnv([lambda: gym.make("FrozenLake-v1", is_slippery=True)])
    env.reset()
    other = DummyVecEnv([lambda: gym.make("FrozenLake-v1", is_slippery=False)])
    other.reset()
    assert "was made with other arguments" in go_on(other, state_of(env))


def test_a_large_array_that_does_not_change_is_not_in_the_archive(tmp_path):
    class Data(ManyKinds):
        def __init__(self):
            super().__init__()
            self.data = np.arange(300_000.0)

    env, same, other = (of(Data, n_envs=1)(0) for _ in range(3))
    for its in (env, same, other):
        its.reset()
    other.envs[0].unwrapped.data[5] = 0.0
    state = state_of(env)
    assert len(repr(state)) < 30_000
    assert go_on(same, state) is None
    assert "is not the array that it was" in go_on(other, state)


# ------------------------------------------------------------- what is asked for


def global_generators():
    return np.random.get_state()[1].tobytes(), th.get_rng_state().numpy().tobytes()


@ALL
def test_loading_for_prediction_leaves_the_generators_of_others(algorithm, tmp_path):
    model = tiny(algorithm, CARTPOLE(0)).learn(32)
    model.save(tmp_path / "model.zip")
    before = global_generators()
    loaded = algorithm.load(tmp_path / "model.zip")
    assert global_generators() == before
    loaded.predict(np.zeros(4, np.float32))


@pytest.mark.parametrize("by", ["argument", "method"])
def test_a_seed_outranks_the_archive(by, tmp_path):
    path = tmp_path / "model.zip"
    tiny(PPO, PENDULUM(0)).learn(64).save(path)

    def resumed(seed):
        env = PENDULUM(1000)
        if by == "argument":
            model = PPO.load(path, env=env, seed=seed)
        else:
            model = PPO.load(path, env=env)
            model.set_random_seed(seed)
        np.testing.assert_array_equal(weights(model), weights(PPO.load(path)))
        return numbers(model.learn(64, reset_num_timesteps=False))

    np.testing.assert_array_equal(resumed(5), resumed(5))
    assert not np.array_equal(resumed(5), resumed(6))
    assert not np.array_equal(resumed(5), numbers(PPO.load(path, env=PENDULUM(0)).learn(64, reset_num_timesteps=False)))


def test_learning_anew_takes_only_the_parameters(tmp_path):
    path = tmp_path / "model.zip"
    tiny(PPO, PENDULUM(0)).learn(64).save(path)
    models = []
    for _ in range(2):
        env = PENDULUM(3)
        model = PPO.load(path, env=env)
        models.append(numbers(model.learn(64)))
        assert model.num_timesteps == 64
        assert env.obs_rms.count < 64 + 2 + 1
    np.testing.assert_array_equal(*models)  # the archive's seed, as in SB3


def test_force_reset_false_leaves_the_environments_where_they_are(tmp_path):
    path, env = tmp_path / "model.zip", CARTPOLE(0)
    tiny(PPO, env).learn(64, callback=Saving(path, "stop")).save(path)
    before = [single.unwrapped.state for single in env.envs]
    model = PPO.load(path, env=env, force_reset=False)
    model.learn(2, callback=lambda names, _: False, reset_num_timesteps=False)
    assert all(not np.array_equal(a, b.unwrapped.state) for a, b in zip(before, env.envs, strict=True))
    assert [single.get_wrapper_attr("_elapsed_steps") for single in env.envs] != [1, 1]
    assert model._rollout.n_steps == 12


def test_an_archive_without_the_state_is_smaller_and_begins_new_episodes(tmp_path):
    model = tiny(PPO, CARTPOLE(0)).learn(64)
    with_state, without = tmp_path / "with.zip", tmp_path / "without.zip"
    model.save(with_state)
    model.save(without, exclude=["resume"])
    assert without.stat().st_size < with_state.stat().st_size < without.stat().st_size + 30_000
    assert PPO.load(without)._resume is None
    fresh = tmp_path / "fresh.zip"
    tiny(PPO, CARTPOLE(0)).save(fresh)
    assert PPO.load(fresh)._resume is None  # there is nothing to go on with


def test_the_state_survives_saving_a_loaded_model_again(tmp_path):
    first, second = tmp_path / "first.zip", tmp_path / "second.zip"
    whole = tiny(PPO, CARTPOLE(0)).learn(TOTAL, callback=Saving(first))
    PPO.load(first).save(second)
    spoil_generators()
    model = PPO.load(second)
    model.set_env(CARTPOLE(1000))
    np.testing.assert_array_equal(numbers(whole), numbers(go_on_with(model)))


def test_time_limits_of_the_zoo_and_of_gymnasium_go_on_with_each_other():
    class PatchedTimeLimit(wrappers.TimeLimit):
        """rl_zoo3 puts such a class in the place of gymnasium's."""

    PatchedTimeLimit.__module__ = "rl_zoo3.gym_patches"
    env, other = (
        of(ManyKinds, lambda env, kind=kind: kind(env, 7))(0) for kind in (PatchedTimeLimit, wrappers.TimeLimit)
    )
    for one, another in ((env, other), (other, env)):
        one.reset()
        assert go_on(another, state_of(one)) is None


def test_other_numbers_of_environments_begin_new_episodes(tmp_path):
    path = tmp_path / "model.zip"
    tiny(PPO, CARTPOLE(0)).learn(TOTAL, callback=Saving(path))
    model = PPO.load(path, env=of("CartPole-v1", n_envs=3)(0))
    model.learn(48, reset_num_timesteps=False)
    assert model.num_timesteps == 22 + 48


@pytest.mark.parametrize("stop", [26, 32])
def test_the_progress_of_schedules_is_that_of_the_whole_run(stop, tmp_path):
    path = tmp_path / "model.zip"
    seen = []

    def note(progress):
        seen.append(progress)
        return 1e-3

    whole = tiny(PPO, CARTPOLE(0), learning_rate=note)
    whole.learn(TOTAL)
    expected = sorted(set(seen), reverse=True)
    tiny(PPO, CARTPOLE(0)).learn(TOTAL, callback=Saving(path, "stop", stop)).save(path)
    seen.clear()
    model = PPO.load(path, env=CARTPOLE(1), learning_rate=note)
    seen.clear()
    go_on_with(model)
    assert sorted(set(seen), reverse=True) == expected[-len(set(seen)) :]
    assert len(set(seen)) > 2


def test_checkpoints_amid_rollouts(tmp_path):
    model = tiny(PPO, CARTPOLE(0))
    model.learn(TOTAL, callback=CheckpointCallback(save_freq=9, save_path=str(tmp_path)))
    found = sorted(tmp_path.glob("*.zip"))
    assert len(found) == 8
    for path in found[::3]:
        resumed = PPO.load(path, env=CARTPOLE(1000))
        np.testing.assert_array_equal(numbers(model), numbers(go_on_with(resumed)))


def images(shape):
    """An environment whose observations are images, and long enough for a rollout of many bytes."""
    return of(functools.partial(FakeEnv, spaces.Box(0, 255, shape, np.uint8), spaces.Discrete(2), (-7,)))


@pytest.mark.parametrize("where, stack", [("between", False), ("step", True), ("end", False)])
def test_images_with_their_channels_last(where, stack, tmp_path):
    """They come to the policy transposed, but not in memory."""
    make = images((36, 36, 3))
    wrapped = (lambda seed: sb3.VecFrameStack(make(seed), 2)) if stack else make
    check(PPO, wrapped, tmp_path / "model.zip", where, policy="CnnPolicy")


def test_rollouts_larger_than_what_is_written_of_an_environment(tmp_path):
    make = of(functools.partial(FakeEnv, spaces.Box(-1.0, 1.0, (9000,))))
    assert LARGEST_ARRAY < 16 * 2 * 9000 * 4
    check(PPO, make, tmp_path / "model.zip", n_steps=32, at=27)


def test_an_unfinished_rollout_that_is_too_large(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sb3_pg.common.archive.resume.LARGEST_OF_ALL", 1 << 10)
    tiny(PPO, CARTPOLE(0), verbose=1, n_steps=64).learn(TOTAL, callback=Saving(tmp_path / "model.zip", at=40))
    assert "not in the archive: it has 0 MB, more than 0" in capsys.readouterr().out
    resumed = PPO.load(tmp_path / "model.zip", env=CARTPOLE(1))
    assert "rollout" not in resumed._resume
    assert go_on_with(resumed).num_timesteps >= TOTAL


def test_an_unfinished_rollout_with_what_cannot_be_written(tmp_path, capsys):
    env = DummyVecEnv([lambda: Monitor(Telling(), info_keywords=("objects",))])
    model = tiny(PPO, env, verbose=1)
    model.learn(TOTAL, callback=Saving(tmp_path / "model.zip", at=8))
    assert "The unfinished rollout is not in the archive: it['unrecorded']" in capsys.readouterr().out
    resumed = PPO.load(tmp_path / "model.zip", env=env, trusted=True)  # for the episodes that are noted
    assert resumed._resume is not None and "rollout" not in resumed._resume
    go_on_with(resumed)


class Telling(FakeEnv):
    """Says at the end of an episode what is no plain data."""

    def step(self, action):
        *found, info = super().step(action)
        return *found, info | {"objects": np.array([None])}


def test_set_parameters_drops_the_unfinished_rollout_only(tmp_path):
    path = tmp_path / "model.zip"
    tiny(PPO, CARTPOLE(0)).learn(TOTAL, callback=Saving(path))
    model = PPO.load(path, env=CARTPOLE(1000))
    model.set_parameters(model.get_parameters())
    assert "rollout" not in model._resume and "generators" in model._resume


SCRIPT = """
import sys
sys.path[:0] = [{tests!r}, {common!r}]
import test_resume
for algorithm, env in test_resume.OTHERS:
    name = {folder!r} + "/" + algorithm.__name__
    model = algorithm.load(name, env=getattr(test_resume, env)(1000), device="cpu")
    test_resume.np.save(name, test_resume.numbers(test_resume.go_on_with(model)))
"""
OTHERS = [(PPO, "PENDULUM"), (TRPO, "CARTPOLE")]


def test_another_process(tmp_path):
    wholes = {
        algorithm.__name__: tiny(algorithm, globals()[env](0)).learn(
            TOTAL, callback=Saving(tmp_path / f"{algorithm.__name__}.zip")
        )
        for algorithm, env in OTHERS
    }
    tests, here = str(Path(__file__).parents[2]), str(Path(__file__).parent)
    code = SCRIPT.format(tests=tests, common=here, folder=str(tmp_path))
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    for name, whole in wholes.items():
        np.testing.assert_array_equal(numbers(whole), np.load(tmp_path / f"{name}.npy"))


# -------------------------------------------------------------------- plain data


def test_plain_data_have_no_code_in_them():
    assert all(type(x) in (type(None), bool, int, float, str, bytes, list, dict, np.ndarray) for x in walk(kinds()))


def kinds():
    env = of(ManyKinds)(0)
    env.reset()
    return state_of(env)


def walk(x):
    yield x
    for its in x.values() if isinstance(x, dict) else x if isinstance(x, list) else ():
        yield from walk(its)


@pytest.mark.parametrize("x", [threading.Lock(), object(), iter([1]), np.array([None])], ids=lambda x: type(x).__name__)
def test_what_is_no_plain_data(x):
    with pytest.raises(UnstorableError):
        plain({"a": [x]})


@pytest.mark.parametrize(
    "x",
    [1, -(10**40), 1.5, float("inf"), "a", b"a", None, True, (1, (2,)), {1: "a", (2, 3): [4]}, {5}, np.float32(0.1)],
    ids=repr,
)
def test_plain_values_come_back(x):
    found = value(plain(x))
    assert found == x and type(found) is type(x)


LARGE = [
    np.arange(LARGEST_ARRAY // 8 + 1.0),
    np.arange(24.0).reshape(2, 4, 3).transpose(2, 0, 1),
    np.arange(6.0).reshape(2, 3).T,
    np.arange(24.0).reshape(2, 4, 3)[:, ::-2],
]


@pytest.mark.parametrize("x", LARGE, ids=lambda x: str(x.shape))
def test_arrays_come_back_in_the_order_of_their_memory(x):
    found = value(plain([x]))[0]
    np.testing.assert_array_equal(found, x)
    assert np.argsort(found.strides).tolist() == np.argsort(np.abs(x.strides)).tolist()


def test_much_comes_back():
    cuts = [(step, 0, np.array([step])) for step in range(LARGEST_STATE // 2)]
    assert value(plain(cuts)) == cuts


def test_limits_are_back_after_what_has_none():
    write, large, many = Writer(), np.zeros(LARGEST_ARRAY), list(range(LARGEST_STATE))
    assert write.unlimited(large, "it")["is"] == "array"
    write.unlimited(many, "it")
    assert write(large.copy(), "it")["is"] == "fixed"
    with pytest.raises(UnstorableError, match="too much"):
        write(many.copy(), "it")


def test_frames_of_many_environments_go_on():
    """Together they are larger than what is written of an environment."""
    frames = functools.partial(FakeEnv, spaces.Box(0, 255, (150, 150, 3), np.uint8))
    env, other = (sb3.VecFrameStack(of(frames, n_envs=4)(seed), 4) for seed in (0, 1))
    for its in (env, other):
        its.reset()
    for _ in range(3):
        env.step([env.action_space.sample()] * 4)
    assert env.stacked_obs.stacked_obs.nbytes > LARGEST_ARRAY
    assert go_on(other, state_of(env)) is None
    np.testing.assert_array_equal(other.stacked_obs.stacked_obs, env.stacked_obs.stacked_obs)


def test_generators_come_back():
    for generator in (np.random.default_rng(1), np.random.RandomState(1), np.random.Generator(np.random.Philox(1))):
        other = value(plain(generator))
        assert type(other) is type(generator)
        np.testing.assert_array_equal(generator.normal(size=5), other.normal(size=5))


def test_a_reset_that_cannot_be_restored_still_has_the_generators():
    env, other = of(Locked)(0), of(Locked)(9)
    env.reset()
    state = state_of(env)
    prepare_reset(other, state)
    np.testing.assert_array_equal(env.reset(), other.reset())


class Start(BaseCallback):
    """Notes VecNormalize's statistics before the first step."""

    def _on_training_start(self):
        env = self.model.get_vec_normalize_env()
        self.count, self.mean, self.returns = env.obs_rms.count, env.obs_rms.mean.copy(), env.ret_rms.var.copy()

    def _on_step(self):
        return False


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda n: VecNormalize(DummyVecEnv([lambda: gym.make("Pendulum-v1")] * (n + 2))),
        lambda n: VecNormalize(sb3.VecMonitor(DummyVecEnv([lambda: gym.make("Pendulum-v1")] * n))),
        lambda n: sb3.VecMonitor(sb3.VecNormalize(DummyVecEnv([lambda: gym.make("Pendulum-v1")] * n))),
    ],
    ids=["more environments", "a wrapper more", "a wrapper around"],
)
@pytest.mark.parametrize("seed", [None, 7])
def test_statistics_go_on_whatever_else_is_different(wrapped, seed, tmp_path):
    env = VecNormalize(DummyVecEnv([lambda: gym.make("Pendulum-v1")] * 2))
    PPO("MlpPolicy", env, n_steps=64, batch_size=32, seed=1).learn(512).save(tmp_path / "model")
    count, mean, returns = env.obs_rms.count, env.obs_rms.mean, env.ret_rms.var
    other, start = wrapped(2), Start()
    options = {} if seed is None else {"seed": seed}
    loaded = PPO.load(tmp_path / "model", env=other, **options)
    loaded.learn(64, callback=start, reset_num_timesteps=False)
    assert start.count == pytest.approx(count + other.num_envs)  # of the reset
    np.testing.assert_allclose(start.mean, mean, atol=0.02)
    np.testing.assert_array_equal(start.returns, returns)


class LockedOutside(sb3.VecEnvWrapper):
    """Has what cannot be stored, so that nothing is known of where the wrappers are."""

    def __init__(self, env):
        super().__init__(env)
        self.lock = threading.Lock()

    def reset(self):
        return self.venv.reset()

    def step_wait(self):
        return self.venv.step_wait()


def test_statistics_go_on_beside_a_wrapper_that_cannot_be_stored(tmp_path):
    def make():
        return VecNormalize(LockedOutside(DummyVecEnv([lambda: gym.make("Pendulum-v1")] * 2)))

    env, start = make(), Start()
    PPO("MlpPolicy", env, n_steps=64, batch_size=32, seed=1).learn(512).save(tmp_path / "model")
    count, returns = env.obs_rms.count, env.ret_rms.var
    PPO.load(tmp_path / "model", env=make()).learn(64, callback=start, reset_num_timesteps=False)
    assert start.count == pytest.approx(count + 2)
    np.testing.assert_array_equal(start.returns, returns)


def test_statistics_that_cannot_be_taken_are_named(tmp_path):
    env = VecNormalize(DummyVecEnv([lambda: gym.make("Pendulum-v1")]))
    PPO("MlpPolicy", env, n_steps=64, batch_size=32, seed=1).learn(64).save(tmp_path / "model")
    loaded = PPO.load(tmp_path / "model", env=DummyVecEnv([lambda: gym.make("Pendulum-v1")] * 2))
    with pytest.warns(UserWarning, match="there are 0 VecNormalize around the environments, but there were 1"):
        loaded.learn(64, reset_num_timesteps=False)


class Body:
    def __init__(self):
        self.x, self.t = 0.0, 0


class Physics:
    """Moves a body, and has no other state than what it draws from."""

    def advance(self, body, action):
        body.x += 0.1 * (2 * action - 1)
        body.t += 1

    def reset(self, body):
        body.x, body.t = 0.0, 0


def advance(body, action):
    """Do the same as a function of the module."""
    body.x += 0.1 * (2 * action - 1)
    body.t += 1


class Fading:
    """An attribute whose value is kept under another name."""

    def __set_name__(self, owner, name):
        self.name = f"_{name}"

    def __get__(self, owner, kind=None):
        return owner.__dict__.get(self.name, 0.0)

    def __set__(self, owner, value):
        owner.__dict__[self.name] = value


class Apart(gym.Env):
    """An environment whose state is where no method of its own assigns it."""

    level = Fading()

    def __init__(self, kind):
        self.observation_space, self.action_space = spaces.Box(-99, 99, (3,)), spaces.Discrete(2)
        self.body, self.physics, self.kind = Body(), Physics(), kind
        self.uniform = np.random.default_rng(3).uniform
        n = 0

        def count():
            nonlocal n
            n += 1
            return n

        self.count = count

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.physics.reset(self.body)
        return self.seen(), {}

    def seen(self):
        more = {
            "helper": 0.0,
            "function": 0.0,
            "descriptor": self.level,
            "drawn": self.uniform(),
            "counted": self.count(),
        }
        return np.array([self.body.x, self.body.t, more[self.kind]], np.float32)

    def step(self, action):
        move = advance if self.kind == "function" else self.physics.advance
        move(self.body, action)
        self.level = 0.9 * self.level + 0.1
        return self.seen(), self.body.x, self.body.t >= 30, False, {}


@pytest.mark.parametrize("kind", ["helper", "function", "descriptor", "drawn", "counted"])
def test_state_that_others_keep_goes_on(kind, tmp_path):
    def make(_):
        return DummyVecEnv([lambda: Apart(kind)] * 2)

    check(PPO, make, tmp_path / "model.zip", "step")

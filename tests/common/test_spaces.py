"""Actions reach the environment as elements of its space; spaces that cannot be learned on are refused by name."""

import re

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from tiny_models import ALGORITHMS, ALL, tiny, weights

from sb3_pg import PPO, REINFORCE, TRPO
from sb3_pg.common.errors import ArgumentError

BOX = spaces.Box(-1.0, 1.0, (2,))

#: With a start other than 0, and the same without.
STARTS = {
    "discrete": (spaces.Discrete(3, start=-1), spaces.Discrete(3)),
    "discrete, far": (spaces.Discrete(4, start=100), spaces.Discrete(4)),
    "multidiscrete": (spaces.MultiDiscrete([2, 3], start=[1, -1]), spaces.MultiDiscrete([2, 3])),
}


class Choosing(gym.Env):
    """Rewards the last choice of each action; remembers what it was given."""

    def __init__(self, action_space, observation_space=BOX, length=4):
        self.action_space, self.observation_space, self.length = action_space, observation_space, length
        self.given = []
        super().reset(seed=0)  # an evaluation that nobody seeds is the same each time

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self._observe(), {}

    def _observe(self):
        self.observation_space.seed(int(self.np_random.integers(1 << 30)))
        return self.observation_space.sample()

    def step(self, action):
        assert self.action_space.contains(action), action
        self.given.append(np.array(action))
        self.steps += 1
        return self._observe(), float(np.mean(action == last(self.action_space))), self.steps == self.length, False, {}


def last(space):
    if isinstance(space, spaces.Discrete):
        return space.start + space.n - 1
    return space.start + space.nvec - 1


def learner(algorithm, kind, env=None, **options):
    """One that learns ``Choosing`` in some thousand steps."""
    more = {
        PPO: {"n_steps": 64, "batch_size": 64, "n_epochs": 8, "learning_rate": 1e-2},
        TRPO: {"n_steps": 128, "batch_size": 64, "target_kl": 0.1, "cg_max_steps": 5},
        REINFORCE: {"n_episodes": 16, "learning_rate": 3e-2},
    }[algorithm]
    return tiny(algorithm, env or Choosing(STARTS[kind][0]), gamma=0.0, **more, **options)


@ALL
@pytest.mark.parametrize("kind", STARTS)
def test_actions_with_a_start_reach_the_environment(algorithm, kind):
    env = Choosing(STARTS[kind][0])
    tiny(algorithm, env).learn(64)
    given = np.array(env.given)
    assert len(given) >= 64
    low, high = env.action_space.start, last(env.action_space)
    assert np.all(given.min(axis=0) == low)
    assert np.all(given.max(axis=0) == high)
    assert given.shape[1:] == env.action_space.shape


@ALL
@pytest.mark.parametrize("engine", ["auto", "autograd"])
@pytest.mark.parametrize("kind", STARTS)
def test_a_start_is_but_another_name(algorithm, engine, kind):
    found = [weights(tiny(algorithm, Choosing(space), engine=engine).learn(64)) for space in STARTS[kind]]
    np.testing.assert_array_equal(*found)


@ALL
@pytest.mark.parametrize("kind", STARTS)
def test_predictions_are_elements_of_the_space(algorithm, kind, tmp_path):
    space, plain = STARTS[kind]
    model, twin = tiny(algorithm, Choosing(space)), tiny(algorithm, Choosing(plain))
    observations = np.random.default_rng(0).uniform(-1, 1, (200, 2)).astype(np.float32)
    model.save(tmp_path / "model")
    for its in (model, algorithm.load(tmp_path / "model"), algorithm.load(tmp_path / "model", env=Choosing(space))):
        for deterministic in (True, False):
            th.manual_seed(0)
            found, _ = its.predict(observations, deterministic=deterministic)
            th.manual_seed(0)
            expected, _ = twin.predict(observations, deterministic=deterministic)
            np.testing.assert_array_equal(found, expected + space.start)
            assert found.shape == (200, *space.shape)
            assert found.dtype == expected.dtype
            assert all(space.contains(action) for action in found)
            single, _ = its.predict(observations[0], deterministic=deterministic)
            assert space.contains(single)
            assert np.shape(single) == space.shape
        both = np.concatenate([its.predict(observations)[0] for _ in range(3)])
        assert np.all(both.min(axis=0) == space.start)
        assert np.all(both.max(axis=0) == last(space))


@ALL
def test_predictions_of_dict_observations(algorithm):
    env = Choosing(STARTS["discrete"][0], spaces.Dict({"a": BOX, "b": spaces.Discrete(3)}))
    model = tiny(algorithm, env, "MultiInputPolicy").learn(32)
    observation, _ = env.reset()
    assert all(env.action_space.contains(model.predict(observation)[0]) for _ in range(20))
    assert {int(model.predict(observation)[0]) for _ in range(60)} == {-1, 0, 1}


@ALL
@pytest.mark.parametrize("kind", ["discrete", "multidiscrete"])
def test_the_rewarded_action_is_learned(algorithm, kind, tmp_path):
    env = Choosing(STARTS[kind][0])
    model = learner(algorithm, kind, env)
    evaluation = EvalCallback(Monitor(Choosing(STARTS[kind][0])), eval_freq=1000, n_eval_episodes=2, verbose=0)
    model.learn(2000, evaluation)
    assert evaluation.best_mean_reward > 3
    for deterministic, least in ((True, 4.0), (False, 3.0)):
        reward, _ = evaluate_policy(model, Monitor(Choosing(STARTS[kind][0])), 10, deterministic=deterministic)
        assert reward >= least
    assert np.mean(np.array(env.given)[-100:] == last(env.action_space)) > 0.8
    model.save(tmp_path / "model")
    loaded = algorithm.load(tmp_path / "model", env=Choosing(STARTS[kind][0]))
    assert evaluate_policy(loaded, Monitor(Choosing(STARTS[kind][0])), 10)[0] == 4.0
    loaded.learn(64, reset_num_timesteps=False)
    assert evaluate_policy(loaded, Monitor(Choosing(STARTS[kind][0])), 10)[0] == 4.0


@ALL
@pytest.mark.parametrize("kind", STARTS)
def test_a_callback_sees_what_the_environments_were_given(algorithm, kind):
    envs = make_vec_env(lambda: Choosing(STARTS[kind][0]), n_envs=2)

    class Comparing(BaseCallback):
        n = 0

        def _on_step(self):
            Comparing.n += 1
            given = [env.unwrapped.given[-1] for env in envs.envs]
            np.testing.assert_array_equal(self.locals["clipped_actions"], given)
            return True

    tiny(algorithm, envs).learn(32, Comparing())
    assert Comparing.n >= 16


# ------------------------------------------------------------------------- refused

#: What cannot be learned on, with the words by which its error names it.
OBSERVATIONS = {
    "discrete with a start": (spaces.Discrete(3, start=1), "Discrete", "start"),
    "multidiscrete with a start": (spaces.MultiDiscrete([2, 3], start=[1, -1]), "MultiDiscrete", "start"),
    "multidiscrete of two dimensions": (spaces.MultiDiscrete([[2, 3], [2, 2]]), "MultiDiscrete"),
    "graph": (spaces.Graph(BOX, None), "Graph"),
    "sequence": (spaces.Sequence(BOX), "Sequence"),
    "text": (spaces.Text(3), "Text"),
    "tuple": (spaces.Tuple([BOX, BOX]), "Tuple"),
    "one of": (spaces.OneOf([BOX, BOX]), "OneOf"),
    "empty box": (spaces.Box(-1, 1, (0,)), "Box"),
    "empty dict": (spaces.Dict({}), "Dict"),
    "dict in a dict": (spaces.Dict({"outer": spaces.Dict({"inner": BOX})}), "Dict", "outer"),
    "tuple in a dict": (spaces.Dict({"outer": spaces.Tuple([BOX])}), "Tuple", "outer"),
    "text in a dict": (spaces.Dict({"outer": spaces.Text(3), "vector": BOX}), "Text", "outer"),
    "graph in a dict": (spaces.Dict({"outer": spaces.Graph(BOX, None)}), "Graph", "outer"),
    "start in a dict": (spaces.Dict({"outer": spaces.Discrete(3, start=2), "vector": BOX}), "start", "outer"),
    "two dimensions in a dict": (spaces.Dict({"outer": spaces.MultiDiscrete([[2], [2]])}), "MultiDiscrete", "outer"),
}
ACTIONS = {
    "multidiscrete of two dimensions": (spaces.MultiDiscrete([[2, 3], [2, 2]]), "MultiDiscrete"),
    "multidiscrete of two dimensions with a start": (
        spaces.MultiDiscrete([[2, 3], [2, 2]], start=[[1, 1], [1, 1]]),
        "MultiDiscrete",
    ),
    "multibinary of two dimensions": (spaces.MultiBinary((2, 2)), "MultiBinary"),
    "graph": (spaces.Graph(BOX, None), "Graph"),
    "sequence": (spaces.Sequence(BOX), "Sequence"),
    "text": (spaces.Text(3), "Text"),
    "tuple": (spaces.Tuple([spaces.Discrete(2), spaces.Discrete(3)]), "Tuple"),
    "one of": (spaces.OneOf([BOX, BOX]), "OneOf"),
    "dict": (spaces.Dict({"a": spaces.Discrete(2)}), "Dict"),
    "empty box": (spaces.Box(-1, 1, (0,)), "Box"),
}
TO_DO = re.compile(r"\b(use|wrap|flatten|shift|pass|give|replace|convert|encode|leave)\w*\b", re.IGNORECASE)


def check_refused(algorithm, env, which, words):
    policy = "MultiInputPolicy" if isinstance(env.observation_space, spaces.Dict) else "MlpPolicy"
    with pytest.raises(ArgumentError) as caught:
        algorithm(policy, env)
    message = str(caught.value)
    for word in (f"{which} space", *words):
        assert word in message
    assert TO_DO.search(message), message


@ALL
@pytest.mark.parametrize("name", OBSERVATIONS)
def test_observation_spaces_that_are_refused(algorithm, name):
    space, *words = OBSERVATIONS[name]
    check_refused(algorithm, Choosing(STARTS["discrete"][1], space), "observation", words)


@ALL
@pytest.mark.parametrize("name", ACTIONS)
def test_action_spaces_that_are_refused(algorithm, name):
    space, *words = ACTIONS[name]
    check_refused(algorithm, Choosing(space), "action", words)


@ALL
@pytest.mark.parametrize("space", [spaces.Box(-np.inf, np.inf, (2,)), spaces.Box(0, np.inf, (2,))], ids=str)
def test_actions_without_bounds_are_refused(algorithm, space):
    check_refused(algorithm, Moving(space), "action", ["finite bounds", "inf"])


# ------------------------------------------------------------------------ accepted


class Moving(Choosing):
    """For continuous actions, which are elements of the space but perhaps for their type."""

    def step(self, action):
        assert action.shape == self.action_space.shape
        assert np.all(action >= self.action_space.low)
        assert np.all(action <= self.action_space.high)
        self.given.append(np.array(action))
        self.steps += 1
        return self._observe(), float(np.sum(action)), self.steps == self.length, False, {}


def check_works(algorithm, env, policy="MlpPolicy"):
    model = tiny(algorithm, env, policy)
    before = weights(model)
    after = weights(model.learn(32))
    assert np.isfinite(after).all()
    assert not np.array_equal(after, before)
    observation, _ = env.reset()
    for deterministic in (True, False):
        action, _ = model.predict(observation, deterministic=deterministic)
        assert np.shape(action) == env.action_space.shape
        env.step(action)
    assert np.isfinite(evaluate_policy(model, Monitor(env), 1)[0])


@ALL
@pytest.mark.parametrize(
    "space",
    [
        spaces.Box(-3, 3, (2,), np.int64),
        spaces.Box(0, 255, (2,), np.uint8),
        spaces.Box(-1, 1, (2,), np.float64),
        spaces.Box(-1, 1, (2, 2)),
        spaces.Box(-1, 1, ()),
        spaces.Box(np.array([-1, 0]), np.array([2, 3]), dtype=np.float64),
    ],
    ids=str,
)
def test_continuous_actions(algorithm, space):
    check_works(algorithm, Moving(space))


@ALL
@pytest.mark.parametrize(
    "space",
    [
        spaces.Box(-3, 3, (2,), np.int64),
        spaces.Box(0, 1, (2,), bool),
        spaces.Box(-1, 1, (2,), np.float16),
        spaces.Box(-1, 1, (2,), np.float64),
        spaces.Box(0, np.inf, (2,)),
        spaces.Box(-np.inf, 0, (2,)),
        spaces.Box(-np.inf, np.inf, (2,), np.float64),
        spaces.Box(-1, 1, (2, 3)),
        spaces.MultiBinary((2, 2)),
        spaces.Discrete(1),
        spaces.Dict({"a": spaces.Box(0, np.inf, (2,)), "b": spaces.MultiBinary((2, 2)), "c": spaces.Discrete(3)}),
    ],
    ids=str,
)
def test_observations(algorithm, space):
    policy = "MultiInputPolicy" if isinstance(space, spaces.Dict) else "MlpPolicy"
    check_works(algorithm, Choosing(spaces.Discrete(3), space), policy)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_observations_of_no_dimension_are_refused(algorithm):
    for space in (spaces.Box(-1, 1, ()), spaces.Dict({"x": spaces.Box(-1, 1, ()), "y": spaces.Discrete(2)})):
        check_refused(algorithm, Choosing(spaces.Discrete(3), space), "observation", ["without a dimension", "(1,)"])

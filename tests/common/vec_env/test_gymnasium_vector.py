"""gymnasium's vectorised environments do, through the adapter, what DummyVecEnv does with the same environments."""

import functools
import os
import warnings

import gymnasium as gym
import numpy as np
import pytest
from counting_env import CountingEnv
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv
from gymnasium.vector.utils import batch_space
from gymnasium.wrappers import vector as wrappers
from stable_baselines3 import PPO as SB3_PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import VecFrameStack, VecMonitor
from tiny_models import ALL, tiny, weights

from sb3_pg import PPO
from sb3_pg.common.errors import ArgumentError, EnvironmentProcessError
from sb3_pg.common.vec_env import DummyVecEnv, GymnasiumVecEnv, VecNormalize, as_vec_env

N = 3
MODES = [AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP, AutoresetMode.DISABLED]
MODE = pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.value)


def functions(monitor=False, **options):
    def make(which):
        env = CountingEnv(which, **options)
        return Monitor(env) if monitor else env

    return [functools.partial(make, which) for which in range(N)]


def dummy(**options):
    return DummyVecEnv(functions(monitor=True, **options))


def vector(kind, mode, monitor=False, n_wrapped=(), options=None, **how):
    env = {"sync": SyncVectorEnv, "async": AsyncVectorEnv}[kind](
        functions(monitor, **(options or {})), autoreset_mode=mode, **how
    )
    for wrapper in n_wrapped:
        env = wrapper(env)
    return env


def plain(x):
    """Numbers and arrays as lists, and an episode without its time."""
    if isinstance(x, dict):
        return {key: plain(value) for key, value in x.items() if key != "t"}
    return np.asarray(x).tolist() if isinstance(x, np.ndarray | np.generic) else x


def transcript(env, n_steps=40, seed=7):
    """All that a VecEnv returns, looked at after the last step only."""
    env.seed(seed)
    env.set_options({"o": 5})
    rows = [(env.reset(), list(env.reset_infos))]
    random = np.random.default_rng(0)
    for _ in range(n_steps):
        space = env.action_space
        if isinstance(space, spaces.Box):
            actions = random.uniform(-1, 1, (env.num_envs, *space.shape)).astype(np.float32)
        elif isinstance(space, spaces.Discrete):
            actions = space.start + random.integers(space.n, size=env.num_envs)
        else:
            actions = random.integers(2, size=(env.num_envs, *space.shape)).astype(space.dtype)
        rows.append((*env.step(actions), list(env.reset_infos)))
    env.close()
    return rows


def check_same(found, expected):
    for step, (x, y) in enumerate(zip(found, expected, strict=True)):
        for part, other in zip(x, y, strict=True):
            if isinstance(part, np.ndarray):
                assert part.dtype == other.dtype
            assert plain(part) == plain(other) if isinstance(part, np.ndarray | dict) else True, step
            if isinstance(part, list):
                assert [plain(info) for info in part] == [plain(info) for info in other], step


KINDS = {
    "sync": ("sync", {}),
    "sync, memory reused": ("sync", {"copy": False}),
    "async": ("async", {}),
    "async, memory reused": ("async", {"copy": False}),
    "async, memory not shared": ("async", {"shared_memory": False}),
    "async, neither": ("async", {"shared_memory": False, "copy": False}),
}


@MODE
@pytest.mark.parametrize("kind", KINDS)
def test_each_step_is_that_of_dummy_vec_env(kind, mode):
    how, options = KINDS[kind]
    check_same(transcript(as_vec_env(vector(how, mode, **options))), transcript(dummy()))


@MODE
@pytest.mark.parametrize("how", ["sync", "async"])
@pytest.mark.parametrize("kind", ["dict", "discrete", "image", "float64"])
def test_other_observations(kind, how, mode):
    env = as_vec_env(vector(how, mode, copy=False, options={"kind": kind}))
    check_same(transcript(env), transcript(dummy(kind=kind)))


@MODE
@pytest.mark.parametrize(
    "space",
    [
        spaces.Discrete(3, start=-1),
        spaces.MultiDiscrete([2, 4]),
        spaces.MultiBinary(3),
        spaces.Box(-1, 1, (2,)),
        spaces.Box(-1, 1, (2, 2), np.float64),
    ],
    ids=str,
)
def test_other_actions(space, mode):
    env = as_vec_env(vector("sync", mode, options={"action_space": space}))
    check_same(transcript(env), transcript(dummy(action_space=space)))


@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.DISABLED])
def test_environments_that_reuse_their_own_memory(mode):
    # Not in the same step: gymnasium keeps no copy of what its reset then writes over.
    env = as_vec_env(vector("sync", mode, options={"reuse": True}))
    check_same(transcript(env), transcript(dummy(reuse=True)))


@MODE
@pytest.mark.parametrize(
    "where",
    [
        {"monitor": True},
        {"n_wrapped": [wrappers.RecordEpisodeStatistics]},
        {"n_wrapped": [wrappers.RecordEpisodeStatistics, wrappers.DictInfoToList]},
    ],
    ids=["Monitor", "of all", "as lists"],
)
def test_episodes_that_a_wrapper_has_noted(where, mode):
    env = as_vec_env(vector("sync", mode, **where))
    expected = transcript(dummy())
    found = transcript(env)
    for x, y in zip(found[1:], expected[1:], strict=True):
        for info, other in zip(x[3], y[3], strict=True):
            assert ("episode" in info) == ("episode" in other)
            for key in ("r", "l") if "episode" in info else ():
                assert info["episode"].pop(key) == pytest.approx(other["episode"].pop(key), abs=1e-5)
            if "episode" in info:
                info["episode"] = other["episode"] = {}
    check_same(found, expected)


def test_episodes_of_wrappers_that_change_rewards():
    inside = wrappers.RecordEpisodeStatistics(vector("sync", AutoresetMode.NEXT_STEP))
    env = as_vec_env(wrappers.ClipReward(inside, 0, 1))
    for x, y in zip(transcript(env)[1:], transcript(dummy())[1:], strict=True):
        assert (x[1] <= 1).all()
        for info, other in zip(x[3], y[3], strict=True):
            assert ("episode" in info) == ("episode" in other)
            if "episode" in info:
                assert info["episode"]["r"] == pytest.approx(other["episode"]["r"], abs=1e-5)


def rollout(model):
    model.learn(64)
    buffer = model.rollout_buffer
    names = ("observations", "actions", "rewards", "episode_starts", "values", "advantages", "returns")
    return weights(model), [np.copy(getattr(buffer, name)[: buffer.pos]) for name in names]


@MODE
@pytest.mark.parametrize("how", ["sync", "async"])
@ALL
def test_learning_is_that_on_dummy_vec_env(algorithm, how, mode):
    """Returns through truncated episodes, what is recorded and what is learned are equal to the bit."""
    env = vector(how, mode, copy=False)
    found, expected = (rollout(tiny(algorithm, each)) for each in (env, dummy()))
    env.close()
    np.testing.assert_array_equal(found[0], expected[0])
    for x, y in zip(found[1], expected[1], strict=True):
        np.testing.assert_array_equal(x, y)


@MODE
@pytest.mark.parametrize("kind, policy", [("channels last", "CnnPolicy"), ("dict", "MultiInputPolicy")])
def test_learning_from_images_and_dicts(kind, policy, mode):
    """The images' channels are moved and the policy is checked by the spaces of one environment."""
    options = {"policy_kwargs": {"net_arch": [4]}, "n_steps": 8, "batch_size": 8, "n_epochs": 1}
    results = []
    for env in (vector("sync", mode, copy=False, options={"kind": kind}), dummy(kind=kind)):
        results.append(weights(PPO(policy, env, seed=0, device="cpu", **options).learn(48)))
    np.testing.assert_array_equal(*results)


@MODE
@pytest.mark.parametrize("wrap", [VecNormalize, VecMonitor, lambda env: VecFrameStack(env, 2)])
@pytest.mark.filterwarnings("ignore:The environment is already wrapped")
def test_in_wrappers_of_sb3(wrap, mode):
    found, expected = (wrap(env) for env in (as_vec_env(vector("sync", mode, copy=False)), dummy()))
    check_same(transcript(found), transcript(expected))


@MODE
def test_sb3s_ppo(mode):
    found, expected = (
        SB3_PPO("MlpPolicy", env, n_steps=16, batch_size=16, seed=0, device="cpu").learn(96)
        for env in (as_vec_env(vector("sync", mode)), dummy())
    )
    np.testing.assert_array_equal(weights(found), weights(expected))


def test_every_way_of_giving_a_model_its_environment(tmp_path):
    model = tiny(PPO, vector("sync", AutoresetMode.SAME_STEP)).learn(64)
    assert isinstance(model.get_env(), GymnasiumVecEnv)
    model.save(tmp_path / "model")
    loaded = PPO.load(tmp_path / "model", env=vector("sync", AutoresetMode.DISABLED))
    loaded.learn(64)
    model.set_env(vector("sync", AutoresetMode.NEXT_STEP))
    model.learn(64)
    same = as_vec_env(model.get_env())
    assert same is model.get_env()


@MODE
def test_evaluation(mode):
    model, results = tiny(PPO, dummy()), []
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of an environment that notes no episodes
        for env in (as_vec_env(vector("sync", mode)), dummy()):
            env.seed(3)
            results.append(evaluate_policy(model, env, 12, return_episode_rewards=True))
    assert results[0] == results[1] and len(set(results[0][1])) > 3


# ------------------------------------------------------------------ seeds


@MODE
def test_a_seed_repeats_a_run(mode):
    runs = [rollout(tiny(PPO, vector("sync", mode), seed=seed)) for seed in (1, 1, 2)]
    np.testing.assert_array_equal(runs[0][0], runs[1][0])
    noise = [run[1][0][0, :, 3] for run in runs]
    assert len(set(noise[0].tolist())) == N  # each environment has a seed of its own
    assert (noise[0] != noise[2]).all()


def test_seeds_and_options_are_for_one_reset():
    env = as_vec_env(vector("sync", AutoresetMode.NEXT_STEP))
    assert list(env.seed(3)) == [3, 4, 5]
    env.set_options({"o": 1})
    first = env.reset()
    assert [info["option"] for info in env.reset_infos] == [1, 1, 1]
    assert (env.reset() != first).any(axis=1).all()
    assert "option" not in env.reset_infos[0]
    env.seed(3)
    np.testing.assert_array_equal(env.reset()[:, 3], first[:, 3])
    env.set_options([{"o": 1}, {"o": 2}, {}])
    with pytest.raises(ArgumentError, match="same options"):
        env.reset()


# ------------------------------------------- what is asked of single environments


@pytest.mark.parametrize("how", ["sync", "async"])
def test_attributes_and_methods(how):
    env = as_vec_env(vector(how, AutoresetMode.NEXT_STEP))
    env.reset()
    assert env.get_attr("secret") == [0, 10, 20]
    assert env.get_attr("secret", [2, 0]) == [20, 0]
    assert [method(1) for method in env.get_attr("double")] == [2, 3, 4]
    env.set_attr("secret", 5, 1)
    assert env.get_attr("secret") == [0, 5, 20]
    env.set_attr("secret", [1, 2])
    assert env.get_attr("secret") == [[1, 2]] * 3
    assert env.env_method("double", 4, plus=1) == [9, 10, 11]
    assert env.has_attr("secret") and not env.has_attr("nothing")
    for call in (env.get_attr, env.env_method):
        with pytest.raises(AttributeError, match="nothing"):
            call("nothing")
    with pytest.raises(ArgumentError, match=r"reset\(\)"):
        env.env_method("reset")
    env.step(np.zeros(3, int))  # still alive
    if how == "sync":
        assert env.env_method("double", 4, indices=[2]) == [10]
        assert env.env_is_wrapped(gym.wrappers.TimeLimit) == [False] * 3
    else:
        with pytest.raises(ArgumentError, match="indices"):
            env.env_method("double", 4, indices=[2])
        with pytest.raises(ArgumentError, match="wrappers"):
            env.env_is_wrapped(gym.wrappers.TimeLimit)
    assert env.env_is_wrapped(Monitor, 1) == [True]
    env.close()


@pytest.mark.parametrize("how", ["sync", "async"])
def test_pictures(how):
    env = as_vec_env(vector(how, AutoresetMode.NEXT_STEP))
    env.reset()
    assert env.render_mode == "rgb_array"
    assert [picture[0, 0, 0] for picture in env.get_images()] == [0, 1, 2]
    assert env.render().shape == (8, 8, 3)
    env.close()


def test_wrappers_of_single_environments_are_found():
    make = lambda: gym.wrappers.TimeLimit(CountingEnv(), 50)  # noqa: E731
    env = as_vec_env(wrappers.ClipReward(SyncVectorEnv([make, make]), 0, 1))
    assert env.env_is_wrapped(gym.wrappers.TimeLimit) == [True, True]
    assert env.env_is_wrapped(gym.wrappers.ClipReward) == [False, False]
    assert env.env_is_wrapped(wrappers.ClipReward) == [True, True]


# ------------------------------------------------------------------- masks


@MODE
@pytest.mark.parametrize("how", ["sync", "async"])
def test_masks_of_methods(how, mode):
    env = vector(how, mode)
    model = tiny(PPO, env).learn(96)
    other = tiny(PPO, dummy()).learn(96)
    assert model.rollout.masks and other.rollout.masks
    np.testing.assert_array_equal(model.rollout.masks, other.rollout.masks)
    np.testing.assert_array_equal(weights(model), weights(other))
    env.close()


class SaysMasks(gym.Wrapper):
    """Has its masks in the information, as gymnasium's Taxi."""

    def __init__(self, env):
        super().__init__(env)
        self.has_wrapper_attr = lambda name: name != "action_masks" and super(SaysMasks, self).has_wrapper_attr(name)

    def reset(self, **options):
        observation, info = super().reset(**options)
        return observation, {**info, "action_mask": self.unwrapped.action_masks().astype(np.int8)}

    def step(self, action):
        *result, info = super().step(action)
        return *result, {**info, "action_mask": self.unwrapped.action_masks().astype(np.int8)}


@MODE
@pytest.mark.parametrize("kind", [SyncVectorEnv, AsyncVectorEnv])
def test_masks_in_infos(kind, mode):
    env = kind([functools.partial(lambda i: SaysMasks(CountingEnv(i)), i) for i in range(N)], autoreset_mode=mode)
    model, other = tiny(PPO, env).learn(96), tiny(PPO, dummy()).learn(96)
    np.testing.assert_array_equal(model.rollout.masks, other.rollout.masks)
    np.testing.assert_array_equal(weights(model), weights(other))
    assert not tiny(PPO, env, use_masking=False).learn(32).rollout.masks
    env.close()


def test_all_actions_are_allowed_where_infos_do_not_say():
    class Sometimes(Counted):
        def reset(self, *, seed=None, options=None):
            observations, infos = super().reset(seed=seed, options=options)
            self.t = 0
            return observations, {**infos, "action_mask": np.eye(3), "_action_mask": np.array([True, True, False])}

        def step(self, actions):
            self.t += 1
            *results, infos = super().step(actions)
            return *results, {**infos, "action_mask": np.eye(3)[::-1]} if self.t == 1 else infos

        def __getattribute__(self, name):
            if name == "action_masks":
                raise AttributeError(name)
            return super().__getattribute__(name)

    env = as_vec_env(Sometimes(AutoresetMode.SAME_STEP))
    assert not env.has_attr("action_masks")
    env.reset()
    np.testing.assert_array_equal(env.env_method("action_masks"), [[1, 0, 0], [0, 1, 0], [1, 1, 1]])
    env.step(np.zeros(N, int))
    np.testing.assert_array_equal(env.env_method("action_masks"), [[0, 0, 1], [0, 1, 0], [1, 0, 0]])
    env.step(np.zeros(N, int))
    np.testing.assert_array_equal(env.env_method("action_masks"), np.ones((3, 3)))


# -------------------------------------------------- environments that are one


class Counted(VectorEnv):
    """A vectorised environment that steps all at once, and resets as it is told.

    :param mode: its metadata's, None for none
    :param obeys: whether it looks at the mask of what to reset
    """

    def __init__(self, mode, obeys=True, says_finals=True):
        self.inside = SyncVectorEnv(functions(), autoreset_mode=mode or AutoresetMode.DISABLED)
        self.metadata = {"autoreset_mode": mode} if mode else {}
        self.num_envs, self.obeys, self.says_finals = N, obeys, says_finals
        self.single_observation_space = self.inside.single_observation_space
        self.single_action_space = self.inside.single_action_space
        self.observation_space, self.action_space = self.inside.observation_space, self.inside.action_space

    def reset(self, *, seed=None, options=None):
        options = options if self.obeys or not options or "reset_mask" not in options else None
        return self.inside.reset(seed=seed, options=options)

    def step(self, actions):
        observations, rewards, terminated, truncated, infos = self.inside.step(actions)
        if self.metadata.get("autoreset_mode") is AutoresetMode.SAME_STEP:  # columns without masks, at every step
            finals = observations.copy()
            for i in np.flatnonzero(infos.get("_final_obs", [])):
                finals[i] = infos["final_obs"][i]
            infos = {**infos, "final_obs": finals} if self.says_finals else {}
            infos.pop("_final_obs", None)
        return observations, rewards, terminated, truncated, infos

    def action_masks(self):
        return np.stack(self.inside.call("action_masks"))


@MODE
def test_vectorised_environments_of_the_users_own(mode):
    check_same(transcript(as_vec_env(Counted(mode))), transcript(dummy()))
    model, other = tiny(PPO, Counted(mode)).learn(96), tiny(PPO, dummy()).learn(96)
    np.testing.assert_array_equal(model.rollout.masks, other.rollout.masks)
    np.testing.assert_array_equal(weights(model), weights(other))


def test_what_a_vectorised_environment_of_the_users_own_has():
    env = as_vec_env(wrappers.ClipReward(Counted(AutoresetMode.DISABLED), 0, 1))
    assert env.get_attr("obeys") == [True] * N
    env.set_attr("obeys", 3)
    assert env.env.env.obeys == 3
    with pytest.raises(ArgumentError, match="indices"):
        env.set_attr("obeys", 3, [1])
    with pytest.raises(AttributeError, match="nothing"):
        env.get_attr("nothing")


@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.DISABLED])
@pytest.mark.parametrize("wrap", [lambda env: env, wrappers.RecordEpisodeStatistics])
def test_one_that_resets_more_than_it_should_is_found_out(wrap, mode):
    with pytest.raises(ArgumentError, match=r"(?s)Counted.*reset_mask.*environment \d"):
        transcript(as_vec_env(wrap(Counted(mode, obeys=False))))


def test_one_that_does_not_say_how_it_is_reset_is_refused():
    with pytest.raises(ArgumentError, match=r"(?s)Counted.*autoreset_mode.*SAME_STEP"):
        as_vec_env(Counted(None))
    with pytest.raises(ArgumentError, match=r"(?s)Counted.*final_obs"):
        transcript(as_vec_env(Counted(AutoresetMode.SAME_STEP, says_finals=False)))


@pytest.mark.parametrize("wrapper", [wrappers.NormalizeReward, wrappers.NormalizeObservation])
def test_wrappers_that_cannot_be_reset_partly_are_refused(wrapper):
    with pytest.raises(ArgumentError, match=f"{wrapper.__name__}.*VecNormalize"):
        as_vec_env(wrapper(vector("sync", AutoresetMode.NEXT_STEP)))


def test_normalised_rewards_with_resets_in_the_same_step():
    assert len(transcript(as_vec_env(wrappers.NormalizeReward(vector("sync", AutoresetMode.SAME_STEP))))) == 41


def test_observations_changed_by_a_wrapper():
    def shift(env):
        return wrappers.TransformObservation(env, lambda x: x + 1)

    found = transcript(as_vec_env(shift(vector("sync", AutoresetMode.NEXT_STEP))))
    for x, y in zip(found, transcript(dummy()), strict=True):
        np.testing.assert_array_equal(x[0], y[0] + 1)
    lasts = [info["terminal_observation"] for row in found[1:] for info in row[3] if "terminal_observation" in info]
    assert lasts and all(last[2] > 2 for last in lasts)  # a step of 2 or more, and 1


def test_gymnasiums_own_cart_poles():
    """The vectorised CartPole knows no masks of what to reset; with its limit reached each step is of an episode."""
    env = as_vec_env(gym.make_vec("CartPole-v1", num_envs=4, max_episode_steps=5))
    env.seed(0)
    before = env.reset()
    assert np.abs(before).max() <= 0.05
    for t in range(1, 21):
        observations, rewards, dones, infos = env.step(np.full(4, t % 2))
        assert (rewards == 1).all() and (dones == (t % 5 == 0)).all()
        if dones.any():
            assert np.abs(observations).max() <= 0.05
            assert [info["episode"]["l"] for info in infos] == [5] * 4
            assert all(info["TimeLimit.truncated"] for info in infos)
        last = np.stack([info["terminal_observation"] for info in infos]) if dones.any() else observations
        np.testing.assert_allclose(last[:, 0], before[:, 0] + 0.02 * before[:, 1], atol=1e-6)  # goes on from there
        before = observations
    env.env.steps[:2] = 3  # out of step: only some end
    for t in range(3):
        observations, rewards, dones, _ = env.step(np.full(4, t % 2))
        assert (rewards == 1).all()
        assert (np.abs(observations[dones]) <= 0.05).all()
        if t == 1:
            assert dones.tolist() == [True, True, False, False]
    np.testing.assert_array_equal(env.env.steps, [1, 1, 3, 3])


# --------------------------------------------------------------- what is refused


class Nothing(VectorEnv):
    metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}  # noqa: RUF012

    def __init__(self, observation_space, action_space):
        self.num_envs, self.single_observation_space, self.single_action_space = 2, observation_space, action_space
        self.observation_space, self.action_space = batch_space(observation_space, 2), batch_space(action_space, 2)


BOX, DISCRETE = spaces.Box(-1, 1, (2,)), spaces.Discrete(2)


@pytest.mark.parametrize(
    "observation_space, action_space, named",
    [
        (spaces.Tuple([BOX, BOX]), DISCRETE, "observation space Tuple"),
        (spaces.Dict({"inner": spaces.Dict({"x": BOX})}), DISCRETE, "observation space 'inner'"),
        (spaces.Dict({"pair": spaces.Tuple([BOX, BOX])}), DISCRETE, "observation space 'pair'"),
        (BOX, spaces.Dict({"x": DISCRETE}), "action space Dict"),
    ],
)
def test_spaces_are_refused_by_name(observation_space, action_space, named):
    env = Nothing(observation_space, action_space)
    for make in (as_vec_env, lambda env: PPO("MultiInputPolicy", env)):
        with pytest.raises(ArgumentError, match=named):
            make(env)


def test_what_is_not_vectorised_is_refused():
    with pytest.raises(ArgumentError, match=r"`env`.*CountingEnv"):
        as_vec_env(CountingEnv())


@pytest.mark.parametrize("which", [1, 2, 3], ids=["rewards", "terminated", "truncated"])
@pytest.mark.parametrize("wrong", [np.zeros((N, 1)), np.zeros(N + 1), None], ids=["column", "many", "none"])
def test_wrong_results_are_named(which, wrong):
    class Wrong(Counted):
        def step(self, actions):
            results = list(super().step(actions))
            results[which] = wrong
            return tuple(results)

    env = as_vec_env(Wrong(AutoresetMode.DISABLED))
    env.reset()
    with pytest.raises(ArgumentError, match=["", "rewards", "terminated", "truncated"][which]):
        env.step(np.zeros(N, int))


@pytest.mark.parametrize(
    "observations", [np.zeros((N, 5), np.float32), np.zeros((N + 1, 4), np.float32), None], ids=["wide", "many", "none"]
)
def test_wrong_observations_are_named(observations):
    class Wrong(Counted):
        def step(self, actions):
            return observations, *super().step(actions)[1:]

    env = as_vec_env(Wrong(AutoresetMode.DISABLED))
    env.reset()
    with pytest.raises(ArgumentError, match="observations"):
        env.step(np.zeros(N, int))


def test_our_dummy_vec_env_is_left_alone():
    env = make_vec_env("CartPole-v1", 2)
    assert as_vec_env(env) is env


class Failing(CountingEnv):
    """Fails, or ends its process, in the second episode of one environment."""

    def step(self, action):
        if self.which == 1 and self.episode == 2:
            if self.secret == 10:
                raise ConnectionError("mine")
            os._exit(3)
        return super().step(action)


@pytest.mark.parametrize("mode", MODES[:2], ids=lambda mode: mode.value)
@pytest.mark.parametrize("ends", [False, True])
def test_a_process_that_has_ended_is_named(mode, ends):
    env = as_vec_env(AsyncVectorEnv([functools.partial(Failing, which) for which in range(N)], autoreset_mode=mode))
    if ends:
        env.set_attr("secret", 0)
    model = tiny(PPO, env)
    with pytest.raises(
        EnvironmentProcessError if ends else ConnectionError, match="environment 1 " if ends else "mine"
    ):
        model.learn(200)
    for _ in range(2):
        with pytest.raises(EnvironmentProcessError, match=r"process of environment 1 has ended.*set_env"):
            model.learn(32, reset_num_timesteps=False)
    env.close()
    env.close()
    model.set_env(dummy())
    assert model.learn(32, reset_num_timesteps=False).num_timesteps > 32

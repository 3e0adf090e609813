"""What a step returned stays as it was, whatever the environment does to its own arrays and dictionaries later."""

import copy

import gymnasium as gym
import numpy as np
import pytest
import stable_baselines3
from gymnasium import spaces
from stable_baselines3.common import vec_env as sb3
from stable_baselines3.common.callbacks import BaseCallback
from test_vec_env import assert_same
from tiny_models import ALL, tiny, weights

from sb3_pg import PPO
from sb3_pg.common import vec_env as ours

VECTOR = spaces.Box(-100, 100, (2,), np.float32)
PARTS = spaces.Dict({"a": VECTOR, "b": spaces.Box(-100, 100, (3,), np.float64), "c": spaces.MultiBinary(2)})
OBSERVATIONS = {"vector": VECTOR, "dict": PARTS, "multibinary": spaces.MultiBinary(2)}


class Changing(gym.Env):
    """Counts its steps in the places of its own state that it shows, and goes on writing there.

    :param kind: of its observations
    :param shows: what its info holds of its state: a key of ``state``, or "all" for the whole
    :param reuse: whether it shows the state itself; else a copy of it
    """

    def __init__(self, kind="vector", shows="nested", reuse=True):
        self.observation_space, self.action_space = OBSERVATIONS[kind], spaces.Box(-1, 1, (2,), np.float32)
        self.kind, self.shows, self.reuse, self.total, self.episode = kind, shows, reuse, 0, 0
        self.seen = {
            "vector": np.zeros(2, np.float32),
            "dict": {"a": np.zeros(2, np.float32), "b": np.zeros(3), "c": np.zeros(2, np.int8)},
            "multibinary": np.zeros(2, np.int8),
        }[kind]
        self.state = {
            "array": np.zeros(3),
            "list": [0],
            "nested": {"here": {"array": np.zeros(2), "list": [np.zeros(1)]}, "count": 0},
            "object": np.array([0, None], dtype=object),
        }

    def _shown(self):
        for x in self.seen.values() if isinstance(self.seen, dict) else [self.seen]:
            x[:] = self.total % 2 if x.dtype == np.int8 else self.total
        state = self.state
        state["array"][:] = state["list"][0] = state["object"][0] = self.total
        state["nested"]["count"] = self.total
        state["nested"]["here"]["array"] += 1
        state["nested"]["here"]["list"][0][:] = self.total
        info = state if self.shows == "all" else {self.shows: state[self.shows]}
        return (self.seen, info) if self.reuse else copy.deepcopy((self.seen, info))

    def reset(self, *, seed=None, options=None):
        self.steps, self.total, self.episode = 0, self.total + 1, self.episode + 1
        return self._shown()

    def step(self, action):
        action *= 2.0  # its own affair
        self.steps, self.total = self.steps + 1, self.total + 1
        seen, info = self._shown()
        return seen, float(self.total % 3), self.steps == 5, self.steps == 3 and self.episode % 2 == 0, info


SHOWN = ["array", "list", "nested", "object", "all"]
LOCALS = ("infos", "new_obs", "rewards", "dones", "actions", "clipped_actions")


class Collecting(BaseCallback):
    """Keeps what it finds in ``locals``, and copies of it to compare with."""

    def __init__(self):
        super().__init__()
        self.kept, self.copies = [], []

    def _on_step(self):
        found = {name: self.locals[name] for name in LOCALS}
        found["last_obs"] = self.model._last_obs
        self.kept.append(found)
        self.copies.append(copy.deepcopy(found))
        return True


def policy_for(kind):
    return "MultiInputPolicy" if kind == "dict" else "MlpPolicy"


def check_snapshots(callback, name):
    for kept, then in zip(callback.kept, callback.copies, strict=True):
        assert_same(kept[name], then[name])


@ALL
@pytest.mark.parametrize("shows", SHOWN)
def test_infos_that_a_callback_collects(algorithm, shows):
    callback = Collecting()
    tiny(algorithm, Changing(shows=shows)).learn(48, callback)
    assert len(callback.kept) >= 48
    check_snapshots(callback, "infos")
    key = "array" if shows == "all" else shows
    different = {str(info[key]) for (info,) in (kept["infos"] for kept in callback.kept)}
    assert len(different) == len(callback.kept)


@ALL
@pytest.mark.parametrize("kind", OBSERVATIONS)
def test_observations_rewards_and_actions_that_a_callback_collects(algorithm, kind):
    callback = Collecting()
    tiny(algorithm, Changing(kind), policy_for(kind)).learn(48, callback)
    for name in (*LOCALS[1:], "last_obs"):
        check_snapshots(callback, name)


@ALL
@pytest.mark.parametrize("kind", OBSERVATIONS)
def test_terminal_observations_that_a_callback_collects(algorithm, kind):
    callback = Collecting()
    tiny(algorithm, Changing(kind), policy_for(kind)).learn(48, callback)
    n = 0
    for kept, after in zip(callback.kept[:-1], callback.kept[1:], strict=True):
        if kept["dones"][0]:
            n += 1
            # The environment counts on: the last observation is one before the first of the next episode.
            last, first = kept["infos"][0]["terminal_observation"], after["last_obs"]
            pairs = [(last[key], first[key]) for key in last] if kind == "dict" else [(last, first)]
            for x, y in pairs:
                step = y[0] - np.asarray(x, y.dtype)
                assert (np.abs(step) == 1).all()
        else:
            assert "terminal_observation" not in kept["infos"][0]
    assert n > 3


@ALL
@pytest.mark.parametrize("kind", OBSERVATIONS)
def test_an_environment_that_reuses_its_memory_is_learned_as_one_that_does_not(algorithm, kind):
    found = [
        weights(tiny(algorithm, Changing(kind, "all", reuse), policy_for(kind)).learn(64)) for reuse in (True, False)
    ]
    np.testing.assert_array_equal(*found)


def test_what_is_collected_is_what_sb3_gives():
    collected = []
    for kind in (stable_baselines3.PPO, PPO):
        callback = Collecting()
        options = {"n_steps": 16, "batch_size": 16, "n_epochs": 1, "device": "cpu", "policy_kwargs": {"net_arch": []}}
        model = kind("MlpPolicy", Changing(shows="nested", reuse=True), seed=0, **options)
        model.learn(48, callback)
        collected.append([{**kept["infos"][0], "done": kept["dones"][0]} for kept in callback.kept])
    theirs, mine = collected
    for found, expected in zip(mine, theirs, strict=True):
        assert found.keys() == expected.keys()
        if not found["done"]:  # SB3's infos of last steps are of the next episode's first, if memory is reused
            assert_same(found, expected)


# ------------------------------------------------------------------ DummyVecEnv itself


def stepped(library, kind="vector", shows="nested", n_envs=2, n_steps=20, **options):
    env = library.DummyVecEnv([lambda: Changing(kind, shows, **options)] * n_envs)
    seen = [(env.reset(), copy.deepcopy(env.reset_infos))]
    actions = np.zeros((n_envs, 2), np.float32)
    for _ in range(n_steps):
        seen.append(env.step(actions))
    return env, seen


@pytest.mark.parametrize("shows", SHOWN)
@pytest.mark.parametrize("kind", OBSERVATIONS)
def test_the_same_as_sb3s(kind, shows):
    (_, theirs), (_, mine) = (stepped(library, kind, shows, reuse=False) for library in (sb3, ours))
    assert_same(mine, theirs)
    # Of an environment that reuses its memory, all but the infos of last steps, which SB3 copies after the reset.
    (_, theirs), (_, mine) = (stepped(library, kind, shows, reuse=True) for library in (sb3, ours))
    for seen in (theirs, mine):
        for _, _, dones, infos in seen[1:]:
            for info, done in zip(infos, dones, strict=True):
                info.pop("terminal_observation", None)
                if done:
                    info.clear()
    assert_same(mine, theirs)


@pytest.mark.parametrize("reuse", [True, False])
@pytest.mark.parametrize("kind", OBSERVATIONS)
def test_each_reset_info_is_that_of_its_reset(kind, reuse):
    env, seen = stepped(ours, kind, "array", 1, 0, reuse=reuse)
    assert seen[0][1][0]["array"][0] == 1
    n = 0
    for _ in range(20):
        _, _, dones, infos = env.step(np.zeros((1, 2), np.float32))
        if dones[0]:
            n += 1
            assert env.reset_infos[0]["array"][0] == env.envs[0].total
            assert infos[0]["array"][0] == env.envs[0].total - 1
    assert n


def test_what_is_returned_can_be_changed_without_effect():
    env, _ = stepped(ours, "dict", "all", 2, 0)
    plain, _ = stepped(ours, "dict", "all", 2, 0)
    for _ in range(12):
        actions = np.zeros((2, 2), np.float32)
        observations, rewards, dones, infos = env.step(actions)
        kept = copy.deepcopy((env.buf_rews, env.buf_dones))
        for x in observations.values():
            x[:] = 7
        rewards[:] = 7.0
        dones[:] = True
        for info in infos:
            info["array"][:] = 7
            info["nested"]["here"]["list"].append(7)
            info["mine"] = 7
        infos[0] = None
        assert_same((env.buf_rews, env.buf_dones), kept)
        assert all(isinstance(info, dict) and "mine" not in info for info in env.buf_infos)
        assert all("mine" not in own.state and len(own.state["nested"]["here"]["list"]) == 1 for own in env.envs)
        plain.step(actions)
    assert_same([own.state for own in env.envs], [own.state for own in plain.envs])
    assert_same(env.step(np.zeros((2, 2), np.float32))[0], plain.step(np.zeros((2, 2), np.float32))[0])


def test_an_environment_that_always_returns_the_same_info():
    _, seen = stepped(ours, shows="all", n_envs=1)
    dictionaries = [infos[0] for _, _, _, infos in seen[1:]]
    assert len({id(info) for info in dictionaries}) == len(dictionaries)
    assert [info["list"][0] for info in dictionaries] == sorted({info["list"][0] for info in dictionaries})
    cut = [info["TimeLimit.truncated"] for info in dictionaries]
    assert any(cut)
    assert not all(cut)


@pytest.mark.parametrize("library", [sb3, ours])
def test_normalisation_leaves_what_the_environment_returned(library):
    env = ours.VecNormalize(library.DummyVecEnv([lambda: Changing("dict", "all")]), norm_obs_keys=["a", "b"])
    env.reset()
    seen, copies = [], []
    for _ in range(20):
        step = env.step(np.zeros((1, 2), np.float32))
        seen.append((*step, env.get_original_obs(), env.get_original_reward()))
        copies.append(copy.deepcopy(seen[-1]))
    assert_same(seen, copies)
    counted = [original["a"][0, 0] for *_, original, _ in seen]
    assert len(set(counted)) == len(counted)


@ALL
def test_episodes_of_an_environment_that_reuses_their_record(algorithm):
    class Recorded(Changing):
        """Its own record of each episode, as Monitor would add it, in one dictionary."""

        def __init__(self):
            super().__init__()
            self.record = {}

        def step(self, action):
            *rest, terminated, truncated, info = super().step(action)
            if terminated or truncated:
                self.record.update(r=float(self.total), l=self.steps)
                info = {**info, "episode": self.record}
            return (*rest, terminated, truncated, info)

    model = tiny(algorithm, ours.DummyVecEnv([Recorded])).learn(48)
    found = [episode["r"] for episode in model.ep_info_buffer]
    assert len(set(found)) == len(found) > 3
    assert {episode["l"] for episode in model.ep_info_buffer} == {3, 5}

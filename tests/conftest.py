"""Thread pinning, and fake environments for every observation and action space."""

import itertools
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from hypothesis import settings
from stable_baselines3.common import policies
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

th.set_num_threads(1)

# The same examples in every run, and no time limit for one: the machine may be busy.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")

ACTION_SPACES: dict[str, spaces.Space] = {
    "box": spaces.Box(-1.0, 1.0, (2,)),
    "discrete": spaces.Discrete(3),
    "multidiscrete": spaces.MultiDiscrete([2, 4]),
    "multibinary": spaces.MultiBinary(3),
}

IMAGE = spaces.Box(0, 255, (1, 36, 36), np.uint8)  # the smallest that NatureCNN takes

OBSERVATION_SPACES: dict[str, spaces.Space] = {
    "box": spaces.Box(-1.0, 1.0, (3,)),
    "float64": spaces.Box(-1.0, 1.0, (3,), np.float64),
    "discrete": spaces.Discrete(4),
    "multidiscrete": spaces.MultiDiscrete([2, 3]),
    "multibinary": spaces.MultiBinary(3),
    "dict": spaces.Dict({"vector": spaces.Box(-1.0, 1.0, (2,)), "number": spaces.Discrete(3), "image": IMAGE}),
    "image": IMAGE,
}


def policy_for(observation_space: spaces.Space) -> str:
    if isinstance(observation_space, spaces.Dict):
        return "MultiInputPolicy"
    return "CnnPolicy" if observation_space.dtype == np.uint8 else "MlpPolicy"


class FakeEnv(gym.Env):
    """Random observations, a reward that depends on the action, and episodes of known lengths.

    :param lengths: of the episodes, in turn and again from the start; a negative one is truncated, not terminated
    """

    def __init__(
        self,
        observation_space: spaces.Space | None = None,
        action_space: spaces.Space | None = None,
        lengths: Sequence[int] = (5, -3, 1, -7),
    ) -> None:
        self.observation_space = observation_space or OBSERVATION_SPACES["box"]
        self.action_space = action_space or ACTION_SPACES["box"]
        self.lengths = lengths
        self.episode = -1

    def _observe(self) -> Any:
        self.observation_space.seed(int(self.np_random.integers(1 << 30)))
        return self.observation_space.sample()

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.episode += 1
        self.steps = 0
        return self._observe(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        assert self.action_space.contains(action), action
        self.steps += 1
        length = self.lengths[self.episode % len(self.lengths)]
        over = self.steps == abs(length)
        reward = float(np.sum(action)) + np.sin(self.steps)
        return self._observe(), reward, over and length > 0, over and length < 0, {}


def make_envs(
    observation: str = "box",
    action: str = "box",
    n_envs: int = 1,
    seed: int = 0,
    lengths: Sequence[int] = (5, -3, 1, -7),
) -> VecEnv:
    """A VecEnv of fake environments whose episodes end at different steps."""

    def maker(rank: int) -> Callable[[], gym.Env]:
        own = [*lengths[rank % len(lengths) :], *lengths[: rank % len(lengths)]]
        return lambda: FakeEnv(OBSERVATION_SPACES[observation], ACTION_SPACES[action], own)

    envs = DummyVecEnv([maker(rank) for rank in range(n_envs)])
    envs.seed(seed)
    return envs


def pairs(*axes: Iterable[Any]) -> list[tuple[Any, ...]]:
    """Rows with a value of each axis, in which any two values of two axes are together at least once.

    They are far fewer than the product of all axes, and find what goes wrong with any value or any two of them.
    """
    values = [list(axis) for axis in axes]
    every = [tuple(enumerate(row)) for row in itertools.product(*(range(len(axis)) for axis in values))]
    together = {row: set(itertools.combinations(row, 2)) for row in every}
    missing, rows = set().union(*together.values()), []
    while missing:
        best = max(every, key=lambda row: len(together[row] & missing))  # the first of the best
        missing -= together[best]
        rows.append(tuple(values[axis][i] for axis, i in best))
    return rows


def spelled(value: Any) -> str:
    """The value as text for a test's name, without addresses: tests run in several processes have the same names."""
    return re.sub(r" at 0x[0-9a-f]+", "", str(value))


def silent(model: Any) -> Any:
    """The model with a logger that writes nowhere, for calling ``train`` without ``learn``."""
    model.set_logger(Logger(None, []))
    return model


@pytest.fixture(autouse=True)
def _seeded() -> None:
    np.random.seed(0)
    th.manual_seed(0)


@pytest.fixture
def double(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], Any]:
    """Let SB3's float64 policies work: its preprocessing gives them float32 observations."""
    original = policies.preprocess_obs
    monkeypatch.setattr(policies, "preprocess_obs", lambda *args, **kwargs: original(*args, **kwargs).double())
    return lambda policy: policy.double()

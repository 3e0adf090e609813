"""An environment that says where it is, for tests of how others step and reset it."""

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

VECTOR = spaces.Box(-np.inf, np.inf, (4,), np.float32)
SPACES: dict[str, spaces.Space] = {
    "vector": VECTOR,
    "float64": spaces.Box(-np.inf, np.inf, (4,), np.float64),
    "dict": spaces.Dict({"a": VECTOR, "b": spaces.Box(0, 255, (2, 2), np.uint8), "c": spaces.Discrete(50)}),
    "discrete": spaces.Discrete(50),
    "image": spaces.Box(0, 255, (1, 36, 36), np.uint8),
    "channels last": spaces.Box(0, 255, (36, 36, 1), np.uint8),
}


def seen_as(kind: str, which: int, episode: int, step: int, noise: float) -> Any:
    """Return what an environment shows of itself."""
    vector = np.array([which, episode, step, noise])
    numbers = (10 * episode + step) % 50
    return {
        "vector": vector.astype(np.float32),
        "float64": vector,
        "dict": {"a": vector.astype(np.float32), "b": np.full((2, 2), step, np.uint8), "c": numbers},
        "discrete": numbers,
        "image": np.full((1, 36, 36), numbers, np.uint8),
        "channels last": np.full((36, 36, 1), numbers, np.uint8),
    }[kind]


class CountingEnv(gym.Env):
    """Observes its number, episode and step, and a random number of the episode.

    Episodes take 2, 3, ... 6 steps in turn, each environment from another one on; every other is truncated, and some
    are truncated and terminated at once.

    :param which: the environment's number
    :param kind: of observations
    :param reuse: return observations and infos in the same memory at each step
    """

    metadata = {"render_modes": ["rgb_array"]}  # noqa: RUF012

    def __init__(
        self, which: int = 0, kind: str = "vector", action_space: spaces.Space | None = None, reuse: bool = False
    ) -> None:
        self.which, self.kind, self.reuse, self.episode, self.step_no = which, kind, reuse, -1, 0
        self.observation_space, self.render_mode = SPACES[kind], "rgb_array"
        self.action_space = action_space or spaces.Discrete(3)
        self.memory, self.words = np.zeros(4, np.float32), ["", ""]
        self.secret, self.actions = which * 10, []

    @property
    def length(self) -> int:
        return 2 + (self.episode + self.which) % 5

    def _observation(self) -> Any:
        observation = seen_as(self.kind, self.which, self.episode, self.step_no, self.noise)
        if self.reuse:
            self.memory[...] = observation
            return self.memory
        return observation

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.episode, self.step_no, self.noise = self.episode + 1, 0, float(self.np_random.random())
        return self._observation(), {"began": self.episode, **({"option": options["o"]} if options else {})}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        assert self.action_space.contains(action), action
        self.step_no += 1
        is_end, way = self.step_no >= self.length, self.episode % 4
        reward = self.step_no + 0.1 * self.which + float(np.sum(action)) / 7
        self.words[0] = f"{self.episode}.{self.step_no}"
        info: dict[str, Any] = {"words": self.words if self.reuse else list(self.words), "place": self.step_no / 3}
        if (self.step_no + self.which) % 2:
            info |= {"odd": np.arange(3) + self.step_no, "deep": {"er": self.step_no, "name": "x"}}
        return self._observation(), reward, is_end and way in (0, 2, 3), is_end and way in (1, 3), info

    def action_masks(self) -> np.ndarray:
        """Allow all actions but one, another one at each step."""
        return np.arange(3) != (self.which + self.step_no) % 3

    def double(self, x: int, plus: int = 0) -> int:
        return 2 * x + plus + self.which

    def render(self) -> np.ndarray:
        return np.full((4, 4, 3), self.which, np.uint8)

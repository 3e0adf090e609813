"""VecNormalize in place gives SB3's numbers to the bit, with many environments too."""

import numpy as np
import pytest
from gymnasium import spaces
from stable_baselines3.common import vec_env as sb3

from sb3_pg.common import vec_env as ours


class Random(sb3.DummyVecEnv):
    """The same random numbers for everybody."""

    def __init__(self, n, space):
        self.num_envs, self.observation_space, self.action_space = n, space, spaces.Discrete(2)
        self.random, self.render_mode = np.random.default_rng(n), None

    def get_attr(self, attr_name, indices=None):
        return [None] * self.num_envs

    def numbers(self):
        return (3 + 7 * self.random.normal(size=(self.num_envs, *self.observation_space.shape))).astype(
            self.observation_space.dtype
        )

    def reset(self):
        return self.numbers()

    def step_wait(self):
        dones = self.random.random(self.num_envs) < 0.1
        infos = [{"terminal_observation": self.numbers()[0]} if done else {} for done in dones]
        rewards = self.random.normal(size=self.num_envs).astype(np.float32) * 5
        return self.numbers(), rewards, dones, infos


@pytest.mark.parametrize("n", [1, 7, 8, 64, 1024])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int16])
@pytest.mark.parametrize("shape", [(17,), (2, 3), ()])
def test_numbers_are_those_of_sb3(n, dtype, shape):
    low, high = (-1000, 1000) if dtype == np.int16 else (-np.inf, np.inf)
    space = spaces.Box(low, high, shape, dtype)
    found, expected = (
        kind(Random(n, space), clip_obs=1.5, clip_reward=0.7) for kind in (ours.VecNormalize, sb3.VecNormalize)
    )
    np.testing.assert_array_equal(found.reset(), expected.reset())
    for _ in range(5):
        x, y = found.step(None), expected.step(None)
        for part, other in zip(x[:3], y[:3], strict=True):
            np.testing.assert_array_equal(part, other)
            assert part.dtype == other.dtype
        for info, other in zip(x[3], y[3], strict=True):
            np.testing.assert_array_equal(info.get("terminal_observation"), other.get("terminal_observation"))
        np.testing.assert_array_equal(found.get_original_obs(), expected.get_original_obs())
        np.testing.assert_array_equal(found.get_original_reward(), expected.get_original_reward())
    if n > 8:  # some are clipped
        assert np.abs(x[0]).max() == 1.5 and np.abs(x[1]).max() == np.float32(0.7)
    for name in ("obs_rms", "ret_rms"):
        for part in ("mean", "var", "count"):
            np.testing.assert_array_equal(getattr(getattr(found, name), part), getattr(getattr(expected, name), part))

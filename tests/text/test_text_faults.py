"""A reward function that fails once loses nothing."""

import numpy as np
import pytest
from text_models import count_a, letters_task, make
from tiny_models import ALGORITHMS, weights

from sb3_pg import REINFORCE
from sb3_pg.text import TextEnv, TextVecEnv

FAILURES = {
    "raises": (TimeoutError, lambda n: (_ for _ in ()).throw(TimeoutError("too slow"))),
    "ctrl-C": (KeyboardInterrupt, lambda n: (_ for _ in ()).throw(KeyboardInterrupt)),
    "None": (ValueError, lambda n: None),
    "words": (ValueError, lambda n: ["good"] * n),
    "short": (ValueError, lambda n: [0.0] * (n - 1)),
    "nan": (ValueError, lambda n: [0.0] * (n - 1) + [np.nan]),
    "1e300": (ValueError, lambda n: [1e300] * n),
}


class Reward:
    """Counts letters, but fails in one of its calls."""

    def __init__(self, failure, at):
        self.failure, self.at, self.calls = failure, at, 0

    def __call__(self, prompts, completions, references):
        self.calls += 1
        return self.failure(len(prompts)) if self.calls == self.at else count_a(prompts, completions, references)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("name", FAILURES)
def test_learning_goes_on(algorithm, name):
    error, failure = FAILURES[name]
    options = {"n_episodes": 8} if algorithm is REINFORCE else {}
    model = make("gpt2", algorithm, task=letters_task(reward=Reward(failure, 5)), **options)
    with pytest.raises(error) as caught:
        model.learn(400)
    if error is ValueError:
        assert "`reward`" in str(caught.value)
        assert "\n" not in str(caught.value)
    before = weights(model)
    assert np.isfinite(before).all()
    model.learn(104, reset_num_timesteps=False)
    after = weights(model)
    assert np.isfinite(after).all()
    assert np.abs(after - before).max() > 1e-6


def test_the_step_is_not_made():
    """The same actions again give what they would have given at once."""
    failure = FAILURES["raises"][1]
    task = letters_task(response_length=3)
    failing = letters_task(response_length=3, reward=Reward(failure, 1))
    envs = [TextVecEnv(task, 4, seed=1), TextVecEnv(failing, 4, seed=1)]
    for env in envs:
        env.reset()
    for step in range(6):
        actions = np.array([4, 5, task.end_token if step == 1 else 6, 4])
        expected = envs[0].step(actions)
        if step == 1:
            with pytest.raises(TimeoutError):
                envs[1].step(actions)
        found = envs[1].step(actions)
        for x, y in zip(expected[:3], found[:3], strict=True):
            np.testing.assert_array_equal(x, y)


def test_a_single_environment():
    env = TextEnv(letters_task(response_length=2, reward=Reward(FAILURES["None"][1], 1)))
    env.reset(seed=0)
    env.step(4)
    with pytest.raises(ValueError, match="returned None"):
        env.step(4)
    observation, reward, terminated, truncated, info = env.step(5)
    assert terminated
    assert not truncated
    assert info["completion"] == env.task.decode(observation[None, env.task.width :])[0]
    assert reward == count_a([""], [info["completion"]], [None])[0]

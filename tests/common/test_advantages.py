"""Returns, advantages and baselines against their definitions written as slow loops."""

import itertools

import numpy as np
import pytest
import torch as th
from conftest import ACTION_SPACES, OBSERVATION_SPACES, make_envs, silent
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from slow import (
    slow_advantages,
    slow_leave_one_out,
    slow_leave_one_out_within,
    slow_reward_to_go,
    slow_within_group,
)
from stable_baselines3.common import buffers as sb3_buffers

from sb3_pg import PPO
from sb3_pg.common.advantages import (
    discounted_sum,
    episode_numbers,
    generalized_advantage,
    leave_one_out,
    leave_one_out_within,
    moving_average,
    reward_to_go,
    within_group,
)
from sb3_pg.common.buffers import RolloutBuffer

fractions = st.floats(0.0, 1.0)
discounts = st.sampled_from([0.0, 0.5, 0.95, 0.99, 1.0]) | fractions


@st.composite
def rollouts(draw, max_steps=12):
    """Rewards, values and dones of (n_steps, n_envs), and the values after the last step."""
    shape = (draw(st.integers(1, max_steps)), draw(st.integers(1, 3)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    dones = draw(arrays(bool, shape))
    return rng.normal(size=shape), rng.normal(size=shape), dones, rng.normal(size=shape[1])


@given(rollouts(), discounts, discounts)
def test_advantages(rollout, gamma, gae_lambda):
    rewards, values, dones, last_values = rollout
    found = generalized_advantage(rewards, values, last_values, dones, gamma, gae_lambda)
    np.testing.assert_allclose(found, slow_advantages(*rollout, gamma, gae_lambda), atol=1e-12)


@given(rollouts(), discounts)
def test_reward_to_go(rollout, gamma):
    rewards, _, dones, _ = rollout
    np.testing.assert_allclose(
        reward_to_go(rewards, dones, gamma), slow_reward_to_go(rewards, dones, gamma), atol=1e-12
    )


@pytest.mark.parametrize("n_steps", [1, 2, 3, 4, 5])
def test_episode_ends_at_every_position(n_steps):
    """Every pattern of ends, where hypothesis only samples."""
    rng = np.random.default_rng(0)
    for pattern in itertools.product([False, True], repeat=n_steps):
        dones = np.array(pattern)[:, None]
        rewards, values, last = rng.normal(size=(n_steps, 1)), rng.normal(size=(n_steps, 1)), rng.normal(size=1)
        found = generalized_advantage(rewards, values, last, dones, 0.9, 0.8)
        np.testing.assert_allclose(found, slow_advantages(rewards, values, dones, last, 0.9, 0.8), atol=1e-12)
        np.testing.assert_allclose(
            reward_to_go(rewards, dones, 0.9), slow_reward_to_go(rewards, dones, 0.9), atol=1e-12
        )


@given(arrays(float, (17, 2), elements=fractions), arrays(float, (17, 2), elements=fractions))
def test_discounted_sum_solves_its_equation(x, discount):
    before = x.copy(), discount.copy()
    y = discounted_sum(x, discount)
    np.testing.assert_allclose(y[:-1], x[:-1] + discount[:-1] * y[1:], atol=1e-12)
    np.testing.assert_array_equal(y[-1], x[-1])
    np.testing.assert_array_equal((x, discount), before)  # the caller's arrays are left alone


def test_a_long_rollout_keeps_its_precision():
    rewards = np.ones((5000, 1), dtype=np.float32)
    returns = reward_to_go(rewards, np.zeros((5000, 1), dtype=bool), 0.999)
    np.testing.assert_allclose(returns[0], (1 - 0.999**5000) / (1 - 0.999), rtol=1e-12)


@settings(max_examples=50)
@given(rollouts(), discounts, discounts)
def test_buffer_equals_sb3(rollout, gamma, gae_lambda):
    rewards, values, dones, last_values = rollout
    n_steps, n_envs = rewards.shape
    space, action_space = OBSERVATION_SPACES["box"], ACTION_SPACES["discrete"]
    options = {"gamma": gamma, "gae_lambda": gae_lambda, "n_envs": n_envs, "device": "cpu"}
    ours, theirs = (
        kind(n_steps, space, action_space, **options) for kind in (RolloutBuffer, sb3_buffers.RolloutBuffer)
    )
    starts = np.concatenate([np.ones((1, n_envs)), dones[:-1]])
    for buffer in (ours, theirs):
        for t in range(n_steps):
            zeros = np.zeros((n_envs, 3)), np.zeros((n_envs, 1))
            buffer.add(*zeros, rewards[t], starts[t], th.tensor(values[t]), th.zeros(n_envs))
        buffer.compute_returns_and_advantage(th.tensor(last_values), dones[-1])
    np.testing.assert_allclose(ours.advantages, theirs.advantages, atol=1e-5)
    np.testing.assert_allclose(ours.returns, theirs.returns, atol=1e-5)


@pytest.mark.parametrize("n_envs", [1, 2, 3])
@pytest.mark.parametrize("lengths", [(1,), (-1,), (-2, 3), (5, -3, 1, -7), (-4,), (8,), (-9,), (100,)])
def test_truncated_episodes_are_completed_by_the_critic(lengths, n_envs):
    """A real rollout, with V of the terminal observation added where a time limit cut the episode."""
    env = make_envs(n_envs=n_envs, lengths=lengths)
    model = silent(PPO("MlpPolicy", env, n_steps=9, batch_size=9 * n_envs, gamma=0.9, gae_lambda=0.8))
    seen = []  # rewards, dones and infos as the environment gave them

    def remember(local_variables, _):
        seen.append(tuple(np.copy(local_variables[x]) for x in ("rewards", "dones", "infos")))
        return True

    _, callback = model._setup_learn(9, remember)
    model.collect_rollouts(env, callback, model.rollout_buffer, 9)

    def value(observations):
        with th.no_grad():
            return model.policy.predict_values(th.as_tensor(observations)).numpy().ravel()

    rewards, dones = (np.stack(x) for x in list(zip(*seen, strict=True))[:2])
    n_cut = 0
    for (t, (_, _, infos)), n in itertools.product(enumerate(seen), range(n_envs)):
        if dones[t, n] and infos[n]["TimeLimit.truncated"]:
            rewards[t, n] += 0.9 * value(infos[n]["terminal_observation"][None])[0]
            n_cut += 1
    assert n_cut or min(lengths) > 0
    buffer = model.rollout_buffer
    values = value(buffer.observations.reshape(-1, 3)).reshape(9, n_envs)
    expected = slow_advantages(rewards, values, dones, value(model._last_obs), 0.9, 0.8)
    np.testing.assert_allclose(buffer.advantages, expected, atol=1e-5)
    np.testing.assert_allclose(buffer.returns, expected + values, atol=1e-5)


# ------------------------------------------------------------------- episodes


@given(arrays(bool, st.tuples(st.integers(1, 9), st.integers(1, 3))))
def test_episode_numbers(dones):
    episode, step = episode_numbers(dones)
    for env in range(dones.shape[1]):
        number, age = 0, 0
        for t in range(len(dones)):
            assert (episode[t, env], step[t, env]) == (number, age)
            number, age = (number + 1, 0) if dones[t, env] else (number, age + 1)


@given(st.lists(st.lists(st.floats(-10, 10), min_size=1, max_size=6), min_size=1, max_size=5), st.randoms())
def test_leave_one_out(episodes, random):
    samples = [(x, i, t) for i, episode in enumerate(episodes) for t, x in enumerate(episode)]
    returns, number, step = map(np.array, zip(*samples, strict=True))
    order = list(range(len(samples)))
    random.shuffle(order)  # samples may come in any order: step by step from several environments
    baseline, fallback = leave_one_out(returns[order], number[order], step[order])
    expected, alone = map(np.array, slow_leave_one_out(episodes))
    np.testing.assert_allclose(baseline, expected[order], atol=1e-9)
    np.testing.assert_array_equal(fallback, alone[order])


def leave_one_out_of(*episodes):
    samples = [(x, i, t) for i, episode in enumerate(episodes) for t, x in enumerate(episode)]
    baseline, fallback = leave_one_out(*map(np.array, zip(*samples, strict=True)))
    return baseline.tolist(), fallback.tolist()


def test_leave_one_out_of_one_step_episodes_is_rloo():
    returns = [1.0, 2.0, 6.0]
    assert leave_one_out_of(*[[x] for x in returns])[0] == [4.0, 3.5, 1.5]


def test_leave_one_out_by_hand():
    baseline, fallback = leave_one_out_of([1.0, 2.0, 3.0], [5.0, 7.0])
    assert baseline == [5.0, 7.0, 6.0, 1.0, 2.0]  # the third step is alone: mean of all of 5 and 7
    assert fallback == [False, False, True, False, False]


def test_leave_one_out_of_a_single_episode_is_zero():
    assert leave_one_out_of([3.0, 4.0]) == ([0.0, 0.0], [True, True])


def test_leave_one_out_does_not_depend_on_its_own_return():
    """Otherwise the baseline would bias the gradient."""
    before, _ = leave_one_out_of([1.0, 2.0, 3.0], [5.0, 7.0])
    after, _ = leave_one_out_of([100.0, -200.0, 300.0], [5.0, 7.0])
    assert before[:3] == after[:3]


# --------------------------------------------------------------------- groups


episodes_in_groups = st.lists(
    st.tuples(st.lists(st.floats(-10, 10), min_size=1, max_size=6), st.integers(0, 2)), min_size=1, max_size=6
)


def samples_of(episodes, groups, random):
    """Group, return, episode and step of each sample, in any order, and that order."""
    samples = [(groups[i], x, i, t) for i, episode in enumerate(episodes) for t, x in enumerate(episode)]
    order = list(range(len(samples)))
    random.shuffle(order)
    return [np.array(x)[order] for x in zip(*samples, strict=True)], order


@given(episodes_in_groups, st.randoms())
def test_leave_one_out_within(given, random):
    episodes, groups = zip(*given, strict=True)
    samples, order = samples_of(episodes, groups, random)
    expected = np.array(slow_leave_one_out_within(episodes, groups))[order]
    np.testing.assert_allclose(leave_one_out_within(*samples), expected, atol=1e-9)


@given(episodes_in_groups, st.randoms())
def test_within_group(given, random):
    episodes, groups = zip(*given, strict=True)
    samples, order = samples_of(episodes, groups, random)
    for found, expected in zip(within_group(*samples), slow_within_group(episodes, groups), strict=True):
        np.testing.assert_allclose(found, np.array(expected)[order], atol=1e-6)


def test_within_group_by_hand():
    """An episode that has ended counts with its last return; one that is alone deviates from nothing."""
    episodes, groups = [[1.0, 4.0, 6.0], [3.0], [7.0, 7.0]], [0, 0, 5]
    samples = [(groups[i], x, i, t) for i, episode in enumerate(episodes) for t, x in enumerate(episode)]
    mean, deviation = within_group(*map(np.array, zip(*samples, strict=True)))
    np.testing.assert_allclose(mean, [2.0, 3.5, 4.5, 2.0, 7.0, 7.0])
    np.testing.assert_allclose(deviation, np.sqrt([2.0, 0.5, 4.5, 2.0, 0.0, 0.0]))
    np.testing.assert_allclose(
        leave_one_out_within(*map(np.array, zip(*samples, strict=True))), [3.0, 3.0, 3.0, 1.0, 0.0, 0.0]
    )


def test_moving_average():
    assert moving_average(None, 2.0, 0.9) == 2.0
    assert moving_average(1.0, 2.0, 0.9) == pytest.approx(1.1)
    assert moving_average(1.0, 2.0, 0.0) == 2.0


def test_integer_actions_keep_their_fraction():
    """SB3's buffer truncates what a Gaussian sampled for an integer Box, and so changes its log-probability."""
    space = spaces.Box(-5, 5, (1,), np.int64)
    buffer = RolloutBuffer(1, OBSERVATION_SPACES["box"], space, device="cpu")
    buffer.add(np.zeros((1, 3)), np.array([[1.7]]), np.zeros(1), np.zeros(1), th.zeros(1), th.zeros(1))
    assert buffer.actions[0, 0, 0] == np.float32(1.7)


@pytest.mark.parametrize("size", [2, 3, 6, 7, 10])
def test_equal_returns_differ_from_their_group_by_nothing(size):
    """Not by rounding, either: 0.1 + 0.1 + 0.1 is not 3 times 0.1."""
    episode = np.arange(2 * size)
    group, returns = episode % 2, np.where(episode % 2, 0.1, 1 / 3)
    mean, deviation = within_group(group, returns, episode, np.zeros_like(episode))
    np.testing.assert_array_equal(mean, returns)
    np.testing.assert_array_equal(deviation, 0.0)
    np.testing.assert_array_equal(leave_one_out_within(group, returns, episode, np.zeros_like(episode)), returns)

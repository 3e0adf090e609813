"""Advantages and baselines as their definitions say, in slow loops."""

import itertools

import numpy as np


def slow_advantages(rewards, values, dones, last_values, gamma, gae_lambda):
    """The sum of discounted TD errors up to the episode's end, for every step on its own."""
    n_steps, n_envs = rewards.shape
    advantages = np.zeros((n_steps, n_envs))
    for start, env in itertools.product(range(n_steps), range(n_envs)):
        weight = 1.0
        for t in range(start, n_steps):
            next_value = values[t + 1, env] if t + 1 < n_steps else last_values[env]
            if dones[t, env]:
                next_value = 0.0
            advantages[start, env] += weight * (rewards[t, env] + gamma * next_value - values[t, env])
            weight *= gamma * gae_lambda
            if dones[t, env]:
                break
    return advantages


def slow_reward_to_go(rewards, dones, gamma):
    returns = np.zeros(rewards.shape)
    for start, env in itertools.product(*map(range, rewards.shape)):
        for t in range(start, len(rewards)):
            returns[start, env] += gamma ** (t - start) * rewards[t, env]
            if dones[t, env]:
                break
    return returns


def slow_leave_one_out(episodes):
    """The baseline of every step of every episode, each a list of returns-to-go; and where the fallback was used."""
    baselines, alone = [], []
    for i, own in enumerate(episodes):
        others = [episode for j, episode in enumerate(episodes) if j != i]
        for t in range(len(own)):
            running = [episode[t] for episode in others if len(episode) > t]
            anything = [x for episode in others for x in episode]
            baselines.append(np.mean(running or anything or [0.0]))
            alone.append(not running)
    return baselines, alone


def held(episode, t):
    """An episode's return-to-go at a step, after its end the last one."""
    return episode[min(t, len(episode) - 1)]


def slow_leave_one_out_within(episodes, groups):
    """The baseline of every step of every episode: the mean of the others of its group; 0 where there are none."""
    baselines = []
    for i, own in enumerate(episodes):
        others = [x for j, x in enumerate(episodes) if j != i and groups[j] == groups[i]]
        baselines += [np.mean([held(x, t) for x in others]) if others else 0.0 for t in range(len(own))]
    return baselines


def slow_within_group(episodes, groups):
    """Mean and standard deviation of every step of every episode in its group, the episode itself included."""
    means, deviations = [], []
    for i, own in enumerate(episodes):
        alike = [x for j, x in enumerate(episodes) if groups[j] == groups[i]]
        for t in range(len(own)):
            numbers = [held(x, t) for x in alike]
            means.append(np.mean(numbers))
            deviations.append(np.std(numbers, ddof=1) if len(numbers) > 1 else 0.0)
    return means, deviations

"""The closed-form engine against the autograd engine on the same policy."""

import copy
import itertools

import numpy as np
import pytest
import torch as th
from conftest import ACTION_SPACES, OBSERVATION_SPACES, FakeEnv, make_envs, silent
from engine_cases import (
    N,
    assert_same,
    assert_same_gradients,
    both,
    close,
    draw,
    gradients,
    make_batch,
    make_policy,
    natural_gradient,
    outputs_and_gradients,
)
from gymnasium import spaces
from tiny_models import BOX_OPTIONS, tiny, weights
from torch import nn

from sb3_pg import PPO, REINFORCE, TRPO
from sb3_pg.common.engines.autograd import AutogradEngine
from sb3_pg.common.engines.choice import make_engine
from sb3_pg.common.engines.closed_form import ClosedFormEngine
from sb3_pg.common.engines.protocol import Seen

ACTIVATIONS = {
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
    "elu": lambda: nn.ELU(0.7),
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU("tanh"),
    "leaky_relu": lambda: nn.LeakyReLU(0.1),
}

ARCHITECTURES = {
    "linear": [],
    "one": [5],
    "two": [6, 4],
    "three": [5, 4, 6],
    "separate": {"pi": [4], "vf": [7, 3]},
    "linear_critic": {"pi": [4]},
}


# ---------------------------------------------------------------- the same numbers


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("action", ACTION_SPACES)
def test_agrees_with_autograd(action, activation, architecture, double):
    kwargs = {"activation_fn": ACTIVATIONS[activation], "net_arch": ARCHITECTURES[architecture]}
    policy = double(make_policy(action, **kwargs))
    assert_same(*both(policy), *draw(policy))


@pytest.mark.parametrize("options", BOX_OPTIONS)
def test_agrees_on_every_distribution_of_box_actions(options, double):
    policy = double(make_policy("box", **BOX_OPTIONS[options]))
    assert_same(*both(policy), *draw(policy), tolerance=1e-8)


OBSERVATIONS = [
    *("discrete", "multidiscrete", "multibinary", "float64", "box", "image"),
    spaces.Box(-1, 1, (2, 3)),
    spaces.Box(-10, 10, (3,), np.int16),
    spaces.Box(0, 3, (4,), np.uint8),  # not an image, so not divided by 255
]


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("observation", OBSERVATIONS, ids=str)
def test_agrees_on_every_observation_space(observation, shared):
    policy = make_policy("discrete", observation, share_features_extractor=shared)
    observations, actions = draw(policy)
    closed, autograd = both(policy)
    assert_same(closed, autograd, observations, actions, tolerance=2e-4)
    close(closed.actor_net(closed.encode(observations)), logits(policy, observations), 1e-5)


def logits(policy, observations):
    with th.no_grad():
        features = policy.extract_features(th.as_tensor(observations))
        features = features if policy.share_features_extractor else features[0]
        return policy.action_net(policy.mlp_extractor.forward_actor(features))


def test_judges_long_rollouts_in_chunks(monkeypatch):
    policy = make_policy("multidiscrete", "discrete")
    engine = make_engine(policy)
    observations, actions = draw(policy)
    values, log_probs = engine.judge_rows(observations, actions)
    monkeypatch.setattr("sb3_pg.common.engines.closed_form._CHUNK_ROWS", 4)
    for found, expected in zip(engine.judge_rows(observations, actions), (values, log_probs), strict=True):
        close(found, expected, 1e-5)


@pytest.mark.parametrize("action", ACTION_SPACES)
def test_a_trust_region_step_in_parts_is_that_of_the_whole(action, double, monkeypatch):
    policy = double(make_policy(action))
    engine, (observations, actions) = make_engine(policy), draw(policy)
    whole = natural_gradient(engine, observations, actions)
    monkeypatch.setattr("sb3_pg.common.engines.closed_form._CHUNK_ROWS", 4)
    for found, expected in zip(natural_gradient(engine, observations, actions), whole, strict=True):
        close(found, expected)


@pytest.mark.parametrize("normalize_images", [True, False])
def test_images_are_scaled_as_the_policy_scales_them(normalize_images):
    policy = make_policy("box", "image", normalize_images=normalize_images)
    observations, _ = draw(policy)
    closed, autograd = both(policy)
    close(closed.row_values(observations), autograd.row_values(observations), 1e-3)


@pytest.mark.parametrize("action", ACTION_SPACES)
def test_critic_alone_and_actor_alone(action, double):
    policy = double(make_policy(action))
    observations, actions = draw(policy)
    found = []
    for engine in both(policy):
        batch = make_batch(engine, observations, actions)
        d = N * engine.asarray(np.linspace(-1.0, 1.0, N))
        alone = engine.evaluate_critic(batch)
        assert not hasattr(alone, "log_prob")
        assert not hasattr(alone, "entropy")
        alone.backward(d_value=d)
        critic = gradients(policy)
        engine.evaluate(batch).backward(d_value=d)
        again = gradients(policy)
        engine.evaluate(batch).backward(d)
        found.append((critic, again, gradients(policy), {"value": alone.value}))
    for x, y in zip(*found, strict=True):
        assert_same_gradients(x, y)
    assert all((gradient is None) != (found[0][2][name] is None) for name, gradient in found[0][0].items())
    assert_same_gradients(found[0][0], found[0][1])


@pytest.mark.parametrize("engine", ["auto", "autograd"])
def test_a_critic_evaluated_alone_moves_no_actor(engine):
    policy = make_policy()
    engine = make_engine(policy, engine)
    with pytest.raises(AssertionError, match="only the critic was evaluated"):
        engine.evaluate_critic(make_batch(engine, *draw(policy))).backward(engine.asarray(np.ones(N, np.float32)))


@pytest.mark.parametrize("max_grad_norm", [None, 1e-3, 0.5, 1e6])
@pytest.mark.parametrize("hold_actor", [False, True])
def test_step_clips_as_sb3_does(max_grad_norm, hold_actor, double):
    norms, policies_after = [], []
    start = double(make_policy(optimizer_class=th.optim.SGD))
    observations, actions = draw(start)
    for engine in ("auto", "autograd"):
        policy = copy.deepcopy(start)
        network = make_engine(policy, engine)
        outputs_and_gradients(network, observations, actions, 0.1)
        actor = network.actor(make_batch(network, observations, actions))
        if hold_actor:
            before, d_value = actor.vector, network.asarray(np.random.default_rng(3).normal(size=N))
            network.evaluate(make_batch(network, observations, actions)).backward(d_value=N * d_value)
        norms.append(network.step(max_grad_norm, 1))
        assert not hold_actor or (actor.vector == before).all()
        policies_after.append(policy.state_dict())
    close(*norms)
    for x, y in zip(*(p.values() for p in policies_after), strict=True):
        close(x, y)


def test_a_gradient_that_is_not_finite_moves_nothing():
    policy = make_policy()
    engine = make_engine(policy)
    before = copy.deepcopy(policy.state_dict())
    engine.evaluate(make_batch(engine, *draw(policy))).backward(np.full(N, np.nan), 0.0, np.ones(N))
    assert np.isnan(engine.step(0.5, 1))
    for x, y in zip(policy.state_dict().values(), before.values(), strict=True):
        assert th.equal(x, y)


@pytest.mark.parametrize("action", ACTION_SPACES)
def test_strict_floating_point_of_the_caller(action):
    policy = make_policy(action, activation_fn=nn.SiLU)
    with th.no_grad():
        policy.action_net.weight *= 1e4
    observations, actions = draw(policy)
    engine = make_engine(policy)
    with np.errstate(all="raise"):
        engine.act(Seen(observations))
        outputs_and_gradients(engine, observations, actions, 0.1)
        natural_gradient(engine, observations, actions)
        engine.judge_rows(observations, actions)
        engine.row_values(observations)


def test_strict_floating_point_while_acting():
    policy = make_policy("box")
    with th.no_grad():
        policy.log_std.fill_(-120.0)  # whose exponential underflows
    engine = make_engine(policy)
    with np.errstate(all="raise"):
        engine.refresh()
        engine.act(Seen(draw(policy)[0]))


@pytest.mark.parametrize("kind", [PPO, TRPO, REINFORCE])
def test_strict_floating_point_while_learning(kind):
    """Ratios of small deviations underflow; without numbers that are strict, the same is learned."""
    found = []
    for errors in ("raise", "ignore"):
        options = {"learning_rate": 0.3, "policy_kwargs": {"log_std_init": -4}}
        with np.errstate(all=errors):
            found.append(
                weights(tiny(kind, FakeEnv(OBSERVATION_SPACES["box"], ACTION_SPACES["box"]), **options).learn(64))
            )
    assert np.array_equal(*found)


def test_strict_floating_point_while_predicting():
    policy = make_policy("box", distribution="squashed_gaussian", deterministic_action="mean", log_std_init=0.1)
    with th.no_grad():
        policy.action_net.bias += 20
    x = draw(policy)[0]
    expected, _ = policy.predict(x, deterministic=True)
    with np.errstate(all="raise"):
        np.testing.assert_allclose(policy.predict(x, deterministic=True)[0], expected, rtol=1e-5, atol=1e-6)
        policy.predict(x)


# ---------------------------------------------------------------- whole updates


class Replacing(th.optim.SGD):
    """An optimizer that puts new memory under the parameters."""

    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            if p.grad is not None:
                p.data = p.data - 0.01 * p.grad


OPTIMIZERS = {
    "adam": {},
    "amsgrad": {"optimizer_kwargs": {"amsgrad": True}},
    "adamw": {"optimizer_class": th.optim.AdamW},
    "sgd": {"optimizer_class": th.optim.SGD, "optimizer_kwargs": {"momentum": 0.9, "weight_decay": 0.01}},
    "rmsprop": {"optimizer_class": th.optim.RMSprop},
    "replacing": {"optimizer_class": Replacing},
    "adam_foreach": {"optimizer_kwargs": {"foreach": True, "maximize": False}},
}

ALGORITHMS = {
    "ppo": lambda **kw: PPO(n_steps=16, batch_size=8, n_epochs=3, ent_coef=0.01, **kw),
    "ppo_stopping": lambda **kw: PPO(n_steps=16, batch_size=8, n_epochs=3, target_kl=0.005, **kw),
    "trpo": lambda **kw: TRPO(n_steps=16, batch_size=8, n_critic_updates=2, ent_coef=0.01, **kw),
    "reinforce": lambda **kw: REINFORCE(n_episodes=4, batch_size=8, **kw),
}


def updated(make, engine, action, **policy_kwargs):
    """The policy after one rollout, the same for all engines, and one update."""
    policy_kwargs = {"net_arch": [8, 8], **policy_kwargs}
    envs = make_envs(action=action, n_envs=2)
    model = silent(
        make(policy="MlpPolicy", env=envs, seed=1, learning_rate=1e-3, policy_kwargs=policy_kwargs, engine="autograd")
    )
    _, callback = model._setup_learn(1000)
    model.collect_rollouts(model.env, callback, model.rollout_buffer, model.n_steps)
    model.engine, model._network = engine, None
    expected = ClosedFormEngine if engine == "auto" else AutogradEngine
    assert type(model.network) is expected
    np.random.seed(5)
    model.train()
    return model


def assert_same_update(make, action, **policy_kwargs):
    closed, autograd = (updated(make, engine, action, **policy_kwargs) for engine in ("auto", "autograd"))
    for name, x in autograd.policy.state_dict().items():
        close(closed.policy.state_dict()[name], x, 1e-5)
    found, expected = closed.logger.name_to_value, autograd.logger.name_to_value
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        assert found[name] == (x if isinstance(x, str) else pytest.approx(x, rel=1e-3, abs=1e-5)), name


@pytest.mark.parametrize("action", ACTION_SPACES)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_one_update_is_the_same(algorithm, action):
    assert_same_update(ALGORITHMS[algorithm], action)


@pytest.mark.parametrize("options", BOX_OPTIONS)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_one_update_is_the_same_of_every_distribution(algorithm, options):
    assert_same_update(ALGORITHMS[algorithm], "box", **BOX_OPTIONS[options])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_works(optimizer):
    assert_same_update(ALGORITHMS["ppo"], "box", **OPTIMIZERS[optimizer])
    assert_same_update(ALGORITHMS["reinforce"], "box", **OPTIMIZERS[optimizer])


@pytest.mark.parametrize("observation", ["box", "discrete", "multidiscrete", "multibinary", "float64"])
@pytest.mark.parametrize("action", ACTION_SPACES)
def test_learns_on_every_space(observation, action):
    model = PPO("MlpPolicy", make_envs(observation, action, n_envs=2), n_steps=8, batch_size=8, n_epochs=1, seed=0)
    assert type(model.network) is ClosedFormEngine
    model.learn(32)


# ---------------------------------------------------------------- sampling


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("action", ACTION_SPACES)
def test_actions_have_their_shape_and_type(action, n):
    policy = make_policy(action)
    engine = make_engine(policy)
    for _ in range(100):  # more than one block of noise
        actions, values, log_probs, _ = engine.act(Seen(draw(policy, n)[0]))
        assert values is None
        assert log_probs is None
        assert actions.shape == (n, *policy.action_space.shape)
        assert actions.dtype == (np.int64 if "discrete" in action else np.float32)
        if action != "box":
            assert all(policy.action_space.contains(x) for x in actions)


@pytest.mark.parametrize("n", [1, 500])
@pytest.mark.parametrize("action", ACTION_SPACES)
def test_actions_follow_the_distribution(action, n):
    policy = make_policy(action)
    engine = make_engine(policy)
    row = draw(policy, 1)[0]
    samples = np.concatenate([engine.act(Seen(row.repeat(n, axis=0))).actions for _ in range(20_000 // n)])
    samples = samples.reshape(len(samples), -1)
    distribution = policy.get_distribution(th.as_tensor(row))
    if action == "box":
        z = (samples - distribution.distribution.mean.detach().numpy()) / distribution.distribution.stddev[0].tolist()
        assert (abs(z.mean(axis=0)) < 4 / np.sqrt(len(z))).all()
        assert np.allclose(np.cov(z.T), np.eye(2), atol=0.05)
        assert abs((abs(z) < 1).mean() - 0.6827) < 0.015
        return
    sizes = [3] if action == "discrete" else [2, 4] if action == "multidiscrete" else [2, 2, 2]
    for option in itertools.product(*map(range, sizes)):
        a = th.tensor(option if action == "discrete" else [option])
        p = distribution.log_prob(a.float()).exp().item()
        frequency = (samples == np.array(option)).all(axis=1).mean()
        assert abs(frequency - p) < 4 * np.sqrt(p * (1 - p) / len(samples)) + 1e-4


def test_the_same_seed_gives_the_same_run():
    def run(model):
        model.set_random_seed(3)
        model.env.seed(3)
        model._last_obs = None
        model.learn(64)
        return model.rollout_buffer.actions.copy(), model.policy.state_dict()

    first, second = (
        run(PPO("MlpPolicy", make_envs(n_envs=2), n_steps=16, batch_size=16, seed=seed)) for seed in (3, 3)
    )
    np.testing.assert_array_equal(first[0], second[0])
    for x, y in zip(first[1].values(), second[1].values(), strict=True):
        assert th.equal(x, y)


@pytest.mark.parametrize("action", [*ACTION_SPACES, *BOX_OPTIONS])
@pytest.mark.parametrize("n_rows", [1, 3, 20])
def test_the_same_seed_gives_the_actions_of_sb3s_policy(action, n_rows):
    policy = make_policy("box", **BOX_OPTIONS[action]) if action in BOX_OPTIONS else make_policy(action)
    engine = make_engine(policy)
    for _ in range(5):
        observations = draw(policy, n_rows)[0]
        th.manual_seed(7)
        actions = engine.act(Seen(observations)).actions
        th.manual_seed(7)
        expected = policy(policy.obs_to_tensor(observations)[0])[0]
        np.testing.assert_allclose(actions, expected.detach().numpy(), rtol=1e-5, atol=1e-6)

"""The closed-form network against the autograd network on the same policy, and when it may not be used."""

import copy
import io
import itertools
import pickle
from types import MethodType

import numpy as np
import pytest
import torch as th
from conftest import ACTION_SPACES, OBSERVATION_SPACES, make_envs, silent
from gymnasium import spaces
from stable_baselines3.common import policies
from stable_baselines3.common.policies import ActorCriticCnnPolicy, ActorCriticPolicy
from torch import nn

from sb3_pg import PPO, REINFORCE, TRPO
from sb3_pg.common.networks import AutogradNetwork, ClosedFormNetwork, make_network
from sb3_pg.common.networks.adam import QuickAdam
from sb3_pg.common.networks.autograd import use_fused_adam

N = 9  # rows

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


def make_policy(action="box", observation="box", **kwargs):
    """A policy whose outputs are far from zero, so that nothing agrees by accident."""
    space = OBSERVATION_SPACES[observation] if isinstance(observation, str) else observation
    policy = ActorCriticPolicy(space, ACTION_SPACES[action], lambda _: 1e-2, **{"net_arch": [8, 8], **kwargs})
    with th.no_grad():
        for p in policy.parameters():
            p.copy_(0.5 * th.randn_like(p))
    return policy


@pytest.fixture
def double(monkeypatch):
    """Let SB3's float64 policies work: its preprocessing gives them float32 observations."""
    original = policies.preprocess_obs
    monkeypatch.setattr(policies, "preprocess_obs", lambda *args, **kwargs: original(*args, **kwargs).double())
    return lambda policy: policy.double()


def draw(policy, n=N):
    """Recorded observations and actions, as a rollout buffer holds them."""
    rng = np.random.default_rng(1)
    policy.observation_space.seed(2)
    observations = np.stack([np.reshape(policy.observation_space.sample(), (-1,)) for _ in range(n)])
    observations = observations.reshape(n, *(policy.observation_space.shape or (1,)))
    space = policy.action_space
    if isinstance(space, spaces.Box):
        return observations, rng.normal(size=(n, 2)).astype(np.float32)
    sizes = {spaces.Discrete: lambda: [space.n], spaces.MultiDiscrete: lambda: space.nvec}
    sizes = sizes.get(type(space), lambda: [2] * space.n)()
    return observations, rng.integers(sizes, size=(n, len(sizes)))


def close(found, expected, tolerance=1e-10):
    found, expected = (np.asarray(x.detach() if isinstance(x, th.Tensor) else x) for x in (found, expected))
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)


def gradients(policy):
    return {name: None if p.grad is None else p.grad.clone() for name, p in policy.named_parameters()}


def assert_same_gradients(found, expected, tolerance=1e-10):
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (found[name] is None) == (gradient is None), name
        if gradient is not None:
            close(found[name], gradient, tolerance)


def both(policy):
    """The closed-form and the autograd network of a policy."""
    networks = make_network(policy), make_network(policy, "autograd")
    assert [type(network) for network in networks] == [ClosedFormNetwork, AutogradNetwork], networks[0].description
    return networks


def arrays(network, observations, actions):
    """A minibatch in the network's arrays, all of the policy's precision."""
    o, a = network.asarray(observations), network.actions(actions)
    return o, a.to(network.policy.value_net.weight.dtype) if isinstance(a, th.Tensor) and a.is_floating_point() else a


def outputs_and_gradients(network, observations, actions, d_entropy):
    """What a network makes of a minibatch."""
    rng = np.random.default_rng(3)
    d_log_prob, d_value = (network.asarray(rng.normal(size=len(observations))) for _ in range(2))
    o, a = arrays(network, observations, actions)
    outputs = network.evaluate(o, a)
    network.backward(d_log_prob, d_entropy, d_value)
    return outputs, gradients(network.policy)


def assert_same(closed, autograd, observations, actions, tolerance=1e-10):
    """Every answer of the two networks is the same."""
    for d_entropy in (0.0, None, -0.3):
        found, its = outputs_and_gradients(closed, observations, actions, d_entropy)
        expected, gradient = outputs_and_gradients(autograd, observations, actions, d_entropy)
        for x, y in zip(found, expected, strict=True):
            close(x, y, tolerance)
        assert_same_gradients(its, gradient, tolerance)
    for x, y in zip(closed.judge(observations, actions), autograd.judge(observations, actions), strict=True):
        assert x.dtype == np.float32
        close(x, y, 1e-5)
    close(closed.values(observations), autograd.values(observations), 1e-5)
    natural = [natural_gradient(network, observations, actions) for network in (closed, autograd)]
    for x, y in zip(*natural, strict=True):
        close(x, y, tolerance)


def natural_gradient(network, observations, actions):
    """Everything that a trust-region step asks for."""
    o, a = arrays(network, observations, actions)
    d_log_prob = network.asarray(np.random.default_rng(4).normal(size=len(observations)))
    network.refresh()
    network.find_actor(o, a)
    gradient = network.actor_gradient(o, a, d_log_prob, -0.2)
    assert all(p.grad is None for p in network.policy.parameters())
    old = network.get_actor()
    log_prob, entropy, before = network.actor(o, a)
    direction = network.asarray(np.random.default_rng(5).normal(size=len(old)))
    product = network.fisher(o)
    products = [product(direction), product(direction - 0.5 * old)]
    network.set_actor(old + 0.1 * direction)
    after = network.actor(o, a)
    kl, back = network.kl(before, after[2]), network.kl(after[2], before)
    network.set_actor(old)
    assert (network.kl(before, network.actor(o, a)[2]) == 0).all()
    return [gradient, old, log_prob, entropy, *products, *after[:2], kl, back]


# ---------------------------------------------------------------- the same numbers


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("action", ACTION_SPACES)
def test_agrees_with_autograd(action, activation, architecture, double):
    kwargs = {"activation_fn": ACTIVATIONS[activation], "net_arch": ARCHITECTURES[architecture]}
    policy = double(make_policy(action, **kwargs))
    assert_same(*both(policy), *draw(policy))


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
    close(closed._actor(closed._encode(observations)), logits(policy, observations), 1e-5)


def logits(policy, observations):
    with th.no_grad():
        features = policy.extract_features(th.as_tensor(observations))
        features = features if policy.share_features_extractor else features[0]
        return policy.action_net(policy.mlp_extractor.forward_actor(features))


def test_judges_long_rollouts_in_chunks(monkeypatch):
    policy = make_policy("multidiscrete", "discrete")
    network = make_network(policy)
    observations, actions = draw(policy)
    values, log_probs = network.judge(observations, actions)
    monkeypatch.setattr("sb3_pg.common.networks.closed_form._CHUNK_ROWS", 4)
    for found, expected in zip(network.judge(observations, actions), (values, log_probs), strict=True):
        close(found, expected, 1e-5)


@pytest.mark.parametrize("normalize_images", [True, False])
def test_images_are_scaled_as_the_policy_scales_them(normalize_images):
    policy = make_policy("box", "image", normalize_images=normalize_images)
    observations, _ = draw(policy)
    closed, autograd = both(policy)
    close(closed.values(observations), autograd.values(observations), 1e-3)


@pytest.mark.parametrize("action", ACTION_SPACES)
def test_critic_alone_and_actor_alone(action, double):
    policy = double(make_policy(action))
    observations, actions = draw(policy)
    found = []
    for network in both(policy):
        o, a = arrays(network, observations, actions)
        d = network.asarray(np.linspace(-1.0, 1.0, N))
        log_prob, entropy, value = network.evaluate(o, None)
        assert log_prob is None
        assert entropy is None
        network.backward(None, None, d)
        critic = gradients(policy)
        network.evaluate(o, a)
        network.backward(None, None, d)
        again = gradients(policy)
        network.evaluate(o, a)
        network.backward(d, None, None)
        found.append((critic, again, gradients(policy), {"value": value}))
    for x, y in zip(*found, strict=True):
        assert_same_gradients(x, y)
    assert all((gradient is None) != (found[0][2][name] is None) for name, gradient in found[0][0].items())


@pytest.mark.parametrize("max_grad_norm", [None, 1e-3, 0.5, 1e6])
@pytest.mark.parametrize("hold_actor", [False, True])
def test_step_clips_as_sb3_does(max_grad_norm, hold_actor, double):
    norms, policies_after = [], []
    start = double(make_policy(optimizer_class=th.optim.SGD))
    observations, actions = draw(start)
    for engine in ("auto", "autograd"):
        policy = copy.deepcopy(start)
        network = make_network(policy, engine)
        network.find_actor(network.asarray(observations), network.actions(actions))
        outputs_and_gradients(network, observations, actions, 0.1)
        norms.append(network.step(max_grad_norm, hold_actor=hold_actor))
        policies_after.append(policy.state_dict())
    close(*norms)
    for x, y in zip(*(p.values() for p in policies_after), strict=True):
        close(x, y)


def test_a_gradient_that_is_not_finite_moves_nothing():
    policy = make_policy()
    network = make_network(policy)
    before = copy.deepcopy(policy.state_dict())
    observations, actions = draw(policy)
    network.evaluate(network.asarray(observations), network.actions(actions))
    network.backward(np.full(N, np.nan), 0.0, np.ones(N))
    assert np.isnan(network.step(0.5))
    for x, y in zip(policy.state_dict().values(), before.values(), strict=True):
        assert th.equal(x, y)


@pytest.mark.parametrize("action", ACTION_SPACES)
def test_strict_floating_point_of_the_caller(action):
    policy = make_policy(action, activation_fn=nn.SiLU)
    with th.no_grad():
        policy.action_net.weight *= 1e4
    observations, actions = draw(policy)
    network = make_network(policy)
    with np.errstate(all="raise"):
        network.act(observations)
        outputs_and_gradients(network, observations, actions, 0.1)
        natural_gradient(network, observations, actions)
        network.judge(observations, actions)


def test_strict_floating_point_while_acting():
    policy = make_policy("box")
    with th.no_grad():
        policy.log_std.fill_(-120.0)  # whose exponential underflows
    network = make_network(policy)
    with np.errstate(all="raise"):
        network.refresh()
        network.act(draw(policy)[0])


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
    expected = ClosedFormNetwork if engine == "auto" else AutogradNetwork
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


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_works(optimizer):
    assert_same_update(ALGORITHMS["ppo"], "box", **OPTIMIZERS[optimizer])
    assert_same_update(ALGORITHMS["reinforce"], "box", **OPTIMIZERS[optimizer])


@pytest.mark.parametrize("observation", ["box", "discrete", "multidiscrete", "multibinary", "float64"])
@pytest.mark.parametrize("action", ACTION_SPACES)
def test_learns_on_every_space(observation, action):
    model = PPO("MlpPolicy", make_envs(observation, action, n_envs=2), n_steps=8, batch_size=8, n_epochs=1, seed=0)
    assert type(model.network) is ClosedFormNetwork
    model.learn(32)


# ---------------------------------------------------------------- sampling


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("action", ACTION_SPACES)
def test_actions_have_their_shape_and_type(action, n):
    policy = make_policy(action)
    network = make_network(policy)
    for _ in range(100):  # more than one block of noise
        actions, known = network.act(draw(policy, n)[0])
        assert known is None
        assert actions.shape == (n, *policy.action_space.shape)
        assert actions.dtype == (np.int64 if "discrete" in action else np.float32)
        if action != "box":
            assert all(policy.action_space.contains(x) for x in actions)


@pytest.mark.parametrize("n", [1, 500])
@pytest.mark.parametrize("action", ACTION_SPACES)
def test_actions_follow_the_distribution(action, n):
    policy = make_policy(action)
    network = make_network(policy)
    row = draw(policy, 1)[0]
    samples = np.concatenate([network.act(row.repeat(n, axis=0))[0] for _ in range(20_000 // n)])
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


@pytest.mark.parametrize("action", ACTION_SPACES)
@pytest.mark.parametrize("n_rows", [1, 3, 20])
def test_the_same_seed_gives_the_actions_of_sb3s_policy(action, n_rows):
    policy = make_policy(action=action)
    network = make_network(policy)
    for _ in range(5):
        observations = draw(policy, n_rows)[0]
        th.manual_seed(7)
        actions, _ = network.act(observations)
        th.manual_seed(7)
        expected = policy(policy.obs_to_tensor(observations)[0])[0]
        np.testing.assert_allclose(actions, expected.detach().numpy(), atol=1e-6)


# ---------------------------------------------------------------- nothing stale


def assert_current(network):
    """The network, refreshed, computes what its policy now computes."""
    network.refresh()
    policy = network.policy
    observations, actions = draw(policy)
    assert_same(network, make_network(policy, "autograd"), observations, actions, tolerance=2e-4)
    before = copy.deepcopy(policy.state_dict())
    outputs_and_gradients(network, observations, actions, 0.1)
    network.step(0.5)
    assert all(not th.equal(x, before[name]) for name, x in policy.state_dict().items())


def scramble(state_dict):
    return {name: x + 0.3 * th.randn_like(x) for name, x in state_dict.items()}


CHANGES = {
    "load_state_dict": lambda policy: policy.load_state_dict(scramble(policy.state_dict())),
    "assigned": lambda policy: policy.load_state_dict(scramble(policy.state_dict()), assign=True),
    "data": lambda policy: [setattr(p, "data", 2.0 * p.data) for p in policy.parameters()],
    "in_place": lambda policy: [p.data.mul_(2.0) for p in policy.parameters()],
    "vector": lambda policy: policy.load_from_vector(np.linspace(-1, 1, len(policy.parameters_to_vector()))),
    "deeper": lambda policy: policy.mlp_extractor.policy_net.extend([nn.Linear(8, 8), nn.ReLU()]),
    "activation": lambda policy: policy.mlp_extractor.value_net.__setitem__(1, nn.ELU()),
    "head": lambda policy: setattr(policy, "action_net", nn.Linear(8, 2)),
    "weight": lambda policy: setattr(policy.value_net, "weight", nn.Parameter(th.randn(1, 8))),
}


@pytest.mark.parametrize("change", CHANGES)
def test_notices_a_changed_policy(change):
    policy = make_policy()
    network = make_network(policy)
    assert_current(network)
    CHANGES[change](policy)
    policy.optimizer = th.optim.Adam(policy.parameters(), lr=0.01)
    assert_current(network)
    assert type(network) is ClosedFormNetwork


def test_notices_a_changed_slope():
    policy = make_policy(activation_fn=nn.LeakyReLU)
    network = make_network(policy)
    policy.mlp_extractor.policy_net[1].negative_slope = 0.5
    assert_current(network)


def test_notices_another_type(double):
    policy = make_policy()
    network = make_network(policy)
    double(policy)
    policy.optimizer = th.optim.Adam(policy.parameters())
    assert_current(network)
    assert network.get_actor().dtype == np.float64


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_go_their_own_way(twin):
    policy = make_policy()
    policy.optimizer = th.optim.SGD(policy.parameters(), lr=0.1)
    policy.lr_schedule = None
    network = make_network(policy)
    assert_current(network)
    for copied in (make_network(twin(policy)), twin(network)):
        before = copy.deepcopy(policy.state_dict())
        copied.set_actor(copied.get_actor() + 1.0)
        assert all(th.equal(x, before[name]) for name, x in policy.state_dict().items())
        copied.policy.optimizer = th.optim.SGD(copied.policy.parameters(), lr=0.1)
        assert_current(copied)
    assert_current(network)


@pytest.mark.parametrize("kind", [PPO, TRPO, REINFORCE])
def test_models_saved_and_loaded(kind, tmp_path):
    model = kind("MlpPolicy", make_envs(n_envs=2), n_steps=16, batch_size=16, seed=0).learn(64)
    model.save(tmp_path / "model")
    loaded = kind.load(tmp_path / "model", env=make_envs(n_envs=2))
    assert type(loaded.network) is ClosedFormNetwork
    assert_current(loaded.network)
    loaded.learn(32)
    loaded.set_parameters(tmp_path / "model")
    assert_current(loaded.network)
    observation = draw(model.policy)[0]
    model_again = kind.load(tmp_path / "model")
    np.testing.assert_array_equal(
        model.predict(observation, deterministic=True)[0], model_again.predict(observation, deterministic=True)[0]
    )
    close(model.network.values(observation), model_again.network.values(observation), 1e-6)


# ---------------------------------------------------------------- when not to be used


class OwnPolicy(ActorCriticPolicy):
    def evaluate_actions(self, obs, actions):
        return super().evaluate_actions(obs, actions)


def frozen(policy):
    policy.action_net.weight.requires_grad_(False)


def hooked(policy):
    policy.mlp_extractor.policy_net[1].register_forward_hook(lambda *_: None)


def hooked_parameter(policy):
    policy.action_net.weight.register_hook(lambda gradient: 2.0 * gradient)


def replaced_method(policy):
    policy.evaluate_actions = MethodType(ActorCriticPolicy.evaluate_actions, policy)


def replaced_forward(policy):
    policy.value_net.forward = lambda x: 2.0 * x.sum(dim=1)


def dropout(policy):
    policy.mlp_extractor.policy_net.append(nn.Dropout(0.5))


def without_bias(policy):
    policy.action_net = nn.Linear(8, 2, bias=False)


def shared_layers(policy):
    policy.mlp_extractor.value_net = policy.mlp_extractor.policy_net


def half(policy):
    policy.bfloat16()


def normed(policy):
    nn.utils.parametrizations.weight_norm(policy.action_net)


def on_another_device(policy):
    policy.to("meta")


BEYOND = {
    frozen: "frozen",
    hooked: "Tanh has a hook",
    hooked_parameter: "parameter has a hook",
    replaced_method: "evaluate_actions is replaced",
    replaced_forward: "Linear's forward is replaced",
    dropout: "a layer is Dropout",
    without_bias: "no bias",
    shared_layers: "share",
    half: "bfloat16",
    normed: "ParametrizedLinear",
    on_another_device: "on meta",
}


@pytest.mark.parametrize("change", BEYOND)
def test_policies_beyond_closed_form_get_autograd_and_a_reason(change):
    policy = make_policy()
    change(policy)
    network = make_network(policy)
    assert type(network) is AutogradNetwork
    assert BEYOND[change] in network.description


@pytest.mark.parametrize("change", BEYOND)
def test_a_network_knows_when_its_policy_has_left_closed_form(change):
    policy = make_policy()
    network = make_network(policy)
    assert network.refresh()
    change(policy)
    assert not network.refresh()
    assert all(p.grad is None for p in policy.parameters())


def test_a_copy_looks_at_its_own_policy():
    network = make_network(make_policy())
    dropout(network.policy)
    assert type(copy.deepcopy(network)) is AutogradNetwork


def test_learning_goes_on_with_autograd():
    model = PPO("MlpPolicy", make_envs(), n_steps=8, batch_size=8, n_epochs=1, seed=0)
    assert type(model.network) is ClosedFormNetwork
    model.learn(8)
    calls = []
    model.policy.mlp_extractor.policy_net.register_forward_hook(lambda *_: calls.append(1))
    model.learn(16, reset_num_timesteps=False)
    assert type(model.network) is AutogradNetwork
    assert calls


@pytest.mark.parametrize(
    ("policy", "reason"),
    [
        (lambda: OwnPolicy(OBSERVATION_SPACES["box"], ACTION_SPACES["box"], lambda _: 0.01), "OwnPolicy"),
        (
            lambda: ActorCriticCnnPolicy(OBSERVATION_SPACES["image"], ACTION_SPACES["box"], lambda _: 0.01),
            "ActorCriticCnnPolicy",
        ),
        (lambda: make_policy(use_sde=True), "exploration"),
        (lambda: make_policy(observation=spaces.Discrete(3, start=1)), "Discrete(3, start=1)"),
        (lambda: make_policy(activation_fn=nn.Softplus), "Softplus"),
    ],
)
def test_other_policies_get_autograd_and_a_reason(policy, reason):
    network = make_network(policy())
    assert type(network) is AutogradNetwork
    assert reason in network.description


def test_the_engine_can_be_chosen(capsys):
    PPO("MlpPolicy", make_envs(), n_steps=8, batch_size=8, engine="autograd", verbose=1)
    PPO("MlpPolicy", make_envs(), n_steps=8, batch_size=8, verbose=1)
    printed = capsys.readouterr().out
    assert "Using the autograd (engine='autograd') network" in printed
    assert "Using the closed-form network" in printed


def test_back_from_another_device_is_closed_form_again():
    model = PPO("MlpPolicy", make_envs(), n_steps=8, batch_size=8, n_epochs=1)
    network = model._refreshed_network()
    model.policy.to("meta")
    assert type(model._refreshed_network()) is AutogradNetwork
    model.policy.to_empty(device="cpu")
    assert type(model._refreshed_network()) is ClosedFormNetwork
    assert model._refreshed_network() is not network


@pytest.mark.parametrize("kind", [th.optim.Adam, th.optim.AdamW])
def test_quick_adam_is_torchs(kind):
    """The same steps, from a state that a file holds for torch's own optimizer."""
    arguments = {"n_steps": 16, "batch_size": 8, "n_epochs": 2, "policy_kwargs": {"optimizer_class": kind}}
    ours, torchs = (PPO("MlpPolicy", make_envs(), seed=0, **arguments) for _ in range(2))
    ours.learn(32)
    file = io.BytesIO()
    th.save(ours.get_parameters(), file)
    file.seek(0)
    torchs.set_parameters(th.load(file))
    torchs.policy.optimizer.register_step_post_hook(lambda *_: None)  # with a hook, only the optimizer itself will do
    torchs.set_logger(ours.logger)
    torchs.rollout_buffer = ours.rollout_buffer
    for model in (ours, torchs):
        np.random.seed(1)
        model.train()
    assert ours.network._adam
    assert not torchs.network._adam
    for a, b in zip(ours.policy.parameters(), torchs.policy.parameters(), strict=True):
        th.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
        mine, its = ours.policy.optimizer.state[a], torchs.policy.optimizer.state[b]
        assert float(mine["step"]) == float(its["step"]) == 12
        th.testing.assert_close(mine["exp_avg"], its["exp_avg"], atol=1e-6, rtol=1e-4)
        th.testing.assert_close(mine["exp_avg_sq"], its["exp_avg_sq"], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_quick_adam_moves_actor_and_critic_apart(decay):
    """Parameters that have made different numbers of steps, as after early stopping, then step together."""
    rng = np.random.default_rng(0)
    ours, torchs = ([nn.Parameter(th.ones(n)) for n in (3, 2, 4)] for _ in range(2))
    adams = [th.optim.Adam(parameters, lr=0.1, weight_decay=decay) for parameters in (ours, torchs)]
    use_fused_adam(adams[0])
    quick = QuickAdam(adams[0])
    memory = [th.zeros(n) for n in (3, 2, 4)]
    for moves in [(True, True), (False, True), (True, True), (True, False), (True, True), (False, True), (True, True)]:
        which = (*2 * moves[:1], moves[1])
        for p, its, g, moved in zip(ours, torchs, memory, which, strict=True):
            g.copy_(th.from_numpy(rng.normal(size=len(g))))
            p.grad, its.grad = (g, g.clone()) if moved else (None, None)
        quick.step(moves)
        adams[1].step()
    for mine, its in zip(ours, torchs, strict=True):
        th.testing.assert_close(mine, its)
        th.testing.assert_close(adams[0].state[mine]["step"], adams[1].state[its]["step"])


def test_a_loaded_optimizer_state_is_gone_on_from():
    model = PPO("MlpPolicy", make_envs(), n_steps=16, batch_size=8, n_epochs=1, seed=0)
    model.learn(16)
    state = copy.deepcopy(model.policy.optimizer.state_dict())
    model.learn(16)
    model.policy.optimizer.load_state_dict(state)
    model.train()
    assert {float(s["step"]) for s in model.policy.optimizer.state.values()} == {4.0}

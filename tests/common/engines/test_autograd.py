"""The autograd engine against torch's own formulas and dense matrices."""

import copy

import pytest
import torch as th
from conftest import ACTION_SPACES
from gymnasium import spaces
from stable_baselines3.common.distributions import DiagGaussianDistribution
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from tiny_models import AtRolloutEnd
from torch import distributions as td
from torch import nn
from torch_reference import actor_parameters, dense_fisher, detached, flat, joint_kl, order_of, reference

from sb3_pg import TRPO
from sb3_pg.common.batch import Batch
from sb3_pg.common.engines.autograd import AutogradEngine

OBSERVATIONS = spaces.Box(-1.0, 1.0, (3,))
N = 8  # rows


class DoubleExtractor(BaseFeaturesExtractor):
    """SB3 gives features in float32 whatever the policy's type."""

    def __init__(self, observation_space, trainable=False):
        super().__init__(observation_space, 3)
        self.layer = nn.Linear(3, 3) if trainable else nn.Identity()

    def forward(self, observations):
        return self.layer(observations.double())


class UnknownDistribution(DiagGaussianDistribution):
    """A location-scale or a Beta distribution in the place of the Gaussian."""

    def __init__(self, kind):
        super().__init__(2)
        self.kind = kind

    def proba_distribution(self, mean, log_std):
        if self.kind is td.Beta:
            mean, log_std = nn.functional.softplus(mean), log_std.expand_as(mean)
            self.distribution = td.Beta(1 + mean, 1 + log_std.exp())
        else:
            self.distribution = self.kind(mean, log_std.expand_as(mean).exp())
        return self


POLICIES = {
    **{name: (space, {}) for name, space in ACTION_SPACES.items()},
    "shared features": (ACTION_SPACES["box"], {"features_extractor_kwargs": {"trainable": True}}),
    "own features": (
        ACTION_SPACES["discrete"],
        {"features_extractor_kwargs": {"trainable": True}, "share_features_extractor": False},
    ),
    "gsde": (ACTION_SPACES["box"], {"use_sde": True, "log_std_init": -0.5}),
    "squashed gsde": (ACTION_SPACES["box"], {"use_sde": True, "squash_output": True, "full_std": False}),
    "laplace": (ACTION_SPACES["box"], {"kind": td.Laplace}),
    "beta": (spaces.Box(0.0, 1.0, (2,)), {"kind": td.Beta}),
}


@pytest.fixture(params=POLICIES)
def judged(request):
    """A float64 policy, its engine, and a batch of observations and its own actions."""
    space, options = POLICIES[request.param]
    kind = options.get("kind")
    options = {k: v for k, v in options.items() if k != "kind"}
    extractor = {"features_extractor_class": DoubleExtractor, "net_arch": [3]}
    policy = ActorCriticPolicy(OBSERVATIONS, space, lambda _: 1e-3, **extractor, **options).double()
    if kind is not None:
        policy.action_dist = UnknownDistribution(kind)
    with th.no_grad():
        for p in policy.parameters():
            p += 0.5 * th.randn_like(p)
        if policy.use_sde:
            policy.reset_noise()  # in float64, too
    observations = th.randn(N, 3)
    with th.no_grad():
        sampled = policy.get_distribution(observations).sample().numpy()
    engine = AutogradEngine(policy)
    actions = engine.actions(sampled)
    actions = actions.double() if actions.is_floating_point() else actions  # or torch's Bernoulli answers in float32
    return policy, engine, Batch(observations, actions)


def test_fisher_vector_product_is_the_dense_matrix_times_the_vector(judged):
    policy, engine, batch = judged
    actor, parameters = engine.actor(batch), actor_parameters(policy)
    order = order_of(actor, parameters)
    dense = dense_fisher(policy, batch.observations, parameters)
    assert th.linalg.matrix_rank(dense) > 1
    product = actor.fisher()
    for _ in range(3):
        vector = th.randn(len(order), dtype=th.float64)
        th.testing.assert_close(product(vector)[order], dense @ vector[order], rtol=1e-8, atol=1e-10)


def test_kl_is_summed_over_action_dimensions(judged):
    policy, engine, batch = judged
    actor = engine.actor(batch)
    assert (actor.old.kl == 0).all()
    old_reference = detached(reference(policy, batch.observations))
    assert (actor.look().kl.abs() < 1e-12).all()
    actor.vector = actor.vector + 0.2 * th.randn_like(actor.vector)
    expected = joint_kl(old_reference, detached(reference(policy, batch.observations)))
    th.testing.assert_close(actor.look().kl, expected, rtol=1e-8, atol=1e-10)
    assert expected.min() > 1e-4


def test_actor_gradient_is_autograd_of_the_loss(judged):
    policy, engine, batch = judged
    actor, parameters = engine.actor(batch), actor_parameters(policy)
    order = order_of(actor, parameters)
    weights = th.randn(N, dtype=th.float64)
    found = actor.gradient(N * weights, N * 0.3)
    _, log_prob, entropy = policy.evaluate_actions(batch.observations, batch.actions)
    loss = (weights * log_prob + 0.3 * (-log_prob if entropy is None else entropy)).sum()
    expected = flat(th.autograd.grad(loss, parameters, materialize_grads=True))
    th.testing.assert_close(found[order], expected, rtol=1e-9, atol=1e-11)


class Routed(BaseFeaturesExtractor):
    """Sends observations by the sign of their first number to one of two layers."""

    def __init__(self, space):
        super().__init__(space, 8)
        self.experts = nn.ModuleList(nn.Linear(3, 8) for _ in range(2))

    def forward(self, x):
        out = x.new_zeros(len(x), 8)
        for i, expert in enumerate(self.experts):
            rows = th.nonzero((x[:, 0] > 0) == bool(i)).flatten()
            if len(rows):
                out = out.index_copy(0, rows, expert(x[rows]))
        return th.tanh(out)


def test_all_that_acts_on_any_observation_is_left_alone_by_the_critic():
    """The first sample of a rollout has gone through one of two layers only."""
    kwargs = {"features_extractor_class": Routed}
    model = TRPO("MlpPolicy", "Pendulum-v1", n_steps=256, seed=1, learning_rate=1e-2, policy_kwargs=kwargs)
    model.learn(256)
    before = []
    model.learn(256, callback=AtRolloutEnd(lambda m: before.append(copy.deepcopy(m.policy))))
    observations = th.as_tensor(model.rollout_buffer.observations.reshape(-1, 3))
    with th.no_grad():
        p, q = (x.get_distribution(observations).distribution for x in (*before, model.policy))
        kl = th.distributions.kl_divergence(p, q).sum(-1).mean().item()
    assert kl == pytest.approx(model.logger.name_to_value["train/kl_divergence_loss"], rel=1e-3)
    assert 0 < kl <= model.target_kl

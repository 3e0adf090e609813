"""Conjugate gradient, Fisher-vector products, and the promise that TRPO never leaves its trust region."""

import math

import numpy as np
import pytest
import torch as th
from conftest import ACTION_SPACES, IMAGE, FakeEnv, silent
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from stable_baselines3.common.distributions import DiagGaussianDistribution
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import distributions as td
from torch import nn

from sb3_pg import TRPO
from sb3_pg.common.networks import AutogradNetwork
from sb3_pg.trpo import trpo as trpo_module
from sb3_pg.trpo.trust_region import backtracking_line_search, conjugate_gradient

OBSERVATIONS = spaces.Box(-1.0, 1.0, (3,))
ENGINES = ["auto", "autograd"]

# ---------------------------------------------------------------------- solvers


def positive_definite(n, seed=0):
    root = np.random.default_rng(seed).normal(size=(n, n))
    return root @ root.T + 0.1 * np.eye(n)


@pytest.mark.parametrize("asarray", [np.asarray, th.as_tensor], ids=["numpy", "torch"])
@pytest.mark.parametrize("n", [1, 2, 5, 12])
def test_conjugate_gradient_solves(n, asarray):
    a, b = positive_definite(n), np.random.default_rng(1).normal(size=n)
    found = conjugate_gradient(lambda v: asarray(a) @ v, asarray(b), max_steps=4 * n, tolerance=1e-12)
    np.testing.assert_allclose(found.x, np.linalg.solve(a, b), rtol=1e-8)
    assert found.residual <= 1e-12 and n <= found.iterations <= 4 * n


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_conjugate_gradient_stopped_early_is_best_in_its_subspace(steps):
    """The best solution in the span of b, A b, ...: what is left is orthogonal to the span."""
    a, b = positive_definite(6), np.arange(1.0, 7.0)
    found = conjugate_gradient(lambda v: a @ v, b, steps)
    span = np.stack([np.linalg.matrix_power(a, k) @ b for k in range(steps)])
    rest = b - a @ found.x
    np.testing.assert_allclose(span @ rest / (np.linalg.norm(span, axis=1) * np.linalg.norm(rest)), 0, atol=1e-9)
    assert found.residual == pytest.approx(np.linalg.norm(rest) / np.linalg.norm(b))
    assert found.curvature == pytest.approx(found.x @ a @ found.x)
    assert found.iterations == steps


def test_conjugate_gradient_stops_at_its_tolerance():
    a, b = positive_definite(30), np.ones(30)
    found = conjugate_gradient(lambda v: a @ v, b, 1000, tolerance=0.1)
    assert found.iterations < 30 and np.linalg.norm(b - a @ found.x) <= 0.1 * np.linalg.norm(b)


def test_conjugate_gradient_of_zero_is_zero():
    found = conjugate_gradient(lambda v: v, np.zeros(3), 10)
    assert (found.x == 0).all() and found.iterations == 0 and found.residual == 0


@pytest.mark.parametrize("bad", [-1.0, 0.0, math.nan])
def test_conjugate_gradient_without_curvature_has_no_solution(bad):
    found = conjugate_gradient(lambda v: bad * v, np.ones(3), 10)
    assert np.isnan(found.x).all() and found.iterations == 0


def test_conjugate_gradient_keeps_what_it_had_when_curvature_turns_negative():
    a, b = np.diag([10.0, -1.0]), np.array([1.0, 0.1])
    found = conjugate_gradient(lambda v: a @ v, b, 10)
    np.testing.assert_allclose(found.x, b * (b @ b) / (b @ a @ b))  # steepest descent, the first iteration
    assert found.iterations == 1


def test_line_search_takes_the_longest_step_that_qualifies():
    tried = []

    def attempt(fraction):
        tried.append(fraction)
        return {1.0: (1.0, 2.0), 0.5: (-1.0, 0.1), 0.25: (math.nan, 0.1), 0.125: (1.0, math.nan)}.get(
            fraction, (0.3, 0.2)
        )

    assert backtracking_line_search(attempt, 1.0, 0.5, 10) == (1 / 16, 4, 0.3, 0.2)
    assert backtracking_line_search(attempt, 1.0, 0.5, 4) is None
    assert tried == [1.0, 0.5, 0.25, 0.125, 0.0625] + [1.0, 0.5, 0.25, 0.125]


# ------------------------------------------------- the network against references


def reference(policy, observations):
    """The policy's action distributions as float64 torch distributions, one for each group of dimensions."""
    inner = policy.get_distribution(observations).distribution
    return [
        type(d)(**{k: getattr(d, k).double() for k in d.arg_constraints if k != "probs"})
        for d in (inner if isinstance(inner, list) else [inner])
    ]


def detached(distributions):
    return [type(d)(**{k: getattr(d, k).detach() for k in d.arg_constraints if k != "probs"}) for d in distributions]


def joint_kl(old, new):
    """KL(old || new) of the joint action, by torch's formulas, summed over action dimensions, (n,)."""
    each = [td.kl_divergence(p, q) for p, q in zip(old, new, strict=True)]
    return sum(x if x.ndim == 1 else x.sum(dim=-1) for x in each)


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
    """A float64 policy and its network, with observations and actions of its own."""
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
    observations = th.randn(8, 3)
    with th.no_grad():
        sampled = policy.get_distribution(observations).sample().numpy()
    network = AutogradNetwork(policy)
    actions = network.actions(sampled)
    actions = actions.double() if actions.is_floating_point() else actions  # or torch's Bernoulli answers in float32
    network.find_actor(observations, actions)
    return policy, network, observations, actions


def actor_parameters(policy):
    """Of SB3's own policies, whose names tell."""
    critic = ("value_net", "vf_features_extractor")
    named = [(name, p) for name, p in policy.named_parameters() if not any(x in name for x in critic)]
    return [p for _, p in named]


def flat(tensors):
    return th.cat([x.detach().reshape(-1) for x in tensors])


def order_of(network, parameters):
    """Where each number of these parameters stands in the network's flat vector."""
    before = network.get_actor()
    network.set_actor(th.arange(len(before), dtype=before.dtype))
    order = flat(parameters).long()
    network.set_actor(before)
    assert sorted(order.tolist()) == list(range(len(before)))  # these parameters and no others
    return order


def dense_fisher(policy, observations, parameters):
    """The Hessian of KL(old || new) at new = old, row by row."""
    new = reference(policy, observations)
    kl = joint_kl(detached(new), new).mean()
    gradient = th.autograd.grad(kl, parameters, create_graph=True, materialize_grads=True)
    rows = [
        flat(th.autograd.grad(g, parameters, retain_graph=True, materialize_grads=True))
        for g in th.cat([x.reshape(-1) for x in gradient])
    ]
    return th.stack(rows)


def test_fisher_vector_product_is_the_dense_matrix_times_the_vector(judged):
    policy, network, observations, _ = judged
    parameters = actor_parameters(policy)
    order = order_of(network, parameters)
    dense = dense_fisher(policy, observations, parameters)
    assert th.linalg.matrix_rank(dense) > 1
    product = network.fisher(observations)
    for _ in range(3):
        vector = th.randn(len(order), dtype=th.float64)
        th.testing.assert_close(product(vector)[order], dense @ vector[order], rtol=1e-8, atol=1e-10)


def test_kl_is_summed_over_action_dimensions(judged):
    policy, network, observations, actions = judged
    *_, old = network.actor(observations, actions)
    old_reference = detached(reference(policy, observations))
    assert (network.kl(old, network.actor(observations, actions)[2]).abs() < 1e-12).all()
    network.set_actor(network.get_actor() + 0.2 * th.randn_like(network.get_actor()))
    *_, new = network.actor(observations, actions)
    expected = joint_kl(old_reference, detached(reference(policy, observations)))
    th.testing.assert_close(network.kl(old, new), expected, rtol=1e-8, atol=1e-10)
    assert expected.min() > 1e-4


def test_actor_gradient_is_autograd_of_the_loss(judged):
    policy, network, observations, actions = judged
    parameters = actor_parameters(policy)
    order = order_of(network, parameters)
    weights = th.randn(len(actions), dtype=th.float64)
    found = network.actor_gradient(observations, actions, weights, 0.3)
    _, log_prob, entropy = policy.evaluate_actions(observations, actions)
    loss = (weights * log_prob + 0.3 * (-log_prob if entropy is None else entropy)).sum()
    expected = flat(th.autograd.grad(loss, parameters, materialize_grads=True))
    th.testing.assert_close(found[order], expected, rtol=1e-9, atol=1e-11)


# ------------------------------------------------------------------------ updates


def make_trpo(action_space, observation_space=OBSERVATIONS, n_steps=32, policy="MlpPolicy", **options):
    env = FakeEnv(observation_space, action_space)
    options = {"n_critic_updates": 1, "batch_size": n_steps, "device": "cpu", **options}
    return silent(TRPO(policy, env, n_steps=n_steps, **options))


def fill(model, advantages, scale=1.0):
    """A rollout of random observations in which the policy acted, with the given advantages."""
    n, policy = len(advantages), model.policy
    rng = np.random.default_rng(0)
    observations = (scale * rng.normal(size=(n, 3))).astype(np.float32)
    with th.no_grad():
        actions, values, log_probs = policy(th.as_tensor(observations))
    model.rollout_buffer.reset()
    for row in zip(observations[:, None], actions[:, None].numpy(), values, log_probs[:, None], strict=True):
        model.rollout_buffer.add(row[0], row[1], np.zeros(1), np.zeros(1), row[2], row[3])
    model.rollout_buffer.advantages[:, 0] = advantages
    model.rollout_buffer.returns[:, 0] = rng.normal(size=n)
    return th.as_tensor(observations)


def logged(model, name):
    return model.logger.name_to_value[f"train/{name}"]


ADVANTAGES = {
    "normal": lambda rng, n: rng.normal(size=n),
    "heavy-tailed": lambda rng, n: rng.standard_cauchy(size=n),
    "one": lambda rng, n: 100.0 * (np.arange(n) == n // 2),
    "huge": lambda rng, n: 1e6 * rng.normal(size=n),
    "tiny": lambda rng, n: 1e-6 * rng.normal(size=n),
    "signs": lambda rng, n: rng.choice([-1.0, 1.0], size=n),
}

action_spaces = st.one_of(
    st.integers(1, 6).map(lambda n: spaces.Box(-1.0, 1.0, (n,))),
    st.integers(2, 6).map(spaces.Discrete),
    st.lists(st.integers(2, 4), min_size=1, max_size=4).map(spaces.MultiDiscrete),
    st.integers(1, 6).map(spaces.MultiBinary),
)
policy_options = st.fixed_dictionaries(
    {
        "net_arch": st.lists(st.integers(1, 16), max_size=2),
        "activation_fn": st.sampled_from([nn.Tanh, nn.ReLU, nn.ELU]),
        "log_std_init": st.floats(-3.0, 1.0),
        "features_extractor_class": st.just(None),
        "share_features_extractor": st.booleans(),
    }
)
trpo_options = st.fixed_dictionaries(
    {
        "target_kl": st.floats(-4.0, -1.0).map(lambda x: 10.0**x),
        "cg_damping": st.sampled_from([0.0, 1e-3, 0.1, 1.0]),
        "cg_max_steps": st.integers(1, 20),
        "line_search_shrinking_factor": st.floats(0.2, 0.9),
        "sub_sampling_factor": st.integers(1, 5),
        "ent_coef": st.sampled_from([0.0, 0.01, 1.0]),
        "normalize_advantage": st.booleans(),
        "use_sde": st.booleans(),
        "engine": st.sampled_from(ENGINES),
    }
)


class SmallExtractor(BaseFeaturesExtractor):
    """Features with weights, for actor and critic to share."""

    def __init__(self, observation_space):
        super().__init__(observation_space, 4)
        self.layer = nn.Linear(3, 4)

    def forward(self, observations):
        return th.tanh(self.layer(observations))


@settings(max_examples=300)
@given(
    action_space=action_spaces,
    options=trpo_options,
    policy_kwargs=policy_options,
    has_features=st.booleans(),
    advantages=st.sampled_from(list(ADVANTAGES)),
    weight_scale=st.sampled_from([0.1, 1.0, 5.0]),
    observation_scale=st.sampled_from([0.1, 1.0, 10.0]),
    n=st.integers(2, 40),
    seed=st.integers(0, 2**31),
)
def test_kl_is_never_above_its_target(
    action_space, options, policy_kwargs, has_features, advantages, weight_scale, observation_scale, n, seed
):
    if not isinstance(action_space, spaces.Box):
        options = {**options, "use_sde": False}
    if has_features:
        policy_kwargs = {**policy_kwargs, "features_extractor_class": SmallExtractor}
    else:
        policy_kwargs = {k: v for k, v in policy_kwargs.items() if k != "features_extractor_class"}
    model = make_trpo(action_space, n_steps=n, seed=seed, policy_kwargs=policy_kwargs, **options)
    with th.no_grad():
        for p in model.policy.parameters():
            if p.ndim > 1:
                p *= weight_scale
    observations = fill(model, ADVANTAGES[advantages](np.random.default_rng(seed), n), observation_scale)
    old, before = detached(reference(model.policy, observations)), flat(actor_parameters(model.policy))
    model.train()
    kl = joint_kl(old, detached(reference(model.policy, observations))).mean()
    assert kl <= options["target_kl"]
    moved = not th.equal(before, flat(actor_parameters(model.policy)))
    assert moved == bool(logged(model, "is_line_search_success"))
    assert moved == (logged(model, "policy_step") == "accepted")
    assert logged(model, "kl_divergence_loss") == pytest.approx(kl.item(), rel=0.05, abs=1e-6)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ACTION_SPACES)
def test_kl_is_not_above_its_target_by_rounding(name, engine):
    """A fine search for the edge of a tight region, where a KL in float32 is off by a thousandth.

    One observation and uneven logits, so that the errors of the rows add up instead of cancelling.
    """
    search = {"line_search_shrinking_factor": 0.999, "line_search_max_iter": 200, "cg_damping": 1e-6, "target_kl": 1e-4}
    options = {"n_steps": 16, "n_critic_updates": 0, "policy_kwargs": {"net_arch": []}, "engine": engine, **search}
    found = []
    for seed in range(40):
        model = make_trpo(ACTION_SPACES[name], seed=seed, **options)
        with th.no_grad():
            for p in actor_parameters(model.policy):
                p.copy_(4.0 * th.randn_like(p))
        observations = fill(model, np.random.default_rng(seed).normal(size=16), scale=0.0)
        old = detached(reference(model.policy, observations))
        model.train()
        found.append(joint_kl(old, detached(reference(model.policy, observations))).mean().item())
    assert max(found) <= 1e-4


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ACTION_SPACES)
def test_most_updates_use_most_of_the_trust_region(name, engine):
    """The bound alone would be kept by an algorithm that does nothing."""
    for seed in range(5):
        model = make_trpo(ACTION_SPACES[name], n_steps=128, seed=seed, cg_damping=1e-3, engine=engine)
        observations = fill(model, np.random.default_rng(seed).normal(size=128))
        old = detached(reference(model.policy, observations))
        model.train()
        kl = joint_kl(old, detached(reference(model.policy, observations))).mean()
        assert 0.004 < kl < 0.01
        assert logged(model, "surrogate_improvement") > 0
        assert logged(model, "surrogate_improvement") == pytest.approx(logged(model, "surrogate_predicted"), rel=0.5)


def solved(change):
    """Conjugate gradient whose solution is then changed."""

    def solver(product, b, max_steps):
        solution = conjugate_gradient(product, b, max_steps)
        return solution._replace(x=change(solution.x), curvature=change(1.0) ** 2 * solution.curvature)

    return solver


#: arguments, what one advantage is multiplied by, what replaces the solver and the Fisher matrix, what the log says
REFUSALS = {
    "nan advantage": ({}, math.nan, None, None, "gradient not finite"),
    "infinite advantage": ({"normalize_advantage": False}, math.inf, None, None, None),
    "no gradient": ({"normalize_advantage": False}, 0.0, None, None, "zero gradient"),
    "wrong direction": ({}, 1.0, solved(lambda x: -x), None, "line search failed"),
    "direction not finite": ({}, 1.0, solved(lambda x: x * math.inf), None, "no positive curvature"),
    # sb3-contrib takes the square root of a negative one, and all weights become NaN
    "negative curvature": ({}, 1.0, None, lambda vector: -vector, "no positive curvature"),
    "nan curvature": ({}, 1.0, None, lambda vector: math.nan * vector, "no positive curvature"),
    "step far too long": (
        {"line_search_max_iter": 2, "cg_damping": 0.0},
        1.0,
        None,
        lambda vector: 1e-9 * vector,
        "line search failed",
    ),
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("space", ACTION_SPACES)
@pytest.mark.parametrize("reason", REFUSALS)
def test_a_refused_update_changes_nothing(reason, space, engine, monkeypatch):
    options, factor, solver, fisher, outcome = REFUSALS[reason]
    model = make_trpo(ACTION_SPACES[space], n_critic_updates=0, engine=engine, **options)
    advantages = np.random.default_rng(0).normal(size=32)
    advantages[3:4] *= factor
    fill(model, advantages if factor else 0.0 * advantages)
    if solver is not None:
        monkeypatch.setattr(trpo_module, "conjugate_gradient", solver)
    if fisher is not None:
        monkeypatch.setattr(type(model.network), "fisher", lambda self, observations: fisher)
    before = {name: x.clone() for name, x in model.policy.state_dict().items()}
    model.train()
    for name, x in model.policy.state_dict().items():
        assert th.equal(x, before[name]), name
    assert logged(model, "policy_step") == outcome or (outcome is None and logged(model, "policy_step") != "accepted")
    assert logged(model, "is_line_search_success") == 0
    assert logged(model, "kl_divergence_loss") == 0


def test_the_critic_leaves_shared_features_alone():
    """Moving them after the policy's step would leave the trust region unseen."""
    model = make_trpo(
        ACTION_SPACES["box"], n_critic_updates=5, policy_kwargs={"features_extractor_class": SmallExtractor}
    )
    fill(model, np.zeros(32))
    policy = model.policy
    actor, critic = (flat(x) for x in (actor_parameters(policy), policy.value_net.parameters()))
    model.train()
    assert th.equal(actor, flat(actor_parameters(policy)))
    assert not th.equal(critic, flat(policy.value_net.parameters()))


# --------------------------------------------- what sb3-contrib skips or fails on


class AttentionExtractor(BaseFeaturesExtractor):
    def __init__(self, observation_space):
        super().__init__(observation_space, 6)
        self.query_key_value = nn.Linear(3, 6)

    def forward(self, observations):
        return th.tanh(self.query_key_value(observations))


MAP = spaces.Dict({"value_map": IMAGE, "speed": spaces.Box(-1.0, 1.0, (2,))})


@pytest.mark.parametrize(
    ("observation_space", "policy", "policy_kwargs", "layer"),
    [
        (OBSERVATIONS, "MlpPolicy", {"features_extractor_class": AttentionExtractor}, "query_key_value"),
        (MAP, "MultiInputPolicy", {}, "value_map"),
    ],
)
def test_parameters_called_value_are_trained(observation_space, policy, policy_kwargs, layer):
    options = {"n_critic_updates": 0, "policy": policy, "policy_kwargs": policy_kwargs}
    model = make_trpo(ACTION_SPACES["discrete"], observation_space, **options)
    of_layer = {name: p for name, p in model.policy.named_parameters() if layer in name}
    before = {name: p.detach().clone() for name, p in of_layer.items()}
    assert before
    model.learn(32)
    assert logged(model, "policy_step") == "accepted"
    for name, p in of_layer.items():
        assert not th.equal(p, before[name]), name


def test_sub_sampling_thins_out_the_curvature_only(monkeypatch):
    model = make_trpo(ACTION_SPACES["discrete"], MAP, policy="MultiInputPolicy", sub_sampling_factor=3, n_steps=32)
    lengths = {}
    for name in ("fisher", "actor_gradient", "actor"):
        original = getattr(type(model.network), name)

        def spy(self, observations, *others, name=name, original=original):
            lengths.setdefault(name, set()).update(len(x) for x in observations.values())
            return original(self, observations, *others)

        monkeypatch.setattr(type(model.network), name, spy)
    model.learn(32)
    assert lengths == {"fisher": {11}, "actor_gradient": {32}, "actor": {32}}
    assert logged(model, "policy_step") == "accepted"


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("name", "averaged"), [("box", 2), ("discrete", 1), ("multidiscrete", 1), ("multibinary", 3)])
def test_update_equals_sb3_contrib(name, averaged, engine, monkeypatch):
    """If theirs starts from zero, too, is stopped before rounding tells, and its KL, which is the mean over the
    dimensions of Box and MultiBinary actions, is converted.
    """
    contrib = pytest.importorskip("sb3_contrib")
    ours = make_trpo(ACTION_SPACES[name], cg_max_steps=2, n_critic_updates=3, engine=engine)
    options = {"target_kl": 0.01 / averaged, "cg_damping": 0.1 / averaged, "cg_max_steps": 2, "n_critic_updates": 3}
    theirs = contrib.TRPO("MlpPolicy", ours.env, n_steps=32, batch_size=32, device="cpu", **options)
    silent(theirs).policy.load_state_dict(ours.policy.state_dict())
    fill(ours, np.random.default_rng(0).normal(size=32))
    for array in ("observations", "actions", "log_probs", "values", "advantages", "returns"):
        getattr(theirs.rollout_buffer, array)[:] = getattr(ours.rollout_buffer, array)
    theirs.rollout_buffer.full = True
    monkeypatch.setattr(th, "randn_like", th.zeros_like)
    for model in (ours, theirs):
        model.train()
    assert logged(ours, "policy_step") == "accepted"
    for (key, x), y in zip(ours.policy.state_dict().items(), theirs.policy.state_dict().values(), strict=True):
        th.testing.assert_close(x, y, rtol=1e-4, atol=1e-5, msg=key)

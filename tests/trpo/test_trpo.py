"""The promise that TRPO never leaves its trust region, and what it does where sb3-contrib fails."""

import math

import numpy as np
import pytest
import torch as th
from conftest import ACTION_SPACES, IMAGE, FakeEnv, silent
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import nn
from torch_reference import actor_parameters, detached, flat, joint_kl, reference

from sb3_pg import TRPO
from sb3_pg.common.engines.autograd import GraphActor
from sb3_pg.common.engines.closed_form import ClosedFormActor
from sb3_pg.trpo import trpo as trpo_module
from sb3_pg.trpo.trust_region import conjugate_gradient

OBSERVATIONS = spaces.Box(-1.0, 1.0, (3,))
ENGINES = ["auto", "autograd"]


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
        "normalize_advantage": st.sampled_from([True, False, "running"]),
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
        return solution._replace(x=change(solution.x))

    return solver


#: arguments, what one advantage is multiplied by, what replaces the solver and the Fisher matrix, what the log says
REFUSALS = {
    "nan advantage": ({}, math.nan, None, None, "gradient not finite"),
    "infinite advantage": ({"normalize_advantage": False}, math.inf, None, None, None),
    "no gradient": ({"normalize_advantage": False}, 0.0, None, None, "zero gradient"),
    "wrong direction": ({}, 1.0, solved(lambda x: -x), None, "no positive curvature"),
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
        actor = ClosedFormActor if engine == "auto" else GraphActor
        monkeypatch.setattr(actor, "fisher", lambda self, every=1: fisher)
    before = {name: x.clone() for name, x in model.policy.state_dict().items()}
    model.train()
    for name, x in model.policy.state_dict().items():
        assert th.equal(x, before[name]), name
    assert logged(model, "policy_step") == outcome or (outcome is None and logged(model, "policy_step") != "accepted")
    assert logged(model, "is_line_search_success") == 0
    assert logged(model, "kl_divergence_loss") == 0


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("use_sde", [False, True])
def test_a_step_to_where_there_is_no_distribution_is_shortened(use_sde, engine, monkeypatch):
    """torch refuses a deviation of NaN, as gSDE makes it of a feature of 0 and weights that deviate by inf."""
    for shrinking, outcome in ((0.9, "line search failed"), (1e-3, "accepted")):
        model = make_trpo(
            ACTION_SPACES["box"],
            n_critic_updates=0,
            engine=engine,
            use_sde=use_sde,
            cg_damping=0.0,
            line_search_shrinking_factor=shrinking,
            line_search_max_iter=20,
            policy_kwargs={"activation_fn": nn.ReLU},
        )
        fill(model, np.random.default_rng(0).normal(size=32))
        actor = GraphActor if use_sde or engine == "autograd" else ClosedFormActor
        monkeypatch.setattr(actor, "fisher", lambda self, every=1: lambda vector: 1e-30 * vector)
        before = flat(actor_parameters(model.policy))
        model.train()
        assert logged(model, "policy_step") == outcome
        assert th.equal(before, flat(actor_parameters(model.policy))) == (outcome != "accepted")
        assert th.isfinite(flat(actor_parameters(model.policy))).all()


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
    lengths = {"fisher": set(), "gradient": set(), "old": set(), "look": set(), "other": set()}
    asked = ["other"]
    model.policy.action_net.register_forward_hook(lambda _, __, output: lengths[asked[-1]].add(len(output)))

    def spied(name, original):
        def spy(*args, **kwargs):
            asked.append(name)
            try:
                return original(*args, **kwargs)
            finally:
                asked.pop()

        return spy

    for name in ("fisher", "gradient", "look"):
        monkeypatch.setattr(GraphActor, name, spied(name, getattr(GraphActor, name)))
    monkeypatch.setattr(GraphActor, "old", property(spied("old", GraphActor.old.fget)))
    model.learn(32)
    del lengths["other"]  # acting and judging
    assert lengths == {"fisher": {11}, "gradient": {32}, "old": {32}, "look": {32}}
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


def test_trpo_logs_what_its_step_did():
    options = {"n_steps": 64, "batch_size": 64, "policy_kwargs": {"net_arch": [16]}, "seed": 0}
    model = TRPO("MlpPolicy", "CartPole-v1", **options).learn(64)
    of = model.logger.name_to_value
    assert of["train/policy_step"] == "accepted"
    assert 0 < of["train/kl_divergence_loss"] < 0.01
    assert 0 < of["train/surrogate_improvement"] < 3 * of["train/surrogate_predicted"]
    assert of["train/cg_iterations"] > 0
    assert of["train/step_length"] > 0
    assert of["train/cg_residual"] < 0.1
    assert "train/explained_variance" in of

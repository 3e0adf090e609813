"""Which engine a policy gets, and why."""

import copy
from types import MethodType

import pytest
import torch as th
from conftest import ACTION_SPACES, OBSERVATION_SPACES, make_envs
from engine_cases import make_policy
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticCnnPolicy, ActorCriticPolicy
from torch import nn

from sb3_pg import PPO
from sb3_pg.common.engines.autograd import AutogradEngine
from sb3_pg.common.engines.choice import make_engine
from sb3_pg.common.engines.closed_form import ClosedFormEngine
from sb3_pg.common.registry import ENGINE_PLACES, POLICY_PLACES


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
    engine = make_engine(policy)
    assert type(engine) is AutogradEngine
    assert BEYOND[change] in engine.description


@pytest.mark.parametrize("change", BEYOND)
def test_an_engine_knows_when_its_policy_has_left_closed_form(change):
    policy = make_policy()
    engine = make_engine(policy)
    assert engine.refresh()
    change(policy)
    assert not engine.refresh()
    assert all(p.grad is None for p in policy.parameters())


@pytest.mark.parametrize("engine", ["auto", "autograd"])
def test_the_closed_form_comes_back_when_nothing_is_against_it(engine):
    model = PPO("MlpPolicy", make_envs(), n_steps=8, batch_size=8, n_epochs=1, engine=engine)
    descriptions = []
    for freeze in (False, True, False):
        model.policy.action_net.requires_grad_(not freeze)
        before = model.policy.action_net.weight.detach().clone()
        model.learn(8, reset_num_timesteps=False)
        assert th.equal(model.policy.action_net.weight, before) == freeze
        descriptions.append(model.network.description)
    if engine == "auto":
        assert descriptions == ["closed-form", "autograd (parameters are frozen)", "closed-form"]
    else:
        assert descriptions == ["autograd (engine='autograd')"] * 3


def test_another_reason_is_told():
    policy = make_policy()
    frozen(policy)
    engine = make_engine(policy)
    assert engine.refresh()
    hooked(policy)
    assert not engine.refresh()
    assert "hook" in make_engine(policy).description


def test_a_copy_looks_at_its_own_policy():
    engine = make_engine(make_policy())
    dropout(engine.policy)
    assert type(copy.deepcopy(engine)) is AutogradEngine


def test_learning_goes_on_with_autograd():
    model = PPO("MlpPolicy", make_envs(), n_steps=8, batch_size=8, n_epochs=1, seed=0)
    assert type(model.network) is ClosedFormEngine
    model.learn(8)
    calls = []
    model.policy.mlp_extractor.policy_net.register_forward_hook(lambda *_: calls.append(1))
    model.learn(16, reset_num_timesteps=False)
    assert type(model.network) is AutogradEngine
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
    engine = make_engine(policy())
    assert type(engine) is AutogradEngine
    assert reason in engine.description


def test_the_engine_can_be_chosen(capsys):
    PPO("MlpPolicy", make_envs(), n_steps=8, batch_size=8, engine="autograd", verbose=1)
    PPO("MlpPolicy", make_envs(), n_steps=8, batch_size=8, verbose=1)
    printed = capsys.readouterr().out
    assert "Using the autograd (engine='autograd') network" in printed
    assert "Using the closed-form network" in printed


def test_back_from_another_device_is_closed_form_again():
    model = PPO("MlpPolicy", make_envs(), n_steps=8, batch_size=8, n_epochs=1)
    engine = model._refreshed_network()
    model.policy.to("meta")
    assert type(model._refreshed_network()) is AutogradEngine
    model.policy.to_empty(device="cpu")
    assert type(model._refreshed_network()) is ClosedFormEngine
    assert model._refreshed_network() is not engine


class OwnEngine(AutogradEngine):
    pass


class SubPolicy(OwnPolicy):
    pass


def test_a_registered_engine_is_chosen_for_its_policy_and_subclasses(monkeypatch):
    policy_place, engine_place = (f"{kind.__module__}:{kind.__qualname__}" for kind in (OwnPolicy, OwnEngine))
    monkeypatch.setitem(ENGINE_PLACES, policy_place, engine_place)
    for kind, engine in [(OwnPolicy, OwnEngine), (SubPolicy, OwnEngine), (ActorCriticPolicy, ClosedFormEngine)]:
        policy = kind(OBSERVATION_SPACES["box"], ACTION_SPACES["box"], lambda _: 0.01)
        assert type(make_engine(policy)) is engine
        assert type(make_engine(policy, "autograd")) is AutogradEngine


def test_a_registered_policy_goes_by_its_name(monkeypatch):
    monkeypatch.setitem(POLICY_PLACES, "OwnPolicy", f"{OwnPolicy.__module__}:OwnPolicy")
    model = PPO("OwnPolicy", make_envs(), n_steps=8, batch_size=8, n_epochs=1).learn(8)
    assert isinstance(model.policy, OwnPolicy)

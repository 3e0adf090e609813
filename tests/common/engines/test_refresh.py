"""An engine computes what its policy computes now, whatever has been done to the policy."""

import copy
import pickle

import numpy as np
import pytest
import torch as th
from conftest import make_envs
from engine_cases import assert_same, close, draw, make_batch, make_policy, outputs_and_gradients
from torch import nn

from sb3_pg import PPO, REINFORCE, TRPO
from sb3_pg.common.engines.choice import make_engine
from sb3_pg.common.engines.closed_form import ClosedFormEngine


def assert_current(engine):
    """The engine, refreshed, computes what its policy now computes."""
    engine.refresh()
    policy = engine.policy
    observations, actions = draw(policy)
    assert_same(engine, make_engine(policy, "autograd"), observations, actions, tolerance=2e-4)
    before = copy.deepcopy(policy.state_dict())
    outputs_and_gradients(engine, observations, actions, 0.1)
    engine.step(0.5, 1)
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
    engine = make_engine(policy)
    assert_current(engine)
    CHANGES[change](policy)
    policy.optimizer = th.optim.Adam(policy.parameters(), lr=0.01)
    assert_current(engine)
    assert type(engine) is ClosedFormEngine


def test_notices_a_changed_slope():
    policy = make_policy(activation_fn=nn.LeakyReLU)
    engine = make_engine(policy)
    policy.mlp_extractor.policy_net[1].negative_slope = 0.5
    assert_current(engine)


def test_notices_another_type(double):
    policy = make_policy()
    engine = make_engine(policy)
    double(policy)
    policy.optimizer = th.optim.Adam(policy.parameters())
    assert_current(engine)
    assert engine.actor(make_batch(engine, *draw(policy))).vector.dtype == np.float64


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_go_their_own_way(twin):
    policy = make_policy()
    policy.optimizer = th.optim.SGD(policy.parameters(), lr=0.1)
    policy.lr_schedule = None
    engine = make_engine(policy)
    assert_current(engine)
    for copied in (make_engine(twin(policy)), twin(engine)):
        before = copy.deepcopy(policy.state_dict())
        actor = copied.actor(make_batch(copied, *draw(policy)))
        actor.vector = actor.vector + 1.0
        assert all(th.equal(x, before[name]) for name, x in policy.state_dict().items())
        copied.policy.optimizer = th.optim.SGD(copied.policy.parameters(), lr=0.1)
        assert_current(copied)
    assert_current(engine)


@pytest.mark.parametrize("kind", [PPO, TRPO, REINFORCE])
def test_models_saved_and_loaded(kind, tmp_path):
    model = kind("MlpPolicy", make_envs(n_envs=2), n_steps=16, batch_size=16, seed=0).learn(64)
    model.save(tmp_path / "model")
    loaded = kind.load(tmp_path / "model", env=make_envs(n_envs=2))
    assert type(loaded.network) is ClosedFormEngine
    assert_current(loaded.network)
    loaded.learn(32)
    loaded.set_parameters(tmp_path / "model")
    assert_current(loaded.network)
    observation = draw(model.policy)[0]
    model_again = kind.load(tmp_path / "model")
    np.testing.assert_array_equal(
        model.predict(observation, deterministic=True)[0], model_again.predict(observation, deterministic=True)[0]
    )
    close(model.network.row_values(observation), model_again.network.row_values(observation), 1e-6)

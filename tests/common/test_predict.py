"""``predict`` in closed form gives what SB3's gives, whatever has been done to the policy in between."""

import copy

import numpy as np
import pytest
import torch as th
from conftest import ACTION_SPACES, OBSERVATION_SPACES, FakeEnv
from gymnasium import spaces
from stable_baselines3.common.distributions import SquashedDiagGaussianDistribution
from stable_baselines3.common.policies import ActorCriticPolicy
from tiny_models import ALGORITHMS, ALL, tiny
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from sb3_pg import PPO
from sb3_pg.common.errors import ArgumentError
from sb3_pg.common.policies import class_of

FLAT = [name for name in OBSERVATION_SPACES if name not in ("dict", "image")]


def both(policy, observation, deterministic=True):
    """The actions of ours and of SB3's own method, from the same random numbers."""
    found = []
    for predict in (policy.predict, lambda *x, **more: ActorCriticPolicy.predict(policy, *x, **more)):
        th.manual_seed(3)
        actions, state = predict(observation, "the state", np.array([True]), deterministic=deterministic)
        assert state == "the state"
        found.append(actions)
    return found


def check_same(policy, observation, quick=True):
    for deterministic in (True, False):
        ours, sb3s = both(policy, observation, deterministic)
        np.testing.assert_allclose(ours, sb3s, rtol=0, atol=1e-5)
        assert (type(ours), ours.dtype, ours.shape) == (type(sb3s), sb3s.dtype, sb3s.shape)
    assert (policy._predictor is not None) == quick


@pytest.mark.parametrize("action", ACTION_SPACES)
@pytest.mark.parametrize("observation", FLAT)
@pytest.mark.parametrize("n", [None, 1, 5, 300])
def test_single_observations_and_batches(observation, action, n):
    space = OBSERVATION_SPACES[observation]
    policy = tiny(PPO, FakeEnv(space, ACTION_SPACES[action])).policy
    space.seed(0)
    check_same(policy, np.asarray(space.sample()) if n is None else np.stack([space.sample() for _ in range(n)]))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_models_predict_by_the_policy(algorithm):
    model = tiny(algorithm, FakeEnv()).learn(32)
    x = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    expected = ActorCriticPolicy.predict(model.policy, x, deterministic=True)[0]
    np.testing.assert_allclose(model.predict(x, deterministic=True)[0], expected, rtol=0, atol=1e-6)


FORMS = {
    "float64": lambda x: x.astype(np.float64),
    "float16": lambda x: x.astype(np.float16),
    "int": lambda x: x.astype(int),
    "bool": lambda x: x > 0,
    "fortran": np.asfortranarray,
    "reversed": lambda x: x[::-1],
    "strided": lambda x: np.repeat(x, 2, axis=-1)[..., ::2],
    "read-only": lambda x: np.broadcast_to(x[0], x.shape),
    "empty": lambda x: x[:0],
}


@pytest.mark.filterwarnings("ignore:.*not writable")
@pytest.mark.parametrize("form", FORMS)
def test_forms_of_observations(form):
    x = np.random.default_rng(0).uniform(-2, 2, (6, 3)).astype(np.float32)
    copied = x.copy()
    observation = FORMS[form](x)
    policy = tiny(PPO, FakeEnv()).policy
    if form == "reversed":  # which torch does not take
        found = policy.predict(observation, deterministic=True)[0]
        np.testing.assert_allclose(found, both(policy, observation.copy())[1], rtol=0, atol=1e-6)
    else:
        check_same(policy, observation)
    np.testing.assert_array_equal(x, copied)


@pytest.mark.parametrize("wrong", [np.zeros(4), np.zeros((2, 4)), (np.zeros(3), {}), np.full(3, np.nan)], ids=str)
def test_what_sb3_refuses_is_refused(wrong):
    with pytest.raises(ValueError, match=r"shape|tuple|constraint"):
        tiny(PPO, FakeEnv()).policy.predict(wrong, deterministic=True)


@pytest.mark.parametrize(
    "space, wrong", [(spaces.Discrete(4), [4, -1]), (spaces.MultiDiscrete([2, 3]), [[2, 0], [0, -1]])]
)
def test_choices_outside_of_the_space_are_refused(space, wrong):
    policy = tiny(PPO, FakeEnv(space, ACTION_SPACES["discrete"])).policy
    for x in wrong:
        with pytest.raises(ArgumentError, match="outside"):
            policy.predict(np.array([x]))


def squash(policy):
    policy.action_dist = SquashedDiagGaussianDistribution(2)
    policy.action_net.bias.data += 1


def assign(policy):
    state = copy.deepcopy(policy.state_dict())
    policy.load_state_dict({name: x + 0.5 for name, x in state.items()}, assign=True)


def no_latent(policy):
    policy.mlp_extractor.forward_actor = lambda features: th.zeros(len(features), 8)


def steeper(policy):
    policy.mlp_extractor.policy_net[1].negative_slope = 5.0


def second(policy):
    return policy.mlp_extractor.policy_net[2].weight


def added(layer):
    return lambda policy: policy.mlp_extractor.policy_net.append(layer)


#: What may be done to a policy between two calls, and whether its predictions stay quick.
CHANGES = {
    "trained": (lambda policy: policy.action_net.weight.data.mul_(3.0), True),
    "replaced data": (lambda policy: setattr(policy.action_net.bias, "data", policy.action_net.bias.data + 1.0), True),
    "transposed data": (lambda policy: setattr(second(policy), "data", second(policy).data.T), False),
    "assigned state": (assign, True),
    "replaced layer": (lambda policy: setattr(policy, "action_net", nn.Linear(8, 2)), True),
    "added layer": (added(nn.Tanh()), False),
    "added dropout": (added(nn.Dropout()), False),
    "other slope": (steeper, True),
    "hook": (lambda policy: policy.action_net.register_forward_hook(lambda module, x, y: y + 1.0), False),
    "replaced method": (no_latent, False),
    "other distribution": (squash, False),
    "other bounds": (lambda policy: setattr(policy, "action_space", spaces.Box(-0.01, 0.01, (2,))), True),
    "unequal bounds": (
        lambda policy: setattr(policy, "action_space", spaces.Box(np.array([-0.1, -0.01]), np.array([0.02, 0.2]))),
        True,
    ),
    "frozen": (lambda policy: policy.requires_grad_(False), True),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_between_two_calls_are_seen(change):
    kwargs = {"net_arch": [8, 8], "activation_fn": nn.LeakyReLU}
    policy = tiny(PPO, FakeEnv(), policy_kwargs=kwargs).policy
    policy.action_net.weight.data.mul_(100.0)
    x = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    check_same(policy, x)
    before = both(policy, x)[0]
    deed, quick = CHANGES[change]
    deed(policy)
    check_same(policy, x, quick)
    assert change in ("frozen", "added dropout") or np.abs(both(policy, x)[0] - before).max() > 1e-4


def test_a_policy_that_is_to_scale_its_actions_is_seen():
    policy = tiny(PPO, FakeEnv(action_space=spaces.Box(-3.0, 5.0, (2,)))).policy
    x = np.ones((2, 3), np.float32)
    for scales in (False, True):
        policy._squash_output = scales
        check_same(policy, x, quick=not scales)


def test_a_hook_of_all_modules_is_seen():
    policy = tiny(PPO, FakeEnv()).policy
    x = np.ones((2, 3), np.float32)
    check_same(policy, x)
    handle = register_module_forward_hook(lambda module, inputs, y: y * 0.0 if isinstance(module, nn.Linear) else None)
    try:
        check_same(policy, x, quick=False)
    finally:
        handle.remove()
    np.testing.assert_allclose(*both(policy, x), rtol=0, atol=1e-6)


def test_the_mode_is_evaluation_afterwards():
    policy = tiny(PPO, FakeEnv()).policy
    policy.set_training_mode(True)
    policy.predict(np.zeros(3, np.float32))
    assert not policy.training
    assert not policy.action_net.training


def test_the_quick_policy_goes_for_sb3s_own():
    kind = type(tiny(PPO, FakeEnv()).policy)
    assert kind.__name__ == "QuickMlpPolicy"
    assert class_of(kind) is class_of("MlpPolicy") is class_of(ActorCriticPolicy) is ActorCriticPolicy
    with pytest.raises(ArgumentError, match="MultiInputPolicy"):
        PPO(kind, FakeEnv(OBSERVATION_SPACES["dict"]))


@ALL
def test_what_reset_returns_is_no_observation(algorithm):
    """SB3's message says what was mixed up."""
    env = FakeEnv()
    with pytest.raises(ValueError, match="You have passed a tuple to the predict"):
        tiny(algorithm, env).predict(env.reset())

"""Policies that choose the distribution of Box actions: bounds, trust region, learning, files, copies, refusals."""

import copy
import pickle

import gymnasium as gym
import numpy as np
import pytest
import sb3_contrib
import stable_baselines3
import torch as th
from conftest import ACTION_SPACES, OBSERVATION_SPACES, FakeEnv, policy_for
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy
from tiny_models import ALGORITHMS, BOX_OPTIONS, tiny, weights
from torch import distributions as td

from sb3_pg import PPO, REINFORCE, TRPO
from sb3_pg.common.distributions import BoxDistribution, BoxPolicy
from sb3_pg.common.engines.protocol import Seen
from sb3_pg.common.errors import ArgumentError
from sb3_pg.common.policies import QuickMlpPolicy

pytestmark = pytest.mark.filterwarnings("ignore:You have specified a mini-batch size")

#: Bounds whose middle and range are not exact, of several dimensions.
UNEVEN = spaces.Box(np.array([[-0.1, -3.0], [0.7, 1e-3]], np.float32), np.array([[0.3, 7.0], [0.9, 1e6]], np.float32))
OBSERVATIONS = OBSERVATION_SPACES["box"]
SQUASHING = ["squashed", "beta", "squashed_state_dependent"]


def options_of(name, **more):
    return {**BOX_OPTIONS[name], **more}


def model_of(name, algorithm=PPO, action_space=ACTION_SPACES["box"], **kwargs):
    return tiny(algorithm, FakeEnv(OBSERVATIONS, action_space), policy_kwargs=options_of(name, net_arch=[8]), **kwargs)


@pytest.mark.parametrize("name", SQUASHING)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_actions_are_inside_the_bounds(name, dtype):
    space = spaces.Box(UNEVEN.low.astype(dtype), UNEVEN.high.astype(dtype), dtype=dtype)
    policy = QuickMlpPolicy(OBSERVATIONS, space, lambda _: 0.01, **options_of(name))
    x = np.random.default_rng(0).normal(size=(500, 3)).astype(np.float32)
    for scale in (1.0, 1e4):  # the second puts them all at a bound
        with th.no_grad():
            if name == "beta":  # alpha or beta of nearly one
                policy.action_net.weight[4:] = -policy.action_net.weight[:4]
            policy.action_net.weight *= scale
        for deterministic in (True, False):
            actions, _ = policy.predict(x, deterministic=deterministic)
            assert actions.shape == (500, 2, 2)
            assert all(space.contains(a.astype(dtype)) for a in actions)
    assert (np.abs(actions - 0.5 * (space.low + space.high)) > 0.4 * (space.high - space.low)).mean() > 0.7


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("name", SQUASHING)
def test_the_environment_is_given_what_is_inside(name, algorithm):
    model_of(name, algorithm, UNEVEN).learn(64)  # which FakeEnv asserts


def test_scaling_there_and_back():
    policy = QuickMlpPolicy(OBSERVATIONS, UNEVEN, lambda _: 0.01, distribution="beta")
    UNEVEN.seed(0)
    actions = np.stack([UNEVEN.sample() for _ in range(50)])
    np.testing.assert_allclose(policy.unscale_action(policy.scale_action(actions)), actions, rtol=1e-3, atol=1e-5)
    assert np.isfinite(policy.scale_action(np.stack([UNEVEN.low, UNEVEN.high]))).all()
    plain = QuickMlpPolicy(OBSERVATIONS, ACTION_SPACES["box"], lambda _: 0.01)
    np.testing.assert_allclose(plain.unscale_action(plain.scale_action(np.full((1, 2), 0.5))), 0.5)


@pytest.mark.parametrize("name", BOX_OPTIONS)
@pytest.mark.parametrize("deterministic_action", ["mode", "mean"])
def test_predictions_in_closed_form_are_torchs(name, deterministic_action):
    options = options_of(name, deterministic_action=deterministic_action)
    policy = QuickMlpPolicy(OBSERVATIONS, UNEVEN, lambda _: 0.01, **options)
    x = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32)
    for observation in (x, x[0]):
        for deterministic in (True, False):
            found = []
            for predict in (policy.predict, lambda *a, **k: ActorCriticPolicy.predict(policy, *a, **k)):
                th.manual_seed(1)
                found.append(predict(observation, deterministic=deterministic)[0])
            np.testing.assert_allclose(*found, rtol=1e-5, atol=1e-6)
            assert found[0].dtype == found[1].dtype
            assert found[0].shape == found[1].shape
    assert policy._predictor is not None


@pytest.mark.parametrize("distribution", ["squashed_gaussian", "beta"])
@pytest.mark.parametrize(("low", "high"), [(-1e300, 1e300), (1.0, 1.0 + 1e-12), (-3e-300, 1e-300)])
def test_bounds_that_only_double_precision_knows(distribution, low, high):
    space = spaces.Box(low, high, (2,), np.float64)
    policy = QuickMlpPolicy(OBSERVATIONS, space, lambda _: 0.01, distribution=distribution)
    actions, _ = policy.predict(np.zeros((100, 3), np.float32))
    assert actions.dtype == np.float64
    assert ((low <= actions) & (actions <= high)).all()
    share = (actions / 2 - low / 2) / (high / 2 - low / 2)
    assert 0.1 < share.std() < 0.6


def test_mean_and_mode_are_those_of_the_actions():
    x = np.zeros((1, 3), np.float32)
    space = spaces.Box(-2.0, 6.0, (1,))
    drawn = {}
    for deterministic_action in ("mode", "mean"):
        policy = QuickMlpPolicy(
            OBSERVATIONS, space, lambda _: 0.01, distribution="beta", deterministic_action=deterministic_action
        )
        with th.no_grad():
            policy.action_net.bias.copy_(th.tensor([3.0, -1.0]))
        drawn[deterministic_action] = policy.predict(x, deterministic=True)[0].item()
    alpha, beta = 1.0 + np.log1p(np.exp(3.0)), 1.0 + np.log1p(np.exp(-1.0))
    assert drawn["mean"] == pytest.approx(-2.0 + 8.0 * alpha / (alpha + beta), rel=1e-5)
    assert drawn["mode"] == pytest.approx(-2.0 + 8.0 * (alpha - 1.0) / (alpha + beta - 2.0), rel=1e-5)


@pytest.mark.parametrize("name", BOX_OPTIONS)
@pytest.mark.parametrize("log_std_init", [-0.5, 0.4])
def test_log_std_begins_where_it_should(name, log_std_init):
    if name == "beta":
        return
    policy = QuickMlpPolicy(OBSERVATIONS, UNEVEN, lambda _: 0.01, **options_of(name, log_std_init=log_std_init))
    with th.no_grad():
        policy.action_net.weight.zero_()
        distribution = policy.get_distribution(th.zeros(1, 3))
    *_, log_std = distribution.family.parameters(distribution.parameters)
    np.testing.assert_allclose(log_std.detach(), log_std_init, atol=1e-5)


@pytest.mark.parametrize("engine", ["auto", "autograd"])
@pytest.mark.parametrize("name", BOX_OPTIONS)
def test_the_trust_region_holds(name, engine):
    """By the mean KL between old and new policy, here summed up anew."""
    model = model_of(name, TRPO, n_steps=256, batch_size=256, target_kl=0.02, engine=engine)
    for _ in range(3):
        before = copy.deepcopy(model.policy)
        model.learn(256, reset_num_timesteps=False)
        observations = th.as_tensor(model.rollout_buffer.observations.reshape(-1, 3))
        with th.no_grad():
            old, new = before.get_distribution(observations), model.policy.get_distribution(observations)
        kl = old.family.kl(*(tuple(x.double() for x in d.parameters) for d in (old, new))).mean().item()
        assert 0.005 < kl <= 0.02 * (1 + 1e-5)
        assert model.logger.name_to_value["train/kl_divergence_loss"] == pytest.approx(kl, rel=1e-3)


class Target(gym.Env):
    """One step: the nearer the action to a function of the observation, the better."""

    observation_space = spaces.Box(-1.0, 1.0, (1,))
    action_space = spaces.Box(-1.0, 3.0, (1,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x = self.np_random.uniform(-1.0, 1.0, 1).astype(np.float32)
        return self.x, {}

    def step(self, action):
        return self.x, -abs(float(action[0]) - 1.0 - 1.5 * float(self.x[0])), True, False, {}


def loss(model):
    """How far the actions are from the target, on average."""
    x = np.linspace(-1.0, 1.0, 41, dtype=np.float32)[:, None]
    return np.abs(model.predict(x, deterministic=True)[0] - 1.0 - 1.5 * x).mean()


LEARNERS = {
    PPO: {"n_steps": 256, "learning_rate": 3e-3, "gamma": 0.0},
    TRPO: {"n_steps": 512, "target_kl": 0.05, "gamma": 0.0},
    REINFORCE: {"n_episodes": 128, "learning_rate": 2e-2, "gamma": 0.0},
}


@pytest.mark.parametrize("name", BOX_OPTIONS)
@pytest.mark.parametrize("algorithm", LEARNERS)
def test_learns(algorithm, name):
    policy_kwargs = options_of(name, net_arch=[16])
    model = algorithm("MlpPolicy", Target(), seed=0, policy_kwargs=policy_kwargs, **LEARNERS[algorithm])
    before = loss(model)
    model.learn(5_000)
    assert loss(model) < 0.5 * before


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("name", BOX_OPTIONS)
def test_archives(name, algorithm, tmp_path):
    model = model_of(name, algorithm).learn(40)
    model.save(tmp_path / "model")
    model.learn(40, reset_num_timesteps=False)
    loaded = algorithm.load(tmp_path / "model", env=FakeEnv())
    assert type(loaded.policy) is QuickMlpPolicy
    assert loaded.policy.box_options == model.policy.box_options
    loaded.learn(40, reset_num_timesteps=False)
    assert (weights(model) == weights(loaded)).all()
    assert_equal(model, loaded)


def assert_equal(model, other):
    x = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)
    for deterministic in (True, False):
        found = [(th.manual_seed(2), its.predict(x, deterministic=deterministic)[0])[1] for its in (model, other)]
        np.testing.assert_array_equal(*found)


def test_sb3_loads_and_trains_it(tmp_path):
    model = model_of("beta").learn(40)
    model.save(tmp_path / "model")
    theirs = stable_baselines3.PPO.load(tmp_path / "model", env=model.env)
    assert_equal(model, theirs)
    theirs.learn(64)
    theirs.save(tmp_path / "theirs")
    assert_equal(theirs, PPO.load(tmp_path / "theirs"))


@pytest.mark.parametrize("name", BOX_OPTIONS)
def test_sb3_contribs_trpo_trains_it(name, tmp_path):
    model = model_of(name, TRPO).learn(40)
    model.save(tmp_path / "model")
    theirs = sb3_contrib.TRPO.load(tmp_path / "model", env=model.env)
    assert_equal(model, theirs)
    seen = th.zeros(3, 3)
    old = copy.copy(theirs.policy.get_distribution(seen))
    theirs.learn(64)
    assert 0.0 < theirs.logger.name_to_value["train/kl_divergence_loss"] < 0.01
    new = theirs.policy.get_distribution(seen)
    kl = td.kl_divergence(old.distribution, new.distribution).sum(-1)
    th.testing.assert_close(kl, old.family.kl(old.parameters, new.parameters), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", BOX_OPTIONS)
def test_policy_files_and_copies(name, tmp_path):
    model = model_of(name).learn(40)
    model.policy.save(tmp_path / "policy")
    copies = copy.deepcopy(model), pickle.loads(pickle.dumps(model.policy)), QuickMlpPolicy.load(tmp_path / "policy")
    for its in copies:
        assert_equal(model, its)
    copies[0].set_env(model.env)
    copies[0].learn(40)


def test_default_policies_are_saved_as_before(tmp_path):
    policy = tiny(PPO, FakeEnv()).policy
    policy.save(tmp_path / "policy")
    assert type(ActorCriticPolicy.load(tmp_path / "policy")) is ActorCriticPolicy
    assert not isinstance(policy.action_dist, BoxDistribution)
    model = tiny(PPO, FakeEnv())
    model.save(tmp_path / "model")
    assert type(stable_baselines3.PPO.load(tmp_path / "model").policy) is ActorCriticPolicy


@pytest.mark.parametrize("name", BOX_OPTIONS)
@pytest.mark.parametrize("observation", ["image", "dict"])
def test_other_policies_of_sb3(name, observation, tmp_path):
    space = OBSERVATION_SPACES[observation]
    size = {"features_dim": 4} if observation == "image" else {"cnn_output_dim": 4}
    policy_kwargs = options_of(name, features_extractor_kwargs=size)
    model = tiny(PPO, FakeEnv(space), policy_for(space), policy_kwargs=policy_kwargs, n_steps=8, batch_size=8)
    model.learn(8)
    model.save(tmp_path / "model")
    loaded = PPO.load(tmp_path / "model")
    space.seed(0)
    x = space.sample()
    np.testing.assert_array_equal(*(its.predict(x, deterministic=True)[0] for its in (model, loaded)))


@pytest.mark.parametrize("name", BOX_OPTIONS)
@pytest.mark.parametrize("policy", ["MlpLstmPolicy", "MlpGruPolicy"])
def test_recurrent_policies(name, policy, tmp_path):
    policy_kwargs = options_of(name, net_arch=[8], lstm_hidden_size=8)
    found = []
    for engine in ("auto", "autograd"):
        model = tiny(PPO, FakeEnv(), policy, policy_kwargs=policy_kwargs, engine=engine, seed=0)
        model.learn(64)
        found.append(weights(model))
    np.testing.assert_allclose(*found, rtol=1e-4, atol=1e-5)
    model.save(tmp_path / "model")
    loaded = PPO.load(tmp_path / "model")
    x = np.ones((2, 3), np.float32)
    np.testing.assert_array_equal(*(its.predict(x, deterministic=True)[0] for its in (model, loaded)))


class WithForward(QuickMlpPolicy):
    """Acts and judges by its own methods, so that nothing is known of its distribution before it is made."""

    def forward(self, obs, deterministic=False):
        return super().forward(obs, deterministic)


@pytest.mark.parametrize("name", BOX_OPTIONS)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_policies_with_their_own_forward_learn_the_same(name, algorithm):
    found = []
    for policy in (WithForward, "MlpPolicy"):
        kwargs = options_of(name, net_arch=[8])
        model = tiny(algorithm, FakeEnv(), policy, policy_kwargs=kwargs, ent_coef=0.01, engine="autograd").learn(32)
        found.append(weights(model))
    np.testing.assert_allclose(*found, rtol=1e-3, atol=2e-5)


class OwnWidths(ActorCriticPolicy):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **{**kwargs, "net_arch": {"pi": [6], "vf": [5]}})


class OwnOfBox(BoxPolicy, OwnWidths):
    pass


@pytest.mark.parametrize("name", BOX_OPTIONS)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_policies_of_the_users_learn_as_ours_do(name, algorithm, tmp_path):
    own = model_of(name, algorithm, policy=OwnOfBox).learn(64)
    policy_kwargs = options_of(name, net_arch={"pi": [6], "vf": [5]})
    ours = tiny(algorithm, FakeEnv(OBSERVATIONS, ACTION_SPACES["box"]), policy_kwargs=policy_kwargs).learn(64)
    np.testing.assert_allclose(weights(own), weights(ours), rtol=1e-3, atol=1e-5)
    own.save(tmp_path / "model")
    again = algorithm.load(tmp_path / "model", trusted=True)
    assert type(again.policy) is OwnOfBox
    np.testing.assert_array_equal(weights(again), weights(own))


def test_recorded_actions_have_the_log_probability_of_acting():
    """At the bounds too, where the action given to the environment has lost its digits."""
    policy = QuickMlpPolicy(OBSERVATIONS, ACTION_SPACES["box"], lambda _: 0.01, distribution="squashed_gaussian")
    with th.no_grad():
        policy.action_net.bias.fill_(30.0)
    x = np.zeros((4, 3), np.float32)
    model = tiny(PPO, FakeEnv())
    model.policy = policy
    u = model.network.act(Seen(x)).actions
    assert (policy.unscale_action(u) == 1.0).all()
    normal = th.distributions.Normal(30.0, policy.action_dist.deviation(policy.log_std).double())
    exact = th.as_tensor(u, dtype=th.float64)
    log_slope = 2.0 * (np.log(2.0) - exact - th.nn.functional.softplus(-2.0 * exact))
    _, log_prob, _ = policy.evaluate_actions(th.as_tensor(x), th.as_tensor(u))
    th.testing.assert_close(log_prob.double(), (normal.log_prob(exact) - log_slope).sum(-1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("distribution", ["beta", "squashed_gaussian"])
def test_unbounded_actions_are_refused_by_name(distribution):
    with pytest.raises(ArgumentError, match=f"`distribution='{distribution}'` needs actions with finite bounds"):
        QuickMlpPolicy(OBSERVATIONS, spaces.Box(-np.inf, 1.0, (2,)), lambda _: 0.01, distribution=distribution)


@pytest.mark.parametrize(
    ("kwargs", "space", "message"),
    [
        ({"distribution": "beta"}, spaces.Discrete(2), "`distribution='beta'` is for Box actions, not Discrete"),
        ({"state_dependent_std": True}, spaces.MultiBinary(2), "`state_dependent_std=True` is for Box actions"),
        ({"log_std_bounds": (-1, 1)}, spaces.Discrete(2), "`log_std_bounds=.* is for Box actions"),
        ({"distribution": "normal"}, None, "distribution` must be one of 'gaussian', 'squashed_gaussian', 'beta'"),
        ({"distribution": "beta", "state_dependent_std": True}, None, "`state_dependent_std=True` is for Gaussians"),
        ({"distribution": "beta", "log_std_bounds": (-1, 1)}, None, "`log_std_bounds=.* is for Gaussians"),
        ({"log_std_bounds": (1, -1)}, None, "`log_std_bounds` is .1, -1., but must be two numbers"),
        ({"log_std_bounds": (-1, 90)}, None, "`log_std_bounds` is .-1, 90., but must be"),
        (
            {"distribution": "squashed_gaussian", "log_std_bounds": (-1, 6)},
            None,
            r"`log_std_bounds` is .-1, 6., but must be two numbers .* <= 5, such as",
        ),
        ({"log_std_bounds": 3}, None, "`log_std_bounds` is 3, but must be"),
        ({"log_std_bounds": (-1, 1), "log_std_init": 1.5}, None, "`log_std_init=1.5` is not between"),
        ({"deterministic_action": "median"}, None, "deterministic_action` must be one of 'mode', 'mean'"),
        ({"state_dependent_std": "yes"}, None, "state_dependent_std` must be one of"),
        ({"distributon": "beta"}, None, "Did you mean 'distribution'"),
    ],
)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_what_cannot_work_is_refused_by_name(algorithm, kwargs, space, message):
    with pytest.raises(ArgumentError, match=message):
        tiny(algorithm, FakeEnv(OBSERVATIONS, space), policy_kwargs=kwargs)


def test_generalised_exploration_is_refused():
    with pytest.raises(ArgumentError, match="`distribution='beta'` and `use_sde=True`, which"):
        PPO("MlpPolicy", FakeEnv(), use_sde=True, policy_kwargs={"distribution": "beta"})


# ------------------------------------------------------- what parameters mean


@pytest.mark.parametrize("bounds", [None, (-3, 1)])
def test_the_beginning_of_a_deviation_is_a_parameter(bounds):
    """As SB3's ``log_std_init``: the same parameters are the same policy, however it began."""
    options = {"state_dependent_std": True, "log_std_bounds": bounds}
    first, second = (
        tiny(PPO, FakeEnv(OBSERVATIONS, UNEVEN), policy_kwargs={**options, **more})
        for more in ({"log_std_init": -1.5}, {})
    )
    second.set_parameters(first.get_parameters())
    for model in (first, second):
        deviation = model.policy.get_distribution(th.zeros(1, 3)).distribution.stddev
        np.testing.assert_allclose(deviation.detach(), np.exp(-1.5), rtol=1e-5)


@pytest.mark.parametrize("name", BOX_OPTIONS)
def test_modes_are_in_the_graph_and_are_the_actions_taken(name):
    policy = model_of(name).policy
    x = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    mode = policy.get_distribution(th.as_tensor(x)).mode()
    mode.sum().backward()
    assert policy.action_net.weight.grad.abs().max() > 1e-3
    shape = (-1, *policy.action_space.shape)
    found = (
        policy.unscale_action(mode.detach().numpy().reshape(shape)) if policy.squash_output else mode.detach().numpy()
    )
    expected, _ = policy.predict(x, deterministic=True)
    space = policy.action_space
    np.testing.assert_allclose(np.clip(found.reshape(shape), space.low, space.high), expected, atol=1e-5)

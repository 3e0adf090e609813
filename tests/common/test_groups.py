"""The critic's own learning rate, options of the optimizer and gradient clipping."""

import copy
import math
import re

import numpy as np
import pytest
import stable_baselines3
import torch as th
from conftest import OBSERVATION_SPACES, FakeEnv, make_envs, policy_for
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.utils import update_learning_rate
from tiny_models import tiny, weights

from sb3_pg import PPO, REINFORCE
from sb3_pg.common.batch import Batch
from sb3_pg.common.engines.choice import make_engine
from sb3_pg.common.errors import ArgumentError, PolicyError
from sb3_pg.common.groups import critic_parameters

pytestmark = pytest.mark.filterwarnings("ignore:You have specified a mini-batch size")

ALGORITHMS = pytest.mark.parametrize("algorithm", [PPO, REINFORCE])
ENGINES = pytest.mark.parametrize("engine", ["auto", "autograd"])


def learned(algorithm, n=16, **options):
    """A model after one update of an actor and a critic that share nothing, and clip apart."""
    return tiny(algorithm, make_envs(n_envs=2), max_grad_norm=None, **options).learn(n)


def parts(model):
    """The actor's and the critic's parameters as two vectors."""
    of_critic = {id(p) for p in critic_parameters(model.policy)}
    return [
        th.cat([p.detach().reshape(-1) for p in model.policy.parameters() if (id(p) in of_critic) == is_its])
        for is_its in (False, True)
    ]


@ALGORITHMS
@ENGINES
def test_each_part_learns_as_it_would_by_its_own_rate(algorithm, engine):
    slow, fast, both = (
        learned(algorithm, engine=engine, learning_rate=rate, critic_learning_rate=its)
        for rate, its in [(1e-4, None), (1e-2, None), (1e-4, 1e-2)]
    )
    for found, expected in zip(parts(both), (parts(slow)[0], parts(fast)[1]), strict=True):
        assert th.equal(found, expected)
    assert not th.equal(parts(slow)[1], parts(fast)[1])
    logged = both.logger.name_to_value
    assert (logged["train/learning_rate"], logged["train/critic_learning_rate"]) == (1e-4, 1e-2)
    assert "train/critic_learning_rate" not in slow.logger.name_to_value


@ALGORITHMS
@ENGINES
@pytest.mark.parametrize("kind", [th.optim.Adam, th.optim.AdamW, th.optim.RMSprop, th.optim.SGD])
def test_each_part_learns_as_it_would_by_its_own_options(algorithm, engine, kind):
    def made(decay, **options):
        policy_kwargs = {"optimizer_class": kind, "optimizer_kwargs": {"weight_decay": decay}}
        return learned(algorithm, engine=engine, policy_kwargs=policy_kwargs, **options)

    plain, decayed, both = made(0.0), made(0.5), made(0.0, critic_optimizer_kwargs={"weight_decay": 0.5})
    for found, expected in zip(parts(both), (parts(plain)[0], parts(decayed)[1]), strict=True):
        assert th.equal(found, expected)
    assert not th.equal(parts(plain)[1], parts(decayed)[1])


def test_schedules_fall_apart():
    model = tiny(PPO, FakeEnv(), learning_rate=1e-3, critic_learning_rate=lambda left: 1e-2 * left)
    model.learn(64)  # four updates, the last at a progress of one
    actor, critic = model.policy.optimizer.param_groups
    assert (actor["lr"], critic["lr"]) == (1e-3, 0.0)
    model = tiny(PPO, FakeEnv(), learning_rate=lambda left: 1e-3 * left, critic_learning_rate=1e-2).learn(64)
    assert [group["lr"] for group in model.policy.optimizer.param_groups] == [0.0, 1e-2]


def test_an_adapted_learning_rate_is_the_actors():
    model = tiny(PPO, FakeEnv(), adaptive_lr=True, desired_kl=1e-6, n_epochs=5, critic_learning_rate=1e-2).learn(32)
    actor, critic = model.policy.optimizer.param_groups
    assert actor["lr"] == model.learning_rate != 3e-4
    assert critic["lr"] == 1e-2


def test_whoever_sets_all_groups_to_one_rate_sets_it_until_the_next_update():
    model = tiny(PPO, FakeEnv(), critic_learning_rate=1e-2)
    update_learning_rate(model.policy.optimizer, 0.5)  # as SB3 does
    model.learn(16)
    assert [group["lr"] for group in model.policy.optimizer.param_groups] == [3e-4, 1e-2]


def test_a_rate_that_is_set_later_counts_from_the_next_update():
    model = tiny(PPO, make_envs(), learning_rate=1e-3).learn(16)
    state = {id(p): its["exp_avg"].clone() for p, its in model.policy.optimizer.state.items()}
    model.critic_learning_rate = 0.0
    actor, critic = parts(model)
    model.learn(16, reset_num_timesteps=False)
    assert th.equal(parts(model)[1], critic)
    assert not th.equal(parts(model)[0], actor)
    assert state.keys() == {id(p) for p in model.policy.optimizer.state}


@ENGINES
@pytest.mark.parametrize("limits", [(1e-3, 1e-2), (None, 1e-3), (0.5, None), (1e6, 1e6), (None, None)], ids=str)
@pytest.mark.parametrize("moves", ["both", "critic"])
def test_parts_are_clipped_apart(engine, limits, moves):
    """By torch's own clipping of each part, and its own step."""
    policy = tiny(PPO, FakeEnv(), policy_kwargs={"optimizer_class": th.optim.SGD}).policy
    other = copy.deepcopy(policy)
    network, rng = make_engine(policy, engine), np.random.default_rng(0)
    x, a = rng.normal(size=(7, 3)).astype(np.float32), rng.normal(size=(7, 2)).astype(np.float32)
    batch = Batch(network.asarray(x), network.actions(a))
    d = [network.asarray(rng.normal(size=7).astype(np.float32)) for _ in range(2)]
    network.evaluate(batch).backward(d[0] if moves == "both" else None, d_value=d[1])
    for p, its in zip(policy.parameters(), other.parameters(), strict=True):
        its.grad = None if p.grad is None else p.grad.clone()
    squares = [float(p.grad.square().sum()) for p in other.parameters() if p.grad is not None]
    of_critic = {id(p) for p in critic_parameters(other)}
    for is_its, limit in zip((False, True), limits, strict=True):
        if limit is not None:
            th.nn.utils.clip_grad_norm_([p for p in other.parameters() if (id(p) in of_critic) == is_its], limit)
    other.optimizer.step()
    assert network.step(limits, 7) == pytest.approx(np.sqrt(sum(squares)), rel=1e-5)
    np.testing.assert_allclose(weights(policy), weights(other), rtol=1e-6, atol=1e-7)


@ALGORITHMS
def test_pairs_of_equal_and_wide_limits_change_nothing(algorithm):
    found = [weights(tiny(algorithm, make_envs(), max_grad_norm=x).learn(32)) for x in (1e6, (1e6, None), [None, 1e6])]
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[0], found[2])
    narrow = weights(tiny(algorithm, make_envs(), max_grad_norm=(1e-3, 1e-3)).learn(32))
    assert (narrow != found[0]).any()


# ------------------------------------------------------------------------------------------------------------ files


@ALGORITHMS
@pytest.mark.parametrize("kind", [th.optim.Adam, th.optim.AdamW, th.optim.RMSprop])
def test_archives_go_on_exactly(algorithm, kind, tmp_path):
    options = {
        "critic_learning_rate": 2e-3,
        "critic_optimizer_kwargs": {"weight_decay": 0.1},
        "max_grad_norm": [0.1, 0.2],
    }
    model = tiny(algorithm, FakeEnv(), policy_kwargs={"optimizer_class": kind}, **options).learn(40)
    model.save(tmp_path / "model")
    model.learn(40, reset_num_timesteps=False)
    loaded = algorithm.load(tmp_path / "model", env=FakeEnv())
    assert loaded.max_grad_norm == (0.1, 0.2)
    loaded.learn(40, reset_num_timesteps=False)
    np.testing.assert_array_equal(weights(model), weights(loaded))
    assert_same_state(model, loaded)
    assert [g["weight_decay"] for g in loaded.policy.optimizer.param_groups][1] == 0.1


def assert_same_state(model, other):
    """The optimizers know the same of each parameter, whatever group it is in."""
    states = [[m.policy.optimizer.state[p] for p in m.policy.parameters()] for m in (model, other)]
    for a, b in zip(*states, strict=True):
        assert a.keys() == b.keys()
        for key, x in a.items():
            th.testing.assert_close(b[key], x, rtol=0, atol=0)


def test_archives_are_sb3s_in_both_directions(tmp_path):
    model = tiny(PPO, FakeEnv(), critic_learning_rate=2e-3).learn(40)
    model.save(tmp_path / "ours")
    sb3s = stable_baselines3.PPO.load(tmp_path / "ours", env=FakeEnv())
    assert len(sb3s.policy.optimizer.param_groups) == 1
    assert_same_state(model, sb3s)
    sb3s.learn(32)
    sb3s.save(tmp_path / "sb3s")
    back = PPO.load(tmp_path / "sb3s", env=FakeEnv(), critic_learning_rate=5e-3)
    assert_same_state(sb3s, back)
    assert back.learn(16).policy.optimizer.param_groups[1]["lr"] == 5e-3


@ENGINES
def test_options_that_are_set_later_count_from_the_next_update(engine):
    model = tiny(PPO, make_envs(), engine=engine, critic_optimizer_kwargs={"weight_decay": 0.1, "eps": 1e-3}).learn(16)
    for options, found in [({"weight_decay": 0.7}, (0.7, 1e-5)), (None, (0.0, 1e-5)), ({"eps": 1e-2}, (0.0, 1e-2))]:
        model.critic_optimizer_kwargs, model.max_grad_norm = options, [0.5, 0.1]
        model.learn(16, reset_num_timesteps=False)
        actor, critic = model.policy.optimizer.param_groups
        assert (critic["weight_decay"], critic["eps"]) == found
        assert (actor["weight_decay"], actor["eps"]) == (0.0, 1e-5)
    model.critic_optimizer_kwargs = {"eps": -1.0}
    with pytest.raises(ArgumentError, match=r"\{'eps': -1.0\}` cannot take a step: Invalid epsilon value"):
        model.learn(16)


def test_options_may_need_others_that_both_have():
    """Nesterov's needs a momentum."""
    policy_kwargs = {"optimizer_class": th.optim.SGD, "optimizer_kwargs": {"momentum": 0.9}}
    model = tiny(PPO, make_envs(), policy_kwargs=policy_kwargs, critic_optimizer_kwargs={"nesterov": True}).learn(16)
    assert [(group["momentum"], group["nesterov"]) for group in model.policy.optimizer.param_groups] == [
        (0.9, False),
        (0.9, True),
    ]
    with pytest.raises(ArgumentError, match="Nesterov momentum requires a momentum"):
        tiny(PPO, make_envs(), policy_kwargs=policy_kwargs, critic_optimizer_kwargs={"momentum": 0, "nesterov": True})


def test_what_is_changed_in_the_actors_group_stays_there(tmp_path):
    decaying = {"weight_decay": 0.2}
    arguments = {"critic_optimizer_kwargs": decaying, "policy_kwargs": {"optimizer_kwargs": decaying}}
    model = tiny(PPO, make_envs(), **arguments).learn(16)
    model.policy.optimizer.param_groups[0]["weight_decay"] = 0.9
    model.save(tmp_path / "model")
    loaded = PPO.load(tmp_path / "model")
    assert [group["weight_decay"] for group in loaded.policy.optimizer.param_groups] == [0.9, 0.2]


def test_copies_and_parameters():
    model = tiny(PPO, make_envs(), critic_learning_rate=2e-3).learn(32)
    twin = copy.deepcopy(model)
    assert_same_state(model, twin)
    fresh = tiny(PPO, make_envs(), critic_learning_rate=2e-3, seed=1)
    fresh.set_parameters(model.get_parameters())
    assert_same_state(model, fresh)
    np.testing.assert_array_equal(weights(model), weights(fresh))


# ----------------------------------------------------------------------------------------------- whose is what


def names(policy):
    of_critic = {id(p) for p in critic_parameters(policy)}
    return {name.split(".")[0] for name, p in policy.named_parameters() if id(p) in of_critic}


@pytest.mark.parametrize("observation", ["box", "image", "dict"])
@pytest.mark.parametrize("shared", [True, False])
def test_what_is_shared_is_the_actors(observation, shared):
    space = OBSERVATION_SPACES[observation]
    size = {"box": {}, "image": {"features_dim": 4}, "dict": {"cnn_output_dim": 4}}[observation]
    kwargs = {"share_features_extractor": shared, "features_extractor_kwargs": size}
    policy = tiny(PPO, FakeEnv(space), policy_for(space), policy_kwargs=kwargs, critic_learning_rate=1e-3).policy
    has_extractor = not shared and observation != "box"
    assert names(policy) == {"mlp_extractor", "value_net"} | ({"vf_features_extractor"} if has_extractor else set())
    groups = policy.optimizer.param_groups
    assert sum(len(group["params"]) for group in groups) == len(list(policy.parameters()))


@pytest.mark.parametrize(
    ("kwargs", "modules"),
    [
        ({}, {"lstm_critic"}),
        ({"enable_critic_lstm": False}, {"critic"}),
        ({"enable_critic_lstm": False, "shared_lstm": True}, set()),
    ],
    ids=["own", "none", "shared"],
)
@ENGINES
def test_recurrent_critics(kwargs, modules, engine):
    kwargs = {"lstm_hidden_size": 8, **kwargs}
    options = {"max_grad_norm": (0.1, 0.2), "critic_learning_rate": 0.0, "engine": engine}
    model = tiny(PPO, make_envs(), "MlpLstmPolicy", policy_kwargs=kwargs, **options)
    assert names(model.policy) == {"mlp_extractor", "value_net"} | modules
    actor, critic = parts(model)
    model.learn(32)
    assert th.equal(parts(model)[1], critic)
    assert not th.equal(parts(model)[0], actor)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"critic_learning_rate": -1e-3}, "`critic_learning_rate` must be a finite number >= 0, not -0.001"),
        ({"critic_learning_rate": lambda left: left - 2.0}, "The schedule of `critic_learning_rate` gave -1"),
        ({"critic_learning_rate": "fast"}, "`critic_learning_rate` must be a number or a schedule"),
        ({"critic_optimizer_kwargs": {"weight_deacy": 0.1}}, "Did you mean 'weight_decay'"),
        ({"critic_optimizer_kwargs": {"lr": 0.1}}, "Pass `critic_learning_rate`"),
        ({"critic_optimizer_kwargs": {1: 2}}, "`critic_optimizer_kwargs` has 1, which Adam does not take here"),
        ({"critic_optimizer_kwargs": {"weight_decay": -1.0}}, "{'weight_decay': -1.0}` cannot take a step: Invalid"),
        ({"critic_optimizer_kwargs": {"weight_decay": math.nan}}, "{'weight_decay': nan}` cannot take a step: Invalid"),
        ({"critic_optimizer_kwargs": {"eps": "1e-5"}}, "{'eps': '1e-5'}` cannot take a step: "),
        ({"critic_optimizer_kwargs": {"betas": 0.5}}, "{'betas': 0.5}` cannot take a step: "),
        ({"critic_optimizer_kwargs": {"capturable": True}}, "{'capturable': True}` cannot take a step: "),
        ({"critic_optimizer_kwargs": 3}, "`critic_optimizer_kwargs` must be a dictionary or None, not 3"),
        ({"max_grad_norm": (0.1, 0.2, 0.3)}, "`max_grad_norm` must be a number, None, or a pair of them"),
        ({"max_grad_norm": (0.1, -0.2)}, "`max_grad_norm` must be a finite number >= 0, not -0.2"),
        ({"critic_learning_rate": 0.1, "baseline": "ema"}, "`critic_learning_rate=0.1` needs the value network"),
    ],
    ids=lambda x: re.sub(" at 0x[0-9a-f]+", "", str(x)),
)
@ALGORITHMS
def test_what_cannot_work_is_refused_by_name(algorithm, options, message):
    with pytest.raises(ArgumentError, match=message):
        tiny(algorithm, FakeEnv(), **options)


def test_a_critic_that_diverges_is_told_with_its_rate():
    model = tiny(PPO, FakeEnv(), critic_learning_rate=1e38, max_grad_norm=None)
    with pytest.raises(
        PolicyError, match=r"Lower `learning_rate` \(now 0.0003\) or `critic_learning_rate` \(now 1e\+38\)"
    ):
        model.learn(64)
    assert np.isfinite(weights(model)).all()


class Grouped(th.optim.Adam):
    """Has a group for each parameter."""

    def __init__(self, params, **kwargs):
        super().__init__([{"params": [p]} for p in params], **kwargs)


def test_an_optimizer_with_groups_of_its_own_is_left_alone():
    kwargs = {"optimizer_class": Grouped}
    tiny(PPO, FakeEnv(), policy_kwargs=kwargs).learn(16)
    with pytest.raises(ArgumentError, match="has an optimizer of 9 groups already"):
        tiny(PPO, FakeEnv(), policy_kwargs=kwargs, critic_learning_rate=1e-3)


class OfItsOwn(ActorCriticPolicy):
    """A policy with another optimizer than Adam unless it is told."""

    def __init__(self, *args, optimizer_class=th.optim.SGD, **kwargs):
        super().__init__(*args, optimizer_class=optimizer_class, **kwargs)


class Passing(OfItsOwn):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)


@pytest.mark.parametrize("policy", [OfItsOwn, Passing])
def test_options_are_of_the_optimizer_that_the_policy_takes(policy):
    model = PPO(policy, "CartPole-v1", policy_kwargs={"optimizer_kwargs": {"momentum": 0.9}})
    assert model.policy.optimizer.param_groups[0]["momentum"] == 0.9
    with pytest.raises(ArgumentError, match=r"(?s)SGD.*'betas'|'betas', which SGD"):
        PPO(policy, "CartPole-v1", policy_kwargs={"optimizer_kwargs": {"betas": (0.9, 0.9)}})


class AnyOptions(th.optim.SGD):
    def __init__(self, params, **kwargs):
        super().__init__(params, **kwargs)


def test_the_critics_options_beside_those_of_an_optimizer_that_names_none():
    kwargs = {"optimizer_class": AnyOptions, "optimizer_kwargs": {"momentum": 0.9}}
    model = PPO("MlpPolicy", "CartPole-v1", policy_kwargs=kwargs, critic_optimizer_kwargs={"nesterov": True})
    assert [group["nesterov"] for group in model.policy.optimizer.param_groups] == [False, True]

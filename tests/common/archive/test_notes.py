"""What archives say of their policies besides parameters: the distribution, what is frozen, the critic's options."""

import io
import json
import zipfile

import numpy as np
import pytest
import stable_baselines3
import torch as th
from conftest import ACTION_SPACES, OBSERVATION_SPACES, FakeEnv
from tiny_models import ALL, BOX_OPTIONS, tiny, weights

from sb3_pg import PPO, REINFORCE
from sb3_pg.common.archive.container import SEAL, ArchiveError
from sb3_pg.common.errors import ArgumentError

pytestmark = pytest.mark.filterwarnings("ignore:You have specified a mini-batch size")


def model_of(algorithm=PPO, **options):
    return tiny(algorithm, FakeEnv(OBSERVATION_SPACES["box"], ACTION_SPACES["box"]), **options)


def saved(model):
    file = io.BytesIO()
    model.save(file)
    file.seek(0)
    return file


def loaded(model, **arguments):
    return type(model).load(saved(model), env=model.env, **arguments)


def goes_on_alike(model):
    """Whether a model and the one of its archive learn the same."""
    file, before = saved(model), weights(model)
    model.learn(64, reset_num_timesteps=False)
    copied = type(model).load(file, env="Pendulum-v1").learn(64, reset_num_timesteps=False)
    assert np.abs(weights(model) - before).max() > 1e-6
    return np.array_equal(weights(model), weights(copied))


# ---------------------------------------------------------------- distribution

GAUSSIAN = {"plain": {}, **{name: BOX_OPTIONS[name] for name in ("bounded", "squashed")}}
TWO_OUTPUTS = {name: BOX_OPTIONS[name] for name in ("beta", "state_dependent", "squashed_state_dependent")}


@pytest.mark.parametrize("kinds", [GAUSSIAN, TWO_OUTPUTS], ids=["one output", "two outputs"])
def test_parameters_of_another_distribution_are_refused(kinds):
    for given in kinds:
        for own in kinds:
            file, model = saved(model_of(policy_kwargs=kinds[given])), model_of(policy_kwargs=kinds[own])
            before = weights(model)
            if given == own:
                model.set_parameters(file)
                continue
            with pytest.raises(ArgumentError, match="the archive has the parameters of a policy with distribution="):
                model.set_parameters(file)
            assert np.array_equal(weights(model), before)


def test_bounds_that_are_the_usual_ones_are_the_same_as_none():
    options = {"distribution": "squashed_gaussian"}
    model = model_of(policy_kwargs={**options, "log_std_bounds": (-5, 2.0)})
    model.set_parameters(saved(model_of(policy_kwargs=options)))


def test_sb3s_parameters_are_a_gaussians():
    env = FakeEnv(OBSERVATION_SPACES["box"], ACTION_SPACES["box"])
    theirs = stable_baselines3.PPO("MlpPolicy", env, policy_kwargs={"net_arch": [8]}, device="cpu")
    model_of().set_parameters(saved(theirs))
    with pytest.raises(ArgumentError, match="with distribution='gaussian'"):
        model_of(policy_kwargs=BOX_OPTIONS["squashed"]).set_parameters(saved(theirs))


def test_policy_kwargs_in_place_of_those_in_the_archive_keep_the_distribution():
    model = model_of(policy_kwargs=BOX_OPTIONS["squashed"])
    with pytest.raises(ArgumentError, match="but this one has distribution='gaussian'"):
        loaded(model, custom_objects={"policy_kwargs": {"net_arch": [8]}})
    loaded(model, custom_objects={"policy_kwargs": {"net_arch": [8], **BOX_OPTIONS["squashed"]}})


# ------------------------------------------------------------------- optimizers


@pytest.mark.parametrize("group", [0, 1])
@pytest.mark.parametrize("algorithm", [PPO, REINFORCE])
def test_options_that_were_set_on_one_group_go_on(algorithm, group):
    apart = {"critic_learning_rate": 1e-2, "critic_optimizer_kwargs": {"eps": 1e-3}}
    model = tiny(algorithm, "Pendulum-v1", **apart).learn(64)
    its = model.policy.optimizer.param_groups[group]
    its.update(weight_decay=0.3, eps=1e-2, betas=(0.5, 0.9))
    expected = [{**group, "params": 0} for group in model.policy.optimizer.param_groups]
    found = loaded(model).policy.optimizer.param_groups
    assert [{**group, "params": 0} for group in found] == expected
    assert goes_on_alike(model)


def test_options_that_load_is_given_outrank_them():
    model = model_of(critic_learning_rate=1e-2)
    model.policy.optimizer.param_groups[1]["weight_decay"] = 0.3
    found = loaded(model, critic_optimizer_kwargs={"weight_decay": 0.1}).policy.optimizer.param_groups[1]
    assert found["weight_decay"] == 0.1


@ALL
def test_what_was_frozen_stays_frozen(algorithm):
    model = tiny(algorithm, "Pendulum-v1", learning_rate=0.01).learn(64)
    for p in (model.policy.log_std, *model.policy.mlp_extractor.policy_net.parameters()):
        p.requires_grad_(False)
    frozen = {name for name, p in loaded(model).policy.named_parameters() if not p.requires_grad}
    assert frozen == {"log_std", "mlp_extractor.policy_net.0.weight", "mlp_extractor.policy_net.0.bias"}
    assert goes_on_alike(model)


OTHERS = [
    (th.optim.Adam, th.optim.SGD),
    (th.optim.SGD, th.optim.Adam),
    (th.optim.SGD, th.optim.RMSprop),
    (th.optim.RMSprop, th.optim.SGD),
    (th.optim.RMSprop, th.optim.Adam),
    (th.optim.Adam, th.optim.RMSprop),
    (th.optim.Adam, th.optim.NAdam),
    (th.optim.Adam, th.optim.Adafactor),
]


@pytest.mark.parametrize("has_groups", [False, True])
@pytest.mark.parametrize("from_file", [False, True])
@pytest.mark.parametrize(("given", "own"), OTHERS, ids=lambda its: its.__name__)
def test_the_state_of_another_optimizer_is_refused(given, own, from_file, has_groups):
    apart = {"critic_learning_rate": 1e-3} if has_groups else {}
    theirs, model = (model_of(policy_kwargs={"optimizer_class": kind}, **apart) for kind in (given, own))
    theirs.learn(32)
    before = weights(model)
    with pytest.raises(
        ArgumentError, match=f"another optimizer than this model's {own.__name__}, .*optimizer_class"
    ) as e:
        model.set_parameters(saved(theirs) if from_file else theirs.get_parameters())
    assert isinstance(e.value, ArchiveError) == from_file
    assert np.array_equal(weights(model), before)
    model.learn(32)


@pytest.mark.parametrize("kind", [th.optim.Adam, th.optim.SGD, th.optim.RMSprop, th.optim.Adafactor, th.optim.AdamW])
def test_that_of_the_same_is_taken(kind):
    theirs, model = (model_of(policy_kwargs={"optimizer_class": kind}) for _ in range(2))
    theirs.learn(32)
    model.set_parameters(saved(theirs))
    model.set_parameters(theirs.get_parameters())
    loaded(theirs).learn(32)
    assert np.isfinite(weights(model.learn(32))).all()


def test_an_optimizer_that_was_replaced_is_refused_by_load():
    model = model_of().learn(32)
    model.policy.optimizer = th.optim.SGD(model.policy.parameters(), lr=0.01, momentum=0.9)
    model.learn(32)
    with pytest.raises(ArchiveError, match=r"another optimizer than this model's Adam, .*KeyError"):
        loaded(model)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"policy": "MlpPolicy"}, "`policy` cannot be changed when loading: the archive has its own policy"),
        ({"use_sde": True}, "`use_sde` cannot be changed when loading: the archive has False, not True"),
    ],
)
def test_what_load_cannot_change(arguments, message):
    with pytest.raises(ArgumentError, match=message):
        loaded(model_of(), **arguments)


@pytest.mark.parametrize(
    "notes",
    [
        [],
        {"distribution": "beta"},
        {"frozen": "log_std"},
        {"critics_options": []},
        {"critics_options": {"eps": "much"}},
    ],
    ids=str,
)
def test_notes_that_are_none(notes):
    model = model_of(critic_learning_rate=1e-3)
    file = saved(model)
    with zipfile.ZipFile(file) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    entries[SEAL] = json.dumps(json.loads(entries[SEAL]) | {"policy": notes}).encode()
    changed = io.BytesIO()
    with zipfile.ZipFile(changed, "w") as archive:
        for name, entry in entries.items():
            archive.writestr(name, entry)
    for take in (PPO.load, model.set_parameters):
        changed.seek(0)
        with pytest.raises(ArchiveError, match="what it says of its policy is damaged"):
            take(changed)

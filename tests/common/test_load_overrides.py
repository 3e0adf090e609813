"""What the caller asks for when loading, or sets afterwards, outranks what the archive holds."""

import numpy as np
import pytest
import sb3_contrib
import stable_baselines3
import torch as th
from conftest import make_envs
from stable_baselines3.common.logger import configure
from tiny_models import ALGORITHMS, ALL, OPTIONS, tiny, weights

from sb3_pg import PPO, REINFORCE, TRPO
from sb3_pg.common.buffers import RolloutBuffer
from sb3_pg.common.errors import ArgumentError

pytestmark = pytest.mark.filterwarnings("ignore:You have specified a mini-batch size")


class Halved(RolloutBuffer):
    """Makes half of every advantage."""

    def __init__(self, *args, factor=0.5, **kwargs):
        super().__init__(*args, **kwargs)
        self.factor = factor

    def compute_returns_and_advantage(self, last_values, dones):
        super().compute_returns_and_advantage(last_values, dones)
        self.returns[: self.pos] -= (1 - self.factor) * self.advantages[: self.pos]
        self.advantages[: self.pos] *= self.factor


def falling(progress_remaining):
    return 0.02 * progress_remaining


def constant(value):
    return lambda progress_remaining: value


OF_ALL = [
    {"learning_rate": 0.02},
    {"learning_rate": falling},
    {"gamma": 0.3},
    {"gae_lambda": 0.2},
    {"ent_coef": 0.5},
    {"ent_coef": falling},
    {"normalize_advantage": False},
    {"n_steps": 8},
]
OVERRIDES = {
    PPO: [
        *OF_ALL,
        {"batch_size": 8},
        {"n_epochs": 4},
        {"vf_coef": 9.0},
        {"max_grad_norm": 0.01},
        {"max_grad_norm": None},
        {"clip_range": 1e-4},
        {"clip_range": falling},
        {"clip_range_vf": 1e-4},
        {"target_kl": 1e-9},
        {"normalize_advantage": "batch"},
        {"objective": "spo"},
        {"kl_coef": 9.0},
    ],
    TRPO: [
        *OF_ALL,
        {"batch_size": 8},
        {"target_kl": 1e-4},
        {"n_critic_updates": 4},
        {"cg_max_steps": 1},
        {"cg_damping": 9.0},
        {"sub_sampling_factor": 4},
    ],
    REINFORCE: [
        *OF_ALL,
        {"n_episodes": 2},
        {"batch_size": 4},
        {"vf_coef": 9.0},
        {"max_grad_norm": 0.01},
        {"max_grad_norm": None},
        {"baseline": None},
        {"baseline": "leave_one_out"},
        {"n_critic_updates": 3},
        {"critic_batch_size": 4},
    ],
}


def named(override):
    return ",".join(f"{name}={getattr(value, '__name__', value)}" for name, value in override.items())


CASES = [(algorithm, override) for algorithm, some in OVERRIDES.items() for override in some]
EACH = pytest.mark.parametrize(
    ("algorithm", "override"), CASES, ids=[f"{algorithm.__name__}-{named(override)}" for algorithm, override in CASES]
)


def environments():
    """Two that end without being cut, so that gamma enters in one place only."""
    return make_envs(n_envs=2, lengths=(5, 3, 1, 7))


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    """{algorithm: (an archive, the weights that it learns to without overrides)}"""
    folder, found = tmp_path_factory.mktemp("archives"), {}
    for algorithm in ALGORITHMS:
        path = folder / algorithm.__name__
        tiny(algorithm, environments()).learn(64).save(path)
        found[algorithm] = (path, learned(algorithm.load(path, environments(), device="cpu")))
    return found


def learned(model):
    """The weights after a little learning from a fixed seed."""
    model.set_random_seed(3)
    return weights(model.learn(64))


def made_anew(algorithm, path, **options):
    """A new model of these arguments with an archive's parameters and optimizer."""
    model = tiny(algorithm, environments(), **options)
    model.set_parameters(str(path))
    return model


#: The weights that a model of these arguments learns to, by archive and override.
_EXPECTED = {}


def check(algorithm, archives, override, load):
    path, plain = archives[algorithm]
    key = (path, named(override))
    if key not in _EXPECTED:
        _EXPECTED[key] = learned(made_anew(algorithm, path, **override))
    expected, found = _EXPECTED[key], learned(load(path))
    assert np.abs(expected - plain).max() > 1e-6  # it does make a difference
    np.testing.assert_allclose(found, expected, atol=1e-8)


@EACH
def test_an_argument_of_load(algorithm, override, archives):
    check(algorithm, archives, override, lambda path: algorithm.load(path, environments(), "cpu", **override))


@pytest.mark.parametrize(("algorithm", "override"), CASES[::3], ids=lambda x: named(x) if isinstance(x, dict) else None)
def test_a_custom_object(algorithm, override, archives):
    check(algorithm, archives, override, lambda path: algorithm.load(path, environments(), "cpu", override))


@EACH
def test_an_attribute_set_after_loading(algorithm, override, archives):
    def load(path):
        model = algorithm.load(path, environments(), "cpu")
        for name, value in override.items():
            setattr(model, name, value)
        return model

    check(algorithm, archives, override, load)


@ALL
@pytest.mark.parametrize("name, value", [("gamma", 0.3), ("gae_lambda", 0.2)])
def test_an_attribute_of_the_rollout_buffer_as_sb3_users_set_it(algorithm, name, value, archives):
    def load(path):
        model = algorithm.load(path, environments(), "cpu")
        setattr(model.rollout_buffer, name, value)
        return model

    check(algorithm, archives, {name: value}, load)


@ALL
def test_a_learning_rate_schedule_set_as_sb3_users_set_it(algorithm, archives):
    def load(path):
        model = algorithm.load(path, environments(), "cpu")
        model.lr_schedule = falling
        return model

    check(algorithm, archives, {"learning_rate": falling}, load)


@ALL
@pytest.mark.parametrize("kwargs", [{}, {"factor": 0.1}])
def test_a_rollout_buffer(algorithm, kwargs, archives):
    override = {"rollout_buffer_class": Halved, "rollout_buffer_kwargs": kwargs, "normalize_advantage": False}
    check(algorithm, archives, override, lambda path: algorithm.load(path, environments(), "cpu", **override))


@ALL
def test_the_buffer_and_the_optimizer_have_the_new_values_at_once(algorithm, archives):
    path, _ = archives[algorithm]
    override = {"gamma": 0.3, "gae_lambda": 0.2, "learning_rate": 0.02}
    model = algorithm.load(path, environments(), "cpu", **override)
    assert (model.rollout_buffer.gamma, model.rollout_buffer.gae_lambda) == (0.3, 0.2)
    assert model.policy.optimizer.param_groups[0]["lr"] == 0.02
    assert model.policy.optimizer.state_dict()["state"]


@pytest.mark.parametrize("writer, reader", [(stable_baselines3.PPO, PPO), (sb3_contrib.TRPO, TRPO)])
@pytest.mark.parametrize(
    "override", [{"learning_rate": 0.02}, {"gamma": 0.3}, {"n_steps": 8}, {"target_kl": 1e-9}], ids=str
)
def test_archives_of_sb3(writer, reader, override, tmp_path):
    options = {**OPTIONS[reader], "policy_kwargs": {"net_arch": [8]}, "seed": 0, "device": "cpu"}
    writer("MlpPolicy", environments(), **options).learn(64).save(tmp_path / "model")
    plain = learned(reader.load(tmp_path / "model", environments(), "cpu"))
    check(
        reader,
        {reader: (tmp_path / "model", plain)},
        override,
        lambda path: reader.load(path, environments(), "cpu", **override),
    )


@ALL
def test_a_seed(algorithm, archives):
    path, _ = archives[algorithm]

    def run(seed):
        return weights(algorithm.load(path, environments(), "cpu", seed=seed).learn(64))

    np.testing.assert_array_equal(run(7), run(7))
    assert not np.array_equal(run(8), run(7))


@ALL
def test_where_and_how_much_is_logged(algorithm, archives, tmp_path, capsys):
    path, _ = archives[algorithm]
    model = algorithm.load(path, environments(), "cpu", tensorboard_log=str(tmp_path), stats_window_size=3, verbose=1)
    model.learn(64, tb_log_name="run")
    assert list(tmp_path.glob("run_1/events*"))
    assert model.ep_info_buffer.maxlen == 3
    assert "train/" in capsys.readouterr().out


def test_the_optimizer_of_a2c(archives):
    path, _ = archives[REINFORCE]
    try:
        model = REINFORCE.load(path, environments(), "cpu", use_rms_prop=True)
    except (ValueError, TypeError) as error:  # its state is Adam's; but it must not be ignored
        assert "use_rms_prop" in str(error)
    else:
        assert isinstance(model.policy.optimizer, th.optim.RMSprop)


@ALL
def test_a_misspelt_argument(algorithm, archives):
    path, _ = archives[algorithm]
    with pytest.raises((TypeError, ArgumentError), match="gama"):
        algorithm.load(path, environments(), "cpu", gama=0.3)


@ALL
@pytest.mark.parametrize("override", [{"gamma": 1.5}, {"ent_coef": -1.0}, {"learning_rate": "high"}], ids=str)
def test_values_that_cannot_work(algorithm, override, archives):
    path, _ = archives[algorithm]
    with pytest.raises(ArgumentError, match=f"`{next(iter(override))}`"):
        algorithm.load(path, environments(), "cpu", **override)
    with pytest.raises(ArgumentError, match=f"`{next(iter(override))}`"):
        algorithm.load(path, environments(), "cpu", override)


# ------------------------------------------------------------------------ adapted


class Watching(th.optim.Adam):
    """Remembers the learning rate of every step."""

    seen: list[float]

    def step(self, closure=None):
        Watching.seen.append(self.param_groups[0]["lr"])
        return super().step(closure)


#: The KL of an update is always too large for ``desired_kl``: one doubles at each, the other is divided at each epoch.
ADAPTIVE = {
    "learning_rate": 3e-3,
    "adaptive_lr": True,
    "kl_coef": 1.0,
    "adaptive_kl_coef": True,
    "desired_kl": 1e-12,
    "policy_kwargs": {"optimizer_class": Watching},
}
ADAPTED_LR = 3e-3 / 1.5**6


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    """An archive in which the coefficient has become 8 and the learning rate ``ADAPTED_LR``."""
    Watching.seen = []
    path = tmp_path_factory.mktemp("adapted") / "model"
    tiny(PPO, environments(), **ADAPTIVE).learn(96).save(path)
    return path


def used(model, n_updates=2):
    """The KL coefficient of each of the next updates, and the learning rate of each epoch."""
    model.set_logger(configure(None, []))
    Watching.seen, coefficients = [], []
    for _ in range(n_updates):
        model.learn(32, log_interval=None)
        coefficients.append(model.logger.name_to_value.pop("train/kl_coef", 0.0))
    rates = np.reshape(Watching.seen, (n_updates, 2, -1))
    return coefficients, list(rates[:, :, 0].ravel())


WAYS = {
    "argument": lambda path, override: PPO.load(path, environments(), "cpu", trusted=True, **override),
    "custom object": lambda path, override: PPO.load(path, environments(), "cpu", override, trusted=True),
}


def by_attribute(path, override):
    model = PPO.load(path, environments(), "cpu", trusted=True)
    for name, value in override.items():
        setattr(model, name, value)
    return model


WAYS["attribute"] = by_attribute


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "override, coefficients",
    [
        ({}, [8.0, 16.0]),
        ({"kl_coef": 0.0, "adaptive_kl_coef": False}, [0.0, 0.0]),
        ({"kl_coef": 2.0, "adaptive_kl_coef": False}, [2.0, 2.0]),
        ({"kl_coef": 0.5}, [0.5, 1.0]),
        ({"kl_coef": 1.0}, [1.0, 2.0]),  # the value that it had at the beginning, asked for again
        ({"kl_coef": constant(3.0), "adaptive_kl_coef": False}, [3.0, 3.0]),
        ({"desired_kl": 1e12}, [8.0, 4.0]),
    ],
    ids=lambda x: named(x) if isinstance(x, dict) else "",
)
def test_the_coefficient_of_the_penalty(way, override, coefficients, adapted):
    assert used(WAYS[way](adapted, override))[0] == pytest.approx(coefficients)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "override, rates",
    [
        ({}, [ADAPTED_LR, ADAPTED_LR / 1.5, ADAPTED_LR / 1.5**2, ADAPTED_LR / 1.5**3]),
        ({"learning_rate": 1e-3}, [1e-3, 1e-3 / 1.5, 1e-3 / 1.5**2, 1e-3 / 1.5**3]),
        ({"learning_rate": 3e-3}, [3e-3, 3e-3 / 1.5, 3e-3 / 1.5**2, 3e-3 / 1.5**3]),
        ({"learning_rate": 1e-3, "adaptive_lr": False}, [1e-3] * 4),
        ({"learning_rate": constant(2e-3), "adaptive_lr": False}, [2e-3] * 4),
        ({"desired_kl": 1e12}, [ADAPTED_LR, ADAPTED_LR * 1.5, ADAPTED_LR * 1.5**2, ADAPTED_LR * 1.5**3]),
    ],
    ids=lambda x: named(x) if isinstance(x, dict) else "",
)
def test_the_learning_rate(way, override, rates, adapted):
    assert used(WAYS[way](adapted, override))[1] == pytest.approx(rates)


@pytest.mark.parametrize("way", WAYS)
def test_without_adaptation_both_stay(way, adapted):
    coefficients, rates = used(WAYS[way](adapted, {"adaptive_lr": False, "adaptive_kl_coef": False}))
    assert len(set(coefficients)) == len(set(rates)) == 1
    assert coefficients[0] in (1.0, 8.0)
    assert rates[0] == pytest.approx(3e-3) or rates[0] == pytest.approx(ADAPTED_LR)


def test_an_override_is_where_later_archives_go_on_from(adapted, tmp_path):
    model = PPO.load(adapted, environments(), "cpu", trusted=True, kl_coef=0.25, learning_rate=1e-3)
    assert used(model)[0] == [0.25, 0.5]
    model.save(tmp_path / "again")
    coefficients, rates = used(PPO.load(tmp_path / "again", environments(), "cpu", trusted=True))
    assert coefficients == [1.0, 2.0]
    assert rates[0] == pytest.approx(1e-3 / 1.5**4)


def test_a_model_that_did_not_adapt_begins_with_its_own_values(archives):
    path, _ = archives[PPO]
    model = PPO.load(
        path, environments(), "cpu", adaptive_lr=True, adaptive_kl_coef=True, kl_coef=0.5, desired_kl=1e-12
    )
    before = model.lr_schedule(1.0)
    model.set_logger(configure(None, []))
    model.learn(32, log_interval=None)
    assert model.logger.name_to_value["train/kl_coef"] == 0.5
    assert model.logger.name_to_value["train/learning_rate"] == pytest.approx(before / 1.5**2)


def test_a_schedule_contradicts_the_adaptation_that_the_archive_asks_for(adapted):
    with pytest.raises(ArgumentError, match="contradict"):
        PPO.load(adapted, environments(), "cpu", trusted=True, learning_rate=falling)
    with pytest.raises(ArgumentError, match="`adaptive_kl_coef=True` needs"):
        PPO.load(adapted, environments(), "cpu", trusted=True, kl_coef=0.0)


@pytest.mark.parametrize("baseline", ["value", None, "leave_one_out"])
def test_the_moving_average_of_another_baseline_has_no_effect(baseline, tmp_path):
    tiny(REINFORCE, environments(), baseline="ema", gamma=1.0).learn(64).save(tmp_path / "model")
    override = {"baseline": baseline, "normalize_advantage": False}
    expected = learned(made_anew(REINFORCE, tmp_path / "model", gamma=1.0, **override))
    found = learned(REINFORCE.load(tmp_path / "model", environments(), "cpu", **override))
    np.testing.assert_allclose(found, expected, atol=1e-8)


@pytest.mark.parametrize(
    "algorithm, options", [(PPO, ADAPTIVE), (TRPO, {}), (REINFORCE, {"baseline": "ema", "normalize_advantage": False})]
)
def test_without_overrides_a_model_goes_on_as_the_one_that_was_saved(algorithm, options, tmp_path):
    Watching.seen = []
    model = tiny(algorithm, environments(), **options).learn(96)
    model.save(tmp_path / "model")
    model.set_env(environments())
    expected, found = learned(model), learned(algorithm.load(tmp_path / "model", environments(), "cpu", trusted=True))
    np.testing.assert_array_equal(found, expected)

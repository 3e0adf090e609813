"""Whatever is passed in place of what is meant gets one error that names the argument, what it got, and what to do."""

import functools
import math
import re

import numpy as np
import pytest
import stable_baselines3
import torch as th
from conftest import FakeEnv, make_envs, spelled
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.common.utils import ConstantSchedule, FloatSchedule
from tiny_models import ALGORITHMS, ALL, OPTIONS, OwnGet, tiny, weights

from sb3_pg import PPO, REINFORCE, TRPO
from sb3_pg.common.distributions import BoxPolicy
from sb3_pg.common.errors import ArgumentError, check_number

pytestmark = pytest.mark.filterwarnings("ignore:You have specified a mini-batch size")

ENGINES = pytest.mark.parametrize("engine", ["auto", "autograd"])


# ------------------------------------------------------------------ PPO's own objective


def surrogate(log_ratio, advantage):
    return -advantage * log_ratio, -advantage


WRONG_OBJECTIVES = {
    "only the loss": lambda log_ratio, advantage: surrogate(log_ratio, advantage)[0],
    "three": lambda log_ratio, advantage: (*surrogate(log_ratio, advantage), advantage),
    "nothing": lambda log_ratio, advantage: None,
    "means": lambda log_ratio, advantage: tuple(x.mean() for x in surrogate(log_ratio, advantage)),
    "the loss's mean": lambda log_ratio, advantage: (surrogate(log_ratio, advantage)[0].mean(), -advantage),
    "numbers": lambda log_ratio, advantage: (0.0, 0.0),
    "columns": lambda log_ratio, advantage: tuple(x[:, None] for x in surrogate(log_ratio, advantage)),
    "too few": lambda log_ratio, advantage: tuple(x[1:] for x in surrogate(log_ratio, advantage)),
    "no derivative": lambda log_ratio, advantage: (-advantage, None),
    "no loss": lambda log_ratio, advantage: (None, -advantage),
    "text": lambda log_ratio, advantage: ("loss", "derivative"),
    "a dictionary": lambda log_ratio, advantage: dict(zip("ab", surrogate(log_ratio, advantage), strict=True)),
}


@ENGINES
@pytest.mark.parametrize("name", WRONG_OBJECTIVES)
def test_an_objective_that_answers_wrongly(name, engine):
    model = tiny(PPO, make_envs(), objective=WRONG_OBJECTIVES[name], engine=engine)
    before = weights(model)
    with pytest.raises(ArgumentError, match="`objective` must return") as caught:
        model.learn(16)
    for word in ("loss", "derivative", "16"):
        assert word in str(caught.value)
    np.testing.assert_array_equal(weights(model), before)
    model.objective = surrogate
    assert not np.array_equal(weights(model.learn(16)), before)


@ENGINES
def test_a_loss_of_two_samples_is_not_taken_for_two_answers(engine):
    model = tiny(PPO, make_envs(), objective=WRONG_OBJECTIVES["only the loss"], engine=engine, batch_size=2)
    with pytest.raises(ArgumentError, match="`objective` must return"):
        model.learn(16)


@pytest.mark.parametrize("as_what", [lambda x: np.asarray(x), lambda x: list(np.asarray(x))], ids=["numpy", "list"])
def test_an_objective_in_numpy_where_torch_differentiates(as_what):
    def objective(log_ratio, advantage):
        return tuple(as_what(x.detach() if isinstance(x, th.Tensor) else x) for x in surrogate(log_ratio, advantage))

    with pytest.raises(ArgumentError, match=r"`objective` must return .*(Tensor|torch)"):
        tiny(PPO, make_envs(), objective=objective, engine="autograd").learn(16)


@ENGINES
def test_an_objective_whose_numbers_are_not_finite_is_named(engine):
    def objective(log_ratio, advantage):
        loss, derivative = surrogate(log_ratio, advantage)
        return loss, derivative * float("nan")

    with pytest.raises(ValueError, match="`objective`"):
        tiny(PPO, make_envs(), objective=objective, engine=engine).learn(16)


@ENGINES
def test_an_objective_of_other_parameters(engine):
    with pytest.raises(ArgumentError, match=r"(?s)`objective`.*log_ratio, advantage"):
        tiny(PPO, make_envs(), objective=lambda log_ratio: (log_ratio, log_ratio), engine=engine).learn(16)


@ENGINES
def test_an_objectives_own_error_is_not_covered_up(engine):
    with pytest.raises(ZeroDivisionError):
        tiny(PPO, make_envs(), objective=lambda log_ratio, advantage: 1 / 0, engine=engine).learn(16)


@ENGINES
@pytest.mark.parametrize("kind", [tuple, list])
def test_objectives_that_answer_rightly(engine, kind):
    found = tiny(PPO, make_envs(), objective=lambda *x: kind(surrogate(*x)), engine=engine).learn(16)
    expected = tiny(PPO, make_envs(), objective=surrogate, engine=engine).learn(16)
    np.testing.assert_array_equal(weights(found), weights(expected))


@pytest.mark.parametrize(
    "baseline",
    [
        lambda observations, returns: None,
        lambda observations, returns: "high",
        lambda observations, returns: {},
        lambda observations, returns: returns[:, None],
        lambda observations, returns: returns[1:],
        lambda observations, returns: [[1.0], [1.0, 2.0]],
        lambda observations, returns: returns * float("inf"),
    ],
    ids=["nothing", "text", "dictionary", "column", "too few", "ragged", "infinite"],
)
def test_a_baseline_that_answers_wrongly(baseline):
    with pytest.raises(ArgumentError, match=r"`baseline` must return one finite number for each of the 16 samples"):
        tiny(REINFORCE, make_envs(), baseline=baseline).learn(16)


def test_a_baseline_of_other_parameters():
    with pytest.raises(ArgumentError, match=r"(?s)`baseline`.*observations, returns"):
        tiny(REINFORCE, make_envs(), baseline=lambda returns: returns).learn(16)


# ------------------------------------------------------------------------------- learn


@ALL
@pytest.mark.parametrize("value", [-1, -1e5, float("nan"), "100", None, [100], {}, "many", 1j])
def test_how_long_to_learn(algorithm, value):
    model = tiny(algorithm, make_envs()).learn(32)
    before, steps = weights(model), model.num_timesteps
    for reset in (False, True):
        with pytest.raises(ArgumentError, match=rf"`total_timesteps` must be .*not {re.escape(repr(value))}"):
            model.learn(value, reset_num_timesteps=reset)
        assert model.num_timesteps == steps  # nothing was begun
    np.testing.assert_array_equal(weights(model), before)
    model.learn(16, reset_num_timesteps=False)
    assert model.num_timesteps > steps


@ALL
@pytest.mark.parametrize("reset", [True, False])
def test_learning_for_no_time(algorithm, reset):
    model = tiny(algorithm, make_envs()).learn(32)
    before = weights(model)
    try:
        assert model.learn(0, reset_num_timesteps=reset) is model  # as SB3 does
    except ArgumentError as error:
        assert "`total_timesteps`" in str(error)
    np.testing.assert_array_equal(weights(model), before)


@ALL
@pytest.mark.parametrize("value", [32, 32.0, 31.5, np.int64(32), np.float32(32), np.array(32), th.tensor(32)])
def test_numbers_of_every_kind_for_how_long(algorithm, value):
    expected = weights(tiny(algorithm, make_envs()).learn(32))
    np.testing.assert_array_equal(weights(tiny(algorithm, make_envs()).learn(value)), expected)


@ALL
def test_learning_until_a_callback_stops(algorithm):
    model = tiny(algorithm, make_envs())
    model.learn(float("inf"), lambda locals_, globals_: model.num_timesteps < 40)
    assert model.num_timesteps == 40
    assert model._n_updates > 0
    assert np.isfinite(weights(model)).all()


@ALL
@pytest.mark.parametrize("value", [0, -1, "1", [1], float("nan")])
def test_how_often_to_log(algorithm, value):
    model = tiny(algorithm, make_envs())
    with pytest.raises(ArgumentError, match=rf"`log_interval` must be .*not {re.escape(repr(value))}"):
        model.learn(32, log_interval=value)
    assert model.num_timesteps == 0
    model.learn(32, log_interval=None)


@ALL
def test_a_model_without_an_environment(algorithm):
    with pytest.raises(ArgumentError, match="`env`"):
        algorithm("MlpPolicy", None)


# --------------------------------------------------------------------------- schedules


def failing(progress_remaining):
    raise TypeError("of its own")


COEFFICIENTS = {
    PPO: [
        "learning_rate",
        "ent_coef",
        "vf_coef",
        "clip_range",
        "clip_range_vf",
        "clip_range_high",
        "kl_coef",
        "target_kl",
    ],
    TRPO: ["learning_rate", "ent_coef", "target_kl"],
    REINFORCE: ["learning_rate", "ent_coef", "vf_coef", "target_kl"],
}
EACH = pytest.mark.parametrize(
    ("algorithm", "name"), [(algorithm, name) for algorithm, names in COEFFICIENTS.items() for name in names]
)
WRONG_SCHEDULES = {
    "text": (lambda progress_remaining: "high", "'high'"),
    "nothing": (lambda progress_remaining: None, "None"),
    "a list": (lambda progress_remaining: [0.1], r"\[0\.1\]"),
    "two numbers": (lambda progress_remaining: np.ones(2), r"array\(\[1\., 1\.\]\)"),
    "not a number": (lambda progress_remaining: float("nan"), "nan"),
    "its own error": (failing, "of its own"),
    "no parameter": (lambda: 0.1, "argument"),
    "two parameters": (lambda progress_remaining, more: 0.1, "argument"),
}


@EACH
@pytest.mark.parametrize("kind", WRONG_SCHEDULES)
def test_a_schedule_that_answers_wrongly(algorithm, name, kind):
    schedule, words = WRONG_SCHEDULES[kind]
    with pytest.raises(ArgumentError, match=rf"(?s)schedule of `{name}`.*{words}"):
        tiny(algorithm, make_envs(), **{name: schedule}).learn(32)


@EACH
def test_a_schedule_that_goes_wrong_later(algorithm, name):
    def schedule(progress_remaining):
        return 0.1 if progress_remaining > 0.6 else None

    model = tiny(algorithm, make_envs(), **{name: schedule})
    with pytest.raises(ArgumentError, match=rf"(?s)schedule of `{name}`.*None.*progress_remaining=0\.\d+"):
        model.learn(128)
    assert np.isfinite(weights(model)).all()


@EACH
@pytest.mark.parametrize(
    "value",
    [lambda progress_remaining: np.float32(0.1), lambda progress_remaining: th.tensor(0.1)],
    ids=["numpy", "torch"],
)
def test_a_schedule_of_other_numbers(algorithm, name, value):
    assert np.isfinite(weights(tiny(algorithm, make_envs(), **{name: value}).learn(32))).all()


# ----------------------------------------------------------------------------- numbers

NUMBERS = {
    PPO: ["learning_rate", "gamma", "gae_lambda", "ent_coef", "vf_coef", "max_grad_norm", "clip_range", "clip_range_vf"]
    + ["clip_range_high", "target_kl", "kl_coef", "desired_kl"],
    TRPO: [
        "learning_rate",
        "gamma",
        "gae_lambda",
        "ent_coef",
        "target_kl",
        "cg_damping",
        "line_search_shrinking_factor",
    ],
    REINFORCE: [
        "learning_rate",
        "gamma",
        "gae_lambda",
        "ent_coef",
        "vf_coef",
        "max_grad_norm",
        "ema_decay",
        "target_kl",
    ],
}
EACH_NUMBER = pytest.mark.parametrize(
    ("algorithm", "name"), [(algorithm, name) for algorithm, names in NUMBERS.items() for name in names]
)


@EACH_NUMBER
@pytest.mark.parametrize("value", [True, False, np.True_], ids=repr)
def test_yes_or_no_where_a_number_is_meant(algorithm, name, value):
    with pytest.raises(ArgumentError, match=rf"`{name}` must be .*not {re.escape(repr(value))}"):
        tiny(algorithm, make_envs(), **{name: value})


@EACH_NUMBER
@pytest.mark.parametrize("value", [np.float32(0.5), np.float64(0.5), np.array(0.5), th.tensor(0.5)], ids=repr)
def test_numbers_of_every_kind(algorithm, name, value):
    found, expected = (tiny(algorithm, make_envs(), **{name: x}).learn(16) for x in (value, 0.5))
    np.testing.assert_array_equal(weights(found), weights(expected))


WRONG = {
    PPO: {
        "n_steps": 0,
        "batch_size": 0,
        "n_epochs": "a",
        "gamma": 2.0,
        "gae_lambda": -1,
        "clip_range": -0.1,
        "clip_range_vf": "x",
        "normalize_advantage": "q",
        "ent_coef": "a",
        "vf_coef": -1,
        "ratio": "z",
        "max_grad_norm": "x",
        "target_kl": -1,
        "objective": "z",
        "clip_range_high": 0,
        "kl_coef": "a",
        "loss_average": "z",
        "learning_rate": -1,
        "critic_learning_rate": "a",
        "critic_optimizer_kwargs": 3,
        "engine": "z",
        "n_episodes": 0,
        "baseline": "z",
        "sde_sample_freq": None,
        "desired_kl": 0,
        "dual_clip": 0.5,
        "max_episode_steps": 0,
        "scale_rewards": "z",
        "ema_decay": 2,
        "use_masking": "z",
    },
    TRPO: {
        "cg_max_steps": 0,
        "cg_damping": -1,
        "line_search_shrinking_factor": 2.0,
        "line_search_max_iter": 0,
        "n_critic_updates": -1,
        "target_kl": 0,
        "sub_sampling_factor": 0,
    },
    REINFORCE: {"n_episodes": 0, "batch_size": 0, "n_critic_updates": -1, "critic_batch_size": 0, "target_kl": -1},
}


@pytest.mark.parametrize(
    ("algorithm", "name", "value"), [(algorithm, *its) for algorithm, wrong in WRONG.items() for its in wrong.items()]
)
def test_what_cannot_work_is_refused_early_and_late(algorithm, name, value):
    """Where it is passed, and by the next ``learn`` where it is set later; what works goes on afterwards."""
    words = rf"`{name}[`=].*{re.escape(repr(value))}"
    with pytest.raises(ArgumentError, match=words):
        tiny(algorithm, make_envs(), **{name: value})
    model = tiny(algorithm, make_envs()).learn(16)
    good, before = getattr(model, name), weights(model)
    setattr(model, name, value)
    for _ in range(2):
        with pytest.raises(ArgumentError, match=words):
            model.learn(16)
    np.testing.assert_array_equal(weights(model), before)
    setattr(model, name, good)
    model.learn(16)


class Setting(BaseCallback):
    """Sets an attribute of the model, once, at a step or at the end of a rollout."""

    def __init__(self, name, value, when):
        super().__init__()
        self.name, self.value, self.when = name, value, when

    def _set(self, when):
        if self.when == when:
            setattr(self.model, self.name, self.value)
            self.when = None

    def _on_step(self):
        self._set(self.n_calls)
        return True

    def _on_rollout_end(self):
        self._set("end")


@pytest.mark.parametrize("when", [3, "end"])
@pytest.mark.parametrize(
    ("algorithm", "name", "value"), [(algorithm, *its) for algorithm, wrong in WRONG.items() for its in wrong.items()]
)
def test_what_cannot_work_is_refused_amid_learning(algorithm, name, value, when):
    model = tiny(algorithm, make_envs(), n_steps=8)
    good, before = getattr(model, name), weights(model)
    with pytest.raises(ArgumentError, match=rf"`{name}[`=].*{re.escape(repr(value))}"):
        model.learn(64, Setting(name, value, when))
    np.testing.assert_array_equal(weights(model), before)
    setattr(model, name, good)
    model.learn(16, reset_num_timesteps=False)
    assert not np.array_equal(weights(model), before)


SET_AMID = {"gamma": 0.5, "gae_lambda": 0.1, "learning_rate": 0.05, "ent_coef": 0.3}
SET_AMID_OF_ONE_OPTIMIZER = {"critic_learning_rate": 0.05, "critic_optimizer_kwargs": {"eps": 0.01}}


@ENGINES
@pytest.mark.parametrize(
    ("algorithm", "name", "value"),
    [
        *((algorithm, *its) for algorithm in ALGORITHMS for its in SET_AMID.items()),
        *((algorithm, *its) for algorithm in (PPO, REINFORCE) for its in SET_AMID_OF_ONE_OPTIMIZER.items()),
    ],
)
def test_what_a_callback_sets_holds_from_that_update_on(algorithm, name, value, engine):
    def learned(callback=None, **options):
        return weights(tiny(algorithm, make_envs(), n_steps=8, engine=engine, **options).learn(32, callback))

    from_the_start = learned(**{name: value})
    np.testing.assert_array_equal(learned(Setting(name, value, 3)), from_the_start)
    assert not np.array_equal(learned(), from_the_start)


@ALL
@pytest.mark.parametrize("when", [3, "end"])
@pytest.mark.parametrize(("before", "after"), [("auto", "autograd"), ("autograd", "auto")])
def test_an_engine_that_a_callback_chooses(algorithm, before, after, when):
    changed = tiny(algorithm, make_envs(), n_steps=8, engine=before).learn(32, Setting("engine", after, when))
    kept = tiny(algorithm, make_envs(), n_steps=8, engine=before).learn(32)
    assert changed.network.description.startswith({"auto": "closed-form", "autograd": "autograd"}[after])
    np.testing.assert_allclose(weights(changed), weights(kept), atol=1e-5)


def test_limits_of_both_parts_set_by_a_callback_may_be_a_list():
    model = tiny(PPO, make_envs(), n_steps=8).learn(32, Setting("max_grad_norm", [1e-6, 1e-6], 3))
    expected = tiny(PPO, make_envs(), n_steps=8, max_grad_norm=(1e-6, 1e-6)).learn(32)
    np.testing.assert_array_equal(weights(model), weights(expected))


def test_generalised_exploration_cannot_be_chosen_later():
    model = tiny(PPO, make_envs())
    model.use_sde = True
    with pytest.raises(ArgumentError, match="`use_sde=True` comes too late"):
        model.learn(16)


@pytest.mark.parametrize(
    ("algorithm", "options"),
    [
        *((algorithm, {"loss_average": its}) for algorithm in ALGORITHMS for its in ("sequence", 9)),
        (PPO, {"ratio": "sequence"}),
    ],
)
def test_what_needs_sequences_is_refused_with_a_buffer_that_gives_out_its_own_samples(algorithm, options):
    ((name, value),) = options.items()
    options = {"n_steps": 8, "baseline": "value", **options}
    message = f"^`{name}={value!r}` needs to know which samples .*`rollout_buffer_class=OwnGet` .*Leave one of them out"
    with pytest.raises(ArgumentError, match=message):
        tiny(algorithm, make_envs(), rollout_buffer_class=OwnGet, **options)
    tiny(algorithm, make_envs(), **options).learn(16)


@ALL
@pytest.mark.parametrize("value", [16.5, "16", -1, True, [16], float("nan")], ids=repr)
def test_counts(algorithm, value):
    name = "n_episodes" if algorithm is REINFORCE else "n_steps"
    with pytest.raises(ArgumentError, match=rf"`{name}` must be a whole number.*not {re.escape(repr(value))}"):
        tiny(algorithm, make_envs(), **{name: value})


@pytest.mark.parametrize(
    ("low", "high", "wanted"),
    [
        (0.0, math.inf, "a finite number >= 0"),
        (0.0, 1.0, "a finite number >= 0 and <= 1"),
        (-math.inf, 1.0, "a finite number <= 1"),
        (-math.inf, math.inf, "a finite number"),
    ],
)
def test_the_limits_in_the_message(low, high, wanted):
    with pytest.raises(ArgumentError) as caught:
        check_number("x", math.nan, low, high)
    assert str(caught.value) == f"`x` must be {wanted}, not nan."


@pytest.mark.parametrize("wrap", [lambda x: x, ConstantSchedule, FloatSchedule], ids=["number", "constant", "wrapped"])
def test_a_number_that_is_no_schedule_is_not_called_one(wrap):
    """As when somebody sets it between two calls of learn()."""
    model = tiny(PPO, make_envs(), ent_coef=0.0)
    model.ent_coef = wrap(-1.0)
    with pytest.raises(ArgumentError, match=r"`ent_coef` must be a finite number >= 0, not -1\.0\."):
        model.learn(32)


# ---------------------------------------------------------------------------- policies


@ALL
@pytest.mark.parametrize(
    "name, nearest",
    [
        ("MlpPolcy", "MlpPolicy"),
        ("mlppolicy", "MlpPolicy"),
        ("Mlp", "MlpPolicy"),
        ("CNNPolicy", "CnnPolicy"),
        ("MultiInput", "MultiInputPolicy"),
        ("MultiInputsPolicy", "MultiInputPolicy"),
        ("CasualLMPolicy", "CausalLMPolicy"),
    ],
)
def test_a_misspelt_policy(algorithm, name, nearest):
    with pytest.raises(ArgumentError) as caught:
        algorithm(name, make_envs())
    message = str(caught.value)
    for known in ("MlpPolicy", "CnnPolicy", "MultiInputPolicy", "CausalLMPolicy", "Seq2SeqLMPolicy"):
        assert f"'{known}'" in message
    assert f"'{name}'" in message
    assert re.search(rf"(?i)mean '{nearest}'", message), message


@ALL
def test_a_policy_unlike_any(algorithm):
    with pytest.raises(ArgumentError, match=r"(?s)'Transformer'.*'MlpPolicy'") as caught:
        algorithm("Transformer", make_envs())
    assert "mean '" not in str(caught.value)


@ALL
@pytest.mark.parametrize(
    "policy",
    [None, 3, "", dict, th.nn.Linear, stable_baselines3.dqn.MlpPolicy, stable_baselines3.sac.MlpPolicy],
    ids=["None", "number", "no name", "dict", "module", "dqn", "sac"],
)
def test_what_is_no_policy(algorithm, policy):
    with pytest.raises(ArgumentError, match=r"(?s)`policy`.*ActorCriticPolicy"):
        algorithm(policy, make_envs())


@ALL
def test_a_policy_that_is_made_already(algorithm):
    made = tiny(algorithm, make_envs()).policy
    with pytest.raises(ArgumentError, match=r"(?s)`policy`.*class"):
        algorithm(made, make_envs())


@ALL
def test_a_policys_own_error_is_not_covered_up(algorithm):
    class Failing(ActorCriticPolicy):
        def __init__(self, *args, **kwargs):
            raise TypeError("of its own")

    with pytest.raises(TypeError, match="of its own"):
        algorithm(Failing, make_envs())


VECTOR = spaces.Box(-1, 1, (3,))
FLOATING_IMAGE = spaces.Box(0, 1, (1, 36, 36))
SMALL_IMAGE = spaces.Box(0, 255, (1, 20, 20), np.uint8)
DICT = spaces.Dict({"a": VECTOR, "b": spaces.Discrete(3)})


@ALL
@pytest.mark.parametrize(
    "policy, space, advice",
    [
        ("MultiInputPolicy", VECTOR, "'MlpPolicy'"),
        ("MultiInputPolicy", spaces.Discrete(3), "'MlpPolicy'"),
        ("MultiInputPolicy", spaces.Box(0, 255, (1, 36, 36), np.uint8), "'CnnPolicy'"),
        ("MlpPolicy", DICT, "'MultiInputPolicy'"),
        ("CnnPolicy", DICT, "'MultiInputPolicy'"),
        (ActorCriticPolicy, DICT, "'MultiInputPolicy'"),
        ("CnnPolicy", VECTOR, "'MlpPolicy'"),
        ("CnnPolicy", spaces.Discrete(3), "'MlpPolicy'"),
        ("CnnPolicy", FLOATING_IMAGE, "normalize_images"),
        ("CnnPolicy", SMALL_IMAGE, "36"),
    ],
    ids=str,
)
def test_a_policy_for_other_observations(algorithm, policy, space, advice):
    name = policy if isinstance(policy, str) else policy.__name__
    with pytest.raises(ArgumentError) as caught:
        algorithm(policy, FakeEnv(space))
    message = str(caught.value)
    assert name in message
    assert str(space) in message or type(space).__name__ in message
    assert advice in message or advice.replace("'", "`") in message, message


@ALL
@pytest.mark.parametrize(
    "kwargs, words",
    [
        ({"activation_fn": "relu"}, "'relu'.*torch.nn.ReLU"),
        ({"activation_fn": th.nn.ReLU()}, "class"),
        ({"activation_fn": None}, "None"),
        ({"optimizer_class": "adam"}, "'adam'.*torch.optim"),
        ({"features_extractor_class": "NatureCNN"}, "'NatureCNN'.*class"),
        ({"net_arch": "64"}, "'64'"),
        ({"net_arch": 64}, r"64.*\[64"),
        ({"net_arch": [64, "64"]}, "'64'"),
        ({"net_arch": [8.5]}, r"8\.5"),
        ({"net_arch": [-8]}, "-8"),
        ({"net_arch": {"pi": [8], "value": [8]}}, "'value'.*'vf'"),
        ({"log_std_init": "low"}, "'low'"),
        ({"log_std_init": float("nan")}, " must be a finite number >= -20 and <= 20, not nan"),
        ({"log_std_init": -44}, " must be a finite number >= -20 and <= 20, not -44"),
        ({"use_sde": True}, "the algorithm gives the policy. Pass it to the algorithm"),
        ({"lr_schedule": 0.1}, "Pass `learning_rate` to the algorithm"),
        ({"observation_space": None}, "the algorithm gives the policy. Leave it out"),
        ({"log_std_init": True}, "number, not True"),
        ({"optimizer_kwargs": {"learning_rate": 1e-3}}, "'learning_rate'"),
        ({"optimizer_kwargs": {"lr": 1e-3}}, "'lr'.*`learning_rate`"),
        ({"optimizer_kwargs": {"betas": (2, 3)}}, r"\(2, 3\).*Invalid beta"),
        ({"optimizer_kwargs": {1: 2}}, "1, which Adam does not take"),
        ({"optimizer_kwargs": [1]}, r"must be a dictionary or None, not \[1\]"),
        ({"features_extractor_kwargs": 3}, "must be a dictionary or None, not 3"),
        ({"features_extractor_kwargs": {"dim": 3}}, "'dim'"),
    ],
    ids=str,
)
def test_arguments_of_the_policy(algorithm, kwargs, words):
    (name,) = kwargs
    with pytest.raises(ArgumentError, match=rf"(?s)policy_kwargs.*{name}.*{words}"):
        algorithm("MlpPolicy", FakeEnv(), policy_kwargs=kwargs)


@ALL
@pytest.mark.parametrize(
    "kind",
    [th.optim.LBFGS, th.optim.SparseAdam, th.nn.Linear, functools.partial(th.optim.Adam, eps=-1.0)],
    ids=["closure", "sparse", "layer", "partial"],
)
def test_an_optimizer_that_cannot_take_a_step(algorithm, kind):
    name = re.escape(getattr(kind, "__name__", repr(kind)))
    with pytest.raises(ArgumentError, match=rf"^{name} with `policy_kwargs: optimizer_kwargs=.*cannot take a step: "):
        tiny(algorithm, FakeEnv(), policy_kwargs={"optimizer_class": kind})


def test_an_optimizer_that_is_made_by_something_else():
    kind = functools.partial(th.optim.Adam, eps=0.3)
    assert tiny(PPO, FakeEnv(), policy_kwargs={"optimizer_class": kind}).policy.optimizer.param_groups[0]["eps"] == 0.3
    with pytest.raises(ArgumentError, match=r"has 'weight_deacy', which functools\.partial.*mean 'weight_decay'"):
        tiny(PPO, FakeEnv(), policy_kwargs={"optimizer_class": kind, "optimizer_kwargs": {"weight_deacy": 0.1}})


@ALL
@pytest.mark.parametrize("kwargs", ["net_arch", [("net_arch", [8])], 8], ids=str)
def test_arguments_of_the_policy_that_are_no_dictionary(algorithm, kwargs):
    with pytest.raises(ArgumentError, match=rf"(?s)`policy_kwargs` must be .*not {re.escape(repr(kwargs))}"):
        algorithm("MlpPolicy", FakeEnv(), policy_kwargs=kwargs)


@ALL
@pytest.mark.parametrize("name, nearest", [("net_arhc", "net_arch"), ("activation", "activation_fn"), ("lr", None)])
def test_an_unknown_argument_of_the_policy(algorithm, name, nearest):
    with pytest.raises(ArgumentError) as caught:
        algorithm("MlpPolicy", FakeEnv(), policy_kwargs={name: [8]})
    message = str(caught.value)
    assert "policy_kwargs" in message
    assert f"'{name}'" in message
    assert nearest is None or f"'{nearest}'" in message


class Small(ActorCriticPolicy):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, activation_fn=th.nn.ReLU, optimizer_class=th.optim.RMSprop, **kwargs)


class SmallOfBox(BoxPolicy, Small):
    pass


@ALL
@pytest.mark.parametrize(
    ("policy", "kwargs", "message"),
    [
        (Small, {"distribution": "beta"}, "` has 'distribution', which Small does not take.*BoxPolicy"),
        (Small, {"log_std_bounds": (-3, 1)}, "` has 'log_std_bounds', which Small does not take.*BoxPolicy"),
        (Small, {"activation_fn": th.nn.Tanh}, r"` has 'activation_fn', which Small does not take\.$"),
        (Small, {"activation": th.nn.Tanh}, "` has 'activation', which Small does not take.*'activation_fn'"),
        (Small, {"optimizer_kwargs": {"alhpa": 0.9}}, ": optimizer_kwargs` has 'alhpa', which RMSprop does not take"),
        (SmallOfBox, {"distributoin": "beta"}, "` has 'distributoin', which SmallOfBox does not take.*'distribution'"),
    ],
    ids=spelled,
)
def test_what_a_policy_of_the_users_hands_on_in_vain(algorithm, policy, kwargs, message):
    with pytest.raises(ArgumentError, match=f"^`policy_kwargs{message}"):
        tiny(algorithm, FakeEnv(), policy=policy, policy_kwargs=kwargs)


def test_errors_within_a_policy_of_the_users_stay_as_they_are():
    class Wrong(ActorCriticPolicy):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, ortho=False, **kwargs)

    with pytest.raises(TypeError, match="'ortho'"):
        tiny(PPO, FakeEnv(), policy=Wrong)


@ALL
def test_the_options_of_an_optimizer_that_the_users_policy_chooses(algorithm):
    """They are not Adam's, which policies have that choose none."""
    model = tiny(algorithm, FakeEnv(), policy=Small, policy_kwargs={"optimizer_kwargs": {"alpha": 0.5}})
    assert isinstance(model.policy.optimizer, th.optim.RMSprop)
    assert model.policy.optimizer.param_groups[0]["alpha"] == 0.5


# --------------------------------------------------------------- what is right stays so


@ALL
@pytest.mark.parametrize(
    "policy, space, kwargs",
    [
        ("CnnPolicy", VECTOR, {"features_extractor_class": FlattenExtractor}),
        ("MultiInputPolicy", VECTOR, {"features_extractor_class": FlattenExtractor}),
        ("CnnPolicy", SMALL_IMAGE, {"features_extractor_class": FlattenExtractor}),
        ("CnnPolicy", FLOATING_IMAGE, {"normalize_images": False, "features_extractor_kwargs": {"features_dim": 4}}),
        ("MlpPolicy", SMALL_IMAGE, {}),
        ("MlpPolicy", VECTOR, {"activation_fn": th.nn.LeakyReLU, "net_arch": {"pi": [8], "vf": [4]}}),
        ("MlpPolicy", VECTOR, {"activation_fn": lambda: th.nn.LeakyReLU(0.3)}),
        ("MlpPolicy", VECTOR, {"net_arch": []}),
        ("MlpPolicy", VECTOR, {"net_arch": (8, 8)}),
        ("MlpPolicy", VECTOR, {"net_arch": {"pi": [8]}}),
        ("MlpPolicy", VECTOR, {"net_arch": [np.int64(8)]}),
        ("MlpPolicy", VECTOR, {"optimizer_class": th.optim.SGD, "optimizer_kwargs": {"momentum": 0.9}}),
    ],
    ids=spelled,
)
def test_what_works_in_sb3_works(algorithm, policy, space, kwargs):
    options = {**OPTIONS[algorithm], "policy_kwargs": kwargs, "device": "cpu", "seed": 0}
    if algorithm is PPO:
        stable_baselines3.PPO(policy, FakeEnv(space), **options)
    model = algorithm(policy, FakeEnv(space), **options)
    before = weights(model)
    assert not np.array_equal(weights(model.learn(16)), before)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_policys_class_may_take_what_it_likes(algorithm):
    class Own(ActorCriticPolicy):
        def __init__(self, *args, temperature=1.0, **kwargs):
            super().__init__(*args, **kwargs)
            self.temperature = temperature

    model = tiny(algorithm, make_envs(), Own, policy_kwargs={"temperature": 0.5})
    assert model.policy.temperature == 0.5
    with pytest.raises((ArgumentError, TypeError), match="temprature"):
        tiny(algorithm, make_envs(), Own, policy_kwargs={"temprature": 0.5})


# ------------------------------------------------------------------ SB3's own arguments, and subclasses


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("stats_window_size", -1),
        ("stats_window_size", 2.5),
        ("stats_window_size", "5"),
        ("verbose", "1"),
        ("verbose", -1),
        ("tensorboard_log", 5),
        ("rollout_buffer_class", int),
        ("rollout_buffer_class", "RolloutBuffer"),
        ("rollout_buffer_kwargs", 3),
        ("normalize_advantage", "yes"),
        ("normalize_advantage", "False"),
        ("normalize_advantage", 2),
        ("normalize_advantage", None),
    ],
)
@ALL
def test_what_sb3_takes_without_a_look(algorithm, name, value, tmp_path):
    with pytest.raises(ArgumentError, match=f"`{name}` must be .*, not {re.escape(repr(value))}"):
        tiny(algorithm, FakeEnv(), **{name: value})
    if name in ("stats_window_size", "verbose", "tensorboard_log", "normalize_advantage"):
        tiny(algorithm, FakeEnv()).save(tmp_path / "model")
        with pytest.raises(ArgumentError, match=f"`{name}` must be"):
            algorithm.load(tmp_path / "model", **{name: value})


@ALL
def test_what_sb3_takes_is_taken(algorithm, tmp_path):
    tiny(algorithm, FakeEnv(), verbose=False, tensorboard_log=tmp_path, stats_window_size=np.int64(3))
    for name in ("adaptive_lr", "adaptive_kl_coef"):
        with pytest.raises(ArgumentError, match=f"`{name}` must be one of True, False, not 'yes'"):
            tiny(PPO, FakeEnv(), **{name: "yes"})


@pytest.mark.parametrize("callback", [5, "stop", [print], [[None]], [[]]], ids=str)
@ALL
def test_what_is_no_callback(algorithm, callback):
    with pytest.raises(ArgumentError, match=r"`callback` (must be|has) "):
        tiny(algorithm, FakeEnv()).learn(16, callback=callback)


class Louder(PPO):
    """Passes on what it does not name, as subclasses of SB3's algorithms do."""

    def __init__(self, *args, bonus=1.0, **kwargs):
        self.bonus = bonus
        super().__init__(*args, **kwargs)


def test_arguments_that_a_subclass_passes_on(tmp_path):
    kwargs = {"policy_kwargs": {"net_arch": [8]}, "n_steps": 32, "batch_size": 16, "seed": 1, "device": "cpu"}
    model = Louder("MlpPolicy", make_envs(), bonus=2.0, learning_rate=np.float32(1e-3), **kwargs).learn(32)
    model.gamma, model.gae_lambda, model.learning_rate, model.engine = 0.5, 0.1, 1e-5, "autograd"
    model.learn(32)
    assert (model.rollout_buffer.gamma, model.rollout_buffer.gae_lambda) == (0.5, 0.1)
    assert model.policy.optimizer.param_groups[0]["lr"] == 1e-5
    assert "autograd" in model.network.description
    model.n_steps = 0
    with pytest.raises(ArgumentError, match="`n_steps` must be a whole number >= 1, not 0"):
        model.learn(32)
    model.n_steps = 32
    model.save(tmp_path / "model")
    loaded = Louder.load(tmp_path / "model", learning_rate=1e-4, bonus=3.0)
    assert (loaded.learning_rate, loaded.bonus) == (1e-4, 3.0)
    with pytest.raises(
        ArgumentError, match=r"`learning_rat` is not an argument of Louder. Did you mean 'learning_rate'"
    ):
        Louder.load(tmp_path / "model", learning_rat=1e-4)


@pytest.mark.parametrize("policy", ["MultiInputPolicy", "MultiInputLstmPolicy", "MultiInputGruPolicy"])
def test_images_in_dictionaries_that_are_too_small(policy):
    for size, is_enough in ((35, False), (36, True)):
        image = spaces.Box(0, 255, (size, 40, 3), np.uint8)
        env = FakeEnv(spaces.Dict({"view": image, "speed": spaces.Box(-1, 1, (2,))}))
        if is_enough:
            PPO(policy, env, n_steps=8, batch_size=8)
            continue
        with pytest.raises(
            ArgumentError, match=r"36 x 36 pixels, not observations of 'view': Box\(0, 255, \(35, 40, 3\)"
        ):
            PPO(policy, env, n_steps=8, batch_size=8)

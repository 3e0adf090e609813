"""Default arguments of language models: what is not passed."""

import inspect

import pytest
from text_models import config_of, letters_task, make
from tiny_models import ALGORITHMS, tiny

from sb3_pg import PPO, REINFORCE, TRPO
from sb3_pg.text import CausalLMPolicy, TextVecEnv
from sb3_pg.text.presets import ARGUMENTS, RATES

COMPARED = {"n_episodes": 64, "baseline": "leave_one_out", "gamma": 1.0}


def lm(algorithm, policy="CausalLMPolicy", policy_kwargs=None, **options):
    task = letters_task()
    kwargs = {"model": config_of("gpt2", task), **(policy_kwargs or {})}
    return algorithm(policy, TextVecEnv(task, 8, seed=0), seed=0, device="cpu", policy_kwargs=kwargs, **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("preset") / "base"
    make("gpt2").policy.save_pretrained(path)
    return str(path)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_what_is_not_passed_is_the_presets(algorithm, capsys):
    model = lm(algorithm, verbose=1)
    rate = {} if algorithm is TRPO else {"learning_rate": 3e-4}
    expected = {**rate, **ARGUMENTS[algorithm.__name__]}
    assert {name: getattr(model, name) for name in expected} == expected
    assert expected.items() >= COMPARED.items()
    shown = capsys.readouterr().out.splitlines()[0]
    assert shown == f"Defaults for a new model: {', '.join(f'{k}={v!r}' for k, v in expected.items())}"
    model.verbose = 0
    model.learn(1)
    assert model._n_updates == (2 if algorithm is PPO else 1)
    assert model.num_timesteps < 64 * 6 + 8


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_what_is_passed_wins(algorithm, capsys):
    model = lm(algorithm, learning_rate=2e-3, gamma=0.9, n_episodes=16, baseline="group")
    assert (model.learning_rate, model.gamma, model.n_episodes, model.baseline) == (2e-3, 0.9, 16, "group")
    assert capsys.readouterr().out == ""
    # Also if it is the constructor's own default, and by position.
    default = inspect.signature(algorithm).parameters["learning_rate"].default
    task = letters_task()
    model = algorithm(CausalLMPolicy, TextVecEnv(task, 8), default, policy_kwargs={"model": config_of("gpt2", task)})
    assert model.learning_rate == default and model.n_episodes == 64


def test_arguments_of_rollouts_of_fixed_length_or_of_a_value_network_bring_their_defaults_with_them():
    model = lm(PPO, n_steps=16)
    assert (model.n_episodes, model.baseline, model.n_steps) == (None, "value", 16)
    assert (model.learning_rate, model.gamma, model.batch_size) == (3e-4, 1.0, 1024)
    model = lm(REINFORCE, gae_lambda=0.9)
    assert (model.n_episodes, model.baseline) == (64, "value")
    model = lm(REINFORCE, n_steps=16)
    assert (model.n_episodes, model.baseline) == (8, "value")


def test_a_pretrained_model_moves_less(folder):
    """By its folder, a path too; an adapter by more."""
    rates = {}
    for name, kwargs in (("full", {"model": folder}), ("lora", {"model": folder, "lora": {"r": 2}})):
        rates[name] = lm(PPO, policy_kwargs=kwargs).learning_rate
    assert rates == {"full": 1e-5, "lora": 1e-4}
    assert set(rates.values()) < set(RATES.values())


@pytest.mark.parametrize("algorithm", [PPO, REINFORCE])
def test_a_pretrained_model_is_not_ruined(algorithm, folder):
    """It stays near the start, in nats per response, where the constructors' own learning rates do not."""
    kl = {}
    for name, options in {"preset": {}, "own": {"learning_rate": 5e-3}}.items():
        model = lm(algorithm, policy_kwargs={"model": folder, "reference_kl_coef": 0.0}, **options)
        model.learn(1500)
        kl[name] = model.logger.name_to_value["text/kl"]
    assert 0 <= kl["preset"] < 0.01 < 0.2 < kl["own"]


def test_it_survives_saving_and_outlives_a_change_of_the_preset(tmp_path, monkeypatch, capsys):
    model = lm(PPO, verbose=1, n_epochs=3)
    model.save(tmp_path / "model")
    monkeypatch.setitem(ARGUMENTS, "PPO", {"n_episodes": 2, "gamma": 0.5})
    capsys.readouterr()
    loaded = PPO.load(tmp_path / "model", env=model.env)
    names = inspect.signature(PPO).parameters.keys() & vars(model).keys() - {"env", "policy", "policy_kwargs", "device"}
    for name in names - {"clip_range"}:
        assert getattr(loaded, name) == getattr(model, name), name
    assert (loaded.n_episodes, loaded.n_epochs) == (64, 3)
    assert "Defaults" not in capsys.readouterr().out


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_other_policies_have_the_constructors_defaults(algorithm, capsys):
    model = tiny(algorithm, "CartPole-v1", verbose=1)
    assert "Defaults" not in capsys.readouterr().out
    assert model.gamma == inspect.signature(algorithm).parameters["gamma"].default == 0.99
    assert model.baseline == "value"


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_preset_is_an_argument(algorithm):
    assert ARGUMENTS[algorithm.__name__].keys() <= inspect.signature(algorithm).parameters.keys()


def test_subclasses_of_algorithm_and_policy_have_it_too():
    class Mine(PPO):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)

    class MyPolicy(CausalLMPolicy):
        pass

    assert lm(Mine, MyPolicy).n_episodes == 64

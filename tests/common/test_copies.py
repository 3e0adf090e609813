"""A model or policy that is copied or pickled is whole: it answers the same, learns on by itself and shares nothing."""

import concurrent.futures
import copy
import functools
import io
import itertools
import multiprocessing
import pickle

import cloudpickle
import numpy as np
import pytest
import torch as th
from conftest import FakeEnv, make_envs
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import configure
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import FlattenExtractor
from text_models import SHAPES, config_of, letters_task
from tiny_models import ALGORITHMS, ALL, tiny, weights

from sb3_pg import PPO, REINFORCE, TRPO
from sb3_pg.text import TextVecEnv

pytestmark = pytest.mark.filterwarnings("ignore:You have specified a mini-batch size")


class Scaled(FlattenExtractor):
    def forward(self, observations):
        return 0.5 * super().forward(observations)


class OwnPolicy(ActorCriticPolicy):
    """With a features extractor and a ``forward`` of its own."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, features_extractor_class=Scaled, **kwargs)

    def forward(self, obs, deterministic=False):
        return super().forward(obs, deterministic)


def frozen(algorithm):
    model = tiny(algorithm, make_envs(n_envs=2))
    model.policy.value_net.requires_grad_(False)
    return model


TEXT_OPTIONS = {
    PPO: {"n_steps": 12, "batch_size": 16, "n_epochs": 1},
    TRPO: {"n_steps": 12, "batch_size": 16, "n_critic_updates": 1, "cg_max_steps": 2},
    REINFORCE: {"n_episodes": 8, "n_critic_updates": 1},
}


def text(algorithm, shape="gpt2", **policy_kwargs):
    task = letters_task()
    env = TextVecEnv(task, 4, seed=0)
    policy_kwargs = {"model": config_of(shape, task), "reference_kl_coef": 0.1, **policy_kwargs}
    options = {**TEXT_OPTIONS[algorithm], "learning_rate": 1e-2, "gamma": 1.0, "seed": 0, "device": "cpu"}
    return algorithm(SHAPES[shape][0], env, policy_kwargs=policy_kwargs, **options)


CNN = {"features_extractor_kwargs": {"features_dim": 4}}
CNNS = {"features_extractor_kwargs": {"cnn_output_dim": 4}}
KINDS = {
    "closed form": lambda algorithm: tiny(algorithm, make_envs(n_envs=2)),
    "autograd": lambda algorithm: tiny(algorithm, make_envs(n_envs=2), engine="autograd"),
    "discrete, plain environment": lambda algorithm: tiny(algorithm, Discrete(), engine="autograd"),
    "cnn": lambda algorithm: tiny(algorithm, make_envs("image", n_envs=2), "CnnPolicy", policy_kwargs=CNN),
    "dict": lambda algorithm: tiny(algorithm, make_envs("dict"), "MultiInputPolicy", policy_kwargs=CNNS),
    "gsde": lambda algorithm: tiny(algorithm, make_envs(n_envs=2), use_sde=True, sde_sample_freq=4),
    "separate features": lambda algorithm: tiny(
        algorithm, make_envs(n_envs=2), policy_kwargs={"share_features_extractor": False}
    ),
    "own class": lambda algorithm: tiny(algorithm, make_envs(n_envs=2), OwnPolicy),
    "frozen": frozen,
}
LANGUAGE_MODELS = {
    "text": text,
    "text, adapter": functools.partial(text, lora={"r": 2}),
    "text, encoder and decoder": functools.partial(text, shape="t5"),
}


class Discrete(FakeEnv):
    def __init__(self):
        super().__init__(action_space=make_envs(action="discrete").action_space)


class Interrupting(BaseCallback):
    """Stops, or fails, in the middle of the third update's rollout."""

    def __init__(self, error=None):
        super().__init__()
        self.error = error

    def _on_rollout_start(self):
        self.n = 0

    def _on_step(self):
        self.n += 1
        if self.model._n_updates < 2 or self.n < 5:
            return True
        if self.error is not None:
            raise self.error("in a callback")
        return False


def learn(model):
    return model.learn(32)


def stop(model):
    return model.learn(1000, Interrupting())


def fail(model):
    with pytest.raises(KeyboardInterrupt):
        model.learn(1000, Interrupting(KeyboardInterrupt))
    return model


STAGES = {"new": lambda model: model, "learned": learn, "stopped": stop, "failed": fail}


def through_a_file(x):
    file = io.BytesIO()
    th.save(x, file)
    file.seek(0)
    return th.load(file, weights_only=False)


WAYS = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda x: pickle.loads(pickle.dumps(x)),
    "cloudpickle": lambda x: pickle.loads(cloudpickle.dumps(x)),
}
OF_MODULES = {"deepcopy": copy.deepcopy, "torch.save": through_a_file}


def rows(model, n=8):
    """Observations, the same at every call."""
    task = getattr(model.env, "task", None)
    if task is not None:
        return task.observations()
    model.observation_space.seed(0)
    found = [model.observation_space.sample() for _ in range(n)]
    if isinstance(found[0], dict):
        return {key: np.stack([x[key] for x in found]) for key in found[0]}
    return np.stack(found)


def answers(policy, observations):
    """What the policy does, and what it expects."""
    policy.set_training_mode(False)
    actions, _ = policy.predict(observations, deterministic=True)
    with th.no_grad():
        values = policy.predict_values(policy.obs_to_tensor(observations)[0])
    return actions, values.numpy()


def go_on(model):
    """The weights after a little more learning, which completes a rollout that was interrupted."""
    model.set_random_seed(3)
    return weights(model.learn(20, reset_num_timesteps=False))


@functools.cache
def expected(algorithm, kind, stage):
    return go_on(STAGES[stage]((KINDS | LANGUAGE_MODELS)[kind](algorithm)))


def check_copy(model, copied, after):
    """``copied`` is ``model`` but shares nothing with it; ``after`` are the weights to which both go on."""
    observations = rows(model)
    before = weights(model)
    np.testing.assert_array_equal(weights(copied), before)
    for found, wanted in zip(answers(copied.policy, observations), answers(model.policy, observations), strict=True):
        np.testing.assert_array_equal(found, wanted)
    np.testing.assert_array_equal(go_on(copied), after)
    np.testing.assert_array_equal(weights(model), before)
    assert np.abs(after - before).max() > 1e-6
    np.testing.assert_array_equal(go_on(model), after)
    np.testing.assert_array_equal(weights(copied), after)


@pytest.mark.parametrize(
    ("way", "kind", "stage"),
    [
        *itertools.product(("deepcopy", "pickle"), KINDS, ["learned"]),
        *itertools.product(("deepcopy", "pickle"), ("closed form", "own class"), ("stopped", "failed")),
        *itertools.product(["deepcopy"], ("closed form", "gsde", "own class"), ["new"]),
        *itertools.product(["cloudpickle"], ("autograd", "own class"), ("learned", "stopped")),
    ],
)
def test_a_copy_of_a_model(way, kind, stage):
    model = STAGES[stage](KINDS[kind](PPO))
    check_copy(model, WAYS[way](model), expected(PPO, kind, stage))


@pytest.mark.parametrize(
    ("way", "kind"), [*itertools.product(("deepcopy", "pickle"), ("autograd", "own class")), ("pickle", "text")]
)
@pytest.mark.parametrize("algorithm", [TRPO, REINFORCE])
def test_a_copy_of_another_algorithms_model(algorithm, way, kind):
    model = learn((KINDS | LANGUAGE_MODELS)[kind](algorithm))
    check_copy(model, WAYS[way](model), expected(algorithm, kind, "learned"))


@pytest.mark.parametrize(
    ("way", "kind", "stage"),
    [
        *itertools.product(WAYS, ["text"], ["stopped"]),
        *itertools.product(("deepcopy", "pickle"), ["text, adapter"], ["learned"]),
        ("pickle", "text, encoder and decoder", "new"),
    ],
)
def test_a_copy_of_a_language_model(way, kind, stage):
    model = STAGES[stage](LANGUAGE_MODELS[kind](PPO))
    check_copy(model, WAYS[way](model), expected(PPO, kind, stage))


@pytest.mark.parametrize(
    ("way", "kind"),
    list(itertools.product(OF_MODULES, [*KINDS, *LANGUAGE_MODELS])),
)
def test_a_copy_of_a_policy(way, kind):
    model = learn((KINDS | LANGUAGE_MODELS)[kind](PPO))
    policy, observations = model.policy, rows(model)
    copied = OF_MODULES[way](policy)
    wanted = answers(policy, observations)
    for found, its in zip(answers(copied, observations), wanted, strict=True):
        np.testing.assert_array_equal(found, its)
    own = {id(p) for p in copied.parameters()}
    assert own.isdisjoint(id(p) for p in policy.parameters())
    assert {id(p) for group in copied.optimizer.param_groups for p in group["params"]} <= own
    assert [p.requires_grad for p in copied.parameters()] == [p.requires_grad for p in policy.parameters()]
    before = weights(copied)
    model.learn(32)
    np.testing.assert_array_equal(weights(copied), before)
    # Put in its place, it is what acts and learns.
    trained = weights(model)
    model.policy = copied
    assert np.abs(go_on(model) - before).max() > 1e-6
    np.testing.assert_array_equal(weights(copied), weights(model))
    np.testing.assert_array_equal(weights(policy), trained)


class Keeping(BaseCallback):
    """Copies the policy at every event, as those do who keep the best."""

    def __init__(self, way):
        super().__init__()
        self.way, self.kept = way, []

    def _keep(self):
        self.kept.append((weights(self.model), self.way(self.model.policy)))

    def _on_training_start(self):
        self._keep()

    def _on_step(self):
        if self.n_calls % 5 == 0:
            self._keep()
        return True

    def _on_rollout_end(self):
        self._keep()

    def _on_training_end(self):
        self._keep()


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
@pytest.mark.parametrize("engine", ["auto", "autograd"])
@ALL
def test_copies_made_by_a_callback_while_learning(algorithm, engine, way):
    plain = weights(tiny(algorithm, make_envs(n_envs=2), engine=engine).learn(64))
    callback = Keeping(WAYS[way])
    model = tiny(algorithm, make_envs(n_envs=2), engine=engine).learn(64, callback)
    np.testing.assert_array_equal(weights(model), plain)  # looking changes nothing
    assert len(callback.kept) > 6
    for before, copied in callback.kept:
        np.testing.assert_array_equal(weights(copied), before)


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
@ALL
def test_a_copy_of_a_copy_and_its_archive(algorithm, way, tmp_path):
    model = learn(KINDS["autograd"](algorithm))
    copied = WAYS[way](learn(WAYS[way](model)))
    copied.save(tmp_path / "model")
    loaded = algorithm.load(tmp_path / "model", make_envs(n_envs=2), "cpu")
    np.testing.assert_array_equal(weights(loaded), weights(copied))
    assert np.abs(weights(copied) - weights(model)).max() > 1e-6
    assert loaded.num_timesteps == copied.num_timesteps
    copied.set_parameters(model.get_parameters())
    np.testing.assert_array_equal(weights(copied), weights(model))


def in_another_process(pickled):
    """What the models do there, and what they learn to."""
    return [(answers(model.policy, rows(model)), go_on(model)) for model in pickle.loads(pickled)]


def test_models_sent_to_a_spawned_process():
    models = [learn(make(PPO)) for make in [*KINDS.values(), LANGUAGE_MODELS["text"]]]
    models += [learn(KINDS["autograd"](algorithm)) for algorithm in ALGORITHMS]
    # Pickled here, since torch would let the two processes share the parameters.
    pickled = pickle.dumps(models)
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        found = pool.submit(in_another_process, pickled).result(timeout=120)
    for model, ((actions, values), after) in zip(models, found, strict=True):
        own_actions, own_values = answers(model.policy, rows(model))
        np.testing.assert_allclose(actions, own_actions, atol=1e-5)
        np.testing.assert_allclose(values, own_values, atol=1e-5)
        np.testing.assert_allclose(after, go_on(model), atol=1e-3)


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
@ALL
def test_a_copy_of_a_model_that_writes_its_log(algorithm, way, tmp_path):
    """The copy has the figures, but neither the screen nor the files, which the first one goes on with."""
    model = tiny(algorithm, make_envs(n_envs=2), verbose=1).learn(64, Keeping(WAYS[way]))
    copied = WAYS[way](model)
    assert dict(copied.logger.name_to_value) == dict(model.logger.name_to_value) != {}
    assert weights(copied.learn(64, reset_num_timesteps=False)).shape == weights(model).shape
    model.set_logger(configure(str(tmp_path), ["csv", "stdout"]))
    before = weights(model)
    copied = WAYS[way](model.learn(64))
    assert copied.logger.output_formats == [] and len(model.logger.output_formats) == 2
    np.testing.assert_array_equal(weights(copied), weights(model))
    assert not np.array_equal(weights(model), before)
    copied.learn(64)
    n_lines = len((tmp_path / "progress.csv").read_text().splitlines())
    model.learn(64, reset_num_timesteps=False)
    assert len((tmp_path / "progress.csv").read_text().splitlines()) > n_lines


@ALL
def test_models_do_not_share_what_is_set_from_another(algorithm):
    first = tiny(algorithm, make_envs(n_envs=2)).learn(64)
    second = tiny(algorithm, make_envs(n_envs=2))
    second.set_parameters(first.get_parameters())
    moments = [x.clone() for state in second.policy.optimizer.state.values() for x in state.values()]
    first.learn(64)
    after = [x for state in second.policy.optimizer.state.values() for x in state.values()]
    assert len(after) == len(moments) > 0
    assert all(th.equal(x, y) for x, y in zip(after, moments, strict=True))

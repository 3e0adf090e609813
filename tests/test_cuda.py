"""On a GPU everything is as on the CPU, to the last places of float32. Skipped where there is no GPU."""

import numpy as np
import pytest
import torch as th
from conftest import ACTION_SPACES, IMAGE, OBSERVATION_SPACES, make_envs, pairs, policy_for
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from text_models import SHAPES, act, make
from tiny_models import ALGORITHMS, ALL, BOX_OPTIONS, tiny
from torch.nn.utils import parameters_to_vector

from sb3_pg import PPO, REINFORCE, TRPO
from sb3_pg.common.errors import NonFiniteError

DEVICE = "cuda"

pytestmark = [
    pytest.mark.skipif(not th.cuda.is_available(), reason="there is no GPU"),
    pytest.mark.filterwarnings("ignore:You are trying to run"),
    pytest.mark.filterwarnings("ignore:You have specified a mini-batch size"),
]


@pytest.fixture(autouse=True)
def _whole_float32(monkeypatch):
    """Convolutions and LSTMs round to ten bits by default."""
    monkeypatch.setattr(th.backends.cudnn, "allow_tf32", False)


def on_cpu(model):
    return parameters_to_vector(model.policy.parameters()).detach().cpu().numpy()


def both(algorithm, observation="box", action="box", n_envs=2, **options):
    """The same run on the GPU and, by the same engine, on the CPU."""
    kwargs = {"features_extractor_kwargs": {"features_dim": 8}} if OBSERVATION_SPACES[observation] is IMAGE else {}
    if observation == "dict":
        kwargs = {"features_extractor_kwargs": {"cnn_output_dim": 8}}
    kwargs |= options.pop("policy_kwargs", {})
    options = {"policy": policy_for(OBSERVATION_SPACES[observation]), "policy_kwargs": kwargs, **options}
    made, started = [], []
    for device in (DEVICE, "cpu"):
        envs = make_envs(observation, action, n_envs)
        made.append(tiny(algorithm, envs, device=device, engine="autograd", **options))
        started.append(on_cpu(made[-1]))
        made[-1].learn(48)
    np.testing.assert_array_equal(*started)
    return made


def check_run(there, here, path):
    """The runs are one."""
    np.testing.assert_allclose(on_cpu(there), on_cpu(here), atol=2e-4)
    check_life(there, path)


def check_life(there, path):
    """The archive is of use on either device."""
    assert there.policy.device.type == DEVICE and "autograd" in there.network.description
    there.save(path)
    for device in ("cpu", DEVICE):
        loaded = type(there).load(path, env=there.get_env(), device=device)
        np.testing.assert_array_equal(on_cpu(loaded), on_cpu(there))
        loaded.learn(16, reset_num_timesteps=False)
        assert np.isfinite(on_cpu(loaded)).all()
    evaluate_policy(there, there.get_env(), 2)


@pytest.mark.parametrize("algorithm, action, observation", pairs(ALGORITHMS, ACTION_SPACES, OBSERVATION_SPACES))
def test_spaces(algorithm, action, observation, tmp_path):
    check_run(*both(algorithm, observation, action), tmp_path / "model")


@ALL
@pytest.mark.parametrize("options", BOX_OPTIONS.values(), ids=BOX_OPTIONS)
def test_box_distributions(algorithm, options, tmp_path):
    check_run(*both(algorithm, policy_kwargs=options), tmp_path / "model")


@pytest.mark.parametrize(
    "algorithm, action, n_envs, policy, layers",
    pairs(ALGORITHMS, ACTION_SPACES, [1, 3], ["MlpLstmPolicy", "MlpGruPolicy"], [1, 2]),
)
def test_recurrent_policies(algorithm, action, n_envs, policy, layers, tmp_path):
    kwargs = {"lstm_hidden_size": 8, "n_lstm_layers": layers}
    check_run(*both(algorithm, "box", action, n_envs, policy=policy, policy_kwargs=kwargs), tmp_path / "model")


@ALL
def test_advantages_divided_by_the_deviation_of_the_past(algorithm, tmp_path):
    check_run(*both(algorithm, normalize_advantage="running"), tmp_path / "model")


@ALL
@pytest.mark.parametrize("squash_output", [False, True])
def test_gsde(algorithm, squash_output, tmp_path):
    """Its noise comes from torch's generator of the device, so that the runs differ."""
    there, _ = both(algorithm, use_sde=True, sde_sample_freq=4, policy_kwargs={"squash_output": squash_output})
    check_life(there, tmp_path / "model")


@ALL
def test_separate_features_and_a_critic_with_settings_of_its_own(algorithm, tmp_path):
    own = {"critic_learning_rate": 1e-2, "critic_optimizer_kwargs": {"weight_decay": 0.1}, "max_grad_norm": (0.1, 0.2)}
    kwargs = {"share_features_extractor": False}
    check_run(*both(algorithm, "image", policy_kwargs=kwargs, **({} if algorithm is TRPO else own)), tmp_path / "model")


@ALL
def test_going_on_from_an_archive_is_going_on(algorithm, tmp_path):
    def pendulum(seed):
        return make_vec_env("Pendulum-v1", 2, seed=seed)

    options = {"n_episodes": 2} if algorithm is REINFORCE else {}
    whole = tiny(algorithm, pendulum(0), device=DEVICE, engine="autograd", use_sde=True, **options)
    whole.learn(800)
    whole.save(tmp_path / "model")
    whole.learn(800, reset_num_timesteps=False)
    np.random.seed(987)
    th.manual_seed(987)
    again = algorithm.load(tmp_path / "model", env=pendulum(1000), device=DEVICE)
    again.learn(800, reset_num_timesteps=False)
    np.testing.assert_array_equal(on_cpu(again), on_cpu(whole))


@ALL
def test_what_is_not_finite_is_named_and_the_parameters_stay(algorithm):
    model = tiny(algorithm, make_envs(n_envs=2), device=DEVICE).learn(32)
    before = on_cpu(model)
    env = model.get_env()
    env.envs[1].unwrapped._observe = lambda: np.full(3, np.nan, np.float32)
    with pytest.raises(NonFiniteError, match="environment 1"):
        model.learn(64, reset_num_timesteps=False)
    np.testing.assert_array_equal(on_cpu(model), before)


def test_the_bound_of_a_trust_region_holds():
    for action in ACTION_SPACES:
        model = tiny(TRPO, make_envs("box", action, 4), device=DEVICE, n_steps=64, target_kl=0.02)
        model.learn(2048)
        assert model.logger.name_to_value["train/kl_divergence_loss"] <= 0.02


# -------------------------------------------------------------------- language models


def gradients(model, rollout):
    batch = model.network.batch(rollout)
    evaluation = model.network.evaluate(batch)
    evaluation.backward(batch.advantages, -0.3, batch.returns)
    return {name: p.grad.cpu().clone() for name, p in model.policy.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("lora", [None, {"r": 2}], ids=["full", "lora"])
@pytest.mark.parametrize("shape", SHAPES)
def test_texts_are_drawn_and_judged_as_on_the_cpu(shape, lora):
    there, here = (
        make(shape, device=device, policy_kwargs={"lora": lora, "reference_kl_coef": 0.1}) for device in (DEVICE, "cpu")
    )
    log_probs, values = act(there)
    done = there.rollout_buffer.log_probs
    seen = there.rollout_buffer.actions[..., 0] >= 0
    np.testing.assert_allclose(done[seen], log_probs[seen], atol=2e-5)
    np.testing.assert_allclose(there.rollout_buffer.values[seen], values[seen], atol=2e-5)
    found, expected = gradients(there, there.rollout), gradients(here, there.rollout)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        np.testing.assert_allclose(found[name], gradient, atol=1e-5 * float(gradient.abs().max()) + 1e-7, err_msg=name)
    there.policy.micro_batch_tokens = 30
    for name, gradient in gradients(there, there.rollout).items():
        np.testing.assert_allclose(gradient, found[name], atol=1e-5 * float(gradient.abs().max()) + 1e-7, err_msg=name)


@pytest.mark.parametrize("precision", [th.float32, th.bfloat16], ids=str)
@pytest.mark.parametrize(
    "algorithm, settings",
    [
        (REINFORCE, {"baseline": "leave_one_out_same_start"}),
        (PPO, {"baseline": "group"}),
        (PPO, {}),
        (TRPO, {"target_kl": 0.02}),
    ],
    ids=["rloo", "grpo", "ppo", "trpo"],
)
def test_language_models_learn(algorithm, settings, precision, tmp_path):
    kwargs = {"reference_kl_coef": 0.05, "model_kwargs": {"dtype": precision}}
    model = make("llama", algorithm, n_envs=8, device=DEVICE, policy_kwargs=kwargs, **settings)
    before = on_cpu(model)
    model.learn(8 * 13 * 3)
    assert np.isfinite(on_cpu(model)).all() and not np.array_equal(on_cpu(model), before)
    assert len(model.policy.generate(["a b c", "d"])) == 2
    model.save(tmp_path / "model")
    loaded = algorithm.load(tmp_path / "model", env=model.get_env(), device="cpu")
    np.testing.assert_array_equal(on_cpu(loaded), on_cpu(model))

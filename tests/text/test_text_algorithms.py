"""The three algorithms, unchanged, on language models."""

import copy
import os
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch as th
from conftest import silent
from stable_baselines3 import PPO as SB3PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import Logger
from text_models import SHAPES, act, config_of, letters_task, make

from sb3_pg import PPO, REINFORCE, TRPO
from sb3_pg.common.engines.protocol import Seen
from sb3_pg.common.errors import ArgumentError
from sb3_pg.common.figures import legend
from sb3_pg.text import TextEnv, TextVecEnv
from sb3_pg.text.figures import TextFigures

pytestmark = pytest.mark.filterwarnings("ignore:You have specified a mini-batch size")

OPTIONS = {
    PPO: {"n_steps": 24, "batch_size": 64, "n_epochs": 4, "learning_rate": 3e-3},
    TRPO: {"n_steps": 24, "batch_size": 64, "target_kl": 0.03, "n_critic_updates": 2, "cg_max_steps": 6},
    REINFORCE: {"n_episodes": 32, "baseline": "leave_one_out_same_start", "learning_rate": 1e-2},
}


def learner(algorithm, shape, n_envs=16, completions_per_prompt=8, policy_kwargs=None, **options):
    task = letters_task()
    env = TextVecEnv(task, n_envs, completions_per_prompt, seed=0)
    kwargs = {"model": config_of(shape, task), "reference_kl_coef": 0.0, **(policy_kwargs or {})}
    options = {**OPTIONS[algorithm], **options}
    return algorithm(SHAPES[shape][0], env, gamma=1.0, seed=0, device="cpu", policy_kwargs=kwargs, **options)


def score(model):
    env = TextVecEnv(model.env.task, 20, in_order=True)
    return np.mean(evaluate_policy(model, env, n_eval_episodes=100, deterministic=False)[0])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("algorithm", OPTIONS)
def test_every_algorithm_improves_every_kind_of_policy(algorithm, shape):
    model = learner(algorithm, shape)
    before = score(model)
    model.learn(2000)
    assert score(model) > before + 0.15
    log = model.logger.name_to_value
    assert log["text/kl"] > 0.0
    assert 1 <= log["text/response_length"] <= 6
    assert 0 <= log["text/ended"] <= 1


@pytest.mark.parametrize("algorithm", [PPO, TRPO])
def test_ppo_and_trpo_learn_from_whole_responses_compared_within_their_group(algorithm):
    model = learner(algorithm, "gpt2", n_episodes=32, baseline="group")
    _, callback = model._setup_learn(1)
    model.collect_rollouts(model.env, callback, model.rollout_buffer, model.n_steps)
    keep = model.horizon.keep(model.rollout)
    over = model.policy.is_over(model.rollout.column("observations")).reshape(keep.shape)
    assert not keep.all()
    assert np.array_equal(over, ~keep)  # at rest as soon as nothing is learned from it
    assert len(model.network.batch(model.rollout, keep)) == keep.sum()
    value_head, before = model.policy.value_head.weight.clone(), score(model)
    model.learn(2000)
    assert score(model) > before + 0.15
    assert th.equal(model.policy.value_head.weight, value_head)


def test_penalty_enters_when_judging():
    model = make("gpt2", policy_kwargs={"reference_kl_coef": 0.5})
    model.policy.reference.load_state_dict(model.policy.language_model.state_dict())
    with th.no_grad():
        model.policy.language_model.lm_head.weight.mul_(1.2)
    act(model)
    buffer, policy = model.rollout_buffer, model.policy
    n = buffer.pos
    expected = policy.reference_log_prob(buffer.observations[:n].reshape(n * 4, -1), buffer.actions[:n].reshape(-1))
    penalty = 0.5 * (buffer.log_probs[:n] - expected.reshape(n, 4))
    ends = np.concatenate([buffer.episode_starts[1:n], model._last_episode_starts[None]]) > 0
    scores = buffer.rewards[:n] + penalty
    np.testing.assert_allclose(scores[~ends], 0.0, atol=1e-6)
    # Monitor's rewards are the task's, without the penalty.
    np.testing.assert_allclose(np.mean([e["r"] for e in model.ep_info_buffer]), scores[ends].mean(), atol=1e-5)
    log = model.logger.name_to_value
    assert log["text/score"] == pytest.approx(scores[ends].mean(), abs=1e-5)
    assert log["text/kl"] == pytest.approx(penalty.mean() / 0.5 * log["text/response_length"], rel=1e-4)
    assert log["text/penalised_reward"] == pytest.approx(log["text/score"] - 0.5 * log["text/kl"])
    assert log["text/reference_perplexity"] == pytest.approx(np.exp(-expected.mean()), rel=1e-4)


def test_stronger_penalty_stays_nearer_and_the_weight_adapts():
    kl = {}
    for coef in (0.0, 1.0):
        model = learner(PPO, "gpt2", policy_kwargs={"reference_kl_coef": coef})
        model.learn(2000)
        kl[coef] = model.logger.name_to_value["text/kl"]
    assert kl[1.0] < kl[0.0] / 3
    model = learner(PPO, "gpt2", policy_kwargs={"reference_kl_coef": 0.1, "reference_kl_target": 1e-3})
    model.learn(800)
    assert float(model.policy.reference_kl_coef) > 0.1


def test_the_weight_adapts_only_when_a_rollout_was_accepted():
    model = make("gpt2", policy_kwargs={"reference_kl_coef": 0.5, "reference_kl_target": 1e-3})
    coef = model.policy.reference_kl_coef
    model.network.adapt({"text/kl": 1e-3})
    model.network.adapt({})
    assert coef == 0.5
    model.network.adapt({"text/kl": 1.1e-3})
    assert float(coef) == pytest.approx(0.5 * 1.01)
    model.network.adapt({"text/kl": 0.0})
    assert float(coef) == pytest.approx(0.5 * 1.01 * 0.98)
    act(model)
    assert model.logger.name_to_value["text/kl"] > 2e-3
    assert float(coef) == pytest.approx(0.5 * 1.01 * 0.98 * 1.02)
    judged = model.network.judge(model.rollout)
    assert judged.figures["text/kl"] == pytest.approx(model.logger.name_to_value["text/kl"])
    assert float(coef) == pytest.approx(0.5 * 1.01 * 0.98 * 1.02)


def test_without_a_reference_nothing_is_copied_or_penalised():
    model = learner(PPO, "gpt2", policy_kwargs={"reference_kl_coef": None})
    model.learn(400)
    assert model.policy.reference is None
    assert "text/kl" not in model.logger.name_to_value
    assert "text/score" in model.logger.name_to_value


LORA = {"r": 4, "lora_alpha": 8}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("algorithm", OPTIONS)
def test_adapter(algorithm, shape, tmp_path):
    model = learner(algorithm, shape, policy_kwargs={"lora": LORA, "reference_kl_coef": 0.01})
    policy = model.policy
    assert policy.reference is None
    trained = {name for name, p in policy.named_parameters() if p.requires_grad}
    assert all("lora" in name or name.startswith("value_head") for name in trained)
    rows = model.env.task.observations()
    actions = np.full(len(rows), 4)
    reference = policy.reference_log_prob(rows, actions)
    with th.no_grad():
        np.testing.assert_allclose(
            policy.evaluate_actions(rows, th.as_tensor(actions))[1], reference, rtol=1e-5, atol=1e-6
        )
    model.learn(600)
    with th.no_grad():
        changed = policy.evaluate_actions(rows, th.as_tensor(actions))[1].numpy()
    np.testing.assert_allclose(policy.reference_log_prob(rows, actions), reference, rtol=1e-5, atol=1e-6)
    assert np.abs(changed - reference).max() > 1e-3
    model.save(tmp_path / "model")
    loaded = type(model).load(tmp_path / "model")
    with th.no_grad():
        np.testing.assert_allclose(
            loaded.policy.evaluate_actions(rows, th.as_tensor(actions))[1], changed, rtol=1e-5, atol=1e-6
        )
    np.testing.assert_allclose(loaded.policy.reference_log_prob(rows, actions), reference, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_an_archive_that_holds_the_base_needs_no_folder(shape, tmp_path):
    source = make(shape)
    folder = tmp_path / "pretrained"
    source.policy.save_pretrained(folder)
    model = learner(PPO, shape, policy_kwargs={"model": str(folder), "reference_kl_coef": 0.1, "save_base": True})
    rows = model.env.task.observations()
    expected = source.policy.hidden_states(rows).detach()
    np.testing.assert_allclose(model.policy.hidden_states(rows).detach(), expected, rtol=1e-5, atol=1e-6)
    model.learn(300)
    found = [model.policy.hidden_states(rows).detach(), model.policy.reference_log_prob(rows, np.full(len(rows), 3))]
    model.save(tmp_path / "model.zip")
    assert model.policy_kwargs["model"] == str(folder)  # only the archive differs
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    with zipfile.ZipFile(tmp_path / "model.zip") as archive:
        assert str(folder) not in archive.read("data").decode()
    loaded = PPO.load(tmp_path / "model.zip", env=model.env)
    np.testing.assert_array_equal(loaded.policy.hidden_states(rows).detach(), found[0])
    np.testing.assert_array_equal(loaded.policy.reference_log_prob(rows, np.full(len(rows), 3)), found[1])
    loaded.learn(100, reset_num_timesteps=False)
    loaded.policy.save(tmp_path / "policy.pt")
    again = type(loaded.policy).load(tmp_path / "policy.pt", device="cpu")
    np.testing.assert_array_equal(again.hidden_states(rows).detach(), loaded.policy.hidden_states(rows).detach())


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("algorithm", [PPO, TRPO])
def test_a_loaded_model_goes_on_exactly(algorithm, lora, tmp_path):
    model = make("gpt2", algorithm, policy_kwargs={"lora": lora, "reference_kl_target": 0.1})
    model.learn(104)
    model.save(tmp_path / "model")
    copied = silent(copy.deepcopy(model)).learn(104, reset_num_timesteps=False)
    # Its random numbers are those of the archive.
    loaded = silent(algorithm.load(tmp_path / "model", env=copy.deepcopy(model.env)))
    loaded.learn(104, reset_num_timesteps=False)
    moved = 0.0
    for p, q, r in zip(*(its.policy.parameters() for its in (copied, loaded, model)), strict=True):
        assert th.equal(p, q)
        moved = max(moved, float((p - r).detach().abs().max()))
    assert moved > 1e-4
    assert th.equal(copied.policy.reference_kl_coef, loaded.policy.reference_kl_coef)


def test_frozen_layers():
    for shape in SHAPES:
        model = learner(PPO, shape, policy_kwargs={"frozen_layers": 1})
        policy = model.policy
        before = {name: p.clone() for name, p in policy.lm.named_parameters()}
        model.learn(300)
        moved = {name for name, p in policy.lm.named_parameters() if not th.equal(p, before[name])}
        assert moved
        layers = (".0.", ".1.")
        assert not any(layers[0] in name.replace("layer.0", "layer.x") for name in moved), moved
        assert any(layers[1] in name for name in moved)
    with pytest.raises(ArgumentError, match="`frozen_layers=3`, but the model has 2 layers"):
        learner(PPO, "gpt2", policy_kwargs={"frozen_layers": 3})


@pytest.mark.parametrize("shape", SHAPES)
def test_default_model_and_single_environment(shape):
    model = PPO(SHAPES[shape][0], TextEnv(letters_task()), n_steps=16, batch_size=8, n_epochs=1, seed=0)
    model.learn(32)
    observation, _ = model.get_env().envs[0].reset()
    assert model.predict(observation)[0].shape == ()
    assert np.isfinite(model.ep_info_buffer[0]["r"])


def test_sb3_can_train_it_too():
    from sb3_pg.text.policies import CausalLMPolicy

    env = make_vec_env(lambda: TextEnv(letters_task()), n_envs=2)
    model = SB3PPO(CausalLMPolicy, env, n_steps=8, batch_size=8, n_epochs=1, policy_kwargs={"reference_kl_coef": None})
    model.learn(16)


@pytest.mark.parametrize("shape", SHAPES)
def test_predict_uses_a_cache_and_answers_as_generate_does(shape):
    model = make(shape)
    task = model.env.task
    env = TextVecEnv(task, len(task.prompts), in_order=True)
    rows, responses, read = env.reset(), {}, []
    original = model.policy.begin
    model.policy.begin = lambda some: read.append(len(some)) or original(some)
    for _ in range(task.response_length):
        rows, _, dones, infos = env.step(model.predict(rows, deterministic=True)[0])
        for number, info in enumerate(infos):
            if dones[number] and number not in responses:
                responses[number] = info["terminal_observation"][task.width :]
    greedy = model.policy.generate(task.observations())
    for number, response in responses.items():
        assert np.array_equal(response, greedy[number])
    assert len(responses) == len(task.prompts)
    assert read[0] == len(task.prompts)
    assert sum(read) < len(task.prompts) * task.response_length


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": True},
        {"do_sample": True, "top_k": 3},
        {"do_sample": True, "top_p": 0.5},
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 4},
        {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
    ],
    ids=str,
)
def test_generate(shape, settings):
    model = make(shape)
    task = model.env.task
    responses = model.policy.generate(task.observations(), **settings)
    assert responses.shape == (len(task.prompts) * settings.get("num_return_sequences", 1), task.response_length)
    for response in responses:
        used = response >= 0
        assert used[0]
        assert not (np.diff(used.astype(int)) > 0).any()  # nothing after the end
        ended = response[used] == task.end_token
        assert ended[-1] or used.all()
        assert not ended[:-1].any()
    if settings.get("num_beams") == 3:
        greedy = model.policy.generate(task.observations())
        assert mean_log_prob(model, responses) >= mean_log_prob(model, greedy) - 1e-6


def mean_log_prob(model, responses):
    total, task = 0.0, model.env.task
    for number, response in enumerate(responses):
        row = task.observations([number])
        for token in response[response >= 0]:
            with th.no_grad():
                total += float(model.policy.evaluate_actions(row, th.tensor([token]))[1])
            row = row.copy()
            row[0, task.width + (row[0, task.width :] >= 0).sum()] = token
    return total


def test_sampling_by_acting_has_the_models_probabilities():
    model = make("llama")
    rows = np.repeat(model.env.task.observations([0]), 4000, axis=0)
    tokens = model.network.act(Seen(rows)).actions
    with th.no_grad():
        expected = model.policy.get_distribution(rows[:1]).distribution.probs[0].numpy()
    found = np.bincount(tokens, minlength=len(expected)) / len(tokens)
    assert np.abs(found - expected).max() < 0.03


def test_importing_the_package_imports_no_transformers():
    code = (
        "import sys, sb3_pg, sb3_pg.text; sb3_pg.PPO('MlpPolicy', 'CartPole-v1');"
        "assert 'transformers' not in sys.modules and 'peft' not in sys.modules"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_logger_without_outputs_is_enough():
    model = learner(PPO, "gpt2")
    model.set_logger(Logger(None, []))
    model.learn(100)


@pytest.mark.parametrize("policy_kwargs", [{}, {"reference_kl_coef": None}], ids=["reference", "none"])
def test_the_legend_explains_all_that_is_logged_of_texts(policy_kwargs):
    model = learner(PPO, "gpt2", policy_kwargs=policy_kwargs)
    model.learn(400)
    logged = {name for name in model.logger.name_to_value if name.startswith("text/")}
    of_reference = {"text/kl", "text/kl_coef", "text/reference_perplexity", "text/penalised_reward"}
    assert logged == legend(TextFigures).keys() - (of_reference if policy_kwargs else set())

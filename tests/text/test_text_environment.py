from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium.utils.env_checker import check_env
from stable_baselines3.common.env_checker import check_env as sb3_check_env
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import VecNormalize as SB3VecNormalize
from text_models import GPT2, T5, config_of, count_a, letters_task, make
from tokenizers.processors import TemplateProcessing
from transformers import GenerationConfig

from sb3_pg import PPO, REINFORCE
from sb3_pg.common.advantages import leave_one_out, leave_one_out_within
from sb3_pg.common.engines.protocol import Seen
from sb3_pg.common.errors import ArgumentError, NonFiniteError
from sb3_pg.common.vec_env import VecNormalize
from sb3_pg.text import TextEnv, TextVecEnv, word_tokenizer
from sb3_pg.text.spaces import Vocabulary, prompt_length_of
from sb3_pg.text.supervised import examples
from sb3_pg.text.tokenizers import SPECIAL

END = 1


def token(task, word):
    return task.tokenizer.convert_tokens_to_ids(word)


def test_env_follows_gymnasium_and_sb3():
    env = TextEnv(letters_task())
    check_env(env, skip_render_check=True)
    sb3_check_env(env)


def test_episode():
    task = letters_task(missing_end_penalty=0.25)
    env = TextEnv(task)
    first, _ = env.reset(options={"prompt": 1})
    a, d = token(task, "a"), token(task, "d")
    assert first.tolist() == [-1] * 3 + [d] + [-1] * 6
    assert prompt_length_of(env.observation_space) == 4
    assert env.action_space.end_token == END
    observation, reward, terminated, truncated, _ = env.step(a)
    assert observation.tolist() == [-1] * 3 + [d, a] + [-1] * 5
    assert (reward, terminated, truncated) == (0.0, False, False)
    observation, reward, terminated, truncated, info = env.step(END)
    assert (terminated, truncated) == (True, False)
    assert reward == pytest.approx(1 / 6)
    assert (info["prompt"], info["completion"], info["ended"]) == ("d", "a", True)
    assert env.render() == "d | a"
    env.reset()
    for _ in range(6):
        *_, reward, terminated, truncated, info = env.step(a)
    assert (terminated, truncated, info["ended"]) == (True, False, False)
    assert reward == pytest.approx(1 - 0.25)


def test_vectorised_and_single_environments_agree():
    calls = []

    def reward(prompts, completions, references):
        calls.append(len(prompts))
        return count_a(prompts, completions, references)

    task = letters_task(reward=reward, references=list("vwxyz"))
    envs, single = TextVecEnv(task, 5, in_order=True), [TextEnv(task) for _ in range(5)]
    rows = envs.reset()
    for number, env in enumerate(single):
        assert np.array_equal(env.reset(options={"prompt": number})[0], rows[number])
    rng, finished = np.random.default_rng(0), np.zeros(5, dtype=bool)
    for _ in range(6):
        actions = rng.integers(0, 11, 5)
        calls.clear()
        rows, rewards, dones, infos = envs.step(actions)
        assert calls == ([dones.sum()] if dones.any() else [])  # one call for all that ended in this step
        for number, env in enumerate(single):
            if finished[number]:
                continue
            observation, reward_, terminated, _, info = env.step(actions[number])
            assert (reward_, terminated) == (pytest.approx(rewards[number]), dones[number])
            if terminated:
                assert np.array_equal(infos[number]["terminal_observation"], observation)
                assert {name: infos[number][name] for name in info} == info
                assert info["reference"] == "vwxyz"[number]
                assert infos[number]["episode"]["r"] == pytest.approx(reward_, abs=1e-6)
                finished[number] = True
            else:
                assert np.array_equal(rows[number], observation)
    assert finished.all()


def test_neighbours_share_their_prompts_and_reset_brings_them_together():
    task = letters_task()
    envs = TextVecEnv(task, 6, completions_per_prompt=3, seed=0)
    rng, episodes = np.random.default_rng(0), [[] for _ in range(6)]
    rows = envs.reset()
    for env in range(6):
        episodes[env].append(tuple(rows[env]))
    for _ in range(60):
        rows, _, dones, _ = envs.step(rng.integers(0, 4, 6))
        for env in np.flatnonzero(dones):
            episodes[env].append(tuple(rows[env]))
    for group in (episodes[:3], episodes[3:]):
        n = min(map(len, group))
        assert n > 5
        assert group[0][:n] == group[1][:n] == group[2][:n]
    rows = envs.reset()
    assert np.array_equal(rows[0], rows[1])
    assert np.array_equal(rows[3], rows[5])


def test_the_same_seed_gives_the_same_prompts():
    runs = []
    for _ in range(2):
        envs = TextVecEnv(letters_task(), 8)
        envs.seed(5)
        runs.append(envs.reset())
    assert np.array_equal(*runs)


def test_monitor_is_not_needed():
    assert TextVecEnv(letters_task(), 2).env_is_wrapped(Monitor) == [True, True]


@pytest.mark.parametrize("name", ["QuestionAnswering", "Translation", "Sentiment"])
def test_registered(name):
    env = make_vec_env(f"{name}-v0", n_envs=2)
    rows = env.reset()
    _, _, dones, infos = env.step(np.array([END, 5]))
    assert rows.shape[0] == 2
    assert dones[0]
    assert infos[0]["completion"] == ""
    test = gym.make(f"{name}-v0", split="test").unwrapped.task
    assert not set(test.prompts) & set(env.envs[0].unwrapped.task.prompts)


@pytest.mark.parametrize("name", ["Sentiment", "GuessingGame", "Calculator"])
def test_the_algorithm_takes_a_registered_name(name):
    model = REINFORCE("CausalLMPolicy", f"{name}-v0", n_episodes=2, n_critic_updates=0)
    model.learn(1)
    assert "text/score" in model.logger.name_to_value


# ------------------------------------------------------------------ baseline


def test_rloo():
    """Two prompts with three one-token responses each: the mean of the other two."""
    group, episode, step = np.array([0, 0, 1, 0, 1, 1]), np.arange(6), np.zeros(6, dtype=int)
    returns = np.array([1.0, 2.0, 10.0, 6.0, 20.0, 60.0])
    found = leave_one_out_within(group, returns, episode, step)
    assert found.tolist() == [4.0, 3.5, 40.0, 1.5, 35.0, 15.0]
    everything = leave_one_out_within(np.zeros(6, dtype=int), returns, episode, step)
    assert np.array_equal(everything, leave_one_out(returns, episode, step)[0])
    assert leave_one_out_within(np.arange(6), returns, episode, step).tolist() == [0.0] * 6


def test_rloo_counts_an_episode_that_has_ended_with_its_last_reward_to_go():
    group, episode, step = np.array([1, 1, 1, 0, 1, 1]), np.array([0, 0, 1, 2, 0, 1]), np.array([0, 2, 0, 0, 1, 1])
    returns = np.array([9.0, 7.0, 5.0, 1.0, 8.0, 3.0])
    assert leave_one_out_within(group, returns, episode, step).tolist() == [5.0, 3.0, 9.0, 0.0, 3.0, 8.0]


def test_reinforce_compares_responses_to_one_prompt():
    task = letters_task(
        reward=lambda prompts, texts, _: [10.0 * len(p) + len(t.split()) for p, t in zip(prompts, texts, strict=True)]
    )
    env = TextVecEnv(task, 8, completions_per_prompt=4, seed=1)
    kwargs = {"model": config_of("gpt2", task), "reference_kl_coef": None}
    options = {"n_episodes": 8, "baseline": "leave_one_out_same_start", "normalize_advantage": False, "seed": 0}
    model = REINFORCE("CausalLMPolicy", env, gamma=1.0, policy_kwargs=kwargs, **options)
    model.learn(1)
    keep, buffer = model.horizon.keep(model.rollout), model.rollout_buffer
    advantages = buffer.advantages[: buffer.pos]
    assert np.abs(advantages).max() < 10  # what the prompt gives is gone
    table = np.where(keep, advantages, np.nan)
    totals = np.array([buffer.rewards[: buffer.pos, env][keep[:, env]].sum() for env in range(8)])
    others = (totals.reshape(2, 4).sum(axis=1, keepdims=True) - totals.reshape(2, 4)) / 3
    expected = np.where(keep, totals - others.ravel(), np.nan)  # at every step, whoever has ended before
    np.testing.assert_allclose(table, expected, atol=1e-5)
    assert len(set(keep.sum(axis=0))) > 1


# -------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "options, message",
    [
        ({"prompts": []}, "`prompts` is empty"),
        ({"prompts": ["a", ""]}, r"Prompt 1 \(''\) has no tokens"),
        ({"prompt_length": 2}, "Prompt 3 has 4 tokens, more than prompt_length=2: 'g h a b'"),
        ({"references": ["a"]}, "`references` must have one entry for each of the 5 prompts, not 1"),
        ({"response_length": 0}, "`response_length` must be a whole number >= 1, not 0"),
        ({"missing_end_penalty": -1}, "`missing_end_penalty` must be a finite number >= 0"),
    ],
)
def test_tasks_that_cannot_work(options, message):
    with pytest.raises(ArgumentError, match=message):
        letters_task(**options)


def test_tokenizer_without_end():
    tokenizer = word_tokenizer("ab")
    tokenizer.eos_token = None
    with pytest.raises(ArgumentError, match="`tokenizer` has no end token"):
        letters_task(tokenizer=tokenizer)


@pytest.mark.parametrize(
    "reward, error, message",
    [
        (lambda p, c, r: [0.0] * (len(p) + 1), ArgumentError, "one number for each of the 4 completions"),
        (lambda p, c, r: 1.0, ArgumentError, "array of shape \\(\\)"),
        (lambda p, c, r: [float("nan")] * len(p), NonFiniteError, "`reward` returned nan for the prompt '.*' and"),
        (lambda p, c, r: [float("inf")] * len(p), NonFiniteError, "`reward` returned inf"),
    ],
)
def test_rewards_that_cannot_work(reward, error, message):
    task = letters_task(reward=reward)
    model = PPO("CausalLMPolicy", TextVecEnv(task, 4), n_steps=8, policy_kwargs={"model": config_of("gpt2", task)})
    model.policy.choose = lambda hidden, *_: hidden.argmax(dim=-1) * 0 + END
    with pytest.raises(error, match=message):
        model.learn(32)


def policy_with(model, kind="CausalLMPolicy", task=None, **kwargs):
    env = TextVecEnv(task or letters_task(), 4)
    return PPO(kind, env, n_steps=8, batch_size=8, policy_kwargs={"model": model, **kwargs})


@pytest.mark.parametrize(
    "change, message",
    [
        ({"vocab_size": 9}, "it has 11 tokens, but the model's vocabulary has 9"),
        ({"vocab_size": 100}, "it has 11 tokens, but the model's vocabulary has 100"),
        ({"eos_token_id": 2}, "it ends texts with token 1, the model with 2"),
        ({"eos_token_id": None}, "The model has no end token"),
        ({"n_positions": 8}, r"may take 10 tokens \(4 and 6\), but the model's window is 8"),
    ],
)
def test_models_that_do_not_fit(change, message):
    with pytest.raises(ArgumentError, match=message):
        policy_with(config_of("gpt2", letters_task(), **change))


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"temperature": 0.0}, "`temperature` must be a finite number > 0"),
        ({"reference_kl_coef": -1.0}, "`reference_kl_coef` must be a finite number >= 0"),
        ({"reference_kl_target": 0.0}, "`reference_kl_target` must be a finite number > 0"),
        ({"frozen_layers": -1}, "`frozen_layers` must be a whole number >= 0"),
        ({"frozen_layers": 1, "lora": {"r": 2}}, "`frozen_layers=1` and `lora` do not go together"),
        ({"lora": {"bias": "all"}}, "`lora` has bias='all', which trains biases of the model itself"),
        ({"lora": {"bias": "lora_only"}}, "`lora` has bias='lora_only'.* is not the reference. Pass reference_kl_coef"),
        ({"lora": {"init_lora_weights": "pissa"}}, "`lora` has init_lora_weights='pissa', which changes the weights"),
        ({"lora": {"trainable_token_indices": [3, 4]}}, "`lora` {'trainable_token_indices': .3, 4.} cannot be used"),
    ],
)
def test_policy_arguments_that_cannot_work(kwargs, message):
    with pytest.raises(ArgumentError, match=message):
        policy_with(config_of("gpt2", letters_task()), **kwargs)


def test_a_live_model_is_refused():
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=11)
    with pytest.raises(ArgumentError, match="not a live GPT2LMHeadModel"):
        policy_with(GPT2LMHeadModel(config))
    with pytest.raises(ArgumentError, match="needs a 'model_type'"):
        policy_with({k: v for k, v in GPT2.items() if k != "model_type"})


def test_other_kinds_of_model_are_refused():
    task = letters_task()
    bart = {"model_type": "bart", "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 11}
    bart |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "eos_token_id": 1, "decoder_start_token_id": 0}
    with pytest.raises(ArgumentError, match=r"needs a model with relative positions .* not 'bart'"):
        policy_with(bart, "Seq2SeqLMPolicy")
    t5 = {**T5, "vocab_size": task.action_space.n, "eos_token_id": 1, "decoder_start_token_id": None}
    with pytest.raises(ArgumentError, match="no `decoder_start_token_id`"):
        policy_with(t5, "Seq2SeqLMPolicy")
    gemma = {"model_type": "gemma2", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 8}
    gemma |= {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 11, "eos_token_id": 1}
    with pytest.raises(ArgumentError, match="Models of type 'gemma2' are not supported"):
        policy_with({**gemma, "final_logit_softcapping": 0.01})


@pytest.mark.parametrize("env", ["CartPole-v1", "Taxi-v4"])
def test_other_environments_are_refused(env):
    with pytest.raises(ArgumentError, match="A language model"):
        PPO("CausalLMPolicy", env if env in gym.registry else "CliffWalking-v1")


def test_vec_env_arguments():
    with pytest.raises(ArgumentError, match="`completions_per_prompt` must divide n_envs=4, but 3 does not"):
        TextVecEnv(letters_task(), 4, completions_per_prompt=3)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"prompts": "a b c"}, "`prompts` must be a list of texts, not one text: 'a b c'"),
        ({"prompts": ["a", 3]}, "`prompts` must be texts, but prompt 1 is 3"),
        ({"prompts": ["a", "b zebra"]}, r"Prompt 1 \('b zebra'\) has what the tokenizer does not know: 'zebra'"),
        ({"references": "abcde"}, "`references` must be a list of texts, not one text: 'abcde'"),
        ({"examples": "abcde"}, "`examples` must be a list of texts"),
        ({"tokenizer": "gpt2"}, r"must be a Hugging Face tokenizer, not 'gpt2'. Pass AutoTokenizer.from_pretrained\("),
        ({"tokenizer": None}, "must be a Hugging Face tokenizer, not None"),
        ({"reward": lambda texts: 0.0}, r"`reward` must be a function of \(prompts, completions, references\)"),
        ({"end_tokens": ["zebra"]}, "`end_tokens` has 'zebra', which is not a token"),
        ({"end_tokens": [99]}, "`end_tokens` has 99, which is not a token"),
    ],
)
def test_arguments_that_cannot_work_are_named_in_one_line(options, message):
    with pytest.raises(ArgumentError, match=message) as error:
        letters_task(**options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "given, message",
    [
        ([[], "a", "a", "a", "a"], r"The examples of prompt 0 must be a text or a list of texts, not \[\]"),
        (["a", None, "a", "a", "a"], "The examples of prompt 1 must be a text or a list of texts, not None"),
        (["a", "a", "a", ["a", 3], "a"], "The examples of prompt 3 must be"),
        (
            ["a", "a", "a", "a", "a zebra"],
            r"The example of prompt 4 \('a zebra'\) has what the tokenizer does not know",
        ),
    ],
)
def test_examples_that_cannot_work(given, message):
    with pytest.raises(ArgumentError, match=message):
        examples(letters_task(examples=given))


@pytest.mark.parametrize(
    "model, message",
    [
        ("/no/such/folder", "`model` is '/no/such/folder', but there is no such folder"),
        ("./nothing", "there is no such folder"),
        (Path("nothing"), "there is no such folder"),
        ("/tmp", "`model` '/tmp' cannot be loaded: .* It must be a folder with a model"),
        ({"model_type": "gpt3"}, "`model` of type 'gpt3' cannot be made of its configuration"),
        ({**GPT2, "n_head": 3}, "`model` of type 'gpt2' cannot be made"),
        ({**GPT2, "eos_token_id": None}, "The model has no end token"),
    ],
)
def test_models_that_cannot_be_had(model, message):
    with pytest.raises(ArgumentError, match=message) as error:
        policy_with(model if not isinstance(model, dict) else {"vocab_size": 11, "eos_token_id": END, **model})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "reward, expected",
    [
        (lambda n: th.full((n,), 0.5, dtype=th.bfloat16), 0.5),
        (lambda n: th.full((n,), 0.5, requires_grad=True) * 2, 1.0),
        (lambda n: [th.tensor(0.25, dtype=th.float16, requires_grad=True)] * n, 0.25),
        (lambda n: (np.float32(2),) * n, 2.0),
    ],
)
def test_rewards_of_other_kinds_of_numbers(reward, expected):
    task = letters_task(reward=lambda prompts, completions, references: reward(len(prompts)))
    assert task.score([0, 1], np.full((2, 6), END))[0].tolist() == [expected] * 2


def test_vec_normalize_may_scale_rewards_but_not_tokens():
    task = letters_task()
    kwargs = {"n_steps": 8, "batch_size": 8, "n_epochs": 1, "policy_kwargs": {"model": config_of("gpt2", task)}}
    for kind in (VecNormalize, SB3VecNormalize):
        model = PPO("CausalLMPolicy", kind(TextVecEnv(task, 4), norm_obs=False), **kwargs)
        model.learn(32)
        assert model.get_vec_normalize_env().ret_rms.count > 30
        with pytest.raises(
            ArgumentError, match=r"numbers of tokens, .* not float32.* use VecNormalize\(norm_obs=False\)"
        ):
            PPO("CausalLMPolicy", kind(TextVecEnv(task, 4)), **kwargs).learn(32)


# ------------------------------------------------------- special and end tokens


def chat_tokenizer():
    """Letters, with a start token that is added to each text, and tokens for turns."""
    tokenizer = word_tokenizer(["<start>", "<turn>", "<think>", *"abcdefgh"])
    tokenizer.add_special_tokens({"bos_token": "<start>", "additional_special_tokens": ["<turn>", "<think>"]})
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<start> $A", special_tokens=[("<start>", tokenizer.bos_token_id)]
    )
    tokenizer.chat_template = "{{ bos_token }} {% for m in messages %}{{ m.content }} <turn> {% endfor %}"
    return tokenizer


def test_the_start_token_of_a_chat_template_is_not_added_again():
    tokenizer = chat_tokenizer()
    start = tokenizer.bos_token_id
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "a b"}], tokenize=False)
    assert chat.startswith("<start>")
    task = letters_task(tokenizer=tokenizer, prompts=[chat, "a b"])
    assert [(row == start).sum() for row in task.rows] == [1, 1]
    assert task.rows[0, -4:].tolist() == [start, *tokenizer.convert_tokens_to_ids(["a", "b", "<turn>"])]


def test_special_tokens_are_shown_to_the_reward():
    seen = []

    def reward(prompts, completions, references):
        seen.extend(completions)
        return [0.0] * len(prompts)

    task = letters_task(tokenizer=chat_tokenizer(), reward=reward)
    think, turn, a = task.tokenizer.convert_tokens_to_ids(["<think>", "<turn>", "a"])
    responses = np.array([[think, a, END, -1, -1, -1], [a, turn, a, END, -1, -1], [END] + [-1] * 5, [a] * 6])
    task.score([0, 0, 0, 0], responses)
    assert seen == ["<think> a", "a <turn> a", "", "a a a a a a"]


@pytest.mark.parametrize("kind", [TextEnv, TextVecEnv])
def test_any_of_several_end_tokens_ends_a_response(kind):
    task = letters_task(tokenizer=chat_tokenizer(), end_tokens=["<turn>"], missing_end_penalty=5.0)
    turn, a = task.tokenizer.convert_tokens_to_ids(["<turn>", "a"])
    assert task.action_space.end_tokens == (END, turn)
    for end in (END, turn):
        env = kind(task) if kind is TextEnv else kind(task, 1)
        env.reset()
        assert not env.step([a] if kind is TextVecEnv else a)[2]
        _, reward, done, *_, info = env.step([end] if kind is TextVecEnv else end)
        info = info[0] if kind is TextVecEnv else info
        assert done
        assert info["completion"] == "a"
        assert info["ended"]
        assert reward == pytest.approx(1 / 6)  # no penalty


def test_the_models_end_tokens_must_be_the_environments():
    tokenizer = chat_tokenizer()
    turn = tokenizer.convert_tokens_to_ids("<turn>")
    config = {**GPT2, "vocab_size": len(tokenizer), "eos_token_id": [END, turn]}
    with pytest.raises(ArgumentError, match=rf"\[{turn}\] would not end .* Pass TextTask\(end_tokens=\[{turn}\]\)"):
        policy_with(config, task=letters_task(tokenizer=tokenizer))
    task = letters_task(tokenizer=tokenizer, end_tokens=[turn])
    model = policy_with(config, task=task)
    policy = model.policy
    assert policy.end_tokens == [END, turn]
    rows = np.repeat(task.observations([0]), 4, axis=0)
    rows[1:, task.width] = [END, turn, 5]
    rows[3, task.width + 1] = turn
    assert policy.is_over(rows).tolist() == [False, True, True, True]
    model.learn(32)
    responses = policy.generate(task.observations(), do_sample=True, num_return_sequences=40)
    ends = np.isin(responses, [END, turn])
    assert ends.sum(axis=1).max() == 1
    assert {END, turn} <= set(responses[ends].tolist())
    last = (responses != -1).sum(axis=1) - 1
    assert np.array_equal(ends.any(axis=1), np.isin(responses[np.arange(len(last)), last], [END, turn]))


def test_a_response_that_goes_on_after_an_end_token_is_not_over():
    """Such as a conversation whose turns are in the response's columns."""
    model = policy_with(config_of("llama", letters_task()))
    policy, task = model.policy, letters_task()
    rows = np.repeat(task.observations([0]), 4000, axis=0)
    rows[:, task.width : task.width + 3] = [4, END, 5]
    assert not policy.is_over(rows).any()
    tokens = model.network.act(Seen(rows)).actions
    expected = policy.get_distribution(rows[:1]).distribution.probs[0].detach().numpy()
    assert np.abs(np.bincount(tokens, minlength=11) / len(tokens) - expected).max() < 0.03


def test_a_tokenizer_with_a_token_more_than_its_model():
    task = letters_task()
    model = policy_with(config_of("gpt2", task, vocab_size=10), task=task)
    policy = model.policy
    rows = task.observations([1, 2])  # the last letter is not in them
    tokens = model.network.act(Seen(np.repeat(rows, 2000, axis=0))).actions
    assert set(tokens.tolist()) == set(range(10))
    _, log_prob, entropy = policy.evaluate_actions(rows, th.tensor([3, 10]))
    logits = policy.lm(input_ids=th.as_tensor(rows[:1, task.width - 1 : task.width]).long()).logits[0, -1]
    assert float(log_prob[0]) == pytest.approx(float(th.log_softmax(logits, dim=-1)[3]), abs=1e-5)
    assert log_prob[1] < -1e7
    assert entropy.isfinite().all()
    assert policy.generate(rows, do_sample=True, num_return_sequences=100).max() < 10
    with pytest.raises(ArgumentError, match=r"has 11 tokens, .* has 9. .* resize_token_embeddings\(11\)"):
        policy_with(config_of("gpt2", task, vocab_size=9), task=task)


def test_evaluation_does_not_inherit_the_models_generation_settings(tmp_path):
    """Total variation between drawing by ``generate`` and by acting."""
    task = letters_task()
    model = make("llama", task=task, policy_kwargs={"temperature": 1.0})
    model.policy.save_pretrained(tmp_path)
    settings = {"do_sample": True, "top_p": 0.3, "top_k": 2, "repetition_penalty": 5.0, "temperature": 0.1}
    GenerationConfig(**settings, eos_token_id=END, bad_words_ids=[[3]]).save_pretrained(tmp_path)
    policy = policy_with(str(tmp_path), task=task).policy
    assert policy.lm.generation_config.top_p == 0.3
    rows = task.observations([0])
    drawn = policy.generate(rows, do_sample=True, num_return_sequences=4000)[:, 0]
    expected = policy.get_distribution(rows).distribution.probs[0].detach().numpy()
    assert np.abs(np.bincount(drawn, minlength=11) / len(drawn) - expected).sum() / 2 < 0.05
    greedy = policy.generate(rows)[0]
    assert greedy[0] == expected.argmax()
    assert policy.lm.generation_config.top_p == 0.3  # for others who use the model
    policy.save_pretrained(tmp_path / "again")
    assert GenerationConfig.from_pretrained(tmp_path / "again").top_p == 0.3


# ------------------------------------------------------------------- details


def test_vocabulary_space():
    assert Vocabulary(5, 1) == Vocabulary(5, 1)
    assert Vocabulary(5, 1) != Vocabulary(5, 2)
    assert Vocabulary(5, 1) != Vocabulary(6, 1)
    assert "end_token=1" in repr(Vocabulary(5, 1))
    for ends in ([4.7], [True], [5], [-1], [1, 2.0]):
        with pytest.raises(ArgumentError, match="The end tokens of a Vocabulary must be numbers from 0 to 4, not"):
            Vocabulary(5, ends[0], ends[1:])


def test_word_tokenizer():
    tokenizer = word_tokenizer(["b", "a", "b"])
    assert tokenizer.convert_ids_to_tokens(range(5)) == [*SPECIAL, "a", "b"]
    assert tokenizer("b a zebra")["input_ids"] == [4, 3, 2]
    assert tokenizer.decode([4, 3]) == "b a"
    assert tokenizer.eos_token_id == END
    again = word_tokenizer(["a", "b", *SPECIAL])  # which it has anyway
    assert again.get_vocab() == tokenizer.get_vocab() and len(again) == 5


def test_unequal_vocabularies_of_model_and_tokenizer():
    """A model whose vocabulary is rounded up never says a token that the tokenizer does not know."""
    task = letters_task()
    model = policy_with(config_of("gpt2", task, vocab_size=12))
    model.learn(32)
    with pytest.raises(ValueError, match="Observation spaces do not match"):
        model.set_env(TextVecEnv(letters_task(response_length=5), 4))
    responses = model.policy.generate(task.observations(), do_sample=True, num_return_sequences=50)
    assert responses.max() < 11


def test_environments_rest_after_their_episodes_until_the_next_reset():
    task = letters_task()
    env = TextVecEnv(task, 4, 2, seed=0)
    env.reset()
    env.rest_after(2)
    ended = np.zeros(4, dtype=int)
    for step in range(30):
        rows, rewards, dones, infos = env.step(np.where(np.arange(4) == step % 4, task.end_token, 3))
        resting = ended == 2
        assert not dones[resting].any()
        assert not rewards[resting].any()
        assert all("episode" not in infos[i] for i in np.flatnonzero(resting))
        ended += dones
        for i in np.flatnonzero(dones & (ended == 2)):
            assert np.array_equal(rows[i], infos[i]["terminal_observation"])
    assert (ended == 2).all()
    assert np.array_equal(env.step(np.full(4, 3))[0], rows)
    rows = env.reset()
    assert (rows[:, task.width :] == -1).all()
    for _ in range(30):
        ended += env.step(np.full(4, task.end_token))[2]
    assert (ended == 32).all()

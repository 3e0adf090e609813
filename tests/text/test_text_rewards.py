"""Several rewards, what they ask for, rewards of single tokens, classifiers."""

import copy
import functools
import pickle

import numpy as np
import pytest
import torch as th
from text_models import LETTERS, closing_tokenizer, config_of, letters_task
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
)

from sb3_pg import PPO, REINFORCE
from sb3_pg.common.advantages import generalized_advantage
from sb3_pg.common.errors import ArgumentError, NonFiniteError
from sb3_pg.common.vec_env import VecNormalize
from sb3_pg.text import ClassifierReward, TextEnv, TextVecEnv, word_tokenizer

A, B = 3, 4  # the tokens of these letters
END = 1


def share_of_a(prompts, completions, references):
    return [text.split().count("a") / 6 for text in completions]


def tokens(prompts, completions, references, token_ids):
    return [float(len(ids)) for ids in token_ids]


def long_prompts_only(prompts, completions, references):
    return [len(text) if len(prompt) > 3 else None for prompt, text in zip(prompts, completions, strict=True)]


def each_a(prompts, completions, references, token_ids):
    return [[float(token == A) for token in ids] for ids in token_ids]


def trl_style(completions, level, **kwargs):
    assert set(kwargs) == {"prompts", "references", "token_ids", "other"}
    return [float(len(text) + its) for text, its in zip(completions, level, strict=True)]


def responses(*rows):
    return np.array([[*row, *[-1] * (6 - len(row))] for row in rows])


# ------------------------------------------------------------------ arguments


def test_rewards_get_what_they_ask_for():
    columns = {"level": [1, 2, 3, 4, 5], "other": list("vwxyz")}
    task = letters_task(reward=[tokens, trl_style], columns=columns)
    scores = task.scores([1, 4], responses([A, B, END], [A]))
    assert scores.totals.tolist() == [3.0 + 3 + 2, 1.0 + 1 + 5]
    assert scores.named == [{"tokens": 3.0, "trl_style": 5.0}, {"tokens": 1.0, "trl_style": 6.0}]

    def by_keyword(p, c, r, *, other, level=None, scale=2.0):
        assert (other, level, scale) == (["w"], [2], 2.0)
        return [1.0]

    assert letters_task(reward=by_keyword, columns=columns).scores([1], responses([A])).totals == [1.0]

    def rest(p, c, r, **more):
        assert more == {"token_ids": [[A]], "level": [2], "other": ["w"]}
        return [1.0]

    assert letters_task(reward=rest, columns=columns).scores([1], responses([A])).totals == [1.0]

    def in_another_order(references, completions):
        assert (references, completions) == (["q"], ["a"])
        return [1.0]

    task = letters_task(reward=in_another_order, references=["p", "q", "r", "s", "t"])
    assert task.scores([1], responses([A])).totals == [1.0]


def test_several_rewards_are_weighted_and_named_and_need_not_apply():
    task = letters_task(reward=[share_of_a, long_prompts_only], reward_weights=[6, 0.5], missing_end_penalty=0.25)
    scores = task.scores([0, 1, 3], responses([A, END], [A, A, END], [B] * 6))
    assert scores.totals.tolist() == [1 + 0.5, 2, 0.5 * 11 - 0.25]
    assert scores.named[0] == {"share_of_a": pytest.approx(1 / 6), "long_prompts_only": 1.0}
    assert scores.named[1] == {"share_of_a": pytest.approx(2 / 6)}
    assert scores.by_token is None
    assert letters_task().scores([0], responses([A])).named == [{}]  # one reward is the score


def test_names_of_rewards():
    task = letters_task(
        reward=[share_of_a, lambda p, c, r: [1.0], functools.partial(share_of_a), lambda p, c, r: [2.0]]
    )
    assert list(task.scores([0], responses([A])).named[0]) == ["share_of_a", "reward", "share_of_a_2", "reward_2"]


def test_names_of_rewards_that_look_numbered():
    def f(prompts, completions, references):
        return [1.0]

    def f_2(prompts, completions, references):
        return [1.0]

    def f_3(prompts, completions, references):
        return [1.0]

    for rewards, names in (
        ([f, f_3, f], ["f", "f_3", "f_2"]),
        ([f, f, f_2], ["f", "f_2", "f_2_2"]),
        ([f_2, f, f, f], ["f_2", "f", "f_3", "f_4"]),
    ):
        assert list(letters_task(reward=rewards).scores([0], responses([A])).named[0]) == names


def wants_zebra(prompts, completions, references, zebra):
    return [0.0]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"reward": []}, "`reward` is empty"),
        ({"reward": [share_of_a, 3]}, "The reward 'int' must be a function of .*, not 3"),
        ({"reward": lambda p, c: [0.0]}, r"`reward` must be a function of \(prompts, completions, references\), but"),
        ({"reward": wants_zebra}, "`reward` asks for 'zebra', but besides .* there is only: token_ids"),
        ({"reward": [tokens, trl_style]}, "The reward 'trl_style' asks for 'level', but"),
        ({"reward_weights": [1.0, 2.0]}, r"`reward_weights` must have one number for each of 1 rewards: \[1.0, 2.0\]"),
        ({"reward_weights": 1.0}, "`reward_weights` must have one number for each of 1 rewards: 1.0"),
        ({"reward_weights": [float("nan")]}, "`reward_weights` must be a finite number"),
        ({"columns": {"token_ids": list("abcde")}}, "`columns` has 'token_ids', which rewards are given anyway"),
        ({"columns": {"level": [1]}}, "`level` must have one entry for each of the 5 prompts, not 1"),
    ],
)
def test_rewards_that_cannot_be_used(options, message):
    with pytest.raises(ArgumentError, match=message) as error:
        letters_task(**options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "returned, error, message",
    [
        (None, ArgumentError, "one number for each of the 2 completions it is given, but returned None"),
        ("ab", ArgumentError, "one number for each of the 2 completions it is given, but returned 'ab'"),
        (["1", 2], ArgumentError, "a number, None, or .* for completion 0 of 2, but returned '1'"),
        ([[1.0, 2.0], [1.0]], ArgumentError, "for each of its 3 tokens for completion 0 of 2, but returned"),
        ([1.0, None], ArgumentError, "No reward applies to the prompt 'd' and the completion 'b': .* such as 0.0"),
        ([1.0, float("nan")], NonFiniteError, "`reward` returned nan for the prompt 'd' and the completion 'b'"),
        ([1.0, [1.0, float("inf")]], NonFiniteError, r"`reward` returned \[ 1. inf\] for the prompt 'd'"),
    ],
)
def test_what_a_reward_may_not_return(returned, error, message):
    task = letters_task(reward=lambda p, c, r: returned)
    with pytest.raises(error, match=message) as raised:
        task.scores([0, 1], responses([A, A, END], [B, END]))
    assert "\n" not in str(raised.value)


# --------------------------------------------------------- rewards of tokens


def test_rewards_of_tokens():
    task = letters_task(reward=[each_a, share_of_a], reward_weights=[2.0, 6.0], missing_end_penalty=0.5)
    scores = task.scores([0, 1], responses([A, B, A, END], [A] * 6))
    assert scores.totals.tolist() == [4 + 2, 12 + 6 - 0.5]
    assert scores.named[0] == {"each_a": 2.0, "share_of_a": pytest.approx(2 / 6)}
    assert scores.by_token[0].tolist() == [2, 0, 2, 2]
    assert scores.by_token[1].tolist() == [2, 2, 2, 2, 2, 2 + 6 - 0.5]


@pytest.mark.parametrize("kind", [TextEnv, TextVecEnv])
def test_the_environment_gives_the_sum_and_tells_the_shares(kind):
    task = letters_task(reward=[each_a, share_of_a])
    env = kind(task) if kind is TextEnv else kind(task, 1)
    env.reset()
    for action in (A, B, A, END):
        _, reward, done, *_, info = env.step(action if kind is TextEnv else [action])
        assert done or reward == 0.0
    info = info if kind is TextEnv else info[0]
    assert reward == pytest.approx(2 + 2 / 6)
    np.testing.assert_allclose(info["step_rewards"], [1, 0, 1, 2 / 6])
    assert info["reward_scores"] == {"each_a": 2.0, "share_of_a": pytest.approx(2 / 6)}


def collected(task, algorithm=PPO, n_envs=6, **options):
    config = config_of("gpt2", task)
    env = TextVecEnv(task, n_envs, seed=0)
    kwargs = {"model": config, "reference_kl_coef": None}
    model = algorithm("CausalLMPolicy", env, gamma=0.9, seed=0, policy_kwargs=kwargs, **options)
    _, callback = model._setup_learn(1000)
    model.collect_rollouts(env, callback, model.rollout_buffer, model.n_steps)
    return model


def expected_rewards(model, of_token):
    """By hand: of each response that ended in the rollout the tokens that are in it, of others nothing."""
    buffer, n = model.rollout_buffer, model.rollout.n_steps
    ends = model.rollout.dones
    expected = np.zeros(ends.shape)
    for env in range(ends.shape[1]):
        last = np.flatnonzero(ends[:, env])
        upto = last[-1] + 1 if len(last) else 0
        expected[:upto, env] = [of_token(token) for token in buffer.actions[:n][:upto, env, 0]]
    return expected


def test_ppo_learns_from_the_rewards_where_the_tokens_stand():
    model = collected(letters_task(reward=each_a), n_steps=21, batch_size=126)
    buffer, n = model.rollout_buffer, 21
    for _ in range(2):  # the second one has responses that began in the first
        expected = expected_rewards(model, lambda token: float(token == A))
        assert expected.sum() > 5
        assert np.array_equal(buffer.rewards[:n], expected)
        finals = model.policy.predict_values(model._last_obs).detach().numpy().ravel()
        advantages = generalized_advantage(expected, buffer.values[:n], finals, model.rollout.dones, 0.9, 0.95)
        np.testing.assert_allclose(buffer.advantages[:n], advantages, atol=1e-5)
        starts = model._last_episode_starts.copy()
        model.collect_rollouts(model.env, model._setup_learn(1000, reset_num_timesteps=False)[1], buffer, n)
    assert not starts.all()


def test_judging_twice_gives_the_same_rewards():
    model = collected(letters_task(reward=each_a), n_steps=21, batch_size=126)
    before = model.rollout_buffer.rewards[:21].copy()
    model.judge(model.rollout)
    assert np.array_equal(model.rollout_buffer.rewards[:21], before)


def test_reinforce_learns_from_the_rewards_where_the_tokens_stand():
    task = letters_task(reward=[each_a, tokens], reward_weights=[1.0, 0.5])
    model = collected(task, REINFORCE, n_episodes=6, baseline=None, normalize_advantage=False, n_critic_updates=0)
    keep, buffer = model.horizon.keep(model.rollout), model.rollout_buffer
    for env in range(6):
        its = buffer.actions[: keep[:, env].sum(), env, 0]
        rewards = (its == A).astype(float)
        rewards[-1] += 0.5 * len(its)
        expected = [sum(0.9 ** (i - t) * r for i, r in enumerate(rewards) if i >= t) for t in range(len(its))]
        np.testing.assert_allclose(buffer.returns[: len(its), env], expected, atol=1e-5)
        episode = model.ep_info_buffer
        assert any(e["r"] == pytest.approx(rewards.sum()) and e["l"] == len(its) for e in episode)
    log = model.logger.name_to_value
    lengths = keep.sum(axis=0)
    assert log["text/reward/tokens"] == pytest.approx(lengths.mean())
    assert log["text/reward/each_a"] == pytest.approx(((buffer.actions[: len(keep), :, 0] == A) & keep).sum() / 6)
    assert log["text/score"] == pytest.approx(log["text/reward/each_a"] + 0.5 * log["text/reward/tokens"], rel=1e-5)


def test_a_reward_that_applies_sometimes_is_logged_as_the_mean_of_where_it_does():
    model = collected(letters_task(reward=[share_of_a, long_prompts_only]), n_steps=40, batch_size=240)
    told = [infos["reward_scores"] for _, _, infos in model.rollout.told]
    values = [its["long_prompts_only"] for its in told if "long_prompts_only" in its]
    assert 0 < len(values) < len(told) == model.rollout.n_finished.sum()
    log = model.logger.name_to_value
    assert log["text/reward/long_prompts_only"] == pytest.approx(np.mean(values))
    assert log["text/reward/share_of_a"] == pytest.approx(np.mean([its["share_of_a"] for its in told]))


def test_a_wrapper_must_not_scale_rewards_of_tokens():
    task = letters_task(reward=each_a)
    env = VecNormalize(TextVecEnv(task, 4), norm_obs=False)
    kwargs = {"model": config_of("gpt2", task)}
    with pytest.raises(ArgumentError, match=r"add up to .* was recorded: .* VecNormalize\(norm_reward=False\)"):
        PPO("CausalLMPolicy", env, n_steps=16, batch_size=64, policy_kwargs=kwargs).learn(64)


def test_an_interrupted_rollout_keeps_what_environments_have_told(tmp_path):
    task = letters_task(reward=[each_a, tokens])

    def made():
        env = TextVecEnv(task, 4, seed=0)
        kwargs = {"model": config_of("gpt2", task), "reference_kl_coef": 0.1}
        return PPO("CausalLMPolicy", env, n_steps=16, batch_size=64, n_epochs=1, seed=0, policy_kwargs=kwargs)

    whole = made()
    whole.learn(64)
    stopped = made()
    stopped.learn(64, callback=lambda its, _: its["n_steps"] < 9)
    assert stopped.rollout_buffer.pos == 10
    stopped.save(tmp_path / "model")
    resumed = PPO.load(tmp_path / "model", TextVecEnv(task, 4, seed=1))
    resumed.learn(24, reset_num_timesteps=False)
    assert np.array_equal(resumed.rollout_buffer.rewards, whole.rollout_buffer.rewards)
    for (name, x), y in zip(whole.policy.state_dict().items(), resumed.policy.state_dict().values(), strict=True):
        assert th.equal(x, y), name


# ---------------------------------------------------------------- classifiers


def classifier(kind="bert", n_labels=3, **more):
    tokenizer = word_tokenizer(LETTERS)
    th.manual_seed(0)
    sizes = {"vocab_size": len(tokenizer), "num_labels": n_labels, "pad_token_id": 0, **more}
    if kind == "gpt2":
        return GPT2ForSequenceClassification(GPT2Config(n_embd=16, n_layer=1, n_head=2, **sizes)), tokenizer
    config = BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, initializer_range=0.5, **sizes
    )
    return BertForSequenceClassification(config), tokenizer


PROMPTS, TEXTS = ["a", "b c d", "e", "f", "g h"], ["b b b", "a", "", "c d e f", "b"]


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_a_classifier_scores_each_text_as_if_it_were_alone(kind, batch_size):
    model, tokenizer = classifier(kind)
    model.config.id2label = {0: "bad", 1: "good", 2: "other"}
    reward = ClassifierReward(model, tokenizer, "good", separator=" ", batch_size=batch_size, device="cpu")
    found = reward(PROMPTS, TEXTS, [None] * 5)
    for prompt, text, score in zip(PROMPTS, TEXTS, found, strict=True):
        ids = th.tensor([tokenizer(f"{prompt} {text}")["input_ids"]])
        assert score == pytest.approx(float(model(ids).logits[0, 1].detach()), abs=1e-5)
    assert np.std(found) > 1e-3
    reward = ClassifierReward(model, tokenizer, 2, "probability", with_prompt=False, device="cpu")
    found = reward(PROMPTS[:2], TEXTS[:2], [None] * 2)
    for text, score in zip(TEXTS[:2], found, strict=True):
        ids = th.tensor([tokenizer(text)["input_ids"]])
        assert score == pytest.approx(float(model(ids).logits.softmax(dim=-1)[0, 2].detach()), abs=1e-5)


BASE = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
CLASSIFIERS = {
    "bert": BASE,
    "bloom": {"hidden_size": 16, "n_layer": 1, "n_head": 2},  # reads any number of tokens, as the next
    "t5": {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0},
    "gpt2": {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 12},
    "llama": {**BASE, "max_position_embeddings": 12},
    "roberta": {**BASE, "max_position_embeddings": 13},  # with positions for 12 tokens behind that of the padding
    "xlnet": {"d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 16},  # which looks at the last column
}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_padding_windows_and_empty_texts_change_no_score(kind, side):
    tokenizer = closing_tokenizer() if kind == "t5" else word_tokenizer(LETTERS)  # T5 looks for the end
    tokenizer.padding_side = side
    ids = {"vocab_size": len(tokenizer), "pad_token_id": 0, "bos_token_id": None, "eos_token_id": END}
    config = AutoConfig.for_model(kind, num_labels=1, **ids, **CLASSIFIERS[kind])
    th.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config)
    with th.no_grad():
        for p in model.parameters():
            p += 0.3 * th.randn(p.shape)
    reward = ClassifierReward(model, tokenizer, with_prompt=False, device="cpu")
    is_short = kind in ("gpt2", "llama", "roberta")
    texts, expected = ["a b", "c d e f g", " ".join(LETTERS * 3), "", " "], []
    for text in texts:
        tokens = tokenizer(text)["input_ids"][-12 if is_short else 0 :] or [END]
        expected.append(float(model(th.tensor([tokens])).logits[0, 0].detach()))
        np.testing.assert_allclose(reward([""], [text], [None]), expected[-1:], atol=1e-5)
    assert np.std(expected[:4]) > 0.05
    np.testing.assert_allclose(reward([""] * 5, texts, [None] * 5), expected, atol=1e-5)
    np.testing.assert_allclose(reward([""] * 2, ["", ""], [None] * 2), expected[3:], atol=1e-5)
    assert tokenizer.padding_side == side


def test_without_an_end_token_what_is_empty_is_padding():
    model, tokenizer = classifier("gpt2", 1)
    tokenizer.eos_token = None
    reward = ClassifierReward(model, tokenizer, with_prompt=False, device="cpu")
    expected = float(model(th.tensor([[0]])).logits[0, 0].detach())
    for texts in ([""], ["", "a b c"]):
        assert reward([""] * len(texts), texts, [None] * len(texts))[0] == pytest.approx(expected, abs=1e-5)


def test_a_reward_model_reads_messages_by_its_chat_template_and_the_end_of_what_is_too_long():
    model, tokenizer = classifier(n_labels=1, max_position_embeddings=4)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    reward = ClassifierReward(model, tokenizer, device="cpu")
    chat = [{"role": "user", "content": "a b c"}]
    (score,) = reward([chat], ["d e"], [None])
    assert tokenizer.truncation_side == "right"  # the caller's is as it was
    ids = th.tensor([tokenizer("b c d e")["input_ids"]])
    assert score == pytest.approx(float(model(ids).logits[0, 0].detach()), abs=1e-5)
    reward.tokenizer.chat_template = None
    with pytest.raises(ArgumentError, match="Messages as prompts of a ClassifierReward need a chat template"):
        reward([chat], ["d e"], [None])


def test_a_classifier_is_a_reward_of_a_task(tmp_path):
    model, tokenizer = classifier()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    reward = ClassifierReward(tmp_path, label="LABEL_2", separator=" ", device="cpu")
    task = letters_task(reward=[reward, share_of_a], reward_weights=[2.0, 1.0])
    totals, texts = task.score([0, 1], responses([A, A, END], [B, END]))
    given = reward(["a b c", "d"], texts, [None, None])
    np.testing.assert_allclose(totals, [2 * given[0] + 2 / 6, 2 * given[1]], rtol=1e-6)
    for again in (pickle.loads(pickle.dumps(task)), copy.deepcopy(task)):
        assert again.score([0, 1], responses([A, A, END], [B, END]))[0].tolist() == totals.tolist()
    assert list(task.scores([0], responses([A])).named[0]) == ["ClassifierReward", "share_of_a"]


@pytest.mark.parametrize(
    "change, message",
    [
        ({}, "`label` must be one of 'LABEL_0', 'LABEL_1', 'LABEL_2', or its number, not None"),
        ({"label": "good"}, "`label` must be one of .* not 'good'"),
        ({"label": 3}, "`label` must be one of .* not 3"),
        ({"output": "score"}, "`output` must be one of 'logit', 'probability'"),
        ({"batch_size": 0}, "`batch_size` must be a whole number"),
        ({"model": th.nn.Linear(1, 1)}, "must be a sequence classification model, .* not a Linear"),
        ({"model": "/no/such"}, "`model` '/no/such' cannot be loaded as a classifier"),
        ({"tokenizer": "bert"}, "must be a Hugging Face tokenizer, not 'bert'"),
    ],
)
def test_classifiers_that_cannot_be_used(change, message):
    model, tokenizer = classifier()
    with pytest.raises(ArgumentError, match=message) as error:
        ClassifierReward(**{"model": model, "tokenizer": tokenizer, **change})
    assert "\n" not in str(error.value)


def test_a_classifier_needs_a_token_for_padding():
    model, tokenizer = classifier()
    tokenizer.pad_token = None
    with pytest.raises(ArgumentError, match="`tokenizer` has no padding token"):
        ClassifierReward(model, tokenizer, 0)
    model, tokenizer = classifier(pad_token_id=None)
    with pytest.raises(ArgumentError, match=r"set model\.config\.pad_token_id"):
        ClassifierReward(model, tokenizer, 0)
    model, tokenizer = classifier("gpt2", pad_token_id=1)
    with pytest.raises(
        ArgumentError, match="`tokenizer` pads with token 0, but the model takes 1 for padding: set"
    ) as e:
        ClassifierReward(model, tokenizer, 0)
    assert "\n" not in str(e.value)

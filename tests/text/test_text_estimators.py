"""GRPO, RLOO, GSPO and their kin on language models, against plain transformers and autograd in float64."""

import copy
import itertools

import numpy as np
import pytest
import torch as th
from conftest import pairs, silent
from text_models import SHAPES, config_of, letters_task, sharpen

from sb3_pg import PPO, REINFORCE, TRPO
from sb3_pg.common.errors import ArgumentError
from sb3_pg.common.objectives import kl_estimate
from sb3_pg.text import TextVecEnv

TEMPERATURE = 0.7
OPTIONS = {"gamma": 1.0, "normalize_advantage": False, "seed": 1, "device": "cpu", "max_grad_norm": None}


def words(prompts, completions, references):
    """A reward that differs wherever lengths do."""
    return [float(len(text.split())) for text in completions]


def judged(kind, shape="llama", policy_kwargs=None, seed=3, reward=None, **options):
    """A model with a judged rollout of four responses to each of three prompts, and a reference that is not it."""
    task = letters_task(**({} if reward is None else {"reward": reward}))
    kwargs = {"model": config_of(shape, task), "temperature": TEMPERATURE, "optimizer_class": th.optim.SGD}
    kwargs = {**kwargs, "reference_kl_coef": None, **(policy_kwargs or {})}
    options = {**OPTIONS, "n_episodes": 12, **options}
    if kind is PPO:
        options = {"batch_size": 1000, "n_epochs": 1, **options}
    if kind is TRPO:
        options.pop("max_grad_norm")
    env = TextVecEnv(task, 12, 4, seed=seed)
    model = silent(kind(SHAPES[shape][0], env, policy_kwargs=kwargs, **options))
    sharpen(model.policy)
    _, callback = model._setup_learn(1)
    model.collect_rollouts(env, callback, model.rollout_buffer, model.n_steps)
    return model


def responses(model):
    """Prompt, response, what was recorded as its log-probabilities, and reward, of each response that counts."""
    rollout, found = model.rollout, []
    keep, dones, buffer = model.horizon.keep(rollout), rollout.dones, rollout.buffer
    for env in range(rollout.n_envs):
        steps = np.arange(np.flatnonzero(dones[:, env])[0] + 1)
        assert keep[steps, env].all()
        row = np.asarray(buffer.observations[0])[env]
        prompt = row[: model.policy.prompt_length]
        actions, old = buffer.actions[steps, env, 0], buffer.log_probs[steps, env]
        found.append((prompt[prompt >= 0], actions.copy(), old.copy(), float(buffer.rewards[steps, env].sum())))
    return found


def log_probs(lm, prompt, response):
    """Log-probabilities of the tokens of a response, by the plain model."""
    prompt, response = (th.as_tensor(x, dtype=th.long)[None] for x in (prompt, response))
    if lm.config.is_encoder_decoder:
        start = th.zeros(1, 1, dtype=th.long)
        logits = lm(input_ids=prompt, decoder_input_ids=th.cat([start, response[:, :-1]], dim=1)).logits
    else:
        logits = lm(input_ids=th.cat([prompt, response], dim=1)).logits[:, prompt.shape[1] - 1 : -1]
    return th.log_softmax(logits / TEMPERATURE, dim=-1)[0].gather(1, response[0][:, None])[:, 0]


def double(lm):
    return copy.deepcopy(lm).double()


def advantages_of(its, scale):
    """GRPO's, or RLOO's for "loo"."""
    rewards, prompts = np.array([x[3] for x in its]), [x[0].tobytes() for x in its]
    found = []
    for number, prompt in enumerate(prompts):
        group = np.array([r for r, p in zip(rewards, prompts, strict=True) if p == prompt])
        if scale == "loo":
            found.append(rewards[number] - (group.sum() - rewards[number]) / (len(group) - 1))
            continue
        deviation = {"group": group.std(ddof=1), "batch": rewards.std(ddof=1), None: 1.0 - 1e-4}[scale]
        found.append((rewards[number] - group.mean()) / (deviation + 1e-4))
    assert np.ptp(found) > 0.1
    return found


def averaged(losses, average):
    if average == "step":
        return th.cat(losses).mean()
    sums = [x.mean() if average == "sequence" else x.sum() / average for x in losses]
    return th.stack(sums).mean()


def gradients(lm):
    """By name; those of tied embeddings once."""
    return {name: p.grad.clone() for name, p in lm.named_parameters() if p.grad is not None}


def check_gradients(found, expected, tolerance=1e-5):
    assert found.keys() == expected.keys()
    largest = max(float(g.abs().max()) for g in expected.values())
    assert largest > 1e-4
    for name, g in expected.items():
        np.testing.assert_allclose(found[name], g, atol=tolerance * largest, rtol=0, err_msg=name)


def scores(lm, its, advantages):
    """The score-function estimator; at ratio one its gradient is that of the surrogate."""
    return [-a * log_probs(lm, prompt, response) for (prompt, response, *_), a in zip(its, advantages, strict=True)]


def surrogates(lm, its, advantages, ratio="step", clip=0.2):
    losses = []
    for (prompt, response, old, _), advantage in zip(its, advantages, strict=True):
        log_ratio = log_probs(lm, prompt, response) - th.as_tensor(old).double()
        if ratio == "sequence":
            log_ratio = log_ratio.mean().expand(len(response))
        r = log_ratio.exp()
        losses.append(-th.minimum(r * advantage, r.clip(1 - clip, 1 + clip) * advantage))
    return losses


AVERAGES = ["step", "sequence", 6]


@pytest.mark.parametrize(
    ("average", "scale", "shape"),
    [*itertools.product(AVERAGES, ["group", "batch", None], ["llama"]), ("sequence", "group", "t5")],
)
def test_grpo(average, scale, shape):
    model = judged(PPO, shape, reward=words, baseline="group", scale_rewards=scale, loss_average=average)
    its, lm = responses(model), double(model.policy.lm)
    assert len({len(x[1]) for x in its}) > 2
    averaged(scores(lm, its, advantages_of(its, scale)), average).backward()
    model.train()
    check_gradients(gradients(model.policy.lm), gradients(lm))


@pytest.mark.parametrize("kind", [PPO, REINFORCE])
@pytest.mark.parametrize("options", [{}, {"mask_truncated_completions": True}])
def test_a_single_step_is_the_same_without_judging_before(kind, options, monkeypatch):
    found = []
    for needs in (True, False):
        with monkeypatch.context() as patch:
            if needs:
                patch.setattr(kind, "_needs_log_probs", lambda *_: True)
            model = judged(kind, baseline="group", loss_average="sequence", policy_kwargs={**IN_LOSS, **options})
            assert model.rollout.needs_log_probs == needs
            assert bool(model.rollout_buffer.log_probs.any()) == needs
            model.train()
        log = dict(model.logger.name_to_value)
        found.append((log, model.policy.parameters_to_vector(), model.rollout.figures))
    (log, parameters, figures), (its_log, its_parameters, its_figures) = found
    np.testing.assert_allclose(its_parameters, parameters, rtol=1e-5, atol=1e-6)
    assert figures["text/kl"] > 0.01 and its_log.keys() == log.keys() and its_figures.keys() == figures.keys()
    if not options:  # which leaves responses out of the mean
        for name in ("text/kl", "text/penalised_reward", "text/score"):
            assert its_log[name] == its_figures[name] == pytest.approx(log[name], rel=1e-4)


@pytest.mark.parametrize(
    ("options", "kwargs"),
    [
        ({}, {"reference_kl_target": 0.1}),  # the KL adapts the coefficient before the update
        ({}, {"reference_kl_in": "reward"}),
        ({"n_epochs": 2}, {}),
        ({"batch_size": 20}, {}),
        ({"target_kl": 0.1}, {}),
    ],
)
def test_who_needs_log_probabilities_before_the_update(options, kwargs):
    model = judged(PPO, baseline="group", policy_kwargs={**IN_LOSS, **kwargs}, **options)
    assert model.rollout_buffer.log_probs.any() and "text/kl" in model.rollout.figures


@pytest.mark.parametrize(("kind", "changed"), [(PPO, {"n_epochs": 2}), (REINFORCE, {"batch_size": 20})])
def test_arguments_that_are_changed_after_judging(kind, changed, monkeypatch):
    """Log-probabilities that are needed after all are found before the update."""
    found = []
    for options in ({}, changed):
        model = judged(kind, baseline="group", policy_kwargs=IN_LOSS, **options)
        assert model.rollout.needs_log_probs == bool(options)
        for name, value in changed.items():
            setattr(model, name, value)
        np.random.seed(0)
        model.train()
        found.append(model.policy.parameters_to_vector())
    np.testing.assert_array_equal(*found)


@pytest.mark.parametrize("average", AVERAGES)
def test_rloo(average):
    model = judged(REINFORCE, baseline="leave_one_out_same_start", loss_average=average)
    its, lm = responses(model), double(model.policy.lm)
    averaged(scores(lm, its, advantages_of(its, "loo")), average).backward()
    model.train()
    check_gradients(gradients(model.policy.lm), gradients(lm))


@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("ratio", ["step", "sequence"])
def test_gspo_and_ppo_away_from_the_policy_that_acted(ratio, average, monkeypatch):
    monkeypatch.setattr(PPO, "_needs_log_probs", lambda *_: True)
    options = {"ratio": ratio, "clip_range": 0.1, "loss_average": average}
    model = judged(PPO, baseline="group", **options)
    model.rollout_buffer.log_probs += np.random.default_rng(0).normal(0.05, 0.2, model.rollout_buffer.log_probs.shape)
    its, lm = responses(model), double(model.policy.lm)
    losses = surrogates(lm, its, advantages_of(its, "group"), ratio, clip=0.1)
    averaged(losses, average).backward()
    model.train()
    assert 0.0 < model.logger.name_to_value["train/clip_fraction"] < 1.0
    check_gradients(gradients(model.policy.lm), gradients(lm))


# ------------------------------------------------------------------ KL in the loss

IN_LOSS = {"reference_kl_in": "loss", "reference_kl_coef": 0.3}


def penalty_of(log_ratio, estimator):
    return {"k2": log_ratio**2 / 2, "k3": th.exp(-log_ratio) - 1 + log_ratio}[estimator]


def penalties(model, lm, its, estimator):
    reference = double(model.policy.reference)
    found = []
    for prompt, response, *_ in its:
        log_ratio = log_probs(lm, prompt, response) - log_probs(reference, prompt, response).detach()
        assert log_ratio.detach().abs().mean() > 0.05
        found.append(0.3 * penalty_of(log_ratio, estimator))
    return found


@pytest.mark.parametrize("kind, estimator, average", pairs([PPO, REINFORCE, TRPO], ["k2", "k3"], AVERAGES))
def test_kl_in_the_loss(kind, estimator, average):
    kwargs = {**IN_LOSS, "reference_kl_estimator": estimator}
    model = judged(kind, baseline="group", loss_average=average, policy_kwargs=kwargs)
    its, lm = responses(model), double(model.policy.lm)
    losses = scores(lm, its, advantages_of(its, "group"))
    its_penalties = penalties(model, lm, its, estimator)
    averaged([a + b for a, b in zip(losses, its_penalties, strict=True)], average).backward()
    if kind is not TRPO:
        model.train()
        check_gradients(gradients(model.policy.lm), gradients(lm))
        return
    batch = model._batch(model.rollout)
    actor = model.network.actor(batch)
    expected = th.cat([p.grad.flatten() for p in lm.parameters()])
    found = actor.gradient(-batch.advantages, 0.0)
    np.testing.assert_allclose(found, expected, atol=1e-5 * float(expected.abs().max()))
    assert batch.mean(actor.old.penalty) == pytest.approx(float(averaged(its_penalties, average)), rel=1e-4)
    np.testing.assert_allclose(actor.look().penalty, actor.old.penalty, rtol=1e-5, atol=1e-6)


def test_trpo_searches_along_the_penalised_objective():
    """Without advantages it is the penalty alone that is improved."""
    model = judged(TRPO, baseline="group", policy_kwargs=IN_LOSS, reward=lambda prompts, texts, _: [0.0] * len(texts))
    batch = model._batch(model.rollout)
    before = batch.mean(model.network.actor(batch).old.penalty)
    model.train()
    log = model.logger.name_to_value
    assert log["train/policy_step"] == "accepted"
    assert log["train/surrogate_improvement"] > 0.0
    after = batch.mean(model.network.actor(batch).old.penalty)
    assert before - after == pytest.approx(log["train/surrogate_improvement"], rel=1e-3)


def test_the_reward_is_the_environments_where_the_loss_has_the_penalty():
    plain, model = (judged(PPO, baseline="group", policy_kwargs=its, n_epochs=2) for its in ({}, IN_LOSS))
    n = model.rollout.n_steps
    np.testing.assert_array_equal(model.rollout_buffer.rewards[:n], plain.rollout_buffer.rewards[:n])
    batch = model._batch(model.rollout)
    expected = model.policy.reference_log_prob(batch.observations, batch.actions)
    np.testing.assert_allclose(batch.reference_log_prob, expected, rtol=1e-5, atol=1e-6)
    log = model.logger.name_to_value
    k3 = kl_estimate(batch.old_log_prob.numpy() - expected, "k3")[0].mean()
    assert log["text/penalised_reward"] == pytest.approx(
        log["text/score"] - 0.3 * k3 * log["text/response_length"], rel=1e-4
    )
    assert plain._batch(plain.rollout).reference_log_prob is None


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_every_estimator_in_the_reward(estimator):
    kwargs = {"reference_kl_coef": 0.3, "reference_kl_estimator": estimator}
    plain, model = judged(PPO, baseline="group"), judged(PPO, baseline="group", policy_kwargs=kwargs)
    n, keep = model.rollout.n_steps, model.horizon.keep(model.rollout)
    rows, actions = model.rollout.column("observations")[keep.ravel()], model.rollout_buffer.actions[:n][keep][:, 0]
    log_ratio = th.as_tensor(model.rollout_buffer.log_probs[:n][keep]) - model.policy.reference_log_prob(rows, actions)
    expected = log_ratio if estimator == "k1" else penalty_of(log_ratio, estimator)
    found = (plain.rollout_buffer.rewards[:n] - model.rollout_buffer.rewards[:n])[keep]
    np.testing.assert_allclose(found, 0.3 * expected, atol=1e-5)


# ------------------------------------------------------------ nothing to learn


def by_prompt(prompts, texts, _):
    """The same for all responses to a prompt, but for one prompt."""
    return [0.5 if prompt != "c d e" else len(text) / 10 for prompt, text in zip(prompts, texts, strict=True)]


def test_prompts_whose_responses_earn_the_same_are_not_read(monkeypatch):
    found, tokens = [], []
    for leave_out in (True, False):
        model = judged(PPO, baseline="group", reward=by_prompt, batch_size=20, n_epochs=2, learning_rate=0.1, seed=5)
        monkeypatch.setattr(PPO, "_may_leave_out", lambda self, batch, leave_out=leave_out: leave_out)
        read, original = [], model.policy.read_sequences
        monkeypatch.setattr(
            model.policy,
            "read_sequences",
            lambda lm, rows, o=original, r=read: r.append((rows >= 0).sum()) or o(lm, rows),
        )
        before = copy.deepcopy(model.policy)
        np.random.seed(0)
        model.train()
        assert 0.0 < model.logger.name_to_value["train/frac_reward_zero_std"] < 1.0
        found.append(th.cat([p.detach().flatten() for p in model.policy.lm.parameters()]))
        tokens.append(sum(read))
        moved = (found[-1] - th.cat([p.detach().flatten() for p in before.lm.parameters()])).abs().max()
    assert tokens[0] < 0.8 * tokens[1]
    assert moved > 1e-3
    np.testing.assert_allclose(found[0], found[1], rtol=1e-5, atol=1e-6)


# -------------------------------------------------------- responses cut short


@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("kind", [PPO, REINFORCE])
def test_truncated_responses_are_masked_out_of_the_loss(kind, average):
    """They are still in their group's mean."""
    kwargs = {"mask_truncated_completions": True}
    model = judged(kind, baseline="group", loss_average=average, policy_kwargs=kwargs)
    its, lm = responses(model), double(model.policy.lm)
    end, longest = model.policy.end_token, model.policy.response_length
    whole = [number for number, x in enumerate(its) if not (len(x[1]) == longest and x[1][-1] != end)]
    assert 0 < len(whole) < len(its)
    losses = scores(lm, its, advantages_of(its, "group"))
    averaged([losses[number] for number in whole], average).backward()
    model.train()
    check_gradients(gradients(model.policy.lm), gradients(lm))


def test_nothing_is_learned_where_all_responses_are_masked():
    model = judged(PPO, baseline="group", policy_kwargs={"mask_truncated_completions": True})
    batch = model._batch(model.rollout)
    batch.weight = th.zeros(len(batch))
    (minibatch,) = batch.minibatches(None)
    assert len(minibatch) < len(batch)
    evaluation = model.network.evaluate(minibatch)
    evaluation.backward(th.ones(len(minibatch)), -0.1, th.ones(len(minibatch)))
    assert all(not p.grad.any() for p in model.policy.parameters() if p.grad is not None)
    assert model.network.step(0.5, minibatch.share) == 0.0


# ---------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (
            {"reference_kl_in": "loss", "reference_kl_estimator": "k1"},
            "`reference_kl_estimator='k1'` does nothing with",
        ),
        ({"reference_kl_in": "advantage"}, "`reference_kl_in` must be one of 'reward', 'loss', not 'advantage'"),
        ({"reference_kl_estimator": "k4"}, "`reference_kl_estimator` must be one of 'k1', 'k2', 'k3', None, not 'k4'"),
        ({"reference_kl_in": "loss", "reference_kl_coef": None}, "`reference_kl_in='loss'` needs a reference"),
        ({"reference_kl_target": 6.0, "reference_kl_coef": 0.0}, "`reference_kl_target=6.0` needs a weight above 0"),
        ({"ref_model_sync_steps": 3, "reference_kl_coef": None}, "`ref_model_sync_steps=3` needs a reference"),
        ({"ref_model_sync_steps": 0}, "`ref_model_sync_steps` must be a whole number >= 1"),
        ({"ref_model_mixup_alpha": 0}, "`ref_model_mixup_alpha` must be a finite number > 0 and <= 1"),
        ({"ref_model_sync_steps": 3, "lora": {"r": 2}}, "`ref_model_sync_steps=3` .* with `lora`"),
        ({"mask_truncated_completions": "yes"}, "`mask_truncated_completions` must be one of True, False"),
        ({"top_k": 0}, "`top_k` must be a whole number >= 1, not 0"),
        ({"top_p": 1.5}, "`top_p` must be a finite number > 0 and <= 1, not 1.5"),
        ({"min_p": 0.0}, "`min_p` must be a finite number > 0 and <= 1, not 0.0"),
        ({"min_new_tokens": 7}, "`min_new_tokens=7` is more than the 6 tokens that a response may have"),
    ],
)
def test_what_cannot_work(kwargs, message):
    task = letters_task()
    kwargs = {"model": config_of("gpt2", task), "reference_kl_coef": 0.1, **kwargs}
    with pytest.raises(ArgumentError, match=message):
        PPO("CausalLMPolicy", TextVecEnv(task, 2), policy_kwargs=kwargs, n_steps=8, batch_size=16)

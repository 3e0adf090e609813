"""Half precision, and gradients that take less memory."""

import numpy as np
import pytest
import torch as th
from conftest import pairs, silent
from text_models import SHAPES, act, config_of, letters_task, make, sharpen
from transformers.modeling_layers import GradientCheckpointingLayer

from sb3_pg import PPO, REINFORCE, TRPO
from sb3_pg.common.errors import ArgumentError
from sb3_pg.text import TextVecEnv
from sb3_pg.text.graphs import GRAPH_BYTES, checkpointed_layers, enable_checkpointing, graph_room

pytestmark = pytest.mark.filterwarnings("ignore:You have specified a mini-batch size")

HALF = {"model_kwargs": {"dtype": th.bfloat16}}


def gradients(model, **settings):
    """The gradient of a whole rollout, and the bytes that stay in memory for it."""
    batch, kept = model.network.batch(model.rollout), {}

    def note(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    own = {p.untyped_storage().data_ptr() for p in model.policy.parameters()}
    with th.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        evaluation = model.network.evaluate(batch)
    evaluation.backward(batch.advantages, -0.3, batch.returns)
    found = {name: p.grad.clone() for name, p in model.policy.named_parameters() if p.grad is not None}
    return found, sum(size for place, size in kept.items() if place not in own)


def assert_same(found, expected, tolerance=1e-5):
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        size = float(gradient.abs().max())
        np.testing.assert_allclose(
            found[name], gradient, atol=max(tolerance * size, 1e-7), rtol=tolerance, err_msg=name
        )


@pytest.mark.parametrize("lora", [None, {"r": 2}], ids=["full", "lora"])
@pytest.mark.parametrize("shape", SHAPES)
def test_batches_in_parts_give_the_same_gradient_and_keep_the_graph_of_one(shape, lora, monkeypatch):
    model = make(shape, policy_kwargs={"lora": lora})
    act(model)
    expected, whole = gradients(model)
    model.policy.micro_batch_tokens = 30
    read, original = [], model.policy.read_sequences

    def reading(lm, rows):
        read.append(rows)
        return original(lm, rows)

    monkeypatch.setattr(model.policy, "read_sequences", reading)
    found, parts = gradients(model)
    assert_same(found, expected)
    assert parts < whole / 10
    assert len(read) > 4
    assert len(read) % 2 == 0  # once for the numbers, once for the gradient
    assert max(len(x) * (x != -1).sum(axis=1).max() for x in read) <= 30


def test_the_graph_is_cut_where_it_would_be_too_large(monkeypatch):
    model = make("llama")
    act(model)
    expected, whole = gradients(model)
    monkeypatch.setattr("sb3_pg.text.graphs.GRAPH_BYTES", whole // 4)
    found, parts = gradients(model)
    assert_same(found, expected)
    assert parts < whole / 10
    (state,) = model.policy.graph_costs
    square, slope = model.policy.graph_costs[state]
    n_tokens = model.network.batch(model.rollout).observations.n_tokens
    assert whole / 2 < n_tokens * slope < whole * 1.5  # what it was taken for
    assert square < 0.01 * slope  # torch's fused attention


@pytest.mark.parametrize("algorithm", [PPO, TRPO, REINFORCE])
def test_an_update_in_parts_is_the_same_update(algorithm):
    found = []
    for tokens in (None, 20):
        task = letters_task()
        kwargs = {"model": config_of("llama", task), "micro_batch_tokens": tokens}
        options = {"n_episodes": 16} if algorithm is REINFORCE else {"n_steps": 12, "batch_size": 32}
        env = TextVecEnv(task, 8, 4, seed=3)
        model = silent(algorithm("CausalLMPolicy", env, seed=1, device="cpu", policy_kwargs=kwargs, **options))
        sharpen(model.policy)
        before = [p.detach().clone() for p in model.policy.parameters()]
        model.learn(1)
        found.append([p.detach() - q for p, q in zip(model.policy.parameters(), before, strict=True)])
    moved = max(float(x.abs().max()) for x in found[0])
    for x, y in zip(*found, strict=True):
        np.testing.assert_allclose(x, y, atol=0.01 * moved)


def test_a_gpu_gives_a_quarter_of_what_is_free(monkeypatch):
    """What torch has reserved and does not use is free too."""
    found = {"mem_get_info": (600, 1000), "memory_reserved": 300, "memory_allocated": 100}
    for name, value in found.items():
        monkeypatch.setattr(th.cuda, name, lambda _, value=value: value)
    assert graph_room(th.device("cuda", 0)) == 200
    assert graph_room(th.device("cpu")) == GRAPH_BYTES


class Layer(GradientCheckpointingLayer):
    """It only has to be one."""


class OldModel(th.nn.Module):
    """What transformers before 5.23 has."""

    supports_gradient_checkpointing = True

    def __init__(self):
        super().__init__()
        self.layer = Layer()

    def gradient_checkpointing_enable(self):
        self.layer.gradient_checkpointing = True


def test_gradient_checkpointing_by_its_former_name():
    model = OldModel()
    enable_checkpointing(model)
    assert checkpointed_layers(model) == [model.layer]


@pytest.mark.parametrize("lora", [None, {"r": 2}], ids=["full", "lora"])
@pytest.mark.parametrize("shape", SHAPES)
def test_gradient_checkpointing_has_an_effect_and_no_dropout(shape, lora):
    task = letters_task()
    dropout = {"gpt2": ("resid_pdrop", "embd_pdrop"), "llama": ("attention_dropout",), "t5": ("dropout_rate",)}[shape]
    config = config_of(shape, task, **dict.fromkeys(dropout, 0.5))
    model = make(shape, task=task, policy_kwargs={"model": config, "lora": lora})
    act(model)
    expected, whole = gradients(model)
    enable_checkpointing(model.policy.lm)
    found, less = gradients(model)
    assert_same(found, expected)
    assert less < whole / 2
    assert not any(module.training for module in model.policy.language_model.modules())
    log_probs, _ = act(model)  # with a cache
    np.testing.assert_allclose(log_probs, model.rollout_buffer.log_probs[:13], atol=1e-5)
    other = make(shape, policy_kwargs={"gradient_checkpointing": True, "lora": lora})
    assert checkpointed_layers(other.policy.lm)
    other.learn(52)


@pytest.mark.parametrize("algorithm, shape, lora", pairs([PPO, TRPO, REINFORCE], SHAPES, [None, {"r": 2}]))
def test_half_precision_trains(algorithm, shape, lora, tmp_path):
    options = {"n_episodes": 8} if algorithm is REINFORCE else {}
    model = make(shape, algorithm, policy_kwargs={**HALF, "lora": lora}, learning_rate=1e-5, **options)
    policy = model.policy
    assert all(p.dtype is th.float32 for p in policy.parameters() if p.requires_grad)
    still = [p for p in policy.language_model.parameters() if not p.requires_grad]
    assert all(p.dtype is th.bfloat16 for p in [*still, *(policy.reference.parameters() if lora is None else [])])
    before = {name: p.clone() for name, p in policy.named_parameters() if p.requires_grad}
    model.learn(2 * 52)
    moved = {name for name, p in policy.named_parameters() if p.requires_grad and not th.equal(p, before[name])}
    # Steps of 1e-5 would be lost in bfloat16
    assert len(moved) > 0.6 * len(before)
    assert all(s["exp_avg"].dtype is th.float32 for s in policy.optimizer.state.values())
    assert policy.hidden_states(model.env.task.observations()).dtype in (th.bfloat16, th.float32)
    assert model.predict(model.env.task.observations(), deterministic=True)[0].shape == (5,)
    assert policy.generate(model.env.task.observations()).shape == (5, 6)
    model.save(tmp_path / "model")
    loaded = algorithm.load(tmp_path / "model")
    assert loaded.policy.half_type is th.bfloat16
    rows, tokens = model.env.task.observations(), th.full((5,), 4)
    found, expected = (x.evaluate_actions(rows, tokens)[1].detach() for x in (loaded.policy, policy))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_half_precision_is_near_to_single(shape):
    models = [make(shape, policy_kwargs={**more, "temperature": 1.0}) for more in ({}, HALF)]
    models[1].policy.load_state_dict({**models[0].policy.state_dict(), **_reference(models[1].policy)})
    log_probs, _ = act(models[1])
    buffer = models[1].rollout_buffer
    found = buffer.log_probs[: buffer.pos]
    np.testing.assert_allclose(found, log_probs, atol=0.06)  # acting and judging
    batch = models[1].network.batch(models[1].rollout)
    _, expected, _ = models[0].policy.evaluate_actions(batch.observations, batch.actions)
    assert np.abs(found.ravel() - expected.detach().numpy()).mean() < 0.02
    assert not np.array_equal(found.ravel(), expected.detach().numpy())


def _reference(policy):
    return {name: x for name, x in policy.state_dict().items() if name.startswith("reference.")}


def test_the_reference_of_half_precision_is_the_model_as_it_was():
    model = make("llama", policy_kwargs=HALF)
    for p, q in zip(model.policy.language_model.parameters(), model.policy.reference.parameters(), strict=True):
        p.data.copy_(q)
    act(model)
    assert abs(model.logger.name_to_value["text/kl"]) < 0.01


def test_other_types_are_refused():
    for dtype in (th.float16, "float16"):
        with pytest.raises(ArgumentError, match=r"of type float16, in which training does not work .* torch.bfloat16"):
            make("gpt2", policy_kwargs={"model_kwargs": {"dtype": dtype}})


def test_trpo_keeps_no_logits(monkeypatch):
    """What it remembers of a batch are hidden states, and it looks at few logits at a time."""
    model = make("llama", TRPO)
    act(model)
    batch, policy = model.network.batch(model.rollout), model.policy
    actor = model.network.actor(batch)
    monkeypatch.setattr("sb3_pg.text.language_model.CHUNK_LOGITS", 66)
    monkeypatch.setattr("sb3_pg.text.engine.CHUNK_LOGITS", 66)
    seen, original = [], policy.logits
    monkeypatch.setattr(policy, "logits", lambda hidden, *a, **b: seen.append(len(hidden)) or original(hidden, *a, **b))
    start, old = actor.vector, policy.get_distribution(batch.observations).distribution
    seen.clear()
    assert not actor.old.kl.any()
    actor.vector = start + 0.05 * th.randn(len(start))
    look = actor.look()
    assert max(seen) <= 6
    now = policy.get_distribution(batch.observations).distribution
    expected = th.distributions.kl_divergence(old, now)
    assert expected.mean() > 0.01
    np.testing.assert_allclose(look.kl, expected.detach(), atol=1e-5)
    np.testing.assert_allclose(look.log_prob, now.log_prob(batch.actions).detach(), atol=1e-5)

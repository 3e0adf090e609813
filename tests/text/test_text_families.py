"""Which kinds of language models are seen alike by acting, judging and stepping, and which are refused."""

import numpy as np
import pytest
import torch as th
from text_models import letters_task

from sb3_pg.common.errors import ArgumentError
from sb3_pg.text.policies import CausalLMPolicy, Seq2SeqLMPolicy

BASE = {
    "vocab_size": 11,
    "eos_token_id": 1,
    "bos_token_id": None,
    "pad_token_id": 0,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}
OLD = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
HEAD = {"head_dim": 8}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}

FAMILIES = {
    "biogpt": {},
    "bloom": {"n_layer": 2, "n_head": 2},
    "ctrl": OLD,
    "deepseek_v3": {**LATENT, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 16},
    "ernie4_5": HEAD,
    "exaone4": HEAD,
    "falcon": {},
    "gemma": HEAD,
    "gemma2": {**HEAD, "final_logit_softcapping": None},
    "gemma3_text": {**HEAD, "sliding_window": 4},
    "glm": HEAD,
    "gpt2": OLD,
    "gpt_bigcode": OLD,
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]], "num_heads": 2, "window_size": 4},
    "gpt_neox": {},
    "gpt_oss": {**HEAD, "num_local_experts": 4, "num_experts_per_tok": 2},
    "gptj": {**OLD, "rotary_dim": 4},
    "helium": HEAD,
    "llama": {},
    "mistral": {**HEAD, "sliding_window": 4},
    "mixtral": {"num_local_experts": 4},
    "mpt": {"d_model": 16, "n_heads": 2, "n_layers": 2, "max_seq_len": 64},
    "nemotron": HEAD,
    "olmo2": {},
    "opt": {"ffn_dim": 24, "word_embed_proj_dim": 16},
    "phi": {},
    "phi3": {},
    "qwen2": {},
    "qwen3": HEAD,
    "qwen3_moe": {**HEAD, **EXPERTS},
    "smollm3": HEAD,
    "stablelm": {},
    "starcoder2": {},
    "xglm": {"d_model": 16, "ffn_dim": 24, "num_layers": 2, "attention_heads": 2},
}
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}


def policy_of(kind, **config):
    task = letters_task()
    policy = Seq2SeqLMPolicy if kind in ("t5", "mt5", "umt5") else CausalLMPolicy
    spaces = task.observation_space, task.action_space
    more = {"dtype": config.pop("dtype", th.float32)}
    model = {**BASE, "model_type": kind, **config}
    return policy(*spaces, lambda _: 1e-3, model=model, model_kwargs=more, reference_kl_coef=None)


def plain_log_probs(policy, rows, actions):
    """One row at a time by the model's own forward."""
    found = []
    for row, action in zip(rows, actions, strict=True):
        tokens = th.as_tensor(row[row >= 0])[None].long()
        with th.no_grad(), policy.precision():
            found.append(th.log_softmax(policy.lm(input_ids=tokens).logits[0, -1].float(), dim=-1)[action])
    return th.stack(found).numpy()


@pytest.mark.parametrize("kind", FAMILIES)
def test_log_probabilities_are_those_of_the_plain_model(kind):
    rng, task = np.random.default_rng(0), letters_task()
    rows = np.repeat(task.observations(), 2, axis=0)
    for row, length in zip(rows, rng.integers(0, 6, len(rows)), strict=True):
        row[task.width : task.width + length] = rng.integers(2, 11, length)
    actions = rng.integers(0, 11, len(rows))
    for dtype, tolerance in ((th.float32, 1e-5), (th.bfloat16, 0.08)):
        th.manual_seed(0)
        policy = policy_of(kind, dtype=dtype, **FAMILIES[kind])
        with th.no_grad():
            _, log_prob, _ = policy.evaluate_actions(rows, th.as_tensor(actions))
            acted, _ = policy.token_statistics(policy._decoder.read(rows), th.as_tensor(actions))
        assert log_prob.std() > 0.1
        expected = plain_log_probs(policy, rows, actions)
        np.testing.assert_allclose(log_prob, expected, atol=tolerance, err_msg=str(dtype))
        np.testing.assert_allclose(acted, expected, atol=tolerance, err_msg=str(dtype))


NO_CACHE = {
    "falcon_h1": {**HEAD, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 4},
    "jamba": {"num_experts": 2},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "mamba": {"state_size": 4},
    "mamba2": {"state_size": 4, "num_heads": 4, "head_dim": 8, "n_groups": 1},
    "openai-gpt": OLD,
    "qwen3_next": HEAD,
    "rwkv": {"attention_hidden_size": 16},
}


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("kind", NO_CACHE)
def test_models_without_a_usual_cache_are_refused_by_name(kind, half):
    with pytest.raises(ArgumentError, match=f"Models of type '{kind}' are not supported: .* key/value cache"):
        policy_of(kind, dtype=th.bfloat16 if half else th.float32, **{"initializer_range": 0.02, **NO_CACHE[kind]})


CHANGED = {
    "cohere": {"logit_scale": 0.0625},
    "granite": {"logits_scaling": 8.0},
    "gemma2": {**HEAD, "final_logit_softcapping": 30.0},  # of an untrained model capping does not show by itself
    "recurrent_gemma": HEAD,
}


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("kind", CHANGED)
def test_models_that_change_their_logits_are_refused_by_name(kind, half):
    with pytest.raises(ArgumentError, match=f"Models of type '{kind}' are not supported: their logits are not just"):
        policy_of(kind, dtype=th.bfloat16 if half else th.float32, **CHANGED[kind])


LONG = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "factor": 4.0}


def test_positions_that_change_with_the_length_of_a_text(monkeypatch):
    def differs(longest):
        """Whether a text of 7 tokens is seen differently next to one of 10."""
        policy = policy_of("phi3", rope_parameters=dict(LONG), original_max_position_embeddings=longest)
        rows = np.repeat(letters_task().observations([3]), 2, axis=0)
        rows[:, 4:] = 3, 4, 5, 6, 7, 8
        rows[1, 7:] = -1
        with th.no_grad():
            return float((policy.hidden_states(rows)[1:] - policy.hidden_states(rows[1:])).abs().max())

    assert differs(10) < 1e-5
    message = r"may take 10 tokens \(4 and 6\), but with more than 9 the model's 'longrope' .* Shorten one of them"
    with pytest.raises(ArgumentError, match=message) as error:
        differs(9)
    assert "\n" not in str(error.value)
    with monkeypatch.context() as unchecked:
        unchecked.setattr("sb3_pg.text.checks._short_window", lambda config: None)
        assert differs(9) > 0.01

    def of_a_type_of_layer(longest):
        usual, long = {"rope_type": "default", "rope_theta": 1e4}, {**LONG, "original_max_position_embeddings": longest}
        layers = {"sliding_attention": usual, "full_attention": long}
        policy_of("gemma3_text", rope_parameters=layers, layer_types=list(layers), sliding_window=4, **HEAD)

    of_a_type_of_layer(10)
    with pytest.raises(ArgumentError, match="with more than 9 the model's"):
        of_a_type_of_layer(9)


@pytest.mark.parametrize("dtype", [th.float32, th.bfloat16])
def test_looking_at_a_model_does_not_change_it(dtype, monkeypatch):
    found = []
    for check in (None, lambda policy: policy.language_model.eval()):
        if check is not None:
            monkeypatch.setattr("sb3_pg.text.language_model.check_reading", check)
        th.manual_seed(0)
        policy = policy_of("llama", dtype=dtype, tie_word_embeddings=True)
        found.append(list(policy.language_model.state_dict().values()))
    for x, y in zip(*found, strict=True):
        assert th.equal(x, y)


@pytest.mark.parametrize("kind", ["t5", "mt5", "umt5"])
def test_encoders_with_decoders(kind):
    policy_of(kind, **T5, tie_word_embeddings=kind == "t5")

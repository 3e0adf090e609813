"""Settings of generate, and a policy's options: what transformers' users try works, or is refused in one line."""

import numpy as np
import pytest
import torch as th
from peft import LoraConfig
from test_text_wrong_kinds import refused
from text_models import SHAPES, config_of, letters_task, make
from transformers import GenerationConfig, LlamaConfig

from sb3_pg.text import TextEvalCallback, best_of_n, evaluate_texts
from sb3_pg.text.settings import checked_settings


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"tempereture": 1.0}, "`generate` has no setting 'tempereture'. Did you mean 'temperature'?"),
        ({"seed": 3}, "`generate` has no setting 'seed'"),
        ({"input_ids": None}, "`generate` has no setting 'input_ids'"),
        ({"_from_model_config": True}, "`generate` has no setting '_from_model_config'"),
        ({"max_length": 20}, r"does not take 'max_length': it counts the prompt, too. Pass max_new_tokens"),
        ({"return_dict_in_generate": True}, "does not take 'return_dict_in_generate'"),
        (
            {"temperature": 0, "do_sample": True},
            r"`temperature` must be > 0 to sample, not 0. Greedy is do_sample=False",
        ),
        ({"temperature": -1}, "`temperature` must be a finite number >= 0, not -1"),
        ({"top_p": 1.5, "do_sample": True}, "`top_p` must be a finite number >= 0 and <= 1, not 1.5"),
        ({"min_p": -0.5, "do_sample": True}, "`min_p` must be a finite number >= 0 and <= 1"),
        ({"top_k": -3, "do_sample": True}, "`top_k` must be a whole number >= 0, not -3"),
        ({"max_new_tokens": 0}, "`max_new_tokens` must be a whole number >= 1, not 0"),
        ({"max_new_tokens": "a"}, "`max_new_tokens` must be a whole number >= 1, not 'a'"),
        ({"num_beams": 0}, "`num_beams` must be a whole number >= 1, not 0"),
        ({"num_return_sequences": 0, "do_sample": True}, "`num_return_sequences` must be a whole number >= 1"),
        ({"num_return_sequences": 3}, r"`num_return_sequences=3` needs different responses: pass do_sample=True"),
        ({"num_return_sequences": 3, "num_beams": 2}, "needs different responses"),
        ({"repetition_penalty": 0}, "`repetition_penalty` must be a finite number > 0, not 0"),
        ({"eos_token_id": "c"}, "`eos_token_id` must be numbers of tokens, 0 to 10, not 'c'"),
        ({"eos_token_id": [1, 11]}, r"`eos_token_id` must be numbers of tokens, 0 to 10, not \[1, 11\]"),
        ({"generation_config": {"top_k": 3}}, "`generation_config` must be a GenerationConfig, not"),
    ],
)
def test_settings_that_cannot_work(settings, message):
    policy = make("gpt2").policy
    refused(message, policy.generate, ["a"], **settings)
    refused(message, policy.generate, letters_task().observations(), **settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0},  # greedy anyway
        {"top_p": 0, "do_sample": True},  # only the likeliest
        {"top_k": 1, "do_sample": True},
        {"num_beams": 1, "num_return_sequences": None, "max_new_tokens": None, "stop_strings": None},
        {"max_length": None, "return_dict_in_generate": False, "output_scores": True},
        {"min_new_tokens": 0, "use_cache": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", SHAPES)
def test_settings_that_are_greedy(shape, settings):
    policy = make(shape).policy
    assert policy.generate(["a b", "c"], **settings) == policy.generate(["a b", "c"])


def test_a_generation_config_is_taken_for_what_it_has():
    policy = make("gpt2").policy
    config = GenerationConfig(max_new_tokens=2, num_beams=3, num_return_sequences=2, max_length=50, eos_token_id=1)
    expected = policy.generate(["a b"], max_new_tokens=2, num_beams=3, num_return_sequences=2)
    assert policy.generate(["a b"], generation_config=config) == expected
    assert max(len(text.split()) for text in expected) == 2
    assert len(policy.generate(["a b"], generation_config=config, num_return_sequences=1)) == 1


def test_rows_take_fewer_tokens_but_not_more():
    policy, rows = make("gpt2").policy, letters_task().observations()
    whole = policy.generate(rows)
    assert np.array_equal(policy.generate(rows, max_new_tokens=100), whole)
    fewer = policy.generate(rows, max_new_tokens=2)
    assert np.array_equal(fewer[:, :2], whole[:, :2]) and (fewer[:, 2:] == -1).all()
    assert policy.generate(rows[:0]).shape == (0, 6)


@pytest.mark.parametrize("prompts", [None, 3, [None], [["a"]], [[]], [[1], [1, 2]], np.ones((1, 3)), np.ones(3, int)])
def test_prompts_that_are_none(prompts):
    refused("`prompts` must be", make("gpt2").policy.generate, prompts)


def test_evaluation_checks_settings_before_training():
    task, policy = letters_task(), make("gpt2").policy
    refused("`settings` must be a dictionary", TextEvalCallback, task, settings=["a"])
    refused("no setting 'tempereture'", TextEvalCallback, task, settings={"tempereture": 1.0})
    refused("`temperature` must be > 0 to sample", TextEvalCallback, task, settings={"temperature": 0})
    refused("`temperature` must be > 0 to sample", evaluate_texts, policy, task, temperature=0)
    refused("needs different responses", best_of_n, policy, ["a"], task.reward, do_sample=False)
    TextEvalCallback(task, settings={"num_return_sequences": 2})
    assert checked_settings({"do_sample": True}) == {"do_sample": True}
    config = GenerationConfig(do_sample=True, num_return_sequences=2, top_k=3)
    assert len(evaluate_texts(policy, task, generation_config=config)[1]) == 2 * len(task.prompts)


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"lora": 8}, r"`lora` must be a dictionary of options, such as \{'r': 8\}, not 8"),
        ({"lora": LoraConfig(r=2)}, "`lora` must be a dictionary .* not a LoraConfig: pass its arguments"),
        ({"lora": {"rank": 2}}, "`lora` {'rank': 2} cannot be used: .*unexpected keyword argument 'rank'"),
        ({"lora": {"r": 0}}, "`lora` {'r': 0} cannot be used: `r` should be a positive integer"),
        ({"lora": {"target_modules": ["nothing"]}}, "cannot be used: Target modules {'nothing'} not found"),
        ({"model_kwargs": ["x"]}, "`model_kwargs` must be a dictionary of options"),
        ({"model_kwargs": {"torch_dtype": th.bfloat16}}, "`model_kwargs` has 'torch_dtype', which .* 'dtype' now"),
        ({"model": LlamaConfig()}, r"`model` is a LlamaConfig: pass it as a dictionary, config\.to_dict\(\)"),
    ],
    ids=str,
)
def test_options_of_a_policy_that_cannot_work(kwargs, message):
    refused(message, make, "gpt2", policy_kwargs={"model": config_of("gpt2", letters_task()), **kwargs})


def test_half_precision_with_an_adapter(tmp_path):
    make("llama").policy.save_pretrained(tmp_path)
    model = make(
        "llama", policy_kwargs={"model": str(tmp_path), "lora": {"r": 2}, "model_kwargs": {"dtype": "bfloat16"}}
    )
    model.learn(60)
    assert model.policy.half_type is th.bfloat16
    assert len(model.policy.generate(["a", "b"], num_beams=2, num_return_sequences=2)) == 4


@pytest.mark.parametrize("end", [4.7, True, None, 11, -1, "z", [4]])
def test_end_tokens_are_tokens(end):
    refused(r"`end_tokens` has .*, which is not a token of the tokenizer", letters_task, end_tokens=[end])
    assert letters_task(end_tokens=[np.int64(4), "c"]).ends.tokens == (1, 4, 5)


@pytest.mark.parametrize("ends", [None, 5, {"<end>"}])
def test_end_tokens_are_a_list(ends):
    refused("`end_tokens` must be a list of tokens, not ", letters_task, end_tokens=ends)

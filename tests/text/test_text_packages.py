"""Missing packages of the extra are named, with what to install."""

import sys

import pytest
from text_models import config_of, letters_task

from sb3_pg import PPO
from sb3_pg.text import CausalLMPolicy, Seq2SeqLMPolicy, TextVecEnv
from sb3_pg.text.language_model import LanguageModelPolicy
from sb3_pg.text.metrics import bleu, chrf, rouge, self_bleu
from sb3_pg.text.packages import package
from sb3_pg.text.tasks import sentence_chrf

TEXTS = ["a b c", "d e f"]
USES = {
    "sacrebleu": [
        lambda: bleu(TEXTS, TEXTS),
        lambda: chrf(TEXTS, TEXTS),
        lambda: self_bleu(TEXTS),
        lambda: sentence_chrf(TEXTS, TEXTS, TEXTS),
    ],
    "rouge_score": [lambda: rouge("rougeL")(TEXTS, TEXTS)],
    "num2words": [lambda: package("num2words")],
    "vaderSentiment": [lambda: package("vaderSentiment.vaderSentiment")],
}


@pytest.mark.parametrize("name", USES)
def test_a_missing_package(name, monkeypatch):
    for module in [name, *(module for module in sys.modules if module.startswith(f"{name}."))]:
        monkeypatch.setitem(sys.modules, module, None)
    for use in USES[name]:
        with pytest.raises(ModuleNotFoundError, match=rf"{name} is not installed: pip install 'sb3_pg\[text\]'"):
            use()


def test_adapters_without_peft(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    task = letters_task()
    with pytest.raises(ModuleNotFoundError, match="peft is not installed"):
        PPO("CausalLMPolicy", TextVecEnv(task, 4), policy_kwargs={"model": config_of("gpt2", task), "lora": {"r": 2}})


@pytest.mark.parametrize("policy", [CausalLMPolicy, Seq2SeqLMPolicy])
def test_help_describes_the_arguments(policy):
    for name in ("model", "lora", "reference_kl_coef", "temperature"):
        assert f":param {name}: " in policy.__doc__
        (described,) = [line for line in LanguageModelPolicy.__doc__.splitlines() if f":param {name}:" in line]
        assert described.strip() in policy.__doc__

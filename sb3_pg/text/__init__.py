"""Language models as policies: text environments, policies, metrics, tasks. Needs the extra ``text``.

Nothing is imported before it is asked for, since transformers takes seconds.
"""

from importlib import import_module
from typing import Any

import gymnasium as gym

_HOMES = {
    "CausalLMPolicy": "policies",
    "ChatEnv": "conversation",
    "ClassifierReward": "classifier",
    "Reply": "conversation",
    "Seq2SeqLMPolicy": "policies",
    "TextEnv": "environment",
    "TextEvalCallback": "evaluation",
    "TextTask": "environment",
    "TextVecEnv": "environment",
    "best_of_n": "evaluation",
    "evaluate_texts": "evaluation",
    "word_tokenizer": "tokenizers",
}

__all__ = [  # found by __getattr__
    "CausalLMPolicy",
    "ChatEnv",
    "ClassifierReward",
    "Reply",
    "Seq2SeqLMPolicy",
    "TextEnv",
    "TextEvalCallback",
    "TextTask",
    "TextVecEnv",
    "best_of_n",
    "evaluate_texts",
    "word_tokenizer",
]

for _name in ("GuessingGame", "Calculator"):
    if f"{_name}-v0" not in gym.registry:
        gym.register(f"{_name}-v0", entry_point=f"sb3_pg.text.games:{_name}")
for _id, _task in (
    ("QuestionAnswering", "question_answering"),
    ("Translation", "translation"),
    ("Sentiment", "sentiment"),
):
    if f"{_id}-v0" not in gym.registry:
        gym.register(f"{_id}-v0", entry_point="sb3_pg.text.tasks:make_env", kwargs={"task": _task})


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)

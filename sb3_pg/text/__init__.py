"""Language models as policies: text environments, policies, metrics, tasks. Needs the extra ``text``.

Nothing is imported before it is asked for, since transformers takes seconds.
"""

from importlib import import_module
from typing import Any

_HOMES = {
    "CausalLMPolicy": "policies",
    "Seq2SeqLMPolicy": "policies",
    "TextEnv": "environment",
    "TextTask": "environment",
    "TextVecEnv": "environment",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)

"""Settings of transformers' ``generate``, checked before it is asked."""

from collections.abc import Mapping
from typing import Any

from transformers import GenerationConfig

from sb3_pg.common.errors import ArgumentError, check_count, check_number, did_you_mean

#: What ``generate`` takes besides what a GenerationConfig has.
_MORE = (
    "assistant_model",
    "assistant_tokenizer",
    "custom_generate",
    "generation_config",
    "logits_processor",
    "prefix_allowed_tokens_fn",
    "stopping_criteria",
    "streamer",
    "synced_gpus",
    "tokenizer",
    "trust_remote_code",
)

#: What is not for a policy, and why.
_OTHERS = {
    "max_length": "it counts the prompt, too. Pass max_new_tokens",
    "return_dict_in_generate": "texts are returned for texts, and rows of tokens for rows. Leave it out",
    "transformers_version": "it is no setting. Leave it out",
}

#: The smallest values of whole numbers.
_COUNTS = {"max_new_tokens": 1, "min_new_tokens": 0, "num_beams": 1, "num_return_sequences": 1, "top_k": 0}


#: Where None means what holds by default, and transformers takes no None.
_NEVER_NONE = ("eos_token_id", "max_new_tokens", "num_beams", "num_return_sequences")


def checked_settings(settings: Any, **defaults: Any) -> dict[str, Any]:
    """Return settings for a policy, those of a ``generation_config`` among them in its place.

    :param defaults: of settings that neither has
    :raises ArgumentError: there is none of that name, it is not for policies, or its value cannot work
    """
    if not isinstance(settings, Mapping):
        raise ArgumentError(f"`settings` must be a dictionary of settings of generate, not {settings!r}.")
    settings = {**defaults, **_with_config(dict(settings))}
    known = [name for name in (*vars(GenerationConfig()), *_MORE) if not name.startswith("_")]  # type: ignore[no-untyped-call]
    for name, value in settings.items():
        if name not in known:
            raise ArgumentError(f"`generate` has no setting {name!r}.{did_you_mean(name, known)}")
        if name in _OTHERS and value not in (None, False):
            raise ArgumentError(f"`generate` of a policy does not take {name!r}: {_OTHERS[name]}.")
    _check_values({name: value for name, value in settings.items() if value is not None})
    return {name: value for name, value in settings.items() if value is not None or name not in _NEVER_NONE}


def _with_config(settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings in which a ``generation_config`` is replaced by what it has."""
    config = settings.pop("generation_config", None)
    if not isinstance(config, GenerationConfig | None):
        raise ArgumentError(f"`generation_config` must be a GenerationConfig, not {config!r}.")
    own = {} if config is None else config.to_diff_dict()
    return {**{name: x for name, x in own.items() if name not in _OTHERS and not name.startswith("_")}, **settings}


def _check_values(settings: dict[str, Any]) -> None:
    for name, low in _COUNTS.items():
        if name in settings:
            check_count(name, settings[name], low)
    for name in ("top_p", "min_p"):
        if name in settings:
            check_number(name, settings[name], high=1.0)
    if "repetition_penalty" in settings:
        check_number("repetition_penalty", settings["repetition_penalty"], above_low=True)
    temperature, samples = settings.get("temperature", 1.0), settings.get("do_sample", False)
    check_number("temperature", temperature)
    if samples and not temperature:
        raise ArgumentError(f"`temperature` must be > 0 to sample, not {temperature!r}. Greedy is do_sample=False.")
    n, n_beams = settings.get("num_return_sequences", 1), settings.get("num_beams", 1)
    if not samples and n > n_beams:
        raise ArgumentError(
            f"`num_return_sequences={n}` needs different responses: pass do_sample=True, or num_beams={n} (or more)."
        )

"""Models of transformers, made or loaded as the policy's arguments say."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from transformers import AutoConfig, PreTrainedConfig

from sb3_pg.common.errors import ArgumentError
from sb3_pg.text.base import Base, read_base
from sb3_pg.text.packages import package


def check_options(name: str, given: Any, example: str) -> None:
    """Refuse options that are no dictionary, and those that would be passed over.

    :raises ArgumentError: says what to pass
    """
    if not isinstance(given, Mapping | None):
        is_peft = type(given).__module__.startswith("peft")
        its = f"a {type(given).__name__}: pass its arguments" if is_peft else repr(given)
        raise ArgumentError(f"`{name}` must be a dictionary of options, such as {example}, not {its}.")
    if "torch_dtype" in (given or {}):
        raise ArgumentError(f"`{name}` has 'torch_dtype', which transformers calls 'dtype' now. Pass that.")


def make_model(auto_model: Any, model: Any, model_kwargs: Mapping[str, Any], base: Base | None = None) -> Any:
    """Return a model of transformers.

    :param auto_model: transformers' class that makes it
    :param model: folder or name of a pretrained one, or the configuration of a new one
    :param model_kwargs: of ``from_pretrained``
    :param base: whose weights a model of this configuration has; None for new ones
    :raises ArgumentError: it cannot be made
    """
    if isinstance(model, th.nn.Module):
        raise ArgumentError(
            f"`model` must be a folder, a name or a configuration (dictionary), not a live {type(model).__name__}, "
            "which could not be saved with the policy's arguments. Use model.save_pretrained(folder)."
        )
    if isinstance(model, str | Path):
        return _not_quantised(auto_model, _loaded(auto_model, model, model_kwargs))
    if isinstance(model, PreTrainedConfig):
        raise ArgumentError(f"`model` is a {type(model).__name__}: pass it as a dictionary, config.to_dict().")
    if not isinstance(model, Mapping) or "model_type" not in model:
        raise ArgumentError(f"`model` as a dictionary needs a 'model_type', such as 'gpt2' or 't5'; got {model!r}.")
    try:
        config = config_of(model)
        if base is not None:
            return read_base(auto_model, config, base)
        return auto_model.from_config(config, **{"dtype": config.dtype or th.float32, **model_kwargs})
    except ArgumentError:
        raise
    except Exception as error:
        raise ArgumentError(
            f"`model` of type {model['model_type']!r} cannot be made of its configuration: {_first_line(error)}"
        ) from error


def _not_quantised(auto_model: Any, model: Any) -> Any:
    """Return a model that can be trained and saved.

    From GGUF: the weights are ordinary numbers by now, but the model still counts as quantised. A fresh one with the
    same weights does not.
    """
    if getattr(model.config, "quantization_config", None) is None:
        return model
    del model.config.quantization_config
    fresh = auto_model.from_config(model.config, dtype=model.dtype)
    fresh.load_state_dict(model.state_dict())
    return fresh


def _loaded(auto_model: Any, model: str | Path, model_kwargs: Mapping[str, Any]) -> Any:
    """Load a model from a folder, or by its name.

    :raises ArgumentError: it cannot be had
    """
    folder = Path(model)
    looks_like_one = isinstance(model, Path) or folder.is_absolute() or model.startswith(("./", "../", "~"))
    if looks_like_one and not folder.is_dir():
        raise ArgumentError(f"`model` is {str(model)!r}, but there is no such folder.")
    try:
        options = {"dtype": th.float32, **model_kwargs}
        lm = auto_model.from_pretrained(model, **options)
        return _merged(auto_model, lm, model, options) if lm._hf_peft_config_loaded else lm
    except ModuleNotFoundError as error:  # of peft, where the folder holds an adapter
        raise ModuleNotFoundError(
            f"`model` {str(model)!r} needs {error.name}: pip install 'sb3_pg[text]'", name=error.name
        ) from error
    except Exception as error:
        raise ArgumentError(
            f"`model` {str(model)!r} cannot be loaded: {_first_line(error)} It must be a folder with a model, as "
            "save_pretrained writes it, or the name of one that transformers finds."
        ) from error


def _merged(auto_model: Any, adapted: Any, folder: str | Path, options: Mapping[str, Any]) -> Any:
    """Return the base of an adapter with the adapter in its weights, which can all be trained.

    :param adapted: what transformers makes of the folder, all of it frozen and with layers of peft
    :param folder: of the adapter
    """
    (config,) = adapted.peft_config.values()
    base = auto_model.from_pretrained(config.base_model_name_or_path, **options)
    return package("peft").PeftModel.from_pretrained(base, folder).merge_and_unload().requires_grad_(True)


def config_of(model: Mapping[str, Any]) -> Any:
    """Return transformers' configuration of a dictionary."""
    # `env.action_space.n` is a NumPy number, which transformers refuses.
    return AutoConfig.for_model(**{name: x.item() if isinstance(x, np.generic) else x for name, x in model.items()})


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(".") + "."


def freeze(lm: Any, n_layers: int) -> None:
    """Keep the token embeddings and the lowest layers of each stack as they are.

    :raises ArgumentError: the model has fewer layers
    """
    stacks = [
        module
        for module in lm.modules()
        if isinstance(module, th.nn.ModuleList) and len(module) and _is_layer(module[0])
    ]
    depth = min((len(stack) for stack in stacks), default=0)
    if n_layers > depth:
        raise ArgumentError(f"`frozen_layers={n_layers}`, but the model has {depth} layers.")
    lm.get_input_embeddings().requires_grad_(False)
    for stack in stacks:
        for layer in stack[:n_layers]:
            layer.requires_grad_(False)


def _is_layer(module: th.nn.Module) -> bool:
    from transformers.modeling_layers import GradientCheckpointingLayer

    return isinstance(module, GradientCheckpointingLayer)


def with_adapter(lm: Any, lora: Mapping[str, Any]) -> Any:
    """Return the model with low-rank adapters in it, the only part that is trained.

    :raises ArgumentError: peft does not take these options, or finds no place for them in the model
    """
    peft = package("peft")
    if lora.get("trainable_token_indices") is not None and lm.config.tie_word_embeddings:
        raise ArgumentError(
            f"`lora` {dict(lora)!r} cannot be used: the head of the model is tied to its embeddings, and what "
            "peft puts into its place for `trainable_token_indices` is no layer. Leave them out."
        )
    try:
        return peft.get_peft_model(lm, peft.LoraConfig(**lora))
    except Exception as error:  # of all kinds
        raise ArgumentError(f"`lora` {dict(lora)!r} cannot be used: {_first_line(error)}") from error

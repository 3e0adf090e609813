"""The pretrained model that an archive names instead of holding its weights.

Those weights are data: only safetensors are read, only where they are already on this machine, into a model of the
configuration that the archive holds, and what is read must be what the archive was saved with. So this needs no trust.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch as th
from transformers.utils.peft_utils import find_adapter_config_file

from sb3_pg.common.errors import ArgumentError

#: In names of configurations: of code that transformers and peft would import or download.
_FROM_ELSEWHERE = ("auto_map", "implementation", "kernel", "megatron", "quantization", "remote")

#: What an archive says of a base.
_OF_BASE = {"name": str, "fingerprint": str}

#: Ways in which LoRA begins (peft's ``init_lora_weights``) that leave the weights of the base as they are.
BEGINNINGS = (True, False, "gaussian", None)


@dataclass(frozen=True)
class Base:
    """Where a pretrained model is, and which one.

    :param name: folder, or name on the Hugging Face Hub
    :param fingerprint: of its weights
    """

    name: str
    fingerprint: str


def from_elsewhere(policy_kwargs: Mapping[str, Any]) -> str | None:
    """Return which of a policy's arguments would load a model, or code, from elsewhere; None if none would."""
    model, lora = policy_kwargs.get("model"), policy_kwargs.get("lora") or {}
    if policy_kwargs.get("model_kwargs") or not isinstance(model, dict | None):
        return f"the model would be loaded from elsewhere ({model!r}, {policy_kwargs.get('model_kwargs')!r})"
    base = policy_kwargs.get("base") or {"name": "", "fingerprint": ""}
    if not isinstance(base, dict) or {name: type(x) for name, x in base.items()} != _OF_BASE:
        return f"its base model would be {base!r}"
    for name in [*_keys(model), *_keys(lora)]:
        if any(part in name for part in _FROM_ELSEWHERE):
            return f"the model's configuration has {name!r}, which may run code from elsewhere"
    return None


def _keys(configuration: Any) -> Iterator[str]:
    """Yield all keys of dictionaries within dictionaries."""
    for key, value in configuration.items() if isinstance(configuration, dict) else ():
        yield str(key)
        yield from _keys(value)


def can_be_named(model: Any, model_kwargs: Any, lora: Any) -> bool:
    """Return whether a model is just what a folder or name stands for, and stays so under an adapter."""
    if not isinstance(model, str | Path) or find_adapter_config_file(str(model), local_files_only=True) is not None:
        return False
    return set(model_kwargs or {}) <= {"dtype"} and (lora or {}).get("init_lora_weights", True) in BEGINNINGS


def name_of(model: str | Path) -> str:
    """Return what to call a model in an archive: its folder from the root on, or its name on the Hub."""
    return str(Path(model).resolve() if Path(model).is_dir() else model)


@th.no_grad()
def fingerprint(parameters: Iterable[tuple[str, th.Tensor]]) -> str:
    """Return what tells named weights from others, whatever device they are on."""
    found = hashlib.blake2b(digest_size=16)
    for name, p in sorted(parameters, key=lambda pair: pair[0]):
        found.update(f"{name}{p.dtype}{tuple(p.shape)}".encode())
        found.update(p.detach().cpu().contiguous().reshape(-1).view(th.uint8).numpy().data)
    return found.hexdigest()


def folder_of(name: str) -> Path:
    """Return the folder of a model that is on this machine.

    :raises ArgumentError: it is not, or it is no plain model
    """
    folder = Path(name)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        try:
            folder = Path(snapshot_download(name, local_files_only=True))
        except Exception as error:  # neither a folder nor in the cache
            raise ArgumentError(
                f"The archive needs its base model {name!r}, which is not on this machine. Put it there (`hf download` "
                "has those of the Hub), or pass custom_objects={'policy_kwargs': {'model': FOLDER, ...}}."
            ) from error
    if (folder / "adapter_config.json").exists() or not any(folder.glob("*.safetensors")):
        raise ArgumentError(f"The archive's base model {name!r} must be a folder with a model in safetensors.")
    return folder


def n_bytes(name: str) -> int:
    """Return the size of a model's weights.

    :raises ArgumentError: as :func:`folder_of`
    """
    return sum(path.stat().st_size for path in folder_of(name).glob("*.safetensors"))


def read_base(auto_model: Any, config: Any, base: Base) -> Any:
    """Return the model of a configuration with the weights of a base.

    :raises ArgumentError: there is none, or it does not fit
    """
    folder, options = folder_of(base.name), {"use_safetensors": True, "local_files_only": True}
    try:
        return auto_model.from_pretrained(
            folder, config=config, dtype=config.dtype or th.float32, trust_remote_code=False, **options
        )
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ArgumentError(f"The archive's base model {base.name!r} cannot be read: {reason}") from error


def require_same(base: Base, parameters: Iterable[tuple[str, th.Tensor]]) -> None:
    """Refuse weights that are not those of the base.

    :raises ArgumentError: they are not
    """
    if fingerprint(parameters) != base.fingerprint:
        raise ArgumentError(
            f"The base model {base.name!r} is not the one that the archive was saved with: its weights differ. Put "
            "that one there."
        )

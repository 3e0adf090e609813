"""What the graph of a language model takes in memory, and how to have less of it."""

import ctypes
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch as th
from transformers.modeling_layers import GradientCheckpointingLayer

from sb3_pg.common.errors import ArgumentError

if TYPE_CHECKING:
    from sb3_pg.text.language_model import LanguageModelPolicy

#: Bytes of activations that are kept for a gradient at once, about, on a CPU, which is not faster with more.
GRAPH_BYTES = 1 << 31

#: Lengths of the sequences by which memory is measured.
_MEASURED = (8, 16, 32)


def graph_bytes(policy: "LanguageModelPolicy", lm: Any, length: int) -> float:
    """Return about how many bytes the graph of one sequence of so many tokens holds.

    A polynomial, since attention may take the square of the length, through what three short sequences take.
    """
    state = lm.config._attn_implementation, len(checkpointed_layers(lm))
    if state not in policy.graph_costs:
        square, slope, _ = np.polyfit(_MEASURED, [_measured(policy, lm, n) for n in _MEASURED], 2)
        policy.graph_costs[state] = max(float(square), 0.0), max(float(slope), 1.0)
    square, slope = policy.graph_costs[state]
    return length * slope + length**2 * square


def graph_room(device: th.device) -> int:
    """Return about how many bytes of activations may be kept for a gradient at once.

    On a GPU, which is faster the more it is given at a time, a quarter of the memory that is free: ``graph_bytes`` is
    too low by up to a third, and another process may use the same GPU.
    """
    if device.type != "cuda":
        return GRAPH_BYTES
    free, _ = th.cuda.mem_get_info(device)
    return (free + th.cuda.memory_reserved(device) - th.cuda.memory_allocated(device)) // 4


def _measured(policy: "LanguageModelPolicy", lm: Any, n: int) -> int:
    """Return the bytes that torch saves to differentiate the reading of n tokens, parameters not included."""
    width = policy.observation_space.shape[0]  # type: ignore[index]
    rows = np.zeros((1, max(width, policy.prompt_length + n)), dtype=int)
    rows[:, : policy.prompt_length - 1] = -1
    rows[:, policy.prompt_length + n - 1 :] = -1
    saved: dict[int, int] = {}

    def note(x: th.Tensor) -> th.Tensor:
        storage = x.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return x

    noting = th.autograd.graph.saved_tensors_hooks(note, lambda x: x)
    with th.enable_grad(), policy.precision(), checkpointing(lm), noting:
        policy.read_sequences(lm, rows)
    own = {p.untyped_storage().data_ptr() for p in lm.parameters()}
    return sum(size for place, size in saved.items() if place not in own)


@contextmanager
def checkpointing(lm: Any) -> Iterator[None]:
    """Let the layers that are to checkpoint do so in the block, though the model is in evaluation mode.

    Transformers' layers do it in training mode only, in which there would be dropout. So a layer is in that mode until
    it has decided.
    """
    layers = checkpointed_layers(lm) if th.is_grad_enabled() else []
    own = [layer._gradient_checkpointing_func for layer in layers]
    for layer, checkpoint in zip(layers, own, strict=True):
        layer.training, layer._gradient_checkpointing_func = True, _without_dropout(layer, checkpoint)
    try:
        yield
    finally:
        for layer, checkpoint in zip(layers, own, strict=True):
            layer.training, layer._gradient_checkpointing_func = False, checkpoint


def checkpointed_layers(lm: Any) -> list[Any]:
    """Return the layers that keep only what goes into them for the gradient."""
    return [x for x in lm.modules() if isinstance(x, GradientCheckpointingLayer) and x.gradient_checkpointing]


def _without_dropout(layer: Any, checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    def run(forward: Any, *args: Any) -> Any:
        layer.training = False
        return checkpoint(forward, *args)

    return run


def enable_checkpointing(lm: Any) -> None:
    """Let the model's layers keep only what goes into them for the gradient.

    :raises ArgumentError: it has none that can
    """
    if lm.supports_gradient_checkpointing:
        is_new = hasattr(lm, "activation_checkpointing_enable")  # since transformers 5.23, which warns of the old name
        (lm.activation_checkpointing_enable if is_new else lm.gradient_checkpointing_enable)()
    if not checkpointed_layers(lm):
        raise ArgumentError(f"`gradient_checkpointing=True`, which models of type {lm.config.model_type!r} cannot do.")


def release_memory() -> None:
    """Give memory that is free back to the system.

    Small blocks that stay, such as those of a graph's nodes, are between the large ones that go, which glibc then keeps
    and cannot use for larger ones: each part of a batch would take a tenth of its memory more.
    """
    if sys.platform == "linux":
        try:
            ctypes.CDLL(None).malloc_trim(0)
        except AttributeError:
            return  # another library than glibc

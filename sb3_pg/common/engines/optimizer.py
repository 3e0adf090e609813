"""Optimizers without what torch does around them, which on a small network takes ten times as long as the step."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch as th
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks


def use_fused_adam(optimizer: th.optim.Optimizer) -> None:
    """Let Adam and AdamW update all parameters in one kernel: the same numbers in about a quarter of the time.

    Only before the optimizer's first step, because on a GPU a fused optimizer keeps its step counts elsewhere, and
    only where the user has not chosen an implementation.
    """
    if type(optimizer) not in (th.optim.Adam, th.optim.AdamW) or optimizer.state:
        return
    for group in optimizer.param_groups:
        chosen = group.get("fused") is not None or group.get("foreach") is not None
        supported = all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in group["params"])
        if supported and not chosen and not group.get("differentiable") and not group.get("capturable"):
            group["fused"] = True


class _Ready(NamedTuple):
    """What a kernel takes for those parameters of a group that have a gradient."""

    group: dict[str, Any]
    parameters: list[th.Tensor]
    gradients: list[th.Tensor]
    averages: list[list[th.Tensor]]  # by the optimizer's names for them
    steps: list[th.Tensor]  # counts


def _adam(its: _Ready, is_decoupled: bool) -> None:
    """Step by Adam; its group may say whether the decay of weights is decoupled, whatever the class does."""
    group = its.group
    beta1, beta2 = group["betas"]
    kernel: Any = th._fused_adamw_ if group.get("decoupled_weight_decay", is_decoupled) else th._fused_adam_
    kernel(
        its.parameters,
        its.gradients,
        *its.averages,
        [],
        its.steps,
        lr=group["lr"],
        beta1=beta1,
        beta2=beta2,
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        amsgrad=False,
        maximize=False,
    )


@th.no_grad()
def _rmsprop(its: _Ready) -> None:
    """Step by the gradient over the root of its mean square, all parameters together (Hinton 2012, lecture 6)."""
    group, (squares,) = its.group, its.averages
    gradients: Any = its.gradients
    if group["weight_decay"]:
        gradients = th._foreach_add(gradients, its.parameters, alpha=group["weight_decay"])
    th._foreach_mul_(squares, group["alpha"])
    th._foreach_addcmul_(squares, gradients, gradients, value=1 - group["alpha"])
    roots = th._foreach_sqrt(squares)
    th._foreach_add_(roots, group["eps"])
    th._foreach_addcdiv_(its.parameters, gradients, roots, value=-group["lr"])


class _Rule(NamedTuple):
    """How one class of torch's optimizers steps."""

    averages: tuple[str, ...]  # names of its state beside the count of steps
    variants: tuple[str, ...]  # options of a group with which it steps otherwise
    step: Callable[[_Ready], None]


#: Hooks that torch runs around the steps of every optimizer.
_HOOKS_OF_ALL = (_global_optimizer_pre_hooks, _global_optimizer_post_hooks)

_VARIANTS = ("amsgrad", "maximize", "capturable", "differentiable")
_MOMENTS = ("exp_avg", "exp_avg_sq")
_RULES: dict[type[th.optim.Optimizer], _Rule] = {
    th.optim.Adam: _Rule(_MOMENTS, _VARIANTS, lambda its: _adam(its, is_decoupled=False)),
    th.optim.AdamW: _Rule(_MOMENTS, _VARIANTS, lambda its: _adam(its, is_decoupled=True)),
    th.optim.RMSprop: _Rule(("square_avg",), (*_VARIANTS, "momentum", "centered"), _rmsprop),
}


def is_quick(optimizer: Any) -> bool:
    """Return whether ``QuickOptimizer`` makes the same step.

    That is Adam, AdamW and RMSprop without variants, hooks and schedulers of torch.
    """
    rule = _RULES.get(type(optimizer))
    hooks = (optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks, *_HOOKS_OF_ALL)
    if rule is None or any(hooks):
        return False
    groups = optimizer.param_groups
    variants = any(group.get(name) for group in groups for name in rule.variants)
    return not (variants or "step" in optimizer.__dict__ or any(isinstance(g["lr"], th.Tensor) for g in groups))


class QuickOptimizer:
    """Makes an optimizer's steps by few calls of torch's kernels, on its own state.

    The first step goes through the optimizer, which then makes its state. What this class remembers are only
    references; whoever replaces the state, the parameters or their gradients makes a new one.

    :param optimizer: a torch optimizer that ``is_quick``
    """

    def __init__(self, optimizer: Any) -> None:
        self._optimizer, self._rule = optimizer, _RULES[type(optimizer)]
        self._ready: dict[Any, tuple[np.ndarray, list[_Ready]]] = {}

    def step(self, which: Any) -> None:
        """Move the parameters that have a gradient.

        :param which: names the set of these parameters; the same name always means the same set
        """
        found = self._ready.get(which)
        if found is None:
            self._optimizer.step()
            self._ready[which] = self._get_ready()
            return
        steps, ready = found
        np.add(steps, 1.0, out=steps)
        for its in ready:
            self._rule.step(its)

    def _get_ready(self) -> tuple[np.ndarray, list[_Ready]]:
        """Return the memory of the counts of steps, and what the kernel takes for each group."""
        groups, state = self._optimizer.param_groups, self._optimizer.state
        moving = [[p for p in group["params"] if p.grad is not None] for group in groups]
        states = [state[p] for parameters in moving for p in parameters]
        # Counted together in NumPy: torch takes twice as long to count as to move.
        steps = np.array([float(s["step"]) for s in states], np.float32)
        for its, view in zip(states, th.from_numpy(steps).unbind(), strict=True):
            its["step"] = view
        self._ready.clear()  # it counts elsewhere
        ready = []
        for group, parameters in zip(groups, moving, strict=True):
            its = [state[p] for p in parameters]
            averages = [[s[name] for s in its] for name in self._rule.averages]
            gradients, counts = [p.grad for p in parameters], [s["step"] for s in its]
            if parameters:
                ready.append(_Ready(group, parameters, gradients, averages, counts))
        return steps, ready

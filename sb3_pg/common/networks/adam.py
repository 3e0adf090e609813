"""Adam as a few operations on whole vectors, with its state where torch's optimizer keeps it."""

import math
from typing import Any, NamedTuple

import numpy as np
import torch as th


def is_plain_adam(optimizer: Any) -> bool:
    """Whether ``FlatAdam`` makes the same step: Adam or AdamW with one group, no variants, hooks or schedulers."""
    if type(optimizer) not in (th.optim.Adam, th.optim.AdamW) or len(optimizer.param_groups) != 1:
        return False
    group = optimizer.param_groups[0]
    variants = any(group.get(name) for name in ("amsgrad", "maximize", "capturable", "differentiable"))
    decays = type(optimizer) is th.optim.Adam and group["weight_decay"] != 0
    hooks = optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks
    return not (variants or decays or hooks or "step" in optimizer.__dict__ or isinstance(group["lr"], th.Tensor))


class Span(NamedTuple):
    """Parameters that follow each other."""

    parameters: slice  # their places in the list of parameters
    numbers: slice  # their numbers' places in the flat vector


class FlatAdam:
    """The step of torch's Adam or AdamW for parameters whose gradients lie one after the other in one vector.

    On a small network most of the torch optimizer's step goes into visiting the parameters one by one. Here the
    moments of all are views of two flat vectors. The optimizer's own state holds those views, so saving, loading and
    going on with torch's own step see nothing unusual.

    :param optimizer: a torch optimizer that ``is_plain_adam``
    :param first: those of its parameters at the start of the vector
    :param second: the others; the two groups may step apart
    :raises ValueError: parameters of one group have made different numbers of steps
    """

    def __init__(self, optimizer: Any, first: list[th.Tensor], second: list[th.Tensor]) -> None:
        self._optimizer = optimizer
        self._parameters = parameters = [*first, *second]
        self._arrays = [p.detach().numpy() for p in parameters]
        sizes = [p.numel() for p in parameters]
        n_first, size_first, size = len(first), sum(sizes[: len(first)]), sum(sizes)
        self._all = Span(slice(0, len(parameters)), slice(0, size))
        self._groups = (
            Span(slice(0, n_first), slice(0, size_first)),
            Span(slice(n_first, len(parameters)), slice(size_first, size)),
        )
        self._m, self._v, self._change = (np.zeros(size, self._arrays[0].dtype) for _ in range(3))
        # A count for each, as torch has it: saved and loaded, one tensor for all would count every step many times.
        self._steps = np.zeros(len(parameters), np.float32)
        self._step_views = list(th.from_numpy(self._steps).unbind())
        self._pieces = [
            piece.reshape(array.shape)
            for piece, array in zip(np.split(self._change, np.cumsum(sizes)[:-1]), self._arrays, strict=True)
        ]
        self._views = [
            [part.view_as(p) for part, p in zip(th.split(th.from_numpy(x), sizes), parameters, strict=True)]
            for x in (self._m, self._v)
        ]
        for group in self._groups:
            self._take_over(group)

    def _states(self, span: Span) -> list[dict[str, Any]]:
        return [self._optimizer.state.get(p, {}) for p in self._parameters[span.parameters]]

    def _take_over(self, span: Span) -> None:
        """Continue from the optimizer's state."""
        states = self._states(span)
        steps = {float(state.get("step", 0.0)) for state in states}
        if len(steps) > 1:
            raise ValueError("the parameters have made different numbers of steps")
        self._steps[span.parameters] = steps.pop()
        m, v = (views[span.parameters] for views in self._views)
        for state, its_m, its_v in zip(states, m, v, strict=True):
            if state:
                its_m.copy_(state["exp_avg"])
                its_v.copy_(state["exp_avg_sq"])
        if any(states):
            self._publish(span)

    def _publish(self, span: Span) -> None:
        """Let the optimizer's state be our views."""
        columns = (self._parameters, self._step_views, *self._views)
        for p, step, m, v in zip(*(column[span.parameters] for column in columns), strict=True):
            self._optimizer.state[p].update(step=step, exp_avg=m, exp_avg_sq=v)

    def continues(self, optimizer: Any) -> bool:
        """Whether this is still the step of ``optimizer``, whose state is ours and not, for example, a loaded one."""
        if optimizer is not self._optimizer or not is_plain_adam(optimizer):
            return False
        columns = (self._states(self._all), self._steps, self._step_views, self._views[0])
        return all(
            (state.get("exp_avg") is m and state.get("step") is view) if steps else not state
            for state, steps, view, m in zip(*columns, strict=True)
        )

    def step(self, gradient: np.ndarray, moves: tuple[bool, bool]) -> None:
        """Move the parameters.

        :param gradient: of all parameters, flat
        :param moves: whether the first and the second group are moved
        """
        if all(moves) and self._steps[0] == self._steps[-1]:
            self._move(gradient, self._all)
            return
        for span, its in zip(self._groups, moves, strict=True):
            if its:
                self._move(gradient, span)

    def _move(self, gradient: np.ndarray, span: Span) -> None:
        """Kingma and Ba 2015, algorithm 1, with its rearrangement at the end of section 2."""
        group = self._optimizer.param_groups[0]
        (beta1, beta2), lr = group["betas"], group["lr"]
        if not self._steps[span.parameters.start]:
            self._publish(span)
        self._steps[span.parameters] += 1.0
        t = float(self._steps[span.parameters.start])
        gradient, m, v, change = (x[span.numbers] for x in (gradient, self._m, self._v, self._change))
        np.multiply(gradient, 1.0 - beta1, out=change)
        m *= beta1
        m += change
        np.multiply(gradient, gradient, out=change)
        change *= 1.0 - beta2
        v *= beta2
        v += change
        np.sqrt(v, out=change)
        # lr m^ / (sqrt(v^) + eps), where m^ = m / (1 - beta1^t) and v^ = v / (1 - beta2^t)
        root = math.sqrt(1.0 - beta2**t)
        change += group["eps"] * root
        np.divide(m, change, out=change)
        change *= lr * root / (1.0 - beta1**t)
        decay = group["weight_decay"]
        for array, piece in zip(self._arrays[span.parameters], self._pieces[span.parameters], strict=True):
            if decay:
                array *= 1.0 - lr * decay
            array -= piece

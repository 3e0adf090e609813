"""A batch of samples with named columns, and how it is cut into minibatches."""

from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common import buffers as sb3_buffers

from sb3_pg.common import workers
from sb3_pg.common.advantages import moments, normalized
from sb3_pg.common.arrays import Array, Observations, length, namespace, nbytes, take
from sb3_pg.common.buffers import RolloutBuffer, sb3_order
from sb3_pg.common.engines.protocol import Engine
from sb3_pg.common.errors import ArgumentError
from sb3_pg.common.rollout import Rollout
from sb3_pg.common.sequences import Memory, Stretches

#: How much is gathered at once: a whole rollout, unless it is long or of images.
_GATHERED_BYTES = 1 << 22


#: What a batch counts for in which no sample counts, so that means over several workers are still numbers.
_NOTHING = 1e-12

#: How the samples of a loss may be averaged besides over a constant length, see :func:`weighted`.
AVERAGES = ("step", "sequence")

#: A column that is not needed. Whoever asks for it after all is told so by Python.
_ABSENT: Any = None


@dataclass
class Batch:
    """Samples in the arrays of an engine, one row each; what is not needed is None.

    :param observations: as recorded
    :param actions: in the form that the engine takes
    :param masks: True for the actions that were allowed
    :param sequences: the number of the stretch of an episode that each sample belongs to, if the engine is better off
        with whole ones
    :param memory: with which each sequence begins, by its number, whichever of them are in the batch
    :param reference_log_prob: log-probability of the action under a reference that the loss keeps the policy near to
    :param weight: what each sample counts for in sums; None is 1 for each
    :param count: what each sample adds to the number that these sums are divided by; None is its weight
    :param rows: the samples' numbers in the rollout, ``step * n_envs + env``, to name one in an error
    :param divisor: what weighted sums are divided by if these samples are part of a batch, see :meth:`part`
    """

    observations: Observations
    actions: Array = _ABSENT
    masks: Array | None = None
    sequences: np.ndarray | None = None
    memory: Memory | None = None
    old_values: Array = _ABSENT
    old_log_prob: Array = _ABSENT
    advantages: Array = _ABSENT
    returns: Array = _ABSENT
    reference_log_prob: Array | None = None
    weight: Array | None = None
    count: Array | None = None
    rows: np.ndarray | None = None
    divisor: float | None = None

    def __len__(self) -> int:
        return length(self.observations)

    def __getitem__(self, index: Any) -> "Batch":
        *columns, _ = self.__dict__.values()
        taken: list[Any] = [x if x is None or x is self.memory else take(x, index) for x in columns]
        return Batch(*taken)

    def part(self, index: Any) -> "Batch":
        """Return some of the samples, each of which counts for as much as in the whole batch."""
        return replace(self[index], divisor=self.share)

    @property
    def share(self) -> float:
        """What weighted sums are divided by for a mean, and what that counts for among the means of all workers."""
        if self.divisor is not None:
            return self.divisor
        numbers: Any = self.weight if self.count is None else self.count
        return float(len(self)) if numbers is None else float(numbers.sum()) or _NOTHING

    @property
    def scale(self) -> Array | float:
        """What each sample counts for in a mean, as an array, (n,), or as one number for all."""
        return 1.0 / self.share if self.weight is None else self.weight / self.share

    def mean(self, x: Array) -> float:
        """Return the mean of one number per sample, (n,), by the samples' weights, over all workers."""
        return float(workers.mean(float((x * self.scale).sum()) if self._is_weighted else float(x.mean()), self.share))

    def mean_of_samples(self, x: Array) -> float:
        """Return the mean of one number per sample, (n,), over those that count, all alike, over all workers."""
        x = x if self.counts is None else x[self.counts]
        return float(workers.mean(float(x.mean()) if len(x) else 0.0, len(x) or _NOTHING))

    @property
    def _is_weighted(self) -> bool:
        return self.weight is not None or self.divisor is not None

    @property
    def counts(self) -> Array | None:
        """True for the samples that count for something; None if all do."""
        return None if self.weight is None else self.weight != 0

    def moments(self) -> tuple[float, float]:
        """Return mean and deviation of the advantages that count, over all workers."""
        return moments([self.advantages if self.counts is None else self.advantages[self.counts]])[0]

    def normalized(self, scale: tuple[float, float] | None = None) -> Array:
        """Return the advantages with mean 0 and deviation 1 over the samples that count.

        :param scale: mean and deviation that are taken out instead of their own
        """
        found: Array = normalized(self.advantages, scale, self.counts)
        return found

    def without(self, silent: Array) -> "Batch":
        """Return the part of the samples from which the loss has a gradient; the first one if there are none.

        Sequences are not cut, since in one the samples depend on each other.

        :param silent: True for samples from which it has none, bool (n,)
        """
        silent = np.asarray(silent.cpu() if isinstance(silent, th.Tensor) else silent)
        if not silent.any():
            return self
        heard = ~silent
        heard[0] |= not heard.any()  # a step of the optimizer moves by momentum, too
        if self.sequences is not None:
            heard = np.isin(self.sequences, self.sequences[heard])
        return self.part(np.flatnonzero(heard))

    def for_critic(self) -> "Batch":
        """Return only what the value network is fitted to, so that no more is gathered."""
        return replace(self, old_values=_ABSENT, old_log_prob=_ABSENT, advantages=_ABSENT)

    def minibatches(
        self,
        batch_size: int | None,
        order: np.ndarray | None = None,
        *,
        even: bool = False,
        normalize: bool = False,
        only_advantages: bool = False,
    ) -> Generator["Batch", None, None]:
        """Yield pieces of ``batch_size`` samples; all at once for None.

        Sequences are not cut: a piece goes on to the end of the one that it ends in. All workers yield the same number
        of pieces, that of the one with the fewest. Samples without weight are left out of their pieces.

        :param order: the numbers of the samples in the order in which they are wanted, by default as they are
        :param even: spread a shorter last piece over all, so that none is much smaller than the others
        :param normalize: normalise the advantages of each piece
        :param only_advantages: the loss depends on nothing else, so that samples whose advantage is zero are left out
            of their pieces, too; those that are left count for no more than before
        """
        edges = self._edges(batch_size or len(self), order, even)
        if order is None:
            pieces = (self[start:end] for start, end in pairwise(edges))
        else:
            pieces = self._gathered(edges, order, batch_size or len(self))
        scales: Any = [None] * (len(edges) - 1)
        if normalize and workers.size() > 1:  # one message for all pieces
            both: Any = (x if order is None or x is None else x[order] for x in (self.advantages, self.counts))
            advantages, counts = both
            places = [slice(start, end) for start, end in pairwise(edges)]
            scales = moments([advantages[p] if counts is None else advantages[p][counts[p]] for p in places])
        for piece, scale in zip(pieces, scales, strict=True):
            if normalize:
                piece.advantages = piece.normalized(scale)
            silent = piece.advantages == 0 if only_advantages else None
            if piece.counts is not None:
                silent = ~piece.counts if silent is None else silent | ~piece.counts
            yield piece if silent is None else piece.without(silent)

    def _edges(self, size: int, order: np.ndarray | None, even: bool) -> list[int]:
        """Return where pieces begin, and where the last one ends."""
        n, n_pieces = len(self), -(-len(self) // size)
        if self.sequences is None:
            edges = [int(x) for x in np.linspace(0, n, n_pieces + 1)] if even else [*range(0, n, size), n]
            return edges if workers.size() == 1 else _as_many_as_all(edges, np.arange(1, n + 1))
        sequences = self.sequences if order is None else self.sequences[order]
        ends = np.append(np.flatnonzero(np.diff(sequences)) + 1, n)
        size, edges = -(-n // n_pieces) if even else size, [0]
        while edges[-1] < n:
            edges.append(int(ends[np.searchsorted(ends, min(edges[-1] + size, n))]))
        return edges if workers.size() == 1 else _as_many_as_all(edges, ends)

    def _gathered(self, edges: list[int], order: np.ndarray, size: int) -> Generator["Batch", None, None]:
        """Yield the pieces of a reordered batch.

        Gathered together they are plain slices of the result; images are too large for many at a time.
        """
        total = sum(nbytes(x) for x in self.__dict__.values() if x is not None and x is not self.memory)
        n_together = max(1, _GATHERED_BYTES * len(self) // max(1, total * size))
        for first in range(0, len(edges) - 1, n_together):
            its = edges[first : first + n_together + 1]
            gathered = self[order[its[0] : its[-1]]]
            for start, end in pairwise(its):
                yield gathered[start - its[0] : end - its[0]]


def _as_many_as_all(edges: list[int], ends: np.ndarray) -> list[int]:
    """Return the edges of as many pieces as the worker with the fewest has.

    :param edges: of this worker's own pieces
    :param ends: where a piece may end
    """
    n_pieces = workers.least(len(edges) - 1)
    if n_pieces == len(edges) - 1:
        return edges
    last = np.linspace(0, len(ends), n_pieces + 1).round().astype(int)[1:] - 1
    return [0, *(int(x) for x in ends[last])]


#: The columns that become arrays of the engine as they are.
_NUMBERS = {"old_values": "values", "old_log_prob": "log_probs", "advantages": "advantages", "returns": "returns"}


def batch_of(
    rollout: Rollout,
    asarray: Callable[[Any], Any],
    actions: Callable[[np.ndarray], Array],
    keep: np.ndarray | None = None,
) -> Batch:
    """Return a rollout as one batch, in time order.

    :param asarray: makes an engine's array of one of NumPy, or of a dictionary of them
    :param actions: makes those in the form that the engine takes
    :param keep: which samples to use, boolean (n_steps, n_envs); None takes all
    """
    rows: Any = np.arange(rollout.n_steps * rollout.n_envs) if keep is None or keep.all() else np.flatnonzero(keep)
    index = slice(None) if len(rows) == rollout.n_steps * rollout.n_envs else rows

    def column(name: str) -> Any:
        return take(rollout.column(name), index)

    numbers = {name: asarray(column(source)) for name, source in _NUMBERS.items()}
    masks = rollout.mask_rows()
    return Batch(
        observations=asarray(column("observations")),
        actions=actions(column("actions")),
        masks=None if masks is None else asarray(masks[index]),
        rows=rows,
        **numbers,
    )


def episode_parts(rollout: Rollout) -> np.ndarray:
    """Return the number of the part of an episode that each sample of a rollout is in, (n_steps * n_envs,)."""
    starts = rollout.buffer.episode_starts[: rollout.n_steps] > 0
    return Stretches(starts).numbers.ravel()


def weighted(batch: Batch, rollout: Rollout, asarray: Callable[[Any], Any], average: str | int) -> Batch:
    """Return a batch whose samples count as an average of the loss wants.

    A sequence is the part of an episode, or of a response, that is in the rollout. Where a minibatch cuts one, its
    samples count as parts of it.

    :param batch: of a rollout; weights that it has already, of 0 or 1, say which samples count at all
    :param asarray: makes an engine's array of one of NumPy
    :param average: "step": over all samples (DAPO, Yu et al. 2025, section 3.3). "sequence": over the samples of each
        sequence, then over sequences (GRPO, Shao et al. 2024, eq. 3). A number L: the sum over the samples of a
        sequence, divided by L, over sequences (Dr. GRPO, Liu et al. 2025, section 3)
    """
    if average == "step":
        return batch
    assert batch.rows is not None
    place, sizes = np.unique(episode_parts(rollout)[batch.rows], return_inverse=True, return_counts=True)[1:]
    of_sequence = (1.0 / sizes[place]).astype(np.float32)
    weight = of_sequence if average == "sequence" else np.full_like(of_sequence, 1.0 / float(average))
    count, weight = asarray(of_sequence), asarray(weight)
    counts: Any = 1.0 if batch.weight is None else batch.weight
    return replace(batch, weight=counts * weight, count=counts * count)


def random_order(batch: Batch, rollout: Rollout) -> np.ndarray:
    """Return the numbers of the samples in random order, the same as SB3's for the same NumPy seed.

    Samples of one sequence stay together and in time order.
    """
    if batch.sequences is not None:
        _, number = np.unique(batch.sequences, return_inverse=True)
        return np.argsort(np.random.permutation(number.max() + 1)[number], kind="stable")
    order = np.random.permutation(len(batch))
    if len(batch) == rollout.n_steps * rollout.n_envs:
        order = sb3_order(order, rollout.n_steps, rollout.n_envs)
    return order


def has_own_get(kind: type[sb3_buffers.RolloutBuffer]) -> bool:
    """Return whether a class of rollout buffers gives out samples in its own way (prioritised, augmenting, ...)."""
    samples = (sb3_buffers.RolloutBuffer._get_samples, sb3_buffers.DictRolloutBuffer._get_samples)
    gets = (RolloutBuffer.get, sb3_buffers.RolloutBuffer.get, sb3_buffers.DictRolloutBuffer.get)
    return kind.get not in gets or kind._get_samples not in samples


def epoch(
    batch: Batch,
    rollout: Rollout,
    engine: Engine,
    batch_size: int | None,
    *,
    even: bool = False,
    normalize: bool = False,
    only_advantages: bool = False,
) -> Generator[Batch, None, None]:
    """Yield one pass over the rollout in random minibatches.

    A buffer of the user's with a ``get`` of its own is asked for them.

    :param batch: the rollout as one batch
    :param even: spread a shorter last minibatch over all
    :param normalize: normalise the advantages of each minibatch
    :param only_advantages: leave out the samples whose advantages are zero, see :meth:`Batch.minibatches`
    """
    if not has_own_get(type(rollout.buffer)):
        order = random_order(batch, rollout)
        yield from batch.minibatches(batch_size, order, even=even, normalize=normalize, only_advantages=only_advantages)
        return
    for samples in own_samples(rollout, engine, batch_size):
        if normalize:
            samples.advantages = normalized(samples.advantages)
        yield samples


def own_samples(rollout: Rollout, engine: Engine, batch_size: int | None) -> Generator[Batch, None, None]:
    """Yield what the user's buffer gives out; which samples of the rollout these are is not known.

    :raises ArgumentError: it gives out nothing, or the policy needs to know more of the samples than it tells
    """

    def asarray(x: th.Tensor) -> Array:
        return engine.asarray(x.cpu().numpy())

    if rollout.masks or rollout.starting_memory is not None:
        what, advice = ("follow each other", "Use a policy without memory.")
        if rollout.masks:
            what, advice = "had which actions allowed", "Pass use_masking=False."
        raise ArgumentError(
            f"`rollout_buffer_class={type(rollout.buffer).__name__}` has a `get` of its own, which does not know which "
            f"samples {what}. {advice}"
        )
    if workers.size() > 1:
        raise ArgumentError(
            f"`rollout_buffer_class={type(rollout.buffer).__name__}` has a `get` of its own, with which several "
            "workers cannot agree on the number of minibatches. Leave it out, or train with one worker."
        )
    n_batches = 0
    for data in rollout.buffer.get(batch_size):
        seen: Any = data.observations
        yield Batch(
            observations={k: asarray(v) for k, v in seen.items()} if isinstance(seen, dict) else asarray(seen),
            actions=engine.actions(data.actions.cpu().numpy()),
            old_values=asarray(data.old_values),
            old_log_prob=asarray(data.old_log_prob),
            advantages=asarray(data.advantages),
            returns=asarray(data.returns),
        )
        n_batches += 1
    if not n_batches:
        raise ArgumentError(f"{type(rollout.buffer).__name__}.get gave out no samples to learn from.")


def joined(batches: list[Batch]) -> Batch:
    """Return several batches of a buffer's own as one."""
    if len(batches) == 1:
        return batches[0]

    def column(name: str) -> Any:
        parts: list[Any] = [getattr(batch, name) for batch in batches]
        if isinstance(parts[0], dict):
            return {key: namespace(x).concat([part[key] for part in parts]) for key, x in parts[0].items()}
        return None if parts[0] is None else namespace(parts[0]).concat(parts)

    return Batch(**{name: column(name) for name in vars(batches[0])})

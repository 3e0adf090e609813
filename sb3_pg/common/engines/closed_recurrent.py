"""sb3-contrib's MlpLstmPolicy on the CPU, differentiated by hand in NumPy through its memory."""

import copyreg
from typing import Any, NamedTuple

import numpy as np
from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy
from torch import nn

from sb3_pg.common.batch import Batch
from sb3_pg.common.engines.blueprint import Unsuitable
from sb3_pg.common.engines.closed_form import ClosedFormEngine, mlp_of, quiet, view
from sb3_pg.common.engines.lstm import Lstm, state_after
from sb3_pg.common.engines.lstm import Pieces as LstmPieces
from sb3_pg.common.engines.lstm import Trace as LstmTrace
from sb3_pg.common.engines.mlp import Mlp, Trace
from sb3_pg.common.engines.protocol import Acted, Engine, Seen
from sb3_pg.common.engines.recurrent import RecurrentBlueprint, RecurrentEngine
from sb3_pg.common.engines.sequences import SequenceEngine
from sb3_pg.common.sequences import Memory, Packing, packed


def recurrent_engine(policy: RecurrentActorCriticPolicy) -> Engine:
    """Return the fastest engine that computes a recurrent policy."""
    try:
        return ClosedRecurrentEngine(policy)
    except Unsuitable as reason:
        by_autograd: Any = RecurrentEngine(policy, str(reason), is_stopgap=True)
        return by_autograd  # type: ignore[no-any-return]


def lstm_of(lstm: nn.LSTM) -> Lstm:
    """Return an LSTM as NumPy sees it."""
    pieces: LstmPieces = [tuple(view(p) for p in layer) for layer in lstm.all_weights]  # type: ignore[misc]
    return Lstm(pieces)


class Sequences(NamedTuple):
    """Encoded observations, how to go through them, and the memory with which each sequence begins, in packed order."""

    x: np.ndarray
    packing: Packing
    memory: Memory


class NetTrace(NamedTuple):
    """What a forward pass leaves: of the LSTM, if it is to be moved, and of the layers after it."""

    of_lstm: LstmTrace | None
    of_mlp: Trace
    packing: Packing


class RecurrentNet:
    """An LSTM and layers after it, with the passes of :class:`~sb3_pg.common.engines.mlp.Mlp`.

    :param which: its part of the memory
    :param moves: whether the LSTM learns too
    """

    def __init__(self, lstm: Lstm, mlp: Mlp, which: slice, *, moves: bool = True) -> None:
        self.lstm, self.mlp, self._which, self._moves = lstm, mlp, which, moves
        self._n_layers = len(lstm.pieces) if moves else 0
        self.pieces: list[Any] = [*lstm.pieces[: self._n_layers], *mlp.pieces]
        self.size = mlp.size + (lstm.size if moves else 0)

    @property
    def blas_has_one_thread(self) -> bool:
        """True if products need no care."""
        return self.mlp.blas_has_one_thread

    @blas_has_one_thread.setter
    def blas_has_one_thread(self, value: bool) -> None:
        self.mlp.blas_has_one_thread = self.lstm.blas_has_one_thread = value

    def read(self, sequences: Sequences) -> tuple[np.ndarray, Memory]:
        """Return the outputs of each sample, and the memory after each sequence in the order of their numbers."""
        packing = sequences.packing
        said, trace = self._pass(sequences)
        by_number = packing.last[np.argsort(packing.numbers)]
        return self.mlp(said)[packing.back], state_after(trace, by_number)

    def __call__(self, sequences: Sequences) -> np.ndarray:
        """Return the outputs of each sample."""
        return self.read(sequences)[0]

    def forward(self, sequences: Sequences) -> tuple[np.ndarray, NetTrace]:
        """Return the outputs of each sample, and what ``backward`` and ``tangent`` need."""
        packing = sequences.packing
        said, of_lstm = self._pass(sequences)
        outputs, of_mlp = self.mlp.forward(said)
        return outputs[packing.back], NetTrace(of_lstm if self._moves else None, of_mlp, packing)

    def _pass(self, sequences: Sequences) -> tuple[np.ndarray, LstmTrace]:
        """Return what the LSTM says of each sample, in packed order."""
        x, packing, memory = sequences
        hidden, cell = memory[self._which]
        return self.lstm.forward(x[packing.rows], packing.sizes.tolist(), (hidden, cell))

    def backward(self, trace: NetTrace, d: np.ndarray, gradient: list[Any]) -> None:
        """J^T d, written to ``gradient``."""
        rows, n = trace.packing.rows, self._n_layers
        d_said = self.mlp.backward(trace.of_mlp, d[rows], gradient[n:], wants_dx=self._moves)
        if trace.of_lstm is not None and d_said is not None:
            self.lstm.backward(trace.of_lstm, d_said, gradient[:n])

    def tangent(self, trace: NetTrace, change: list[Any]) -> np.ndarray:
        """J v: how the outputs change with the weights."""
        assert trace.of_lstm is not None
        d_said = self.lstm.tangent(trace.of_lstm, change[: self._n_layers])
        changed: np.ndarray = self.mlp.tangent(trace.of_mlp, change[self._n_layers :], d_said)[trace.packing.back]
        return changed

    def split(self, flat: np.ndarray) -> list[Any]:
        """Return views of a flat vector in the shapes of the weights and biases."""
        n = self.size - self.mlp.size
        return [*(self.lstm.split(flat[:n]) if n else []), *self.mlp.split(flat[n:])]


class Memoryless(Mlp):
    """Layers that read each sample by itself."""

    def read(self, sequences: Sequences) -> tuple[np.ndarray, Memory]:
        """Return the outputs, and no memory."""
        return self(sequences.x), ()

    def forward(self, sequences: Any) -> tuple[np.ndarray, Trace]:
        return super().forward(sequences.x)


class ClosedRecurrentEngine(SequenceEngine, ClosedFormEngine):
    """Acts, judges and steps by NumPy on the memory of the parameters of an MlpLstmPolicy."""

    actor_net: RecurrentNet

    def __init__(self, policy: RecurrentActorCriticPolicy) -> None:
        super().__init__(policy)
        self.description = "recurrent, closed-form"

    def blueprint(self) -> RecurrentBlueprint:
        return RecurrentBlueprint(self.policy)

    def nets(self, blueprint: RecurrentBlueprint) -> tuple[Any, Any]:
        lstm, mlp = lstm_of(blueprint.lstm_actor), mlp_of(blueprint.critic)
        actor = RecurrentNet(lstm, mlp_of(blueprint.actor), slice(0, 2))
        if blueprint.lstm_critic is not None:
            return actor, RecurrentNet(lstm_of(blueprint.lstm_critic), mlp, slice(2, 4))
        if blueprint.is_shared:  # the critic does not move it
            return actor, RecurrentNet(lstm, mlp, slice(0, 2), moves=False)
        return actor, Memoryless(mlp.pieces, mlp.activations)

    def inputs(self, batch: Batch) -> Sequences:
        assert batch.sequences is not None and batch.memory is not None
        packing = packed(batch.sequences)
        memory = tuple(x[:, packing.numbers].astype(self.dtype) for x in batch.memory)
        return Sequences(self.encode(batch.observations), packing, memory)

    def chunks(self, batch: Batch) -> list[slice]:
        return [slice(None)]  # sequences are not cut

    @quiet
    def act(self, seen: Seen, deterministic: bool = False) -> Acted:
        x = self.encode(seen.observations)
        memory = self.remembered(seen, len(x))
        hidden, cell = (m.astype(self.dtype, copy=False) for m in memory[:2])
        said, after = self.actor_net.lstm.step(x, (hidden, cell))
        actions = self.drawn(self.parameters(self.actor_net.mlp(said), seen.masks), deterministic, len(x))
        return Acted(actions, memory=(*after, *memory[2:]))

    @quiet
    def judged(self, batch: Batch) -> tuple[np.ndarray, np.ndarray, Memory]:
        sequences = self.inputs(batch)
        outputs, of_actor = self.actor_net.read(sequences)
        values, of_critic = self.critic_net.read(sequences)
        log_probs: Any = self.family.log_prob(self.parameters(outputs, batch.masks), batch.actions)
        return values.reshape(-1), log_probs, (*of_actor, *(of_critic or of_actor))

    @quiet
    def values_of(self, batch: Batch) -> np.ndarray:
        values: np.ndarray = self.critic_net.read(self.inputs(batch))[0]
        return values.reshape(-1).astype(np.float32)


# As of ClosedFormEngine: a copied or unpickled engine is made anew for its own policy.
copyreg.pickle(ClosedRecurrentEngine, lambda engine: (recurrent_engine, (engine.policy,)))  # type: ignore[arg-type, return-value]

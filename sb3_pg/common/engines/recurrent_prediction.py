"""Actions of an MlpLstmPolicy in closed form, one call at a time, whoever calls in between."""

from typing import Any

import numpy as np
from torch import nn

from sb3_pg.common.engines.blueprint import Unsuitable
from sb3_pg.common.engines.closed_recurrent import lstm_of
from sb3_pg.common.engines.prediction import Predictor
from sb3_pg.common.engines.recurrent import RecurrentBlueprint
from sb3_pg.common.sequences import at_starts


class RecurrentPredictor(Predictor):
    """The actor of a recurrent policy as NumPy sees it.

    :param policy: sb3-contrib's MlpLstmPolicy
    :raises Unsuitable: it is not computed in closed form
    """

    def __init__(self, policy: Any) -> None:
        super().__init__(policy)
        self._lstm = lstm_of(policy.lstm_actor)
        self._n_layers, _, self._size = policy.lstm_hidden_state_shape

    def _blueprint(self, policy: Any) -> RecurrentBlueprint:
        return RecurrentBlueprint(policy, trained=False)

    def _modules_of(self, policy: Any) -> list[nn.Module]:
        return [*super()._modules_of(policy), policy.lstm_actor]

    def _read(self, x: np.ndarray, state: Any, episode_start: Any) -> tuple[np.ndarray, Any]:
        shape = self._n_layers, len(x), self._size
        hidden, cell = np.zeros((2, *shape), x.dtype) if state is None else (np.asarray(s, x.dtype) for s in state)
        if hidden.shape != shape or cell.shape != shape:
            raise Unsuitable("the state is of another shape")
        if episode_start is not None:
            starts = np.asarray(episode_start)
            if starts.shape != (len(x),) or starts.dtype != bool:
                raise Unsuitable("episode starts that are not plainly true or false")
            hidden, cell = at_starts((hidden, cell), starts)
        said, after = self._lstm.step(x, (hidden, cell))
        return self._mlp(said), after

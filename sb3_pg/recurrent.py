"""Policies with a GRU, beside sb3-contrib's with an LSTM (extra ``contrib``)."""

from typing import Any

from gymnasium import spaces
from sb3_contrib.common.recurrent.policies import (
    RecurrentActorCriticCnnPolicy,
    RecurrentActorCriticPolicy,
    RecurrentMultiInputActorCriticPolicy,
)
from stable_baselines3.common.type_aliases import Schedule
from torch import nn

from sb3_pg.common.archive.policy_files import SavedPolicy


class Gru(nn.GRU):
    """torch's GRU, called like its LSTM: in place of a cell state, which it has not, whatever comes is passed on."""

    def forward(self, x: Any, state: Any) -> Any:  # type: ignore[override]
        """Return the outputs, and the states after each sequence."""
        hidden, cell = state
        outputs, hidden = super().forward(x, hidden)
        return outputs, (hidden, cell)


class MlpGruPolicy(SavedPolicy, RecurrentActorCriticPolicy):
    """sb3-contrib's MlpLstmPolicy with a GRU in place of each LSTM, a quarter fewer numbers to learn.

    Arguments are the same, ``lstm_hidden_size`` and the others that name the LSTM included.
    """

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        lr_schedule: Schedule,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        super().__init__(observation_space, action_space, lr_schedule, *args, **kwargs)
        for name in ("lstm_actor", "lstm_critic"):
            lstm = self._modules.get(name)
            if isinstance(lstm, nn.LSTM):
                setattr(self, name, Gru(lstm.input_size, lstm.hidden_size, lstm.num_layers, **self.lstm_kwargs))
        self.optimizer = self.optimizer_class(self.parameters(), lr=lr_schedule(1), **self.optimizer_kwargs)  # type: ignore[call-arg]


class CnnGruPolicy(MlpGruPolicy, RecurrentActorCriticCnnPolicy):
    """With SB3's convolutions before the GRU."""


class MultiInputGruPolicy(MlpGruPolicy, RecurrentMultiInputActorCriticPolicy):
    """For Dict observations."""

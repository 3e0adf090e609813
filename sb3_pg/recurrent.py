"""Policies with a GRU, and what ours add to sb3-contrib's with an LSTM (extra ``contrib``)."""

import inspect
from typing import Any, ClassVar

from gymnasium import spaces
from sb3_contrib.common.recurrent.policies import (
    RecurrentActorCriticCnnPolicy,
    RecurrentActorCriticPolicy,
    RecurrentMultiInputActorCriticPolicy,
)
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.type_aliases import Schedule
from torch import nn

from sb3_pg.common.archive.policy_files import SavedPolicy
from sb3_pg.common.distributions import BoxPolicy
from sb3_pg.common.engines.prediction import Predictor
from sb3_pg.common.engines.recurrent import RecurrentBlueprint
from sb3_pg.common.engines.recurrent_prediction import RecurrentPredictor
from sb3_pg.common.policies import QuickMlpPolicy


class _WithMemory(RecurrentActorCriticPolicy):
    """What sb3-contrib's recurrent policies lack."""

    def make_features_extractor(self) -> BaseFeaturesExtractor:
        """Return SB3's, whose count of the features of MultiDiscrete observations torch's LSTM does not take."""
        extractor = super().make_features_extractor()
        extractor._features_dim = int(extractor._features_dim)
        return extractor

    def _get_constructor_parameters(self) -> dict[str, Any]:
        n_layers, _, size = self.lstm_hidden_state_shape
        return super()._get_constructor_parameters() | {
            "lstm_hidden_size": size,
            "n_lstm_layers": n_layers,
            "shared_lstm": self.shared_lstm,
            "enable_critic_lstm": self.enable_critic_lstm,
            "lstm_kwargs": self.lstm_kwargs,
        }


class QuickActorCriticLstmPolicy(QuickMlpPolicy, _WithMemory):
    """sb3-contrib's MlpLstmPolicy with one argument more, whose ``predict`` takes the closed form where it can.

    Models are made with it in place of sb3-contrib's class, which archives name.

    :param forget_bias: added to the biases of the forget gates before training. With 3 or more they begin nearly open,
        so that what is seen lasts for tens of steps; as torch starts them, they halve the memory at each step.
    """

    predictor_class: ClassVar[type[Predictor]] = RecurrentPredictor

    def __init__(self, *args: Any, forget_bias: float = 0.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for lstm in (self.lstm_actor, self.lstm_critic):
            for name, parameter in [] if lstm is None else lstm.named_parameters():
                if name.startswith("bias_hh"):
                    parameter.data.view(4, -1)[1] += forget_bias  # of torch's gates: input, forget, cell, output

    def portable_kwargs(self, policy_kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments without what is only for new policies, so that RecurrentPPO reads the archive."""
        return {name: value for name, value in policy_kwargs.items() if name != "forget_bias"}


class QuickActorCriticCnnLstmPolicy(QuickActorCriticLstmPolicy, RecurrentActorCriticCnnPolicy):
    """The same of sb3-contrib's CnnLstmPolicy."""


class QuickMultiInputActorCriticLstmPolicy(QuickActorCriticLstmPolicy, RecurrentMultiInputActorCriticPolicy):
    """The same of sb3-contrib's MultiInputLstmPolicy."""


RecurrentBlueprint.kinds.add(QuickActorCriticLstmPolicy)


class Gru(nn.GRU):
    """torch's GRU, called like its LSTM: in place of a cell state, which it has not, whatever comes is passed on."""

    def forward(self, x: Any, state: Any) -> Any:  # type: ignore[override]
        """Return the outputs, and the states after each sequence."""
        hidden, cell = state
        outputs, hidden = super().forward(x, hidden)
        return outputs, (hidden, cell)


class MlpGruPolicy(SavedPolicy, BoxPolicy, _WithMemory):
    """sb3-contrib's MlpLstmPolicy with a GRU in place of each LSTM, a quarter fewer numbers to learn.

    Arguments are the same, ``lstm_hidden_size`` and the others that name the LSTM included.
    """

    __signature__ = inspect.signature(RecurrentActorCriticPolicy)

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

    __signature__ = inspect.signature(RecurrentActorCriticCnnPolicy)


class MultiInputGruPolicy(MlpGruPolicy, RecurrentMultiInputActorCriticPolicy):
    """For Dict observations."""

    __signature__ = inspect.signature(RecurrentMultiInputActorCriticPolicy)

"""sb3-contrib's recurrent policies, and those derived from them, differentiated by torch.

Acting remembers the memory of each environment. Judging and stepping read whole stretches of episodes, side by side and
without padding, as torch's LSTM reads packed sequences; only the memory with which a stretch begins is kept.
"""

from contextlib import nullcontext
from typing import Any, ClassVar

import numpy as np
import torch as th
from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy
from stable_baselines3.common.distributions import Distribution
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.utils import obs_as_tensor
from torch import nn
from torch.nn.utils.rnn import PackedSequence

from sb3_pg.common.arrays import length
from sb3_pg.common.batch import Batch
from sb3_pg.common.distributions import draw
from sb3_pg.common.engines.autograd import ACTING, AutogradEngine, GraphActor, is_replaced
from sb3_pg.common.engines.blueprint import Blueprint, Unsuitable, linear, reason_against
from sb3_pg.common.engines.protocol import Acted, Fisher, Seen
from sb3_pg.common.engines.sequences import SequenceEngine
from sb3_pg.common.errors import ArgumentError
from sb3_pg.common.sequences import Memory, packed
from sb3_pg.common.threads import choose_threads

#: Methods that the engine has its own way of calling; a policy that changes one would not be computed as it says.
_REPLACED = (*ACTING, "_process_sequence")


class RecurrentBlueprint(Blueprint):
    """The parts of an MlpLstmPolicy."""

    kinds: ClassVar[set[type[ActorCriticPolicy]]] = {RecurrentActorCriticPolicy}

    def before_actor(self, policy: Any) -> list[th.Tensor]:
        if "_process_sequence" in vars(policy):
            raise Unsuitable("the policy's _process_sequence is replaced")
        self.lstm_actor = _checked(policy.lstm_actor)
        return _of_lstm(self.lstm_actor)

    def before_critic(self, policy: Any) -> list[th.Tensor]:
        self.lstm_critic = None if policy.lstm_critic is None else _checked(policy.lstm_critic)
        self.is_shared = policy.shared_lstm
        if policy.critic is not None:  # a layer in place of an LSTM
            self.critic = [(linear(policy.critic), None), *self.critic]
        return [] if self.lstm_critic is None else _of_lstm(self.lstm_critic)


def _checked(lstm: nn.Module) -> nn.LSTM:
    if type(lstm) is not nn.LSTM:
        raise Unsuitable(f"the memory is a {type(lstm).__name__}")
    if not lstm.bias or lstm.dropout or lstm.bidirectional or lstm.proj_size:
        raise Unsuitable("the LSTM has no bias, or dropout, two directions or a projection")
    return lstm


def _of_lstm(lstm: nn.LSTM) -> list[th.Tensor]:
    return [p for layer in lstm.all_weights for p in layer]


class RecurrentEngine(SequenceEngine, AutogradEngine):
    """Acts step by step, judges and steps on whole sequences.

    :param policy: with LSTMs, or modules that are called like them
    :raises ArgumentError: the policy has another way to use its memory
    """

    policy: RecurrentActorCriticPolicy

    def __init__(self, policy: RecurrentActorCriticPolicy, why: str = "", *, is_stopgap: bool = False) -> None:
        for name in _REPLACED:
            if is_replaced(policy, RecurrentActorCriticPolicy, name):
                raise ArgumentError(f"{type(policy).__name__} has a `{name}` of its own, which is not supported.")
        super().__init__(policy, why, is_stopgap=is_stopgap)
        self.description = f"recurrent, {self.description}"

    def refresh(self) -> bool:
        is_fine = super().refresh()
        self._forward_acts, self._heads_are_cheap = False, False
        self._family = self.known_family()
        return is_fine

    def reason_against(self) -> str | None:
        return reason_against(self.policy, RecurrentBlueprint)

    # Act

    def act(self, seen: Seen, deterministic: bool = False) -> Acted:
        n = length(seen.observations)
        memory = self.remembered(seen, n)
        choose_threads(n * self._largest_layer)
        with th.no_grad():
            batch = Batch(
                self._arranged(obs_as_tensor(seen.observations, self.policy.device)),  # type: ignore[arg-type]
                masks=seen.masks,
                sequences=np.arange(n),
                memory=memory,
            )
            latent, (hidden, cell) = self._actor_latent(batch)
            if self._family is not None:
                outputs = self._parameters(self.policy.action_net(latent), batch.masks)
                actions = draw(self._family, tuple(x.float().cpu().numpy() for x in outputs), deterministic)
            else:
                actions = self._made(latent, batch).get_actions(deterministic).cpu().numpy()
        return Acted(self._in_shape(actions), memory=(hidden, cell, *memory[2:]))

    # The passes through the memory

    def _read(self, lstm: Any, features: th.Tensor, batch: Batch, which: slice) -> tuple[th.Tensor, Memory]:
        """Return what an LSTM says of each sample, and its memory after each sequence, in the order of their numbers.

        :param which: part of the memory
        """
        assert batch.sequences is not None and batch.memory is not None
        packing = packed(batch.sequences)
        before: Any = tuple(self.asarray(x[:, packing.numbers]).contiguous() for x in batch.memory[which])  # for cuDNN
        # cuDNN differentiates only what was computed in training mode, and not twice.
        of_torch = th.is_grad_enabled() and lstm.weight_hh_l0.is_cuda and not lstm.training
        with th.backends.cudnn.flags(enabled=False) if of_torch else nullcontext():
            said, after = lstm(PackedSequence(features[packing.rows], th.as_tensor(packing.sizes)), before)
        by_number = np.argsort(packing.numbers)
        return said.data[packing.back], tuple(x.detach().cpu().numpy()[:, by_number] for x in after)

    def _features(self, batch: Batch, extractor: Any) -> th.Tensor:
        return super(ActorCriticPolicy, self.policy).extract_features(batch.observations, extractor)  # type: ignore[arg-type]

    def _actor_latent(self, batch: Batch, features: Any = None) -> tuple[th.Tensor, Memory]:
        """Return the actor's last features of each sample, and the memory of its LSTM after each sequence."""
        policy = self.policy
        features = self._features(batch, policy.pi_features_extractor) if features is None else features
        latent, after = self._read(policy.lstm_actor, features, batch, slice(0, 2))
        return policy.mlp_extractor.forward_actor(latent), after

    def _critic_value(self, batch: Batch, features: Any = None) -> tuple[th.Tensor, Memory]:
        """Return V of each sample, (n, 1), and the memory of the critic's LSTM after each sequence."""
        policy = self.policy
        after: Memory = ()
        features = self._features(batch, policy.vf_features_extractor) if features is None else features
        if policy.lstm_critic is not None:
            latent, after = self._read(policy.lstm_critic, features, batch, slice(2, 4))
        elif policy.shared_lstm:  # which the critic does not move
            with th.no_grad():
                latent, _ = self._read(policy.lstm_actor, features, batch, slice(0, 2))
        else:
            latent = policy.critic(features)  # type: ignore[misc]  # there is one then
        return policy.value_net(policy.mlp_extractor.forward_critic(latent)), after

    def _both(self, batch: Batch) -> tuple[th.Tensor, th.Tensor, Memory]:
        """Return the actor's last features, V, and the memory after each sequence."""
        features = self.policy.extract_features(batch.observations)  # type: ignore[arg-type]
        of_actor, of_critic = (features, features) if self.policy.share_features_extractor else features
        latent, actor = self._actor_latent(batch, of_actor)
        value, critic = self._critic_value(batch, of_critic)
        return latent, value, (*actor, *(critic or actor))

    def _actor_outputs(self, batch: Batch) -> tuple[th.Tensor, ...]:
        return self._parameters(self.policy.action_net(self._actor_latent(batch)[0]), batch.masks)

    def _outputs(self, batch: Batch) -> tuple[tuple[th.Tensor, ...], th.Tensor]:
        latent, value, _ = self._both(batch)
        return self._parameters(self.policy.action_net(latent), batch.masks), value.flatten()

    def _values(self, batch: Batch) -> th.Tensor:
        return self._critic_value(batch)[0]

    def _made(self, latent: th.Tensor, batch: Batch) -> Distribution:
        with self._masking(batch.masks) as policy:
            return policy._get_action_dist_from_latent(latent)  # type: ignore[no-any-return]

    def _distribution(self, batch: Batch) -> Distribution:
        return self._made(self._actor_latent(batch)[0], batch)

    def _evaluated(self, batch: Batch) -> tuple[th.Tensor, th.Tensor, th.Tensor | None]:
        latent, value, _ = self._both(batch)
        distribution = self._made(latent, batch)
        return value, distribution.log_prob(batch.actions), distribution.entropy()  # type: ignore[arg-type]

    # Judge

    def row_batch(self, observations: Any, *more: Any) -> Batch:
        batch = super().row_batch(observations, *more)
        batch.observations = self._arranged(batch.observations)
        return batch

    @th.no_grad()
    def judged(self, batch: Batch) -> tuple[Any, Any, Memory]:
        choose_threads(len(batch) * self._largest_layer)
        latent, value, after = self._both(batch)
        if self._family is not None:
            outputs = self._parameters(self.policy.action_net(latent), batch.masks)
            log_prob: Any = self._family.log_prob(outputs, batch.actions)
        else:
            log_prob = self._made(latent, batch).log_prob(batch.actions)  # type: ignore[arg-type]
        return value.flatten().cpu().numpy(), log_prob.cpu().numpy(), after

    @th.no_grad()
    def values_of(self, batch: Batch) -> np.ndarray:
        values: np.ndarray = self._values(batch).flatten().cpu().numpy()
        return values

    # Step

    def pieces(self, batch: Batch) -> list[Any]:
        return [slice(None)]

    def actor(self, batch: Batch) -> "RecurrentActor":
        return RecurrentActor(self, batch)


class RecurrentActor(GraphActor):
    """The actor through its memory."""

    def _fisher(self, batch: Batch) -> Fisher:
        is_on_gpu = self._engine.policy.device.type == "cuda"
        with th.backends.cudnn.flags(enabled=False) if is_on_gpu else nullcontext():  # it has no second derivatives
            return super()._fisher(batch)

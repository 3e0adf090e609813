"""sb3-contrib's recurrent policies, and those derived from them, differentiated by torch.

Acting remembers the memory of each environment. Judging and stepping read whole stretches of episodes, side by side and
without padding, as torch's LSTM reads packed sequences; only the memory with which a stretch begins is kept.
"""

from contextlib import nullcontext
from typing import Any

import numpy as np
import torch as th
from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy
from stable_baselines3.common.distributions import Distribution
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.utils import obs_as_tensor
from torch.nn.utils.rnn import PackedSequence

from sb3_pg.common.arrays import length, take
from sb3_pg.common.batch import Batch
from sb3_pg.common.distributions import draw
from sb3_pg.common.engines.autograd import AutogradEngine, GraphActor, is_replaced
from sb3_pg.common.engines.protocol import Acted, Fisher, Judged, Seen
from sb3_pg.common.errors import ArgumentError
from sb3_pg.common.rollout import Rollout
from sb3_pg.common.sequences import Memory, at_starts, packed
from sb3_pg.common.threads import choose_threads

#: Methods that the engine has its own way of calling; a policy that changes one would not be computed as it says.
_REPLACED = ("forward", "evaluate_actions", "get_distribution", "predict_values", "_process_sequence")


class RecurrentEngine(AutogradEngine):
    """Acts step by step, judges and steps on whole sequences.

    Memory is hidden and cell state of the actor's LSTM, then of the critic's, (layers, n, size) each.

    :param policy: with LSTMs, or modules that are called like them
    :raises ArgumentError: the policy has another way to use its memory
    """

    policy: RecurrentActorCriticPolicy

    def __init__(self, policy: RecurrentActorCriticPolicy) -> None:
        for name in _REPLACED:
            if is_replaced(policy, RecurrentActorCriticPolicy, name):
                raise ArgumentError(f"{type(policy).__name__} has a `{name}` of its own, which is not supported.")
        super().__init__(policy)
        self.description = "recurrent, by autograd"

    def refresh(self) -> bool:
        is_fine = super().refresh()
        self._forward_acts, self._heads_are_cheap = False, False
        self._family = self.known_family()
        return is_fine

    # Act

    def act(self, seen: Seen, deterministic: bool = False) -> Acted:
        n = length(seen.observations)
        memory = self._memory(seen, n)
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
                with self._masking(batch.masks):
                    distribution = self.policy._get_action_dist_from_latent(latent)
                actions = distribution.get_actions(deterministic).cpu().numpy()
        return Acted(self._in_shape(actions), memory=(hidden, cell, *memory[2:]))

    def _memory(self, seen: Seen, n: int) -> Memory:
        """Return what is remembered of each environment; nothing where an episode begins, or if it does not fit."""
        memory, nothing = seen.memory, self._nothing(n)
        if memory is None or [x.shape for x in memory] != [x.shape for x in nothing]:
            return nothing
        return memory if seen.starts is None else at_starts(memory, seen.starts)

    def _nothing(self, n: int) -> Memory:
        layers, _, size = self.policy.lstm_hidden_state_shape
        return tuple(np.zeros((layers, n, size), np.float32) for _ in range(4))

    # The passes through the memory

    def _read(self, lstm: Any, features: th.Tensor, batch: Batch, which: slice) -> tuple[th.Tensor, Memory]:
        """Return what an LSTM says of each sample, and its memory after each sequence, in the order of their numbers.

        :param which: part of the memory
        """
        assert batch.sequences is not None and batch.memory is not None
        packing = packed(batch.sequences)
        before: Any = tuple(self.asarray(x[:, packing.numbers]) for x in batch.memory[which])
        said, after = lstm(PackedSequence(features[packing.rows], th.as_tensor(packing.sizes)), before)
        by_number = np.argsort(packing.numbers)
        return said.data[packing.back], tuple(x.detach().cpu().numpy()[:, by_number] for x in after)

    def _actor_latent(self, batch: Batch, features: Any = None) -> tuple[th.Tensor, Memory]:
        """Return the actor's last features of each sample, and the memory of its LSTM after each sequence."""
        policy = self.policy
        if features is None:
            extractor = policy.pi_features_extractor
            features = super(ActorCriticPolicy, policy).extract_features(batch.observations, extractor)  # type: ignore[arg-type]
        latent, after = self._read(policy.lstm_actor, features, batch, slice(0, 2))
        return policy.mlp_extractor.forward_actor(latent), after

    def _critic_value(self, batch: Batch, features: Any = None) -> tuple[th.Tensor, Memory]:
        """Return V of each sample, (n, 1), and the memory of the critic's LSTM after each sequence."""
        policy = self.policy
        after: Memory = ()
        if features is None:
            extractor = policy.vf_features_extractor
            features = super(ActorCriticPolicy, policy).extract_features(batch.observations, extractor)  # type: ignore[arg-type]
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
        with self._masking(batch.masks):
            return self.policy._get_action_dist_from_latent(latent)

    def _distribution(self, batch: Batch) -> Distribution:
        return self._made(self._actor_latent(batch)[0], batch)

    def _evaluated(self, batch: Batch) -> tuple[th.Tensor, th.Tensor, th.Tensor | None]:
        latent, value, _ = self._both(batch)
        distribution = self._made(latent, batch)
        return value, distribution.log_prob(batch.actions), distribution.entropy()  # type: ignore[arg-type]

    # Judge

    @th.no_grad()
    def judge(self, rollout: Rollout) -> Judged:
        stretches, n = rollout.stretches, rollout.n_steps
        number, n_stretches = stretches.numbers, len(stretches.level)
        starts, ends = self._nothing(n_stretches), self._nothing(n_stretches)
        first = np.flatnonzero(stretches.goes_on & (stretches.level == 0))
        if rollout.memory is not None:
            before = self._memory(Seen(rollout.last_observations, memory=rollout.memory), rollout.n_envs)
            for x, y in zip(starts, before, strict=True):
                x[:, first] = y[:, stretches.first[1][first]]
        values, log_probs = (np.empty(number.size, np.float32) for _ in range(2))
        columns = rollout.column("observations"), rollout.column("actions"), rollout.mask_rows()
        choose_threads(number.size * self._largest_layer)
        for level in range(int(stretches.level.max()) + 1):
            at = np.flatnonzero(stretches.level == level)
            if level:
                for x, y in zip(starts, ends, strict=True):
                    x[:, at] = y[:, at - 1]
            rows = np.flatnonzero((stretches.level == level)[number.ravel()])
            observations, actions, masks = (None if x is None else take(x, rows) for x in columns)
            batch = Batch(
                self._arranged(self._asarrays(observations)),
                self.actions(actions),  # type: ignore[arg-type]
                masks,
                number.ravel()[rows],
                starts,
            )
            value, log_prob, after = self._judged(batch)
            values[rows], log_probs[rows] = value, log_prob
            for x, y in zip(ends, after, strict=True):
                x[:, at] = y
        known, shape = rollout.n_known * rollout.n_envs, number.shape
        values[:known], log_probs[:known] = rollout.column("values")[:known], rollout.column("log_probs")[:known]
        return Judged(
            values.reshape(shape),
            log_probs.reshape(shape),
            self._final_values(rollout, number, ends),
            memory=tuple(x[:, number[n - 1]] for x in ends),
            starting_memory=starts,
        )

    def _judged(self, batch: Batch) -> tuple[Any, Any, Memory]:
        """Return V, log pi(a|s), and the memory after each sequence."""
        latent, value, after = self._both(batch)
        if self._family is not None:
            log_prob: Any = self._family.log_prob(
                self._parameters(self.policy.action_net(latent), batch.masks), batch.actions
            )
        else:
            log_prob = self._made(latent, batch).log_prob(batch.actions)  # type: ignore[arg-type]
        return value.flatten().cpu().numpy(), log_prob.cpu().numpy(), after

    def _final_values(self, rollout: Rollout, number: np.ndarray, ends: Memory) -> np.ndarray:
        """Return V of the observations after the last step, and of those at which an episode was cut."""
        cuts = np.array([number[cut.step, cut.env] for cut in rollout.cuts], dtype=int)
        memory = at_starts(tuple(x[:, number[-1]] for x in ends), rollout.last_dones)
        memory = tuple(np.concatenate([x, y[:, cuts]], axis=1) for x, y in zip(memory, ends, strict=True))
        observations = self._arranged(self._asarrays(rollout.final_observations))
        batch = Batch(observations, sequences=np.arange(memory[0].shape[1]), memory=memory)
        values: np.ndarray = self._values(batch).flatten().cpu().numpy()
        return values

    # Step

    def batch(self, rollout: Rollout, keep: np.ndarray | None = None) -> Batch:
        batch, numbers = super().batch(rollout, keep), rollout.stretches.numbers
        batch.sequences = numbers.ravel()[batch.rows]
        batch.memory = rollout.starting_memory or self._nothing(int(numbers.max()) + 1)
        return batch

    def pieces(self, batch: Batch) -> list[Any]:
        return [slice(None)]

    def thinned(self, batch: Batch, every: int) -> Any:
        """Return the rows of every n-th sequence."""
        sequences: Any = batch.sequences
        return np.flatnonzero(np.unique(sequences, return_inverse=True)[1] % every == 0)

    def actor(self, batch: Batch) -> "RecurrentActor":
        return RecurrentActor(self, batch)


class RecurrentActor(GraphActor):
    """The actor through its memory."""

    def _fisher(self, batch: Batch) -> Fisher:
        is_on_gpu = self._engine.policy.device.type == "cuda"
        with th.backends.cudnn.flags(enabled=False) if is_on_gpu else nullcontext():  # it has no second derivatives
            return super()._fisher(batch)

"""Language models of the Hugging Face library as SB3 policies: a token is an action. What all kinds have in common."""

import copy
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.distributions import CategoricalDistribution
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import Schedule
from torch.utils.checkpoint import checkpoint

from sb3_pg.common.archive.atomic import filling
from sb3_pg.common.archive.policy_files import SavedPolicy
from sb3_pg.common.errors import ArgumentError

try:
    import transformers  # noqa: F401  # for this line to tell that it is missing
except ImportError as error:
    raise ImportError("Language models need the extra `text`: pip install 'sb3_pg[text]'") from error

from sb3_pg.text.base import Base, can_be_named, fingerprint, from_elsewhere, n_bytes, name_of, read_base, require_same
from sb3_pg.text.checks import check_arguments, check_fit, check_reading, half_precision
from sb3_pg.text.decoding import Decoder, Memory
from sb3_pg.text.ends import Ends, check_tokenizer
from sb3_pg.text.generation import answers, ends_of, in_batches, required_tokenizer, settings_to_save
from sb3_pg.text.graphs import checkpointing, enable_checkpointing, graph_bytes, graph_room, release_memory
from sb3_pg.text.kept import KeptTokenizer
from sb3_pg.text.models import freeze, make_model, with_adapter
from sb3_pg.text.prompts import Prompt, are_texts, given_rows, listed_prompts
from sb3_pg.text.reference import ReferenceSettings, mix
from sb3_pg.text.rows import Piece, TokenRows
from sb3_pg.text.sequences import last_tokens
from sb3_pg.text.settings import checked_settings
from sb3_pg.text.spaces import Vocabulary, end_token_of, prompt_length_of
from sb3_pg.text.token_statistics import TokenStatistics
from sb3_pg.text.truncation import IMPOSSIBLE, Truncation

#: Tokens of one forward pass. More in a pass are not faster, and their activations would need more memory at once.
CHUNK_TOKENS = 1 << 13

#: Numbers in the logits of one chunk: 64 MB. With gradients the logits of the other chunks are computed again.
CHUNK_LOGITS = 1 << 24

#: Hidden states, (n, d), and the numbers of the observations that they are of, to numbers for each, (n, ...).
OfHidden = Callable[[th.Tensor, np.ndarray], tuple[th.Tensor, ...]]

#: Hidden states, and the head that makes logits of them: of the policy that decides which tokens may be chosen.
Deciding = tuple[th.Tensor, Any]


class LanguageModelPolicy(SavedPolicy, ActorCriticPolicy):
    """What both kinds of language model have in common: heads, temperature, reference, adapters, generation.

    Dropout is off throughout, since a log-probability must be the same whenever it is asked for.

    :param observation_space: rows of tokens, see :func:`sb3_pg.text.spaces.text_space`
    :param action_space: :class:`sb3_pg.text.spaces.Vocabulary`, or any ``Discrete`` for a model that knows its end
        token
    :param lr_schedule: learning rate as a function of the remaining progress
    :param model: folder or name of a pretrained model, or the configuration of a new one as a dictionary with
        "model_type" (what transformers' ``AutoConfig`` takes); None makes a small new one
    :param model_kwargs: arguments of ``from_pretrained``, such as ``gguf_file``
    :param temperature: divides the logits wherever probabilities are computed, the reference's too. Higher explores
        more
    :param top_k: choose among so many of the likeliest tokens only. Fewer are safer and explore less; None takes all.
        This and the next three hold wherever probabilities are computed, see :mod:`sb3_pg.text.truncation`
    :param top_p: among the likeliest ones that have this probability together. Lower is safer
    :param min_p: among those with at least this share of the likeliest one's probability. Higher is safer
    :param min_new_tokens: a response does not end before it has so many tokens. Higher forces longer ones
    :param lora: arguments of peft's ``LoraConfig``, such as ``{"r": 8}``; then only the adapter and the value head
        are trained, and the reference is the same model without the adapter. A higher rank can change more
    :param frozen_layers: so many of the lowest layers, and the token embeddings, are not trained. More are cheaper
    :param gradient_checkpointing: keep only what goes into each layer for the gradient, and compute the rest again.
        Takes a fraction of the memory and a third more time
    :param micro_batch_tokens: so many tokens, padding included, are read and differentiated at once, whatever the
        algorithm's ``batch_size``; the gradients are the same. Fewer take less memory, and reading a batch in parts
        takes a third more time. None takes as many as keep about 2 GB for the gradient, on a GPU a quarter of its
        memory that is free
    :param mask_truncated_completions: leave responses, of conversations single turns, that have reached the greatest
        length without their end out of the loss (DAPO's overlong filtering, Yu et al. 2025, section 3.4); they are
        still compared with others. False learns from them like from any
    :param reference_kl_coef: weight of the penalty for leaving the reference, which is the model as it was at the
        beginning, by default of ``log pi - log pi_ref``, taken from each token's reward. Higher stays nearer to it,
        lower earns more reward; 0 only logs the KL, None has no reference, which saves its memory
    :param reference_kl_target: nats per response; the weight, above 0, is then adapted after each rollout to keep the
        KL there (Ziegler et al. 2019, section 2.2). None keeps the weight
    :param reference_kl_in: where the penalty enters: "reward", each token's, or "loss" (GRPO), whose gradient is exact
        and which the reward's baseline does not see
    :param reference_kl_estimator: "k1", "k2" or "k3" (:func:`sb3_pg.common.objectives.kl_estimate`). None takes "k1" in
        the reward and "k3" in the loss, where "k1" is refused. In the loss "k2" has the gradient of KL(pi || pi_ref)
    :param ref_model_sync_steps: let the reference follow the policy after each so many updates. Fewer let the policy
        go further. None keeps it; refused with ``lora``
    :param ref_model_mixup_alpha: by which share of the way it follows, in (0, 1]; 1 copies the policy
    :param save_base: True has archives hold the pretrained weights that do not change: those under the adapter, or
        the reference's. False has them name folder or Hub name instead, where they must be when the archive is loaded
        (an adapter's) or goes on learning (a reference). Models that are neither are always held
    :param base: of archives: name and fingerprint of the pretrained model, see :mod:`sb3_pg.text.base`
    :param optimizer_class: of torch
    :param optimizer_kwargs: its arguments but the learning rate
    :param use_sde: only False, as SB3's algorithms pass it
    :raises ArgumentError: the model does not fit the spaces, or an argument cannot work
    """

    #: the configuration of ``model=None``
    small_config: dict[str, Any]
    #: transformers' class that makes the model
    auto_model: Any
    reference_kl_coef: th.Tensor
    #: updates since the reference has followed the policy, if it does
    reference_age: th.Tensor

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        lr_schedule: Schedule,
        model: str | Path | Mapping[str, Any] | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        min_new_tokens: int | None = None,
        lora: Mapping[str, Any] | None = None,
        frozen_layers: int = 0,
        gradient_checkpointing: bool = False,
        micro_batch_tokens: int | None = None,
        mask_truncated_completions: bool = False,
        reference_kl_coef: float | None = 0.05,
        reference_kl_target: float | None = None,
        reference_kl_in: str = "reward",
        reference_kl_estimator: str | None = None,
        ref_model_sync_steps: int | None = None,
        ref_model_mixup_alpha: float = 0.6,
        save_base: bool = False,
        base: Mapping[str, str] | None = None,
        optimizer_class: type[th.optim.Optimizer] = th.optim.Adam,
        optimizer_kwargs: dict[str, Any] | None = None,
        use_sde: bool = False,
    ) -> None:
        # Past ActorCriticPolicy's constructor, which would make perceptrons.
        super(ActorCriticPolicy, self).__init__(
            observation_space, action_space, optimizer_class=optimizer_class, optimizer_kwargs=optimizer_kwargs
        )
        if use_sde or not isinstance(action_space, spaces.Discrete):
            raise ArgumentError(f"A language model chooses tokens (Discrete actions, no gSDE), not {action_space}.")
        self._arguments: dict[str, Any] = {
            "model_kwargs": model_kwargs,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "min_p": min_p,
            "min_new_tokens": min_new_tokens,
            "lora": lora,
            "frozen_layers": frozen_layers,
            "gradient_checkpointing": gradient_checkpointing,
            "micro_batch_tokens": micro_batch_tokens,
            "reference_kl_coef": reference_kl_coef,
            "mask_truncated_completions": mask_truncated_completions,
            "reference_kl_target": reference_kl_target,
            "reference_kl_in": reference_kl_in,
            "reference_kl_estimator": reference_kl_estimator,
            "ref_model_sync_steps": ref_model_sync_steps,
            "ref_model_mixup_alpha": ref_model_mixup_alpha,
            "save_base": save_base,
        }
        check_arguments(self._arguments)
        self._arguments["model_kwargs"] = dict(model_kwargs or {})
        self._arguments["lora"] = None if lora is None else dict(lora)
        self.reference_settings = ReferenceSettings(
            reference_kl_coef,
            reference_kl_target,
            reference_kl_in,
            reference_kl_estimator,
            ref_model_sync_steps,
            ref_model_mixup_alpha,
            is_adapter=lora is not None,
        )
        self.prompt_length = prompt_length_of(observation_space)
        self.n_tokens = int(action_space.n)
        self.temperature = temperature
        self.mask_truncated_completions = mask_truncated_completions
        self.micro_batch_tokens = micro_batch_tokens
        self.reference_kl_target = reference_kl_target
        self.half_type: th.dtype | None = None
        self.graph_costs: dict[tuple[str, int], tuple[float, float]] = {}  # see graph_bytes
        self.use_sde = False
        self.share_features_extractor = True
        self.features_extractor = self.pi_features_extractor = self.vf_features_extractor = th.nn.Identity()  # type: ignore[assignment]
        self.action_dist = CategoricalDistribution(self.n_tokens)

        self.has_adapter, self.has_reference = False, reference_kl_coef is not None
        self.reference: Any = None
        self.base = None if base is None else Base(**base)
        self.language_model: Any = self._make_model(model, self.base if lora is not None else None)
        self.half_type = half_precision(self.language_model)
        self._check_fit()
        self.truncation = self._make_truncation(top_k, top_p, min_p, min_new_tokens)
        check_reading(self)
        self._prepare_to_train(model)
        trained = [p for p in self.parameters() if p.requires_grad]
        self.optimizer = optimizer_class(trained, lr=lr_schedule(1), **self.optimizer_kwargs)  # type: ignore[call-arg]
        self._decoder = Decoder(self)
        self.set_training_mode(False)
        graph_bytes(self, self.lm, 1)  # measured once

    # ------------------------------------------------------------------ setup

    @property
    def lm(self) -> Any:
        """The transformers model, with the adapter's layers in it if there is one."""
        return self.language_model.get_base_model() if self.has_adapter else self.language_model

    @property
    def end_tokens(self) -> list[int]:
        """The tokens that end a response: the environment's, or else the model's."""
        space = self.action_space
        return list(space.end_tokens) if isinstance(space, Vocabulary) else self.own_end_tokens

    @property
    def end_token(self) -> int:
        """The first of the tokens that end a response."""
        return self.end_tokens[0]

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """The texts that end a response which contains one: the environment's."""
        return self.action_space.stop_strings if isinstance(self.action_space, Vocabulary) else ()

    @property
    def ends(self) -> Ends:
        """All that ends a response.

        :raises ArgumentError: there are stop strings, but no tokenizer to look for them with
        """
        tokenizer = required_tokenizer(self) if self.stop_strings else self.tokenizer
        return Ends(tokenizer, tuple(self.end_tokens), self.stop_strings)

    @property
    def own_end_tokens(self) -> list[int]:
        """The tokens that end a text by the model's configurations."""
        own: list[int] = []
        for config in (self.lm.config, self.lm.generation_config):
            ends = None if config is None else config.eos_token_id
            own += [] if ends is None else ends if isinstance(ends, (list, tuple)) else [ends]
        return list(dict.fromkeys(int(end) for end in own))

    @property
    def response_length(self) -> int:
        """The most tokens of a response in the environment."""
        return int(self.observation_space.shape[0]) - self.prompt_length  # type: ignore[index]

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of transformers that texts are read and written with: the environment's; None if it has none.

        It can be set, where the environment has actions of a :class:`sb3_pg.text.spaces.Vocabulary`.

        :raises ArgumentError: it is set to one that has another number of tokens, or there is no Vocabulary
        """
        return self.action_space.tokenizer if isinstance(self.action_space, Vocabulary) else None

    @tokenizer.setter
    def tokenizer(self, tokenizer: Any) -> None:
        check_tokenizer(tokenizer)
        if not isinstance(self.action_space, Vocabulary):
            raise ArgumentError(f"A tokenizer belongs to actions of a Vocabulary, not {self.action_space}.")
        if len(tokenizer) != self.n_tokens:
            raise ArgumentError(f"`tokenizer` has {len(tokenizer)} tokens, but the policy {self.n_tokens}.")
        self.action_space.kept_tokenizer = KeptTokenizer(tokenizer)
        self._decoder.forget()  # prompts may be read in another way

    @property
    def hidden_size(self) -> int:
        """Numbers in a hidden state."""
        return int(self.value_head.in_features)

    def is_over(self, rows: Any) -> np.ndarray:
        """Return whether a response ends with an end token or has the greatest length, so that nothing follows, (n,).

        One that goes on after an end token is not over: it may be a conversation.
        """
        if isinstance(rows, TokenRows):
            last, length = rows.last, rows.length
        else:
            last, length = last_tokens(rows, self.prompt_length)
        over: np.ndarray = ((length > 0) & np.isin(last, self.end_tokens)) | (length == self.response_length)
        return over

    def _make_truncation(self, *arguments: Any) -> Truncation | None:
        """Return what narrows the distribution over tokens; None if nothing does."""
        if all(x is None for x in arguments):
            return None
        truncation = Truncation(tuple(self.end_tokens), *arguments)
        truncation.check_length(self.response_length)
        return truncation

    def _make_model(self, model: Any, base: Base | None = None) -> Any:
        """Return the model of the argument ``model``; None means a small new one for these spaces."""
        if model is None:
            end, width = end_token_of(self.action_space), self.observation_space.shape[0]  # type: ignore[index]
            model = {**self.small_config, "vocab_size": self.n_tokens, "eos_token_id": end, "bos_token_id": None}
            if model["model_type"] != "t5":
                model["max_position_embeddings"] = width
        return make_model(self.auto_model, model, self._arguments["model_kwargs"], base)

    def _prepare_to_train(self, model: Any) -> None:
        """Hold what is not trained, and give the model its adapter or its reference, and the value head.

        :param model: the argument
        """
        arguments = self._arguments
        if arguments["frozen_layers"]:
            freeze(self.language_model, arguments["frozen_layers"])
        if arguments["lora"] is not None:
            self.language_model = with_adapter(self.language_model, arguments["lora"])
            self.has_adapter = True
        elif self.has_reference and self.base is None:  # the base's is read when it is needed
            self.reference = copy.deepcopy(self.language_model).requires_grad_(False)
        self.base = self._known_base(model)
        if self.half_type is not None:  # steps of the optimizer are too small for it
            for p in self.language_model.parameters():
                p.data = p.data.float() if p.requires_grad else p.data
        if arguments["gradient_checkpointing"]:
            enable_checkpointing(self.lm)
        self.value_head = th.nn.Linear(self.lm.get_output_embeddings().in_features, 1)
        th.nn.init.zeros_(self.value_head.weight)
        th.nn.init.zeros_(self.value_head.bias)
        self.register_buffer("reference_kl_coef", th.tensor(arguments["reference_kl_coef"] or 0.0, dtype=th.float64))
        if arguments["ref_model_sync_steps"] is not None:
            self.register_buffer("reference_age", th.zeros((), dtype=th.int64))

    def _check_fit(self) -> None:
        """Refuse a model that cannot read this environment's tokens."""
        check_fit(self)

    def portable_kwargs(self, policy_kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return the policy's arguments with the model's configuration in place of its folder, and the base's name.

        A base that has been changed in memory is no longer what its name stands for: from then on archives hold it.
        """
        config = self.lm.config.to_dict()
        for name in ("quantization_config", "_name_or_path"):
            config.pop(name, None)
        config["dtype"] = str(self.half_type or th.float32).removeprefix("torch.")
        pretrained = self._pretrained()
        if self.base is not None and pretrained and fingerprint(pretrained) != self.base.fingerprint:
            self.base = None
        base = None if self.base is None else asdict(self.base)
        return {**policy_kwargs, "model": config, "model_kwargs": None, "base": base}

    @staticmethod
    def not_portable(policy_kwargs: dict[str, Any]) -> str | None:
        """Return which of the arguments would load a model, or code, from elsewhere; None if none would.

        A base is only read if it is here already, and only its weights, see :mod:`sb3_pg.text.base`.
        """
        return from_elsewhere(policy_kwargs)

    @staticmethod
    def n_elsewhere(policy_kwargs: dict[str, Any]) -> int:
        """Return how many numbers at most the constructor reads from elsewhere."""
        base = policy_kwargs.get("base")
        return n_bytes(base["name"]) if base and policy_kwargs.get("lora") else 0

    def _known_base(self, model: Any) -> Base | None:
        """Return what archives name in place of the pretrained weights, None if they hold them.

        :raises ArgumentError: the weights are not those of the base that an archive has named
        """
        pretrained, arguments = self._pretrained(), self._arguments
        if self.base is not None and pretrained:
            require_same(self.base, pretrained)
        is_held = arguments["save_base"] or not can_be_named(model, arguments["model_kwargs"], arguments["lora"])
        if self.base is not None or is_held or not pretrained:
            return self.base
        return Base(name_of(model), fingerprint(pretrained))

    def _pretrained(self) -> list[tuple[str, th.nn.Parameter]]:
        """Return the weights that never change: those under the adapter, or the reference's if they are there."""
        if self.has_adapter:
            return [(name, p) for name, p in self.lm.named_parameters() if not p.requires_grad]
        return [] if self.reference is None else list(self.reference.named_parameters())

    def _of_base(self, names: Iterable[str]) -> list[str]:
        """Return those names of the state that the base has, so that archives need not."""
        if self.base is None:
            return []
        if not self.has_adapter:
            return [name for name in names if name.startswith("reference.")]
        parameters = self.language_model.named_parameters(prefix="language_model", remove_duplicate=False)
        fixed = {name for name, p in parameters if not p.requires_grad}
        return [name for name in names if name in fixed]

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return torch's, without the weights of a base that archives name."""
        state = super().state_dict(*args, **kwargs)
        for name in self._of_base(list(state)):
            del state[name]
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Take a state as :meth:`state_dict` returns it; what it does not have of the base stays."""
        is_to_be_read = self.base is not None and not self.has_adapter and self.reference is None
        if is_to_be_read and any(name.startswith("reference.") for name in state_dict):
            self.reference = self._read_reference()
        whole = super().state_dict()
        own = {name: whole[name] for name in self._of_base(whole)}
        if not own.keys().isdisjoint(state_dict):
            self.base = None  # it may be no longer what its name stands for
        return super().load_state_dict({**own, **state_dict}, strict, assign)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return {
            "observation_space": self.observation_space,
            "action_space": self.action_space,
            "lr_schedule": self._dummy_schedule,
            "optimizer_class": self.optimizer_class,
            "optimizer_kwargs": self.optimizer_kwargs,
            **self.portable_kwargs(self._arguments),
        }

    def save_pretrained(self, folder: str | Path) -> None:
        """Write model, tokenizer and how to generate as transformers does; of a LoRA policy the adapter alone.

        ``AutoModelForCausalLM.from_pretrained(folder)`` reads it, an adapter with the base model that it names. An
        adapter of a base that is in no folder is written with it, as one model. Each file of the folder is replaced
        when it is whole.

        :raises OSError: naming ``folder``
        """
        lm = self.language_model
        if self.has_adapter and not lm.active_peft_config.base_model_name_or_path:
            lm = copy.deepcopy(lm).merge_and_unload()
        with filling(folder) as beside:
            lm.save_pretrained(beside)
            settings_to_save(self).save_pretrained(beside)
            if self.tokenizer is not None:
                self.tokenizer.save_pretrained(beside)

    def train(self, mode: bool = True) -> "LanguageModelPolicy":
        """Set the mode of everything but the language models, whose dropout stays off."""
        super().train(mode)
        self.language_model.eval()
        if self.reference is not None:
            self.reference.eval()
        return self

    @contextmanager
    def _the_reference(self) -> Iterator[Any]:
        if not self.has_adapter:
            if self.reference is None:
                self.reference = self._read_reference()
            yield self.reference
        else:
            with self.language_model.disable_adapter():
                yield self.lm

    def _read_reference(self) -> Any:
        """Return the base of a loaded policy, which is read when something is first compared with it."""
        assert self.base is not None
        config = copy.deepcopy(self.lm.config)
        config.dtype = self.half_type or th.float32
        reference = read_base(self.auto_model, config, self.base).requires_grad_(False).eval()
        require_same(self.base, reference.named_parameters())
        return reference.to(self.device)

    # ---------------------------------------------------------------- reading

    def read_prompts(self, rows: np.ndarray) -> np.ndarray:
        """Return prompts, (n, width) with -1 in empty columns, as the model reads them: as they are."""
        return rows

    @abstractmethod
    def read_sequences(self, lm: Any, rows: np.ndarray) -> th.Tensor:
        """Hidden states of whole rows, (n, length, d); those of a row begin in the first column."""

    @abstractmethod
    def place(self, prompt: np.ndarray, response: np.ndarray) -> np.ndarray:
        """Where in ``read_sequences`` rows end that see so many tokens of prompt and response, (n,)."""

    @abstractmethod
    def begin(self, rows: np.ndarray) -> tuple[th.Tensor, tuple[Memory, ...]]:
        """Hidden states at the last tokens, (n, d), and what to remember for ``proceed``."""

    @abstractmethod
    def proceed(self, memories: tuple[Memory, ...], tokens: th.Tensor) -> tuple[th.Tensor, tuple[Memory, ...]]:
        """Return the same after one more token in each row."""

    def hidden_states(self, observations: Any, lm: Any = None) -> th.Tensor:
        """Return the hidden state at the last token of each observation, (n, d), in one forward pass per sequence.

        :param observations: (n, prompt_length + response_length), in any order
        :param lm: the model that reads; by default the policy's
        """
        return self.by_pieces(observations, lambda hidden, _: (hidden,), lm)[0]

    def by_pieces(self, observations: Any, of_hidden: OfHidden, lm: Any = None) -> tuple[th.Tensor, ...]:
        """Return what a function makes of the hidden states of observations, (n, ...) each, piece by piece.

        Each sequence is read once, however many of the observations are parts of it. With gradients, if the graph of
        all would take more than ``graph_room``, each piece is read again when its gradient is asked for, so that the
        graph of only one is in memory.

        :param observations: as for ``hidden_states``
        :param of_hidden: takes hidden states and the numbers of their observations
        :param lm: the model that reads; by default the policy's
        """
        lm = self.lm if lm is None else lm
        rows = observations
        if not isinstance(rows, TokenRows):
            rows = TokenRows.of(to_rows(observations), self.prompt_length)
        if not len(rows):
            return of_hidden(th.empty(0, lm.get_output_embeddings().in_features, device=self.device), np.empty(0, int))

        def read(piece: Piece) -> tuple[th.Tensor, ...]:
            if in_parts:
                release_memory()
            with self.precision(), checkpointing(lm):
                states = self.read_sequences(lm, piece.sequences)
            place = np.stack([piece.source, self.place(piece.prompt, piece.response)])
            source, column = th.as_tensor(place, device=states.device)
            return of_hidden(states[source, column], piece.members)

        size = self.graph_tokens(lm, rows) if th.is_grad_enabled() else CHUNK_TOKENS
        in_parts, found, members = th.is_grad_enabled() and size < rows.n_tokens, [], []
        for piece in rows.pieces(min(size, CHUNK_TOKENS)):
            again = in_parts and len(piece.members) < len(rows)
            kept = {"use_reentrant": False, "preserve_rng_state": lm.training}  # for dropout
            made: Any = checkpoint(read, piece, **kept) if again else read(piece)
            found.append(made)
            members.append(piece.members)
        back = th.as_tensor(np.argsort(np.concatenate(members)), device=self.device)
        return tuple(th.cat(parts)[back] for parts in zip(*found, strict=True))

    def graph_tokens(self, lm: Any, rows: TokenRows) -> int:
        """Return how many tokens of such rows may be read in one graph."""
        if self.micro_batch_tokens is not None:
            return self.micro_batch_tokens
        length = rows.n_longest
        return max(1, int(graph_room(self.device) * length / graph_bytes(self, lm, length)))

    def precision(self) -> AbstractContextManager[Any]:
        """Compute in half precision in the block if the model is of it."""
        return nullcontext() if self.half_type is None else th.autocast(self.device.type, self.half_type)

    def logits(self, hidden: th.Tensor, lm: Any = None, head: Any = None) -> th.Tensor:
        """Scaled logits of the environment's tokens, (n, n_tokens), by default with the model's own head."""
        lm = self.lm if lm is None else lm
        config = lm.config
        if getattr(config, "scale_decoder_outputs", config.model_type == "umt5"):  # T5 with tied embeddings
            hidden = hidden * config.d_model**-0.5
        with self.precision():
            logits = (head or lm.get_output_embeddings())(hidden)[:, : self.n_tokens].float()
        if logits.shape[1] < self.n_tokens:  # tokens that the model does not have
            logits = th.nn.functional.pad(logits, (0, self.n_tokens - logits.shape[1]), value=IMPOSSIBLE)
        scaled: th.Tensor = logits if self.temperature == 1.0 else logits / self.temperature
        return scaled

    def values(self, hidden: th.Tensor) -> th.Tensor:
        """Return V at each hidden state, (n, 1)."""
        values: th.Tensor = self.value_head(hidden.float())
        return values

    def response_lengths(self, observations: Any) -> th.Tensor | None:
        """Return how many tokens each response has, (n,), which decides whether it may end; None if nothing is decided.

        :param observations: as for ``hidden_states``
        """
        if self.truncation is None:
            return None
        is_token_rows = isinstance(observations, TokenRows)
        lengths = observations.length if is_token_rows else last_tokens(to_rows(observations), self.prompt_length)[1]
        return th.as_tensor(lengths, device=self.device)

    def narrowed(
        self,
        logits: th.Tensor,
        lengths: th.Tensor | None,
        chosen: th.Tensor | None = None,
        deciding: Deciding | None = None,
    ) -> th.Tensor:
        """Return logits that are IMPOSSIBLE for tokens that may not be chosen.

        :param logits: (n, n_tokens)
        :param lengths: of the responses before the token, (n,); of no use where all tokens may be chosen
        :param chosen: the token that was, (n,), which is let through
        :param deciding: whose logits decide; by default these
        """
        if self.truncation is None:
            return logits
        assert lengths is not None, "which tokens may be chosen depends on the lengths of the responses"
        its = logits if deciding is None else self.logits(deciding[0], head=deciding[1])
        return logits.where(self.truncation.kept(its, lengths, chosen), IMPOSSIBLE)

    def _chunks(self, n: int) -> list[slice]:
        """Return which of so many hidden states to make logits of at a time."""
        size = max(1, CHUNK_LOGITS // self.n_tokens)
        return [slice(start, start + size) for start in range(0, n, size)]

    @th.no_grad()
    def action_log_prob(
        self,
        hidden: th.Tensor,
        actions: th.Tensor,
        lengths: th.Tensor | None = None,
        lm: Any = None,
        deciding: Deciding | None = None,
    ) -> th.Tensor:
        """Return the log-probability of each action, (n,), chunk by chunk and without gradients.

        :param hidden: states of the model ``lm``, by default the policy's
        :param lengths: see ``narrowed``, as ``deciding``
        """
        found = [hidden.new_empty(0, dtype=th.float32)]
        for some in self._chunks(len(hidden)):
            chosen = actions[some]
            logits = self.narrowed(self.logits(hidden[some], lm), *_some(some, lengths, chosen, deciding))
            found.append(logits.gather(1, chosen[:, None])[:, 0] - logits.logsumexp(dim=-1))
        return th.cat(found)

    def token_statistics(
        self,
        hidden: th.Tensor,
        actions: th.Tensor,
        lengths: th.Tensor | None = None,
        deciding: Deciding | None = None,
    ) -> tuple[th.Tensor, th.Tensor]:
        """Return log-probability of each action and entropy at each hidden state, (n,) each, chunk by chunk."""

        def statistics(some: slice) -> tuple[th.Tensor, th.Tensor]:
            chosen = actions[some]
            logits = self.narrowed(self.logits(hidden[some]), *_some(some, lengths, chosen, deciding))
            found: tuple[th.Tensor, th.Tensor] = TokenStatistics.apply(logits, chosen)  # type: ignore[no-untyped-call]
            return found

        chunks = self._chunks(len(hidden)) or [slice(0)]
        if len(chunks) == 1:
            return statistics(chunks[0])
        pieces = [
            checkpoint(statistics, some, use_reentrant=False) if th.is_grad_enabled() else statistics(some)
            for some in chunks
        ]
        log_probs, entropies = zip(*pieces, strict=True)
        return th.cat(log_probs), th.cat(entropies)

    # ------------------------------------------------------- what SB3 asks for

    def evaluate_actions(self, obs: Any, actions: th.Tensor) -> tuple[th.Tensor, th.Tensor, th.Tensor | None]:
        chosen, lengths = actions.long().flatten(), self.response_lengths(obs)

        def judged(hidden: th.Tensor, members: np.ndarray) -> tuple[th.Tensor, ...]:
            its = th.as_tensor(members)
            of_rows = None if lengths is None else lengths[its]
            return self.values(hidden), *self.token_statistics(hidden, chosen[its], of_rows)

        values, log_prob, entropy = self.by_pieces(obs, judged)
        return values, log_prob, entropy

    def predict_values(self, obs: Any) -> th.Tensor:
        return self.by_pieces(obs, lambda hidden, _: (self.values(hidden),))[0]

    def get_distribution(self, obs: Any) -> CategoricalDistribution:
        logits = self.narrowed(self.logits(self.hidden_states(obs)), self.response_lengths(obs))
        return CategoricalDistribution(self.n_tokens).proba_distribution(logits)

    def forward(self, obs: th.Tensor, deterministic: bool = False) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        hidden = self.hidden_states(obs)
        logits = self.narrowed(self.logits(hidden), self.response_lengths(obs))
        distribution = CategoricalDistribution(self.n_tokens).proba_distribution(logits)
        actions = distribution.get_actions(deterministic=deterministic)
        return actions, self.values(hidden), distribution.log_prob(actions)

    def predict(
        self,
        observation: Any,
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        """Return the next token of each row, as SB3's ``predict``.

        :raises ArgumentError: these are texts, which :meth:`generate` completes
        """
        if isinstance(observation, str) or are_texts(observation):
            raise ArgumentError("`predict` chooses one token for rows of tokens. Texts are for policy.generate(texts).")
        return super().predict(observation, state, episode_start, deterministic)

    def _predict(self, observation: Any, deterministic: bool = False) -> th.Tensor:
        rows = to_rows(observation)
        return self.choose(self._decoder.read(rows), deterministic, self.response_lengths(rows))

    def choose(self, hidden: th.Tensor, deterministic: bool = False, lengths: th.Tensor | None = None) -> th.Tensor:
        """Return a token for each hidden state, (n,): drawn, or the most likely one.

        :param lengths: of the responses so far, (n,), from ``response_lengths``
        """
        logits = self.narrowed(self.logits(hidden), lengths)
        if deterministic:
            return logits.argmax(dim=-1)
        # One random number a row, where torch's multinomial draws one for each token, which is most of its time.
        sums = th.softmax(logits, dim=-1).cumsum(dim=-1, dtype=th.float64)
        drawn = th.rand(len(sums), 1, dtype=th.float64, device=sums.device) * sums[:, -1:]
        return th.searchsorted(sums, drawn, right=True)[:, 0].clamp(max=self.n_tokens - 1)

    # -------------------------------------------------------------- reference

    @th.no_grad()
    def reference_log_prob(self, observations: Any, actions: Any) -> np.ndarray:
        """Return log-probability of each action under the reference, float32 (n,).

        Among the tokens that the policy chooses from, where these are not all: a model and its copy are the same then,
        and what the policy chooses has a finite log-probability.
        """
        chosen = th.as_tensor(actions, device=self.device).long().flatten()
        lengths = self.response_lengths(observations)
        own, head = None, self.lm.get_output_embeddings()
        if lengths is not None:
            own = self.hidden_states(observations)
            if self.has_adapter and any(p.requires_grad for p in head.parameters()):
                head = copy.deepcopy(head)  # which stays adapted

        def of_hidden(hidden: th.Tensor, members: np.ndarray) -> tuple[th.Tensor, ...]:
            its = th.as_tensor(members)
            if own is None or lengths is None:
                return (self.action_log_prob(hidden, chosen[its], lm=lm),)
            return (self.action_log_prob(hidden, chosen[its], lengths[its], lm, (own[its], head)),)

        with self._the_reference() as lm:
            (log_prob,) = self.by_pieces(observations, of_hidden, lm)
        return log_prob.cpu().numpy()

    def end_update(self) -> None:
        """Let the reference follow the policy, if it is time to."""
        settings = self.reference_settings
        if settings.sync_steps is None:
            return
        self.reference_age += 1
        if int(self.reference_age) >= settings.sync_steps:
            mix(self.reference, self.language_model, settings.mixup_alpha)
            self.reference_age.zero_()
            self.base = None  # it is no longer what its name stands for

    # ------------------------------------------------------------- generation

    def generation_settings(self, do_sample: bool) -> dict[str, Any]:
        """Return the settings with which transformers chooses as acting does."""
        own = {} if self.truncation is None else self.truncation.settings()
        if do_sample:
            return {"temperature": self.temperature, "top_k": 0, **own}  # transformers' own top_k is 50
        return {name: value for name, value in own.items() if name == "min_new_tokens"}

    @overload
    def generate(self, prompts: np.ndarray | th.Tensor, **settings: Any) -> np.ndarray: ...

    @overload
    def generate(self, prompts: Sequence[Prompt], **settings: Any) -> list[str]: ...

    @th.no_grad()
    def generate(self, prompts: Any, **settings: Any) -> Any:
        """Complete prompts by the model's own ``generate``: texts by texts, rows of tokens by rows of tokens.

        By the settings given here, and those that the policy acts by: what the model's ``generation_config`` has is for
        other uses.

        :param prompts: a list of texts, or of conversations (lists of messages) for the tokenizer's chat template, each
            as long as the model's window allows, or a data set's column of them; or prompts as the environment shows
            them, (n, prompt_length + response_length)
        :param settings: those of transformers' ``GenerationConfig``, or one as ``generation_config``. Greedy by
            default. Sampling: ``do_sample=True``, narrowed by ``top_k``, ``top_p``, ``min_p``; beam search:
            ``num_beams=4``; against repetition: ``repetition_penalty``, ``no_repeat_ngram_size``; several responses for
            each prompt, which then follow one another: ``num_return_sequences``; of texts also longer responses:
            ``max_new_tokens``. ``stop_strings`` and ``eos_token_id`` take the place of the environment's ends
        :return: n * num_return_sequences texts without the token that ends them, or as many rows of response tokens,
            empty columns -1, (n * num_return_sequences, response_length)
        :raises ArgumentError: there are texts or stop strings but no tokenizer, a text cannot be read, or a setting
            cannot work
        """
        self.set_training_mode(False)
        prompts, settings = listed_prompts(prompts), checked_settings(settings)
        if not are_texts(prompts):
            return in_batches(self, self._prompts_of(given_rows(prompts)), self.response_length, settings)
        return ends_of(self, settings).decode(answers(self, prompts, settings)) if len(prompts) else []

    def _prompts_of(self, rows: np.ndarray) -> np.ndarray:
        """Return the prompts of observations, or rows that are prompts alone as they are.

        :raises ArgumentError: they have another number of columns, so that part of a prompt would be passed over
        """
        width = self.prompt_length + self.response_length
        if rows.shape[1] not in (width, self.prompt_length):
            raise ArgumentError(
                f"`prompts` as rows of tokens must have {width} columns, as the environment's observations, or the "
                f"{self.prompt_length} of its prompts, not {rows.shape[1]}."
            )
        return rows[:, : self.prompt_length]

    @abstractmethod
    def skipped(self, n_prompt: int) -> int:
        """Columns of ``generate``'s output before the response."""


def check_policy(policy: Any) -> None:
    """Refuse what is not the policy of a language model.

    :raises ArgumentError: says what to pass
    """
    if not isinstance(policy, LanguageModelPolicy):
        advice = " Pass model.policy." if isinstance(policy, BaseAlgorithm) else ""
        raise ArgumentError(
            f"`policy` must be that of a language model (CausalLMPolicy, Seq2SeqLMPolicy), not a "
            f"{type(policy).__name__}.{advice}"
        )


def _some(
    some: slice, lengths: th.Tensor | None, chosen: th.Tensor, deciding: Deciding | None
) -> tuple[th.Tensor | None, th.Tensor, Deciding | None]:
    """Return the arguments of ``narrowed`` for some of the hidden states."""
    its = None if deciding is None else (deciding[0][some], deciding[1])
    return None if lengths is None else lengths[some], chosen, its


def to_rows(observations: Any) -> np.ndarray:
    """Observations as a NumPy array of integers.

    :raises ArgumentError: they are none
    """
    rows = observations.cpu().numpy() if isinstance(observations, th.Tensor) else np.asarray(observations)
    if rows.dtype.kind not in "iu":
        raise ArgumentError(
            f"A language model reads the numbers of tokens, which are integers, not {rows.dtype}. Around a text "
            "environment use VecNormalize(norm_obs=False), and no wrapper that changes observations."
        )
    return rows

"""A classifier of texts as a reward: sentiment, toxicity, or a reward model trained on preferences."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch as th
from stable_baselines3.common.utils import get_device
from torch.nn.utils.rnn import pad_sequence

from sb3_pg.common.errors import ArgumentError, check_choice, check_count
from sb3_pg.text.chat import check_template, is_chat, rendered
from sb3_pg.text.ends import check_tokenizer

#: Transformers' 1e30 of tokenizers that know of no greatest length is more.
_ANY_NUMBER = 1 << 31


class ClassifierReward:
    """Score completions by a sequence classification model of Hugging Face; no gradients, a batch at a time.

    A prompt of messages is read with its completion as one conversation, by the chat template of ``tokenizer``; a text
    with its completion behind it. What has no tokens, such as an empty completion alone, is read as an end token.

    :param model: the model, or folder or name of one
    :param tokenizer: of the model, with a padding token; None reads it from where ``model`` is read
    :param label: by name or number, whose score is the reward; None takes the only one, as reward models have it
    :param output: "logit" is unbounded, as trained reward models mean it; "probability" is from 0 to 1
    :param with_prompt: read prompt and completion; False reads the completion alone
    :param separator: stands between a prompt that is a text and its completion; " " where completions begin without a
        space, as those of a :func:`~sb3_pg.text.word_tokenizer` do
    :param batch_size: texts read at once. Fewer take less memory
    :param max_length: tokens of a text that are read, the last ones; None takes as many as model and tokenizer allow
    :param device: where the model is; "auto" takes a GPU if there is one
    :raises ArgumentError: the model has no such label, it or the tokenizer has no token for padding or another one, or
        the tokenizer cannot be had
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        label: str | int | None = None,
        output: str = "logit",
        with_prompt: bool = True,
        separator: str = "",
        batch_size: int = 16,
        max_length: int | None = None,
        device: th.device | str = "auto",
    ) -> None:
        check_count("batch_size", batch_size)
        check_choice("output", output, ("logit", "probability"))
        if max_length is not None:
            check_count("max_length", max_length)
        if isinstance(model, str | Path):
            model, tokenizer = _loaded(model, tokenizer)
        check_tokenizer(tokenizer)
        _check_model(model, tokenizer)
        self.device = get_device(device)
        self.model = model.eval().to(self.device)
        self.tokenizer: Any = copy.deepcopy(tokenizer)
        self.tokenizer.truncation_side = "left"  # the completion is at the end
        # Padding before a text would move it to other positions; but XLNet looks at the last column, whatever is there.
        side = "left" if getattr(model.config, "summary_type", None) == "last" else "right"
        self._padding: Any = {"batch_first": True, "padding_side": side}
        self.label = _number_of(model.config, label)
        self.output = output
        self.with_prompt = with_prompt
        self.separator = separator
        self.batch_size = batch_size
        self.max_length = max_length or min(_windows(self.model, tokenizer), default=None)

    def __call__(self, prompts: list[Any], completions: list[str], references: list[Any]) -> list[float]:
        """Return the score of each completion."""
        texts = completions
        if self.with_prompt:
            texts = [self._joined(prompt, text) for prompt, text in zip(prompts, completions, strict=True)]
        # Texts of like length together, so that little is padding.
        order = sorted(range(len(texts)), key=lambda number: len(texts[number]))
        scores = [0.0] * len(texts)
        for start in range(0, len(order), self.batch_size):
            numbers = order[start : start + self.batch_size]
            for number, score in zip(numbers, self._read([texts[i] for i in numbers]), strict=True):
                scores[number] = score
        return scores

    def _joined(self, prompt: Any, text: str) -> str:
        if not is_chat(prompt):
            return f"{prompt}{self.separator}{text}"
        check_template("Messages as prompts of a ClassifierReward", self.tokenizer)
        answer = {"role": "assistant", "content": text}
        return rendered(self.tokenizer, [*prompt, answer], add_generation_prompt=False)

    @th.no_grad()
    def _read(self, texts: Sequence[str]) -> list[float]:
        has_start = bool(self.tokenizer.bos_token) and all(text.startswith(self.tokenizer.bos_token) for text in texts)
        settings = {"truncation": self.max_length is not None, "max_length": self.max_length}
        tokens = self.tokenizer(list(texts), add_special_tokens=not has_start, **settings)["input_ids"]
        end, fill = self.tokenizer.eos_token_id, self.tokenizer.pad_token_id
        rows = [th.tensor(row or [fill if end is None else end], device=self.device) for row in tokens]
        ids = pad_sequence(rows, padding_value=fill, **self._padding)
        mask = pad_sequence([th.ones_like(row) for row in rows], **self._padding)
        logits = self.model(input_ids=ids, attention_mask=mask).logits.float()
        if self.output == "probability":
            alone = logits.shape[1] == 1 or self.model.config.problem_type == "multi_label_classification"
            logits = logits.sigmoid() if alone else logits.softmax(dim=-1)
        scores: list[float] = logits[:, self.label].cpu().tolist()
        return scores


def _loaded(model: str | Path, tokenizer: Any) -> tuple[Any, Any]:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    try:
        read: Any = AutoTokenizer
        tokenizer = read.from_pretrained(model) if tokenizer is None else tokenizer
        return AutoModelForSequenceClassification.from_pretrained(model), tokenizer
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise ArgumentError(f"`model` {str(model)!r} cannot be loaded as a classifier: {reason}") from error


def _check_model(model: Any, tokenizer: Any) -> None:
    config: Any = getattr(model, "config", None)
    if not isinstance(model, th.nn.Module) or not hasattr(config, "id2label"):
        raise ArgumentError(
            f"`model` must be a sequence classification model, or folder or name of one, not a {type(model).__name__}."
        )
    if tokenizer.pad_token_id is None:
        raise ArgumentError("`tokenizer` has no padding token: set tokenizer.pad_token, such as to its eos_token.")
    if config.pad_token_id is None:
        raise ArgumentError(
            "`model` does not know the padding token: set model.config.pad_token_id = tokenizer.pad_token_id."
        )
    if config.pad_token_id != tokenizer.pad_token_id:  # many look for it to find the end of a text
        raise ArgumentError(
            f"`tokenizer` pads with token {tokenizer.pad_token_id}, but the model takes {config.pad_token_id} for "
            "padding: set tokenizer.pad_token to the token that the model was trained with, or "
            "model.config.pad_token_id = tokenizer.pad_token_id."
        )


def _windows(model: Any, tokenizer: Any) -> list[int]:
    """Return how many tokens the model, and the tokenizer, allow in a text; none of those that allow any number."""
    window = getattr(model.config, "max_position_embeddings", None)
    if window is not None:
        embeddings = [its for name, its in model.named_modules() if name.endswith("position_embeddings")]
        padding = [getattr(its, "padding_idx", None) for its in embeddings]
        window -= max((index + 1 for index in padding if index is not None), default=0)  # RoBERTa's begin behind it
    return [n for n in (window, tokenizer.model_max_length) if n is not None and 0 < n < _ANY_NUMBER]


def _number_of(config: Any, label: str | int | None) -> int:
    """Return the number of a label.

    :raises ArgumentError: there is no such label, or none is given of several
    """
    names = dict(config.id2label)
    by_name = {str(name): int(number) for number, name in names.items()}
    if label is None and len(names) == 1:
        return 0
    if isinstance(label, str) and label in by_name:
        return by_name[label]
    if isinstance(label, int) and not isinstance(label, bool) and label in by_name.values():
        return label
    raise ArgumentError(f"`label` must be one of {', '.join(map(repr, by_name))}, or its number, not {label!r}.")

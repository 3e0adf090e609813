"""Prompts as they may be given, with all that belongs to each of them, and as tokens."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias, TypeGuard

import numpy as np
import torch as th

from sb3_pg.common.errors import ArgumentError
from sb3_pg.text.chat import Messages, check_messages, check_template, is_chat, rendered, tokens_of
from sb3_pg.text.ends import check_known
from sb3_pg.text.spaces import EMPTY

#: A text, or the messages of a conversation
Prompt: TypeAlias = str | Messages

#: Columns of a data set with a meaning of their own.
_OWN_COLUMNS = ("prompt", "reference", "completion")


class Prompts(NamedTuple):
    """What belongs together, one entry for each prompt."""

    prompts: list[Any]  #: all texts, or all lists of messages
    references: list[Any] | None  #: for rewards and metrics
    examples: list[Any] | None  #: for a supervised start
    columns: dict[str, list[Any]]  #: more, for rewards that ask for it


def are_texts(given: Any) -> TypeGuard[Sequence[Prompt]]:
    """Return whether these are texts or conversations, and no rows of tokens.

    :raises ArgumentError: it is one text or one conversation and no list of them
    """
    if isinstance(given, str):
        raise ArgumentError(f"Texts are given as a list: [{given[:60]!r}].")
    if isinstance(given, dict) or _is_conversation(given):
        raise ArgumentError("Conversations are given as a list of them: [[{'role': 'user', 'content': ...}], ...].")
    if isinstance(given, np.ndarray):
        return given.dtype.kind in "US"
    if not isinstance(given, list | tuple):
        return False
    is_text = [isinstance(x, str) or _is_conversation(x) for x in given]
    if any(is_text) and not all(is_text):
        raise ArgumentError(f"`prompts` must be texts or conversations, but prompt {is_text.index(False)} is neither.")
    return all(is_text)


def _is_conversation(x: Any) -> bool:
    return isinstance(x, list | tuple) and any(isinstance(message, dict) for message in x)


def _is_dataset(x: Any) -> bool:
    """Return whether something is a data set, and not a column of one, which is a sequence."""
    return type(x).__module__.partition(".")[0] == "datasets" and not isinstance(x, Sequence)


def listed_prompts(prompts: Any) -> Any:
    """Return prompts as a list where they are in a data set, a column of one, or anything else that gives them.

    :raises ArgumentError: they are none
    """
    if isinstance(prompts, np.ndarray | th.Tensor | str | Mapping | list | tuple):
        return prompts
    if _is_dataset(prompts):
        return read_prompts(prompts, None, None, None).prompts
    return _as_list("prompts", prompts)


def given_rows(prompts: Any) -> np.ndarray:
    """Return prompts that are no texts as rows of tokens, (n, columns).

    :raises ArgumentError: they are none
    """
    try:
        rows = prompts.cpu().numpy() if isinstance(prompts, th.Tensor) else np.asarray(prompts)
    except ValueError:  # lists of different lengths
        rows = np.array(None)
    if rows.ndim != 2 or rows.dtype.kind not in "iu":
        its = " ".join(repr(prompts).split())[:60]
        raise ArgumentError(
            f"`prompts` must be texts, conversations (lists of messages) or rows of tokens, integers, not {its}."
        )
    return rows


def prompt_rows(tokenizer: Any, prompts: Sequence[Prompt]) -> np.ndarray:
    """Return the tokens of prompts at the right end of rows, (n, tokens of the longest); empty columns are -1.

    :raises ArgumentError: see :func:`read_prompts` and :func:`encode_prompts`
    """
    return encode_prompts(tokenizer, read_prompts(list(prompts), None, None, None).prompts, None)


def read_prompts(prompts: Any, references: Any, examples: Any, columns: Mapping[str, Any] | None) -> Prompts:
    """Return prompts and what belongs to them as lists.

    :param prompts: texts, lists of messages, or a data set with a column "prompt" of either kind
    :raises ArgumentError: they are of another kind, empty, mixed, given twice, or not as many as the prompts
    """
    if _is_dataset(prompts):
        given = _of_dataset(prompts, references, examples, columns)
    else:
        if not isinstance(columns, Mapping | None):
            raise ArgumentError(f"`columns` must be a dictionary of lists by name, not {columns!r}.")
        named = {"prompts": prompts, "references": references, "examples": examples, **(columns or {})}
        lists = {name: _as_list(name, its) for name, its in named.items()}
        texts = lists.pop("prompts") or []
        given = Prompts(texts, lists.pop("references"), lists.pop("examples"), {k: x or [] for k, x in lists.items()})
    _check_kinds(given.prompts)
    for name, its in {"references": given.references, "examples": given.examples, **given.columns}.items():
        if its is not None and len(its) != len(given.prompts):
            raise ArgumentError(
                f"`{name}` must have one entry for each of the {len(given.prompts)} prompts, not {len(its)}."
            )
    return given


def _as_list(name: str, given: Any) -> list[Any] | None:
    if given is None and name != "prompts":
        return None
    if isinstance(given, str):
        raise ArgumentError(f"`{name}` must be a list of texts, not one text: {given[:60]!r}.")
    if isinstance(given, Mapping) or not hasattr(given, "__iter__"):
        its = " ".join(repr(given).split())[:60]
        also = ", of lists of messages, or a datasets.Dataset" if name == "prompts" else ""
        raise ArgumentError(f"`{name}` must be a list of texts{also}, not {type(given).__name__} {its}.")
    return list(given)


def _check_kinds(prompts: list[Any]) -> None:
    if not prompts:
        raise ArgumentError("`prompts` is empty: an episode begins with one of them.")
    if isinstance(prompts[0], Mapping) and "prompt" in prompts[0]:
        raise ArgumentError("`prompts` must be texts or conversations, not rows of a data set. Pass Dataset.from_list.")
    if isinstance(prompts[0], Mapping) and is_chat(prompts):
        raise ArgumentError("`prompts` must be a list of conversations, not the messages of one. Pass [messages].")
    chats = is_chat(prompts[0])
    for number, prompt in enumerate(prompts):
        if chats and not isinstance(prompt, str):
            check_messages(f"Prompt {number}", prompt)
        elif chats or not isinstance(prompt, str):
            kind = "lists of messages, as the first is" if chats else "texts"
            raise ArgumentError(f"`prompts` must be {kind}, but prompt {number} is {prompt!r}.")


def _of_dataset(data: Any, references: Any, examples: Any, columns: Any) -> Prompts:
    from datasets import Dataset

    kind = type(data).__name__
    if not isinstance(data, Dataset):
        splits = list(data) if isinstance(data, Mapping) else []
        advice = (
            f"Pass one of its splits, such as data[{splits[0]!r}]." if splits else "Read it into a datasets.Dataset."
        )
        raise ArgumentError(f"`prompts` must be a datasets.Dataset, not a {kind}. {advice}")
    names = ", ".join(map(repr, data.column_names))
    if "prompt" not in data.column_names:
        raise ArgumentError(f"`prompts` is a data set without a column 'prompt'; it has {names}. Rename one of them.")
    if any(given is not None for given in (references, examples, columns)):
        raise ArgumentError(
            "`references`, `examples` and `columns` come from the columns of the data set: leave them out, or pass the "
            "prompts as a list."
        )
    its = {name: list(data[name]) for name in data.column_names}
    completions = None
    if "completion" in its:
        completions = [x[-1]["content"] if is_chat(x) and x else x for x in its["completion"]]
    more = {name: values for name, values in its.items() if name not in _OWN_COLUMNS}
    return Prompts(its["prompt"], its.get("reference", completions), completions, more)


def encode_prompts(tokenizer: Any, prompts: list[Any], prompt_length: int | None) -> np.ndarray:
    """Return the tokens of prompts, int32 (n, prompt_length), each in the last columns of its row.

    :param prompt_length: columns; None takes those of the longest
    :raises ArgumentError: one has no tokens, too many, or words that the tokenizer does not know
    """
    if is_chat(prompts[0]):
        check_template("Messages as `prompts`", tokenizer)
        texts = [rendered(tokenizer, messages) for messages in prompts]
        tokens = [tokens_of(tokenizer, text) for text in texts]
    else:
        texts, tokens = prompts, _tokens_of_texts(tokenizer, prompts)
    for number, (text, ids) in enumerate(zip(texts, tokens, strict=True)):
        if not ids:
            raise ArgumentError(f"Prompt {number} ({text!r}) has no tokens.")
        check_known(tokenizer, f"Prompt {number}", text, ids)
    longest = max(range(len(tokens)), key=lambda number: len(tokens[number]))
    width = prompt_length or len(tokens[longest])
    if len(tokens[longest]) > width:
        raise ArgumentError(
            f"Prompt {longest} has {len(tokens[longest])} tokens, more than prompt_length={width}: "
            f"{texts[longest][:60]!r}. Shorten it or raise `prompt_length`."
        )
    rows = np.full((len(tokens), width), EMPTY, dtype=np.int32)
    for row, ids in zip(rows, tokens, strict=True):
        row[width - len(ids) :] = ids
    return rows


def _tokens_of_texts(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    tokens = tokenizer(texts, add_special_tokens=True)["input_ids"]
    end = tokenizer.eos_token_id
    # Tokenizers such as T5's end every text; a prompt that is to be continued must not be at its end. Encoders get it
    # back where they read: see Seq2SeqLMPolicy.read_prompts.
    tokens = [ids[:-1] if ids and ids[-1] == end and len(ids) > 1 else ids for ids in tokens]
    # And chat templates write the start token that the tokenizer adds, too.
    start = tokenizer.bos_token_id
    return [ids[1:] if start is not None and ids[:2] == [start, start] else ids for ids in tokens]


def shown(prompt: Prompt) -> str:
    """Return a prompt as one text for people."""
    return prompt if isinstance(prompt, str) else "\n".join(f"{its['role']}: {its['content']}" for its in prompt)

"""Texts as rows of tokens and back."""

from collections.abc import Sequence
from typing import Any, TypeGuard

import numpy as np

from sb3_pg.common.errors import ArgumentError
from sb3_pg.text.environment import check_known
from sb3_pg.text.spaces import EMPTY

#: A conversation, as chat templates take it: {"role": ..., "content": ...} each.
Messages = Sequence[dict[str, Any]]


def are_texts(given: Any) -> TypeGuard[Sequence[str | Messages]]:
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
    is_text = [
        isinstance(x, str) or (isinstance(x, list | tuple) and any(isinstance(y, dict) for y in x)) for x in given
    ]
    if any(is_text) and not all(is_text):
        raise ArgumentError(f"`prompts` must be texts or conversations, but prompt {is_text.index(False)} is neither.")
    return all(is_text)


def _is_conversation(x: Any) -> bool:
    return isinstance(x, list | tuple) and any(isinstance(message, dict) for message in x)


def prompt_rows(tokenizer: Any, prompts: Sequence[str | Messages]) -> np.ndarray:
    """Return the tokens of prompts at the right end of rows, (n, tokens of the longest); empty columns are -1.

    Conversations go through the tokenizer's chat template, up to where the answer begins.

    :raises ArgumentError: one has no tokens or words that the tokenizer does not know, or there is no chat template
    """
    texts = [prompt if isinstance(prompt, str) else _of_conversation(tokenizer, prompt) for prompt in prompts]
    end, start, tokens = tokenizer.eos_token_id, tokenizer.bos_token_id, []
    for number, ids in enumerate(tokenizer(texts, add_special_tokens=True)["input_ids"] if texts else []):
        if ids and ids[-1] == end and len(ids) > 1:  # T5's end every text
            ids = ids[:-1]
        if start is not None and ids[:2] == [start, start]:  # that of a chat template, and the tokenizer's
            ids = ids[1:]
        if not ids:
            raise ArgumentError(f"Prompt {number} ({texts[number]!r}) has no tokens.")
        check_known(tokenizer, f"Prompt {number}", texts[number], ids)
        tokens.append(ids)
    width = max(map(len, tokens), default=1)
    rows = np.full((len(tokens), width), EMPTY)
    for row, ids in zip(rows, tokens, strict=True):
        row[width - len(ids) :] = ids
    return rows


def _of_conversation(tokenizer: Any, messages: Messages) -> str:
    try:
        text: str = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template raises what it likes
        reason = " ".join(str(error).split())
        raise ArgumentError(f"The tokenizer's chat template cannot write the conversation: {reason}") from error
    return text


def texts_of(tokenizer: Any, responses: np.ndarray, end_tokens: Sequence[int]) -> list[str]:
    """Return the texts of responses, (n, length) with -1 in empty columns, without the tokens that end them.

    Other special tokens are shown: the model has written them.
    """
    tokens = [row[row != EMPTY].tolist() for row in responses]
    tokens = [ids[:-1] if ids and ids[-1] in end_tokens else ids for ids in tokens]
    texts: list[str] = tokenizer.batch_decode(tokens, skip_special_tokens=False)
    return texts

"""Conversations as tokens, by the chat template of a tokenizer."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from sb3_pg.common.errors import ArgumentError

#: {"role": ..., "content": ...}, as chat templates read it
Message: TypeAlias = Mapping[str, str]

#: A conversation
Messages: TypeAlias = Sequence[Message]

#: Stands for what the model writes, where only the template's own text around it is wanted.
_MARK = "@@the-model@@"


def is_chat(x: Any) -> bool:
    """Return whether something is meant as a list of messages."""
    return isinstance(x, list | tuple) and all(isinstance(message, Mapping) for message in x)


def check_form(what: str, messages: Any) -> None:
    """Check a conversation.

    :param what: the conversation is, for the error
    :raises ArgumentError: it has no messages, one of another form, or an empty one
    """
    if not is_chat(messages) or not messages:
        raise ArgumentError(f"{what} must be a list of messages with 'role' and 'content', not {messages!r}.")
    for message in messages:
        if not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise ArgumentError(f"{what} has the message {message!r}: 'role' and 'content' must be texts.")
        if not message["content"].strip():
            raise ArgumentError(f"{what} has an empty message of the role {message['role']!r}.")


def check_messages(what: str, messages: Any) -> None:
    """Check a conversation that the model is to answer.

    :raises ArgumentError: as :func:`check_form`, or the model itself had the last word
    """
    check_form(what, messages)
    if messages[-1]["role"] == "assistant":
        raise ArgumentError(
            f"{what} ends with a message of the assistant, so there is nothing to answer. Leave it out."
        )


def check_template(what: str, tokenizer: Any) -> None:
    """Refuse a tokenizer that does not know how to write a conversation.

    :param what: needs it, for the error
    """
    if tokenizer.chat_template is None:
        raise ArgumentError(
            f"{what} need a chat template, but the {type(tokenizer).__name__} has none. Use the tokenizer of a chat "
            "model, set tokenizer.chat_template, or write the conversation as one text."
        )


def rendered(tokenizer: Any, messages: Messages, add_generation_prompt: bool = True) -> str:
    """Return a conversation as the template writes it, by default up to where the model begins to write.

    :raises ArgumentError: the template does not take it
    """
    try:
        text: str = tokenizer.apply_chat_template(
            [dict(message) for message in messages], add_generation_prompt=add_generation_prompt, tokenize=False
        )
    except Exception as error:  # templates are programs
        roles = ", ".join(message["role"] for message in messages)
        raise ArgumentError(
            f"The chat template of the tokenizer does not take a conversation of {roles}: "
            f"{str(error).strip().partition(chr(10))[0]}"
        ) from error
    return text


def tokens_of(tokenizer: Any, text: str) -> list[int]:
    """Return the tokens of a text that a template has written: it has the start token already."""
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def after_turn(tokenizer: Any, messages: Messages = ()) -> list[int]:
    """Return the tokens with which a template ends a turn of the model, and goes on if there are more messages.

    :param messages: that answer the model; with the beginning of its next turn behind them
    """
    talk = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _MARK}, *messages]
    text = rendered(tokenizer, talk, add_generation_prompt=bool(messages))
    return tokens_of(tokenizer, text.rpartition(_MARK)[2].lstrip(" "))


def turn_end(tokenizer: Any) -> int | None:
    """Return the token with which the template ends a turn of the model; None if it is no token of its own."""
    tokens = after_turn(tokenizer)
    return tokens[0] if tokens and tokens[0] in tokenizer.added_tokens_decoder else None


def continuation(tokenizer: Any, messages: Messages, last: int) -> list[int]:
    """Return the tokens between a turn of the model and its next one.

    The model's own tokens stay as it has written them: a template may write them differently, or leave out a part.

    :param messages: that answer the turn
    :param last: the token with which the turn ended. If the template's own end is another, that is written behind it
    """
    tokens = after_turn(tokenizer, messages)
    return tokens[1:] if tokens[:1] == [last] else tokens

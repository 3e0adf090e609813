"""A tokenizer of whole words, made on the spot from the words of a task."""

from collections.abc import Iterable
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sb3_pg.common.errors import ArgumentError

#: In this order, so that their numbers are 0, 1 and 2, as T5's are.
SPECIAL = ("<pad>", "<end>", "<unknown>")

#: Who speaks, as tokens.
ROLES = ("<assistant>", "<system>", "<tool>", "<user>")

#: Each message as its role, its words and an end.
CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}> {{ message.content }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def word_tokenizer(words: Iterable[str], chat: bool = False) -> PreTrainedTokenizerFast:
    """Return a tokenizer whose tokens are these words, separated by spaces in a text.

    :param words: each becomes a token; in sorted order, without repetition or :data:`SPECIAL`
    :param chat: add a chat template and tokens for its roles: assistant, system, tool and user
    :raises ArgumentError: they are one text, or one is no word
    """
    if isinstance(words, str) and len(words.split()) > 1:
        raise ArgumentError(f"`words` must be a list of words, not one text: {words[:60]!r}. Pass text.split().")
    words = {*words, *ROLES} if chat else set(words)
    for word in words:
        if not isinstance(word, str) or word.split() != [word]:
            raise ArgumentError(f"`words` has {word!r}, which is no word: spaces separate them in texts.")
    vocabulary = {word: number for number, word in enumerate([*SPECIAL, *sorted(words.difference(SPECIAL))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unknown>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    kind: Any = PreTrainedTokenizerFast
    made: PreTrainedTokenizerFast = kind(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>", unk_token="<unknown>"
    )
    if chat:
        made.chat_template = CHAT_TEMPLATE
    return made


def digits(number: int) -> str:
    """Return a number as texts of the small tasks have it, each digit a word."""
    return " ".join(str(number))


def words_of(texts: Iterable[str]) -> set[str]:
    """Return the words that occur in some texts."""
    return {word for text in texts for word in text.split()}

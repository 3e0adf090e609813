"""A tokenizer of whole words, made on the spot from the words of a task."""

from collections.abc import Iterable
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

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

    :param words: each becomes a token; in sorted order, without repetition
    :param chat: add a chat template and tokens for its roles: assistant, system, tool and user
    """
    words = {*words, *ROLES} if chat else set(words)
    vocabulary = {word: number for number, word in enumerate([*SPECIAL, *sorted(words)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unknown>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    kind: Any = PreTrainedTokenizerFast
    made: PreTrainedTokenizerFast = kind(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>", unk_token="<unknown>"
    )
    if chat:
        made.chat_template = CHAT_TEMPLATE
    return made


def words_of(texts: Iterable[str]) -> set[str]:
    """Return the words that occur in some texts."""
    return {word for text in texts for word in text.split()}

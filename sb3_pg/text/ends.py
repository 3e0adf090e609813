"""What ends a response, and which text it is."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sb3_pg.common.errors import ArgumentError, is_whole
from sb3_pg.text.sequences import last_tokens, listed
from sb3_pg.text.spaces import EMPTY, Vocabulary, checked_strings


@dataclass(frozen=True)
class Ends:
    """The tokens and texts that end a response.

    :param tokenizer: that turns responses into texts
    :param tokens: that end a response, the tokenizer's own end token first
    :param strings: that end it when its text contains one. They stay in the text, as in transformers and TRL: the model
        has written them
    """

    tokenizer: Any
    tokens: tuple[int, ...]
    strings: tuple[str, ...] = ()

    @classmethod
    def of(cls, tokenizer: Any, end_tokens: Sequence[int | str], stop_strings: Sequence[str]) -> "Ends":
        """Make it of arguments.

        :raises ArgumentError: no tokenizer, one without an end token, ends that it does not know, or empty strings
        """
        check_tokenizer(tokenizer)
        if tokenizer.eos_token_id is None:
            raise ArgumentError("`tokenizer` has no end token (eos_token), so no response would ever end.")
        strings = checked_strings(stop_strings)
        if isinstance(end_tokens, str) or not isinstance(end_tokens, Sequence | np.ndarray):
            its = f"one text: {end_tokens!r}" if isinstance(end_tokens, str) else repr(end_tokens)
            raise ArgumentError(f"`end_tokens` must be a list of tokens, not {its}.")
        numbers = [tokenizer.eos_token_id, *(_number_of(tokenizer, end) for end in end_tokens)]
        return cls(tokenizer, tuple(dict.fromkeys(numbers)), strings)

    def with_token(self, token: int) -> "Ends":
        """Return the same with a token more."""
        return Ends(self.tokenizer, tuple(dict.fromkeys((*self.tokens, token))), self.strings)

    @property
    def vocabulary(self) -> Vocabulary:
        """The space of actions."""
        return Vocabulary(len(self.tokenizer), self.tokens[0], self.tokens[1:], self.tokenizer, self.strings)

    def is_end(self, tokens: Any) -> np.ndarray:
        """Return which tokens end a response."""
        return np.isin(tokens, self.tokens)

    def have_ended(self, responses: np.ndarray) -> np.ndarray:
        """Return which responses, (n, response_length), end with an end token or have a stop string, (n,)."""
        ended = self.is_end(last_tokens(responses, 0)[0])
        if self.strings:
            ended[~ended] = self._have_stopped(responses[~ended])
        return ended

    def _have_stopped(self, responses: np.ndarray) -> np.ndarray:
        """Return which responses have a stop string at their end, (n,)."""
        if not len(responses):
            return np.zeros(0, dtype=bool)
        # A token is at least one byte of the text, but for those that the tokenizer does not write.
        n = max(len(stop.encode()) for stop in self.strings) + 8
        texts = self.tokenizer.batch_decode([row[row != EMPTY][-n:].tolist() for row in responses])
        return np.array([any(stop in text for stop in self.strings) for text in texts])

    def decode(self, responses: np.ndarray) -> list[str]:
        """Return the texts of responses, (n, response_length), without the tokens that end them.

        Other special tokens, and stop strings, are shown: the model has written them.
        """
        return texts_of(self.tokenizer, responses, self.tokens)

    def cut(self, responses: np.ndarray) -> np.ndarray:
        """Return responses, (n, response_length), without what follows their first end."""
        is_end = self.is_end(responses)
        out: np.ndarray = np.where(np.cumsum(is_end, axis=1) > is_end, EMPTY, responses)
        for row in out if self.strings else ():
            length = int((row != EMPTY).sum())
            prefixes = np.where(np.tri(length, len(row), dtype=bool), row, EMPTY)  # environments look after each token
            stops = np.flatnonzero(self.have_ended(prefixes))
            row[stops[0] + 1 if len(stops) else len(row) :] = EMPTY
        return out


def texts_of(tokenizer: Any, responses: np.ndarray, end_tokens: Sequence[int]) -> list[str]:
    """Return the texts of responses, (n, length) with -1 in empty columns, without the tokens that end them.

    Other special tokens are shown: the model has written them.
    """
    tokens = [ids[:-1] if ids and ids[-1] in end_tokens else ids for ids in listed(responses)]
    texts: list[str] = tokenizer.batch_decode(tokens, skip_special_tokens=False)
    return texts


def _number_of(tokenizer: Any, end: int | str) -> int:
    number = tokenizer.convert_tokens_to_ids(end) if isinstance(end, str) else end
    if not is_whole(number) or number == tokenizer.unk_token_id or not 0 <= number < len(tokenizer):
        raise ArgumentError(f"`end_tokens` has {end!r}, which is not a token of the tokenizer.")
    return int(number)


def check_tokenizer(tokenizer: Any) -> None:
    """Refuse what is not a tokenizer, such as the name of one."""
    from transformers import PreTrainedTokenizerBase

    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        name = isinstance(tokenizer, str | Path)
        advice = f" Pass AutoTokenizer.from_pretrained({str(tokenizer)!r})." if name else ""
        raise ArgumentError(f"`tokenizer` must be a Hugging Face tokenizer, not {tokenizer!r}.{advice}")


def check_known(tokenizer: Any, what: str, text: str, tokens: list[int]) -> None:
    """Refuse a text with words that a tokenizer does not know, but for its own token for them.

    :param what: the text is, for the error
    :param tokens: of the text
    """
    unknown = tokenizer.unk_token_id
    if unknown in (None, tokenizer.eos_token_id, tokenizer.bos_token_id) or unknown not in tokens:
        return
    if tokenizer.unk_token in text:  # somebody quotes a model that has said it
        return
    words = [word for word in text.split() if unknown in tokenizer(word, add_special_tokens=False)["input_ids"]]
    raise ArgumentError(
        f"{what} ({text[:60]!r}) has what the tokenizer does not know: {', '.join(map(repr, words[:5])) or 'a token'}. "
        "Make the tokenizer of all texts, or leave such texts out."
    )

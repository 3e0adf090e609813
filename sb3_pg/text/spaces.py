"""The two spaces of a text environment, which tell a policy all that it has to know about the task."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from gymnasium import spaces

from sb3_pg.common.errors import ArgumentError, is_whole
from sb3_pg.text.kept import KeptTokenizer

#: A column of an observation in which no token stands. Not a token, so it cannot be mistaken for padding or an end.
EMPTY = -1


class Vocabulary(spaces.Discrete):
    """The tokens; one of them ends a response, or any of several.

    :param n: number of tokens
    :param end_token: number of the token that ends a response
    :param more_end_tokens: others that do, too
    :param tokenizer: whose tokens they are, so that a policy reads and writes texts
    :param stop_strings: texts that end a response when it contains one. Like the tokenizer they take no part in
        comparisons
    :raises ArgumentError: an end token is none of the tokens, or a stop string is no text or empty
    """

    #: of those that were pickled before there were any
    stop_strings: tuple[str, ...] = ()

    def __init__(
        self,
        n: int,
        end_token: int,
        more_end_tokens: Sequence[int] = (),
        tokenizer: Any = None,
        stop_strings: Sequence[str] = (),
    ) -> None:
        super().__init__(n)
        for end in (end_token, *more_end_tokens):
            if not is_whole(end) or not 0 <= end < n:
                raise ArgumentError(f"The end tokens of a Vocabulary must be numbers from 0 to {n - 1}, not {end!r}.")
        self.end_token = int(end_token)
        self.more_end_tokens = tuple(int(end) for end in more_end_tokens)
        self.kept_tokenizer = tokenizer if isinstance(tokenizer, KeptTokenizer) else KeptTokenizer(tokenizer)
        self.stop_strings = checked_strings(stop_strings)

    @property
    def tokenizer(self) -> Any:
        """The tokenizer; None if there is none."""
        return self.kept_tokenizer.live

    @property
    def end_tokens(self) -> tuple[int, ...]:
        """All tokens that end a response."""
        return self.end_token, *self.more_end_tokens

    def __repr__(self) -> str:
        more = f", more_end_tokens={self.more_end_tokens}" if self.more_end_tokens else ""
        more += f", stop_strings={self.stop_strings}" if self.stop_strings else ""
        return f"Vocabulary({self.n}, end_token={self.end_token}{more})"

    def __eq__(self, other: object) -> bool:
        if not super().__eq__(other):
            return False
        return not isinstance(other, Vocabulary) or set(other.end_tokens) == set(self.end_tokens)

    __hash__ = None  # type: ignore[assignment]  # as gymnasium's spaces


def end_token_of(space: spaces.Space[Any]) -> int | None:
    """Return the token that ends a response; None if the space does not say."""
    return space.end_token if isinstance(space, Vocabulary) else None


def checked_strings(stop_strings: Any) -> tuple[str, ...]:
    """Return texts that end a response.

    :raises ArgumentError: they are no list of texts, or one is empty
    """
    is_list = isinstance(stop_strings, list | tuple)
    if not is_list or not all(isinstance(stop, str) and stop for stop in stop_strings):
        raise ArgumentError(f"`stop_strings` must be a list of texts that are not empty, not {stop_strings!r}.")
    return tuple(stop_strings)


def vocabulary_of(state: dict[str, Any]) -> Vocabulary:
    """Return the space that an archive holds by its attributes."""
    kept = state.get("kept_tokenizer")
    if not isinstance(kept, KeptTokenizer | None):
        raise TypeError(f"a tokenizer that is a {type(kept).__name__}")
    more, strings = state.get("more_end_tokens", ()), state.get("stop_strings", ())
    return Vocabulary(int(state["n"]), int(state["end_token"]), more, kept, strings)


def text_space(prompt_length: int, response_length: int, n_tokens: int) -> spaces.Box:
    """Return one row of token numbers: the prompt at the right end of the first columns, the response in the rest.

    Any column may be empty but the last of the prompt, and that is how :func:`prompt_length_of` finds it.
    """
    low = np.full(prompt_length + response_length, EMPTY, dtype=np.int32)
    low[prompt_length - 1] = 0
    return spaces.Box(low, np.full_like(low, n_tokens - 1), dtype=np.int32)


def prompt_length_of(space: spaces.Space[Any]) -> int:
    """Return how many columns of an observation belong to the prompt.

    :raises ArgumentError: the space is not one of :func:`text_space`
    """
    if isinstance(space, spaces.Box) and np.issubdtype(space.dtype, np.integer) and len(space.shape) == 1:
        filled = np.flatnonzero(space.low == 0)
        if len(filled) == 1 and space.low.min() == EMPTY:
            return int(filled[0]) + 1
    raise ArgumentError(
        f"A language model reads rows of tokens as sb3_pg.text.TextEnv makes them, not observations of {space}."
    )

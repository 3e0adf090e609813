"""A tokenizer that travels with the space of its tokens, into archives too."""

import json
import zlib
from functools import cached_property
from typing import Any

from sb3_pg.common.errors import ArgumentError

#: Bytes that the text of a tokenizer may have. Llama 3's has 17 million.
LARGEST_TEXT = 1 << 28

#: What a tokenizer of the tokenizers library has beside its backend.
_ATTRIBUTES = ("chat_template", "padding_side", "truncation_side", "clean_up_tokenization_spaces", "model_max_length")


class KeptTokenizer:
    """A tokenizer that is copied and pickled as text, from which it is made again when it is asked for.

    The text is that of the tokenizers library with special tokens and chat template: data, nothing of which is run.
    Tokenizers that are written in Python ("slow") have no such text. They are there until the process ends.

    :param tokenizer: of transformers; None if there is only the text
    :param packed: the text, compressed
    :param closing: what :attr:`closing` is if the tokenizer is not there
    """

    def __init__(self, tokenizer: Any = None, packed: bytes | None = None, closing: int | None = None) -> None:
        self._live = tokenizer
        self._packed = packed
        self._closing = closing

    @property
    def live(self) -> Any:
        """The tokenizer; None for one that could not be kept.

        :raises ArgumentError: its text cannot be read
        """
        if self._live is None and self._packed is not None:
            self._live = _made_of(self._packed)
        return self._live

    @cached_property
    def closing(self) -> int | None:
        """The end token that the tokenizer writes behind every text, as T5's does; None if it writes none."""
        tokenizer = self.live
        if tokenizer is None:
            return self._closing
        bare, whole = (tokenizer("a", add_special_tokens=more)["input_ids"] for more in (False, True))
        end: int | None = tokenizer.eos_token_id
        return end if end is not None and whole[-len(bare) - 1 :] == [*bare, end] else None

    def __getstate__(self) -> dict[str, Any]:
        packed = self._packed if self._live is None else _packed(self._live)
        return {"packed": packed, "closing": self.closing if packed is None else None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._live, self._packed, self._closing = None, state["packed"], state.get("closing")

    def __deepcopy__(self, memo: dict[int, Any]) -> "KeptTokenizer":
        return self  # nobody changes it

    def __repr__(self) -> str:
        kind = type(self._live).__name__ if self._packed is None else f"{len(self._packed)} bytes"
        return f"KeptTokenizer({kind})"


def kept_tokenizer_of(state: dict[str, Any]) -> KeptTokenizer:
    """Return the tokenizer that an archive holds by its attributes."""
    packed, closing = state["packed"], state.get("closing")
    if not isinstance(packed, bytes | None) or not isinstance(closing, int | None):
        raise TypeError(f"a tokenizer of a {type(packed).__name__} and a {type(closing).__name__}")
    return KeptTokenizer(packed=packed, closing=closing)


def _packed(tokenizer: Any) -> bytes | None:
    """Return the text of a tokenizer, None if it has none."""
    if not tokenizer.is_fast:
        return None
    parts = {name: getattr(tokenizer, name) for name in _ATTRIBUTES}
    parts["special_tokens"] = {name: _plain(token) for name, token in tokenizer.special_tokens_map.items()}
    return zlib.compress(json.dumps({"tokenizer": tokenizer.backend_tokenizer.to_str(), **parts}).encode(), 1)


def _plain(token: Any) -> Any:
    return [str(its) for its in token] if isinstance(token, list | tuple) else str(token)


def _made_of(packed: bytes) -> Any:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    unpacking = zlib.decompressobj()
    try:
        text = unpacking.decompress(packed, LARGEST_TEXT)
        if unpacking.unconsumed_tail:
            raise ValueError(f"it has more than {LARGEST_TEXT} bytes")
        parts = json.loads(text)
        kind: Any = PreTrainedTokenizerFast
        return kind(
            tokenizer_object=Tokenizer.from_str(parts["tokenizer"]),
            **{name: _plain(token) for name, token in parts["special_tokens"].items()},
            **{name: parts[name] for name in _ATTRIBUTES},
        )
    except Exception as error:  # tokenizers raises plain exceptions
        raise ArgumentError(f"The tokenizer of the archive cannot be read ({type(error).__name__}: {error}).") from None

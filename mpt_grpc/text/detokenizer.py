"""Incrementally converts an output's tokens to text, handling incomplete characters and stop strings.

Streams use `TextAssembler`, which combines a `Detokenizer` (IDs to text) and `StopStrings` (where the text ends).
However the tokens are grouped, the pieces add up to the same text. docs/decisions/0001-detokenizer.md explains why
byte-level tokens do not go through `tokenizers.decoders.DecodeStream`.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from typing import Protocol

import tokenizers
from tokenizers.decoders import DecodeStream

MAX_HELD_TOKENS = 8
"""The most tokens that `DecodeStream` may hold back. An incomplete character has at most 3 bytes; more is garbage."""


class TextAssembler:
    """Assembles the text of one output.

    Tokens without text in the output, such as the end-of-sequence token that ended it, must not be fed.
    """

    def __init__(
        self,
        detokenizer: Detokenizer,
        stop_strings: Sequence[str] = (),
        include_stop_string: bool = False,
        min_new_tokens: int = 0,
    ) -> None:
        """A stop string that is completed by one of the first `min_new_tokens` tokens is ignored."""
        self._detokenizer = detokenizer
        self._stop_strings = StopStrings(stop_strings, include_stop_string)
        self._num_tokens_before_stops = min_new_tokens

    @property
    def stop_string(self) -> str | None:
        """The stop string that ended the output, if any."""
        return self._stop_strings.found

    @property
    def num_held(self) -> int:
        """The number of characters held back because a stop string may start with them."""
        return self._stop_strings.num_held

    def feed(self, token_id: int) -> str:
        """Adds the output's next token; returns the text that may be sent now, which is empty after a stop string."""
        text = self._detokenizer.feed(token_id)
        if not self._num_tokens_before_stops:
            return self._stop_strings.feed(text)
        self._num_tokens_before_stops -= 1
        return self._stop_strings.feed(text, ignores_stops=True)

    def finish(self) -> str:
        """Returns the text that was held back, after the last token; empty after a stop string."""
        ignores_stops = self._num_tokens_before_stops > 0
        return self._stop_strings.feed(self._detokenizer.flush(), ignores_stops) + self._stop_strings.flush()


class Detokenizer(Protocol):
    """Converts token IDs to text, one by one. Created by `Tokenizer.detokenizer`."""

    def feed(self, token_id: int) -> str:
        """Returns the text that this token completes; an incomplete character is held back."""
        ...

    def flush(self) -> str:
        """Returns the text of any tokens held back, after the last token."""
        ...


class ByteDetokenizer:
    """Detokenizer for byte-level BPE: joins the tokens' bytes and decodes them as UTF-8.

    It is exact, takes linear time, and holds back at most 3 bytes.
    """

    def __init__(self, token_bytes: Callable[[int], bytes], skipped: frozenset[int]) -> None:
        self._token_bytes = token_bytes
        self._skipped = skipped
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._is_inside_character = False

    def feed(self, token_id: int) -> str:
        if token_id in self._skipped:
            return ""
        piece = self._token_bytes(token_id)
        if not self._is_inside_character and piece.isascii():
            return piece.decode("ascii")  # ten times as fast, and most tokens are
        text = self._utf8.decode(piece)
        self._is_inside_character = self._utf8.getstate()[0] != b""
        return text

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


class StreamDetokenizer:
    """Detokenizer for all other tokenizers: wraps `DecodeStream` so that it never fails, stalls or loses the tail.

    For tokens that form complete characters, the text is exactly the tokenizer's. Otherwise, text already returned
    stands, even if the tokenizer would decode it differently in view of later tokens.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, skipped: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._skipped = skipped
        self._stream = DecodeStream()
        self._held: list[int] = []

    def feed(self, token_id: int) -> str:
        if token_id in self._skipped:
            return ""
        self._held.append(token_id)
        try:
            text = self._stream.step(self._tokenizer, token_id)
        except Exception:  # tokenizers raises no narrower class; this token would change text already returned
            return self.flush()
        if text is None:
            return self.flush() if len(self._held) == MAX_HELD_TOKENS else ""
        self._held.clear()
        return text

    def flush(self) -> str:
        text = self._tokenizer.decode(self._held, skip_special_tokens=False)
        self._stream = DecodeStream()
        self._held.clear()
        return text


class StopStrings:
    """Finds the first stop string completed in a growing text, and the longest if several end at the same place.

    Holds back the longest suffix of the text that is a prefix of a stop string, and nothing else. The result does not
    depend on how the text is split into pieces.
    """

    found: str | None
    """The stop string that was found; no text is returned after it."""

    def __init__(self, stop_strings: Sequence[str], include_stop_string: bool = False) -> None:
        assert all(stop_strings), "requests with an empty stop string are refused"
        self.found = None
        self._stop_strings = tuple(stop_strings)
        self._include = include_stop_string
        self._held = ""

    @property
    def num_held(self) -> int:
        """The number of characters held back."""
        return len(self._held)

    def feed(self, text: str, ignores_stops: bool = False) -> str:
        """Adds text; returns the text that may be sent now.

        With `ignores_stops`, stop strings that this text completes are ignored.
        """
        if self.found is not None:
            return ""
        if not self._stop_strings:
            return text
        num_old = len(self._held)
        text = self._held + text
        matches = [] if ignores_stops else self._find(text, num_old)
        if matches:
            end, start = min(matches)
            self.found = text[start:end]
            self._held = ""
            return text[: end if self._include else start]
        held_start = min((_possible_start(text, stop) for stop in self._stop_strings), default=len(text))
        self._held = text[held_start:]
        return text[:held_start]

    def _find(self, text: str, num_old: int) -> list[tuple[int, int]]:
        """Returns the end and start of each match that ends after the first `num_old` characters."""
        starts = ((text.find(stop, max(0, num_old - len(stop) + 1)), stop) for stop in self._stop_strings)
        return [(start + len(stop), start) for start, stop in starts if start != -1]

    def flush(self) -> str:
        """Returns the text that was held back, after the last text was fed."""
        text, self._held = self._held, ""
        return text


def _possible_start(text: str, stop: str) -> int:
    """Returns where the longest suffix of `text` that is a prefix of `stop` starts, or the text's length."""
    start = text.find(stop[0], max(0, len(text) - len(stop) + 1))
    while start != -1 and not stop.startswith(text[start:]):
        start = text.find(stop[0], start + 1)
    return len(text) if start == -1 else start

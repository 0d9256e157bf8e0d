"""Incrementally converts an output's tokens to text, handling incomplete characters and stop strings.

Streams use `TextAssembler`, which combines a `Detokenizer` (IDs to text) and `StopStrings` (where the text ends).
However the tokens are grouped, the pieces add up to the same text. docs/decisions/0001-detokenizer.md explains why
byte-level tokens do not go through `tokenizers.decoders.DecodeStream`.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from functools import lru_cache
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
    depend on how the text is split into pieces. Takes linear time, whatever the stop strings are.
    """

    found: str | None
    """The stop string that was found; no text is returned after it."""

    def __init__(self, stop_strings: Sequence[str], include_stop_string: bool = False) -> None:
        assert all(stop_strings), "requests with an empty stop string are refused"
        self.found = None
        self._stop_strings = tuple(stop_strings)
        self._prefixes: _Prefixes | None = None
        """Made when they are needed: they take a hundred times the memory of the strings."""
        self._include = include_stop_string
        self._held, self._node = "", 0
        """The text that is held back, and its node."""

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
        if (prefixes := self._prefixes) is None:
            prefixes = self._prefixes = _prefixes(self._stop_strings)
        node, num_old = self._node, len(self._held)
        if not node and prefixes.starts.isdisjoint(text):
            return text
        for num_new, character in enumerate(text, start=1):
            node = prefixes.next(node, character)
            if (length := prefixes.stop_lengths[node]) and not ignores_stops:
                text, end = self._held + text, num_old + num_new
                self.found = text[end - length : end]
                self._held = ""
                return text[: end if self._include else end - length]
        self._node = prefixes.incomplete(node)
        text = self._held + text
        held_start = len(text) - prefixes.lengths[self._node]
        self._held = text[held_start:]
        return text[:held_start]

    def flush(self) -> str:
        """Returns the text that was held back, after the last text was fed."""
        text, self._held = self._held, ""
        return text


class _Prefixes:
    """All prefixes of several strings, which are the nodes of a tree. Node 0 is the empty one.

    Each node is linked to its longest suffix that is a node, too: the automaton of Aho and Corasick,
    https://doi.org/10.1145/360825.360855.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self._children: list[dict[str, int]] = [{}]
        self.starts = self._children[0].keys()
        """The characters with which the strings start."""
        self.lengths = [0]
        self.stop_lengths = [0]
        """The length of the longest string that ends with the node; 0 without one."""
        for string in strings:
            self._add(string)
        self._suffixes = [0] * len(self.lengths)
        nodes = list(self._children[0].values())
        for node in nodes:  # grows meanwhile, so that shorter nodes come first
            for character, child in self._children[node].items():
                suffix = self._suffixes[child] = self.next(self._suffixes[node], character)
                self.stop_lengths[child] = self.stop_lengths[child] or self.stop_lengths[suffix]
                nodes.append(child)

    def _add(self, string: str) -> None:
        node = 0
        for length, character in enumerate(string, start=1):
            child = self._children[node].setdefault(character, len(self.lengths))
            if child == len(self.lengths):
                self._children.append({})
                self.lengths.append(length)
                self.stop_lengths.append(0)
            node = child
        self.stop_lengths[node] = len(string)

    def next(self, node: int, character: str) -> int:
        """Returns the longest node with which a text ends, given that before its last character."""
        while (child := self._children[node].get(character)) is None and node:
            node = self._suffixes[node]
        return child or 0

    def incomplete(self, node: int) -> int:
        """Returns the longest node with which a node ends and from which a string continues."""
        while node and not self._children[node]:
            node = self._suffixes[node]
        return node


@lru_cache(maxsize=16)
def _prefixes(strings: tuple[str, ...]) -> _Prefixes:
    """Returns the prefixes of strings, which all outputs of a request share."""
    return _Prefixes(strings)

"""From an output's tokens to its text while it grows. Owns the borders of characters and of stop strings.

`TextAssembler` is what a stream uses; it joins a `Detokenizer` (ids to text) and `StopStrings` (where the text ends).
However the tokens are grouped, the pieces add up to the same text. Why byte-level tokens do not go through
`tokenizers.decoders.DecodeStream` is told in docs/decisions/0001-detokenizer.md.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from typing import Protocol

import tokenizers
from tokenizers.decoders import DecodeStream

MAX_HELD_TOKENS = 8
"""How many tokens `DecodeStream` may hold; an unfinished character has at most 3 bytes, so more of them are garbage."""


class TextAssembler:
    """The text of one output. Tokens whose text is left out, such as the end mark that was met, are not fed."""

    def __init__(
        self,
        detokenizer: Detokenizer,
        stop_strings: Sequence[str] = (),
        include_stop_string: bool = False,
        min_new_tokens: int = 0,
    ) -> None:
        """A stop string that is complete within the first `min_new_tokens` does not count."""
        self._detokenizer = detokenizer
        self._stop_strings = StopStrings(stop_strings, include_stop_string)
        self._num_deaf = min_new_tokens

    @property
    def stop_string(self) -> str | None:
        """The stop string that was met; the output is then over."""
        return self._stop_strings.met

    @property
    def num_held(self) -> int:
        """Characters that are held back, because a stop string may begin with them."""
        return self._stop_strings.num_held

    def feed(self, token_id: int) -> str:
        """Adds the output's next token; returns what may be sent now. After a stop string nothing comes any more."""
        is_deaf, self._num_deaf = self._num_deaf > 0, max(0, self._num_deaf - 1)
        return self._stop_strings.feed(self._detokenizer.feed(token_id), is_deaf)

    def finish(self) -> str:
        """What was held back, once no token follows; nothing after a stop string."""
        return self._stop_strings.feed(self._detokenizer.flush(), self._num_deaf > 0) + self._stop_strings.flush()


class Detokenizer(Protocol):
    """Ids to text, token by token. Made by `Tokenizer.detokenizer`."""

    def feed(self, token_id: int) -> str:
        """The text that this token completes; an unfinished character is held back."""
        ...

    def flush(self) -> str:
        """The text of what was held back, once no token follows."""
        ...


class ByteDetokenizer:
    """For byte-level BPE: joins the tokens' bytes and decodes them as UTF-8. Exact, linear, holds 3 bytes at most."""

    def __init__(self, token_bytes: Callable[[int], bytes], skipped: frozenset[int]) -> None:
        self._token_bytes = token_bytes
        self._skipped = skipped
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, token_id: int) -> str:
        return "" if token_id in self._skipped else self._utf8.decode(self._token_bytes(token_id))

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


class StreamDetokenizer:
    """For every other kind: `DecodeStream`, kept from failing, from holding for ever and from losing the tail.

    Its text is the tokenizer's for tokens that make whole characters. Where they do not, what was told before stays
    as it was told, even if the tokenizer would by now decode it otherwise.
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
        except Exception:  # tokenizers raises no narrower class: this token would change text that was told
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
    """Finds the stop string that a growing text completes first; of those that end together, the longest.

    Holds back the longest end of the text that one of them may begin with, and nothing else. Does not depend on how
    the text is cut into pieces.
    """

    met: str | None
    """The stop string that was found; nothing comes out after it."""

    def __init__(self, stop_strings: Sequence[str], include_stop_string: bool = False) -> None:
        assert all(stop_strings), "an empty stop string is refused with the request"
        self.met = None
        self._stop_strings = tuple(stop_strings)
        self._include = include_stop_string
        self._held = ""

    @property
    def num_held(self) -> int:
        """Characters that are held back."""
        return len(self._held)

    def feed(self, text: str, is_deaf: bool = False) -> str:
        """Adds text; returns what may be sent now. Deaf, it passes over stop strings that this text completes."""
        if self.met is not None:
            return ""
        num_old = len(self._held)
        text = self._held + text
        found = [] if is_deaf else self._find(text, num_old)
        if found:
            end, start = min(found)
            self.met = text[start:end]
            self._held = ""
            return text[: end if self._include else start]
        border = min((_possible_start(text, stop) for stop in self._stop_strings), default=len(text))
        self._held = text[border:]
        return text[:border]

    def _find(self, text: str, num_old: int) -> list[tuple[int, int]]:
        """Ends and starts; a stop string within the first `num_old` characters was passed over before."""
        starts = ((text.find(stop, max(0, num_old - len(stop) + 1)), stop) for stop in self._stop_strings)
        return [(start + len(stop), start) for start, stop in starts if start != -1]

    def flush(self) -> str:
        """What was held back, once no text follows."""
        text, self._held = self._held, ""
        return text


def _possible_start(text: str, stop: str) -> int:
    """Where the longest end of `text` starts that is a beginning of `stop`; the text's length if none is."""
    start = text.find(stop[0], max(0, len(text) - len(stop) + 1))
    while start != -1 and not stop.startswith(text[start:]):
        start = text.find(stop[0], start + 1)
    return len(text) if start == -1 else start

"""Reads calls of tools out of an output's text while it grows.

The grammar that constrains the output (`grammar.py`) guarantees their form; only the end may be missing, if a limit cut
it off.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from mpt_grpc.conversation import ToolCall, ToolCalls
from mpt_grpc.text.tools import CALL_END, CALL_START

_HEAD = re.compile(r'\n\{"name": "([\w-]+)", "arguments": ', re.ASCII)
_HEAD_START = '\n{"name": "'
_TAIL = f"}}\n{CALL_END}"
_MAX_SPACE = 16
"""The most whitespace before a call that does not belong to the text."""


class ToolCallReader:
    """Splits the text of one output into plain text and calls. The result does not depend on how the text is split.

    Whitespace before a call, and the tags around it, belong to neither.
    """

    def __init__(self, constraint: ToolCalls, make_id: Callable[[int], str]) -> None:
        """`make_id` returns the ID of a call, given its index."""
        self._constraint, self._make_id = constraint, make_id
        self._read: Callable[[], bool] = self._read_text
        """Reads one part of the held text; returns whether another one may follow in what is left of it."""
        self._held = ""
        self._before_head = ""
        """What belongs to the text if no call follows: whitespace and the tag."""
        self._num_calls = 0
        self._nesting = _Nesting()
        self._text: list[str] = []
        self._calls: dict[int, ToolCall] = {}

    @property
    def has_complete_calls(self) -> bool:
        """Whether the text so far ends with a call whose arguments are complete."""
        return self._read in (self._read_tail, self._read_start)

    def feed(self, text: str) -> tuple[str, tuple[ToolCall, ...]]:
        """Adds text; returns the plain text and the parts of calls that are new."""
        self._held += text
        while self._read():
            pass
        plain, calls = "".join(self._text), tuple(self._calls.values())
        self._text, self._calls = [], {}
        return plain, calls

    def finish(self, *, is_cut_short: bool) -> str:
        """Returns the plain text that was held back, after all text was fed.

        Where the output may end, no call has just begun: what looks like the beginning of one is text.
        """
        if self._constraint.is_required:
            return ""
        if self._read == self._read_head and not is_cut_short and not self._num_calls:
            return self._before_head + self._held
        return self._held if self._read == self._read_text else ""

    def _read_text(self) -> bool:
        before, start, after = self._held.partition(CALL_START)
        beginning = self._held.lstrip()[: len(CALL_START)]
        if self._constraint.content is not None and not CALL_START.startswith(beginning):
            self._read = self._read_only_text
            return True
        if start:
            end = _end_of_text(before)
            self._text.append(before[:end])
            self._before_head = before[end:] + start
            self._held, self._read = after, self._read_head
            return True
        end = _start_of_tail(self._held)
        self._text.append(self._held[:end])
        self._held = self._held[end:]
        return False

    def _read_only_text(self) -> bool:
        self._text.append(self._held)
        self._held = ""
        return False

    def _read_head(self) -> bool:
        if (head := _HEAD.match(self._held)) is None:
            # Only another constraint lets such a text follow, and only at the beginning.
            is_call = self._held.startswith(_HEAD_START) or _HEAD_START.startswith(self._held)
            if not is_call:
                self._held, self._read = self._before_head + self._held, self._read_only_text
            return not is_call
        index = self._num_calls
        self._calls[index] = ToolCall(self._make_id(index), head[1], "", index)
        self._num_calls += 1
        self._held, self._read = self._held[head.end() :], self._read_arguments
        self._nesting = _Nesting()
        return True

    def _read_arguments(self) -> bool:
        length, is_complete = self._nesting.feed(self._held)
        index = self._num_calls - 1
        part = self._calls.get(index, ToolCall("", "", "", index))
        if length:
            self._calls[index] = part._replace(arguments=part.arguments + self._held[:length])
        self._held = self._held[length:]
        if is_complete:
            self._read = self._read_tail
        return is_complete

    def _read_tail(self) -> bool:
        if len(self._held) < len(_TAIL):
            return False
        self._held, self._read = self._held[len(_TAIL) :], self._read_start
        return True

    def _read_start(self) -> bool:
        _, start, after = self._held.partition(CALL_START)
        if start:
            self._held, self._read = after, self._read_head
        return bool(start)


class _Nesting:
    """Finds the end of a JSON object in a growing text."""

    def __init__(self) -> None:
        self._depth = 0
        self._is_in_string = self._is_escaped = False

    def feed(self, text: str) -> tuple[int, bool]:
        """Adds text; returns how much of it belongs to the object, and whether the object ends there."""
        for position, character in enumerate(text):
            if self._is_escaped:
                self._is_escaped = False
            elif self._is_in_string:
                self._is_escaped, self._is_in_string = character == "\\", character != '"'
            elif character == '"':
                self._is_in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if not self._depth:
                    return position + 1, True
        return len(text), False


def _start_of_tail(text: str) -> int:
    """Returns where the end of a text begins that may belong to a call: whitespace, then the beginning of its tag."""
    length = min(len(CALL_START) - 1, len(text))
    while length and not text.endswith(CALL_START[:length]):
        length -= 1
    return _end_of_text(text[: len(text) - length])


def _end_of_text(text: str) -> int:
    return max(len(text.rstrip()), len(text) - _MAX_SPACE)

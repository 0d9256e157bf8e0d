"""Keeps what callers write in a conversation from becoming special tokens: content is data.

A tokenizer turns the text of a special token, such as `<|im_end|>`, into that token, wherever it is. In the template's
own text that is right. In a message it would let its author end the turn and begin another one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from mpt_grpc.errors import FieldViolation, InvalidRequestError

_MARKS = [chr(code) for code in range(0xFDD0, 0xFDF0)]
"""Characters that Unicode reserves for internal use."""


class SpecialTexts:
    """An index of the texts of the special tokens, made once: looking one up does not depend on how many they are."""

    def __init__(self, texts: Collection[str]) -> None:
        self.pattern = re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))))
        self._starts = {text[:length] for text in texts for length in range(1, len(text))}
        self._ends = {text[length:] for text in texts for length in range(1, len(text))}
        self._all = "\0".join(texts)
        self._longest = max(map(len, texts), default=0)

    def may_be_formed_by(self, text: str) -> bool:
        """Whether a text contains one of these, or may complete one with what stands before or after it."""
        core = text.strip()
        if not core or not self._longest:
            return False
        if self.pattern.search(text) is not None or core in self._all:
            return True
        lengths = range(1, min(self._longest, len(core) + 1))
        return any(core[-length:] in self._starts or core[:length] in self._ends for length in lengths)


def literal_token_ids(
    render: Callable[[Callable[[str], str]], str],
    texts: Collection[str],
    special_texts: SpecialTexts,
    encode: Callable[[str], tuple[int, ...]],
) -> tuple[int, ...]:
    """Returns the tokens of a rendered conversation, in which special tokens come from the template only.

    render: returns the conversation after it has applied the given function to all that its caller wrote.
    texts: what the caller wrote.
    special_texts: the texts of the special tokens.
    encode: turns text into tokens, special ones included.

    Unless a special token would come from the caller, the tokens are those of the text as a whole. Otherwise the text
    is cut inside each such token's text, and its pieces are encoded.
    """
    plain = render(lambda text: text)
    if not any(map(special_texts.may_be_formed_by, texts)):
        return encode(plain)
    mark = _unused_mark(texts)
    marked = render(lambda text: _marked(text, special_texts, mark))
    if len(special_texts.pattern.findall(plain)) == len(special_texts.pattern.findall(marked)):
        return encode(plain)
    return tuple(token_id for piece in marked.split(mark) if piece for token_id in encode(piece))


def applied(function: Callable[[str], str], value: Any, *, to_names: bool = False) -> Any:
    """Returns a JSON value with the function applied to all of its strings; to the names of members if `to_names`."""
    if isinstance(value, str):
        return function(value)
    if isinstance(value, Mapping):
        members = ((name, applied(function, member, to_names=to_names)) for name, member in value.items())
        return {function(name) if to_names else name: member for name, member in members}
    if isinstance(value, list):
        return [applied(function, item, to_names=to_names) for item in value]
    return value


def strings(value: Any, *, with_names: bool = False) -> Iterator[str]:
    """Yields the strings of a JSON value; the names of members if `with_names`."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list):
        if with_names and isinstance(value, Mapping):
            yield from value
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from strings(item, with_names=with_names)


def _marked(text: str, special: SpecialTexts, mark: str) -> str:
    """Returns the text with a mark inside each special token's text, and at its ends if it may complete one there.

    The marks at the ends are inside of whitespace, which many templates remove.
    """
    if not special.may_be_formed_by(text):
        return text
    core = text.strip()
    start = text.index(core)
    pieces, position = [], 0
    while match := special.pattern.search(core, position):  # occurrences may overlap
        pieces.append(core[position : match.start() + 1])
        position = match.start() + 1
    pieces.append(core[position:])
    return f"{text[:start]}{mark}{mark.join(pieces)}{mark}{text[start + len(core) :]}"


def _unused_mark(texts: Collection[str]) -> str:
    for mark in _MARKS:
        if not any(mark in text for text in texts):
            return mark
    why = "contains all of Unicode's internal characters and the text of a special token: remove either"
    raise InvalidRequestError(FieldViolation("conversation.messages", why))

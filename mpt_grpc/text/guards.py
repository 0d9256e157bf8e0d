"""Guards, which check prompts and outputs on behalf of the server, and the built-in guard, a word list.

A guard may refuse a prompt or end an output. Text that it blocks is never sent, however the text is split into pieces.
Guards are selected in the settings and found through entry points. They run outside the engine, in any thread.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Protocol

import regex

from mpt_grpc.errors import SettingsError

_ENTRY_POINT_GROUP = "mpt_grpc.guards"
# How many characters of sent text are kept for patterns with a lookbehind.
_MAX_LOOKBEHIND = 256
_TIMEOUT_S = 1.0
_PIECE_CHARACTERS = 16_384
_WORD_BOUNDARIES = {
    r"\b": r"(?:(?<=\w)(?!\w)|(?<!\w)(?=\w))",
    r"\B": r"(?:(?<=\w)(?=\w)|(?<!\w)(?!\w))",
    r"\m": r"(?:(?<!\w)(?=\w))",
    r"\M": r"(?:(?<=\w)(?!\w))",
}
"""Word boundaries as lookarounds: in a partial match, `regex` evaluates the short forms as if no more text could
follow."""
_UNSUPPORTED = (r"\K", r"\G")
_ELEMENT = regex.compile(r"\\.|\[\^?\]?(?:\\.|\[:\w+:\]|[^\]\\])*\]|.", regex.DOTALL)
"""A pattern's syntax elements: escapes, character classes and single characters."""


class OutputWatch(Protocol):
    """Checks one output, whose text is fed in order."""

    @property
    def blocked(self) -> bool:
        """Whether the guard has blocked the text fed so far; no more text is returned then."""
        ...

    def feed(self, text: str) -> str:
        """Adds text; returns the text that may be sent now. Text that the guard may still block is held back."""
        ...

    def finish(self) -> str:
        """Ends the text: decides on the text held back, and returns the part of it that may be sent."""
        ...


class Guard(Protocol):
    """Checks prompts and outputs. It is shared by threads."""

    def refusal(self, prompt: str) -> str | None:
        """Returns the reason for refusing a prompt, or None to accept it.

        It is shown to the caller and logged, so it should not quote the prompt.
        """
        ...

    def watch(self) -> OutputWatch:
        """Returns a new watch for one output."""
        ...


def load_guards(wanted: Sequence[str]) -> tuple[Guard, ...]:
    """Loads guards given as `NAME` or `NAME=ARGUMENT`. Raises SettingsError."""
    return tuple(_load(*name.partition("=")[::2]) for name in wanted)


def watch_all(guards: Sequence[Guard]) -> OutputWatch:
    """Returns a watch that passes text through all guards in turn, each of which may end the output."""
    watches = tuple(guard.watch() for guard in guards)
    return watches[0] if len(watches) == 1 else _ChainedWatch(watches)


def word_list(path: str) -> Guard:
    """Returns the guard `words=FILE`.

    Each line of the file is a word, a phrase, or a /regular expression/; lines that start with # are comments. Words
    match only as whole words, and regardless of case. Raises SettingsError or OSError if the file cannot be used.
    """
    words, patterns = [], list[regex.Pattern[str]]()
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), start=1):
        entry = line.strip()
        if len(entry) > 1 and entry.startswith("/") and entry.endswith("/"):
            patterns.append(_checked(entry[1:-1], f"{path}, line {number}"))
        elif entry and not entry.startswith("#"):
            words.append(entry)
    if words:
        patterns.append(regex.compile(_any_of(words), regex.V1))
    if not patterns:
        raise SettingsError(f"{path}: no words in this file")
    return _WordList(patterns)


class _WordList:
    def __init__(self, patterns: Sequence[regex.Pattern[str]]) -> None:
        # Kept separate, because joining patterns would renumber their groups.
        self._patterns = patterns

    def refusal(self, prompt: str) -> str | None:
        watch = self.watch()
        # In pieces, because the time limit applies to each search and a prompt must not be refused for its length.
        for start in range(0, len(prompt), _PIECE_CHARACTERS):
            watch.feed(prompt[start : start + _PIECE_CHARACTERS])
        watch.finish()
        return "the prompt contains a word that this server does not accept" if watch.blocked else None

    def watch(self) -> OutputWatch:
        return _PatternWatch(self._patterns)


class _PatternWatch:
    """Holds back text from the first place where a match starts that more text could complete, extend or rule out.

    A match is final once any text follows it, so a negative lookahead sees only the text fed up to then. A search that
    takes longer than a second blocks the output: text that cannot be checked is not sent.
    """

    def __init__(self, patterns: Sequence[regex.Pattern[str]]) -> None:
        self._patterns = patterns
        self._text = ""
        """The end of the text already sent, followed by the text held back."""
        self._start = 0
        """The offset in `_text` of the text held back."""
        self.blocked = False

    def feed(self, text: str) -> str:
        if self.blocked:
            return ""
        self._text += text
        return self._release(self._find(is_last=False))

    def finish(self) -> str:
        return "" if self.blocked else self._release(self._find(is_last=True))

    def _find(self, is_last: bool) -> int:
        """Returns the offset of the first character that may not be sent yet, or ever; sets `blocked`."""
        try:
            found = [match for pattern in self._patterns if (match := self._earliest(pattern, is_last)) is not None]
        except TimeoutError:
            self.blocked = True
            return self._start
        if not found:
            return len(self._text)
        start = min(match.start() for match in found)
        self.blocked = any(
            is_last or (not match.partial and match.end() < len(self._text))
            for match in found
            if match.start() == start
        )
        return start

    def _earliest(self, pattern: regex.Pattern[str], is_last: bool) -> regex.Match[str] | None:
        """Returns the leftmost match, or partial match unless this is the last text."""
        match = pattern.search(self._text, self._start, partial=not is_last, timeout=_TIMEOUT_S)
        if match is None or is_last or match.partial:
            return match
        # A search prefers a complete match to an earlier partial one.
        before = range(self._start, match.start())
        earlier = (pattern.match(self._text, at, partial=True, timeout=_TIMEOUT_S) for at in before)
        return next((found for found in earlier if found is not None), match)

    def _release(self, end: int) -> str:
        """Returns the held text up to `end`; keeps enough of the sent text for lookbehinds."""
        released = self._text[self._start : end]
        kept_start = max(0, end - _MAX_LOOKBEHIND)
        self._text, self._start = self._text[kept_start:], end - kept_start
        return released


class _ChainedWatch:
    def __init__(self, watches: Sequence[OutputWatch]) -> None:
        self._watches = watches

    @property
    def blocked(self) -> bool:
        return any(watch.blocked for watch in self._watches)

    def feed(self, text: str) -> str:
        return self._filter(text, is_last=False)

    def finish(self) -> str:
        return self._filter("", is_last=True)

    def _filter(self, text: str, is_last: bool) -> str:
        if self.blocked:
            return ""
        for watch in self._watches:
            text = watch.feed(text)
            if is_last and not watch.blocked:
                text += watch.finish()
            is_last = is_last or watch.blocked  # later guards get no more text once one has blocked
        return text


def _load(name: str, argument: str) -> Guard:
    found = {entry.name: entry for entry in entry_points(group=_ENTRY_POINT_GROUP)}
    if name not in found:
        installed = ", ".join(sorted(found)) or "none"
        raise SettingsError(f"--guard: unknown guard {name!r}; installed guards: {installed}")
    try:
        guard: Guard = found[name].load()(argument)
    except Exception as error:  # a guard is third-party code and may fail in any way
        raise SettingsError(f"--guard: cannot create {name} with the argument {argument!r}: {error}") from error
    return guard


def _any_of(words: Sequence[str]) -> str:
    """Returns a pattern that matches any of these words and phrases as a whole.

    It groups them by first letter, so that only a few are tried at each position.
    """
    rests = defaultdict(list)
    for word in words:
        rests[_escaped(word[0])].append(r"\s+".join(map(_escaped, regex.split(r"\s+", word[1:]))))
    alternatives = "|".join(f"{first}(?:{'|'.join(rest)})" for first, rest in rests.items())
    # Not \b, which would require a word character: an entry may begin or end with a different one.
    return rf"(?i:(?<!\w)(?:{alternatives})(?!\w))"


def _escaped(text: str) -> str:
    return regex.escape(text, special_only=True)


def _checked(source: str, place: str) -> regex.Pattern[str]:
    elements = _ELEMENT.findall(source)
    if any(element in _UNSUPPORTED for element in elements) or regex.search(r"\{[^{}]*[eids][^{}]*\}", source):
        why = "they depend on how the text is split into pieces"
        raise SettingsError(f"{place}: \\K, \\G and fuzzy matches are not supported because {why}")
    try:
        regex.compile(source, regex.V1)  # checked first, because its errors refer to positions in the user's pattern
        pattern = regex.compile("".join(_WORD_BOUNDARIES.get(e, e) for e in elements), regex.V1)
    except regex.error as error:
        raise SettingsError(f"{place}: invalid regular expression: {error}") from error
    if pattern.search("") is not None:
        raise SettingsError(f"{place}: the pattern must not match empty text")
    return pattern

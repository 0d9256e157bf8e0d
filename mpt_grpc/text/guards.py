"""Guards: what watches prompts and outputs on the server's behalf, and the built-in one, a list of words.

A guard may refuse a prompt, or end an output; what it objects to is never sent, wherever the text is cut into pieces.
Guards are named by the settings and found by entry points. They run beside the engine, in any thread.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Protocol

import regex

from mpt_grpc.errors import SettingsError

ENTRY_POINT_GROUP = "mpt_grpc.guards"
# Told text is kept so far back for a pattern that looks at what stands before it.
_MAX_LOOKBEHIND = 256
_TIMEOUT_S = 1.0
_PIECE_CHARACTERS = 16_384


class OutputWatch(Protocol):
    """One output under a guard's eyes; its text is fed in order."""

    @property
    def blocked(self) -> bool:
        """Whether the guard objects to what was fed; nothing comes out any more."""
        ...

    def feed(self, text: str) -> str:
        """Adds text; returns what may be sent now. What the guard may still object to is held back."""
        ...

    def finish(self) -> str:
        """No text follows: decides on what was held back, and returns what of it may be sent."""
        ...


class Guard(Protocol):
    """Watches prompts and outputs; threads share it."""

    def refusal(self, prompt: str) -> str | None:
        """Why a prompt is refused, in words that the caller may see; None if it is not."""
        ...

    def watch(self) -> OutputWatch:
        """The watch of one output."""
        ...


def load_guards(wanted: Sequence[str]) -> tuple[Guard, ...]:
    """The guards of these names, each with the argument that stands after a `=`. Raises SettingsError."""
    return tuple(_load(*name.partition("=")[::2]) for name in wanted)


def watch_all(guards: Sequence[Guard]) -> OutputWatch:
    """A watch by several guards: text passes them in turn, and each may end the output."""
    watches = tuple(guard.watch() for guard in guards)
    return watches[0] if len(watches) == 1 else _ChainedWatch(watches)


def word_list(path: str) -> Guard:
    """The guard `words=FILE`: one word or phrase a line, or a /regular expression/; lines with # are comments.

    A word is met whole and in any case. Raises SettingsError or OSError for a file that cannot be used.
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
        raise SettingsError(f"{path}: it has no words")
    return _WordList(patterns)


class _WordList:
    def __init__(self, patterns: Sequence[regex.Pattern[str]]) -> None:
        # Each by itself: joined, a pattern's numbered groups would be others.
        self._patterns = patterns

    def refusal(self, prompt: str) -> str | None:
        watch = self.watch()
        # In pieces: the time limit is that of a search, and shall not refuse a prompt because it is long.
        for start in range(0, len(prompt), _PIECE_CHARACTERS):
            watch.feed(prompt[start : start + _PIECE_CHARACTERS])
        watch.finish()
        return "the prompt has a word that this server does not take" if watch.blocked else None

    def watch(self) -> OutputWatch:
        return _PatternWatch(self._patterns)


class _PatternWatch:
    """Holds back text from where a match may begin that more text could complete, extend or refute, and nothing else.

    A match is decided once text stands behind it; a pattern that forbids what follows sees no more than was fed by
    then. A search that takes longer than a second blocks: what cannot be judged is not sent.
    """

    def __init__(self, patterns: Sequence[regex.Pattern[str]]) -> None:
        self._patterns = patterns
        self._text = ""
        """What is held, behind the end of what was sent."""
        self._start = 0
        """Where what is held begins in it."""
        self.blocked = False

    def feed(self, text: str) -> str:
        if self.blocked:
            return ""
        self._text += text
        return self._pass(self._find(is_last=False))

    def finish(self) -> str:
        return "" if self.blocked else self._pass(self._find(is_last=True))

    def _find(self, is_last: bool) -> int:
        """Where what may not be sent begins, now or at all; sets `blocked`."""
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
        """The leftmost place where a match is or, unless this is the last text, could come to be."""
        match = pattern.search(self._text, self._start, partial=not is_last, timeout=_TIMEOUT_S)
        if match is None or is_last or match.partial:
            return match
        # A search prefers a whole match to an earlier one that is not whole yet.
        before = range(self._start, match.start())
        earlier = (pattern.match(self._text, at, partial=True, timeout=_TIMEOUT_S) for at in before)
        return next((found for found in earlier if found is not None), match)

    def _pass(self, end: int) -> str:
        passed = self._text[self._start : end]
        kept = max(0, end - _MAX_LOOKBEHIND)
        self._text, self._start = self._text[kept:], end - kept
        return passed


class _ChainedWatch:
    def __init__(self, watches: Sequence[OutputWatch]) -> None:
        self._watches = watches

    @property
    def blocked(self) -> bool:
        return any(watch.blocked for watch in self._watches)

    def feed(self, text: str) -> str:
        return self._pass(text, is_last=False)

    def finish(self) -> str:
        return self._pass("", is_last=True)

    def _pass(self, text: str, is_last: bool) -> str:
        if self.blocked:
            return ""
        for watch in self._watches:
            text = watch.feed(text)
            if is_last and not watch.blocked:
                text += watch.finish()
            is_last = is_last or watch.blocked  # nothing follows what a guard has ended
        return text


def _load(name: str, argument: str) -> Guard:
    found = {entry.name: entry for entry in entry_points(group=ENTRY_POINT_GROUP)}
    if name not in found:
        raise SettingsError(f"--guard: no guard {name!r} is installed; there are {', '.join(sorted(found)) or 'none'}")
    try:
        guard: Guard = found[name].load()(argument)
    except Exception as error:  # a guard comes from elsewhere and may fail in any way
        raise SettingsError(f"--guard: {name} cannot be made from {argument!r}: {error}") from error
    return guard


def _any_of(words: Sequence[str]) -> str:
    """The pattern of any of these words and phrases, whole; ordered by first letters, so that few are tried."""
    rests = defaultdict(list)
    for word in words:
        rests[_escaped(word[0])].append(r"\s+".join(map(_escaped, regex.split(r"\s+", word[1:]))))
    choice = "|".join(f"{first}(?:{'|'.join(rest)})" for first, rest in rests.items())
    # Borders that do not ask for a word's letter: an entry may begin or end with another sign.
    return rf"(?i:(?<!\w)(?:{choice})(?!\w))"


def _escaped(text: str) -> str:
    return regex.escape(text, special_only=True)


_BORDERS = {
    r"\b": r"(?:(?<=\w)(?!\w)|(?<!\w)(?=\w))",
    r"\B": r"(?:(?<=\w)(?=\w)|(?<!\w)(?!\w))",
    r"\m": r"(?:(?<!\w)(?=\w))",
    r"\M": r"(?:(?<=\w)(?!\w))",
}
"""Borders by what stands around them: `regex` judges the short forms at the end of a text that is not at its end."""
_UNFIT = (r"\K", r"\G")
_PART = regex.compile(r"\\.|\[\^?\]?(?:\\.|\[:\w+:\]|[^\]\\])*\]|.", regex.DOTALL)
"""An escape, a class, or a character."""


def _checked(source: str, place: str) -> regex.Pattern[str]:
    parts = _PART.findall(source)
    if any(part in _UNFIT for part in parts) or regex.search(r"\{[^{}]*[eids][^{}]*\}", source):
        raise SettingsError(f"{place}: \\K, \\G and fuzzy matches are not supported: they depend on where text is cut")
    try:
        regex.compile(source, regex.V1)  # its errors point at places in what was written
        pattern = regex.compile("".join(_BORDERS.get(part, part) for part in parts), regex.V1)
    except regex.error as error:
        raise SettingsError(f"{place}: not a regular expression: {error}") from error
    if pattern.search("") is not None:
        raise SettingsError(f"{place}: it matches where nothing stands")
    return pattern

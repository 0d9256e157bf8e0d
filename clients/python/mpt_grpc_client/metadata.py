"""The metadata that calls send: the client's own, and what the program that uses it adds."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Self, TypeAlias

Metadata: TypeAlias = tuple[tuple[str, str | bytes], ...]
Pairs: TypeAlias = Iterable[tuple[str, str | bytes]]


@dataclass(frozen=True)
class CallMetadata:
    """What every call of a client sends."""

    pairs: Metadata = ()
    make_pairs: Callable[[], Pairs] | None = None
    """Returns further pairs, anew for each server, such as an access token that expires."""

    def current(self) -> Metadata:
        """Returns the metadata to send now. Raises TypeError or ValueError if the function returns anything else."""
        return self.pairs if self.make_pairs is None else (*self.pairs, *checked(self.make_pairs()))

    def and_(self, pairs: Pairs) -> Self:
        """Returns metadata with further pairs."""
        return replace(self, pairs=(*self.pairs, *checked(pairs)))


def checked(pairs: Pairs) -> Metadata:
    """Returns the pairs. Raises TypeError or ValueError if they are not metadata of gRPC."""
    if isinstance(pairs, str | bytes) or not isinstance(pairs, Iterable):
        raise TypeError(f"metadata: must be pairs such as [('x-tenant', '1')], not {type(pairs).__name__}")
    return tuple(map(_checked, pairs))


def _checked(pair: tuple[str, str | bytes]) -> tuple[str, str | bytes]:
    if not (isinstance(pair, tuple | list) and len(pair) == 2 and isinstance(pair[0], str)):
        raise TypeError(f"metadata: {pair!r} is not a pair of a name and a value, such as ('x-tenant', '1')")
    name, value = pair
    if not re.fullmatch(r"[0-9a-z_.-]+", name):
        raise ValueError(f"metadata: {name!r} must consist of lower-case letters, digits, '-', '_' and '.'")
    is_binary = name.endswith("-bin")
    if not isinstance(value, bytes if is_binary else str):
        kind = "bytes" if is_binary else "a string; names of bytes end with -bin"
        raise TypeError(f"metadata: the value of {name!r} must be {kind}")
    if isinstance(value, str) and not re.fullmatch(r"[ -~]*", value):
        raise ValueError(f"metadata: the value of {name!r} must consist of printable ASCII characters")
    return name, value

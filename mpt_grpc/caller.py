"""Who sends a request, as a value that accompanies it."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Role(enum.StrEnum):
    """What a caller may do."""

    GENERATE = "generate"
    """Generate, tokenize and cancel its own requests."""
    OBSERVE = "observe"
    """Read the state of the engine, which lists the requests of all callers."""
    ADMIN = "admin"
    """Cancel the requests of all callers."""


ALL_ROLES = frozenset(Role)


@dataclass(frozen=True)
class Quota:
    """How much of a server a caller may use; None does not limit it."""

    max_requests: int | None = None
    """Generations in progress."""
    tokens_per_minute: int | None = None
    """Tokens of prompts and of outputs, those that are resumed included."""
    weight: int = 1
    """Its share of the server while others want to use it, relative to theirs."""


UNLIMITED = Quota()


@dataclass(frozen=True)
class Caller:
    """Who sends a request."""

    name: str = ""
    """The name of its access token or certificate; empty for all callers without either, who count as one."""
    roles: frozenset[Role] = ALL_ROLES
    cache_salt: str = ""
    """The cache salt of its requests that set none; no other caller can know it."""
    quota: Quota = UNLIMITED


ANONYMOUS = Caller()

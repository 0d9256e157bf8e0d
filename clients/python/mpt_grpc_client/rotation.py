"""The servers of a client: which of them a call tries first, and which are set aside because they fail.

No I/O happens here; the synchronous and the asynchronous client share it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from mpt_grpc_client import routing

_MAX_ASIDE_S = 30.0
_Connection = TypeVar("_Connection")


@dataclass
class Server(Generic[_Connection]):
    """A target, the connection to it, and how it has fared."""

    target: str
    connection: _Connection
    num_failures: int = 0
    """The number of times it was set aside since it last responded."""
    aside_until_s: float = 0.0
    """Until then, by the monotonic clock, it is tried only after the others."""
    generations: set[Any] = field(default_factory=set)
    """The attempts of this client's generations that are in progress here."""


class Rotation(Generic[_Connection]):
    """The servers of a client. One that fails is set aside: for 1 s at first, for up to 30 s later.

    Any thread may use it.
    """

    def __init__(self, servers: Iterable[Server[_Connection]], *, is_balanced: bool) -> None:
        """`is_balanced`: whether a call that fails is tried again, for which gRPC may choose another address."""
        self.servers = tuple(servers)
        self.is_balanced = is_balanced
        self.is_closed = False
        """Whether their connections are."""
        self._lock = threading.Lock()
        self._turn = 0
        self._pauses = set[Callable[[], None]]()
        """What ends the pauses of calls."""

    def close(self) -> None:
        """Notes that the connections are closed, and ends the pauses of calls."""
        with self._lock:
            self.is_closed, pauses = True, list(self._pauses)
        for end in pauses:
            end()

    @contextmanager
    def pausing(self, end: Callable[[], None]) -> Iterator[None]:
        """A call pauses inside the block. `end` is called when the client is closed, at once if it is already."""
        with self._lock:
            self._pauses.add(end)
            is_closed = self.is_closed
        try:
            if is_closed:
                end()
            yield
        finally:
            with self._lock:
                self._pauses.discard(end)

    def order(self, beginning: bytes = b"") -> list[Server[_Connection]]:
        """Returns the servers in the order in which a call is to try them, and passes the turn on.

        beginning: that of the prompt, see `routing.beginning`.
        """
        with self._lock:
            turn, self._turn = self._turn, (self._turn + 1) % len(self.servers)
        targets = [server.target for server in self.servers]
        loads = [len(server.generations) for server in self.servers]
        preferred = [self.servers[index] for index in routing.order(beginning, targets, loads, turn)]
        now_s = time.monotonic()
        return sorted(preferred, key=lambda server: max(0.0, server.aside_until_s - now_s))

    def set_aside(self, server: Server[_Connection]) -> None:
        """Notes that a server has failed; calls that fail together count once."""
        with self._lock:
            if (now_s := time.monotonic()) >= server.aside_until_s:
                server.aside_until_s = now_s + min(2.0**server.num_failures, _MAX_ASIDE_S)
                server.num_failures += 1

    def put_back(self, server: Server[_Connection]) -> None:
        """Notes that a server has responded."""
        if server.num_failures:
            with self._lock:
                server.num_failures, server.aside_until_s = 0, 0.0

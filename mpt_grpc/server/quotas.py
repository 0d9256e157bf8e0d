"""What callers with a quota have in progress and have used. Belongs to the event loop."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from mpt_grpc.caller import Caller
from mpt_grpc.engine.stream import AsyncStream
from mpt_grpc.errors import QuotaExceededError
from mpt_grpc.results import OutputDelta

_REQUESTS_RETRY_S = 1.0
"""When to try again if too many requests are in progress: nobody knows when one of them ends."""


class Quotas:
    """The use of all callers."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        """now: a clock in seconds."""
        self._now = now
        self._uses: dict[str, _Use] = {}

    @contextmanager
    def request(self, caller: Caller) -> Iterator[Meter | None]:
        """Counts a request as in progress inside the block, and yields what counts its tokens, if they are limited.

        Raises QuotaExceededError.
        """
        quota = caller.quota
        if quota.max_requests is None and quota.tokens_per_minute is None:
            yield None
            return
        use = self._uses.setdefault(caller.name, _Use(self._now()))
        meter = None if quota.tokens_per_minute is None else Meter(use, quota.tokens_per_minute, self._now)
        if quota.max_requests is not None and use.num_requests >= quota.max_requests:
            why = f"{caller.name} has as many requests in progress as its quota allows ({quota.max_requests}): wait"
            raise QuotaExceededError(why, _REQUESTS_RETRY_S, caller.name, "requests", quota.max_requests)
        if meter is not None and (wait_s := meter.wait_s()) > 0:
            why = f"{caller.name} has used its quota of {meter.per_minute} tokens per minute: wait {wait_s:.1f} s"
            raise QuotaExceededError(why, wait_s, caller.name, "tokens", meter.per_minute)
        use.num_requests += 1
        try:
            yield meter
        finally:
            use.num_requests -= 1


@dataclass
class _Use:
    """What a caller uses of its quota."""

    time_s: float
    """When tokens were last granted."""
    num_requests: int = 0
    num_tokens: float = 0
    """What has been used and not yet been granted again; running requests may exceed the quota."""


class Meter:
    """Counts the tokens of a caller. They are granted evenly, and up to a minute's worth may be used at once."""

    def __init__(self, use: _Use, per_minute: int, now: Callable[[], float]) -> None:
        self.per_minute = per_minute
        self._use, self._now = use, now

    def count(self, num_tokens: int) -> None:
        """Counts tokens as used."""
        use, now_s = self._use, self._now()
        use.num_tokens = max(0.0, use.num_tokens - (now_s - use.time_s) * self.per_minute / 60) + num_tokens
        use.time_s = now_s

    def wait_s(self) -> float:
        """Returns the time in seconds until a token may be used, if no more are used meanwhile."""
        self.count(0)
        return max(0.0, (self._use.num_tokens + 1 - self.per_minute) * 60 / self.per_minute)

    async def metered(self, stream: AsyncStream) -> AsyncIterator[OutputDelta]:
        """Yields the deltas of a stream, and counts its input once it has begun, and then each token of its outputs."""
        num_counted = 0
        try:
            async for delta in stream:
                self.count(len(delta.token_ids) + (0 if num_counted else stream.num_input_tokens))
                num_counted = stream.num_input_tokens
                yield delta
        finally:
            if not num_counted:
                self.count(stream.num_input_tokens)

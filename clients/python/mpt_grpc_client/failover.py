"""The attempts of a call: at the server that `routing` prefers, and at the next one when it fails.

No I/O happens here; the synchronous and the asynchronous client share it.
"""

from __future__ import annotations

import time
from typing import Generic, TypeVar

import grpc

from mpt_grpc_client import routing
from mpt_grpc_client.errors import (
    DeadlineExceededError,
    MptGrpcError,
    OverloadedError,
    UnavailableError,
    from_rpc_error,
)
from mpt_grpc_client.proto.v1 import text_generation_pb2 as pb
from mpt_grpc_client.rotation import Rotation, Server
from mpt_grpc_client.targets import proxy_variable

_MAX_ROUNDS = 4
_FIRST_PAUSE_S, _MAX_DOUBLINGS = 0.1, 4
_MAX_PAUSE_BESIDE_OTHERS_S = 2.0
_MAX_WAIT_S = 300.0
"""How long a stream without a timeout that has begun waits for servers that are busy."""
MAX_BREAKS, PROGRESS_TOKENS = 3, 16
"""A call fails when `MAX_BREAKS` servers in a row broke while they ran it, each with less than `PROGRESS_TOKENS`: a
request that crashes servers must not go through all of them."""
_Connection = TypeVar("_Connection")


class Attempts(Generic[_Connection]):
    """The attempts of one call. `server` is the one to call now."""

    def __init__(
        self,
        rotation: Rotation[_Connection],
        timeout: float | None,
        *,
        retries: bool,
        owner: str = "call",
        generation: pb.GenerateRequest | None = None,
    ) -> None:
        """timeout: that of all attempts together, in seconds.

        retries: whether to try all servers again, up to three times, after they have failed.
        owner: whose timeout it is, in the words of an error.
        generation: the request of one, which is routed by its prompt, and counts as load of its server until `end`.
        """
        self.rotation, self._timeout, self._owner = rotation, timeout, owner
        self._start_s, self._failure_s = time.monotonic(), 0.0
        self._time_limit: float | None = None
        if generation is not None and generation.stopping.HasField("time_limit"):
            self._time_limit = generation.stopping.time_limit.ToNanoseconds() / 1e9
        self._num_rounds, self._max_rounds, self._has_begun = 1, _MAX_ROUNDS if retries else 1, False
        self._beginning = b""
        if generation is not None and len(rotation.servers) > 1:
            self._beginning = routing.beginning(generation)
        self._remaining = rotation.order(self._beginning)
        self._failures: dict[str, MptGrpcError] = {}
        """The last failure of each server since one responded. `_failure_s` is the time of the first."""
        self._breaks: list[str] = []
        """The targets of the servers that broke while they ran the call, since one made progress."""
        self._num_tokens = 0
        """The tokens since the last break."""
        self.server = self._remaining.pop(0)
        self._is_counted = generation is not None
        self._count()

    def end(self) -> None:
        """Notes that the call has ended. Any thread may call it, more than once."""
        self._is_counted = False
        self.server.generations.discard(self)

    def _count(self) -> None:
        # Adding to a set and removing from it are atomic, and a lock could be held where a finalizer calls `end`.
        if self._is_counted:
            self.server.generations.add(self)
        if not self._is_counted:  # another thread has ended it meanwhile
            self.server.generations.discard(self)

    def at(self, server: Server[_Connection]) -> Attempts[_Connection]:
        """Returns the single attempt at this server that is a part of the same call, with the same deadline."""
        part = Attempts(Rotation([server], is_balanced=False), self._timeout, retries=False, owner=self._owner)
        part._start_s = self._start_s
        return part

    @property
    def timeout(self) -> float | None:
        """The seconds that are left."""
        return None if self._timeout is None else max(0.0, self._start_s + self._timeout - time.monotonic())

    def succeeded(self, num_tokens: int = 0) -> None:
        """Notes that the server has responded, with `num_tokens`; if it fails later, all servers are tried anew."""
        self.rotation.put_back(self.server)
        self._has_begun = True
        self._num_tokens += num_tokens
        if self._num_tokens >= PROGRESS_TOKENS:
            self._breaks.clear()
        if self.rotation.is_balanced:
            self._num_rounds, self._remaining = 0, []
            self._failures.clear()

    def translated(self, error: grpc.RpcError, progress: str = "before the response") -> MptGrpcError:
        """Returns the client's exception for an attempt that failed. `progress`: how far the call had come."""
        target = self.server.target
        failure = from_rpc_error(error, target, proxy_variable(target))
        if isinstance(failure, DeadlineExceededError):
            return DeadlineExceededError(self._expiry(failure, progress), code=failure.code, reason=failure.reason)
        return failure

    def expired(self, progress: str) -> DeadlineExceededError:
        """Returns the error of a timeout that has passed before an attempt."""
        return DeadlineExceededError(
            f"the {self._owner}'s timeout of {self._timeout:g} s has passed {progress}",
            code=grpc.StatusCode.DEADLINE_EXCEEDED,
        )

    def _expiry(self, failure: MptGrpcError, progress: str) -> str:
        """Returns the error text of a deadline that has passed: whose it is, when, and how far the call had come."""
        elapsed_s = time.monotonic() - self._start_s
        if self._timeout is None or elapsed_s < _EARLY * self._timeout:
            where = f"after {elapsed_s:.1f} s on the way to {self.server.target}"
            return f"a deadline other than this client's has passed {where}, {progress}: {failure}"
        earlier = "".join(f"; {target} had failed: {why}" for target, why in self._failures.items())
        return f"the {self._owner}'s timeout of {self._timeout:g} s has passed {progress}{earlier}"

    def after(self, failure: MptGrpcError) -> float | MptGrpcError:
        """Moves on to the next server; returns the seconds to wait before, or the error to raise if there is none."""
        if not (self.rotation.is_balanced and self._may_succeed_elsewhere(failure)):
            return failure
        if not self._failures:
            self._failure_s = time.monotonic()
        self._failures[self.server.target] = failure
        if failure.code in _BROKEN:
            self.rotation.set_aside(self.server)
        if self._broke_server(failure):
            self._breaks.append(self.server.target)
            self._num_tokens = 0
            if len(self._breaks) == MAX_BREAKS:
                return self._surrender(failure)
        pause = 0.0
        if not self._remaining:
            self._num_rounds += 1
            if self._is_over() or all(f.reason == _DIFFERS for f in self._failures.values()):
                return self._summary(failure)
            self._remaining = self.rotation.order(self._beginning)
            pause = self._pause()
        self.server.generations.discard(self)
        self.server = self._remaining.pop(0)
        self._count()
        return min(pause, self._wait_s())

    def _is_over(self) -> bool:
        """Whether there are no more rounds. A call with a response to lose waits for busy servers."""
        if not (self._has_begun and any(f.reason in _BUSY for f in self._failures.values())):
            return self._num_rounds > self._max_rounds
        return self.timeout != 0 and not self._wait_s()  # the next attempt fails if the timeout has passed

    def _wait_s(self) -> float:
        """Returns the longest time to wait from now on."""
        ends = [self._start_s + limit for limit in (self._timeout, self._time_limit) if limit is not None]
        return max(0.0, min(ends, default=self._failure_s + _MAX_WAIT_S) - time.monotonic())

    def _may_succeed_elsewhere(self, failure: MptGrpcError) -> bool:
        if self._has_begun and failure.reason in _BUSY:
            return True
        if failure.reason:
            is_own_request = failure.reason == "DUPLICATE_REQUEST_ID" and bool(self._failures)
            return failure.code is grpc.StatusCode.UNAVAILABLE or failure.reason in _ELSEWHERE or is_own_request
        return failure.code in _BROKEN or "RST_STREAM" in str(failure)

    def _broke_server(self, failure: MptGrpcError) -> bool:
        """Whether the server may have failed because of this call: it had the call, and was not shutting down."""
        return failure.reason in ("", "ENGINE_STOPPED") and not any(why in str(failure) for why in _UNSENT)

    def _surrender(self, failure: MptGrpcError) -> MptGrpcError:
        """Returns the error of a call that may crash any server."""
        targets = ", ".join(dict.fromkeys(self._breaks))
        why = f"given up because servers broke {MAX_BREAKS} times while they ran this call ({targets})"
        return UnavailableError(f"{why}; the last time: {failure}", code=failure.code, reason=failure.reason)

    def _pause(self) -> float:
        """Returns the time to wait before a round: none before the first, and the shortest that a busy server asks for,
        but not long if others are gone, since they may be back before."""
        if self._num_rounds < 2:
            return 0.0
        asked_s = self._asked_pauses()
        pause_s = min(asked_s, default=0.0)
        if len(asked_s) < len(self._failures):
            pause_s = min(pause_s, _MAX_PAUSE_BESIDE_OTHERS_S)
        return float(max(pause_s, _FIRST_PAUSE_S * 2 ** min(self._num_rounds - 2, _MAX_DOUBLINGS)))

    def _asked_pauses(self) -> list[float]:
        """Returns the times that busy servers ask for."""
        return [f.retry_after or 0.0 for f in self._failures.values() if isinstance(f, OverloadedError)]

    def _summary(self, failure: MptGrpcError) -> MptGrpcError:
        """Returns the error that says why each server failed."""
        if len(self._failures) == 1:
            return failure
        whys = "; ".join(f"{target}: {why}" for target, why in self._failures.items())
        if len(asked := self._asked_pauses()) == len(self._failures):
            return OverloadedError(f"all servers are busy: {whys}", reason=failure.reason, retry_after=min(asked))
        return UnavailableError(f"all servers failed: {whys}", code=failure.code, reason=failure.reason)


BEFORE_LOOKUP = "before the addresses of a target were found"
_EARLY = 0.9
"""The part of the timeout before which a deadline that has passed is another one."""
_DIFFERS = "FINGERPRINT_MISMATCH"
_ELSEWHERE = ("OVERLOADED", _DIFFERS)
_BUSY = ("OVERLOADED", "QUOTA_EXCEEDED", "DUPLICATE_REQUEST_ID")
"""Why a server refuses a stream for now. With the last, it has not noticed that the stream's connection broke."""
_BROKEN = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
"""The codes of a connection that broke, unless the caller cancelled the call."""
_UNSENT = (
    *("failed to connect to all addresses", "connections to all backends failing", "resolution", "resolving"),
    "before headers",
)
"""What the message contains if no server has received the call, or a proxy does not know whether one has: it is a
single target, of which the rounds limit the attempts."""

"""The client's errors, and how a gRPC status with its google.rpc details becomes one of them.

MptGrpcError              any status; other codes than those below are raised as this class itself
├── InvalidRequestError     INVALID_ARGUMENT: names every bad field
├── NotFoundError           NOT_FOUND: no such model is loaded
├── AlreadyExistsError      ALREADY_EXISTS: the request id is in flight
├── OverloadedError         RESOURCE_EXHAUSTED: the server's queue is full; says when to try again
├── UnavailableError        UNAVAILABLE: no server there, or it is draining
├── DeadlineExceededError   DEADLINE_EXCEEDED: timeout_s has passed
├── InternalError           INTERNAL: the engine failed while it served this request
└── InvalidTargetError      no call was made: the target is not HOST:PORT
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar, cast

import grpc
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

_Detail = TypeVar("_Detail", bound=Message)


@dataclass(frozen=True)
class FieldViolation:
    """One bad field of a request: its path in the API and what is wrong with it."""

    field: str
    description: str


class MptGrpcError(Exception):
    """A call that failed; `__cause__` is the error as gRPC raised it."""

    def __init__(self, message: str, *, code: grpc.StatusCode = grpc.StatusCode.UNKNOWN, reason: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.reason = reason
        """The server's stable name for the fault, such as `ENGINE_FAULT`; empty if gRPC itself failed."""


class InvalidRequestError(MptGrpcError):
    """One or more fields of the request are out of range."""

    def __init__(
        self,
        message: str,
        *,
        code: grpc.StatusCode = grpc.StatusCode.INVALID_ARGUMENT,
        reason: str = "",
        violations: tuple[FieldViolation, ...] = (),
    ) -> None:
        super().__init__(message, code=code, reason=reason)
        self.violations = violations
        """All bad fields; empty if the server named none."""


class NotFoundError(MptGrpcError):
    """The request names a model that is not loaded."""


class AlreadyExistsError(MptGrpcError):
    """A request with this id is in flight."""


class OverloadedError(MptGrpcError):
    """The server's queue is full, and stayed so while the channel retried."""

    def __init__(
        self,
        message: str,
        *,
        code: grpc.StatusCode = grpc.StatusCode.RESOURCE_EXHAUSTED,
        reason: str = "",
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message, code=code, reason=reason)
        self.retry_after_s = retry_after_s
        """How long the server asks to wait; None if it does not say."""


class UnavailableError(MptGrpcError):
    """The server is not there, is draining or has lost its engine."""


class DeadlineExceededError(MptGrpcError):
    """The call took longer than `timeout_s`. A stream keeps the text that came until then."""


class InternalError(MptGrpcError):
    """The engine failed while it served this request."""


class InvalidTargetError(MptGrpcError, ValueError):
    """The target is not HOST:PORT."""


def from_rpc_error(error: grpc.RpcError) -> MptGrpcError:
    """The client's error for one that grpc or grpc.aio raised. Raise it `from error`."""
    code = error.code()
    message = error.details() or code.name
    if code is grpc.StatusCode.UNAVAILABLE and message.startswith(("failed to connect", "DNS resolution failed")):
        message = f"no server answers; is it running, and is the target its gRPC port, not HTTP's? {message}"
    # What grpc and grpc.aio raise has a call's methods, though it is not declared so.
    status = rpc_status.from_call(cast(grpc.Call, error)) or status_pb2.Status()
    reason = _detail(status, error_details_pb2.ErrorInfo).reason
    if code is grpc.StatusCode.INVALID_ARGUMENT:
        bad_request = _detail(status, error_details_pb2.BadRequest)
        violations = tuple(FieldViolation(v.field, v.description) for v in bad_request.field_violations)
        return InvalidRequestError(message, code=code, reason=reason, violations=violations)
    # gRPC itself answers RESOURCE_EXHAUSTED, with no reason, to a message that is too large: waiting would not help.
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and reason:
        retry = _detail(status, error_details_pb2.RetryInfo)
        retry_after_s = retry.retry_delay.ToNanoseconds() / 1e9 if retry.HasField("retry_delay") else None
        return OverloadedError(message, code=code, reason=reason, retry_after_s=retry_after_s)
    return _CLASSES.get(code, MptGrpcError)(message, code=code, reason=reason)


_CLASSES: dict[grpc.StatusCode, type[MptGrpcError]] = {
    grpc.StatusCode.NOT_FOUND: NotFoundError,
    grpc.StatusCode.ALREADY_EXISTS: AlreadyExistsError,
    grpc.StatusCode.UNAVAILABLE: UnavailableError,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceededError,
    grpc.StatusCode.INTERNAL: InternalError,
}


def _detail(status: status_pb2.Status, kind: type[_Detail]) -> _Detail:
    """The status's detail of this kind, or an empty one."""
    detail = kind()
    for packed in status.details:
        if packed.Unpack(detail):
            break
    return detail

"""The client's exceptions, and the translation of gRPC statuses with google.rpc details into them.

MptGrpcError              a call that failed; statuses not listed below raise this class itself
├── InvalidRequestError     INVALID_ARGUMENT: one or more options are invalid
├── NotFoundError           NOT_FOUND: the requested model is not loaded
├── AlreadyExistsError      ALREADY_EXISTS: a request with this ID is in progress
├── UnauthenticatedError    UNAUTHENTICATED: the server requires an access token, and this one is missing or not valid
├── PermissionDeniedError   PERMISSION_DENIED: the caller lacks a role
├── OverloadedError         RESOURCE_EXHAUSTED: the server's queue is full, or it is too busy to check a constraint
│   └── QuotaExceededError    the caller uses as much as its quota allows
├── UnavailableError        UNAVAILABLE: the server cannot be reached or is shutting down
├── DeadlineExceededError   DEADLINE_EXCEEDED: the timeout has expired
├── InternalError           INTERNAL: the server failed while processing this request
└── InvalidTargetError      the target is neither HOST:PORT nor unix:PATH, or not to get a token; no call was made
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TypeVar, cast

import grpc
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from mpt_grpc_client.unreachable import explanation

_Detail = TypeVar("_Detail", bound=Message)


@dataclass(frozen=True)
class FieldViolation:
    """An invalid option of a request and what is wrong with it."""

    field: str
    """The name of the option, or its path, such as `stop_strings[2]`."""
    description: str
    reason: str = ""
    """`CONTEXT_LENGTH_EXCEEDED` if the prompt and the output do not fit in the context, otherwise empty."""


class MptGrpcError(Exception):
    """A call that failed. `__cause__` is the error raised by gRPC."""

    def __init__(self, message: str, *, code: grpc.StatusCode = grpc.StatusCode.UNKNOWN, reason: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.reason = reason
        """The server's stable name for the error, such as `ENGINE_FAULT`; empty if gRPC itself failed."""


class InvalidRequestError(MptGrpcError):
    """One or more options of the request are invalid."""

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
        """All invalid options; empty if the server listed none."""


class NotFoundError(MptGrpcError):
    """The requested model is not loaded."""


class AlreadyExistsError(MptGrpcError):
    """A request with this ID is in progress."""


class UnauthenticatedError(MptGrpcError):
    """The server requires an access token, and the client's is missing, unknown or has expired."""


class PermissionDeniedError(MptGrpcError):
    """The access token lacks the role that the method requires."""


class OverloadedError(MptGrpcError):
    """The server's queue is full, or it is too busy to check a new constraint. Retries did not help."""

    def __init__(
        self,
        message: str,
        *,
        code: grpc.StatusCode = grpc.StatusCode.RESOURCE_EXHAUSTED,
        reason: str = "",
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message, code=code, reason=reason)
        self.retry_after = retry_after
        """Seconds to wait before trying again; None if the server does not specify it."""


class QuotaExceededError(OverloadedError):
    """The caller uses as much as its quota allows."""

    def __init__(self, message: str, *, reason: str, retry_after: float | None, quota: str, limit: int) -> None:
        super().__init__(message, reason=reason, retry_after=retry_after)
        self.quota = quota
        """What is limited: `requests` in progress, or `tokens` per minute."""
        self.limit = limit


class UnavailableError(MptGrpcError):
    """The server cannot be reached, is shutting down, or its engine has stopped."""


class DeadlineExceededError(MptGrpcError):
    """The call exceeded its timeout. A stream keeps the text received so far."""


class InternalError(MptGrpcError):
    """The server failed while processing this request."""


class InvalidTargetError(MptGrpcError, ValueError):
    """The target is neither HOST:PORT nor unix:PATH, or one to which the access token must not be sent."""


def from_rpc_error(error: grpc.RpcError, target: str, proxy: str | None) -> MptGrpcError:
    """Returns the client's exception for one raised by grpc or grpc.aio. Raise it `from error`.

    proxy: the environment variable that names the proxy for the target, if there is one.
    """
    # What grpc and grpc.aio raise has the methods of a call, although it is not declared that way.
    call = cast(grpc.Call, error)
    code = call.code()
    status = _status(call)
    info = _detail(status, error_details_pb2.ErrorInfo)
    reason = info.reason
    message = call.details() or code.name
    match code:
        case grpc.StatusCode.INVALID_ARGUMENT:
            violations = tuple(
                FieldViolation(_option_name(violation.field), violation.description, violation.reason)
                for violation in _detail(status, error_details_pb2.BadRequest).field_violations
            )
            message = "; ".join(f"{v.field}: {v.description}" for v in violations) or message
            return InvalidRequestError(message, code=code, reason=reason, violations=violations)
        # Without a reason it is gRPC itself that refuses a message that is too large; retrying would not help.
        case grpc.StatusCode.RESOURCE_EXHAUSTED if reason:
            retry = _detail(status, error_details_pb2.RetryInfo)
            retry_after = retry.retry_delay.ToNanoseconds() / 1e9 if retry.HasField("retry_delay") else None
            if reason == "QUOTA_EXCEEDED":
                quota, limit = info.metadata["quota"], int(info.metadata["limit"])
                return QuotaExceededError(message, reason=reason, retry_after=retry_after, quota=quota, limit=limit)
            return OverloadedError(message, code=code, reason=reason, retry_after=retry_after)
        case grpc.StatusCode.UNAVAILABLE if not reason:
            message = explanation(message, target, proxy)
    return _CLASSES.get(code, MptGrpcError)(message, code=code, reason=reason)


def closed_error() -> MptGrpcError:
    """Returns the error of a call on a client that has been closed."""
    return MptGrpcError("the client is closed", code=grpc.StatusCode.CANCELLED)


_CLASSES: dict[grpc.StatusCode, type[MptGrpcError]] = {
    grpc.StatusCode.NOT_FOUND: NotFoundError,
    grpc.StatusCode.ALREADY_EXISTS: AlreadyExistsError,
    grpc.StatusCode.UNAUTHENTICATED: UnauthenticatedError,
    grpc.StatusCode.PERMISSION_DENIED: PermissionDeniedError,
    grpc.StatusCode.UNAVAILABLE: UnavailableError,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceededError,
    grpc.StatusCode.INTERNAL: InternalError,
}

_OPTION_NAMES = {
    "cache.bypass": "cache_bypass",
    "cache.salt": "cache_salt",
    "conversation.messages": "prompt",
    "decoding.choice": "constraint",
    "decoding.json_object": "constraint",
    "decoding.json_schema": "constraint",
    "decoding.lark_grammar": "constraint",
    "decoding.regex": "constraint",
    "text": "prompt",
    "token_ids.ids": "prompt",
}
"""The options whose names are not the last part of their path in the API. Longer paths begin with these."""
_GROUPS = re.compile(r"(conversation|sampling|decoding|stopping|output_options)\.")


def _option_name(field: str) -> str:
    """Returns the keyword argument that sets a field of the API, followed by the rest of its path."""
    for path in sorted(_OPTION_NAMES, key=len, reverse=True):
        if re.match(rf"{re.escape(path)}(?![\w])", field):
            rest = field.removeprefix(path).removeprefix(".options")
            return _OPTION_NAMES[path] + rest
    return _GROUPS.sub("", field, count=1)


def _status(call: grpc.Call) -> status_pb2.Status:
    """Returns the status with its details. grpcio-status does the same, but ties protobuf to the release of grpcio."""
    for key, value in call.trailing_metadata() or ():
        if key == "grpc-status-details-bin" and isinstance(value, bytes):
            return status_pb2.Status.FromString(value)
    return status_pb2.Status()


def _detail(status: status_pb2.Status, kind: type[_Detail]) -> _Detail:
    """Returns the first detail of this kind, or an empty one."""
    detail = kind()
    for packed in status.details:
        if packed.Unpack(detail):
            break
    return detail

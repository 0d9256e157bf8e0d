"""The mapping of the server's errors to gRPC statuses with google.rpc details."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from mpt_grpc.errors import (
    DrainingError,
    DuplicateRequestError,
    EngineStoppedError,
    FingerprintError,
    InternalError,
    InvalidRequestError,
    MptServerError,
    OverloadedError,
    PermissionDeniedError,
    PromptRefusedError,
    QuotaExceededError,
    UnauthenticatedError,
    UnknownModelError,
    UnreadResponseError,
)

_DOMAIN = "mpt-grpc"
# gRPC limits all metadata of a response to 8 KiB. It percent-encodes the message, and details contain it once more.
_MAX_MESSAGE_BYTES, _MAX_VIOLATIONS_BYTES, _MAX_TEXT_BYTES = 800, 2000, 400
_CODES: dict[type[MptServerError], grpc.StatusCode] = {
    InvalidRequestError: grpc.StatusCode.INVALID_ARGUMENT,
    PromptRefusedError: grpc.StatusCode.INVALID_ARGUMENT,
    UnknownModelError: grpc.StatusCode.NOT_FOUND,
    DuplicateRequestError: grpc.StatusCode.ALREADY_EXISTS,
    UnauthenticatedError: grpc.StatusCode.UNAUTHENTICATED,
    PermissionDeniedError: grpc.StatusCode.PERMISSION_DENIED,
    FingerprintError: grpc.StatusCode.FAILED_PRECONDITION,
    OverloadedError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    QuotaExceededError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    UnreadResponseError: grpc.StatusCode.ABORTED,
    DrainingError: grpc.StatusCode.UNAVAILABLE,
    EngineStoppedError: grpc.StatusCode.UNAVAILABLE,
    InternalError: grpc.StatusCode.INTERNAL,
}
REASONS = tuple(error.reason for error in _CODES)
"""The stable names of all errors."""


def status_code(error: MptServerError) -> grpc.StatusCode:
    """Returns the status code of an error."""
    return _CODES.get(type(error), grpc.StatusCode.INTERNAL)


async def abort(
    context: grpc.aio.ServicerContext[Any, Any], error: MptServerError, more_details: Iterable[Message] = ()
) -> None:
    """Ends the call with the status of the error. Always raises."""
    code = status_code(error)
    message = _shortened(str(error), _MAX_MESSAGE_BYTES)
    details = [_packed(detail) for detail in (*_details(error), *more_details)]
    status = status_pb2.Status(code=code.value[0], message=message, details=details)
    trailers: list[tuple[str, str | bytes]] = [("grpc-status-details-bin", status.SerializeToString())]
    if isinstance(error, OverloadedError):
        # gRPC's built-in retries read this trailer; hand-written ones read RetryInfo.
        trailers.append(("grpc-retry-pushback-ms", str(_retry_after_ms(error))))
    await context.abort(code, message, tuple(trailers))


def _details(error: MptServerError) -> Iterator[Message]:
    subject, metadata = "server:requests", dict[str, str]()
    if isinstance(error, QuotaExceededError):
        subject, metadata = f"{error.caller}:{error.quota}", {"quota": error.quota, "limit": str(error.limit)}
    yield error_details_pb2.ErrorInfo(reason=error.reason, domain=_DOMAIN, metadata=metadata)
    if isinstance(error, InvalidRequestError):
        yield error_details_pb2.BadRequest(field_violations=_violations(error))
    if isinstance(error, OverloadedError):
        delay = duration_pb2.Duration()
        delay.FromMilliseconds(_retry_after_ms(error))
        yield error_details_pb2.RetryInfo(retry_delay=delay)
        why = _shortened(str(error), _MAX_MESSAGE_BYTES)
        quota = error_details_pb2.QuotaFailure.Violation(subject=subject, description=why)
        yield error_details_pb2.QuotaFailure(violations=[quota])


def _retry_after_ms(error: OverloadedError) -> int:
    """Returns the time to wait, rounded up: a caller that returns earlier is refused again."""
    return math.ceil(error.retry_after_s * 1000)


def _violations(error: InvalidRequestError) -> Iterator[error_details_pb2.BadRequest.FieldViolation]:
    """Yields as many violations as fit, those with a reason first, and then one that counts the others."""
    room = _MAX_VIOLATIONS_BYTES
    for number, violation in enumerate(sorted(error.violations, key=lambda violation: not violation.reason)):
        field = _shortened(violation.field, _MAX_TEXT_BYTES)
        description = _shortened(violation.description, _MAX_TEXT_BYTES)
        room -= len(field.encode()) + len(description.encode())
        if room < 0:
            more = f"and {len(error.violations) - number} more"
            yield error_details_pb2.BadRequest.FieldViolation(field=field, description=more)
            return
        yield error_details_pb2.BadRequest.FieldViolation(field=field, description=description, reason=violation.reason)


def _shortened(text: str, max_bytes: int) -> str:
    """Returns the text, or its beginning and an ellipsis."""
    encoded = text.encode(errors="replace")
    if len(encoded) <= max_bytes:
        return encoded.decode()
    return encoded[: max_bytes - 3].decode(errors="ignore") + "…"


def _packed(detail: Message) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(detail)
    return packed

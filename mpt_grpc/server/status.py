"""The mapping of the server's errors to gRPC statuses with google.rpc details."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from mpt_grpc.errors import (
    DrainingError,
    DuplicateRequestError,
    EngineStoppedError,
    InternalError,
    InvalidRequestError,
    MptServerError,
    OverloadedError,
    PromptRefusedError,
    UnknownModelError,
)

_DOMAIN = "mpt-grpc"
_TABLE: dict[type[MptServerError], tuple[grpc.StatusCode, str]] = {
    InvalidRequestError: (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST"),
    PromptRefusedError: (grpc.StatusCode.INVALID_ARGUMENT, "PROMPT_REFUSED"),
    UnknownModelError: (grpc.StatusCode.NOT_FOUND, "UNKNOWN_MODEL"),
    DuplicateRequestError: (grpc.StatusCode.ALREADY_EXISTS, "DUPLICATE_REQUEST_ID"),
    OverloadedError: (grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED"),
    DrainingError: (grpc.StatusCode.UNAVAILABLE, "DRAINING"),
    EngineStoppedError: (grpc.StatusCode.UNAVAILABLE, "ENGINE_STOPPED"),
    InternalError: (grpc.StatusCode.INTERNAL, "ENGINE_FAULT"),
}


def code_and_reason(error: MptServerError) -> tuple[grpc.StatusCode, str]:
    """Returns the status code of an error and its stable name in `ErrorInfo.reason`."""
    return _TABLE.get(type(error), _TABLE[InternalError])


async def abort(context: grpc.aio.ServicerContext[Any, Any], error: MptServerError) -> None:
    """Ends the call with the status of the error. Always raises."""
    code, reason = code_and_reason(error)
    details = [_packed(detail) for detail in _details(error, reason)]
    status = status_pb2.Status(code=code.value[0], message=str(error), details=details)
    trailers: list[tuple[str, str | bytes]] = [("grpc-status-details-bin", status.SerializeToString())]
    if isinstance(error, OverloadedError):
        # gRPC's built-in retries read this trailer; hand-written ones read RetryInfo.
        trailers.append(("grpc-retry-pushback-ms", str(round(error.retry_after_s * 1000))))
    await context.abort(code, str(error), tuple(trailers))


def _details(error: MptServerError, reason: str) -> Iterator[Message]:
    yield error_details_pb2.ErrorInfo(reason=reason, domain=_DOMAIN)
    if isinstance(error, InvalidRequestError):
        violations = error_details_pb2.BadRequest.FieldViolation
        yield error_details_pb2.BadRequest(
            field_violations=[violations(field=v.field, description=v.description) for v in error.violations]
        )
    if isinstance(error, OverloadedError):
        delay = duration_pb2.Duration()
        delay.FromMilliseconds(round(error.retry_after_s * 1000))
        yield error_details_pb2.RetryInfo(retry_delay=delay)
        quota = error_details_pb2.QuotaFailure.Violation(subject="server:requests", description=str(error))
        yield error_details_pb2.QuotaFailure(violations=[quota])


def _packed(detail: Message) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(detail)
    return packed

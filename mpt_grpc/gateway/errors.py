"""The one table from the client library's errors to HTTP, in OpenAI's form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse

from mpt_grpc_client import (
    AlreadyExistsError,
    DeadlineExceededError,
    InvalidRequestError,
    MptGrpcError,
    NotFoundError,
    OverloadedError,
    UnavailableError,
)

_TABLE: tuple[tuple[type[MptGrpcError], int, str, str | None], ...] = (
    (InvalidRequestError, 400, "invalid_request_error", None),
    (NotFoundError, 404, "invalid_request_error", "model_not_found"),
    (AlreadyExistsError, 409, "invalid_request_error", "request_id_in_flight"),
    (OverloadedError, 429, "rate_limit_error", "overloaded"),
    (UnavailableError, 503, "server_error", "unavailable"),
    (DeadlineExceededError, 504, "server_error", "timeout"),
)
NAMES: Mapping[str, str] = {
    "request_id": "X-Request-Id",
    "stopping.max_new_tokens": "max_tokens",
    "stopping.min_new_tokens": "min_tokens",
    "stopping.stop_strings": "stop",
    "sampling.num_sequences": "n",
    "conversation.messages": "messages",
    "text": "prompt",
    "token_ids.ids": "prompt",
    "ids": "tokens",
}
"""The gRPC API's fields, where OpenAI's have other names than their last parts."""


class BadRequestError(Exception):
    """A request that the gateway itself refuses."""

    def __init__(self, message: str, param: str | None = None, *, status: int = 400, code: str | None = None) -> None:
        super().__init__(message)
        self.param, self.status, self.code = param, status, code


def error_body(error: Exception, names: Mapping[str, str] = NAMES) -> tuple[int, dict[str, Any]]:
    """The status of an error and its body; `names` are those that the caller knows the gRPC API's fields by."""
    if isinstance(error, BadRequestError):
        return error.status, _body(str(error), "invalid_request_error", error.param, error.code)
    if isinstance(error, InvalidRequestError) and error.violations:
        wrong = [(_name(violation.field, names), violation.description) for violation in error.violations]
        message = "; ".join(f"{name}: {description}" for name, description in wrong)
        return 400, _body(message, "invalid_request_error", wrong[0][0], _reason_code(error))
    for kind, status, type_, code in _TABLE:
        if isinstance(error, kind):
            return status, _body(str(error), type_, None, code or _reason_code(error))
    if isinstance(error, MptGrpcError):
        return 500, _body(str(error), "server_error", None, "engine_fault")
    return 500, _body("the gateway failed; its log says how", "server_error", None, "gateway_fault")


def error_response(error: Exception, names: Mapping[str, str] = NAMES) -> JSONResponse:
    """The same as an answer, with the headers that tell an SDK when to try again."""
    status, body = error_body(error, names)
    headers = {}
    if isinstance(error, OverloadedError) and error.retry_after_s is not None:
        headers = {
            "retry-after": str(max(1, round(error.retry_after_s))),
            "retry-after-ms": str(round(error.retry_after_s * 1000)),
        }
    return JSONResponse(body, status, headers)


def _body(message: str, type_: str, param: str | None, code: str | None) -> dict[str, Any]:
    return {"error": {"message": message, "type": type_, "param": param, "code": code}}


def _reason_code(error: MptGrpcError) -> str | None:
    return "content_filter" if error.reason == "PROMPT_REFUSED" else None


def _name(field: str, names: Mapping[str, str]) -> str:
    field = field.partition("[")[0]
    return names.get(field, field.rpartition(".")[2])

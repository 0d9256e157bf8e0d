"""The mapping of the client library's errors to HTTP errors in OpenAI's format."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse

from mpt_grpc_client import (
    DeadlineExceededError,
    InvalidRequestError,
    MptGrpcError,
    NotFoundError,
    OverloadedError,
    PermissionDeniedError,
    QuotaExceededError,
    UnauthenticatedError,
    UnavailableError,
)

_TABLE: tuple[tuple[type[MptGrpcError], int, str, str | None], ...] = (
    (InvalidRequestError, 400, "invalid_request_error", None),
    (NotFoundError, 404, "invalid_request_error", "model_not_found"),
    (UnauthenticatedError, 401, "invalid_request_error", "invalid_api_key"),
    (PermissionDeniedError, 403, "invalid_request_error", "permission_denied"),
    (QuotaExceededError, 429, "rate_limit_error", "rate_limit_exceeded"),
    (OverloadedError, 429, "rate_limit_error", "overloaded"),
    (UnavailableError, 503, "server_error", "unavailable"),
    (DeadlineExceededError, 504, "server_error", "timeout"),
)
_MAX_ECHOED = 100
RATE_LIMIT_HEADERS = [
    f"x-ratelimit-{what}-{of}" for of in ("requests", "tokens") for what in ("limit", "remaining", "reset")
]
"""The headers that describe a quota that is exceeded."""
FIELD_NAMES: Mapping[str, str] = {
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    "stop_strings": "stop",
    "num_sequences": "n",
}
"""The HTTP names of the client library's options, where they differ."""


class BadRequestError(Exception):
    """A request refused by the gateway itself."""

    def __init__(self, message: str, param: str | None = None, *, status: int = 400, code: str | None = None) -> None:
        super().__init__(message)
        self.param, self.status, self.code = param, status, code


def error_body(error: Exception, names: Mapping[str, str] = FIELD_NAMES) -> tuple[int, dict[str, Any]]:
    """Returns the status and the body of an error; `names` are the endpoint's names for the options."""
    if isinstance(error, BadRequestError):
        return error.status, _body(str(error), "invalid_request_error", error.param, error.code)
    if isinstance(error, InvalidRequestError) and error.violations:
        paths = [_path(violation.field, names) for violation in error.violations]
        message = "; ".join(f"{path}: {v.description}" for path, v in zip(paths, error.violations, strict=True))
        is_too_long = any(violation.reason == "CONTEXT_LENGTH_EXCEEDED" for violation in error.violations)
        code = "context_length_exceeded" if is_too_long else None
        return 400, _body(message, "invalid_request_error", paths[0], code)
    for kind, status, type_, code in _TABLE:
        if isinstance(error, kind):
            return status, _body(str(error), type_, None, code or _reason_code(error))
    if isinstance(error, MptGrpcError):
        return 500, _body(str(error), "server_error", None, "engine_fault")
    return 500, _body("internal error; see the gateway's log for details", "server_error", None, "gateway_fault")


def error_response(error: Exception, names: Mapping[str, str] = FIELD_NAMES) -> JSONResponse:
    """Returns the response for an error, with the headers from which SDKs read when to retry."""
    status, body = error_body(error, names)
    headers = {}
    if status == 408:
        headers = {"connection": "close"}  # the rest of the request may never arrive
    if isinstance(error, OverloadedError) and error.retry_after is not None:
        headers = {
            "retry-after": str(max(1, math.ceil(error.retry_after))),
            "retry-after-ms": str(round(error.retry_after * 1000)),
        }
    if isinstance(error, QuotaExceededError):
        headers |= {
            f"x-ratelimit-limit-{error.quota}": str(error.limit),
            f"x-ratelimit-remaining-{error.quota}": "0",
            f"x-ratelimit-reset-{error.quota}": f"{error.retry_after or 0:.3f}s",
        }
    response = JSONResponse(body, status, headers)
    if status == 401:
        # Two headers, since Chromium reads only the first challenge of each, and asks for no password for Bearer.
        response.headers.append("www-authenticate", 'Basic realm="access token as the password"')
        response.headers.append("www-authenticate", "Bearer")
    return response


def shortened(text: str) -> str:
    """Returns the beginning of a caller's text, for an error or a log line."""
    return text if len(text) <= _MAX_ECHOED else f"{text[:_MAX_ECHOED]}…"


def _body(message: str, type_: str, param: str | None, code: str | None) -> dict[str, Any]:
    return {"error": {"message": message, "type": type_, "param": param, "code": code}}


def _reason_code(error: MptGrpcError) -> str | None:
    return "content_filter" if error.reason == "PROMPT_REFUSED" else None


def _path(field: str, names: Mapping[str, str]) -> str:
    """Returns the path of an option with the endpoint's name for what it begins with, the longest part that has one."""
    ends = [*(match.start() for match in re.finditer(r"[.\[]", field)), len(field)]
    end = next((end for end in reversed(ends) if field[:end] in names), ends[0])
    return names.get(field[:end], field[:end]) + field[end:]

"""What the application responds to requests that fail, and to those for which it has no endpoint."""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from difflib import get_close_matches

from fastapi import FastAPI, Request
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.routing import Match

from mpt_grpc.gateway.access_log import note_refusal
from mpt_grpc.gateway.errors import FIELD_NAMES, BadRequestError, error_response, shortened
from mpt_grpc_client import MptGrpcError

_MAX_COMPARED = 100
"""The characters of a path that are compared with those of endpoints: a long path would take long."""


def add_error_handlers(app: FastAPI) -> None:
    for kind in (MptGrpcError, BadRequestError, Exception):
        app.add_exception_handler(kind, _on_error)
    app.add_exception_handler(HTTPException, _on_http_error)


def field_names(request: Request) -> Mapping[str, str]:
    """Returns this endpoint's names for the client library's options, where they differ."""
    names: Mapping[str, str] = getattr(request.state, "field_names", FIELD_NAMES)
    return names


async def _on_error(request: Request, error: Exception) -> JSONResponse:
    # They hold the error, and the request, until garbage is collected.
    cause: BaseException | None = error
    while cause is not None:
        traceback.clear_frames(cause.__traceback__)
        cause = cause.__cause__ or cause.__context__
    if isinstance(error, BadRequestError):
        note_refusal(request.scope, error)
    return error_response(error, field_names(request))


async def _on_http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    status, why, headers = error.status_code, str(error.detail), dict(error.headers or {})
    if status == 404:
        remedy = (
            f"did you mean {closest[0]}?" if (closest := _closest_paths(request)) else "see /docs for the endpoints"
        )
        why = f"no such endpoint: {shortened(request.url.path)}; {remedy}"
    if status == 405:
        allowed = _allowed_methods(request)
        headers["allow"] = ", ".join(allowed)
        # GET implies HEAD.
        methods = " or ".join(method for method in allowed if method != "HEAD")
        why = f"{request.method} is not allowed for {shortened(request.url.path)}; use {methods}"
    response = error_response(BadRequestError(why, status=status))
    response.headers.update(headers)
    return response


def _closest_paths(request: Request) -> list[str]:
    """Returns the path of an endpoint that a path is probably meant for, such as one without `/v1`, or none."""
    paths = [route.path for route in request.app.routes if isinstance(route, APIRoute)]
    return get_close_matches(request.url.path[:_MAX_COMPARED], paths, n=1, cutoff=0.8)


def _allowed_methods(request: Request) -> list[str]:
    """Returns the methods of all routes for the path of a request. Files, which have no such route, allow GET."""
    methods: set[str] = set()
    for route in request.app.routes:
        if route.matches(request.scope)[0] is Match.PARTIAL:
            methods |= route.methods
    return sorted(methods) or ["GET", "HEAD"]

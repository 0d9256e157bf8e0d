"""The web page at `/`: its files, and the state of the engine that it displays."""

from __future__ import annotations

import asyncio
import dataclasses
import enum
import json
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

from mpt_grpc.gateway.callers import Callers
from mpt_grpc.gateway.errors import BadRequestError

_FILES = Path(__file__).with_name("static")
_HEADERS = {
    # No external resources, no inline code, no embedding in frames.
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self';"
    " connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


def add_page(app: FastAPI, callers: Callers, *, shows_engine: bool) -> None:
    """Adds the web page, its files and `/debug/engine`, which refuses requests unless `shows_engine`."""

    async def page() -> Response:
        return FileResponse(_FILES / "index.html", headers=_HEADERS)

    async def engine(request: Request) -> Response:
        """Returns the load, the requests in progress with their KV cache blocks, and the last completed requests."""
        if not shows_engine:
            raise BadRequestError("there are several servers; use mpt-grpc top --target HOST:PORT for one", status=404)
        state = await callers.client(request).get_engine_state(timeout=5)
        # All who ask during one step get their responses in the same turn of the loop, milliseconds each.
        content = await asyncio.to_thread(json.dumps, state, default=_to_json)
        return Response(content, media_type="application/json")

    app.add_api_route("/", page, methods=["GET", "HEAD"], response_model=None, include_in_schema=False)
    app.add_api_route("/debug/engine", engine, response_model=None)
    app.add_api_route("/debug/engine", engine, methods=["HEAD"], response_model=None, include_in_schema=False)
    app.mount("/static", _Files(directory=_FILES))


class _Files(StaticFiles):
    async def get_response(self, path: str, scope: Scope) -> Response:
        response = await super().get_response(path, scope)
        response.headers.update(_HEADERS)
        return response


def _to_json(value: Any) -> Any:
    """Returns a value of the client library as JSON values, one level deep: the long lists of blocks need no copy."""
    if isinstance(value, enum.Enum):
        return value.name
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}

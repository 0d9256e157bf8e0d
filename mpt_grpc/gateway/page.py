"""The page at `/` for people: its files, and the engine's state that it draws."""

from __future__ import annotations

import dataclasses
import enum
import json
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from starlette.responses import FileResponse, Response
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

from mpt_grpc_client import AsyncClient

_FILES = Path(__file__).with_name("static")
_HEADERS = {
    # Nothing from elsewhere, nothing inline, in nobody's frame.
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self';"
    " connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


def add_page(app: FastAPI, client: AsyncClient) -> None:
    """Adds the page, its files, and `/debug/engine`."""

    async def page() -> Response:
        return FileResponse(_FILES / "index.html", headers=_HEADERS)

    async def engine() -> Response:
        """Tells what the engine is doing: its load, its requests in flight and the last that ended, and who holds which
        blocks of the KV cache."""
        state = await client.get_engine_state(timeout=5)
        return Response(json.dumps(state, default=_plain), media_type="application/json")

    app.add_api_route("/", page, response_model=None, include_in_schema=False)
    app.add_api_route("/debug/engine", engine, response_model=None)
    app.mount("/static", _Files(directory=_FILES))


class _Files(StaticFiles):
    async def get_response(self, path: str, scope: Scope) -> Response:
        response = await super().get_response(path, scope)
        response.headers.update(_HEADERS)
        return response


def _plain(value: Any) -> Any:
    """What JSON holds of a value of the client's; lists, of which a cache's are long, need no copy."""
    if isinstance(value, enum.Enum):
        return value.name
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}

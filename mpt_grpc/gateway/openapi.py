"""The schemas of requests and responses in `/openapi.json`, which `/docs` displays.

The endpoints parse requests and build responses themselves, so FastAPI cannot derive the schemas.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

_SCHEMAS = "#/components/schemas/"


def request_body(model: type[BaseModel] | None) -> dict[str, Any] | None:
    """Returns a route's `openapi_extra` for a JSON body of this schema."""
    if model is None:
        return None
    return {"requestBody": {"required": True, **_content({"application/json": model})}}


def response(description: str, models: Mapping[str, type[BaseModel]]) -> dict[str, Any]:
    """Returns an entry of a route's `responses`, with the schema for each media type."""
    return {"description": description, **_content(models)}


def add_schemas(app: FastAPI, requests: Sequence[type[BaseModel]], responses: Sequence[type[BaseModel]]) -> None:
    """Adds the schemas to which the routes refer to the application's OpenAPI document."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
            _, schemas = models_json_schema(
                [(model, "validation") for model in requests] + [(model, "serialization") for model in responses],
                ref_template=f"{_SCHEMAS}{{model}}",
            )
            document["components"] = {"schemas": schemas["$defs"]}
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _content(models: Mapping[str, type[BaseModel]]) -> dict[str, Any]:
    return {
        "content": {
            media_type: {"schema": {"$ref": f"{_SCHEMAS}{model.__name__}"}} for media_type, model in models.items()
        }
    }

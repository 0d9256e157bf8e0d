"""What `/openapi.json`, and so `/docs`, say of request bodies, which the endpoints parse by themselves."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

_SCHEMAS = "#/components/schemas/"


def body_of(model: type[BaseModel] | None) -> dict[str, Any] | None:
    """A route's `openapi_extra` for a body of this form."""
    if model is None:
        return None
    schema = {"$ref": f"{_SCHEMAS}{model.__name__}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def add_schemas(app: FastAPI, models: list[type[BaseModel]]) -> None:
    """Lets the application's document know the forms that its routes refer to."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
            _, forms = models_json_schema(
                [(model, "validation") for model in models], ref_template=f"{_SCHEMAS}{{model}}"
            )
            document["components"] = {"schemas": forms["$defs"]}
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]

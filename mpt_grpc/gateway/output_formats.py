"""The fields that constrain the output: OpenAI's and vLLM's."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from mpt_grpc.gateway.errors import BadRequestError
from mpt_grpc.gateway.strict import Many, Strict
from mpt_grpc_client import Constraint, JsonObject, JsonSchema


class StructuredOutputs(Strict):
    """vLLM's field for constraints on the output."""

    json_: dict[str, Any] | str | None = Field(default=None, alias="json")
    regex: str | None = None
    choice: Many[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None


class NamedSchema(Strict):
    name: str
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None

    @property
    def constraint(self) -> tuple[str, Constraint | None]:
        """The field that constrains the output, and its constraint. Raises BadRequestError if the schema is missing."""
        if self.json_schema is None:
            return format_constraint(self.type, None, "response_format", "response_format.json_schema")
        schema = self.json_schema.schema_
        return format_constraint(self.type, schema, "response_format", "response_format.json_schema.schema")


def format_constraint(
    type_: str, schema: dict[str, Any] | None, field: str, schema_field: str
) -> tuple[str, Constraint | None]:
    """Returns the field that constrains the output, and its constraint, which is None for plain text.

    Raises BadRequestError if the schema is missing.
    """
    if type_ != "json_schema":
        return field, JsonObject() if type_ == "json_object" else None
    if schema is None:
        raise BadRequestError(f"{schema_field}: required if type is json_schema", schema_field)
    return schema_field, JsonSchema(schema)

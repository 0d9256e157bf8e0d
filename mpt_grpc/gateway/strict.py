"""What the parts of a body have in common: no value is taken for one of another type, unknown fields are refused, and
fields and items are counted first."""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

MAX_ITEMS = 1024
"""The maximum number of items of a field, except for token IDs, and of fields of an object."""
TOO_MANY_ITEMS = "too_many_items"
_Item = TypeVar("_Item")
Many = Annotated[list[_Item], Field(fail_fast=True)]
"""A list that reports only its first invalid item, since errors cost far more than items."""
Some = Annotated[list[_Item], Field(min_length=1, fail_fast=True)]


def kind_of_content(value: Any) -> str:
    """Returns which of its two types a text or a list of parts has, so that errors concern that one."""
    return "text" if isinstance(value, str) else "parts"


class Strict(BaseModel):
    """An object without unknown fields, whose numbers are not text or booleans, and whose integers have no point."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _check_fields(cls, value: Any) -> Any:
        """Refuses too many fields before they are validated, since each unknown one costs an error.

        Drops unknown fields that are null: clients dump so what only others have.
        """
        if not isinstance(value, dict):
            return value
        if len(value) > MAX_ITEMS:
            why = f"{len(value)} fields; at most {MAX_ITEMS} are allowed"
            raise PydanticCustomError(TOO_MANY_ITEMS, "{why}", {"why": why})
        return {name: field for name, field in value.items() if field is not None or name in cls.model_fields}


def check_num_items(value: Any, most: int = MAX_ITEMS) -> Any:
    """Refuses a list that is too long before its items are validated."""
    if isinstance(value, list) and len(value) > most:
        why = f"{len(value)} items; at most {most} are allowed in one request"
        raise PydanticCustomError(TOO_MANY_ITEMS, "{why}", {"why": why})
    return value

"""The parsing of request bodies. Errors name the first invalid or unknown field."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, TypeVar, get_args

from fastapi import Request
from pydantic import BaseModel, ValidationError

from mpt_grpc.gateway.errors import BadRequestError
from mpt_grpc.gateway.requests import GenerationFields

_Parsed = TypeVar("_Parsed", bound=BaseModel)
_MAX_BYTES = 32 << 20
IGNORED = frozenset(
    "user metadata store service_tier safety_identifier prompt_cache_key prompt_cache_retention parallel_tool_calls"
    " reasoning_effort verbosity modalities".split()
)
"""Fields that SDKs send and that do not affect what is generated here."""
REFUSED = {
    "functions": "functions: not supported; use tools",
    "function_call": "function_call: not supported; use tool_choice",
    "suffix": "suffix: not supported; the model can only continue a prompt",
    "audio": "audio: not supported",
    "prediction": "prediction: not supported",
    "web_search_options": "web_search_options: not supported",
    "chat_template": "chat_template: not supported per request; set it on the server, with --chat-template",
}
"""Fields of OpenAI's API, and one of vLLM's, that would change the response and are not supported."""
_EXPECTED = {
    "prompt": "must be text, a list of token IDs, or a list of either, and not empty",
    "stop": "must be a string or a list of strings",
    "seed": "must be an integer from 0 to 2^64 - 1",
    "logit_bias": "must map token IDs to numbers",
    "guided_json": "must be a JSON schema",
    "structured_outputs.json": "must be a JSON schema",
    "tool_choice": "must be none, auto, required, or a function in tools",
    "messages": "must be a list of at least one message, each with a role and content",
    "messages.role": "must be system, developer, user or assistant; tool messages are not supported",
    "messages.content": "must be text, or a list of parts of type text; images, audio and tool calls are not supported",
}
"""The valid values of fields with several types, for each of which Pydantic would report its own error."""


async def parse(request: Request, kind: type[_Parsed]) -> _Parsed:
    """Returns the body of a request. Raises BadRequestError for the first invalid or unknown field."""
    fields = _known_fields(await _read(request))
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        raise _refusal(error, kind) from error


async def _read(request: Request) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > _MAX_BYTES:
            raise BadRequestError(f"the body exceeds {_MAX_BYTES >> 20} MiB; shorten the prompt", status=413)
    return bytes(body)


def _known_fields(body: bytes) -> dict[str, Any]:
    """Returns the fields of a body, except those that are null or ignored. Raises BadRequestError."""
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise BadRequestError(f"the body is not valid JSON: {error}") from error
    if not isinstance(fields, dict):
        raise BadRequestError("the body must be a JSON object")
    fields = {name: value for name, value in fields.items() if value is not None and name not in IGNORED}
    for name, value in fields.items():
        if name in REFUSED:
            raise BadRequestError(REFUSED[name], name)
        if b"\\u" in body and not _is_text(value):
            raise BadRequestError(f"{name}: not valid Unicode; remove lone surrogates", name)
    return fields


def _refusal(error: ValidationError, kind: type[BaseModel]) -> BadRequestError:
    """Returns the error for the first invalid or unknown field of a body of this kind."""
    first = error.errors()[0]
    param = str(first["loc"][0])
    if first["type"] == "extra_forbidden":
        return BadRequestError(_unknown_field(first["loc"], kind), param)
    key, path = _described(first["loc"], _EXPECTED if issubclass(kind, GenerationFields) else {})
    return BadRequestError(f"{path}: {_EXPECTED.get(key, first['msg'])}", param)


def _described(loc: Sequence[str | int], expected: Mapping[str, str]) -> tuple[str, str]:
    """Returns where an error is as a key of `expected` and as a path with indexes.

    Inside a field that is described as a whole, the parts with which Pydantic identifies its types are left out.
    """
    key = path = ""
    for part in loc:
        if isinstance(part, int):
            path += f"[{part}]"
        elif f"{key}.{part}" in expected or key not in expected:
            key, path = f"{key}.{part}".lstrip("."), f"{path}.{part}".lstrip(".")
    return key, path


def _unknown_field(loc: Sequence[str | int], kind: type[BaseModel]) -> str:
    """Returns the error text for an unknown field, with the closest field that exists."""
    models, path = [kind], ""
    for part in loc[:-1]:
        if isinstance(part, int):
            path += f"[{part}]"
        elif nested := [model for parent in models for model in _models(_fields(parent).get(part))]:
            models, path = nested, f"{path}.{part}".lstrip(".")
    known = [name for model in models for name in _fields(model)] + ([] if path else sorted(IGNORED))
    closest = get_close_matches(str(loc[-1]), known, n=1)
    suggestion = f"; did you mean {closest[0]!r}?" if closest else ""
    return (f"{path}: " if path else "") + f"unknown field {loc[-1]!r}{suggestion}"


def _fields(model: type[BaseModel]) -> dict[str, Any]:
    """Returns the types of a model's fields by their names in JSON."""
    return {field.alias or name: field.annotation for name, field in model.model_fields.items()}


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    """Yields the models in a type."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models(argument)


def _is_text(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True

"""From the bytes of a body to a checked request: harmless fields are left out, the first that is wrong is named."""

from __future__ import annotations

import json
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError

from mpt_grpc.gateway.errors import BadRequestError
from mpt_grpc.gateway.requests import GenerationFields

_Parsed = TypeVar("_Parsed", bound=BaseModel)
_MAX_BYTES = 32 << 20
HARMLESS = frozenset(
    "user metadata store service_tier safety_identifier prompt_cache_key prompt_cache_retention parallel_tool_calls"
    " reasoning_effort verbosity modalities".split()
)
"""Fields that SDKs send and that change nothing in what is generated here."""
REFUSED = {
    "functions": "functions are not supported: ask for JSON with response_format",
    "function_call": "functions are not supported: ask for JSON with response_format",
    "suffix": "suffix is not supported: the model only continues a prompt",
    "audio": "audio is not supported",
    "prediction": "prediction is not supported",
    "web_search_options": "web search is not supported",
}
"""Fields of OpenAI's that would change the answer and cannot be served."""
_FORMS = {
    "prompt": "must be a text, a list of token ids, or a list of either, and not be empty",
    "stop": "must be a text or a list of texts",
    "logit_bias": "must map token ids to numbers",
    "guided_json": "must be a JSON schema",
    "structured_outputs.json": "must be a JSON schema",
    "tool_choice": "must be none, auto, required, or a function of tools",
    "messages": "must be a list of messages, at least one, each with a role and a content",
    "messages.role": "must be system, developer, user or assistant: tools and what they answer are not supported",
    "messages.content": "must be a text, or a list of parts of type text: images, sound and calls are not supported",
}
"""What fields of several kinds must be: Pydantic would say how they are wrong as each of them."""


async def parsed(request: Request, kind: type[_Parsed]) -> _Parsed:
    """Raises BadRequestError with the first field that is wrong or unknown."""
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
            raise BadRequestError(f"the body is longer than {_MAX_BYTES} bytes: shorten the prompt", status=413)
    return bytes(body)


def _known_fields(body: bytes) -> dict[str, Any]:
    """The fields of a request without the harmless ones and those that are null. Raises BadRequestError."""
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise BadRequestError(f"the body is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise BadRequestError("the body must be a JSON object")
    fields = {name: value for name, value in fields.items() if value is not None and name not in HARMLESS}
    for name, value in fields.items():
        if name in REFUSED:
            raise BadRequestError(REFUSED[name], name)
        if b"\\u" in body and not _is_text(value):
            raise BadRequestError(f"{name}: holds half of a surrogate pair, which is no character", name)
    return fields


def _refusal(error: ValidationError, kind: type[BaseModel]) -> BadRequestError:
    """What is wrong with the first field of a request of this kind that is wrong or unknown."""
    forms = _FORMS if issubclass(kind, GenerationFields) else {}
    first = error.errors()[0]
    key = path = ""
    for part in first["loc"]:
        if isinstance(part, int):
            path += f"[{part}]"
        elif f"{key}.{part}" in forms or key not in forms or first["type"] == "extra_forbidden":
            key, path = f"{key}.{part}".lstrip("."), f"{path}.{part}".lstrip(".")
    why = forms.get(key, first["msg"])
    if first["type"] == "extra_forbidden":
        why = "unknown field: leave it out"
    return BadRequestError(f"{path}: {why}", str(first["loc"][0]))


def _is_text(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True

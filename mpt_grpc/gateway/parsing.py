"""The parsing of request bodies. Errors name the first invalid or unknown field."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from functools import partial
from typing import Any, TypeVar, get_args

from fastapi import Request
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from mpt_grpc.gateway.disconnection import unless_disconnected
from mpt_grpc.gateway.errors import BadRequestError, shortened
from mpt_grpc.gateway.field_rules import FieldRules, reason
from mpt_grpc.gateway.reading import read
from mpt_grpc.gateway.strict import MAX_ITEMS, TOO_MANY_ITEMS
from mpt_grpc.json_values import is_deeper_than, is_unicode, parse_json
from mpt_grpc.limits import MAX_TOKEN_IDS
from mpt_grpc.worker_threads import WorkerThreads

_Parsed = TypeVar("_Parsed", bound=BaseModel)
_Made = TypeVar("_Made")
MAX_NAMES = 1 << 16
"""The maximum number of names of fields in a body, those of all its objects together."""
MAX_VALUES = MAX_TOKEN_IDS + MAX_NAMES
"""The maximum number of values in a body, in all its arrays and objects together."""
MAX_DEPTH = 128
_MAX_BYTES_ON_LOOP = 4 << 10
"""The largest body that is parsed in less time than it takes to hand it to a thread and back."""
# One thread, since parsing holds Python's global lock: streams proceed between two bodies.
_parser = WorkerThreads(1, "parse")
_COUNTED_BYTES = 64 << 10
"""The bytes in which values are counted at once."""
_ESCAPED_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


async def parse(
    request: Request,
    kind: type[_Parsed],
    rules: FieldRules,
    make: Callable[[_Parsed], _Made],
    *,
    max_prompts: int = MAX_ITEMS,
) -> _Made:
    """Returns what `make` makes of the body of a request, in the thread in which a large one is parsed.

    Raises BadRequestError for the first invalid or unknown field, and the errors of `make`.
    """
    body = await read(request)
    if len(body) <= _MAX_BYTES_ON_LOOP:
        return make(_parsed(body, kind, rules, max_prompts))
    work = partial(lambda data: make(_parsed(data, kind, rules, max_prompts)), body)
    parsing = asyncio.wrap_future(_parser.submit(work))
    del body, work  # which leave the queue if the caller leaves before its turn
    return await unless_disconnected(request, parsing)


def _parsed(body: bytes, kind: type[_Parsed], rules: FieldRules, max_prompts: int) -> _Parsed:
    _check_num_values(body)
    fields = _known_fields(body, rules)
    _check_counts(fields, max_prompts)
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        raise _refusal(error, kind, rules) from error


def _check_num_values(body: bytes) -> None:
    """Refuses a body with too many values before it is parsed, since Python does nothing else during that time."""
    if sum(map(body.count, b"[{,")) <= MAX_VALUES and body.count(b":") <= MAX_NAMES:
        return
    # Some of these characters may be text.
    num_values = num_names = is_text = 0
    without_escapes = body.replace(rb"\\", b"").replace(rb"\"", b"")
    for start in range(0, len(without_escapes), _COUNTED_BYTES):
        pieces = without_escapes[start : start + _COUNTED_BYTES].split(b'"')
        outside = b"".join(pieces[is_text::2])
        is_text ^= (len(pieces) - 1) & 1
        num_values += sum(map(outside.count, b"[{,"))
        num_names += outside.count(b":")
    for count, most, what in ((num_values, MAX_VALUES, "values"), (num_names, MAX_NAMES, "names of fields")):
        if count > most:
            raise BadRequestError(f"the body contains more than {most} {what}; send fewer")


def _check_counts(fields: Mapping[str, Any], max_prompts: int) -> None:
    """Refuses fields with too many items before the items are validated."""
    if len(fields) > MAX_ITEMS:
        raise BadRequestError(f"{len(fields)} fields; at most {MAX_ITEMS} are allowed")
    for name, value in fields.items():
        limit = max_prompts if name == "prompt" else MAX_ITEMS
        is_long = isinstance(value, list | dict) and len(value) > limit
        # Lists of token IDs may be as long as the body allows.
        if is_long and not (isinstance(value, list) and isinstance(value[0], int)):
            why = f"{len(value)} items; at most {limit} are allowed in one request"
            raise BadRequestError(f"{shortened(name)}: {why}", shortened(name))


def _known_fields(body: bytes, rules: FieldRules) -> dict[str, Any]:
    """Returns the fields of a body, except those that are null or ignored. Raises BadRequestError."""
    try:
        fields = parse_json(body.decode())
    except RecursionError as error:
        raise _too_deep() from error
    except UnicodeDecodeError as error:
        raise BadRequestError("the body is not valid UTF-8") from error
    except ValueError as error:
        raise BadRequestError(f"the body is not valid JSON: {error}") from error
    if not isinstance(fields, dict):
        raise BadRequestError("the body must be a JSON object")
    if sum(map(body.count, b"[{")) > MAX_DEPTH and is_deeper_than(fields, MAX_DEPTH):
        raise _too_deep()
    fields = {name: value for name, value in fields.items() if value is not None and name not in rules.ignored}
    may_have_surrogates = _ESCAPED_SURROGATE.search(body) is not None
    for name, value in fields.items():
        if name in rules.refused:
            raise BadRequestError(f"{name}: {rules.refused[name]}", name)
        if may_have_surrogates and not is_unicode(name):
            raise BadRequestError("the name of a field is not valid Unicode; remove lone surrogates")
        if may_have_surrogates and not is_unicode(value):
            raise BadRequestError(f"{shortened(name)}: not valid Unicode; remove lone surrogates", shortened(name))
    return fields


def _too_deep() -> BadRequestError:
    return BadRequestError(f"the body is nested more than {MAX_DEPTH} levels deep; simplify it")


def _refusal(error: ValidationError, kind: type[BaseModel], rules: FieldRules) -> BadRequestError:
    """Returns the error for the first invalid or unknown field of a body of this kind."""
    errors = error.errors(include_url=False, include_input=False)
    # Where a field has several types, each has reported its error.
    first = next((error for error in errors if error["type"] == TOO_MANY_ITEMS), errors[0])
    if first["type"] == "missing":
        first = _sent_instead(first, errors, rules)
    if first["type"] == "extra_forbidden":
        return _unknown_field(first["loc"], kind, rules)
    key, path = _described(first["loc"], kind, rules.expected)
    why = first["msg"] if first["type"] == TOO_MANY_ITEMS else rules.expected.get(key) or reason(first)
    if first["type"] == "union_tag_invalid":
        why = f"the type {shortened(first['ctx']['tag'])!r} is not supported; {why}"
    return BadRequestError(f"{path}: {why}", path)


def _sent_instead(missing: ErrorDetails, errors: Sequence[ErrorDetails], rules: FieldRules) -> ErrorDetails:
    """Returns the error of another endpoint's field that was sent for a missing one, or that of the missing one."""
    for error in errors:
        meant = rules.equivalents.get(str(error["loc"][0]), ()) if error["type"] == "extra_forbidden" else ()
        if missing["loc"] in [(name,) for name in meant]:
            return error
    return missing


def _described(loc: Sequence[str | int], kind: type[BaseModel], expected: Mapping[str, str]) -> tuple[str, str]:
    """Returns where an error is as a key of `expected`, in which `[]` stands for an index, and as a path with indexes.

    Inside a field that is described as a whole, the parts with which Pydantic identifies its types are left out.
    """
    models, key, path = [kind], "", ""
    for part in loc:
        fields = [annotation for model in models for name, annotation in _fields(model).items() if name == part]
        if named := _identified(models, part):
            models = named
        elif isinstance(part, int):
            path += f"[{part}]"
            key += "[]" if f"{key}[]" in expected else ""
        elif f"{key}.{part}" in expected or key not in expected or fields:
            key, path = f"{key}.{part}".lstrip("."), f"{path}.{part}".lstrip(".")
            models = [model for annotation in fields for model in _models(annotation)]
    return key, path


def _unknown_field(loc: Sequence[str | int], kind: type[BaseModel], rules: FieldRules) -> BadRequestError:
    """Returns the error for an unknown field, with the closest field that exists."""
    models, path = [kind], ""
    for part in loc[:-1]:
        if isinstance(part, int):
            path += f"[{part}]"
        elif named := _identified(models, part):
            models = named
        elif nested := [model for parent in models for model in _models(_fields(parent).get(part))]:
            models, path = nested, f"{path}.{part}".lstrip(".")
    known = [name for model in models for name in _fields(model)] + ([] if path else sorted(rules.ignored))
    name = shortened(str(loc[-1]))
    closest = [name for name in rules.equivalents.get(name, ()) if name in known] or get_close_matches(name, known, n=1)
    suggestion = f"; did you mean {closest[0]!r}?" if closest else ""
    why = f"unknown field {name!r}{suggestion}"
    return BadRequestError(f"{path}: {why}" if path else why, f"{path}.{name}" if path else name)


def _fields(model: type[BaseModel]) -> dict[str, Any]:
    """Returns the types of a model's fields by their names in JSON."""
    return {field.alias or name: field.annotation for name, field in model.model_fields.items()}


def _identified(models: Sequence[type[BaseModel]], part: str | int) -> list[type[BaseModel]]:
    """Returns the models that Pydantic means by a part of a path which is no field, but identifies one of several."""
    by_name = [model for model in models if model.__name__ == part]
    if by_name or len(models) == 1:
        return by_name
    return [model for model in models if part in get_args(_fields(model).get("type"))]


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    """Yields the models in a type."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models(argument)

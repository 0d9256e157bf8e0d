"""Finds the place in a constraint for which llguidance refuses it, since llguidance's errors name none.

It is the innermost schema that is refused for the same reason without what surrounds it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from typing import Any

from mpt_grpc.constraint import JsonSchema
from mpt_grpc.conversation import OutputConstraint, ToolCalls
from mpt_grpc.errors import FieldViolation
from mpt_grpc.json_values import parse_json
from mpt_grpc.text.grammar import constraint_field
from mpt_grpc.text.refusals import IMPOSSIBLE
from mpt_grpc.text.schema_places import Place, inner, pointer
from mpt_grpc.text.tools import parameters

_MAX_TRIED, _MAX_S = 128, 0.5
"""The maximum number of schemas that are tried, each of which takes some milliseconds, and the time for all."""
_MAX_PLACE_CHARACTERS = 200
_IMPOSSIBLE = IMPOSSIBLE.partition(":")[0]


def with_place(
    violation: FieldViolation, constraint: OutputConstraint, refusal: Callable[[OutputConstraint], str | None]
) -> FieldViolation:
    """Returns a violation of a constraint as a whole with the place where it lies, as far as it can be found.

    refusal: returns why a constraint is refused, or None.
    """
    search = _Search(violation.description, refusal)
    field = violation.field
    if isinstance(constraint, ToolCalls):
        found = next((part for part in _parts(constraint) if search.is_refused(part[1])), None)
        if found is None:
            return violation
        field, constraint = found
    if not isinstance(constraint, JsonSchema):
        return FieldViolation(field, search.reason)
    place = pointer(search.innermost(parse_json(constraint.schema)))
    is_shown = 0 < len(place) <= _MAX_PLACE_CHARACTERS  # errors are cut at their end, which has the reason
    return FieldViolation(field, f"{place}: {search.reason}" if is_shown else search.reason)


def _parts(constraint: ToolCalls) -> Iterator[tuple[str, OutputConstraint]]:
    """Yields the parameters of the tools and the constraint on the text, with their fields."""
    for index, tool in enumerate(constraint.tools):
        field = f"conversation.tools[{index}].parameters"
        yield field, JsonSchema(json.dumps({"type": "object"} | parameters(tool, field)))
    if constraint.content is not None:
        yield constraint_field(constraint.content), constraint.content


class _Search:
    def __init__(self, reason: str, refusal: Callable[[OutputConstraint], str | None]) -> None:
        self.reason = reason
        """Why the innermost part that has been found is refused."""
        self._refusal = refusal
        self._num_left, self._end_s = _MAX_TRIED, time.monotonic() + _MAX_S

    def is_refused(self, part: OutputConstraint) -> bool:
        """Whether a part is refused by itself, for the same reason as all of it."""
        self._num_left -= 1
        reason = self._refusal(part) if self._num_left >= 0 and time.monotonic() < self._end_s else None
        if reason is None or _kind(reason) != _kind(self.reason):
            return False
        self.reason = reason
        return True

    def innermost(self, root: dict[str, Any]) -> Place:
        """Returns the place of the innermost schema that is refused, given that the whole one is."""
        definitions = {name: root[name] for name in ("$schema", "$defs", "definitions") if name in root}
        place: Place = None
        seen = {id(root)}
        parts = inner(root, root, place)
        while (found := next(parts, None)) is not None:
            part, where = found
            if not isinstance(part, dict) or id(part) in seen:
                continue
            seen.add(id(part))
            if self.is_refused(JsonSchema(json.dumps(definitions | part))):
                place = where
                parts = inner(root, part, place)
        return place


def _kind(reason: str) -> str:
    """Returns what a schema and one around it have in common of the reason for which they are refused."""
    return _IMPOSSIBLE if reason.startswith(_IMPOSSIBLE) else reason

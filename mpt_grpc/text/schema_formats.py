"""The values of `format` in JSON Schemas that are enforced, some of them by patterns."""

from __future__ import annotations

from typing import Any

_FORMATS = frozenset("duration email ipv4 ipv6 unknown uri uuid".split())
"""The values of `format` that llguidance enforces."""
_YEAR = "(000[1-9]|00[1-9][0-9]|0[1-9][0-9]{2}|[1-9][0-9]{3})"
_DATE = (
    f"({_YEAR}-((0[13578]|1[02])-(0[1-9]|[12][0-9]|3[01])|(0[469]|11)-(0[1-9]|[12][0-9]|30)|02-(0[1-9]|1[0-9]|2[0-8]))"
    "|([0-9]{2}(0[48]|[2468][048]|[13579][26])|(0[48]|[2468][048]|[13579][26])00)-02-29)"
)
_TIME = r"([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\.[0-9]+)?(Z|[+-]([01][0-9]|2[0-3]):[0-5][0-9])"
_LABEL = (
    "[a-zA-Z0-9]([a-zA-Z0-9-]{0,2}[a-zA-Z0-9]"
    "|[a-zA-Z0-9-]([a-zA-Z0-9][a-zA-Z0-9-]|-[a-zA-Z0-9])[a-zA-Z0-9-]{0,58}[a-zA-Z0-9])?"
)
_PATTERNS = {
    "date": f"^{_DATE}$",
    "date-time": f"^{_DATE}T{_TIME}$",
    "hostname": rf"^{_LABEL}(\.{_LABEL})*$",
    "time": f"^{_TIME}$",
}
"""Formats for which llguidance allows values that few programs read: days that do not exist, leap seconds, lower-case
letters in times, and host names that need IDNA's tables."""
ENFORCED_FORMATS = _FORMATS | _PATTERNS.keys()


def express_format(schema: dict[str, Any]) -> None:
    """Expresses a format by a pattern."""
    name = schema.get("format")
    if not isinstance(name, str) or name not in _PATTERNS:
        return
    del schema["format"]
    if name == "hostname":
        schema["maxLength"] = min(schema.get("maxLength", 253), 253)
    if "pattern" in schema:
        schema["allOf"] = [*schema.get("allOf", ()), {"pattern": _PATTERNS[name]}]
    else:
        schema["pattern"] = _PATTERNS[name]

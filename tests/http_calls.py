"""Calls of the HTTP API without an SDK."""

from __future__ import annotations

import json
import urllib.request
from typing import Any


def call(server: Any, path: str, body: Any = None) -> Any:
    """Returns the JSON response to a GET or, with a body, a POST. Raises urllib's HTTPError."""
    url = f"{server.openai_url.removesuffix('/v1')}{path}"
    content = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(url, content), timeout=60) as response:
        return json.load(response)


def stream(server: Any, path: str, body: dict[str, Any]) -> list[Any]:
    """Returns the chunks of a stream, as JSON."""
    content = json.dumps({**body, "stream": True}).encode()
    with urllib.request.urlopen(f"{server.openai_url.removesuffix('/v1')}{path}", content, timeout=60) as response:
        events = [line.removeprefix(b"data: ") for line in response if line.startswith(b"data: ")]
    assert events.pop() == b"[DONE]\n"
    return [json.loads(event) for event in events]

"""Calls of the HTTP API without an SDK."""

from __future__ import annotations

import json
import urllib.request
from typing import Any


def ask(server: Any, path: str, body: Any = None) -> Any:
    """The answer to a GET, or with a body to a POST. Raises urllib's HTTPError."""
    url = f"{server.openai_url.removesuffix('/v1')}{path}"
    content = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(url, content), timeout=60) as answer:
        return json.load(answer)

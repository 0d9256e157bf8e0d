"""Calls of the HTTP API without an SDK."""

from __future__ import annotations

import asyncio
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


def response_events(server: Any, body: dict[str, Any]) -> list[Any]:
    """Returns the events of a stream of `/v1/responses`, as JSON."""
    content = json.dumps({**body, "stream": True}).encode()
    with urllib.request.urlopen(f"{server.openai_url}/responses", content, timeout=60) as response:
        lines = response.read().decode().splitlines()
    names = [line.removeprefix("event: ") for line in lines[::3]]
    events = [json.loads(line.removeprefix("data: ")) for line in lines[1::3]]
    assert [event["type"] for event in events] == names
    return events


async def send(
    server: Any, method: str, path: str, body: Any = None, *, length: int | None = None, **headers: str
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Sends a request and returns the connection. `length` is the Content-Length if the body is not complete."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.http_port, limit=1 << 24)
    content = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
    fields = {"host": "localhost", "content-length": str(length or len(content)), "connection": "close", **headers}
    lines = [f"{method} {path} HTTP/1.1", *(f"{name.replace('_', '-')}: {value}" for name, value in fields.items())]
    writer.write("\r\n".join([*lines, "", ""]).encode() + content)
    return reader, writer


async def read_response(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> tuple[int, dict[str, str], Any]:
    """Returns the status, the headers and the JSON of a response, and closes the connection."""
    head, _, content = (await reader.read()).partition(b"\r\n\r\n")
    writer.close()
    status, *fields = head.decode().split("\r\n")
    headers = dict(field.split(": ", 1) for field in fields)
    is_json = headers.get("content-type") == "application/json" and content
    return int(status.split()[1]), headers, json.loads(content) if is_json else content


async def fetch(server: Any, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
    """Returns the status and the JSON of the response to a request."""
    status, _, content = await read_response(*await send(server, method, path, body, **headers))
    return status, content

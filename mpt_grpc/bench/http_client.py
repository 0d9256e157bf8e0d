"""A small HTTP/1.1 client for streams: connections that are kept open, and httptools to parse, which costs little."""

from __future__ import annotations

import asyncio
import os
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Self
from urllib.parse import urlsplit

from httptools import HttpParserError, HttpResponseParser


class HttpClient:
    """Connects to the host of one URL, without a proxy. Raises OSError for everything that fails."""

    def __init__(self, url: str) -> None:
        """Creates a client for a URL with http:// or https://. Raises ValueError."""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{url!r} is not a URL such as http://localhost:8451/v1")
        self._host, self._ssl = parts.hostname, ssl.create_default_context() if parts.scheme == "https" else None
        self._port = parts.port or (443 if self._ssl else 80)
        self._path = parts.path.rstrip("/")
        key = os.environ.get("OPENAI_API_KEY")
        self._headers = f"Host: {parts.netloc.rpartition('@')[2]}\r\nContent-Type: application/json\r\n"
        self._headers += f"Authorization: Bearer {key}\r\n" if key else ""
        self._idle: list[HttpResponse] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        while self._idle:
            self._idle.pop().close()

    @asynccontextmanager
    async def request(self, method: str, path: str, body: bytes = b"") -> AsyncIterator[HttpResponse]:
        """Sends a request for a path below the URL's, or from the root if it begins with `/`."""
        path = path if path.startswith("/") else f"{self._path}/{path}"
        connection = await self._connection()
        try:
            head = f"{method} {path} HTTP/1.1\r\n{self._headers}Content-Length: {len(body)}\r\n\r\n"
            await connection.start(head.encode() + body)
            yield connection
        except HttpParserError as error:
            raise OSError(f"the response is not HTTP: {error}") from error
        finally:
            if connection.is_reusable:
                self._idle.append(connection)
            else:
                connection.close()

    async def _connection(self) -> HttpResponse:
        while self._idle:
            connection = self._idle.pop()
            if not connection.is_closed:
                return connection
            connection.close()
        return HttpResponse(*await asyncio.open_connection(self._host, self._port, ssl=self._ssl))


class HttpResponse:
    """A connection and the response that is read from it; httptools calls the methods `on_...`."""

    status = 0

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    async def start(self, request: bytes) -> None:
        """Sends a request and reads the head of its response."""
        self._parser = HttpResponseParser(self)
        self._body: list[bytes] = []
        self.status, self._has_ended = 0, False
        self._writer.write(request)
        while not self.status:
            await self._read()

    async def pieces(self) -> AsyncIterator[bytes]:
        """Yields the body as it arrives."""
        while True:
            if self._body:
                piece = b"".join(self._body)
                self._body.clear()
                yield piece
            if self._has_ended:
                return
            await self._read()

    async def content(self) -> bytes:
        """Returns the rest of the body."""
        return b"".join([piece async for piece in self.pieces()])

    @property
    def is_reusable(self) -> bool:
        return self._has_ended and self._parser.should_keep_alive()

    @property
    def is_closed(self) -> bool:
        """Whether the server has closed the connection."""
        return self._reader.at_eof()

    def close(self) -> None:
        self._writer.close()

    async def _read(self) -> None:
        data = await self._reader.read(1 << 16)
        if not data:
            raise ConnectionResetError("the server closed the connection")
        self._parser.feed_data(data)

    def on_headers_complete(self) -> None:
        self.status = self._parser.get_status_code()

    def on_body(self, data: bytes) -> None:
        self._body.append(data)

    def on_message_complete(self) -> None:
        self._has_ended = True

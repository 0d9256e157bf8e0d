"""The HTTP/1.1 protocol of uvicorn, with limits on the time and the size of what a caller sends before it is served, on
the time in which it reads, and with the name in its certificate.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any

from starlette.responses import Response
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from mpt_grpc.gateway.errors import BadRequestError, error_response
from mpt_grpc.tls import subject_name

HEAD_TIMEOUT_S = 10
"""The time for the head of a request, and for the rest of a body whose response has already been sent."""
MAX_HEAD_BYTES = 64 << 10
_PIECE_BYTES = 4 << 10
"""The most that is parsed ahead of a request being served: some hundred requests, which take a millisecond."""


class BoundedProtocol(HttpToolsProtocol):
    """Closes connections whose request does not arrive in time, or sends more than a head without a body's bytes, and
    those to which nothing could be sent for `read_timeout_s`, because the caller does not read.

    Between requests, uvicorn's keep-alive timeout applies; the time for a body that is read is limited where it is
    read.
    """

    flow: _ReadingWhenParsed

    def __init__(self, *arguments: Any, read_timeout_s: float, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._read_timeout_s = read_timeout_s
        self._timer: asyncio.TimerHandle | None = None
        self._unread_timer: asyncio.TimerHandle | None = None
        self._certified_name: str | None = None
        self._is_head_complete = False
        self._piece = memoryview(b"")
        """What is being parsed."""
        self._num_unparsed = 0
        """The bytes since the last complete head or piece of a body: headers, trailers or chunk extensions."""
        self._served: RequestResponseCycle | None = None
        """The request that is being served; `cycle` is the last that has been parsed."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.flow = _ReadingWhenParsed(transport)
        if certificate := transport.get_extra_info("peercert"):
            self._certified_name = subject_name(certificate)
        self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        self._stop_unread_timer()
        self._unset_keepalive_if_required()
        super().connection_lost(exc)
        if self._served is None:
            return
        if not self._served.response_complete:
            self._served.disconnected = True
            self._served.message_event.set()
        # The requests that wait refer to this connection, which would be kept until garbage is collected.
        self.cycle = self._served
        self.pipeline.clear()

    def pause_writing(self) -> None:
        """Called when as much is unread as is buffered."""
        super().pause_writing()
        # Not `close`, which waits until the caller has read.
        self._unread_timer = self.loop.call_later(self._read_timeout_s, self.transport.abort)

    def resume_writing(self) -> None:
        """Called when the caller has read most of it."""
        self._stop_unread_timer()
        super().resume_writing()

    def data_received(self, data: bytes) -> None:
        if self._is_idle:
            self._start_timer()
        waiting = self.flow.waiting
        self.flow.waiting = memoryview(b"".join((waiting, data)) if waiting else data)
        self._parse()

    def _parse(self) -> None:
        """Parses what has been received until a request waits for the one before it: each takes time and memory."""
        while (waiting := self.flow.waiting) and not self.pipeline and not self.transport.is_closing():
            self._piece, self.flow.waiting = waiting[:_PIECE_BYTES], waiting[_PIECE_BYTES:]
            self._num_unparsed += len(self._piece)
            super().data_received(self._piece)  # type: ignore[arg-type]  # httptools takes any buffer
            if self._num_unparsed > MAX_HEAD_BYTES and not self.transport.is_closing():
                why = f"the headers exceed {MAX_HEAD_BYTES >> 10} KiB; shorten them"
                self._refuse(BadRequestError(why, status=431))
        self._piece = memoryview(b"")
        if self.flow.waiting:
            self.flow.pause_reading()
        else:
            self.flow.waiting = memoryview(b"")  # an empty part keeps all that was received with it

    def send_400_response(self, msg: str) -> None:
        """Called when the parser refuses what has been received."""
        if self._is_idle or not (self._served is not None and self._served.response_started):
            error = BadRequestError(f"{msg} Send HTTP/1.1 with a length or chunks that are right.")
            self.transport.write(_message(error_response(error), error.status))
        self.transport.close()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._is_head_complete = False
        self.scope["state"]["certified_name"] = self._certified_name

    def on_header(self, name: bytes, value: bytes) -> None:
        """Ignores trailers, which uvicorn takes for headers: they come after what they would change."""
        if not self._is_head_complete:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if self.parser.should_upgrade():
            return
        self._is_head_complete = True
        self._num_unparsed = 0
        self._stop_timer()
        super().on_headers_complete()
        if not self.pipeline:
            self._served = self.cycle
        if self.scope["http_version"] == "1.0":
            # Such a caller does not know chunks: the end of the connection is the end of a response without a length.
            self.cycle.chunked_encoding = False
            self.cycle.expected_content_length = _AnyLength()

    def on_body(self, body: bytes) -> None:
        self._num_unparsed = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():
            return
        self._num_unparsed = 0
        super().on_message_complete()

    def on_response_complete(self) -> None:
        if self.pipeline and not self.transport.is_closing():
            self._served, _ = self.pipeline[-1]
        super().on_response_complete()
        if self._is_idle and self.cycle.more_body:
            self._start_timer()
        self._parse()

    def _unsupported_upgrade_warning(self) -> None:
        """Called when the parser has stopped at the end of a head that asks for another protocol, such as h2c.

        Java's client asks so in each request. A server may ignore it, so the head is parsed again without it.
        """
        if self.parser.get_method() == b"CONNECT":
            self._refuse(BadRequestError("CONNECT is not allowed, since this is no proxy", status=405))
            return
        stopped = sys.exception()
        assert stopped is not None
        request = b"%b %b HTTP/%b" % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())
        headers = (b"%b: %b" % header for header in self.headers if header[0] != b"upgrade")
        head = b"\r\n".join((request, *headers, b"", b""))
        self.parser = type(self.parser)(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn's own
        self._num_unparsed = 0
        self.flow.waiting = memoryview(b"".join((head, self._piece[stopped.args[0] :], self.flow.waiting)))

    @property
    def _is_idle(self) -> bool:
        """Whether no request is being served, so that what arrives is a head or belongs to a request of the past."""
        return self.cycle is None or self.cycle.response_complete

    def _start_timer(self) -> None:
        if self._timer is None:
            self._timer = self.loop.call_later(HEAD_TIMEOUT_S, self._time_out)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _stop_unread_timer(self) -> None:
        if self._unread_timer is not None:
            self._unread_timer.cancel()
            self._unread_timer = None

    def _time_out(self) -> None:
        if self.cycle is None:
            why = f"the headers were not received within {HEAD_TIMEOUT_S} seconds"
            self._refuse(BadRequestError(why, status=408))
        self.transport.close()

    def _refuse(self, error: BadRequestError) -> None:
        """Sends an error outside of a response, and closes the connection."""
        if self._is_idle:
            self.transport.write(_message(error_response(error), error.status))
        self.transport.close()


class _ReadingWhenParsed(FlowControl):
    """Reads no more from a connection while what has been read waits."""

    def __init__(self, transport: asyncio.Transport) -> None:
        super().__init__(transport)
        self.waiting = memoryview(b"")
        """What has been received and not been parsed yet."""

    def resume_reading(self) -> None:
        if not self.waiting:
            super().resume_reading()


class _AnyLength(int):
    """The length of a response that may have any, as uvicorn checks it."""

    def __lt__(self, other: object) -> bool:
        return False

    def __sub__(self, other: int) -> _AnyLength:
        return self


def _message(response: Response, status: int) -> bytes:
    headers = [*response.raw_headers, (b"connection", b"close")]
    return b"".join([STATUS_LINE[status], *(b"%b: %b\r\n" % header for header in headers), b"\r\n", response.body])

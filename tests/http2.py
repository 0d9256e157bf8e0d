"""HTTP/2 by hand, for callers who do what gRPC's clients never do."""

from __future__ import annotations

import struct

DATA, HEADERS, RST_STREAM, SETTINGS = 0, 1, 3, 4
END_STREAM, END_HEADERS = 1, 4
INITIAL_WINDOW_SIZE = 4
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


def frame(kind: int, payload: bytes, *, stream: int = 0, flags: int = 0) -> bytes:
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def settings(**values: int) -> bytes:
    return frame(SETTINGS, b"".join(struct.pack(">HI", globals()[name], value) for name, value in values.items()))


def call(method: str, message: bytes, *, stream: int = 1, **metadata: str) -> bytes:
    """Returns the frames of a call with a complete message."""
    headers = {
        ":method": "POST",
        ":scheme": "http",
        ":path": method,
        ":authority": "localhost",
        "content-type": "application/grpc",
        "te": "trailers",
        **metadata,
    }
    fields = b"".join(b"\0" + _text(name) + _text(value) for name, value in headers.items())
    return frame(HEADERS, fields, stream=stream, flags=END_HEADERS) + frame(
        DATA, b"\0" + struct.pack(">I", len(message)) + message, stream=stream, flags=END_STREAM
    )


def _text(text: str) -> bytes:
    """Returns a string of HPACK."""
    data, size = text.encode(), len(text)
    return (bytes([size]) if size < 127 else b"\x7f" + _varint(size - 127)) + data


def _varint(value: int) -> bytes:
    return bytes([value]) if value < 128 else bytes([value & 127 | 128]) + _varint(value >> 7)

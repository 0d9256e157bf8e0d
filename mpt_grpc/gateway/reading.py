"""The reading of request bodies, within limits of size and time."""

from __future__ import annotations

import asyncio

from starlette.requests import ClientDisconnect, Request

from mpt_grpc.gateway.errors import BadRequestError, shortened
from mpt_grpc.limits import MAX_TEXT_CHARACTERS

MAX_BODY_BYTES = 6 * MAX_TEXT_CHARACTERS + (5 << 19)
"""Room for the longest text with every character escaped, as \\u00e9, and for the other fields."""
STALL_TIMEOUT_S = 10
BODY_TIMEOUT_S = 60


async def read(request: Request) -> bytes:
    """Returns the body of a request. Raises BadRequestError if it is compressed, too long or too slow, or the caller
    leaves."""
    encoding = request.headers.get("content-encoding", "identity")
    if encoding.lower() not in ("identity", ""):
        why = f"the body has the Content-Encoding {shortened(encoding)!r}, which is not supported; send it uncompressed"
        raise BadRequestError(why, status=415)
    # The HTTP parser has refused a length that is not a number.
    if int(request.headers.get("content-length", 0)) > MAX_BODY_BYTES:
        raise _too_long()
    body = bytearray()
    now = asyncio.get_running_loop().time
    end_s = now() + BODY_TIMEOUT_S
    try:
        async with asyncio.timeout(STALL_TIMEOUT_S) as limit:
            async for piece in request.stream():
                limit.reschedule(min(now() + STALL_TIMEOUT_S, end_s))
                body += piece
                if len(body) > MAX_BODY_BYTES:
                    raise _too_long()
    except TimeoutError as error:
        why = f"the body was not received within {BODY_TIMEOUT_S} seconds, or stalled for {STALL_TIMEOUT_S}"
        raise BadRequestError(why, status=408) from error
    except ClientDisconnect as error:
        raise BadRequestError("the caller disconnected before the end of the body", status=499) from error
    return bytes(body)


def _too_long() -> BadRequestError:
    return BadRequestError(f"the body exceeds {MAX_BODY_BYTES >> 20} MiB; shorten the prompt", status=413)

"""The end of work whose HTTP caller has disconnected."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from starlette.requests import Request
from starlette.types import Receive

from mpt_grpc.gateway.errors import BadRequestError

_Result = TypeVar("_Result")


async def disconnected(receive: Receive) -> None:
    """Returns when the caller has disconnected. The request must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_disconnected(request: Request, work: Awaitable[_Result]) -> _Result:
    """Awaits work for a request that has been read, and cancels it if the caller disconnects in the meantime."""
    working = asyncio.ensure_future(work)
    disconnecting = asyncio.ensure_future(disconnected(request.receive))
    try:
        await asyncio.wait({working, disconnecting}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            working.cancel()
            raise BadRequestError("the caller has disconnected", status=499)
        return working.result()
    finally:
        working.cancel()
        disconnecting.cancel()
        await asyncio.wait({working, disconnecting})  # so that the work does not outlive the request

"""The server of gRPC, and its replacement by a new one when a call has ended it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

import grpc

from mpt_grpc.errors import SettingsError

_log = logging.getLogger(__name__)
_INTERVAL_S, _PAUSE_S = 0.2, 1.0
"""How soon an end is noticed, and the time between attempts to listen again."""
_LONG_S = 86_400 * 365.0


class RenewedServer:
    """A server of grpc.aio that is replaced when it has ended by itself.

    It does at a call whose path is not UTF-8, which anyone can send: it accepts no more connections, and the calls that
    it has continue.
    """

    def __init__(self, server: grpc.aio.Server, make: Callable[[], grpc.aio.Server]) -> None:
        """make: returns a server that listens where `server` does, once that has ended. May raise SettingsError."""
        self._server, self._make = server, make
        self._ended: dict[asyncio.Task[None], grpc.aio.Server] = {}
        """Servers whose calls continue."""

    async def start(self) -> None:
        await self._server.start()

    async def watch(self) -> None:
        """Replaces the server whenever it has ended. Runs until cancelled."""
        while True:
            try:
                await self._server.wait_for_termination(_INTERVAL_S)
            except Exception as error:
                _log.error("gRPC's server has ended, and is replaced: %s", error)
                try:
                    await self._replace()
                except SettingsError as failure:
                    _log.error("%s", failure)
                    await asyncio.sleep(_PAUSE_S)

    async def _replace(self) -> None:
        server = self._make()
        await server.start()
        ended, self._server = self._server, server
        task = asyncio.create_task(ended.stop(_LONG_S))
        self._ended[task] = ended
        task.add_done_callback(self._ended.pop)

    async def stop(self, grace_s: float) -> None:
        """Ends all calls after `grace_s`."""
        await asyncio.gather(*(server.stop(grace_s) for server in (self._server, *self._ended.values())))

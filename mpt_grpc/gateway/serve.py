"""Serves the gateway on the running event loop with uvicorn, as a client of a gRPC server."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import math
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import uvicorn
from fastapi import FastAPI

from mpt_grpc.errors import SettingsError
from mpt_grpc.gateway.app import make_app
from mpt_grpc.settings import HttpSettings
from mpt_grpc_client import AsyncClient


@asynccontextmanager
async def running_gateway(
    target: str | None, host: str, settings: HttpSettings, grace_s: float = 1
) -> AsyncIterator[int]:
    """Serves the OpenAI-compatible API for the gRPC server at `target` inside the block and yields the port.

    The gRPC server need not be running yet. Requests in progress at the end of the block have `grace_s` to finish.
    Raises SettingsError if it cannot listen on the port.
    """
    # The HTTP caller decides whether to retry.
    async with AsyncClient(target, retries=False) as client:
        app = make_app(client, strict_model_names=settings.strict_model_names)
        async with _serving(app, host, settings.port or 0, grace_s) as port:
            yield port


@asynccontextmanager
async def _serving(app: FastAPI, host: str, port: int, grace_s: float) -> AsyncIterator[int]:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio disables Nagle's algorithm, which delays a response of two packets by 40 ms, only for this protocol.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        flag = "host" if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL else "http-port"
        remedy = "; --http-port 0 selects a free port" if error.errno == errno.EADDRINUSE else ""
        raise SettingsError(f"--{flag}: cannot listen on {host}:{port}: {error.strerror}{remedy}") from error
    config = uvicorn.Config(app, log_config=None, timeout_graceful_shutdown=math.ceil(grace_s))
    server = _Server(config)
    running = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        await server.ready.wait()
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        await running
        listener.close()


class _Server(uvicorn.Server):
    """A uvicorn server that signals when it is ready and leaves signal handling to the owner of the event loop."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.ready = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.ready.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

"""The gateway on the loop that is running: the application over a client of a gRPC server, served by uvicorn."""

from __future__ import annotations

import asyncio
import contextlib
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
    """Serves OpenAI's API for the gRPC server at `target` inside the block, and gives the port.

    The gRPC server need not run yet. What runs when the block is left has `grace_s` to finish.
    Raises SettingsError if the port cannot be had.
    """
    # Whether to try again is the HTTP caller's to decide.
    async with AsyncClient(target, retries=False) as client:
        app = make_app(client, strict_model_names=settings.strict_model_names)
        async with _serving(app, host, settings.port or 0, grace_s) as port:
            yield port


@asynccontextmanager
async def _serving(app: FastAPI, host: str, port: int, grace_s: float) -> AsyncIterator[int]:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # With the protocol named, asyncio turns Nagle's algorithm off, which costs an answer of two packets 40 ms.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise SettingsError(f"--http-port: cannot listen on {host}:{port}: {error}; 0 takes a free port") from error
    config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=math.ceil(grace_s))
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
    """Says when it is ready, and leaves signals to who runs the loop."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.ready = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.ready.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

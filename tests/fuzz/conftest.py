"""The server of all tests of this folder, and the profile of `make fuzz`."""

from __future__ import annotations

from collections.abc import Iterator

import grpc
import pytest
from hypothesis import settings
from server_process import ServerProcess, running

settings.register_profile("fuzz", max_examples=100_000, print_blob=True)


@pytest.fixture(scope="package")
def server() -> Iterator[ServerProcess]:
    """A server that must have logged no traceback by its end."""
    with running() as server:
        yield server
        server.terminate()
        assert server.wait() == 0
        assert "Traceback" not in server.stderr


@pytest.fixture(scope="package")
def channel(server: ServerProcess) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server.target) as channel:
        yield channel

"""Fixtures that start servers and gateways as users do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from server_process import running, running_gateway


@pytest.fixture
def start_server() -> Iterator[Callable[..., Any]]:
    """Starts servers with additional flags, and kills those still running when the test ends."""
    with ExitStack() as stack:
        yield lambda *flags: stack.enter_context(running(*flags))


@pytest.fixture
def start_gateway() -> Iterator[Callable[..., Any]]:
    """Starts gateways with additional flags, and kills those still running when the test ends."""
    with ExitStack() as stack:
        yield lambda *flags: stack.enter_context(running_gateway(*flags))

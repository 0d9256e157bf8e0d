"""`mpt-grpc serve`: the server."""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import signal

from mpt_grpc.commands import logs, server_options
from mpt_grpc.errors import SettingsError


def run(parsed: argparse.Namespace) -> None:
    """Serves until SIGTERM or SIGINT, then lets requests finish.

    Raises SettingsError for an invalid flag or a port in use, and ModelError for a model that cannot be loaded.
    """
    logs.configure(parsed.log_level, parsed.log_format)
    # Until the server is ready, Ctrl-C ends it immediately; from then on it drains.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    settings = server_options.settings(parsed)
    if importlib.util.find_spec("torch") is None:
        raise SettingsError("serve requires PyTorch; install the extra 'torch' (see docs/install.md)")
    # Imported here, since it imports torch, which takes seconds.
    from mpt_grpc.server.server import RunningServer, serve
    from mpt_grpc.server.welcome import welcome

    def on_ready(server: RunningServer) -> None:
        print(welcome(server), flush=True)

    asyncio.run(serve(settings, on_ready))

"""`mpt-grpc serve`: the server."""

from __future__ import annotations

import argparse
import asyncio
import logging
import signal

from mpt_grpc.commands import server_options


def run(parsed: argparse.Namespace) -> None:
    """Serves until SIGTERM or SIGINT, then lets requests finish.

    Raises SettingsError for a bad flag or a port that is taken, ModelError for a model that cannot be loaded.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    # A caller who leaves in mid-send is no error; what fails in a method is logged by our interceptor.
    logging.getLogger("grpc._cython.cygrpc").setLevel(logging.CRITICAL)
    # Until the server is ready Ctrl-C ends it at once; from then on it drains.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    settings = server_options.settings(parsed)
    # Imports torch, for which a bad flag does not wait.
    from mpt_grpc.server.server import serve
    from mpt_grpc.server.welcome import welcome

    asyncio.run(serve(settings, lambda server: print(welcome(server), flush=True)))

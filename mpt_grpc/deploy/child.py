"""A server that is the child of a process that places it: it reports to its parent, and ends with it.

A report is a line of JSON on standard output: first the addresses, then every second whether the server is live and how
many requests it has. A start that fails reports the reason. When standard input closes, because the parent is gone, the
server ends at once, and clients continue their streams elsewhere.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub

from mpt_grpc.commands import logs, server_options
from mpt_grpc.errors import MptServerError, SettingsError
from mpt_grpc.telemetry import variables

if TYPE_CHECKING:
    from mpt_grpc.server.server import RunningServer

_REPORT_INTERVAL_S = 1.0


class _Parser(argparse.ArgumentParser):
    """Raises SettingsError instead of ending the process."""

    def error(self, message: str) -> NoReturn:
        raise SettingsError(message)


def parse(flags: Sequence[str]) -> argparse.Namespace:
    """Returns the parsed flags of `mpt-grpc serve`. Raises SettingsError."""
    parser = _Parser(allow_abbrev=False, add_help=False)
    server_options.add_flags(parser)
    return parser.parse_args(flags)


def main() -> int:
    """Serves with the flags of `mpt-grpc serve`, and returns the exit status."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    variables.remove_empty()
    if problem := variables.problem(is_server=True):
        _write(error=problem)
        return 1
    # Imported here, since it imports torch, which the parent does without.
    from mpt_grpc.server.server import serve

    tasks = []

    def on_ready(server: RunningServer) -> None:
        tasks.append(asyncio.get_running_loop().create_task(_report(server)))

    try:
        parsed = parse(sys.argv[1:])
        logs.configure(parsed.log_level, parsed.log_format)
        asyncio.run(serve(server_options.settings(parsed), on_ready))
    except MptServerError as error:
        _write(error=str(error))
        return 1
    return 0


def _end_with_parent() -> None:
    os.read(sys.stdin.fileno(), 1)  # sys.stdin would hold a lock that Python needs to exit
    os._exit(1)


async def _report(server: RunningServer) -> None:
    from mpt_grpc.server.server import LIVE

    port = server.http_port
    _write(target=server.target, openai_url=None if port is None else server.settings.server.url(port))
    health: Any = HealthStub(server.channel)
    while True:
        status = (await health.Check(HealthCheckRequest(service=LIVE))).status
        load = server.engine.load
        num_requests = load.num_running + load.num_waiting + load.num_preparing
        _write(is_live=status == HealthCheckResponse.SERVING, num_requests=num_requests)
        await asyncio.sleep(_REPORT_INTERVAL_S)


def _write(**report: Any) -> None:
    print(json.dumps(report), flush=True)


if __name__ == "__main__":
    sys.exit(main())

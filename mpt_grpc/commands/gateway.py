"""`mpt-grpc gateway`: the OpenAI-compatible API and the web page, in a process separate from the engine's."""

from __future__ import annotations

import argparse
import asyncio
import signal

from mpt_grpc.commands import logs, server_options
from mpt_grpc.errors import SettingsError
from mpt_grpc.gateway.serve import running_gateway
from mpt_grpc.listening import address
from mpt_grpc.settings import HttpSettings, ServerSettings
from mpt_grpc_client.channel import resolve_targets


def run(parsed: argparse.Namespace) -> None:
    """Serves until SIGTERM or SIGINT, then lets requests finish; a second signal ends the process.

    Raises SettingsError for an invalid setting or a port in use.
    """
    logs.configure(parsed.log_level)
    server = ServerSettings(host=parsed.host, grace_s=parsed.grace)
    http = server_options.http_settings(parsed, parsed.http_port)
    targets = resolve_targets(parsed.target)
    if len(targets) > 1:
        raise SettingsError("--target: a gateway serves one target; run one for each server")
    asyncio.run(_serve(targets[0], server, http))


async def _serve(target: str, server: ServerSettings, http: HttpSettings) -> None:
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    async with running_gateway(target, server.host, http, server.grace_s) as port:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        url = f"http://{address(server.reachable_host, port)}"
        welcome = (
            f"mpt-grpc gateway for {target}",
            f"  OpenAI    {url}/v1",
            f"  web page  {url}/",
            f"  try       curl {url}/v1/models",
        )
        print("\n".join(welcome), flush=True)
        await stop.wait()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)

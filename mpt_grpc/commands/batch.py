"""`mpt-grpc batch`: sends the requests in a file and writes a file of the responses.

The requests go through the gateway's own application in this process, so they mean what they mean over HTTP, and take
what every command takes: several targets, TLS, access tokens, and servers without an HTTP port.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Generator
from dataclasses import dataclass

import httpx

from mpt_grpc.commands.batch_file import (
    STANDARD_STREAM,
    BatchOutput,
    BatchRequest,
    InvalidLine,
    count_lines,
    open_input,
    open_output,
    read_requests,
)
from mpt_grpc.commands.connection import client_options
from mpt_grpc.commands.progress import make_progress
from mpt_grpc.errors import BatchError
from mpt_grpc.gateway.in_process import in_process_gateway
from mpt_grpc.limits import RANGES

_LOWEST_PRIORITY = RANGES["priority"].high  # over HTTP, lower values run first
_RETRY_AFTER_MS = 1000
"""The time to wait if an overloaded server does not set one."""
_REFUSES_ALL = (401, 403, 503)
"""The statuses that concern the caller or the server, not one request: all others would get them, too."""


def run(parsed: argparse.Namespace) -> None:
    """Writes a result for each line of the input that has none yet.

    Raises BatchError if a request fails, or before the end if the server refuses or does not respond.
    """
    with open_input(parsed.input) as file, open_output(parsed.output) as output:
        counts = _Counts(total=count_lines(file))
        try:
            asyncio.run(_run(parsed, read_requests(file), output, counts))
        finally:
            hint = "; run the same command again to continue" if parsed.output != STANDARD_STREAM else ""
            print(f"{counts}{hint if counts.num_done < counts.total else ''}", file=sys.stderr)
    if counts.num_failed:
        raise BatchError("not all requests succeeded; the lines of those that failed have the errors")


@dataclass
class _Counts:
    """How many lines of the input have a result, of this run or an earlier one."""

    total: int
    num_succeeded: int = 0
    num_failed: int = 0

    @property
    def num_done(self) -> int:
        return self.num_succeeded + self.num_failed

    def add(self, is_success: bool) -> None:
        self.num_succeeded += is_success
        self.num_failed += not is_success

    def __str__(self) -> str:
        return f"{self.num_done} of {self.total} requests: {self.num_succeeded} succeeded, {self.num_failed} failed"


async def _run(
    parsed: argparse.Namespace, lines: Generator[BatchRequest | InvalidLine], output: BatchOutput, counts: _Counts
) -> None:
    async with in_process_gateway(parsed.target, **client_options(parsed)) as http:
        _check(await http.get("/v1/models"))
        with make_progress() as progress:
            bar = progress.add_task("requests", total=counts.total)

            async def send() -> None:
                for line in lines:  # shared by all senders
                    counts.add(await _is_success(http, line, output))
                    progress.update(bar, completed=counts.num_done)

            senders = [asyncio.ensure_future(send()) for _ in range(parsed.concurrency)]
            try:
                await asyncio.gather(*senders)
            except BatchError:
                lines.close()  # but what is in progress may still end, as on a server that drains
                await asyncio.wait(senders)
                raise
            finally:
                for sender in senders:
                    sender.cancel()
                await asyncio.wait(senders)


async def _is_success(http: httpx.AsyncClient, line: BatchRequest | InvalidLine, output: BatchOutput) -> bool:
    """Writes the result of a line, unless there is one, and returns whether it is a success. Raises BatchError."""
    if (is_success := output.is_success(line)) is not None:
        return is_success
    if isinstance(line, InvalidLine):
        output.write_error(line)
        return False
    response = await _response(http, line)
    _check(response)
    output.write_response(line, response.status_code, response.headers["x-request-id"], response.json())
    return response.is_success


async def _response(http: httpx.AsyncClient, request: BatchRequest) -> httpx.Response:
    """Returns the response to a request, which is repeated while the server is overloaded."""
    priority = request.body.get("priority")
    content = json.dumps({**request.body, "priority": _LOWEST_PRIORITY if priority is None else priority})
    while True:
        response = await http.post(request.url, content=content)
        if response.status_code != 429:
            return response
        await asyncio.sleep(int(response.headers.get("retry-after-ms", _RETRY_AFTER_MS)) / 1000)


def _check(response: httpx.Response) -> None:
    """Raises BatchError if the response is an error that all requests would get."""
    if response.status_code in _REFUSES_ALL:
        raise BatchError(response.json()["error"]["message"])

"""Clients in forked processes, in several event loops, and with thousands of streams."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
import threading

import grpc
import pytest

from mpt_grpc_client import AsyncClient
from mpt_grpc_client.proto.v1 import text_generation_pb2 as pb
from mpt_grpc_client.proto.v1 import text_generation_pb2_grpc as pb_grpc

NUM_STREAMS = 1500
# Runs in a process of its own, since the fork of a process that has other threads is undefined.
FORK = """
import asyncio, os, sys
from mpt_grpc_client import AsyncClient, Client, MptGrpcError

target, parent, child = sys.argv[1:]
client, async_client = Client(target), AsyncClient(target)

async def name(client):
    return (await client.get_model_info(timeout=20)).name

stream = None
if parent == "Client":
    client.get_model_info()
elif parent == "stream":
    stream = client.stream("Once")
elif parent == "AsyncClient":
    asyncio.run(name(async_client))

if pid := os.fork():
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
try:
    if child == "Client":
        try:
            client.get_model_info(timeout=20)
        except MptGrpcError as error:
            # gRPC closes the parent's connection in the child, and may have given it to the call before.
            if "Closed on fork" not in str(error):
                raise
        print(client.get_model_info(timeout=20).name, Client(target).get_model_info(timeout=20).name, flush=True)
    elif child == "stream":
        print(list(stream))
    elif child == "cancel":
        print(asyncio.run(AsyncClient([target, "127.0.0.1:1"], timeout=20).cancel("r")))
    else:
        print(asyncio.run(name(AsyncClient(target))), flush=True)
except Exception as error:
    print(f"{type(error).__name__}: {error}", flush=True)
os._exit(0)
"""


@pytest.mark.parametrize(
    ("parent", "child", "printed"),
    [
        ("none", "Client", "demo demo"),
        ("none", "AsyncClient", "demo"),
        ("Client", "Client", "demo demo"),
        ("Client", "AsyncClient", "demo"),
        ("AsyncClient", "Client", "demo demo"),
        ("AsyncClient", "AsyncClient", "RuntimeError: an AsyncClient was used before this process was forked, .*spawn"),
        ("AsyncClient", "cancel", "RuntimeError: an AsyncClient was used before this process was forked, .*spawn"),
        ("stream", "stream", "RuntimeError: this stream belongs to the process that started it"),
    ],
)
def test_a_forked_process_works_or_gets_a_clear_error(scripted, target, parent, child, printed):
    scripted.model = pb.GetModelInfoResponse(name="demo")
    command = [sys.executable, "-c", FORK, target, parent, child]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert re.match(printed, ended.stdout), ended


def test_event_loops_of_several_threads_have_a_client_each(scripted, target):
    names = []

    async def call() -> None:
        async with AsyncClient(target) as client:
            infos = await asyncio.gather(*(client.get_model_info() for _ in range(20)))
            names.extend(info.name for info in infos)

    scripted.model = pb.GetModelInfoResponse(name="demo")
    threads = [threading.Thread(target=asyncio.run, args=(call(),)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert names == ["demo"] * 80


class Meeting(pb_grpc.TextGenerationServiceServicer):
    """Streams that respond once all of them have arrived."""

    def __init__(self) -> None:
        self.num_streams = 0
        self.all_arrived = asyncio.Event()

    async def StreamGenerate(self, request, _):  # noqa: N802  (named as in the API)
        self.num_streams += 1
        if self.num_streams == NUM_STREAMS:
            self.all_arrived.set()
        await self.all_arrived.wait()
        yield pb.StreamGenerateResponse(output=pb.Output(text=request.text, num_tokens=1))


async def test_one_client_carries_thousands_of_streams():
    # As of the server; gRPC's own limit is 1000.
    server = grpc.aio.server(options=[("grpc.server.max_pending_requests", 100_000)])
    pb_grpc.add_TextGenerationServiceServicer_to_server(Meeting(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()

    async def text(prompt: str) -> str:
        return "".join([piece async for piece in client.stream(prompt)])

    async with AsyncClient(f"127.0.0.1:{port}", timeout=60) as client:
        prompts = [str(number) for number in range(NUM_STREAMS)]
        assert await asyncio.gather(*map(text, prompts)) == prompts
    await server.stop(None)

"""Measures what requests and tokens cost on the host, with a model that costs next to nothing.

python benchmarks/host_path.py

The model has the built-in tokenizer, one layer of 32 dimensions and random weights. Beside each other: the engine in
its own process, the same served over gRPC and as chat completions over HTTP, and a grpc.aio server that only sends
messages of the same size. A probe measures the longest time that the server's event loop takes to get to a timer.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import grpc
from torch import Tensor

import mpt_grpc
from mpt_grpc.engine.load import load_engine
from mpt_grpc.engine.stream import AsyncStream
from mpt_grpc.model.attention import AttentionMetadata
from mpt_grpc.model.runner import Runner
from mpt_grpc.request import GenerationRequest, SamplingParameters, StoppingCriteria
from mpt_grpc.server.server import RunningServer, serve
from mpt_grpc.settings import HttpSettings, ModelSettings, SchedulerSettings, ServerSettings, Settings
from mpt_grpc_client import AsyncClient
from mpt_grpc_client.proto.v1 import text_generation_pb2 as pb

PROMPT, NUM_TOKENS, NUM_REQUESTS = "Once upon a time there was a king", 400, 200
_DEMO = Path(mpt_grpc.__file__).parent / "demo"
_MAX_RUNNING = 128
_PROBE_S = 0.002


def make_model(folder: Path) -> None:
    """Writes the configuration and the tokenizer of the model; its weights are random."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(_DEMO / name, folder)
    config = json.loads((_DEMO / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "d_model": 32, "n_heads": 2, "n_layers": 1}))


def _settings(folder: Path) -> Settings:
    return Settings(
        model=ModelSettings(model=str(folder), load_format="random", dtype="float32"),
        scheduler=SchedulerSettings(max_running_requests=_MAX_RUNNING),
        server=ServerSettings(host="127.0.0.1", grpc_port=0),
        http=HttpSettings(port=0),
    )


@contextmanager
def timed_model() -> Iterator[Callable[[], float]]:
    """Yields what returns the seconds that steps have spent in the model so far."""
    compute, spent_s = Runner.compute, 0.0

    def timed(runner: Runner, metadata: AttentionMetadata) -> tuple[Tensor, Tensor, Tensor]:
        nonlocal spent_s
        start_s = time.perf_counter()
        result = compute(runner, metadata)
        spent_s += time.perf_counter() - start_s
        return result

    with mock.patch.object(Runner, "compute", timed):
        yield lambda: spent_s


async def in_process(folder: Path, num_streams: int, temperature: float) -> tuple[float, float, float]:
    """Returns tokens/s and milliseconds a step of the engine, with and without the model.

    The streams are read on the event loop of the same process.
    """
    engine, _ = load_engine(_settings(folder), loop=asyncio.get_running_loop())

    async def read(number: int, num_tokens: int) -> None:
        stopping = StoppingCriteria(max_new_tokens=num_tokens, ignore_eos=True)
        name = f"{num_tokens} tokens, {number}"
        request = GenerationRequest(name, PROMPT, SamplingParameters(temperature=temperature), stopping=stopping)
        async for _ in engine.submit(request, AsyncStream):
            pass

    with engine, timed_model() as model_s:
        await asyncio.gather(*(read(number, 20) for number in range(num_streams)))
        num_steps, start_s, start_model_s = engine.load.num_steps, time.perf_counter(), model_s()
        await asyncio.gather(*(read(number, NUM_TOKENS) for number in range(num_streams)))
        elapsed_s, num_steps = time.perf_counter() - start_s, engine.load.num_steps - num_steps
        own_s = elapsed_s - (model_s() - start_model_s)
        return num_streams * NUM_TOKENS / elapsed_s, 1e3 * elapsed_s / num_steps, 1e3 * own_s / num_steps


async def served(target: str, num_streams: int, temperature: float) -> tuple[float, float, float]:
    """Returns tokens/s, messages/s and the median latency of a token in ms, of streams served over gRPC."""
    gaps: list[float] = []

    async def read(client: AsyncClient, num_tokens: int) -> None:
        last_s = time.perf_counter()
        async with client.stream(PROMPT, temperature=temperature, max_new_tokens=num_tokens, ignore_eos=True) as stream:
            async for _ in stream.deltas():
                now_s = time.perf_counter()
                gaps.append(now_s - last_s)
                last_s = now_s

    async with AsyncClient(target) as client:
        await asyncio.gather(*(read(client, 20) for _ in range(num_streams)))
        gaps.clear()
        start_s = time.perf_counter()
        await asyncio.gather(*(read(client, NUM_TOKENS) for _ in range(num_streams)))
        elapsed_s = time.perf_counter() - start_s
    return num_streams * NUM_TOKENS / elapsed_s, len(gaps) / elapsed_s, 1e3 * statistics.median(gaps)


async def served_http(address: str, num_streams: int, temperature: float) -> float:
    """Returns the tokens/s of chat completions streamed over HTTP to a client that only looks for their end."""
    host, _, port = address.partition(":")

    async def read(num_tokens: int) -> None:
        reader, writer = await asyncio.open_connection(host, int(port), limit=1 << 24)
        messages = [{"role": "user", "content": PROMPT}]
        options = {"temperature": temperature, "max_tokens": num_tokens, "ignore_eos": True, "stream": True}
        encoded = json.dumps({"messages": messages, **options}).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(encoded)}\r\n\r\n"
        writer.write(head.encode() + encoded)
        await reader.readuntil(b"data: [DONE]")
        writer.close()

    await asyncio.gather(*(read(20) for _ in range(num_streams)))
    start_s = time.perf_counter()
    await asyncio.gather(*(read(NUM_TOKENS) for _ in range(num_streams)))
    return num_streams * NUM_TOKENS / (time.perf_counter() - start_s)


async def unary_ms(target: str) -> float:
    """Returns the median time of a call with a prompt of about 100 tokens that generates one token, one at a time."""
    times = []
    async with AsyncClient(target) as client:
        for number in range(NUM_REQUESTS):
            start_s = time.perf_counter()
            await client.generate(f"{number} {PROMPT * 12}", temperature=0, max_new_tokens=1)
            times.append(time.perf_counter() - start_s)
    return 1e3 * statistics.median(times[NUM_REQUESTS // 10 :])


async def bare(target: str, num_streams: int) -> float:
    """Returns the messages/s of the bare server."""
    async with grpc.aio.insecure_channel(target) as channel:
        call: grpc.aio.UnaryStreamMultiCallable[bytes, pb.StreamGenerateResponse] = channel.unary_stream(
            "/bare/Stream", response_deserializer=pb.StreamGenerateResponse.FromString
        )

        async def read(num_messages: int) -> None:
            async for _ in call(str(num_messages).encode()):
                pass

        await asyncio.gather(*(read(20) for _ in range(num_streams)))
        start_s = time.perf_counter()
        await asyncio.gather(*(read(NUM_TOKENS) for _ in range(num_streams)))
        return num_streams * NUM_TOKENS / (time.perf_counter() - start_s)


async def serve_probed(folder: Path) -> None:
    """Serves, and prints the addresses; at each SIGUSR1, the longest lag of the event loop in ms since the last one."""
    loop, longest_s = asyncio.get_running_loop(), 0.0

    async def probe() -> None:
        nonlocal longest_s
        while True:
            due_s = loop.time() + _PROBE_S
            await asyncio.sleep(_PROBE_S)
            longest_s = max(longest_s, loop.time() - due_s)

    def report() -> None:
        nonlocal longest_s
        print(1e3 * longest_s, flush=True)
        longest_s = 0.0

    def on_ready(server: RunningServer) -> None:
        loop.add_signal_handler(signal.SIGUSR1, report)
        print(server.target, f"127.0.0.1:{server.http_port}", flush=True)

    probing = asyncio.create_task(probe())
    await serve(_settings(folder), on_ready)
    probing.cancel()


async def serve_bare() -> None:
    """Serves streams of a constant message, and prints the address."""
    message = pb.StreamGenerateResponse(
        request_id="6f9619ff-8b86-d011-b42d-00c04fc964ff", output=pb.Output(text=" king", num_tokens=1)
    )

    async def stream(request: bytes, _: Any) -> AsyncIterator[pb.StreamGenerateResponse]:
        for _ in range(int(request)):
            yield message

    server = grpc.aio.server()
    handler: grpc.RpcMethodHandler[bytes, pb.StreamGenerateResponse] = grpc.unary_stream_rpc_method_handler(
        stream, response_serializer=pb.StreamGenerateResponse.SerializeToString
    )
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("bare", {"Stream": handler})])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(f"127.0.0.1:{port}", flush=True)
    await server.wait_for_termination()


@contextmanager
def process(*command: str) -> Iterator[Callable[[int | None], list[str]]]:
    """Runs this script as a server in another process; yields what sends a signal and reads a line."""
    with subprocess.Popen([sys.executable, __file__, *command], stdout=subprocess.PIPE, text=True) as server:

        def ask(number: int | None = None) -> list[str]:
            assert server.stdout is not None
            if number is not None:
                server.send_signal(number)
            return server.stdout.readline().split()

        try:
            yield ask
        finally:
            server.terminate()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--serve-bare", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    parsed = parser.parse_args()
    if parsed.serve_bare:
        asyncio.run(serve_bare())
        return
    if parsed.serve is not None:
        asyncio.run(serve_probed(parsed.serve))
        return
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    print(
        "| streams | engine, tokens/s | ms a step | without the model | gRPC, tokens/s | messages/s"
        " | ms between messages, median | longest lag, ms | HTTP, tokens/s | longest lag, ms | bare, messages/s |"
    )
    print("|" + "---|" * 11)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model(folder)
        with process("--serve", name) as ours, process("--serve-bare") as peer:
            (target, url), (peer_target,) = ours(None), peer(None)
            for num_streams in parsed.streams:
                rate, step_ms, own_ms = asyncio.run(in_process(folder, num_streams, parsed.temperature))
                ours(signal.SIGUSR1)
                tokens, messages, gap_ms = asyncio.run(served(target, num_streams, parsed.temperature))
                (lag_ms,) = ours(signal.SIGUSR1)
                http_tokens = asyncio.run(served_http(url, num_streams, parsed.temperature))
                (http_lag_ms,) = ours(signal.SIGUSR1)
                bare_messages = asyncio.run(bare(peer_target, num_streams))
                print(
                    f"| {num_streams} | {rate:,.0f} | {step_ms:.2f} | {own_ms:.2f} | {tokens:,.0f} | {messages:,.0f}"
                    f" | {gap_ms:.1f} | {float(lag_ms):.1f} | {http_tokens:,.0f} | {float(http_lag_ms):.1f}"
                    f" | {bare_messages:,.0f} |",
                    flush=True,
                )
            elapsed_ms = asyncio.run(unary_ms(target))
            print(f"\nA unary call with about 100 prompt tokens and one new token takes {elapsed_ms:.1f} ms.")


if __name__ == "__main__":
    main()

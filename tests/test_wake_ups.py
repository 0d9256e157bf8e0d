"""How many turns of the event loop a burst of gRPC's events takes."""

import subprocess
import sys

_NUM_CALLS = 600
_PROGRAM = f"""
import asyncio, time
import grpc
from mpt_grpc.wake_ups import gathered_wake_ups

async def main():
    loop, num_serving, num_turns = asyncio.get_running_loop(), 0, 0
    are_serving, are_cancelled = asyncio.Event(), asyncio.Event()

    async def serve(request, context):
        nonlocal num_serving
        num_serving += 1
        if num_serving == {_NUM_CALLS}:
            are_serving.set()
        try:
            await asyncio.Event().wait()
        finally:
            num_serving -= 1
            if not num_serving:
                are_cancelled.set()

    def count():
        nonlocal num_turns
        num_turns += 1
        time.sleep(0.002)  # a busy loop: meanwhile, gRPC has more events
        loop.call_soon(count)

    with gathered_wake_ups(loop):
        server = grpc.aio.server()
    handler = grpc.unary_unary_rpc_method_handler(serve)
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("test", {{"Serve": handler}})])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{{port}}") as channel:
        calls = [channel.unary_unary("/test/Serve")(b"") for _ in range({_NUM_CALLS})]
        await are_serving.wait()
        count()
    await are_cancelled.wait()
    print(num_turns)

asyncio.run(main())
"""


def test_a_connection_with_many_calls_is_closed_in_fewer_turns_of_the_loop_than_it_has_calls() -> None:
    """In a process of its own, in which gRPC has registered no socket before."""
    run = subprocess.run([sys.executable, "-c", _PROGRAM], capture_output=True, text=True, timeout=60, check=True)
    assert 0 < int(run.stdout) < _NUM_CALLS / 4

"""Large responses are serialized as protobuf would, while the event loop and other threads go on."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median

import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from hypothesis import given
from hypothesis import strategies as st

from mpt_grpc.caller import ANONYMOUS
from mpt_grpc.server.call import Call, begin_call
from mpt_grpc.server.serialization import encoded, in_pieces
from mpt_grpc_client.proto.v1 import text_generation_pb2 as pb

NUM_TRIES = 5
token_ids = st.sampled_from([0, 1, 127, 128, 50_000, (1 << 32) - 1])
texts = st.sampled_from(["", "x", "é" * 64, "x" * 127, "x" * 128, "x" * 20_000])
token_bytes = st.sampled_from([b"", b"\xff", b"x" * 300])
logprobs = st.builds(
    pb.TokenLogprob,
    token_id=token_ids,
    token_bytes=token_bytes,
    logprob=st.sampled_from([0, -1.5, float("-inf")]),
    rank=token_ids,
    top_logprobs=st.lists(st.builds(pb.TopLogprob, token_id=token_ids, token_bytes=token_bytes), max_size=2),
)
outputs = st.builds(
    pb.Output,
    index=token_ids,
    text=texts,
    token_ids=st.lists(token_ids, max_size=3),
    logprobs=st.lists(logprobs, max_size=3),
    finish=st.none()
    | st.builds(pb.Finish, reason=st.sampled_from([0, 3]))
    | st.builds(pb.Finish, stop_token_id=token_ids)
    | st.builds(pb.Finish, stop_string=texts),
    seed=st.sampled_from([0, (1 << 64) - 1]),
    tool_calls=st.lists(st.builds(pb.ToolCall, name=texts, arguments=texts), max_size=2),
)
prompts = st.builds(
    pb.PromptInfo,
    num_tokens=token_ids,
    token_ids=st.lists(token_ids, max_size=3),
    logprobs=st.lists(logprobs, max_size=3),
)
summaries = st.builds(
    pb.Summary,
    usage=st.none() | st.builds(pb.Usage, num_prompt_tokens=token_ids),
    timings=st.none() | st.builds(pb.Timings, queue_time=st.none() | st.builds(Duration, seconds=st.integers(-1, 300))),
    trace_id=texts,
)
responses = st.builds(
    pb.GenerateResponse,
    request_id=texts,
    prompt=st.none() | prompts,
    outputs=st.lists(outputs, max_size=3),
    summary=st.none() | summaries,
) | st.builds(
    pb.StreamGenerateResponse,
    request_id=texts,
    prompt=st.none() | prompts,
    output=st.none() | outputs,
    summary=st.none() | summaries,
    fingerprint=texts,
)


@given(responses, st.integers(0, 5))
def test_the_pieces_of_a_message_are_those_of_the_whole(response: Message, depth: int) -> None:
    whole = response.SerializeToString()
    data = in_pieces(response, depth)
    assert type(response).FromString(data) == type(response).FromString(whole)
    assert len(data) == len(whole)  # no field is there twice, which not every parser would merge


@pytest.fixture
def large() -> pb.GenerateResponse:
    response = pb.GenerateResponse()
    for index in range(16):
        output = response.outputs.add(index=index)
        for _ in range(500):
            output.logprobs.add(top_logprobs=[pb.TopLogprob(token_id=5, token_bytes=b"word", logprob=-1)] * 20)
    return response


def test_other_threads_run_while_a_message_is_serialized(large: pb.GenerateResponse) -> None:
    with other_thread() as num_turns:

        def turns_during(call: Callable[[], object]) -> int:
            first = num_turns()
            call()
            return num_turns() - first

        at_once = median(
            turns_during(lambda: (encode(pb.GenerateResponse()), large.SerializeToString())) for _ in range(NUM_TRIES)
        )
        in_turn = median(
            turns_during(lambda: encode(pb.GenerateResponse(outputs=large.outputs))) for _ in range(NUM_TRIES)
        )
    assert in_turn > 2 * at_once


def encode(response: pb.GenerateResponse) -> None:
    """Serializes a response with many log probabilities as the response of a call."""

    async def serve() -> None:
        begin_call(Call("Generate", "ipv4:127.0.0.1:1", None, ANONYMOUS, None, num_logprobs=8000))
        data = await encoded(pb.GenerateResponse.SerializeToString, response)
        assert isinstance(data, bytes)

    asyncio.run(serve())


@contextmanager
def other_thread() -> Iterator[Callable[[], int]]:
    """Provides how often another thread has had the interpreter, which threads hold for at most 0.1 ms."""
    num_turns, is_over = 0, threading.Event()

    def take_turns() -> None:
        nonlocal num_turns
        while not is_over.is_set():
            num_turns += 1
            time.sleep(1e-5)  # gives the interpreter back

    interval_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    thread = threading.Thread(target=take_turns)
    thread.start()
    try:
        yield lambda: num_turns
    finally:
        is_over.set()
        thread.join()
        sys.setswitchinterval(interval_s)

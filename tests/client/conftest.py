"""A real gRPC server with scripted responses, to test what the client sends and how it interprets responses."""

# ruff: noqa: N802  (a servicer's methods are named as in the API)
from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent import futures
from contextlib import contextmanager

import grpc
import pytest
from google.protobuf import any_pb2
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from mpt_grpc_client import Client
from mpt_grpc_client.proto.v1 import text_generation_pb2 as pb
from mpt_grpc_client.proto.v1 import text_generation_pb2_grpc as pb_grpc
from mpt_grpc_client.proto.v1alpha1 import debug_pb2, debug_pb2_grpc

SEED = 2**64 - 1
"""The seed of the scripted response: the largest possible one."""


class ScriptedService(pb_grpc.TextGenerationServiceServicer, debug_pb2_grpc.DebugServiceServicer):
    """Records what each call sends and from where, and returns its fields, unless set to refuse calls or to hang."""

    def __init__(self) -> None:
        self.requests: list[Message] = []
        self.metadata: list[dict[str, str | bytes]] = []
        self.peers: list[str] = []
        self.response = pb.GenerateResponse()
        self.chunks: list[pb.StreamGenerateResponse] = []
        self.tokens = pb.TokenizeResponse()
        self.text = pb.DetokenizeResponse()
        self.cancelled = pb.CancelResponse()
        self.model = pb.GetModelInfoResponse()
        self.server = pb.GetServerInfoResponse()
        self.engine = debug_pb2.GetEngineStateResponse()
        self._refusals: list[object] = []
        self._hang: Hang | None = None

    def refuse(self, code: grpc.StatusCode, message: str, reason: str, *details: Message, times: int = 1) -> None:
        """Ends the next `times` attempts with this status."""
        packed = []
        for detail in (error_details_pb2.ErrorInfo(reason=reason, domain="mpt-grpc"), *details):
            packed.append(any_pb2.Any())
            packed[-1].Pack(detail)
        status = rpc_status.to_status(status_pb2.Status(code=code.value[0], message=message, details=packed))
        self._refusals += [status] * times

    def hang(self) -> Hang:
        """Lets calls continue until the client disconnects; a stream sends its chunks first."""
        self._hang = Hang()
        return self._hang

    def Generate(self, request, context):
        self._arrive(request, context)
        self._wait()
        return self.response

    def StreamGenerate(self, request, context):
        self._arrive(request, context)
        yield from self.chunks
        self._wait()

    def Tokenize(self, request, context):
        self._arrive(request, context)
        return self.tokens

    def Detokenize(self, request, context):
        self._arrive(request, context)
        return self.text

    def Cancel(self, request, context):
        self._arrive(request, context)
        self._wait()
        return self.cancelled

    def GetModelInfo(self, request, context):
        self._arrive(request, context)
        return self.model

    def GetServerInfo(self, request, context):
        self._arrive(request, context)
        return self.server

    def GetEngineState(self, request, context):
        self._arrive(request, context)
        return self.engine

    def _arrive(self, request: Message, context: grpc.ServicerContext) -> None:
        self.requests.append(request)
        self.metadata.append(dict(context.invocation_metadata()))
        self.peers.append(context.peer())
        if self._refusals:
            context.abort_with_status(self._refusals.pop(0))
        # Registered first, since the generator of chunks does not see a client that disconnects between two of them.
        if self._hang and not context.add_callback(self._hang.left.set):
            self._hang.left.set()

    def _wait(self) -> None:
        if self._hang:
            self._hang.reached.set()
            assert self._hang.left.wait(30), "the client did not disconnect"


class Hang:
    """The events of a hanging call: it has `reached` the point where it hangs, and its client has `left`."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.left = threading.Event()


@pytest.fixture
def service() -> ScriptedService:
    return ScriptedService()


@pytest.fixture
def scripted(service: ScriptedService) -> ScriptedService:
    """The service with one output to return, complete and in three chunks, the first of which has no text."""
    prompt = pb.PromptInfo(num_tokens=2, token_ids=[12092, 1533])
    finish = pb.Finish(reason=pb.FINISH_REASON_STOP_STRING, stop_string="END")
    summary = pb.Summary(
        usage=pb.Usage(num_prompt_tokens=2, num_cached_tokens=1, num_output_tokens=5, num_preemptions=3),
        seed=SEED,
        trace_id="0af7651916cd43dd8448eb211c80319c",
    )
    summary.timings.queue_time.FromMilliseconds(250)
    summary.timings.time_to_first_token.FromMilliseconds(1500)
    service.response = pb.GenerateResponse(
        request_id="r-1",
        prompt=prompt,
        outputs=[pb.Output(text="Once 🐈 upon", num_tokens=5, token_ids=[7, 8, 9, 10, 11], finish=finish, seed=SEED)],
        summary=summary,
    )
    outputs = (
        pb.Output(num_tokens=1, token_ids=[7]),
        pb.Output(text="Once 🐈", num_tokens=3, token_ids=[8, 9, 10]),
        pb.Output(text=" upon", num_tokens=1, token_ids=[11], finish=finish, seed=SEED),
    )
    service.chunks = [pb.StreamGenerateResponse(request_id="r-1", output=output) for output in outputs]
    service.chunks[0].prompt.CopyFrom(prompt)
    service.chunks[-1].summary.CopyFrom(summary)
    return service


@pytest.fixture
def two_outputs(scripted: ScriptedService) -> ScriptedService:
    """The service with two outputs to return, complete and in interleaved chunks; the second output ends first."""
    eos = pb.Finish(reason=pb.FINISH_REASON_EOS_TOKEN, stop_token_id=0)
    full = pb.Finish(reason=pb.FINISH_REASON_MAX_NEW_TOKENS)
    del scripted.response.outputs[:]
    scripted.response.outputs.add(index=0, text="a cat", num_tokens=3, token_ids=[1, 2, 3], finish=full, seed=SEED)
    scripted.response.outputs.add(index=1, text="a dog", num_tokens=2, token_ids=[1, 4], finish=eos, seed=5)
    outputs = (
        pb.Output(index=0, text="a", num_tokens=1, token_ids=[1]),
        pb.Output(index=1, text="a", num_tokens=1, token_ids=[1]),
        pb.Output(index=0, num_tokens=1, token_ids=[2]),
        pb.Output(index=1, text=" dog", num_tokens=1, token_ids=[4], finish=eos, seed=5),
        pb.Output(index=0, text=" cat", num_tokens=1, token_ids=[3], finish=full, seed=SEED),
    )
    scripted.chunks = [pb.StreamGenerateResponse(request_id="r-1", output=output) for output in outputs]
    scripted.chunks[0].prompt.CopyFrom(scripted.response.prompt)
    scripted.chunks[-1].summary.CopyFrom(scripted.response.summary)
    return scripted


@pytest.fixture
def endless(scripted: ScriptedService) -> Hang:
    """The service with a generation that does not end: a unary call hangs, and a stream hangs after two chunks."""
    del scripted.chunks[2:]
    return scripted.hang()


@pytest.fixture
def target(service: ScriptedService) -> Iterator[str]:
    with serving(service) as target:
        yield target


@pytest.fixture
def other_service() -> ScriptedService:
    return ScriptedService()


@pytest.fixture
def other_target(other_service: ScriptedService) -> Iterator[str]:
    with serving(other_service) as target:
        yield target


@contextmanager
def serving(service: ScriptedService) -> Iterator[str]:
    options = [("grpc.so_reuseport", 0), ("grpc.max_receive_message_length", 64 * 1024 * 1024)]
    server = grpc.server(futures.ThreadPoolExecutor(4), options=options)
    pb_grpc.add_TextGenerationServiceServicer_to_server(service, server)
    debug_pb2_grpc.add_DebugServiceServicer_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None).wait()


@pytest.fixture
def client(target: str) -> Iterator[Client]:
    with Client(target, timeout=30) as client:
        yield client

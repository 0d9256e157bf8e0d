"""Whatever arrives, it is answered with a documented error or served, and the server goes on.

`make test` tries a few examples; `make fuzz` tries them for hours.
"""

from __future__ import annotations

import json
import socket
import urllib.error
import urllib.request
from typing import Any
from urllib.parse import urlsplit

import grpc
from google.protobuf.message import Message
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from server_process import ServerProcess

from fuzz.values import frames, json_values, messages
from mpt_grpc.gateway.requests import ChatCompletionRequest, CompletionRequest
from mpt_grpc.gateway.response_request import ResponseRequest
from mpt_grpc_client import Client
from mpt_grpc_client.proto.v1 import text_generation_pb2 as pb

SERVICE = pb.DESCRIPTOR.services_by_name["TextGenerationService"]
TIMEOUT_S = 60
CONTEXT = 2048
REFUSED = {
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
}
MODELS = {
    "/v1/completions": CompletionRequest,
    "/v1/chat/completions": ChatCompletionRequest,
    "/v1/responses": ResponseRequest,
}
MINIMAL = {
    "/v1/completions": {"prompt": "Once", "max_tokens": 2},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2},
    "/v1/responses": {"input": [{"role": "user", "content": "Hi"}], "max_output_tokens": 2},
}
# The server is shared by all examples, which is what is tested.
fuzzed = settings(suppress_health_check=list(HealthCheck))


def status(channel: grpc.Channel, method: str, data: bytes) -> grpc.StatusCode:
    """Returns the status of a call, after all its responses."""
    path = f"/{SERVICE.full_name}/{method}"
    try:
        if SERVICE.methods_by_name[method].server_streaming:
            list(channel.unary_stream(path)(data, timeout=TIMEOUT_S))
        else:
            channel.unary_unary(path)(data, timeout=TIMEOUT_S)
    except grpc.RpcError as error:
        return error.code()
    return grpc.StatusCode.OK


def completed(message: Message) -> Message:
    """Returns a message that is valid if its fields are, and generates few tokens, unless it asks for far too many."""
    if isinstance(message, pb.GenerateRequest):
        if message.WhichOneof("prompt") is None:
            message.text = "Once upon a time"
        if not message.stopping.max_new_tokens > CONTEXT:
            message.stopping.max_new_tokens = min(message.stopping.max_new_tokens or 4, 4)
    return message


@fuzzed
@given(st.data())
def test_every_message_is_answered_with_a_documented_status(channel: grpc.Channel, data: st.DataObject) -> None:
    method = data.draw(st.sampled_from(list(SERVICE.methods)))
    message = completed(data.draw(messages(method.input_type)))
    assert status(channel, method.name, message.SerializeToString()) in {*REFUSED, grpc.StatusCode.OK}


@fuzzed
@given(st.sampled_from(list(SERVICE.methods)), st.binary(max_size=200))
def test_every_sequence_of_bytes_is_answered_with_a_documented_status(
    channel: grpc.Channel, method: Any, data: bytes
) -> None:
    assert status(channel, method.name, data) in {*REFUSED, grpc.StatusCode.OK}


@fuzzed
@given(st.data())
def test_every_body_is_answered_with_a_documented_status(server: ServerProcess, data: st.DataObject) -> None:
    path = data.draw(st.sampled_from(sorted(MODELS)))
    names = [field.alias or name for name, field in MODELS[path].model_fields.items()]
    fields = data.draw(st.dictionaries(st.sampled_from(names), json_values, max_size=4))
    body = {**MINIMAL[path], **fields}
    content = json.dumps(body).encode()
    request = urllib.request.Request(f"{server.openai_url.removesuffix('/v1')}{path}", content)
    code, answer = 200, b""
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
            response.read()
    except urllib.error.HTTPError as error:
        code, answer = error.code, error.read()
    assert code in {200, 400, 404, 429}, answer
    assert code == 200 or json.loads(answer)["error"]["message"]


@fuzzed
@given(st.sampled_from(["grpc", "http"]), st.booleans(), st.lists(st.binary(max_size=100) | frames(), max_size=5))
def test_whatever_arrives_at_a_port_the_server_goes_on(
    server: ServerProcess, port: str, is_prefaced: bool, pieces: list[bytes]
) -> None:
    host, _, number = server.target.rpartition(":")
    address = (host, int(number)) if port == "grpc" else (host, urlsplit(server.openai_url).port)
    with socket.create_connection(address, timeout=TIMEOUT_S) as connection:
        connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" if is_prefaced else b"")
        try:
            for piece in pieces:
                connection.sendall(piece)
        except OSError:
            pass  # the server has closed the connection
    with Client(server.target) as client:
        assert len(client.generate("Once", max_new_tokens=1, ignore_eos=True, return_token_ids=True).token_ids) == 1


def test_the_server_has_lost_nothing(channel: grpc.Channel) -> None:
    """The last test of the module."""
    data = channel.unary_unary(f"/{SERVICE.full_name}/GetServerInfo")(b"", timeout=TIMEOUT_S)
    load = pb.GetServerInfoResponse.FromString(data).load
    assert load.num_free_blocks == load.num_blocks
    assert load.num_running_requests + load.num_waiting_requests + load.num_preparing_requests == 0

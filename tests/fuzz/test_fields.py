"""Whatever is absurd in a field is refused by the field's name, while a neighbour's stream goes on.

The fields of all messages and bodies are found by reflection: a new one is tried, too, and fails if nothing limits it.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import suppress
from functools import partial
from http.client import HTTPConnection
from itertools import groupby, pairwise
from queue import SimpleQueue
from threading import Thread
from typing import Any
from urllib.parse import urlsplit

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status.rpc_status import from_call
from http_calls import call
from server_process import ServerProcess

from fuzz.fields import BodyField, attacks, body_fields, paths
from mpt_grpc_client.proto.v1 import text_generation_pb2 as pb
from mpt_grpc_client.proto.v1alpha1 import debug_pb2

TIMEOUT_S, PAUSE_S = 30, 0.5
MAX_GAP_S = 0.25
NUM_TRIES = 10
BASES = {"GenerateRequest": pb.GenerateRequest(text="Once", stopping=pb.StoppingCriteria(max_new_tokens=1))}
UNLIMITED_NUMBERS = {"conversation.messages.tool_calls.index", "sampling.seed", "truncate_prompt_tokens"}
"""Fields of messages that may have every number of their type."""
IGNORED_TEXTS = set("description id model name namespace phase refusal status tool_call_id verbosity".split())
"""Names of fields in bodies of which the text has no effect, at least in some places."""
pytestmark = pytest.mark.timeout(1200)
FIELDS = {
    f"{service.name}/{method.name} {field.name}": (service, method, field)
    for file in (pb.DESCRIPTOR, debug_pb2.DESCRIPTOR)
    for service in file.services_by_name.values()
    for method in service.methods
    for field in method.input_type.fields
}


class Neighbour:
    """A caller whose stream goes on meanwhile. Belongs to the thread of the test."""

    def __init__(self, server: ServerProcess, channel: grpc.Channel) -> None:
        self._server, self._channel = server, channel
        self._times_s = SimpleQueue[float]()
        self._is_leaving = False
        self._thread = Thread(target=self._read)
        self._thread.start()
        self._calm_s = max(self._longest_gap_s(lambda: None) for _ in range(20))

    def check_gaps(self, call: Callable[[], object]) -> None:
        """Fails if the stream stands for too long during a call each time it is tried.

        The time is the server's processor time, which does not depend on the machine's load.
        """
        most_s = self._calm_s + MAX_GAP_S
        gaps_s: list[float] = []
        while not gaps_s or (gaps_s[-1] > most_s and len(gaps_s) < NUM_TRIES):
            gaps_s.append(self._longest_gap_s(call))
        assert min(gaps_s) < most_s

    def leave(self) -> None:
        self._is_leaving = True
        self._thread.join()

    def _longest_gap_s(self, call: Callable[[], object]) -> float:
        while not self._times_s.empty():
            self._times_s.get()
        times_s = [self._times_s.get(timeout=TIMEOUT_S)]
        call()
        times_s += [self._times_s.get(timeout=TIMEOUT_S) for _ in range(self._times_s.qsize() + 1)]
        return max(after - before for before, after in pairwise(times_s))

    def _read(self) -> None:
        stopping = pb.StoppingCriteria(max_new_tokens=2000, ignore_eos=True)
        request = pb.GenerateRequest(text="Once", stopping=stopping).SerializeToString()
        while not self._is_leaving:
            stream = self._channel.unary_stream("/mpt.v1.TextGenerationService/StreamGenerate")(request)
            with suppress(grpc.RpcError):  # the next one fails as well, or the server was busy
                for _ in stream:
                    self._times_s.put(self._server.processor_s)
                    if self._is_leaving:
                        stream.cancel()
                        return


@pytest.fixture(scope="module")
def neighbour(server: ServerProcess, channel: grpc.Channel) -> Iterator[Neighbour]:
    neighbour = Neighbour(server, channel)
    yield neighbour
    neighbour.leave()


@pytest.mark.parametrize("name", FIELDS)
def test_whatever_a_field_of_a_message_has_it_is_answered_in_time(
    channel: grpc.Channel, neighbour: Neighbour, name: str
) -> None:
    service, method, first = FIELDS[name]
    base = BASES.get(method.input_type.name, pb.GetServerInfoRequest()).SerializeToString()
    connect = channel.unary_stream if method.server_streaming else channel.unary_unary
    send = connect(f"/{service.full_name}/{method.name}", response_deserializer=bytes)
    tried = [(field, attack) for field in paths(method.input_type) if field[0] is first for attack in attacks(field)]

    def attack_all() -> None:
        wrong = []
        for field, attack in tried:
            refused, path = refused_fields(send, base + attack.data), ".".join(part.name for part in field)
            is_right = path in UNLIMITED_NUMBERS if refused is None else is_named(path, refused)
            if not is_right and not attack.is_legal:
                wrong.append((path, attack.name, refused))
        assert wrong == []

    neighbour.check_gaps(attack_all)


def refused_fields(send: Callable[..., Any], data: bytes) -> set[str] | None:
    """Returns the fields that an error names, without indexes, or None if a message is served."""
    try:
        response = send(data, timeout=TIMEOUT_S)
        list(response) if isinstance(response, grpc.Call) else None
    except grpc.RpcError as error:
        if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:  # the machine is too busy to check a constraint
            time.sleep(PAUSE_S)
            return refused_fields(send, data)
        if error.code() is grpc.StatusCode.NOT_FOUND and error.details().startswith("model '"):
            return {"model"}
        found, status = error_details_pb2.BadRequest(), from_call(error)
        if status is None or not any(detail.Unpack(found) for detail in status.details):
            raise
        return {without_indexes(violation.field) for violation in found.field_violations}
    return None


def test_whatever_a_field_of_a_body_has_it_is_answered_in_time(server: ServerProcess, neighbour: Neighbour) -> None:
    # Endpoints share fields, which are tried with one of them.
    places = {(field.path, str(field.kinds)): field for field in body_fields(call(server, "/openapi.json"))}
    for _, fields in groupby(places.values(), lambda field: re.split(r"[.\[]", field.path)[0]):
        tried = [(field, attack) for field in fields for attack in field.attacks()]
        neighbour.check_gaps(partial(check_bodies, server, tried))


def check_bodies(server: ServerProcess, tried: Iterable[tuple[BodyField, bytes]]) -> None:
    """Fails if a body is neither refused nor may be served."""
    connection = HTTPConnection(urlsplit(server.openai_url).netloc, timeout=TIMEOUT_S)
    wrong = []
    for field, body in tried:
        status, content = post(connection, field.endpoint, body)
        if status == 200:
            is_right = field.has_any_value or field.path.rpartition(".")[2] in IGNORED_TEXTS
        else:
            error = json.loads(content)["error"]
            path, named = without_indexes(field.path), without_indexes(error["param"] or "")
            is_whole = error["message"].startswith("the body") or error["code"] == "context_length_exceeded"
            is_right = status == 400 and (is_whole or is_named(path, {named}) or is_named(named, {path}))
        if not is_right:
            wrong.append((field.endpoint, field.path, status, content[:200]))
    assert wrong == []


def post(connection: HTTPConnection, endpoint: str, body: bytes) -> tuple[int, bytes]:
    connection.request("POST", endpoint, body)
    response = connection.getresponse()
    content = response.read()
    if response.status == 429:
        time.sleep(PAUSE_S)
        return post(connection, endpoint, body)
    return response.status, content


def without_indexes(path: str) -> str:
    return re.sub(r"\[[^\]]*\]", "", path)


def is_named(field: str, refused: Collection[str]) -> bool:
    """Returns whether a field is refused, or something that contains it, or the whole request for its size."""
    return "request" in refused or any(f"{field}.".startswith(f"{name}.") for name in refused)

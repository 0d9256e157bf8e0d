"""What a server writes to standard error, as lines of JSON."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from typing import Any
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import grpc
import pytest
from http_calls import call
from server_process import CLI, running

from mpt_grpc_client import Client, DeadlineExceededError, InvalidRequestError, MptGrpcError
from mpt_grpc_client.proto.v1 import text_generation_pb2 as pb
from mpt_grpc_client.proto.v1.text_generation_pb2_grpc import TextGenerationServiceStub

PROMPT = "The king of the silver mountain"
WEIRD_ID = "é \u2028 \x85 \x1b[2J \"{}'\\"


def leave(server: Any, body: bytes, length: int, *, after: bytes) -> None:
    """Sends a part of a request over HTTP, and closes the connection once `after` has been received."""
    address = urlsplit(server.openai_url)
    with socket.create_connection((address.hostname, address.port), timeout=30) as connection:
        head = f"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {length}\r\n\r\n"
        connection.sendall(head.encode() + body)
        received = b""
        while after not in received:
            received += connection.recv(4096)


@pytest.fixture(scope="module")
def lines() -> list[dict[str, Any]]:
    """The lines of a server with calls that succeed, fail, pass their deadline, and whose callers leave."""
    with running("--log-format", "json", "--trace-file", "/dev/null") as server:
        with Client(server.target) as client:
            client.generate(PROMPT, max_new_tokens=3, ignore_eos=True, request_id="order-17")
            with pytest.raises(InvalidRequestError):
                client.generate(PROMPT, temperature=-1)
            with pytest.raises(MptGrpcError):
                client.generate(PROMPT, model="nope", request_id=WEIRD_ID)
            with pytest.raises(DeadlineExceededError):
                client.generate(PROMPT, max_new_tokens=1900, ignore_eos=True, timeout=0.2, request_id="late")
        with grpc.insecure_channel(server.target) as channel:
            stub: Any = TextGenerationServiceStub(channel)
            trace = [("traceparent", f"00-{'a' * 32}-{'b' * 16}-01"), ("tracestate", "not valid")]
            stub.GetServerInfo(pb.GetServerInfoRequest(), metadata=trace)
        call(server, "/v1/completions", {"prompt": PROMPT, "max_tokens": 3})
        urlopen(Request(f"{server.openai_url}/models", headers={"x-forwarded-for": "203.0.113.7"})).close()
        body = json.dumps({"prompt": PROMPT, "max_tokens": 1900, "ignore_eos": True, "stream": True}).encode()
        leave(server, body[:20], len(body), after=b"")
        leave(server, body, len(body), after=b"data: ")
        server.terminate()
        assert server.wait() == 0
        assert server.stderr.isascii()
        return [json.loads(line) for line in server.stderr.splitlines()]


def line(lines: list[dict[str, Any]], **fields: Any) -> dict[str, Any]:
    """Returns the only line with these fields."""
    (found,) = [one for one in lines if fields.items() <= one.items()]
    return found


def test_a_request_has_one_line_with_its_counts_timings_and_trace(lines: list[dict[str, Any]]) -> None:
    found = line(lines, request_id="order-17")
    assert found["message"] == "Generate OK"
    assert (found["prompt_tokens"], found["output_tokens"], found["finish"]) == (6, 3, "max_new_tokens")
    assert 0 < found["queue_s"] < found["first_token_s"] < found["duration_s"]
    assert len(found["trace_id"]) == 32


def test_the_lines_of_a_request_over_http_lead_to_each_other_and_to_the_trace(lines: list[dict[str, Any]]) -> None:
    own = line(lines, method="Generate", peer="inproc")
    found = line(lines, method="POST", request_id=own["request_id"])
    assert (found["http_status"], found["trace_id"]) == (200, own["trace_id"])


def test_a_refused_request_has_its_error_and_a_late_one_its_status(lines: list[dict[str, Any]]) -> None:
    assert "sampling.temperature" in line(lines, status="INVALID_ARGUMENT")["error"]
    late = line(lines, request_id="late")
    assert late["status"] == "DEADLINE_EXCEEDED"
    assert (late["prompt_tokens"], late["output_tokens"] > 0) == (6, True)


def test_a_line_is_one_line_of_ascii_whatever_a_caller_wrote(lines: list[dict[str, Any]]) -> None:
    assert line(lines, request_id=WEIRD_ID)["status"] == "NOT_FOUND"


def test_a_caller_who_leaves_is_one_line_and_no_traceback(lines: list[dict[str, Any]]) -> None:
    assert line(lines, method="StreamGenerate", status="CANCELLED")["peer"] == "inproc"
    assert not [one for one in lines if "exception" in one or one["level"] in ("warning", "error")]


def test_headers_that_are_not_valid_leave_no_line(lines: list[dict[str, Any]]) -> None:
    assert {one["logger"].partition(".")[0] for one in lines} == {"mpt_grpc"}


def test_the_peer_of_a_request_through_a_proxy_on_this_machine_is_the_proxys_caller(
    lines: list[dict[str, Any]],
) -> None:
    assert line(lines, path="/v1/models")["peer"] == "203.0.113.7:0"


def test_a_server_that_does_not_start_says_so_in_a_line_of_json() -> None:
    command = (*CLI, "serve", "--log-format", "json", "--tokens-file", "/no/é")
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stdout) == (1, "")
    found = json.loads(ended.stderr)
    assert (found["level"], found["logger"]) == ("error", "mpt_grpc")
    assert found["message"].startswith("--tokens-file: cannot read /no/é")


UNEXPECTED = """
import threading, warnings
from mpt_grpc.commands import logs
logs.configure("info", "json")
warnings.warn("first\\nsecond")
thread = threading.Thread(target=lambda: 1 / 0)
thread.start()
thread.join()
raise KeyError("é")
"""


def test_warnings_and_exceptions_that_nothing_catches_are_lines_of_json() -> None:
    ended = subprocess.run((sys.executable, "-c", UNEXPECTED), capture_output=True, text=True, timeout=60, check=False)
    warning, of_thread, of_program = map(json.loads, ended.stderr.splitlines())
    assert "first\nsecond" in warning["message"]
    assert "ZeroDivisionError" in of_thread["exception"]
    assert (of_program["level"], "KeyError: 'é'" in of_program["exception"]) == ("critical", True)


def test_no_line_contains_a_prompt(lines: list[dict[str, Any]]) -> None:
    assert "silver" not in json.dumps(lines)

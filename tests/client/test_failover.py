"""Which server a call goes to, and what a client of several servers sends."""

from __future__ import annotations

import time

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration

from mpt_grpc_client import (
    AsyncClient,
    Client,
    InvalidTargetError,
    OverloadedError,
    QuotaExceededError,
    UnavailableError,
)
from mpt_grpc_client.errors import MptGrpcError
from mpt_grpc_client.failover import Attempts
from mpt_grpc_client.proto.v1 import text_generation_pb2 as pb
from mpt_grpc_client.rotation import Rotation, Server
from mpt_grpc_client.targets import resolve_targets

GONE = UnavailableError("failed to connect to all addresses", code=grpc.StatusCode.UNAVAILABLE)
BROKE = UnavailableError("Socket closed", code=grpc.StatusCode.UNAVAILABLE)
STOPPED = UnavailableError("stopped", code=grpc.StatusCode.UNAVAILABLE, reason="ENGINE_STOPPED")
DRAINING = UnavailableError("draining", code=grpc.StatusCode.UNAVAILABLE, reason="DRAINING")
BUSY = OverloadedError("busy", reason="OVERLOADED", retry_after=0.25)
QUOTA = QuotaExceededError("quota", reason="QUOTA_EXCEEDED", retry_after=0.25, quota="requests", limit=1)
DIFFERS = MptGrpcError("differs", code=grpc.StatusCode.FAILED_PRECONDITION, reason="FINGERPRINT_MISMATCH")
DUPLICATE = MptGrpcError("in progress", code=grpc.StatusCode.ALREADY_EXISTS, reason="DUPLICATE_REQUEST_ID")
INVALID = MptGrpcError("invalid", code=grpc.StatusCode.INVALID_ARGUMENT, reason="INVALID_REQUEST")


def rotation(*targets: str) -> Rotation[None]:
    return Rotation([Server(target, None) for target in targets], is_balanced=True)


def order(servers: Rotation[None]) -> str:
    return "".join(server.target for server in servers.order())


def tried(attempts: Attempts[None], failure: MptGrpcError) -> tuple[str, list[float], MptGrpcError]:
    """Returns the servers that are tried while all fail like this, the pauses between them, and the error at last."""
    targets, pauses = "", list[float]()
    while True:
        targets += attempts.server.target
        pause = attempts.after(failure)
        if isinstance(pause, MptGrpcError):
            return targets, pauses, pause
        pauses.append(pause)


def test_servers_take_turns_and_those_that_failed_come_last():
    servers = rotation("a", "b", "c")
    assert [order(servers) for _ in range(4)] == ["abc", "bca", "cab", "abc"]
    servers.set_aside(servers.servers[1])
    assert [order(servers) for _ in range(3)] == ["cab", "cab", "acb"]
    servers.put_back(servers.servers[1])
    assert order(servers) == "bca"


def test_failures_at_the_same_time_count_once():
    servers = rotation("a", "b")
    for _ in range(30):
        servers.set_aside(servers.servers[0])
    assert servers.servers[0].num_failures == 1


def test_all_servers_are_tried_four_times_with_growing_pauses():
    targets, pauses, error = tried(Attempts(rotation("a", "b"), None, retries=True), GONE)
    assert targets[:2] == "ab"
    assert sorted(targets) == list("aaaabbbb")
    assert pauses == [0, 0.1, 0, 0.2, 0, 0.4, 0]
    assert str(error) == f"all servers failed: a: {GONE}; b: {GONE}"


def test_without_retries_each_server_is_tried_once():
    assert tried(Attempts(rotation("a", "b", "c"), None, retries=False), GONE)[0] == "abc"


def test_servers_that_are_all_busy_are_given_the_time_that_they_ask_for():
    targets, pauses, error = tried(Attempts(rotation("a", "b"), None, retries=True), BUSY)
    assert targets == "abbaabba"
    assert pauses == [0, 0.25, 0, 0.25, 0, 0.4, 0]
    assert isinstance(error, OverloadedError)
    assert (error.reason, error.retry_after) == ("OVERLOADED", 0.25)


def test_a_busy_server_is_given_the_time_that_it_asks_for_while_another_is_gone():
    attempts, pauses = Attempts(rotation("a", "b"), None, retries=True), list[float]()
    while not isinstance(pause := attempts.after(GONE if attempts.server.target == "a" else BUSY), MptGrpcError):
        pauses.append(pause)
    assert pauses == [0, 0.25, 0, 0.25, 0, 0.4, 0]
    assert str(pause) == f"all servers failed: a: {GONE}; b: {BUSY}"


@pytest.mark.parametrize("failure", [BUSY, QUOTA])
@pytest.mark.parametrize("timeout", [None, 3600])
@pytest.mark.parametrize("retries", [True, False])
def test_once_a_response_has_begun_busy_servers_are_waited_for(
    failure: MptGrpcError, timeout: float | None, retries: bool
):
    attempts = Attempts(rotation("a", "b"), timeout, retries=retries)
    attempts.succeeded()
    assert attempts.after(BROKE) == 0
    pauses = [attempts.after(failure if attempts.server.target == "b" else GONE) for _ in range(2000)]
    assert {pause for pause in pauses if pause} == {0.25, 0.4, 0.8, 1.6}


def test_a_server_that_has_not_noticed_that_the_connection_broke_is_waited_for():
    attempts = Attempts(rotation("a", "b"), 3600, retries=False)
    attempts.succeeded()
    for _ in range(100):
        assert isinstance(attempts.after(DUPLICATE if attempts.server.target == "b" else GONE), float)


@pytest.mark.parametrize(
    ("stopping", "timeout", "longest_s"), [({}, None, 300), ({"time_limit": Duration(seconds=10)}, 3600, 10)]
)
def test_a_wait_for_busy_servers_is_bounded(
    stopping: dict[str, Duration], timeout: float | None, longest_s: float, monkeypatch: pytest.MonkeyPatch
):
    generation = pb.GenerateRequest(text="Once", stopping=pb.StoppingCriteria(**stopping))
    attempts, now_s = Attempts(rotation("a", "b"), timeout, retries=True, generation=generation), time.monotonic()
    attempts.succeeded()
    monkeypatch.setattr(time, "monotonic", lambda: now_s)
    start_s = now_s
    while not isinstance(pause := attempts.after(BUSY), MptGrpcError):
        now_s += pause
    assert isinstance(pause, OverloadedError)
    assert now_s - start_s == pytest.approx(longest_s, abs=1)


def test_a_quota_is_not_evaded_by_other_servers():
    assert tried(Attempts(rotation("a", "b"), None, retries=True), QUOTA) == ("a", [], QUOTA)


@pytest.mark.parametrize("failure", [BROKE, STOPPED])
def test_a_request_that_breaks_every_server_is_tried_on_three(failure: MptGrpcError):
    targets, _, error = tried(Attempts(rotation(*"abcdef"), None, retries=True), failure)
    assert targets == "abc"
    assert isinstance(error, UnavailableError)
    assert str(error) == (
        f"given up because servers broke 3 times while they ran this call (a, b, c); the last time: {failure}"
    )


def test_a_proxy_without_a_response_is_tried_four_times():
    before_headers = UnavailableError(
        "upstream connect error or disconnect/reset before headers", code=grpc.StatusCode.UNAVAILABLE
    )
    assert tried(Attempts(rotation("a"), None, retries=True), before_headers)[0] == "aaaa"


@pytest.mark.parametrize("failure", [GONE, DRAINING])
def test_servers_that_never_ran_a_request_do_not_count_as_broken_by_it(failure: MptGrpcError):
    assert tried(Attempts(rotation(*"abcdef"), None, retries=False), failure)[0] == "abcdef"


def test_servers_that_make_progress_are_not_broken_by_the_request():
    attempts = Attempts(rotation(*"abcdef"), None, retries=False)
    for _ in range(10):
        for _ in range(2):
            assert attempts.after(BROKE) == 0
            attempts.succeeded(num_tokens=15)
        attempts.succeeded(num_tokens=1)
    assert len(tried(attempts, BROKE)[0]) == 3


def test_a_server_that_differs_is_not_asked_again():
    assert tried(Attempts(rotation("a", "b"), None, retries=True), DIFFERS)[0] == "ab"


def test_an_invalid_request_is_not_tried_elsewhere():
    assert tried(Attempts(rotation("a", "b"), None, retries=True), INVALID) == ("a", [], INVALID)


def test_after_a_response_all_servers_are_tried_anew_the_failed_one_last():
    attempts = Attempts(rotation("a", "b", "c"), None, retries=False)
    attempts.succeeded()
    assert tried(attempts, GONE)[0] == "abca"


def test_a_pause_is_no_longer_than_what_is_left_of_the_timeout():
    _, pauses, _ = tried(Attempts(rotation("a"), 0.05, retries=True), GONE)
    assert max(pauses) <= 0.05


def test_targets_are_a_list_or_separated_by_commas(monkeypatch: pytest.MonkeyPatch):
    assert resolve_targets("a:1,unix:/b,a:1") == resolve_targets(["a:1", "unix:/b"]) == ("a:1", "unix:/b")
    monkeypatch.setenv("MPT_GRPC_TARGET", "a:1,b:2")
    assert resolve_targets(None) == ("a:1", "b:2")
    with pytest.raises(InvalidTargetError, match="target 'b' has no port"):
        Client("a:1,b")
    with pytest.raises(InvalidTargetError, match="target: the list is empty"):
        AsyncClient([])


def test_a_channel_of_the_callers_own_requires_one_target():
    with grpc.insecure_channel("a:1") as channel, pytest.raises(InvalidTargetError, match="requires one target"):
        Client(["a:1", "b:2"], channel=channel)


def test_a_client_of_one_server_requests_what_the_caller_did(scripted, client):
    list(client.stream("Once"))
    (request,) = scripted.requests
    assert not request.output_options.HasField("return_token_ids")
    assert not request.sampling.HasField("seed")

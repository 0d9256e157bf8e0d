"""Which error a caller meets when a call fails, and what it tells."""

import pickle
import socket

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2

from mpt_grpc_client import (
    AlreadyExistsError,
    Client,
    DeadlineExceededError,
    FieldViolation,
    InternalError,
    InvalidRequestError,
    MptGrpcError,
    NotFoundError,
    OverloadedError,
    UnavailableError,
)


@pytest.mark.parametrize(
    ("code", "reason", "error"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST", InvalidRequestError),
        (grpc.StatusCode.NOT_FOUND, "UNKNOWN_MODEL", NotFoundError),
        (grpc.StatusCode.ALREADY_EXISTS, "DUPLICATE_REQUEST_ID", AlreadyExistsError),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED", OverloadedError),
        (grpc.StatusCode.UNAVAILABLE, "UNAVAILABLE", UnavailableError),
        (grpc.StatusCode.INTERNAL, "ENGINE_FAULT", InternalError),
        (grpc.StatusCode.DATA_LOSS, "OTHER", MptGrpcError),
    ],
)
def test_each_status_has_its_error_with_code_reason_and_cause(service, client, code, reason, error):
    service.refuse(code, "no way", reason, times=4)
    with pytest.raises(MptGrpcError, match="no way") as caught:
        client.generate("Once")
    assert type(caught.value) is error
    assert (caught.value.code, caught.value.reason) == (code, reason)
    assert isinstance(caught.value.__cause__, grpc.RpcError)


def test_an_invalid_request_names_every_bad_field(service, client):
    violations = [("sampling.top_p", "2 is not in (0, 1]"), ("stopping.max_new_tokens", "0 is not above 0")]
    bad_request = error_details_pb2.BadRequest(
        field_violations=[error_details_pb2.BadRequest.FieldViolation(field=f, description=d) for f, d in violations]
    )
    service.refuse(grpc.StatusCode.INVALID_ARGUMENT, "two bad fields", "INVALID_REQUEST", bad_request)
    with pytest.raises(InvalidRequestError) as caught:
        client.generate("Once")
    assert caught.value.violations == tuple(FieldViolation(*violation) for violation in violations)


def test_an_overloaded_server_says_when_to_retry(service, client):
    retry = error_details_pb2.RetryInfo(retry_delay=Duration(seconds=2, nanos=500_000_000))
    service.refuse(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", "OVERLOADED", retry, times=4)
    with pytest.raises(OverloadedError) as caught:
        client.generate("Once")
    assert caught.value.retry_after == 2.5


def test_an_overloaded_server_that_does_not_say_when_gives_none(service, client):
    service.refuse(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", "OVERLOADED", times=4)
    with pytest.raises(OverloadedError) as caught:
        client.generate("Once")
    assert caught.value.retry_after is None


def test_a_message_that_is_too_large_is_not_taken_for_an_overload(service, client):
    with pytest.raises(MptGrpcError, match="larger than max") as caught:
        client.generate("a" * (33 * 1024 * 1024))
    assert not isinstance(caught.value, OverloadedError)
    assert not service.requests


def test_a_stream_that_is_refused_raises_on_its_first_piece(service, client):
    service.refuse(grpc.StatusCode.NOT_FOUND, "no such model", "UNKNOWN_MODEL")
    with client.stream("Once", model="other") as stream, pytest.raises(NotFoundError):
        next(stream)


def test_no_server_is_unavailable():
    with socket.socket() as bound_but_deaf:
        bound_but_deaf.bind(("127.0.0.1", 0))
        with Client(f"127.0.0.1:{bound_but_deaf.getsockname()[1]}", timeout=30) as client:
            with pytest.raises(UnavailableError) as caught:
                client.get_model_info()
    assert (caught.value.code, caught.value.reason) == (grpc.StatusCode.UNAVAILABLE, "")


def test_a_deadline_ends_a_unary_call_and_reaches_the_server(endless, client):
    with pytest.raises(DeadlineExceededError):
        client.generate("Once", timeout=0.3)
    assert endless.left.wait(10)


@pytest.mark.usefixtures("endless")
def test_a_deadline_ends_a_stream_which_keeps_its_text(client):
    stream = client.stream("Once", timeout=0.5)
    with pytest.raises(DeadlineExceededError):
        list(stream)
    assert stream.text == "Once 🐈"


@pytest.mark.usefixtures("endless")
def test_the_clients_deadline_holds_for_calls_that_give_none(target):
    with Client(target, timeout=0.3) as client, pytest.raises(DeadlineExceededError):
        client.generate("Once")


def test_errors_survive_a_process_border(service, client):
    service.refuse(grpc.StatusCode.NOT_FOUND, "no such model", "UNKNOWN_MODEL")
    with pytest.raises(NotFoundError) as caught:
        client.generate("Once")
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (type(copy), str(copy), copy.code, copy.reason) == (
        NotFoundError, "no such model", grpc.StatusCode.NOT_FOUND, "UNKNOWN_MODEL",
    )  # fmt: skip

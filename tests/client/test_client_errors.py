"""The errors that failed calls raise, and what they contain."""

import pickle
import re
import socket
import socketserver
import threading

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
    InvalidTargetError,
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
        (grpc.StatusCode.UNAVAILABLE, "DRAINING", UnavailableError),
        (grpc.StatusCode.UNAVAILABLE, "ENGINE_STOPPED", UnavailableError),
        (grpc.StatusCode.INTERNAL, "ENGINE_FAULT", InternalError),
        (grpc.StatusCode.DATA_LOSS, "OTHER", MptGrpcError),
    ],
)
def test_each_status_raises_its_error_with_code_reason_and_cause(service, client, code, reason, error):
    service.refuse(code, "refused", reason, times=4)
    with pytest.raises(MptGrpcError, match="refused") as caught:
        client.generate("Once")
    assert type(caught.value) is error
    assert (caught.value.code, caught.value.reason) == (code, reason)
    assert isinstance(caught.value.__cause__, grpc.RpcError)


@pytest.mark.parametrize(
    ("field", "option"),
    [
        ("sampling.top_p", "top_p"),
        ("decoding.logit_bias[5]", "logit_bias[5]"),
        ("decoding.json_schema", "constraint"),
        ("decoding.choice.options[1]", "constraint[1]"),
        ("stopping.stop_strings[2]", "stop_strings[2]"),
        ("stopping.repetition_guard.min_repeats", "repetition_guard.min_repeats"),
        ("output_options.top_logprobs", "top_logprobs"),
        ("cache.salt", "cache_salt"),
        ("cache.bypass", "cache_bypass"),
        ("text", "prompt"),
        ("token_ids.ids[3]", "prompt[3]"),
        ("token_ids[3]", "token_ids[3]"),
        ("conversation.messages[0].role", "prompt[0].role"),
        ("conversation.drop_oldest_turns", "drop_oldest_turns"),
        ("conversation.chat_template_kwargs[eos_token]", "chat_template_kwargs[eos_token]"),
        ("request_id", "request_id"),
        ("resume_token_ids[7]", "resume_token_ids[7]"),
    ],
)
def test_an_invalid_request_names_the_option_of_a_field(service, client, field, option):
    violation = error_details_pb2.BadRequest.FieldViolation(field=field, description="out of range")
    bad_request = error_details_pb2.BadRequest(field_violations=[violation])
    service.refuse(grpc.StatusCode.INVALID_ARGUMENT, f"{field}: out of range", "INVALID_REQUEST", bad_request)
    with pytest.raises(InvalidRequestError) as caught:
        client.generate("Once")
    assert caught.value.violations == (FieldViolation(option, "out of range"),)
    assert str(caught.value) == f"{option}: out of range"


def test_an_invalid_request_lists_every_invalid_option(service, client):
    violations = [("top_p", "2 is not in (0, 1]"), ("max_new_tokens", "0 is not above 0")]
    bad_request = error_details_pb2.BadRequest(
        field_violations=[error_details_pb2.BadRequest.FieldViolation(field=f, description=d) for f, d in violations]
    )
    service.refuse(grpc.StatusCode.INVALID_ARGUMENT, "two bad fields", "INVALID_REQUEST", bad_request)
    with pytest.raises(InvalidRequestError) as caught:
        client.generate("Once")
    assert caught.value.violations == tuple(FieldViolation(*violation) for violation in violations)


def test_an_overload_error_has_the_time_to_wait(service, client):
    retry = error_details_pb2.RetryInfo(retry_delay=Duration(seconds=2, nanos=500_000_000))
    service.refuse(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", "OVERLOADED", retry, times=4)
    with pytest.raises(OverloadedError) as caught:
        client.generate("Once")
    assert caught.value.retry_after == 2.5


def test_an_overload_error_may_have_no_time_to_wait(service, client):
    service.refuse(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", "OVERLOADED", times=4)
    with pytest.raises(OverloadedError) as caught:
        client.generate("Once")
    assert caught.value.retry_after is None


def test_a_message_that_is_too_large_is_not_an_overload(service, client):
    with pytest.raises(MptGrpcError, match="larger than max") as caught:
        client.generate("a" * (33 * 1024 * 1024))
    assert not isinstance(caught.value, OverloadedError)
    assert not service.requests


def test_a_stream_that_is_refused_raises_on_its_first_chunk(service, client):
    service.refuse(grpc.StatusCode.NOT_FOUND, "no such model", "UNKNOWN_MODEL")
    with client.stream("Once", model="other") as stream, pytest.raises(NotFoundError):
        next(stream)


def test_the_error_for_a_missing_server_explains_how_to_start_one():
    with socket.socket() as not_listening:
        not_listening.bind(("127.0.0.1", 0))
        target = f"127.0.0.1:{not_listening.getsockname()[1]}"
        with Client(target, timeout=30) as client:
            with pytest.raises(UnavailableError, match=f"no server responds at {target}; start one with") as caught:
                client.get_model_info()
    assert (caught.value.code, caught.value.reason) == (grpc.StatusCode.UNAVAILABLE, "")


def test_the_error_of_a_name_tells_which_of_its_addresses_failed():
    """The name may have others, of which gRPC reports nothing."""
    with socket.socket() as not_listening:
        not_listening.bind(("127.0.0.1", 0))
        target = f"localhost:{not_listening.getsockname()[1]}"
        address = rf"(127\.0\.0\.1|\[::1\]):\d+ \(the last address of {target} that was tried\)"
        with Client(target, timeout=30) as client, pytest.raises(UnavailableError, match=address):
            client.get_model_info()


@pytest.mark.parametrize(
    ("tls", "response", "meaning"),
    [
        (False, b"", "{} closed the connection at once; check the port, and whether it requires TLS"),
        (True, b"", "{} closed the connection at once; check the port, and whether it requires TLS"),
        (False, b"SSH-2.0-OpenSSH_9.9\r\n", "{} responds, but does not speak gRPC; check the port"),
        (True, b"HTTP/1.1 400 Bad Request\r\n\r\n", "{} responds without TLS; connect without TLS, or check the port"),
    ],
)
def test_the_error_of_what_is_not_the_server_tells_what_is_known_of_it(tls, response, meaning):
    class Handler(socketserver.BaseRequestHandler):
        def handle(self):
            if response:
                self.request.sendall(response)
                self.request.recv(1 << 16)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as other:
        threading.Thread(target=other.serve_forever).start()
        target = f"127.0.0.1:{other.server_address[1]}"
        try:
            with Client(target, tls=tls, timeout=30) as client:
                with pytest.raises(UnavailableError, match=f"^{meaning.format(target)}"):
                    client.get_model_info()
        finally:
            other.shutdown()


def test_a_timeout_ends_a_unary_call_on_the_server_too(endless, client):
    with pytest.raises(DeadlineExceededError, match=r"^the call's timeout of 0\.3 s has passed before the response$"):
        client.generate("Once", timeout=0.3)
    assert endless.left.wait(10)


@pytest.mark.usefixtures("endless")
def test_a_timeout_ends_a_stream_which_keeps_its_text(client):
    stream = client.stream("Once", timeout=0.5)
    with pytest.raises(DeadlineExceededError, match=r"^the call's timeout of 0\.5 s has passed after 4 tokens$"):
        list(stream)
    assert stream.text == "Once 🐈"


@pytest.mark.usefixtures("endless")
def test_a_stream_without_tokens_says_so_when_its_timeout_has_passed(scripted, client):
    scripted.chunks = []
    with client.stream("Once", timeout=0.3) as stream:
        with pytest.raises(DeadlineExceededError, match=r"has passed before the first token$"):
            list(stream)


def test_a_deadline_that_is_not_the_clients_is_named_as_such(service, client):
    service.refuse(grpc.StatusCode.DEADLINE_EXCEEDED, "upstream timeout", "")
    why = r"^a deadline other than this client's has passed after \d\.\d s on the way to 127.*: upstream timeout$"
    with pytest.raises(DeadlineExceededError, match=why):
        client.generate("Once")


@pytest.mark.usefixtures("endless")
def test_the_clients_timeout_applies_to_calls_without_one(target):
    with Client(target, timeout=0.3) as client:
        with pytest.raises(DeadlineExceededError, match=r"^the client's timeout of 0\.3 s has passed"):
            client.generate("Once")


def test_errors_can_be_pickled(service, client):
    service.refuse(grpc.StatusCode.NOT_FOUND, "no such model", "UNKNOWN_MODEL")
    with pytest.raises(NotFoundError) as caught:
        client.generate("Once")
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (type(copy), str(copy), copy.code, copy.reason) == (
        NotFoundError, "no such model", grpc.StatusCode.NOT_FOUND, "UNKNOWN_MODEL",
    )  # fmt: skip


def test_calls_of_a_closed_client_fail_with_an_error_of_the_client(target):
    client = Client(target)
    client.close()
    for call in (client.get_model_info, lambda: client.generate("Once"), lambda: client.stream("Once")):
        with pytest.raises(MptGrpcError, match="the client is closed"):
            call()


@pytest.mark.parametrize(
    ("target", "remedy"),
    [
        ("http://localhost:50051", "use the server's gRPC address, such as 'localhost:50051'"),
        ("https://models.example/v1", "such as 'grpcs://models.example:50051'"),
        ("localhost", "has no port: write 'localhost:50051'"),
        ("/run/mpt.sock", "is a path: write 'unix:/run/mpt.sock' for a Unix socket"),
    ],
)
def test_an_invalid_target_is_refused_with_the_correct_form(target, remedy):
    with pytest.raises(InvalidTargetError, match=re.escape(remedy)):
        Client(target)


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda _: Client(50051), "target: must be a string such as 'localhost:50051', not int"),
        (lambda target: Client(target, timeout="5"), "timeout: must be a number of seconds, not str"),
        (lambda target: Client(target).generate("Once", timeout="5s"), "timeout: must be a number of seconds, not str"),
        (
            lambda target: Client(target).generate("Once", time_limit="5s"),
            "time_limit: must be a number of seconds, not '5s'",
        ),
        (lambda target: Client(target).tokenize(5), "text: must be a string, not 5"),
        (lambda target: Client(target).detokenize("ab"), "token_ids: must be a list of whole numbers, not 'ab'"),
        (lambda target: Client(target).cancel(5), "request_ids: must be strings, not (5,)"),
        (lambda target: Client(target).with_metadata("ab"), "metadata: 'ab' is not a pair of a name and a value"),
    ],
)
def test_arguments_of_another_type_are_type_errors_that_name_them(target, call, error):
    with pytest.raises(TypeError, match=re.escape(error)):
        call(target)


@pytest.mark.parametrize("timeout", [-1, float("inf"), float("nan")])
def test_a_timeout_that_is_none_is_a_value_error(target, timeout):
    with pytest.raises(ValueError, match=r"^timeout: .* is not finite and at least 0; None waits indefinitely"):
        Client(target, timeout=timeout)


def test_arguments_that_do_not_fit_in_their_field_are_named(target):
    with Client(target) as client:
        with pytest.raises(InvalidRequestError, match=r"^text: "):
            client.tokenize("\ud83d")
        with pytest.raises(InvalidRequestError, match=r"^token_ids: "):
            client.detokenize([-1])

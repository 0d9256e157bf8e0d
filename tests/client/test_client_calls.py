"""How calls reach the server and how they are left: target, user agent, trace context, retries, cancels."""

import signal
import threading

import grpc
import pytest
from opentelemetry.sdk.trace import TracerProvider

from mpt_grpc_client import Client, UnavailableError


def test_the_target_comes_from_the_environment_unless_one_is_given(answer, target, monkeypatch):
    monkeypatch.setenv("MPT_GRPC_TARGET", target)
    with Client(timeout=30) as client:
        client.generate("Once")
    monkeypatch.setenv("MPT_GRPC_TARGET", "127.0.0.1:1")
    with Client(target, timeout=30) as client:
        client.generate("Once")
    assert len(answer.requests) == 2


def test_the_user_agent_names_client_and_version(answer, client):
    client.generate("Once")
    assert answer.metadata[0]["user-agent"].startswith("mpt-grpc-client/0.")


@pytest.mark.parametrize("call", ["generate", "stream", "tokenize"])
def test_the_trace_context_of_the_caller_goes_with_the_call(answer, client, call):
    with TracerProvider().get_tracer("test").start_as_current_span("caller") as span:
        result = getattr(client, call)("Once")
    if call == "stream":
        list(result)
    context = span.get_span_context()
    assert answer.metadata[0]["traceparent"].startswith(f"00-{context.trace_id:032x}-{context.span_id:016x}-")


def test_without_a_span_no_trace_context_is_sent(answer, client):
    client.generate("Once")
    assert "traceparent" not in answer.metadata[0]


@pytest.mark.parametrize("code", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED])
def test_two_refusals_are_retried_by_the_channel_and_not_seen(answer, client, code):
    answer.refuse(code, "not now", "NOT_NOW", times=2)
    assert client.generate("Once").text == "Once 🐈 upon"
    assert [metadata.get("grpc-previous-rpc-attempts") for metadata in answer.metadata] == [None, "1", "2"]


def test_a_stream_that_is_refused_is_retried_too(answer, client):
    answer.refuse(grpc.StatusCode.UNAVAILABLE, "not now", "UNAVAILABLE", times=2)
    assert "".join(client.stream("Once")) == "Once 🐈 upon"


def test_long_prompts_are_retried_too(answer, client):
    answer.refuse(grpc.StatusCode.UNAVAILABLE, "not now", "UNAVAILABLE")
    assert client.generate("a" * 2_000_000).text == "Once 🐈 upon"


def test_four_refusals_are_enough(answer, client):
    answer.refuse(grpc.StatusCode.UNAVAILABLE, "not now", "UNAVAILABLE", times=5)
    with pytest.raises(UnavailableError):
        client.generate("Once")
    assert len(answer.requests) == 4


def test_an_answer_above_grpcs_default_of_4_mib_arrives(answer, client):
    answer.whole.outputs[0].text = "a" * 5_000_000
    assert len(client.generate("Once").text) == 5_000_000


def test_cancel_reaches_the_server_and_ends_the_iteration_quietly(endless, client):
    stream = client.stream("Once")
    assert next(stream) == "Once 🐈"
    stream.cancel()
    assert list(stream) == []
    assert endless.left.wait(10)
    assert stream.text == "Once 🐈"


def test_another_thread_may_cancel_a_stream_that_waits(endless, client):
    stream = client.stream("Once")
    reader = threading.Thread(target=list, args=(stream,))
    reader.start()
    assert endless.reached.wait(10)
    stream.cancel()
    reader.join(10)
    assert not reader.is_alive()
    assert endless.left.wait(10)


def test_leaving_a_stream_early_cancels_it(endless, client):
    with client.stream("Once") as stream:
        for _ in stream:
            break
    assert endless.left.wait(10)


def test_an_error_in_the_block_of_a_stream_cancels_it(endless, client):
    with pytest.raises(ZeroDivisionError), client.stream("Once") as stream:
        _ = len(next(stream)) / 0
    assert endless.left.wait(10)


def test_closing_the_client_cancels_its_calls(endless, target):
    with Client(target, timeout=30) as client:
        next(client.stream("Once"))
    assert endless.left.wait(10)


def test_a_keyboard_interrupt_leaves_no_unary_call_behind(endless, client):
    """A notebook goes on after Ctrl-C, with the connection open: the server must hear of it."""

    def interrupt():
        assert endless.reached.wait(10)
        signal.raise_signal(signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        client.generate("Once")
    assert endless.left.wait(10)

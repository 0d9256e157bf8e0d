"""How calls are sent, retried and cancelled: target, user agent, trace context, retries and cancellation."""

import linecache
import signal
import sys
import threading

import grpc
import pytest
from opentelemetry.sdk.trace import TracerProvider

from mpt_grpc_client import Client, UnavailableError


def test_the_target_comes_from_the_environment_unless_one_is_given(scripted, target, monkeypatch):
    monkeypatch.setenv("MPT_GRPC_TARGET", target)
    with Client(timeout=30) as client:
        client.generate("Once")
    monkeypatch.setenv("MPT_GRPC_TARGET", "127.0.0.1:1")
    with Client(target, timeout=30) as client:
        client.generate("Once")
    assert len(scripted.requests) == 2


def test_a_client_uses_and_closes_the_channel_it_is_given(scripted, target):
    channel = grpc.insecure_channel(target)
    with Client("unix:/nowhere", channel=channel) as client:
        client.generate("Once")
    assert len(scripted.requests) == 1
    with pytest.raises(ValueError, match="closed"):
        channel.unary_unary("/mpt.v1.TextGenerationService/GetServerInfo")(b"")


def test_the_user_agent_names_client_and_version(scripted, client):
    client.generate("Once")
    assert scripted.metadata[0]["user-agent"].startswith("mpt-grpc-client/0.")


@pytest.mark.parametrize("call", ["generate", "stream", "tokenize"])
def test_calls_carry_the_callers_trace_context(scripted, client, call):
    with TracerProvider().get_tracer("test").start_as_current_span("caller") as span:
        result = getattr(client, call)("Once")
    if call == "stream":
        list(result)
    context = span.get_span_context()
    assert scripted.metadata[0]["traceparent"].startswith(f"00-{context.trace_id:032x}-{context.span_id:016x}-")


def test_no_trace_context_is_sent_outside_a_span(scripted, client):
    client.generate("Once")
    assert "traceparent" not in scripted.metadata[0]


@pytest.mark.parametrize("code", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED])
def test_two_refusals_are_retried_without_an_error(scripted, client, code):
    scripted.refuse(code, "not now", "NOT_NOW", times=2)
    assert client.generate("Once").text == "Once 🐈 upon"
    assert [metadata.get("grpc-previous-rpc-attempts") for metadata in scripted.metadata] == [None, "1", "2"]


def test_a_stream_that_is_refused_is_retried_too(scripted, client):
    scripted.refuse(grpc.StatusCode.UNAVAILABLE, "not now", "DRAINING", times=2)
    assert "".join(client.stream("Once")) == "Once 🐈 upon"


def test_long_prompts_are_retried_too(scripted, client):
    scripted.refuse(grpc.StatusCode.UNAVAILABLE, "not now", "DRAINING")
    assert client.generate("a" * 2_000_000).text == "Once 🐈 upon"


def test_a_call_fails_after_four_refusals(scripted, client):
    scripted.refuse(grpc.StatusCode.UNAVAILABLE, "not now", "DRAINING", times=5)
    with pytest.raises(UnavailableError):
        client.generate("Once")
    assert len(scripted.requests) == 4


def test_a_response_above_grpcs_default_limit_of_4_mib_is_received(scripted, client):
    scripted.response.outputs[0].text = "a" * 5_000_000
    assert len(client.generate("Once").text) == 5_000_000


def test_cancel_reaches_the_server_and_ends_the_iteration_quietly(endless, client):
    stream = client.stream("Once")
    assert next(stream) == "Once 🐈"
    stream.cancel()
    assert list(stream) == []
    assert endless.left.wait(10)
    assert stream.text == "Once 🐈"


def test_another_thread_may_cancel_a_waiting_stream(endless, client):
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


def test_an_exception_in_the_with_block_of_a_stream_cancels_it(endless, client):
    with pytest.raises(ZeroDivisionError), client.stream("Once") as stream:
        _ = len(next(stream)) / 0
    assert endless.left.wait(10)


def test_closing_the_client_cancels_its_calls(endless, target):
    with Client(target, timeout=30) as client:
        next(client.stream("Once"))
    assert endless.left.wait(10)


def test_a_keyboard_interrupt_cancels_a_unary_call(endless, client):
    """A notebook keeps the connection open after Ctrl-C, so the call itself must be cancelled."""
    caller = threading.get_ident()

    def is_waiting():
        frame = sys._current_frames()[caller]
        return "next_event()" in linecache.getline(frame.f_code.co_filename, frame.f_lineno)

    def interrupt():
        assert endless.reached.wait(10)
        # gRPC cancels a call whose wait is interrupted, but loses one that it is still beginning.
        while not is_waiting():
            pass
        signal.raise_signal(signal.SIGINT)

    # The tests may run where it is ignored, as in the background of a script.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        client.generate("Once")
    signal.signal(signal.SIGINT, before)
    assert endless.left.wait(10)


@pytest.mark.parametrize("variable", ["grpc_proxy", "https_proxy", "http_proxy"])
def test_calls_to_this_machine_bypass_the_proxy(scripted, target, monkeypatch, variable):
    monkeypatch.setenv(variable, "http://127.0.0.1:9")
    with Client(target, timeout=30) as client:
        assert client.generate("Once").text == scripted.response.outputs[0].text
    with Client(target.replace("127.0.0.1", "localhost"), timeout=30) as client:
        assert client.generate("Once").text == scripted.response.outputs[0].text


def test_the_error_of_another_machine_names_the_variable_of_the_proxy(monkeypatch):
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    with Client("models.example:50051", timeout=10, retries=False) as client:
        with pytest.raises(UnavailableError, match=r"models\.example:50051 through the proxy in \$https_proxy"):
            client.get_model_info()

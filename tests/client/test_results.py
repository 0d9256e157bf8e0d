"""What the client makes of the server's answers."""

import dataclasses

import pytest
from google.protobuf.duration_pb2 import Duration

from mpt.v1 import text_generation_pb2 as pb
from mpt_grpc_client import (
    Finish,
    FinishReason,
    Generation,
    Limits,
    Load,
    ModelInfo,
    ServerInfo,
    Timings,
    Token,
    Usage,
)

GENERATION = Generation(
    request_id="r-1",
    text="Once 🐈 upon",
    num_tokens=5,
    token_ids=(7, 8, 9, 10, 11),
    prompt_token_ids=(12092, 1533),
    finish=Finish(FinishReason.STOP_STRING, stop_string="END"),
    usage=Usage(num_prompt_tokens=2, num_cached_tokens=1, num_output_tokens=5, num_preemptions=3),
    timings=Timings(queue_s=0.25, prefill_s=None, decode_s=None, time_to_first_token_s=1.5),
    seed=2**64 - 1,
    trace_id="0af7651916cd43dd8448eb211c80319c",
)
"""What the scripted answer says."""


@pytest.mark.usefixtures("answer")
def test_a_generation_tells_all_that_the_server_answered(client):
    assert client.generate("Once") == GENERATION


@pytest.mark.usefixtures("answer")
def test_a_stream_yields_the_text_and_ends_with_the_unary_result(client):
    stream = client.stream("Once")
    assert list(stream) == ["Once 🐈", " upon"]
    assert stream.result == GENERATION
    assert (stream.text, stream.token_ids, stream.num_tokens) == (GENERATION.text, GENERATION.token_ids, 5)
    assert (stream.request_id, stream.finish, stream.usage) == ("r-1", GENERATION.finish, GENERATION.usage)


@pytest.mark.usefixtures("endless")
def test_a_stream_shows_how_far_it_has_come(client):
    with client.stream("Once") as stream:
        assert (stream.text, stream.num_tokens, stream.request_id) == ("", 0, "")
        assert next(stream) == "Once 🐈"
        assert (stream.text, stream.token_ids, stream.num_tokens) == ("Once 🐈", (7, 8, 9, 10), 4)
        assert stream.finish is stream.usage is None
        with pytest.raises(RuntimeError, match="not ended"):
            _ = stream.result


@pytest.mark.usefixtures("answer")
def test_a_stream_that_has_ended_stays_ended(client):
    with client.stream("Once") as stream:
        list(stream)
        assert list(stream) == []
    assert stream.result == GENERATION


@pytest.mark.usefixtures("answer")
def test_results_are_frozen(client):
    with pytest.raises(dataclasses.FrozenInstanceError):
        client.generate("Once").text = "other"


def test_a_stop_token_is_told_with_its_id_even_if_that_is_zero(answer, client):
    answer.whole.output.finish.CopyFrom(pb.Finish(reason=pb.FINISH_REASON_EOS_TOKEN, stop_token_id=0))
    assert client.generate("Once").finish == Finish(FinishReason.EOS_TOKEN, stop_token_id=0)


def test_every_finish_reason_of_the_api_has_its_name_in_the_client():
    api = {number: name.removeprefix("FINISH_REASON_") for name, number in pb.FinishReason.items()}
    assert {reason.value: reason.name for reason in FinishReason} == api | {0: "UNKNOWN"}


def test_a_finish_reason_of_a_younger_server_is_unknown_and_not_an_error(answer, client):
    answer.whole.output.finish.reason = 99
    assert client.generate("Once").finish.reason is FinishReason.UNKNOWN


def test_tokens_are_ids_and_bytes(service, client):
    service.tokens = pb.TokenizeResponse(tokens=[pb.Token(id=5, bytes=b"\xf0\x9f"), pb.Token(id=6, bytes=b"a")])
    assert client.tokenize("🐈a") == (Token(5, b"\xf0\x9f"), Token(6, b"a"))
    assert service.requests == [pb.TokenizeRequest(text="🐈a")]


def test_token_ids_are_detokenized_with_special_tokens_if_asked_for(service, client):
    service.text = pb.DetokenizeResponse(text="Hello")
    assert client.detokenize([1, 2]) == client.detokenize((1, 2), skip_special_tokens=False) == "Hello"
    assert service.requests == [
        pb.DetokenizeRequest(ids=[1, 2], skip_special_tokens=True),
        pb.DetokenizeRequest(ids=[1, 2], skip_special_tokens=False),
    ]


def test_abort_answers_the_requests_that_were_in_flight(service, client):
    service.aborted = pb.AbortResponse(request_ids=["b"])
    assert client.abort("a", "b") == ("b",)
    assert service.requests == [pb.AbortRequest(request_ids=["a", "b"])]


def test_model_info_has_every_field_of_the_api(service, client):
    fields = {
        "name": "demo", "num_parameters": 1, "dtype": "bfloat16", "device": "cpu", "vocab_size": 2,
        "max_context_tokens": 3, "num_layers": 4, "hidden_size": 5, "num_heads": 6, "num_kv_heads": 7,
    }  # fmt: skip
    service.model = pb.GetModelInfoResponse(**fields, eos_token_ids=[0, 8])
    assert client.model_info() == ModelInfo(**fields, eos_token_ids=(0, 8))
    assert [f.name for f in dataclasses.fields(ModelInfo)] == list(pb.GetModelInfoResponse.DESCRIPTOR.fields_by_name)


def test_server_info_has_every_field_of_the_api(service, client):
    limits = {field.name: n for n, field in enumerate(pb.Limits.DESCRIPTOR.fields, 1)}
    load = {field.name: n for n, field in enumerate(pb.Load.DESCRIPTOR.fields, 11)}
    service.server = pb.GetServerInfoResponse(
        version="1.2.3",
        uptime=Duration(seconds=90, nanos=500_000_000),
        limits=pb.Limits(**limits),
        load=pb.Load(**load),
    )
    assert client.server_info() == ServerInfo("1.2.3", 90.5, Limits(**limits), Load(**load))

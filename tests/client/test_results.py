"""The values that the client returns for the server's responses."""

import dataclasses

import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from mpt_grpc_client import (
    Delta,
    Finish,
    FinishReason,
    Generation,
    GenerationDefaults,
    Limits,
    Load,
    ModelInfo,
    Output,
    ServerInfo,
    Timings,
    Token,
    TokenLogprob,
    TopLogprob,
    Usage,
)
from mpt_grpc_client.debug import EngineState, RequestState, SequenceState
from mpt_grpc_client.proto.v1 import text_generation_pb2 as pb
from mpt_grpc_client.proto.v1alpha1 import debug_pb2

GENERATION = Generation(
    request_id="r-1",
    outputs=(
        Output(
            index=0,
            text="Once 🐈 upon",
            num_tokens=5,
            token_ids=(7, 8, 9, 10, 11),
            logprobs=(),
            finish=Finish(FinishReason.STOP_STRING, stop_string="END"),
            seed=2**64 - 1,
        ),
    ),
    prompt_token_ids=(12092, 1533),
    prompt_logprobs=(),
    usage=Usage(num_prompt_tokens=2, num_cached_tokens=1, num_output_tokens=5, num_preemptions=3),
    timings=Timings(queue_time=0.25, prefill_time=None, decode_time=None, time_to_first_token=1.5),
    seed=2**64 - 1,
    trace_id="0af7651916cd43dd8448eb211c80319c",
)
"""The value that the client returns for the scripted response."""


@pytest.mark.usefixtures("scripted")
def test_a_generation_has_all_values_of_the_response(client):
    assert client.generate("Once") == GENERATION


@pytest.mark.usefixtures("scripted")
def test_a_stream_yields_the_text_and_ends_with_the_unary_result(client):
    stream = client.stream("Once")
    assert list(stream) == ["Once 🐈", " upon"]
    assert stream.result == GENERATION
    assert (stream.text, stream.token_ids, stream.num_tokens) == (GENERATION.text, GENERATION.token_ids, 5)
    assert (stream.request_id, stream.finish, stream.usage) == ("r-1", GENERATION.finish, GENERATION.usage)


@pytest.mark.usefixtures("endless")
def test_a_stream_exposes_its_partial_output(client):
    with client.stream("Once") as stream:
        assert (stream.text, stream.num_tokens, stream.request_id) == ("", 0, "")
        assert next(stream) == "Once 🐈"
        assert (stream.text, stream.token_ids, stream.num_tokens) == ("Once 🐈", (7, 8, 9, 10), 4)
        assert stream.finish is stream.usage is None
        with pytest.raises(RuntimeError, match="incomplete"):
            _ = stream.result


@pytest.mark.usefixtures("scripted")
def test_a_finished_stream_yields_nothing_more(client):
    with client.stream("Once") as stream:
        list(stream)
        assert list(stream) == []
    assert stream.result == GENERATION


@pytest.mark.usefixtures("scripted")
def test_results_are_frozen(client):
    with pytest.raises(dataclasses.FrozenInstanceError):
        client.generate("Once").text = "other"


def test_a_stop_token_may_have_the_id_zero(scripted, client):
    scripted.response.outputs[0].finish.CopyFrom(pb.Finish(reason=pb.FINISH_REASON_EOS_TOKEN, stop_token_id=0))
    assert client.generate("Once").finish == Finish(FinishReason.EOS_TOKEN, stop_token_id=0)


def test_finish_reasons_have_the_names_of_the_api():
    api = {number: name.removeprefix("FINISH_REASON_") for name, number in pb.FinishReason.items()}
    assert {reason.value: reason.name for reason in FinishReason} == api | {0: "UNKNOWN"}


def test_a_finish_reason_of_a_newer_server_is_unknown(scripted, client):
    scripted.response.outputs[0].finish.reason = 99
    assert client.generate("Once").finish.reason is FinishReason.UNKNOWN


@pytest.mark.usefixtures("two_outputs")
def test_several_outputs_are_in_order_and_a_generation_has_the_fields_of_the_first(client):
    result = client.generate("Once", num_sequences=2)
    assert [(o.index, o.text, o.num_tokens, o.token_ids, o.seed) for o in result.outputs] == [
        (0, "a cat", 3, (1, 2, 3), 2**64 - 1),
        (1, "a dog", 2, (1, 4), 5),
    ]
    assert [o.finish for o in result.outputs] == [
        Finish(FinishReason.MAX_NEW_TOKENS),
        Finish(FinishReason.EOS_TOKEN, stop_token_id=0),
    ]
    first = result.outputs[0]
    assert (result.text, result.num_tokens, result.token_ids) == (first.text, first.num_tokens, first.token_ids)
    assert (result.logprobs, result.finish) == (first.logprobs, first.finish)


@pytest.mark.usefixtures("two_outputs")
def test_deltas_of_several_outputs_interleave_and_add_up_to_the_unary_result(client):
    stream = client.stream("Once", num_sequences=2)
    deltas = list(stream.deltas())
    full, eos = Finish(FinishReason.MAX_NEW_TOKENS), Finish(FinishReason.EOS_TOKEN, stop_token_id=0)
    assert deltas == [
        Delta(0, "a", 1, (1,), (), None),
        Delta(1, "a", 1, (1,), (), None),
        Delta(0, "", 1, (2,), (), None),
        Delta(1, " dog", 1, (4,), (), eos),
        Delta(0, " cat", 1, (3,), (), full),
    ]
    assert stream.result == client.generate("Once", num_sequences=2)
    assert list(stream.deltas()) == []


@pytest.mark.usefixtures("two_outputs")
def test_a_stream_of_several_outputs_exposes_the_partial_first_output(client):
    stream = client.stream("Once", num_sequences=2)
    deltas = stream.deltas()
    for _ in range(4):
        next(deltas)
    # The second output has ended, but the first has not, so neither has the request.
    assert (stream.text, stream.token_ids, stream.num_tokens, stream.finish) == ("a", (1, 2), 2, None)
    assert stream.usage is None
    assert next(deltas).text == " cat"
    assert (stream.text, stream.finish.reason) == ("a cat", FinishReason.MAX_NEW_TOKENS)


@pytest.mark.usefixtures("two_outputs")
def test_a_stream_of_several_outputs_refuses_to_iterate_over_text(client):
    stream = client.stream("Once", num_sequences=2)
    with pytest.raises(TypeError, match=r"deltas\(\)"):
        next(stream)
    # The attempt has consumed nothing.
    assert len(list(stream.deltas())) == 5


@pytest.mark.usefixtures("scripted")
def test_deltas_of_one_output_include_those_without_text(client):
    stream = client.stream("Once", num_sequences=1)
    assert [delta.text for delta in stream.deltas()] == ["", "Once 🐈", " upon"]
    assert stream.result == GENERATION


def test_logprobs_of_prompt_and_output_are_returned_whole_and_in_chunks(scripted, client):
    def logprob(token_id, rank, *top):
        tops = [pb.TopLogprob(token_id=t, token_bytes=bytes([t]), logprob=-0.5) for t in top]
        return pb.TokenLogprob(
            token_id=token_id, token_bytes=bytes([token_id]), logprob=-1.5, rank=rank, top_logprobs=tops
        )

    def expected(token_id, rank, *top):
        tops = tuple(TopLogprob(t, bytes([t]), -0.5) for t in top)
        return TokenLogprob(token_id, bytes([token_id]), -1.5, rank, tops)

    scripted.response.prompt.logprobs.append(logprob(200, 3, 65, 66))
    scripted.response.outputs[0].logprobs.extend([logprob(7, 1, 7), logprob(8, 9)])
    scripted.chunks[0].prompt.CopyFrom(scripted.response.prompt)
    scripted.chunks[0].output.logprobs.append(logprob(7, 1, 7))
    scripted.chunks[1].output.logprobs.append(logprob(8, 9))
    whole = client.generate("Once")
    assert whole.prompt_logprobs == (expected(200, 3, 65, 66),)
    assert whole.logprobs == whole.outputs[0].logprobs == (expected(7, 1, 7), expected(8, 9))
    stream = client.stream("Once")
    assert [delta.logprobs for delta in stream.deltas()] == [(expected(7, 1, 7),), (expected(8, 9),), ()]
    unkept = client.stream("p")
    assert [delta.logprobs for delta in unkept.deltas(keep_logprobs=False)][:2] == [
        (expected(7, 1, 7),),
        (expected(8, 9),),
    ]
    assert (unkept.result.logprobs, unkept.result.text) == ((), stream.result.text)
    assert stream.result == whole


@pytest.mark.parametrize("reason", [reason for reason in FinishReason if reason is not FinishReason.UNKNOWN])
def test_every_finish_reason_is_returned(scripted, client, reason):
    scripted.response.outputs[0].finish.CopyFrom(pb.Finish(reason=reason.value))
    assert client.generate("Once").finish == Finish(reason)


def test_tokens_have_ids_and_bytes(service, client):
    service.tokens = pb.TokenizeResponse(
        tokens=[pb.Token(token_id=5, token_bytes=b"\xf0\x9f"), pb.Token(token_id=6, token_bytes=b"a")]
    )
    assert client.tokenize("🐈a") == (Token(5, b"\xf0\x9f"), Token(6, b"a"))
    assert service.requests == [pb.TokenizeRequest(text="🐈a")]


def test_token_ids_are_detokenized_with_special_tokens_on_request(service, client):
    service.text = pb.DetokenizeResponse(text="Hello")
    assert client.detokenize([1, 2]) == client.detokenize((1, 2), skip_special_tokens=False) == "Hello"
    assert service.requests == [
        pb.DetokenizeRequest(token_ids=[1, 2], skip_special_tokens=True),
        pb.DetokenizeRequest(token_ids=[1, 2], skip_special_tokens=False),
    ]


def test_cancel_returns_the_requests_that_were_in_progress(service, client):
    service.cancelled = pb.CancelResponse(request_ids=["b"])
    assert client.cancel("a", "b") == ("b",)
    assert service.requests == [pb.CancelRequest(request_ids=["a", "b"])]


def test_model_info_has_every_field_of_the_api(service, client):
    fields = {
        "name": "demo", "num_parameters": 1, "dtype": "bfloat16", "device": "cpu", "vocab_size": 2,
        "max_context_tokens": 3, "num_layers": 4, "hidden_size": 5, "num_heads": 6, "num_kv_heads": 7,
        "chat_template": "chatml",
    }  # fmt: skip
    defaults = {field.name: n for n, field in enumerate(pb.GenerationDefaults.DESCRIPTOR.fields, 1)}
    service.model = pb.GetModelInfoResponse(**fields, eos_token_ids=[0, 8], defaults=pb.GenerationDefaults(**defaults))
    assert client.get_model_info() == ModelInfo(**fields, eos_token_ids=(0, 8), defaults=GenerationDefaults(**defaults))
    assert [f.name for f in dataclasses.fields(ModelInfo)] == list(pb.GetModelInfoResponse.DESCRIPTOR.fields_by_name)


def test_server_info_has_every_field_of_the_api(service, client):
    limits: dict[str, object] = {field.name: n for n, field in enumerate(pb.Limits.DESCRIPTOR.fields, 1)}
    limits |= {"max_counts": {"stopping.stop_strings": 16}, "max_bytes": {"request_id": 128}}
    load = {field.name: n for n, field in enumerate(pb.Load.DESCRIPTOR.fields, 11)}
    service.server = pb.GetServerInfoResponse(
        version="1.2.3",
        uptime=Duration(seconds=90, nanos=500_000_000),
        limits=pb.Limits(**limits),
        load=pb.Load(**load),
    )
    assert client.get_server_info() == ServerInfo("1.2.3", 90.5, Limits(**limits), Load(**load))


def test_engine_state_has_every_field_of_the_api(service, client):
    load = {field.name: n for n, field in enumerate(pb.Load.DESCRIPTOR.fields, 11)}
    usage = {field.name: n for n, field in enumerate(pb.Usage.DESCRIPTOR.fields, 21)}
    active = debug_pb2.RequestState(
        request_id="a",
        arrival_time=Timestamp(seconds=5),
        timings=pb.Timings(queue_time=Duration(seconds=1)),
        usage=pb.Usage(**usage),
        sequences=[debug_pb2.SequenceState(index=1, num_computed_tokens=2, num_output_tokens=3, blocks=[4, 5])],
    )
    completed = debug_pb2.RequestState(
        request_id="b",
        end_time=Timestamp(seconds=7, nanos=500_000_000),
        sequences=[debug_pb2.SequenceState(finish_reason=pb.FINISH_REASON_TIME_LIMIT)],
    )
    service.engine = debug_pb2.GetEngineStateResponse(
        time=Timestamp(seconds=9),
        load=pb.Load(**load),
        cached_blocks=[6, 7],
        active_requests=[active],
        completed_requests=[completed],
    )
    expected = RequestState(
        "a", 5.0, None, Timings(1.0, None, None, None), Usage(**usage), (SequenceState(1, 2, 3, (4, 5), None),)
    )
    state = client.get_engine_state()
    assert state == EngineState(9.0, Load(**load), (6, 7), (expected,), state.completed_requests)
    assert (state.completed_requests[0].request_id, state.completed_requests[0].end_time) == ("b", 7.5)
    assert state.completed_requests[0].sequences == (SequenceState(0, 0, 0, (), FinishReason.TIME_LIMIT),)


@pytest.mark.parametrize(
    ("finish", "text"),
    [
        (Finish(FinishReason.MAX_NEW_TOKENS), "MAX_NEW_TOKENS"),
        (Finish(FinishReason.EOS_TOKEN, stop_token_id=0), "EOS_TOKEN (0)"),
        (Finish(FinishReason.STOP_STRING, stop_string="\n"), r"STOP_STRING ('\n')"),
    ],
)
def test_a_finish_prints_as_its_reason_and_what_matched(finish, text):
    assert str(finish) == text

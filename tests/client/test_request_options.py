"""What a caller asks for ends up in the proper field of the request, and what he leaves out stays absent."""

import pytest

from mpt.v1 import text_generation_pb2 as pb
from mpt_grpc_client import GenerateOptions


def test_every_option_ends_up_in_its_field(answer, client):
    client.generate(
        "Once",
        max_new_tokens=12,
        temperature=0.5,
        top_k=40,
        top_p=0.25,
        min_p=0.125,
        seed=2**64 - 1,
        stop=["END", "\n\n"],
        stop_token_ids=[1, 2],
        include_stop_string=True,
        ignore_eos=True,
        skip_special_tokens=False,
        return_token_ids=True,
        return_prompt_token_ids=True,
        request_id="mine",
        model="demo",
        priority=-3,
        cache_bypass=True,
        cache_salt="tenant",
    )
    assert answer.requests == [
        pb.GenerateRequest(
            request_id="mine",
            model="demo",
            text="Once",
            sampling=pb.SamplingParameters(temperature=0.5, top_k=40, top_p=0.25, min_p=0.125, seed=2**64 - 1),
            stopping=pb.StoppingCriteria(
                max_new_tokens=12,
                stop_strings=["END", "\n\n"],
                stop_token_ids=[1, 2],
                include_stop_string=True,
                ignore_eos=True,
            ),
            response=pb.ResponseOptions(prompt_token_ids=True, output_token_ids=True, skip_special_tokens=False),
            cache=pb.CacheOptions(bypass=True, salt="tenant"),
            priority=-3,
        )
    ]


def test_a_stream_sends_the_same_request_as_a_unary_call(answer, client):
    options = GenerateOptions(temperature=0.0, seed=0, stop=("END",), request_id="mine")
    client.generate([1, 2, 3], **options)
    list(client.stream([1, 2, 3], **options))
    assert answer.requests[0] == answer.requests[1]


def test_options_left_out_or_none_stay_absent(answer, client):
    client.generate("Once")
    client.generate(
        "Once", max_new_tokens=None, temperature=None, top_k=None, top_p=None, min_p=None, seed=None, request_id=None
    )
    for request in answer.requests:
        assert not any(request.sampling.HasField(name) for name in ("temperature", "top_p", "seed"))
        assert not request.stopping.HasField("max_new_tokens")
        assert not request.response.HasField("skip_special_tokens")
        assert [len(part.ListFields()) for part in (request.sampling, request.stopping, request.response)] == [0, 0, 0]
        assert (request.request_id, request.model, request.priority) == ("", "", 0)


def test_zero_is_a_value_and_not_absence(answer, client):
    client.generate("Once", temperature=0, seed=0, top_p=0, max_new_tokens=0, skip_special_tokens=False)
    request = answer.requests[0]
    assert all(request.sampling.HasField(name) for name in ("temperature", "top_p", "seed"))
    assert request.stopping.HasField("max_new_tokens")
    assert request.response.HasField("skip_special_tokens")


def test_token_ids_are_a_prompt_even_when_there_are_none(answer, client):
    client.generate((12092, 1533))
    client.generate([])
    assert list(answer.requests[0].token_ids.ids) == [12092, 1533]
    assert answer.requests[1].WhichOneof("prompt") == "token_ids"


def test_empty_text_is_still_a_text_prompt(answer, client):
    client.generate("")
    assert answer.requests[0].WhichOneof("prompt") == "text"


def test_one_stop_string_is_not_taken_for_its_letters(answer, client):
    client.generate("Once", stop="END")
    assert list(answer.requests[0].stopping.stop_strings) == ["END"]


def test_an_unknown_option_is_a_type_error_that_names_it(answer, client):
    with pytest.raises(TypeError, match="max_tokens"):
        client.generate("Once", max_tokens=3)
    assert not answer.requests


@pytest.mark.parametrize("options", [{"seed": -1}, {"top_k": -1}, {"stop_token_ids": [2**32]}, {"temperature": "hot"}])
def test_a_value_that_its_field_cannot_hold_never_leaves_the_client(answer, client, options):
    with pytest.raises((TypeError, ValueError)):
        client.generate("Once", **options)
    assert not answer.requests

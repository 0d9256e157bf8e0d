"""The options of a request, on a real server."""

from __future__ import annotations

import asyncio
import json
import re
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from conftest import SteppedRunner, demo_settings
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2

from mpt_grpc_client.proto.v1 import text_generation_pb2 as pb

GREEDY = pb.SamplingParameters(temperature=0, seed=1)
SAMPLED = pb.SamplingParameters(seed=11)


def generate_request(
    max_new_tokens: int = 16, text: str | None = "Once upon a time", **fields: Any
) -> pb.GenerateRequest:
    stopping = pb.StoppingCriteria(max_new_tokens=max_new_tokens, ignore_eos="decoding" not in fields)
    output_options = pb.OutputOptions(return_token_ids=True)
    return pb.GenerateRequest(
        **{"text": text, "sampling": GREEDY, "stopping": stopping, "output_options": output_options, **fields}
    )


async def generate_one(service: Any, request: pb.GenerateRequest) -> pb.Output:
    """Returns the only output, after checking that both methods return the same one."""
    (whole,) = (await service.stub.Generate(request)).outputs
    chunks = [chunk async for chunk in service.stub.StreamGenerate(request)]
    assert "".join(chunk.output.text for chunk in chunks) == whole.text
    assert [i for chunk in chunks for i in chunk.output.token_ids] == list(whole.token_ids)
    assert [p for chunk in chunks for p in chunk.output.logprobs] == list(whole.logprobs)
    assert (chunks[-1].output.finish, chunks[-1].output.seed) == (whole.finish, whole.seed)
    return whole


async def violations(service: Any, request: pb.GenerateRequest) -> dict[str, str]:
    """Returns the fields that the server refuses, with its descriptions of the errors."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await service.stub.Generate(request)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    packed = next(value for key, value in caught.value.trailing_metadata() or () if key == "grpc-status-details-bin")
    details = status_pb2.Status.FromString(packed).details
    bad = error_details_pb2.BadRequest.FromString(details[1].value)
    return {violation.field: violation.description for violation in bad.field_violations}


async def test_a_logit_bias_can_force_or_ban_a_token(service: Any) -> None:
    plain = await generate_one(service, generate_request(4))
    banned = await generate_one(
        service, generate_request(4, decoding=pb.DecodingOptions(logit_bias={plain.token_ids[0]: -100}))
    )
    assert banned.token_ids[0] != plain.token_ids[0]
    forced = await generate_one(service, generate_request(4, decoding=pb.DecodingOptions(logit_bias={77: 100})))
    assert list(forced.token_ids) == [77] * 4


async def test_only_allowed_tokens_are_generated(service: Any) -> None:
    allowed = list(range(300, 340))
    sampling = pb.SamplingParameters(temperature=5, seed=3)
    chosen = await generate_one(
        service, generate_request(30, sampling=sampling, decoding=pb.DecodingOptions(allowed_token_ids=allowed))
    )
    assert set(chosen.token_ids) <= set(allowed)
    assert len(set(chosen.token_ids)) > 5


@pytest.mark.parametrize(
    "penalty", [{"repetition_penalty": 3.0}, {"presence_penalty": 2.0}, {"frequency_penalty": 2.0}]
)
async def test_a_penalty_makes_a_greedy_output_repeat_itself_less(service: Any, penalty: dict[str, float]) -> None:
    plain = await generate_one(service, generate_request(60))
    penalized = await generate_one(service, generate_request(60, decoding=pb.DecodingOptions(**penalty)))
    assert len(set(penalized.token_ids)) > len(set(plain.token_ids))


async def test_outputs_interleave_and_each_is_reproduced_by_its_seed(service: Any) -> None:
    request = generate_request(200, sampling=pb.SamplingParameters(seed=7, num_sequences=3))
    whole = await service.stub.Generate(request)
    assert [output.index for output in whole.outputs] == [0, 1, 2]
    assert whole.outputs[0].seed == whole.summary.seed == 7
    assert whole.summary.usage.num_output_tokens == 600
    texts: dict[int, str] = defaultdict(str)
    order = []
    async for chunk in service.stub.StreamGenerate(request):
        texts[chunk.output.index] += chunk.output.text
        order.append(chunk.output.index)
        last = chunk
    assert [texts[index] for index in range(3)] == [output.text for output in whole.outputs]
    assert len(set(texts.values())) == 3
    assert order != sorted(order), "the outputs were streamed one after the other"
    assert last.HasField("summary")
    for output in whole.outputs:
        alone = await generate_one(service, generate_request(200, sampling=pb.SamplingParameters(seed=output.seed)))
        assert (alone.text, alone.seed) == (output.text, output.seed)


async def test_a_stop_string_ends_only_the_output_that_contains_it(service: Any) -> None:
    sampling = pb.SamplingParameters(seed=7, num_sequences=3)
    whole = await service.stub.Generate(generate_request(24, sampling=sampling))
    stop = whole.outputs[1].text[10:20]
    assert all(stop not in whole.outputs[index].text for index in (0, 2))
    stopping = pb.StoppingCriteria(max_new_tokens=24, ignore_eos=True, stop_strings=[stop])
    stopped = await service.stub.Generate(generate_request(sampling=sampling, stopping=stopping))
    assert [output.text for output in stopped.outputs] == [
        whole.outputs[0].text,
        whole.outputs[1].text[: whole.outputs[1].text.index(stop)],
        whole.outputs[2].text,
    ]
    assert stopped.outputs[1].finish.stop_string == stop


async def test_logprobs_have_the_token_its_rank_and_the_most_likely_tokens(service: Any) -> None:
    output_options = pb.OutputOptions(return_token_ids=True, return_logprobs=True, top_logprobs=5)
    output = await generate_one(
        service,
        generate_request(10, sampling=pb.SamplingParameters(temperature=2, seed=5), output_options=output_options),
    )
    assert [p.token_id for p in output.logprobs] == list(output.token_ids)
    assert b"".join(p.token_bytes for p in output.logprobs).decode() == output.text
    for logprob in output.logprobs:
        top = [(alternative.logprob, alternative.token_id) for alternative in logprob.top_logprobs]
        assert len(top) == 5
        assert top == sorted(top, reverse=True)
        assert (logprob.rank <= 5) == (logprob.token_id in [token_id for _, token_id in top])
    assert max(p.rank for p in output.logprobs) > 1


async def test_prompt_logprobs_are_in_the_first_chunk_and_bypass_the_prefix_cache(service: Any) -> None:
    output_options = pb.OutputOptions(return_prompt_token_ids=True, return_prompt_logprobs=True)
    request = generate_request(2, text="The king said to the fox, " * 8, output_options=output_options)
    chunks = [chunk async for chunk in service.stub.StreamGenerate(request)]
    prompt = chunks[0].prompt
    assert [p.token_id for p in prompt.logprobs] == list(prompt.token_ids)[1:]
    again = await service.stub.Generate(request)
    assert [p.logprob for p in again.prompt.logprobs] == pytest.approx([p.logprob for p in prompt.logprobs], abs=1e-5)
    assert again.summary.usage.num_cached_tokens == 0
    assert not again.outputs[0].logprobs


async def test_zero_new_tokens_returns_only_the_prompts_logprobs(service: Any) -> None:
    output_options = pb.OutputOptions(return_prompt_logprobs=True)
    stopping = pb.StoppingCriteria(max_new_tokens=0)
    response = await service.stub.Generate(generate_request(output_options=output_options, stopping=stopping))
    assert len(response.prompt.logprobs) == response.prompt.num_tokens - 1
    assert response.outputs[0].num_tokens == 0
    assert response.outputs[0].finish.reason == pb.FINISH_REASON_MAX_NEW_TOKENS
    context = (await service.stub.GetModelInfo(pb.GetModelInfoRequest())).max_context_tokens
    full = pb.GenerateRequest(token_ids=pb.TokenIds(ids=[5] * context), stopping=stopping)
    assert (await service.stub.Generate(full)).prompt.num_tokens == context


async def test_no_stop_condition_ends_an_output_before_min_new_tokens(service: Any) -> None:
    plain = await generate_one(service, generate_request(20))
    stopping = {"max_new_tokens": 20, "stop_token_ids": list(plain.token_ids[2:6])}
    early = await generate_one(service, generate_request(stopping=pb.StoppingCriteria(**stopping)))
    assert early.num_tokens == 3
    late = await generate_one(service, generate_request(stopping=pb.StoppingCriteria(min_new_tokens=10, **stopping)))
    assert late.num_tokens > 10
    assert not set(late.token_ids[:10]) & set(plain.token_ids[2:6])
    word = plain.text[2:6]
    stopping = {"max_new_tokens": 20, "ignore_eos": True, "stop_strings": [word]}
    early = await generate_one(service, generate_request(stopping=pb.StoppingCriteria(**stopping)))
    assert early.text == plain.text[:2]
    whole = await generate_one(service, generate_request(stopping=pb.StoppingCriteria(min_new_tokens=19, **stopping)))
    assert whole.text.startswith(plain.text[:10])


async def test_a_time_limit_returns_the_partial_output(service: Any) -> None:
    limit = Duration()
    limit.FromMilliseconds(400)
    stopping = pb.StoppingCriteria(max_new_tokens=1900, ignore_eos=True, time_limit=limit)
    response = await service.stub.Generate(generate_request(stopping=stopping))
    assert response.outputs[0].finish == pb.Finish(reason=pb.FINISH_REASON_TIME_LIMIT)
    assert 0 < response.outputs[0].num_tokens < 1900


async def test_a_time_limit_ends_a_waiting_request(make_service: Any, stepped: list[SteppedRunner]) -> None:
    service = await make_service(max_running_requests=1)
    running = service.stub.Generate(generate_request(100))
    await asyncio.to_thread(stepped[0].wait_for_step)
    limit = Duration()
    limit.FromMilliseconds(1)
    waiting = service.stub.Generate(generate_request(stopping=pb.StoppingCriteria(time_limit=limit)))
    stepped[0].run_free()
    response = await waiting
    assert response.outputs[0].finish.reason == pb.FINISH_REASON_TIME_LIMIT
    assert response.outputs[0].num_tokens == 0
    assert (await running).outputs[0].num_tokens == 100


async def test_the_repetition_guard_ends_an_output_that_repeats_itself(service: Any) -> None:
    guard = pb.RepetitionGuard(min_repeats=3, max_cycle_tokens=4)
    stopping = pb.StoppingCriteria(max_new_tokens=200, ignore_eos=True, repetition_guard=guard)
    bias = pb.DecodingOptions(logit_bias={77: 100})
    output = await generate_one(service, generate_request(stopping=stopping, decoding=bias))
    assert output.finish.reason == pb.FINISH_REASON_REPETITION
    assert list(output.token_ids) == [77] * 3
    stopping.repetition_guard.CopyFrom(pb.RepetitionGuard())
    assert (await generate_one(service, generate_request(stopping=stopping, decoding=bias))).num_tokens == 4


@pytest.mark.parametrize("seed", range(3))
async def test_a_constrained_output_conforms_to_its_constraint(service: Any, seed: int) -> None:
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer"}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }

    async def text(**constraint: Any) -> str:
        sampling = pb.SamplingParameters(seed=seed)
        decoding = pb.DecodingOptions(**constraint)
        output = await generate_one(service, generate_request(400, sampling=sampling, decoding=decoding))
        assert output.finish.reason == pb.FINISH_REASON_EOS_TOKEN
        return str(output.text)

    parsed = json.loads(await text(json_schema=json.dumps(schema)))
    assert set(parsed) == {"name", "age"}
    assert re.fullmatch(r"[0-9]{3}-[0-9]{4}", await text(regex=r"[0-9]{3}-[0-9]{4}"))
    assert await text(choice=pb.Choice(options=["the fox", "the crow"])) in ("the fox", "the crow")
    assert re.fullmatch("(hop ){2,9}!", await text(lark_grammar='start: "hop "{2,9} "!"'))


async def test_a_json_object_parses_unless_it_reaches_max_new_tokens(service: Any) -> None:
    decoding = pb.DecodingOptions(json_object=pb.JsonObject())
    for seed in range(4):
        output = await generate_one(
            service, generate_request(300, sampling=pb.SamplingParameters(seed=seed), decoding=decoding)
        )
        if output.finish.reason == pb.FINISH_REASON_EOS_TOKEN:
            assert isinstance(json.loads(output.text), dict)
        else:
            assert output.num_tokens == 300


async def test_an_output_that_cannot_complete_its_constraint_ends_at_max_new_tokens(service: Any) -> None:
    output = await generate_one(service, generate_request(25, decoding=pb.DecodingOptions(regex="(ab?){400}")))
    assert output.finish.reason == pb.FINISH_REASON_MAX_NEW_TOKENS
    assert output.num_tokens == 25
    assert set(output.text) <= set("ab")


@pytest.mark.parametrize(
    ("decoding", "field"),
    [
        (pb.DecodingOptions(json_schema="{"), "decoding.json_schema"),
        (pb.DecodingOptions(json_schema='{"type": "string", "not": {}}'), "decoding.json_schema"),
        (pb.DecodingOptions(regex="("), "decoding.regex"),
        (pb.DecodingOptions(regex="a" * 70_000), "decoding.regex"),
        (pb.DecodingOptions(choice=pb.Choice()), "decoding.choice.options"),
        (pb.DecodingOptions(choice=pb.Choice(options=["a", ""])), "decoding.choice.options[1]"),
        (pb.DecodingOptions(lark_grammar="start: nothing"), "decoding.lark_grammar"),
        (pb.DecodingOptions(regex="a", allowed_token_ids=[1]), "decoding.allowed_token_ids"),
        (pb.DecodingOptions(repetition_penalty=0), "decoding.repetition_penalty"),
        (pb.DecodingOptions(logit_bias={4096: 1}), "decoding.logit_bias[4096]"),
    ],
)
async def test_an_invalid_decoding_option_is_refused_with_its_field(service: Any, decoding: Any, field: str) -> None:
    bad = await violations(service, generate_request(decoding=decoding))
    assert list(bad) == [field]
    assert len(bad[field]) < 300


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"stopping": pb.StoppingCriteria(max_new_tokens=4, min_new_tokens=5)}, "stopping.min_new_tokens"),
        ({"stopping": pb.StoppingCriteria(time_limit=Duration(seconds=-1))}, "stopping.time_limit"),
        ({"output_options": pb.OutputOptions(top_logprobs=3)}, "output_options.top_logprobs"),
        ({"output_options": pb.OutputOptions(return_logprobs=True, top_logprobs=21)}, "output_options.top_logprobs"),
        ({"sampling": pb.SamplingParameters(num_sequences=0)}, "sampling.num_sequences"),
        ({"sampling": pb.SamplingParameters(), "resume_token_ids": [1]}, "sampling.seed"),
        ({"sampling": pb.SamplingParameters(seed=1, num_sequences=2), "resume_token_ids": [1]}, "resume_token_ids"),
        ({"resume_token_ids": [7] * 17}, "resume_token_ids"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"stopping": pb.StoppingCriteria(), "resume_token_ids": [0, 5]}, "resume_token_ids[0]"),
        ({"decoding": pb.DecodingOptions(regex="[a-z]+"), "resume_token_ids": [0]}, "resume_token_ids"),
    ],
)
async def test_invalid_options_and_combinations_are_refused_with_the_field(
    service: Any, changes: dict[str, Any], field: str
) -> None:
    assert list(await violations(service, generate_request(**changes))) == [field]


async def test_the_models_template_turns_a_conversation_into_a_prompt(service: Any) -> None:
    messages = [
        pb.Message(role=pb.ROLE_SYSTEM, content="You tell stories."),
        pb.Message(role=pb.ROLE_USER, content="Who lives in the wood?"),
        pb.Message(role=pb.ROLE_ASSISTANT, content="A fox."),
        pb.Message(role=pb.ROLE_USER, content="What does it eat?"),
    ]
    output_options = pb.OutputOptions(return_prompt_token_ids=True)
    request = generate_request(
        24, text=None, conversation=pb.Conversation(messages=messages), output_options=output_options, sampling=SAMPLED
    )
    response = await service.stub.Generate(request)
    shown = await service.stub.Detokenize(pb.DetokenizeRequest(token_ids=response.prompt.token_ids))
    assert shown.text.startswith("You tell stories.\n---\nUser: Who lives in the wood?\nAssistant: A fox.\n")
    assert shown.text.endswith("User: What does it eat?\nAssistant:")
    assert (await service.stub.GetModelInfo(pb.GetModelInfoRequest())).chat_template == "base"
    assert "\nUser:" not in response.outputs[0].text


async def test_a_conversation_that_is_too_long_is_refused_or_loses_its_oldest_turns(service: Any) -> None:
    turns = [("user", "Tell me about the king. " * 40), ("assistant", "He is old. " * 60)] * 6 + [("user", "And?")]
    roles = {"user": pb.ROLE_USER, "assistant": pb.ROLE_ASSISTANT}
    conversation = pb.Conversation(messages=[pb.Message(role=roles[role], content=text) for role, text in turns])
    bad = await violations(service, generate_request(text=None, conversation=conversation))
    assert list(bad) == ["conversation.messages"]
    assert len(re.findall(r"\d+", bad["conversation.messages"])) >= 2
    conversation.drop_oldest_turns = True
    response = await service.stub.Generate(generate_request(text=None, conversation=conversation))
    assert 1000 < response.prompt.num_tokens <= 2048 - 16


async def test_a_given_template_gets_its_kwargs_as_they_were_sent(make_service: Any) -> None:
    settings = demo_settings()
    template = "{{ messages[0].content }} {{ a | tojson }} {{ add_generation_prompt }}"
    service = await make_service(replace(settings, model=replace(settings.model, chat_template=template)))
    assert (await service.stub.GetModelInfo(pb.GetModelInfoRequest())).chat_template == "text"
    value = {"z": 3, "half": 0.5, "whole": 3.0, "big": 2**53 + 1, "text": "ä", "no": None, "list": [[], {"n": [-1]}]}
    conversation = pb.Conversation(messages=[pb.Message(role=pb.ROLE_USER, content="Hi")])
    conversation.chat_template_kwargs = json.dumps({"a": value})
    for begins in (None, True, False):
        conversation.ClearField("add_generation_prompt")
        if begins is not None:
            conversation.add_generation_prompt = begins
        output_options = pb.OutputOptions(return_prompt_token_ids=True)
        request = generate_request(1, text=None, conversation=conversation, output_options=output_options)
        response = await service.stub.Generate(request)
        prompt = (await service.stub.Detokenize(pb.DetokenizeRequest(token_ids=response.prompt.token_ids))).text
        content, _, rest = prompt.partition(" ")
        kwargs, _, ending = rest.rpartition(" ")
        assert (content, ending) == ("Hi", str(begins is not False))
        assert kwargs == json.dumps(value, ensure_ascii=False)


@pytest.mark.parametrize(
    ("kwargs", "why"),
    [
        ('{"a": "' + "b" * 16_376 + '"}', "16385 bytes; at most 16384 are allowed"),
        ("[1]", "must be a JSON object"),
        ('{"a": ', "not valid JSON"),
        ('{"a": NaN}', "NaN is not a number in JSON"),
        ('{"a": ' + "1" * 5000 + "}", "an integer has more than 640 digits"),
        ('{"a": "\\ud800"}', "not valid Unicode"),
        ('{"a": ' + "[" * 32 + "]" * 32 + "}", "nested more than 32 levels deep"),
        ('{"a": ' * 2000 + "1" + "}" * 2000, "nested more than 32 levels deep"),
    ],
)
async def test_invalid_template_kwargs_are_refused_with_the_reason(service: Any, kwargs: str, why: str) -> None:
    messages = [pb.Message(role=pb.ROLE_USER, content="Hi")]
    conversation = pb.Conversation(messages=messages, chat_template_kwargs=kwargs)
    bad = await violations(service, generate_request(1, text=None, conversation=conversation))
    assert why in bad["conversation.chat_template_kwargs"]


async def test_the_largest_template_kwargs_are_accepted(service: Any) -> None:
    messages = [pb.Message(role=pb.ROLE_USER, content="Hi")]
    for kwargs in ('{"a": "' + "b" * 16_375 + '"}', '{"a": ' + "[" * 31 + "]" * 31 + "}"):
        conversation = pb.Conversation(messages=messages, chat_template_kwargs=kwargs)
        await service.stub.Generate(generate_request(1, text=None, conversation=conversation))


async def test_a_prompt_is_truncated_to_its_last_tokens(service: Any) -> None:
    output_options = pb.OutputOptions(return_prompt_token_ids=True, return_token_ids=True)
    whole = await service.stub.Generate(generate_request(1, output_options=output_options))
    cut = await service.stub.Generate(generate_request(1, truncate_prompt_tokens=2, output_options=output_options))
    assert list(cut.prompt.token_ids) == list(whole.prompt.token_ids)[-2:]


async def test_a_resumed_stream_continues_where_it_stopped(service: Any) -> None:
    request = generate_request(
        40,
        sampling=pb.SamplingParameters(seed=2),
        decoding=pb.DecodingOptions(repetition_penalty=1.3, frequency_penalty=0.2),
    )
    whole = await generate_one(service, request)
    text, token_ids = "", []
    async for chunk in service.stub.StreamGenerate(request):
        text += chunk.output.text
        token_ids += chunk.output.token_ids
        if len(token_ids) >= 15:
            break
    request.resume_token_ids.extend(token_ids)
    rest = await generate_one(service, request)
    assert text + rest.text == whole.text
    assert token_ids + list(rest.token_ids) == list(whole.token_ids)
    assert rest.finish == whole.finish


@pytest.fixture
async def guarded(make_service: Any, tmp_path: Path) -> Any:
    """A server with a list of blocked words."""
    words = tmp_path / "words.txt"
    words.write_text("# a comment\ndragon\n/sw[o]+rd.{0,10}blood/\n", encoding="utf-8")
    return await make_service(replace(demo_settings(), guards=(f"words={words}",)))


async def test_a_guard_refuses_a_prompt(guarded: Any) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await guarded.stub.Generate(generate_request(text="A Dragon came"))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    packed = next(value for key, value in caught.value.trailing_metadata() or () if key == "grpc-status-details-bin")
    info = error_details_pb2.ErrorInfo.FromString(status_pb2.Status.FromString(packed).details[0].value)
    assert info.reason == "PROMPT_REFUSED"


async def test_text_withheld_by_a_guard_is_never_sent(guarded: Any, service: Any) -> None:
    decoding = pb.DecodingOptions(regex="The knight saw a (cow|Dragon) and ran\\.")
    output_options = pb.OutputOptions(return_token_ids=True, return_logprobs=True)
    for seed in range(6):
        request = generate_request(
            100, sampling=pb.SamplingParameters(seed=seed), decoding=decoding, output_options=output_options
        )
        unguarded = await generate_one(service, request)
        output = await generate_one(guarded, request)
        sent = await guarded.stub.Detokenize(pb.DetokenizeRequest(token_ids=output.token_ids))
        if "Dragon" in unguarded.text:
            assert output.text == "The knight saw a "
            assert output.text.startswith(sent.text)
            assert output.finish == pb.Finish(reason=pb.FINISH_REASON_CONTENT_FILTER)
            assert len(output.logprobs) == len(output.token_ids) == output.num_tokens
        else:
            assert (output.text, output.token_ids, output.finish) == (
                unguarded.text,
                unguarded.token_ids,
                unguarded.finish,
            )


@pytest.mark.parametrize(
    ("chunks", "size"),
    [
        ({"chunk_tokens": 1}, 1),
        ({"chunk_tokens": 7}, 7),
        ({"chunk_tokens": 1024}, 1024),
        ({"chunk_interval": Duration(nanos=1)}, 1),
        ({"chunk_interval": Duration(seconds=1000)}, 1024),
        ({"chunk_tokens": 7, "chunk_interval": Duration(seconds=1000)}, 7),
        ({"chunk_tokens": 7, "chunk_interval": Duration(nanos=1)}, 1),
    ],
    ids=str,
)
async def test_larger_chunks_add_up_to_the_same_outputs(service: Any, chunks: dict[str, Any], size: int) -> None:
    def request(**chunks: Any) -> pb.GenerateRequest:
        options = pb.OutputOptions(return_token_ids=True, return_logprobs=True, **chunks)
        sampling = pb.SamplingParameters(temperature=1, seed=3, num_sequences=2)
        return generate_request(max_new_tokens=24, sampling=sampling, output_options=options)

    whole = await service.stub.Generate(request())
    received = [chunk.output async for chunk in service.stub.StreamGenerate(request(**chunks))]
    for index, output in enumerate(whole.outputs):
        parts = [part for part in received if part.index == index]
        assert "".join(part.text for part in parts) == output.text
        assert [token_id for part in parts for token_id in part.token_ids] == output.token_ids
        assert [logprob for part in parts for logprob in part.logprobs] == output.logprobs
        _, *others, _ = [part.num_tokens for part in parts]
        assert all(num_tokens >= size for num_tokens in others)

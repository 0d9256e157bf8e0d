"""Each option sets its field of the request, and omitted options leave their fields unset."""

import json
import re
from types import MappingProxyType
from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message as ProtoMessage
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from pydantic import BaseModel

from mpt_grpc_client import (
    Choice,
    GenerateOptions,
    InvalidRequestError,
    JsonObject,
    JsonSchema,
    LarkGrammar,
    Message,
    Regex,
    RepetitionGuard,
    Role,
    Tool,
    ToolCall,
)
from mpt_grpc_client.proto.v1 import text_generation_pb2 as pb

MESSAGES = (Message(Role.SYSTEM, "Be short."), Message(Role.USER, "Hi"))
OPTIONS = {
    "max_new_tokens": (12, "stopping.max_new_tokens", 12),
    "min_new_tokens": (3, "stopping.min_new_tokens", 3),
    "temperature": (0.5, "sampling.temperature", 0.5),
    "top_k": (40, "sampling.top_k", 40),
    "top_p": (0.25, "sampling.top_p", 0.25),
    "min_p": (0.125, "sampling.min_p", 0.125),
    "typical_p": (0.75, "sampling.typical_p", 0.75),
    "seed": (2**64 - 1, "sampling.seed", 2**64 - 1),
    "num_sequences": (4, "sampling.num_sequences", 4),
    "repetition_penalty": (1.5, "decoding.repetition_penalty", 1.5),
    "frequency_penalty": (-0.5, "decoding.frequency_penalty", -0.5),
    "presence_penalty": (0.5, "decoding.presence_penalty", 0.5),
    "logit_bias": ({5: -100, 7: 1.5}, "decoding.logit_bias", {5: -100.0, 7: 1.5}),
    "allowed_token_ids": ((5, 7), "decoding.allowed_token_ids", [5, 7]),
    "constraint": (Regex("[ab]+"), "decoding.regex", "[ab]+"),
    "max_whitespace": (0, "decoding.max_whitespace", 0),
    "stop_strings": (["END", "\n\n"], "stopping.stop_strings", ["END", "\n\n"]),
    "stop_token_ids": ([1, 2], "stopping.stop_token_ids", [1, 2]),
    "include_stop_string": (True, "stopping.include_stop_string", True),
    "ignore_eos": (True, "stopping.ignore_eos", True),
    "time_limit": (1.5, "stopping.time_limit", Duration(seconds=1, nanos=500_000_000)),
    "repetition_guard": (
        RepetitionGuard(3, 16), "stopping.repetition_guard", pb.RepetitionGuard(min_repeats=3, max_cycle_tokens=16)
    ),
    "skip_special_tokens": (False, "output_options.skip_special_tokens", False),
    "return_token_ids": (True, "output_options.return_token_ids", True),
    "return_prompt_token_ids": (True, "output_options.return_prompt_token_ids", True),
    "return_logprobs": (True, "output_options.return_logprobs", True),
    "return_prompt_logprobs": (True, "output_options.return_prompt_logprobs", True),
    "top_logprobs": (20, "output_options.top_logprobs", 20),
    "chunk_tokens": (16, "output_options.chunk_tokens", 16),
    "chunk_interval": (0.25, "output_options.chunk_interval", Duration(nanos=250_000_000)),
    "truncate_prompt_tokens": (100, "truncate_prompt_tokens", 100),
    "drop_oldest_turns": (True, "conversation.drop_oldest_turns", True),
    "add_generation_prompt": (False, "conversation.add_generation_prompt", False),
    "continue_final_message": (True, "conversation.continue_final_message", True),
    "chat_template_kwargs": ({"n": 2}, "conversation.chat_template_kwargs", '{"n": 2}'),
    "tools": (
        [Tool("add", "Adds.", {"type": "object"})],
        "conversation.tools",
        [pb.Tool(name="add", description="Adds.", parameters='{"type": "object"}')],
    ),
    "tool_choice": ("required", "conversation.tool_choice", pb.TOOL_CHOICE_REQUIRED),
    "allowed_tools": (("add",), "conversation.allowed_tools", ["add"]),
    "parallel_tool_calls": (False, "conversation.parallel_tool_calls", False),
    "resume_token_ids": ((8, 9), "resume_token_ids", [8, 9]),
    "request_id": ("mine", "request_id", "mine"),
    "model": ("demo", "model", "demo"),
    "priority": (-3, "priority", -3),
    "cache_bypass": (True, "cache.bypass", True),
    "cache_salt": ("tenant", "cache.salt", "tenant"),
}  # fmt: skip
"""Each option with a value, the field that it sets and the value expected there."""
NESTED: list[Any] = []
for _ in range(100_000):  # deeper than any version of Python encodes
    NESTED = [NESTED]
GROUPS = (
    pb.SamplingParameters,
    pb.DecodingOptions,
    pb.StoppingCriteria,
    pb.OutputOptions,
    pb.CacheOptions,
    pb.Conversation,
)


def _fields(message: ProtoMessage, path: str = "") -> dict[str, Any]:
    """Returns the values of all fields that are set, by path; empty groups of options are left out."""
    found: dict[str, Any] = {}
    for field, value in message.ListFields():
        if isinstance(value, GROUPS):
            found |= _fields(value, f"{field.name}.")
        else:
            found[path + field.name] = value
    return found


def test_every_option_is_covered_here():
    assert OPTIONS.keys() == GenerateOptions.__optional_keys__


@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_sets_its_field_and_no_other(scripted, client, option):
    value, path, expected = OPTIONS[option]
    prompt = MESSAGES if path.startswith("conversation.") else "Once"
    client.generate(prompt)
    client.generate(prompt, **{option: value})
    without, fields = map(_fields, scripted.requests)
    assert fields.pop(path) == expected
    assert fields == without


def test_all_options_can_be_combined(scripted, client):
    client.generate(MESSAGES, **{option: value for option, (value, _, _) in OPTIONS.items()})
    fields = _fields(scripted.requests[0])
    assert {path: fields[path] for _, path, _ in OPTIONS.values()} == {path: want for _, path, want in OPTIONS.values()}


def test_a_stream_sends_the_same_request_as_a_unary_call(scripted, client):
    options = GenerateOptions(temperature=0.0, seed=0, stop_strings=("END",), request_id="mine")
    client.generate([1, 2, 3], **options)
    list(client.stream([1, 2, 3], **options))
    assert scripted.requests[0] == scripted.requests[1]


def test_options_that_are_omitted_or_none_leave_their_fields_unset(scripted, client):
    client.generate("Once")
    client.generate("Once", **dict.fromkeys(OPTIONS))
    for request in scripted.requests:
        assert _fields(request) == {"text": "Once"}


def test_zero_and_false_are_sent(scripted, client):
    client.generate("Once", temperature=0, seed=0, top_p=0, top_k=0, max_new_tokens=0, ignore_eos=False)
    request = scripted.requests[0]
    assert all(request.sampling.HasField(name) for name in ("temperature", "top_p", "top_k", "seed"))
    assert request.stopping.HasField("max_new_tokens")
    assert request.stopping.HasField("ignore_eos")


def test_an_empty_list_is_a_prompt_of_token_ids(scripted, client):
    client.generate((12092, 1533))
    client.generate([])
    assert list(scripted.requests[0].token_ids.ids) == [12092, 1533]
    assert scripted.requests[1].WhichOneof("prompt") == "token_ids"


def test_empty_text_is_still_a_text_prompt(scripted, client):
    client.generate("")
    assert scripted.requests[0].WhichOneof("prompt") == "text"


def test_messages_are_a_conversation_with_roles_in_order(scripted, client):
    client.generate([*MESSAGES, Message(Role.ASSISTANT, "Yes?"), Message(Role.USER, "")])
    assert scripted.requests[0].WhichOneof("prompt") == "conversation"
    assert scripted.requests[0].conversation == pb.Conversation(
        messages=[
            pb.Message(role=pb.ROLE_SYSTEM, content="Be short."),
            pb.Message(role=pb.ROLE_USER, content="Hi"),
            pb.Message(role=pb.ROLE_ASSISTANT, content="Yes?"),
            pb.Message(role=pb.ROLE_USER, content=""),
        ]
    )


def test_every_role_of_the_api_has_its_name_in_the_client():
    api = {number: name.removeprefix("ROLE_") for name, number in pb.Role.items() if number}
    assert {pb.Role.Value(f"ROLE_{role.name}"): role.name for role in Role} == api


def test_messages_may_be_mappings_and_roles_may_be_strings(scripted, client):
    client.generate([{"role": "system", "content": "Be short."}, Message("user", "Hi")])
    client.generate(MESSAGES)
    assert scripted.requests[0] == scripted.requests[1]


@pytest.mark.parametrize("name", ["model", "stop_token_ids", "allowed_token_ids", "resume_token_ids", "cache_salt"])
@pytest.mark.parametrize("value", [b"ab", bytearray(b"ab"), memoryview(b"ab")])
def test_bytes_are_taken_neither_for_text_nor_for_token_ids(scripted, client, name, value):
    with pytest.raises(TypeError, match=f"^{name}: must be a "):
        client.generate("Hi", **{name: value})
    assert not scripted.requests


class Reply(BaseModel):
    """As OpenAI's SDK has it."""

    role: str
    content: str | None
    tool_calls: list[dict[str, Any]] | None = None
    refusal: str | None = None


FUNCTION_CALL = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}


@pytest.mark.parametrize(
    "messages",
    [
        [
            {"role": "developer", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "short."}]},
            {"role": "user", "content": "Hi", "name": "Ann"},
            {"role": "assistant", "content": None, "tool_calls": [FUNCTION_CALL], "audio": None, "annotations": []},
            {"role": "tool", "tool_call_id": "1", "content": "2"},
        ],
        [
            Reply(role="system", content="Be short."),
            Reply(role="user", content="Hi"),
            Reply(role="assistant", content=None, tool_calls=[FUNCTION_CALL]),
            {"role": "tool", "tool_call_id": "1", "content": "2"},
        ],
        [
            SystemMessage("Be short."),
            HumanMessage([{"type": "text", "text": "Hi"}]),
            AIMessage("", tool_calls=[{"name": "add", "args": {"a": 1}, "id": "1"}]),
            ToolMessage("2", tool_call_id="1"),
        ],
    ],
)
def test_messages_may_be_those_of_other_libraries(scripted, client, messages):
    client.generate(messages)
    calls = [ToolCall("1", "add", '{"a": 1}')]
    ours = [("system", "Be short."), ("user", "Hi"), ("assistant", "", calls), ("tool", "2", (), "1")]
    client.generate([Message(*parts) for parts in ours])
    assert scripted.requests[0] == scripted.requests[1]


@pytest.mark.parametrize(
    ("prompt", "error"),
    [
        (b"abc", r"^prompt: must be a string, token IDs or messages, not bytes"),
        (7, r"^prompt: must be .*, not int"),
        ({"role": "user", "content": "Hi"}, r"^prompt: must be .*, not dict"),
        (["Once", "upon"], r"^prompt: must be one string"),
        ([1.5], r"^prompt: token IDs must be whole numbers, not \[1.5\]"),
        ([{"role": "user", "content": "Hi", "colour": "red"}], r"^prompt: a message has the keys .*, not colour"),
        ([{"role": "user"}], r"^prompt: a message has a 'role' and a 'content'; this one has \['role'\]"),
        ([{"content": "Hi"}], r"^prompt: a message has a 'role' and a 'content'"),
        ([{"role": "user", "content": b"Hi"}], r"^prompt: the content of a message must be text.*, not bytes"),
        ([Message("user", b"Hi")], r"^prompt: the content of a message must be text.*, not bytes"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], r"^prompt: .* a part of type 'image_url' is not"),
        ([{"role": "assistant", "tool_calls": ["f"]}], r"^prompt: a call is a ToolCall, or a mapping"),
        ([Message("user", "Hi"), "Hi"], r"^prompt: a message is a Message, a mapping or a pydantic model, not str"),
        (Message("user", "Hi"), r"^prompt: must be .*, not Message: put it in a list"),
        (bytearray(b"abc"), r"^prompt: must be a string, token IDs or messages, not bytearray"),
        (iter([5, 6]), r"^prompt: must be a list of token IDs or messages, .*, not an iterator"),
    ],
)
def test_a_prompt_of_another_type_is_a_type_error(scripted, client, prompt, error):
    with pytest.raises(TypeError, match=error):
        client.generate(prompt)
    assert not scripted.requests


def test_an_unknown_role_is_refused_with_the_known_ones(scripted, client):
    with pytest.raises(
        InvalidRequestError, match=r"^prompt: 'robot' is not a role: use 'system', 'user', 'assistant' or 'tool'"
    ):
        client.generate([{"role": "robot", "content": "Hi"}])
    assert not scripted.requests


@pytest.mark.parametrize("prompt", ["Once", [1, 2], []])
def test_turns_can_be_dropped_only_from_messages(scripted, client, prompt):
    with pytest.raises(InvalidRequestError, match=r"drop_oldest_turns: .*truncate_prompt_tokens"):
        client.generate(prompt, drop_oldest_turns=True)
    assert not scripted.requests


@pytest.mark.parametrize(
    "option", [{"add_generation_prompt": False}, {"continue_final_message": True}, {"chat_template_kwargs": {"a": 1}}]
)
def test_options_of_the_chat_template_require_messages(scripted, client, option):
    with pytest.raises(InvalidRequestError, match=f"^{next(iter(option))}: requires a prompt of messages"):
        client.generate("Once", **option)
    assert not scripted.requests


def test_chat_template_kwargs_are_sent_as_they_are(scripted, client):
    values = {
        "text": "ä",
        "no": None,
        "yes": True,
        "n": -3,
        "most": 2**63 - 1,
        "x": 0.5,
        "list": [[], {"a": [1]}],
        "map": {},
    }
    client.generate(MESSAGES, chat_template_kwargs=MappingProxyType({**values, "tuple": (1, 2)}))
    sent = scripted.requests[0].conversation.chat_template_kwargs
    assert sent == json.dumps({**values, "tuple": [1, 2]}, ensure_ascii=False)


@pytest.mark.parametrize("value", [float("nan"), {"a": [float("inf")]}, NESTED])
def test_a_chat_template_value_that_would_not_arrive_as_it_is_gets_refused(scripted, client, value):
    with pytest.raises(InvalidRequestError, match=r"^chat_template_kwargs: ") as refused:
        client.generate(MESSAGES, chat_template_kwargs={"a": value})
    assert [violation.field for violation in refused.value.violations] == ["chat_template_kwargs"]
    assert not scripted.requests


@pytest.mark.parametrize("kwargs", [[("a", 1)], {1: 2}, {"a": {1, 2}}, {"a": b"1"}, {"a": [object()]}])
def test_chat_template_kwargs_that_are_not_json_are_a_type_error(scripted, client, kwargs):
    with pytest.raises(TypeError, match=r"^chat_template_kwargs: "):
        client.generate(MESSAGES, chat_template_kwargs=kwargs)
    assert not scripted.requests


def test_a_constraint_of_each_kind_sets_its_field(scripted, client):
    schema = {"type": "object", "properties": {"ä": {"enum": [1, 2]}}}
    constraints = {
        JsonSchema('{"type": "string"}'): pb.DecodingOptions(json_schema='{"type": "string"}'),
        JsonObject(): pb.DecodingOptions(json_object=pb.JsonObject()),
        Regex("[ab]+"): pb.DecodingOptions(regex="[ab]+"),
        Choice("yes", "no"): pb.DecodingOptions(choice=pb.Choice(options=["yes", "no"])),
        LarkGrammar('start: "a"'): pb.DecodingOptions(lark_grammar='start: "a"'),
    }
    for constraint, expected in constraints.items():
        client.generate("Once", constraint=constraint)
        assert scripted.requests.pop().decoding == expected
    client.generate("Once", constraint=JsonSchema(MappingProxyType(schema)))
    assert json.loads(scripted.requests.pop().decoding.json_schema) == schema


@pytest.mark.parametrize("constraint", ["[ab]+", {"type": "object"}, Regex, 0])
def test_a_constraint_of_another_type_is_a_type_error(scripted, client, constraint):
    with pytest.raises(TypeError, match=r"^constraint: .* is not a constraint"):
        client.generate("Once", constraint=constraint)
    assert not scripted.requests


def test_a_schema_that_cannot_be_serialized_is_a_type_error():
    with pytest.raises(TypeError):
        JsonSchema({"enum": {1, 2}})


def test_a_single_stop_string_may_be_given_without_a_list(scripted, client):
    client.generate("Once", stop_strings="END")
    assert list(scripted.requests[0].stopping.stop_strings) == ["END"]


def test_an_unknown_option_is_a_type_error_that_suggests_the_closest_one(scripted, client):
    with pytest.raises(TypeError, match=r"unknown option 'max_token'; did you mean 'max_new_tokens'?"):
        client.generate("Once", max_token=3)
    with pytest.raises(TypeError, match=r"unknown option 'stop'; did you mean 'stop_strings'\?"):
        client.generate("Once", stop="a")
    with pytest.raises(TypeError, match=r"unknown option 'regex'; did you mean 'constraint=Regex\(\.\.\.\)'\?"):
        client.generate("Once", regex="a")
    with pytest.raises(TypeError, match=r"unknown option 'zzz'$"):
        client.generate("Once", zzz=3)
    assert not scripted.requests


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seed", -1),
        ("top_k", -1),
        ("stop_token_ids", [2**32]),
        ("logit_bias", {-1: 1.0}),
        ("logit_bias", {5: -1e300}),
        ("temperature", 1e300),
        ("time_limit", float("inf")),
        ("cache_salt", "\ud83d"),
    ],
)
def test_a_value_that_does_not_fit_in_its_field_is_refused_before_it_is_sent(scripted, client, name, value):
    with pytest.raises(InvalidRequestError, match=f"^{name}: ") as refused:
        client.generate([Message(Role.USER, "Hi")], max_new_tokens=3, drop_oldest_turns=True, **{name: value})
    assert [violation.field for violation in refused.value.violations] == [name]
    with pytest.raises(InvalidRequestError, match=r"^prompt: "):
        client.generate("\ud83d", max_new_tokens=3)
    assert not scripted.requests


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        ("temperature", "hot", "a number"),
        ("top_k", 1.5, "a whole number"),
        ("ignore_eos", "yes", "True or False"),
        ("request_id", 5, "a string"),
        ("stop_strings", [1], "a string or a list of strings"),
        ("stop_token_ids", [1.5], "a list of whole numbers"),
        ("logit_bias", [1], "a mapping of token IDs to numbers"),
        ("repetition_guard", 5, "a RepetitionGuard"),
        ("allowed_tools", 5, "a list of names"),
    ],
)
def test_a_value_of_another_type_is_a_type_error_that_says_what_the_option_must_be(scripted, client, name, value, kind):
    with pytest.raises(TypeError, match=f"^{name}: must be {kind}, not {re.escape(repr(value))}$"):
        client.generate([Message(Role.USER, "Hi")], min_p=0.1, **{name: value})
    assert not scripted.requests

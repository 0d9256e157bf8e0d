"""Tools given as functions, models, schemas and mappings, and the calls in results."""

from __future__ import annotations

import enum
import json
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel

from mpt_grpc_client import Message, Role, Tool, ToolCall
from mpt_grpc_client.proto.v1 import text_generation_pb2 as pb
from mpt_grpc_client.request import build_request
from mpt_grpc_client.responses import generation

ASK = [Message(Role.USER, "Hi")]


class Unit(enum.Enum):
    CELSIUS = "C"
    KELVIN = "K"


def weather(
    city: Annotated[str, "The name of a city."],
    days: int,
    *,
    unit: Unit = Unit.CELSIUS,
    hours: list[float] | None = None,
    extra: dict[str, bool] | None = None,
    detail: Literal["low", "high"] = "low",
) -> str:
    """Tell the weather.

    In any city.
    """
    return f"{city}{days}{unit}{hours}{extra}{detail}"


class Add(BaseModel):
    """Add numbers."""

    left: int
    right: int = 0


def sent(*tools: Any) -> list[tuple[str, str, Any]]:
    """Returns the name, the description and the parameters of each tool in a request."""
    found = build_request(ASK, tools=tools).conversation.tools
    return [(tool.name, tool.description, json.loads(tool.parameters) if tool.parameters else None) for tool in found]


def test_a_function_has_the_schema_of_its_annotations() -> None:
    [(name, description, parameters)] = sent(weather)
    assert (name, description) == ("weather", "Tell the weather.\n\nIn any city.")
    assert parameters == {
        "type": "object",
        "properties": {
            "city": {"type": "string", "description": "The name of a city."},
            "days": {"type": "integer"},
            "unit": {"enum": ["C", "K"]},
            "hours": {"anyOf": [{"type": "array", "items": {"type": "number"}}, {"type": "null"}]},
            "extra": {
                "anyOf": [{"type": "object", "additionalProperties": {"type": "boolean"}}, {"type": "null"}]
            },
            "detail": {"enum": ["low", "high"]},
        },
        "required": ["city", "days"],
        "additionalProperties": False,
    }  # fmt: skip


def test_models_schemas_and_mappings_are_tools_too() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "string"}}}
    closed = {**schema, "additionalProperties": False}
    function = {"name": "f", "description": None, "parameters": schema, "strict": True}
    tools = sent(Add, Tool("f", "Does.", schema), {"type": "function", "function": function}, {"name": "f"})
    (name, description, parameters), *others = tools
    assert (name, description) == ("Add", "Add numbers.")
    assert parameters["required"] == ["left"]
    assert parameters["additionalProperties"] is False
    assert others == [("f", "Does.", closed), ("f", "", closed), ("f", "", None)]
    assert sent(Tool("f", "", json.dumps(schema))) == [("f", "", schema)]


def untyped(a):  # type: ignore[no-untyped-def]
    return a


def variadic(*a: int) -> None:
    del a


def unresolved(a: Missing) -> None:  # type: ignore[name-defined]  # noqa: F821
    del a


def unknown(a: object) -> None:
    del a


@pytest.mark.parametrize(
    ("tool", "why"),
    [
        (untyped, "parameter 'a' of untyped: a tool's parameters have names and types"),
        (variadic, "parameter 'a' of variadic: a tool's parameters have names and types"),
        (unresolved, "cannot be resolved"),
        (unknown, "parameter 'a' of unknown: <class 'object'> has no schema here: use a pydantic model"),
        (3, "3 is not a tool: use a function"),
    ],
)
def test_what_is_not_a_tool_is_refused(tool: Any, why: str) -> None:
    with pytest.raises(TypeError, match=f"^tools: .*{why}"):
        build_request(ASK, tools=[tool])


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"tool_choice": "add"}, "tool_choice: 'add' is not a choice: use auto, none, required; name the tools in all"),
        ({"allowed_tools": "add"}, "allowed_tools: must be a list of names"),
    ],
)
def test_an_unknown_choice_is_refused(options: Any, why: str) -> None:
    with pytest.raises(Exception, match=why):
        build_request(ASK, tools=[Add], **options)


@pytest.mark.parametrize("options", [{"tools": [Add]}, {"tool_choice": "none"}, {"parallel_tool_calls": False}])
def test_tools_require_messages(options: Any) -> None:
    with pytest.raises(Exception, match="requires a prompt of messages"):
        build_request("Once", **options)


def test_calls_and_results_are_messages() -> None:
    call = ToolCall("1", "add", '{"left": 1}')
    messages = [*ASK, Message(Role.ASSISTANT, "", [call]), Message("tool", "1", tool_call_id="1")]
    as_mapping = {"role": "assistant", "content": "", "tool_calls": [call]}
    for prompt in (messages, [*ASK, as_mapping, {"role": "tool", "content": "1", "tool_call_id": "1"}]):
        _, called, result = build_request(prompt).conversation.messages
        assert called.tool_calls == [pb.ToolCall(id="1", name="add", arguments='{"left": 1}')]
        assert (result.role, result.tool_call_id) == (pb.ROLE_TOOL, "1")
    with pytest.raises(TypeError, match="a call is a ToolCall, or a mapping with 'id' and 'function', not"):
        build_request([*ASK, {**as_mapping, "tool_calls": [{"id": "1"}]}])


def test_a_result_has_its_calls_and_the_message_to_send_back() -> None:
    parts = [("1", "add", '{"left": 1}', 0), ("2", "add", '{"left', 1)]
    calls = [pb.ToolCall(id=i, name=name, arguments=arguments, index=n) for i, name, arguments, n in parts]
    output = pb.Output(text="So.", tool_calls=calls, finish=pb.Finish(reason=pb.FINISH_REASON_TOOL_CALLS))
    result = generation(pb.GenerateResponse(outputs=[output]))
    complete, cut = result.tool_calls
    assert complete == ToolCall("1", "add", '{"left": 1}')
    assert complete.values == {"left": 1}
    with pytest.raises(ValueError, match="Unterminated string"):
        _ = cut.values
    assert result.message == Message(Role.ASSISTANT, "So.", result.tool_calls)

"""Reading calls out of an output's text."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpt_grpc.constraint import JsonObject
from mpt_grpc.conversation import ToolCall, ToolCalls
from mpt_grpc.text.tool_calls import ToolCallReader

ARGUMENTS = st.dictionaries(
    st.text(max_size=5),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(alphabet='a"\\{}[]<>/é\n', max_size=8),
        lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=3), values, max_size=3),
        max_leaves=5,
    ),
    max_size=3,
)


def written(name: str, arguments: Any) -> str:
    """Returns a call as the grammar allows it."""
    return f'<tool_call>\n{{"name": "{name}", "arguments": {json.dumps(arguments, ensure_ascii=False)}}}\n</tool_call>'


TEXT_OR_CALLS = ToolCalls((), False, 16, None)
JSON_OR_CALLS = ToolCalls((), False, 16, JsonObject())
ONLY_CALLS = ToolCalls((), True, 16, None)


def read(
    *pieces: str, constraint: ToolCalls = TEXT_OR_CALLS, is_cut_short: bool = True
) -> tuple[str, list[ToolCall], bool]:
    """Returns the text and the calls in the pieces, and whether the calls are complete."""
    reader = ToolCallReader(constraint, lambda index: f"call_{index}")
    text, calls = "", dict[int, ToolCall]()
    for piece in pieces:
        new_text, parts = reader.feed(piece)
        text += new_text
        for part in parts:
            begun = calls.get(part.index)
            assert (begun is None) == bool(part.id) == bool(part.name)
            calls[part.index] = part if begun is None else begun._replace(arguments=begun.arguments + part.arguments)
    return text + reader.finish(is_cut_short=is_cut_short), list(calls.values()), reader.has_complete_calls


@given(
    text=st.text(alphabet="Sure. <tol_cal\n", max_size=20).filter(lambda text: "<tool_call>" not in text),
    calls=st.lists(st.tuples(st.sampled_from(["f", "get-it_2"]), ARGUMENTS), max_size=3),
    data=st.data(),
)
def test_calls_are_separated_from_text_however_it_is_split(
    text: str, calls: list[tuple[str, Any]], data: st.DataObject
) -> None:
    output = text + "\n".join(written(*call) for call in calls)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(output)), max_size=10)))
    pieces = [output[start:end] for start, end in zip([0, *cuts], [*cuts, len(output)], strict=True)]
    plain, found, is_complete = read(*pieces)
    assert plain == (text.rstrip() if calls else text)
    assert [(call.name, json.loads(call.arguments)) for call in found] == calls
    assert [(call.id, call.index) for call in found] == [(f"call_{i}", i) for i in range(len(calls))]
    assert is_complete == bool(calls)


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ('<tool_call>\n{"na', ("", [], False)),
        ('<tool_call>\n{"name": "f", "arguments": {"a": "}', ("", [ToolCall("call_0", "f", '{"a": "}')], False)),
        ('<tool_call>\n{"name": "f", "arguments": {}', ("", [ToolCall("call_0", "f", "{}")], True)),
        ("Hm.\n<tool_c", ("Hm.\n<tool_c", [], False)),
    ],
)
def test_an_output_that_was_cut_short_has_the_part_that_is_certain(output: str, expected: Any) -> None:
    assert read(output) == expected
    assert read(*output) == expected


@pytest.mark.parametrize(
    "output",
    [
        '{"a": "<tool_call>\\n"}',
        " [1]<tool_call>",
        "<tools>",
        "\n<tool_call>fox</tool_call>",
        '<tool_call>\n{"no": 1}',
    ],
)
def test_where_text_does_not_precede_calls_a_tag_in_it_is_text(output: str) -> None:
    assert read(output, constraint=JSON_OR_CALLS) == (output, [], False)
    assert read(*output, constraint=JSON_OR_CALLS) == (output, [], False)
    call = written("f", {})
    assert read(*f" {call}", constraint=JSON_OR_CALLS) == read(call)


@pytest.mark.parametrize("output", ["<tool_call>", " <tool_call>\n{", '<tool_call>\n{"name": "f'])
def test_a_whole_output_that_is_the_beginning_of_a_call_is_text(output: str) -> None:
    """A choice, say, may consist of it; an output that was cut short would have become a call."""
    assert read(output, constraint=JSON_OR_CALLS, is_cut_short=False) == (output, [], False)
    assert read(*output, constraint=JSON_OR_CALLS, is_cut_short=False) == (output, [], False)
    assert read(*output, constraint=JSON_OR_CALLS) == ("", [], False)


def test_the_beginning_of_a_required_call_is_never_text() -> None:
    assert read(*"\n<tool", constraint=ONLY_CALLS) == ("", [], False)


def test_little_whitespace_is_held_back_for_a_call_that_may_follow() -> None:
    reader = ToolCallReader(TEXT_OR_CALLS, str)
    assert len(reader.feed(" " * 10_000)[0]) == 10_000 - 16
    assert reader.feed("x")[0] == " " * 16 + "x"

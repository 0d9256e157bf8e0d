"""Constraint matchers, tested without a model by choosing random allowed tokens."""

from __future__ import annotations

import json
import os
import random
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from json_schemas import conforms, objects, schemas
from processor_time import processor_seconds

import mpt_grpc
from mpt_grpc.constraint import Choice, Constraint, JsonObject, JsonSchema, LarkGrammar, Regex
from mpt_grpc.conversation import Tool, ToolCall, ToolCalls
from mpt_grpc.errors import InvalidRequestError
from mpt_grpc.step import Matcher
from mpt_grpc.text.constraints import CACHE_BYTES, ConstraintCompiler
from mpt_grpc.text.grammar import MAX_SOURCE_BYTES
from mpt_grpc.text.tokenizer import Tokenizer
from mpt_grpc.text.tool_calls import ToolCallReader

DEMO = Path(mpt_grpc.__file__).parent / "demo"
TOKENIZER = Tokenizer.from_folder(DEMO)
COMPILER = ConstraintCompiler(TOKENIZER)
END = 0
CLOSING = [b'"', b"}", b"]", b","]


def with_ends(*ends: int) -> Tokenizer:
    return Tokenizer(tokenizers.Tokenizer.from_file(str(DEMO / "tokenizer.json")), frozenset(ends))


def allowed(matcher: Matcher) -> list[int]:
    return [8 * i + bit for i, byte in enumerate(matcher.masks(())[0]) if byte for bit in range(8) if byte >> bit & 1]


def walk(matcher: Matcher, seed: int, tokenizer: Tokenizer = TOKENIZER, max_tokens: int = 1500) -> bytes:
    """Generates an output from random allowed tokens. After 40 steps it prefers tokens that close something."""
    rng = random.Random(seed)
    output = b""
    for step in range(max_tokens):
        ids = allowed(matcher)
        if step > 40:
            ending = [i for i in ids if i in tokenizer.eos_token_ids]
            closing = [[i for i in ids if tokenizer.token_bytes(i) == text] for text in CLOSING]
            ids = next((preferred for preferred in (ending, *closing) if preferred), ids)
        token_id = rng.choice(ids)
        is_complete = matcher.advance(token_id)
        if token_id not in tokenizer.eos_token_ids:
            output += tokenizer.token_bytes(token_id)
        if is_complete:
            return output
    raise AssertionError(f"not complete after {max_tokens} tokens: {output[-200:]!r}")


def refusal(call: Callable[[], object]) -> tuple[str, str]:
    """Returns the field and the description of the only violation that a call raises."""
    with pytest.raises(InvalidRequestError) as caught:
        call()
    (violation,) = caught.value.violations
    return violation.field, violation.description


def feed(matcher: Matcher, text: str) -> bool:
    """Advances the matcher through a text; returns whether the output is complete."""
    return [matcher.advance(token_id) for token_id in TOKENIZER.encode(text)][-1]


@settings(max_examples=40, derandomize=True)
@given(schema=schemas, seed=st.integers(0, 1 << 32))
def test_completed_outputs_conform_to_their_json_schema(schema: dict[str, Any], seed: int) -> None:
    output = walk(COMPILER.compile(JsonSchema(json.dumps(schema))), seed)
    assert conforms(json.loads(output), schema), output


@pytest.mark.parametrize("seed", range(5))
def test_json_object_constraint_produces_an_object(seed: int) -> None:
    assert isinstance(json.loads(walk(COMPILER.compile(JsonObject()), seed)), dict)


@pytest.mark.parametrize(
    "pattern",
    [
        r"\d{3}-\d{4}",
        r"(yes|no)( of course)?",
        r"[äöü]{2,5}🦊?",
        "a/b\n\\|c",
        r"[^a]{3}x|",
        r"(?i)once upon a (time|midnight)\.",
    ],
)
@pytest.mark.parametrize("seed", range(3))
def test_complete_output_matches_the_regex(pattern: str, seed: int) -> None:
    assert re.fullmatch(pattern, walk(COMPILER.compile(Regex(pattern)), seed).decode())


OPTIONS = (
    "yes",
    "yes, of course",
    "a|b",
    "(",
    "\\d",
    '"',
    "a/b\nc\t\x00",
    "日本",
    "🦊🦊",
    "e\u0301",
    " ",
    "<|endoftext|>!",
)


def test_choice_produces_exactly_its_options() -> None:
    assert {walk(COMPILER.compile(Choice(OPTIONS)), seed).decode() for seed in range(300)} == set(OPTIONS)


@pytest.mark.parametrize("seed", range(5))
def test_lark_grammar_produces_its_sentences(seed: int) -> None:
    grammar = 'start: "let " NAME "=" sum ";"\nsum: N ("+" N)*\nNAME: /[a-z]{1,5}/\nN: /[1-9][0-9]{0,2}/'
    output = walk(COMPILER.compile(LarkGrammar(grammar)), seed).decode()
    assert re.fullmatch(r"let [a-z]{1,5}=[1-9]\d{0,2}(\+[1-9]\d{0,2})*;", output)


def read_calls(output: bytes) -> tuple[str, list[ToolCall], bool]:
    """Returns the text and the calls of an output, and whether it ends with calls."""
    reader = ToolCallReader(ToolCalls((), False, 16, None), str)
    text, calls = reader.feed(output.decode())
    return text + reader.finish(is_cut_short=False), list(calls), reader.has_complete_calls


@settings(max_examples=20, derandomize=True)
@given(schema=objects(schemas), max_calls=st.integers(1, 3), seed=st.integers(0, 1 << 32))
def test_required_calls_have_a_name_of_the_list_and_arguments_that_conform(
    schema: dict[str, Any], max_calls: int, seed: int
) -> None:
    tools = Tool("first", "", json.dumps(schema)), Tool("second", "", "")
    text, calls, is_complete = read_calls(walk(COMPILER.compile(ToolCalls(tools, True, max_calls, None)), seed))
    assert text == ""
    assert is_complete
    assert 1 <= len(calls) <= max_calls
    for call in calls:
        arguments = json.loads(call.arguments)
        assert conforms(arguments, schema) if call.name == "first" else arguments == {}


CALL = '<tool_call>\n{"name": "run", "arguments": {}}\n</tool_call>'
RUN = (Tool("run", "", ""),)


@pytest.mark.parametrize(
    ("output", "content", "num_calls"),
    [
        ("Once upon a time", None, 0),
        ("a < b, and <tool_calls>", None, 0),
        (CALL, None, 1),
        (f"Let me see.\n{CALL}", None, 1),
        (f" {CALL}\n{CALL}", None, 2),
        ('{"a": "<tool_call>"}', JsonObject(), 0),
        (f"\n{CALL}", JsonObject(), 1),
        ("yes", Choice(("yes", "no")), 0),
        (CALL, Choice(("yes", "no")), 1),
    ],
)
def test_text_and_calls_are_both_allowed_unless_calls_are_required(
    output: str, content: Constraint | None, num_calls: int
) -> None:
    matcher = COMPILER.compile(ToolCalls(RUN, False, 2, content))
    for token_id in TOKENIZER.encode(output):
        assert token_id in allowed(matcher)
        matcher.advance(token_id)
    assert END in allowed(matcher)
    required = COMPILER.compile(ToolCalls(RUN, True, 2, content))
    if num_calls and not output.startswith("Let"):
        feed(required, output)
        assert END in allowed(required)
    else:
        with pytest.raises(InvalidRequestError):
            feed(required, output)


@pytest.mark.parametrize(
    "output", ["<tool_call>", f"{CALL} Done.", f"{CALL}{CALL}", f"{CALL}\n{CALL}\n{CALL}", CALL.replace("run", "walk")]
)
def test_no_other_text_has_the_form_of_a_call(output: str) -> None:
    matcher = COMPILER.compile(ToolCalls(RUN, False, 2, None))
    try:
        is_complete = feed(matcher, output)
    except InvalidRequestError:
        return
    assert not is_complete
    assert END not in allowed(matcher)


@pytest.mark.parametrize("schema", ["{}", '{"properties": {"a": {"const": 1}}}', '{"anyOf": [{"type": "object"}, {}]}'])
def test_arguments_are_an_object_even_if_the_schema_does_not_say_so(schema: str) -> None:
    for seed in range(5):
        matcher = COMPILER.compile(ToolCalls((Tool("f", "", schema),), True, 1, None))
        _, [call], is_complete = read_calls(walk(matcher, seed))
        assert isinstance(json.loads(call.arguments), dict)
        assert is_complete


def test_a_stop_string_may_follow_calls() -> None:
    stops = "\nUser:", "a/b|c"
    for output in (f"{CALL}\nUser:", f"{CALL}\n{CALL}a/b|c"):
        assert feed(COMPILER.compile(ToolCalls(RUN, True, 2, None, stops)), output)
        with pytest.raises(InvalidRequestError):
            feed(COMPILER.compile(ToolCalls(RUN, True, 2, None)), output)


@pytest.mark.parametrize(
    ("schema", "why"),
    [('{"not": {"type": "object"}}', "not supported"), ('{"type": "object", "x-guidance": {}}', "x-guidance")],
)
def test_a_schema_that_cannot_be_enforced_is_refused_with_its_tool(schema: str, why: str) -> None:
    tools = (*RUN, Tool("other", "", schema))
    field, description = refusal(lambda: COMPILER.compile(ToolCalls(tools, False, 1, None)))
    assert field == "conversation.tools[1].parameters"
    assert why in description


def requiring(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties)}


SHORT = {"type": "string", "minLength": 5, "maxLength": 2}
WHY = "no output can satisfy it: minLength, 5, is greater than maxLength, 2: change it"


@pytest.mark.parametrize(
    ("schema", "description"),
    [
        (requiring(a={"type": "string"}, b=requiring(c=SHORT)), f"/properties/b/properties/c: {WHY}"),
        (requiring(a={"type": "array", "minItems": 1, "items": SHORT}), f"/properties/a/items: {WHY}"),
        (requiring(a={"$ref": "#/$defs/B"}) | {"$defs": {"B": requiring(c=SHORT)}}, f"/$defs/B/properties/c: {WHY}"),
        (
            requiring(a={"anyOf": [SHORT, {"type": "null"}]}, b={"type": "string", "pattern": "[z-a]"}),
            '/properties/b: the range ends before it begins ("z-a"): change it',
        ),
        (SHORT, WHY),
    ],
)
def test_a_schema_that_no_output_can_satisfy_is_refused_with_the_place(schema: Any, description: str) -> None:
    constraint = JsonSchema(json.dumps(schema))
    assert refusal(lambda: COMPILER.compile(constraint)) == ("decoding.json_schema", description)
    with_tools = ToolCalls(RUN, False, 1, constraint)
    assert refusal(lambda: COMPILER.compile(with_tools)) == ("decoding.json_schema", description)


def test_arguments_that_cannot_be_satisfied_are_refused_with_their_tool_and_the_place() -> None:
    tools = (*RUN, Tool("other", "", json.dumps(requiring(a=requiring(b=SHORT)))))
    field, description = refusal(lambda: COMPILER.compile(ToolCalls(tools, False, 1, None)))
    assert (field, description) == ("conversation.tools[1].parameters", f"/properties/a/properties/b: {WHY}")


def test_special_tokens_that_stop_an_output_end_it_where_the_constraint_allows_an_end() -> None:
    backend = tokenizers.Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    backend.add_special_tokens(["<|im_end|>"])
    compiler, stop = ConstraintCompiler(Tokenizer(backend, frozenset([END]))), backend.token_to_id("<|im_end|>")
    text = compiler.compile(ToolCalls(RUN, False, 1, None), ends=[stop])
    feed(text, "Yes.")
    assert {stop, END} <= set(allowed(text))
    assert text.advance(stop)
    call = compiler.compile(ToolCalls(RUN, False, 1, None), ends=[stop])
    feed(call, "<tool_call>")
    assert not {stop, END} & set(allowed(call))
    assert stop not in allowed(compiler.compile(ToolCalls(RUN, False, 1, None)))


@pytest.mark.parametrize("constraint", [JsonObject, lambda n: JsonSchema('{"type": "object"}', n)])
@pytest.mark.parametrize("most", range(9))
def test_whitespace_between_the_elements_of_json_is_bounded(constraint: Callable[[int], Constraint], most: int) -> None:
    for space in (" ", "\n", "\t"):
        feed(COMPILER.compile(constraint(most)), "{" + space * most + '"a"' + space * most + ":1" + space * most + "}")
        with pytest.raises(InvalidRequestError):
            feed(COMPILER.compile(constraint(most)), "{" + space * (most + 1) + '"a"')


@pytest.mark.parametrize("constraint", [JsonObject(), JsonSchema('{"type": "object"}')])
def test_by_default_one_space_may_follow_each_comma_and_colon(constraint: Constraint) -> None:
    for text in ('{"a":[1,2],"b":{}}', '{"a": [1, 2], "b": {}}'):
        assert feed(COMPILER.compile(constraint), text)
    for text in (
        '{ "a"',
        '{"a" :',
        '{"a":  1',
        '{"a":\n1',
        '{"a":[1 ,',
        '{"a":[1,  ',
        '{"a":[1,\n',
        '{"a":1 }',
        '{"a":1}\n',
    ):
        with pytest.raises(InvalidRequestError):
            feed(COMPILER.compile(constraint), text)


def test_arguments_of_calls_have_no_line_breaks() -> None:
    properties = {"a": {"type": "integer"}, "b": {"type": "integer"}}
    tools = (Tool("run", "", json.dumps({"type": "object", "properties": properties, "required": ["a"]})),)
    assert feed(COMPILER.compile(ToolCalls(tools, True, 1, None)), CALL.replace("{}", '{"a": 1, "b":2}'))
    with pytest.raises(InvalidRequestError):
        feed(COMPILER.compile(ToolCalls(tools, True, 1, None)), CALL.replace("{}", '{"a":\n1}'))


# The end of an output.


def test_output_is_complete_as_soon_as_only_the_end_may_follow() -> None:
    assert feed(COMPILER.compile(Choice(("yes", "no"))), "yes")
    assert feed(COMPILER.compile(JsonObject()), '{"a": 1}')


def test_any_eos_token_may_end_an_output_that_could_also_continue() -> None:
    a, b, other_end = (*TOKENIZER.encode("a"), *TOKENIZER.encode("b"), *TOKENIZER.encode("Q"))
    compiler = ConstraintCompiler(with_ends(END, other_end))
    for end in (END, other_end, b):
        matcher = compiler.compile(Regex("a|ab"))
        assert set(allowed(matcher)).isdisjoint({END, other_end})
        assert not matcher.advance(a)
        assert set(allowed(matcher)) == {END, other_end, b}
        assert matcher.advance(end)


def test_without_eos_tokens_an_output_is_complete_where_no_token_may_follow() -> None:
    tokenizer = with_ends()
    compiler = ConstraintCompiler(tokenizer)
    assert json.loads(walk(compiler.compile(JsonObject()), 1, tokenizer)) is not None
    assert walk(compiler.compile(Regex("a|ab")), 1, tokenizer) == b"ab"
    field, _ = refusal(lambda: compiler.compile(Regex("")))
    assert field == "decoding.regex"


def test_special_tokens_are_not_allowed_before_the_end() -> None:
    matcher = COMPILER.compile(Regex(r"(?s:.)*x"))
    assert END not in allowed(matcher)
    assert not matcher.advance(*TOKENIZER.encode("x"))
    assert END in allowed(matcher)

    # A grammar with an end-of-sequence token in the middle can never be completed.
    field, _ = refusal(lambda: COMPILER.compile(LarkGrammar(f'start: "a" <[{END}]> "b"')))
    assert field == "decoding.lark_grammar"


def test_mask_has_exactly_one_bit_per_token() -> None:
    assert len(COMPILER.compile(JsonObject()).mask()) == (TOKENIZER.vocab_size + 7) // 8


@pytest.mark.parametrize("wrong", [None, 0, 2, 5])
def test_masks_of_drafts_are_those_after_them_up_to_the_first_that_is_not_allowed(wrong: int | None) -> None:
    constraint = JsonSchema('{"type": "array", "items": {"const": "again"}}')
    matcher, alone = COMPILER.compile(constraint), COMPILER.compile(constraint)
    drafts = TOKENIZER.encode('["again", "again", "again"')
    if wrong is not None:
        drafts = (*drafts[:wrong], END, *drafts[wrong:])
    masks = matcher.masks(drafts)
    assert len(masks) == 1 + (len(drafts) if wrong is None else wrong)
    for draft, mask in zip((*drafts, 0), masks, strict=False):
        assert mask == alone.mask()
        if mask is not masks[-1]:
            alone.advance(draft)
    assert matcher.mask() == COMPILER.compile(constraint).mask(), "the drafts are forgotten"


def test_drafts_that_are_too_costly_do_not_end_the_output() -> None:
    matcher = COMPILER.compile(Regex("(a{1,1000}){1,1000}"))
    assert len(matcher.masks(TOKENIZER.encode("a") * 1000)) < 1000
    assert matcher.mask() == COMPILER.compile(Regex("a")).mask()


# Tokens that are not allowed.


@pytest.mark.parametrize("token_id", [*TOKENIZER.encode("Q"), END, -1, TOKENIZER.vocab_size, 1 << 40])
def test_disallowed_token_is_reported_as_an_error_in_resume_token_ids(token_id: int) -> None:
    field, why = refusal(lambda: COMPILER.compile(Regex("ab")).advance(token_id))
    assert field == "resume_token_ids"
    assert why.startswith(f"{token_id} is not allowed by decoding.regex here")


def test_only_eos_may_follow_a_complete_output() -> None:
    matcher = COMPILER.compile(Choice(("yes",)))
    assert feed(matcher, "yes")
    assert matcher.advance(END)
    assert refusal(lambda: feed(matcher, "s"))[0] == "resume_token_ids"


def test_matcher_that_becomes_too_costly_does_not_affect_the_next_one() -> None:
    constraint = Regex("(a{1,1000}){1,1000}")

    def advance_until_refused() -> None:
        matcher = COMPILER.compile(constraint)
        for _ in range(1000):
            matcher.mask()
            feed(matcher, "a")

    for _ in range(2):
        field, why = refusal(advance_until_refused)
        assert field == "decoding.regex"
        assert why == "exceeds the server's limits on the cost of a constraint: simplify it"


# The cache.


def test_matchers_of_one_constraint_are_independent() -> None:
    one, other = (COMPILER.compile(Choice(("cat", "cow"))) for _ in range(2))
    feed(one, "c")
    feed(other, "c")
    assert feed(one, "at")
    assert feed(other, "ow")


def test_recompiled_constraint_starts_over_and_behaves_identically() -> None:
    compiler = ConstraintCompiler(TOKENIZER)
    constraint = JsonSchema('{"type": "array", "items": {"type": "integer"}, "maxItems": 5}')
    first, second = (walk(compiler.compile(constraint), seed=3) for _ in range(2))
    assert first == second


def test_constraint_is_still_rejected_after_its_verdict_was_evicted() -> None:
    compiler = ConstraintCompiler(TOKENIZER)
    refusals = {refusal(lambda: compiler.compile(JsonSchema("{"))) for _ in range(2)}
    length = MAX_SOURCE_BYTES - 8
    for index in range(CACHE_BYTES // length + 1):
        refusal(lambda index=index: compiler.compile(JsonSchema(f"{index:08}{'[' * length}")))
    assert refusals == {refusal(lambda: compiler.compile(JsonSchema("{")))}


def test_the_process_that_checks_constraints_is_replaced_when_it_is_killed() -> None:
    compiler = ConstraintCompiler(TOKENIZER)
    before = set(children())
    compiler.compile(Regex("a"))
    (probe,) = set(children()) - before
    os.kill(probe, signal.SIGKILL)
    while "(zombie)" not in Path(f"/proc/{probe}/status").read_text():
        os.sched_yield()
    assert walk(compiler.compile(Regex("b")), 1) == b"b"
    (replacement,) = set(children()) - before
    del compiler
    assert replacement not in children()


def children() -> list[int]:
    """Returns the processes that this one has started and not waited for."""
    return [int(pid) for path in Path("/proc/self/task").glob("*/children") for pid in path.read_text().split()]


# Rejected constraints: the field and the reason are reported.

DEEP = 30_000
REFUSED: list[tuple[Constraint, str, str]] = [
    (JsonSchema('{"type": '), "json_schema", "not valid JSON"),
    (JsonSchema("[]"), "json_schema", "must be a JSON object"),
    (JsonSchema("true"), "json_schema", "must be a JSON object"),
    (JsonSchema('{"type": "strin"}'), "json_schema", '/type: "strin" is not a type'),
    (JsonSchema('{"uniqueItems": true}'), "json_schema", '"uniqueItems" is not supported'),
    (JsonSchema('{"not": {}}'), "json_schema", "no output can satisfy it"),
    (JsonSchema('{"oneOf": [{"minimum": 1}, {"minimum": 2}]}'), "json_schema", '"oneOf" is not supported'),
    (JsonSchema('{"x-guidance": {"lenient": true}, "not": {}}'), "json_schema", '"x-guidance" is not supported'),
    (
        JsonSchema('{"$ref": "http://127.0.0.1:9/s.json"}'),
        "json_schema",
        "/$ref: nothing is there, and nothing is fetched",
    ),
    (JsonSchema('{"$ref": "file:///etc/passwd"}'), "json_schema", "/$ref: nothing is there, and nothing is fetched"),
    (JsonSchema('{"$ref": "#"}'), "json_schema", "no output can satisfy it"),
    (
        JsonSchema('{"type": "integer", "minimum": 5, "maximum": 4}'),
        "json_schema",
        "no output can satisfy it: minimum, 5, is greater than maximum, 4",
    ),
    (JsonSchema('{"properties": {"a": []}}'), "json_schema", "/properties/a: must be a schema"),
    (JsonSchema(r'{"const": "\ud800"}'), "json_schema", "not valid Unicode"),
    (JsonSchema(f'{{"const": {"9" * 400}}}'), "json_schema", "beyond the range of a double"),
    (
        JsonSchema('{"type": "array", "minItems": 2, "maxItems": 1}'),
        "json_schema",
        "minItems, 2, is greater than maxItems",
    ),
    (JsonSchema('{"type": "integer", "enum": ["a"]}'), "json_schema", "types or constants exclude each other"),
    (JsonSchema('{"type": "object", "required": ["a"], "properties": {"a": false}}'), "json_schema", 'property "a"'),
    (JsonSchema('{"const": "abc", "pattern": "^x"}'), "json_schema", "no output can satisfy it"),
    (JsonSchema("[" * DEEP), "json_schema", "nested more than 127 levels deep"),
    *(
        (LarkGrammar("start: %json " + '{"items":' * n + "{}" + "}" * n), "lark_grammar", "nested more than 127 levels")
        for n in (200, 3000, 5000)
    ),
    (JsonSchema('{"items":' * 5000 + "{}" + "}" * 5000), "json_schema", "nested more than 127 levels deep"),
    (JsonSchema(" " * (MAX_SOURCE_BYTES + 1)), "json_schema", "65537 bytes"),
    (Regex("("), "regex", "unclosed group"),
    (Regex(r"(a)\1"), "regex", "backreferences are not supported"),
    (Regex(r"a\++b{2,}+"), "regex", 'possessive quantifiers ("{2,}+") are not supported: remove the last "+"'),
    (Regex(r"\0"), "regex", 'octal escapes ("\\0") are not supported: write "\\x00"'),
    (Regex("(?R)"), "regex", 'groups that begin with "(?R" are not supported'),
    (Regex(r"\ud83d\ude00"), "regex", "halves of surrogate pairs"),
    (Regex(r"(?=a)b"), "regex", 'look-around ("(?=") is not supported'),
    (Regex(r"\w+\b"), "regex", r'word boundaries ("\b") are not supported'),
    (Regex("(?m)^a$"), "regex", '"$" is only supported at the end of a pattern'),
    (Regex("a^"), "regex", '"^" is only supported at the beginning of a pattern'),
    (Regex("a(?#why)"), "regex", 'groups that begin with "(?#" are not supported'),
    (Regex(r"a\Z"), "regex", r'there is no such escape ("\Z")'),
    (Regex("[z-a]"), "regex", 'the range ends before it begins ("z-a")'),
    (Regex(r"\x{110000}"), "regex", "there is no such escape"),
    (Regex("*"), "regex", "there is nothing to repeat"),
    (Regex("a{2"), "regex", "the number of repetitions is not complete"),
    (Regex(r"\p{None}"), "regex", "there is no such class of characters"),
    (Regex("(?z)"), "regex", 'there is no such flag ("z")'),
    (Regex("a\\"), "regex", "ends in a single backslash"),
    (LarkGrammar(r"start: /\bword/"), "lark_grammar", "word boundaries are not supported"),
    (Regex("(too big (special token"), "regex", 'unclosed group ("(")'),
    (LarkGrammar('start: fuel "special token"'), "lark_grammar", '"fuel" is not defined at line 1, column 8'),
    (
        LarkGrammar('start: %json {"type": "string", "minLength": 3, "maxLength": 1}'),
        "lark_grammar",
        "no output can satisfy it: minLength, 3, is greater than maxLength, 1",
    ),
    (Regex(r"[^\s\S]"), "regex", "no output can satisfy it"),
    (Regex("(" * DEEP + ")" * DEEP), "regex", "nested"),
    (Regex("é" * (MAX_SOURCE_BYTES // 2 + 1)), "regex", "65538 bytes"),
    (Regex("\ud800"), "regex", "not valid Unicode"),
    (Choice(()), "choice.options", "empty"),
    (Choice(("a", "")), "choice.options[1]", "empty"),
    (Choice(("a", "x" * (MAX_SOURCE_BYTES + 1))), "choice.options[1]", "65537 bytes"),
    (Choice(("ab" * 20_000, "cd" * 20_000)), "choice.options", "80000 bytes"),
    (LarkGrammar(""), "lark_grammar", 'no rule has the name "start"'),
    (LarkGrammar('begin: "a"'), "lark_grammar", 'no rule has the name "start"'),
    (LarkGrammar("start: (("), "lark_grammar", "')' is missing at line 1, column 10"),
    (
        LarkGrammar('{"grammars": [{"json_schema": {}}]}'),
        "lark_grammar",
        "a rule, a terminal or a statement is missing at line 1, column 1",
    ),
    (LarkGrammar("start: " + "(" * DEEP), "lark_grammar", "nested too deeply"),
    (LarkGrammar("start: other"), "lark_grammar", '"other" is not defined at line 1, column 8'),
    (LarkGrammar('start: "\x00"'), "lark_grammar", "the syntax is not that of Lark"),
    (LarkGrammar("A: A\nstart: A"), "lark_grammar", 'the terminal "A" contains itself'),
    (LarkGrammar("%import a.B\nstart: B"), "lark_grammar", '"a.B" is not among the terminals that can be imported'),
    (LarkGrammar('start: %json {"a"'), "lark_grammar", 'what follows "%json" is not valid JSON'),
    (LarkGrammar('start: "a" %json {"type": "x"}'), "lark_grammar", '/type: "x" is not a type'),
    (LarkGrammar('start: %json {"x-guidance": {}}'), "lark_grammar", '"x-guidance" is not supported'),
    (LarkGrammar('start: "a" <|endoftext|>'), "lark_grammar", "special tokens are not supported"),
]
TOO_COSTLY: dict[str, Constraint] = {
    "a chain of references that overflows a stack": JsonSchema(
        json.dumps(
            {"$ref": "#/d/0", "d": {str(i): {"items": {"$ref": f"#/d/{i + 1}"}} for i in range(1500)} | {"1500": {}}}
        )
    ),
    "thousands of optional fields": JsonSchema(
        json.dumps({"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(2000)}})
    ),
    "a product of alternatives": JsonSchema(
        json.dumps({"allOf": [{"anyOf": [{"minLength": i + 9 * j} for i in range(9)]} for j in range(9)]})
    ),
    "a conjunction of patterns": JsonSchema(
        json.dumps({"allOf": [{"type": "string", "pattern": f".*a{i}.*"} for i in range(100)]})
    ),
    "multiples of a large number": JsonSchema('{"type": "integer", "multipleOf": 1000003}'),
    "an enormous length": JsonSchema('{"type": "string", "minLength": 1099511627776}'),
    "a long sequence of optional characters": Regex("a?" * 30_000),
    "nested repetition": Regex("(a*b?)*" * 9000),
    "thousands of ambiguous optional rules": LarkGrammar("start: " + "a? " * 15_000 + '\na: "a"'),
    "terminals that double in length": LarkGrammar(
        "start: A0\n" + "\n".join(f"A{i}: A{i + 1} A{i + 1}" for i in range(60)) + '\nA60: "a"'
    ),
    "a chain of terminals that overflows a stack": LarkGrammar(
        "start: A0\n" + "\n".join(f"A{i}: A{i + 1}" for i in range(4000)) + '\nA4000: "a"'
    ),
}


@pytest.mark.parametrize(("constraint", "field", "reason"), REFUSED)
def test_unusable_constraint_is_rejected_with_field_and_reason(constraint: Constraint, field: str, reason: str) -> None:
    found, why = refusal(lambda: COMPILER.compile(constraint))
    assert found == f"decoding.{field}"
    assert reason in why
    assert "\n" not in why
    assert len(why) < 260


@pytest.mark.parametrize("constraint", TOO_COSTLY.values(), ids=TOO_COSTLY.keys())
def test_too_costly_constraint_is_rejected_without_crashing_the_process(constraint: Constraint) -> None:
    field, why = refusal(lambda: COMPILER.compile(constraint))
    assert field == {JsonSchema: "decoding.json_schema", Regex: "decoding.regex"}.get(
        type(constraint), "decoding.lark_grammar"
    )
    assert why == "exceeds the server's limits on the cost of a constraint: simplify it"


@pytest.mark.parametrize(
    "text", ["[", "[^", "[:a", "[]", "(?:", "Resource '", "Unimplemented keys: [", "(in regex): a", "error: "]
)
def test_a_malformed_regex_is_refused_in_time_proportional_to_its_length(text: str) -> None:
    """A search in Python's `re` that begins anew at each place of the pattern would stop the server for minutes."""
    constraint = Regex(text * ((MAX_SOURCE_BYTES - 1) // len(text)) + "(")

    def compile_it() -> None:
        with pytest.raises(InvalidRequestError):
            COMPILER.compile(constraint)

    assert processor_seconds(compile_it) < 0.5


def test_a_failure_of_the_library_is_told_without_its_internals() -> None:
    matcher = COMPILER.compile(LarkGrammar('start: text "END"\ntext[stop="END"]: /(?s:.*)/'))
    assert refusal(lambda: feed(matcher, "ENDEND")) == (
        "decoding.lark_grammar",
        "makes the library that enforces constraints fail: change it",
    )

"""Converts constraints to llguidance's grammars."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from llguidance import LLMatcher

from mpt_grpc.constraint import Choice, JsonObject, JsonSchema, Regex
from mpt_grpc.conversation import OutputConstraint, ToolCalls
from mpt_grpc.errors import FieldViolation, InvalidRequestError
from mpt_grpc.json_values import parse_object, too_deep
from mpt_grpc.limits import MAX_BYTES
from mpt_grpc.text.json_schema import rewrite
from mpt_grpc.text.refusals import IMPOSSIBLE
from mpt_grpc.text.regex_syntax import unsupported_syntax
from mpt_grpc.text.schema_checks import UnsupportedSchemaError
from mpt_grpc.text.schema_recursion import check_recursion
from mpt_grpc.text.tools import CALL_END, CALL_START, parameters

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

_MAX_DEPTH = 127
_JSON_IN_LARK = re.compile(r'"(?:\\.|[^"\\])*+"?|/(?!/)(?:\\.|[^/\\])++/?|(?://|\#)[^\n]*+|(?P<json>%json\s*+)', re.S)
"""A schema in a Lark grammar, or what may contain its characters: a string, a regular expression, or a comment.

Those without an end, which llguidance refuses, go on to that of the grammar, so that each character is read once.
"""
_DECODER = json.JSONDecoder()
MAX_SOURCE_BYTES = max(MAX_BYTES[f"decoding.{name}"] for name in ("json_schema", "regex", "lark_grammar"))


def make_grammar(constraint: OutputConstraint) -> str:
    """Returns a constraint as an llguidance grammar. Raises InvalidRequestError for errors apparent from its text."""
    field = constraint_field(constraint)
    if isinstance(constraint, ToolCalls):
        return _tool_grammar(constraint)
    if isinstance(constraint, JsonObject):
        return _json_grammar('{"type": "object"}', field, constraint.max_whitespace)
    if isinstance(constraint, Choice):
        return _choice_grammar(constraint.options)
    if isinstance(constraint, JsonSchema):
        _check_source(constraint.schema, field)
        return _json_grammar(constraint.schema, field, constraint.max_whitespace)
    if isinstance(constraint, Regex):
        _check_source(constraint.pattern, field)
        if (reason := unsupported_syntax(constraint.pattern)) is not None:
            raise InvalidRequestError(FieldViolation(field, reason))
        return LLMatcher.grammar_from_regex(constraint.pattern)
    _check_source(constraint.grammar, field)
    # Wrapped in JSON, because llguidance reads text that begins with a brace as a different kind of grammar.
    return json.dumps({"grammars": [{"lark_grammar": _with_rewritten_schemas(constraint.grammar, field)}]})


def constraint_field(constraint: OutputConstraint) -> str:
    """Returns the constraint's field path in the API."""
    if isinstance(constraint, ToolCalls):
        return "conversation.tools"
    if isinstance(constraint, JsonSchema):
        return "decoding.json_schema"
    if isinstance(constraint, JsonObject):
        return "decoding.json_object"
    if isinstance(constraint, Regex):
        return "decoding.regex"
    return "decoding.choice" if isinstance(constraint, Choice) else "decoding.lark_grammar"


def _with_rewritten_schemas(grammar: str, field: str) -> str:
    """Returns a Lark grammar in which the schema after each `%json` has the meaning of a schema without a grammar."""
    pieces, position = [], 0
    while (found := _JSON_IN_LARK.search(grammar, position)) is not None:
        start = end = found.end()
        if found["json"]:
            try:
                end = _DECODER.raw_decode(grammar, start)[1]
            except ValueError:  # llguidance refuses it, too
                break
            except RecursionError as error:  # from a depth on that depends on the version of Python
                raise InvalidRequestError(FieldViolation(field, too_deep(_MAX_DEPTH))) from error
            (parsed,) = json.loads(_json_grammar(grammar[start:end], field))["grammars"]
        pieces.append(grammar[position:start] + (json.dumps(parsed["json_schema"]) if found["json"] else ""))
        position = end
    return "".join([*pieces, grammar[position:]])


def _check_source(source: str, field: str) -> None:
    try:
        size = len(source.encode())
    except UnicodeEncodeError as error:
        raise InvalidRequestError(FieldViolation(field, "not valid Unicode: remove lone surrogates")) from error
    if size > MAX_SOURCE_BYTES:
        why = f"{size} bytes; at most {MAX_SOURCE_BYTES} are allowed: shorten it"
        raise InvalidRequestError(FieldViolation(field, why))


def _choice_grammar(options: tuple[str, ...]) -> str:
    if not options:
        raise InvalidRequestError(FieldViolation("decoding.choice.options", "empty: set at least one option"))
    for index, option in enumerate(options):
        if not option:
            why = "empty: an option must have at least one character"
            raise InvalidRequestError(FieldViolation(f"decoding.choice.options[{index}]", why))
        _check_source(option, f"decoding.choice.options[{index}]")
    _check_source("".join(options), "decoding.choice.options")
    return LLMatcher.grammar_from_regex("|".join(map(_escaped, options)))


def _escaped(text: str) -> str:
    return "".join(c if c.isascii() and c.isalnum() else f"\\u{{{ord(c):x}}}" for c in text)


def _tool_grammar(constraint: ToolCalls) -> str:
    """Returns the grammar of calls, each exactly in the form that `tool_calls.py` reads, or of text."""
    # Templates and models differ in whether a space follows the prompt.
    start = f'(" " | "\\n")? "{CALL_START}" calls'
    rules, grammars = [], []
    if not constraint.is_required:
        if constraint.content is None:
            start = "TEXT | before calls"
            rules.append(f"TEXT: /(?s:.*)/ & ~/(?s:.*){CALL_START}(?s:.*)/")
            rules.append(f'before[suffix="{CALL_START}"]: /(?s:.*)/')
        else:
            start = f"@content | {start}"
            grammars.append({**json.loads(make_grammar(constraint.content))["grammars"][0], "name": "content"})
    more = stop = ""
    if constraint.max_calls > 1:
        more = f' ("\\n{CALL_START}" call){{0,{constraint.max_calls - 1}}}'
        stop = f" /{'|'.join(map(_escaped, constraint.stop_strings))}/?" if constraint.stop_strings else ""
    heads = []
    for index, tool in enumerate(constraint.tools):
        field = f"conversation.tools[{index}].parameters"
        schema = {"type": "object"} | parameters(tool, field)
        grammar = _json_grammar(json.dumps(schema), field)
        grammars.append({**json.loads(grammar)["grammars"][0], "name": f"arguments_{index}"})
        heads.append(f'"{tool.name}\\", \\"arguments\\": " @arguments_{index}')
    rules += [
        f"start: {start}",
        f"calls: call{more}{stop}",
        f'call: "\\n{{\\"name\\": \\"" tool "}}\\n{CALL_END}"',
        "tool: " + " | ".join(heads),
    ]
    return json.dumps({"grammars": [{"lark_grammar": "\n".join(rules)}, *grammars]})


def _json_grammar(schema: str, field: str, max_whitespace: int | None = None) -> str:
    # A weak model may generate whitespace forever if it is unbounded.
    form: JsonCompileOptions = {"lenient": False, "whitespace_flexible": False}
    if max_whitespace is None:
        form |= {"item_separator": ", ?", "key_separator": ": ?"}
    elif max_whitespace:
        form = {"lenient": False, "whitespace_pattern": rf"[\x20\x0A\x0D\x09]{{1,{max_whitespace}}}"}
    try:
        return LLMatcher.grammar_from_json_schema(json.dumps(_rewritten(schema)), overrides=form)
    except UnsupportedSchemaError as error:
        raise InvalidRequestError(FieldViolation(field, str(error))) from error
    except ValueError as error:
        # The rewriting may add levels, and Python's integers have no limit.
        why = (
            "nested too deeply: simplify it"
            if "recursion limit" in str(error)
            else "a number in it is beyond the range of a double"
        )
        raise InvalidRequestError(FieldViolation(field, why)) from error


def _rewritten(schema: str) -> dict[str, Any]:
    """Returns a schema as llguidance supports it. Raises UnsupportedSchemaError."""
    try:
        content = parse_object(schema, _MAX_DEPTH)
    except ValueError as error:
        raise UnsupportedSchemaError(str(error)) from error
    if "x-guidance" in content:
        raise UnsupportedSchemaError('"x-guidance" is not supported: remove it')
    rewritten = rewrite(content)
    if isinstance(rewritten, bool):
        raise UnsupportedSchemaError(IMPOSSIBLE)
    check_recursion(rewritten)
    return rewritten

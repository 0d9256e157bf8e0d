"""Converts constraints to llguidance's grammars, and its error messages to ones that make sense to the caller."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

from llguidance import LLMatcher

from mpt_grpc.errors import FieldViolation, InvalidRequestError
from mpt_grpc.json_values import parse_json
from mpt_grpc.limits import MAX_BYTES
from mpt_grpc.request import Choice, JsonObject, JsonSchema, OutputConstraint, Regex, ToolCalls
from mpt_grpc.text.json_schema import rewrite
from mpt_grpc.text.regex_syntax import unsupported_syntax
from mpt_grpc.text.schema_checks import UnsupportedSchemaError
from mpt_grpc.text.tools import CALL_END, CALL_START, parameters

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

MAX_SOURCE_BYTES = max(MAX_BYTES[f"decoding.{name}"] for name in ("json_schema", "regex", "lark_grammar"))
TOO_COSTLY = "exceeds the server's limits on the cost of a constraint: simplify it"
_COSTLY = re.compile(
    r"fuel|limit (for|exceeded)|too (big|large|complex)|too many (expressions|states|items)"
    r"|row has|Unable to determine|decimal literal",
    re.I,
)


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
    return json.dumps({"grammars": [{"lark_grammar": constraint.grammar}]})


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


def refusal_reason(error: str) -> str:
    """Returns an llguidance error in one line, with a remedy."""
    # The error contains what the caller wrote, where each pattern may begin many times: what they skip is bounded.
    if resource := re.search(r"Resource '([^'\n]*)' is not present", error):
        return f"{_short(resource[1])} is not fetched: copy it into $defs and refer to that"
    if keys := re.search(r"Unimplemented keys: \[(.{0,200}?)\]", error):
        return f"{_short(keys[1])} is not supported: remove it"
    if error.startswith("panic"):
        return "makes the library that enforces constraints fail: change it"
    if "oneOf constraints" in error:
        return '"oneOf" is not supported where several options may match: use anyOf'
    if "special token" in error:
        return "special tokens are not supported: remove them; the end-of-sequence token is added automatically"
    if "NoExtension" in error or "Regex is empty" in error:
        return "no output can satisfy it: change it"
    if impossible := re.search(r"^Unsatisfiable schema: (.*)", error):
        return f"no output can satisfy it: {_short(impossible[1])}: change it"
    if anchor := re.search(r"lookarounds not supported yet; (Start|End)", error):
        sign, place = {"Start": ("^", "beginning"), "End": ("$", "end")}[anchor[1]]
        return f'"{sign}" is only supported at the {place} of a pattern: remove it'
    if "lookarounds not supported yet" in error:
        return "word boundaries are not supported: write out the characters around them"
    if _COSTLY.search(error):
        return TOO_COSTLY
    # The reason follows a picture of the regular expression, or a position in the text derived from it.
    detail = re.search(r"^error: (.*)$", error, re.M) or re.search(r"\(in regex\): (.*?)(;|$)", error, re.M)
    reason = _short(detail[1] if detail else re.split(r": min=", error)[0])
    if marked := re.search(r"^    (.*)\n    ( *)(\^+)$", error, re.M):
        place = marked[1][len(marked[2]) :][: len(marked[3])]
        return f'{reason} ("{_short(place, 20)}"): change it'
    return f"{reason}: change it"


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
        # llguidance parses it first, because it rejects JSON that is nested too deeply for Python.
        _compile(schema, form)
        content = parse_json(schema)
        if "x-guidance" in content:
            raise UnsupportedSchemaError('"x-guidance" is not supported: remove it')
        if (rewritten := rewrite(content)) is False:
            raise UnsupportedSchemaError("no output can satisfy it: change it")
        return _compile(json.dumps(rewritten), form)
    except UnsupportedSchemaError as error:
        raise InvalidRequestError(FieldViolation(field, str(error))) from error
    except ValueError as error:
        if "recursion limit" in str(error):
            why = "nested too deeply: at most 127 levels"
        elif "object schema" in str(error):
            why = "a schema must be a JSON object"
        else:
            why = f"invalid JSON: {_short(str(error))}"
        raise InvalidRequestError(FieldViolation(field, why)) from error


def _compile(schema: str, form: JsonCompileOptions) -> str:
    return LLMatcher.grammar_from_json_schema(schema, overrides=form)


def _short(text: str, max_length: int = 160) -> str:
    line = text.strip().split("\n")[0]
    return line if len(line) <= max_length else line[: max_length - 1] + "…"

"""Turns llguidance's errors into the project's words, with a remedy."""

from __future__ import annotations

import re

TOO_COSTLY = "exceeds the server's limits on the cost of a constraint: simplify it"
IMPOSSIBLE = "no output can satisfy it: change it"
_BEFORE = r'(?:[^"]|"(?:\\.|[^"\\])*+")*?'
"""What an error has before its reason; what it quotes has none."""
_COSTLY = re.compile(
    rf"(?!unknown ){_BEFORE}(?:fuel|limit (?:for|exceeded)|stack level exceeded|row has|Unable to determine"
    r"|too (?:big|large|complex|many (?:expressions|states|items))|(?<!hexa)decimal literal)",
    re.I | re.S,
)
_MAX_SHOWN = 40
_PLACE = re.compile(r"(?:at )?(\d+)\((\d+)\): ")
_CONTEXT = re.compile(
    r'(?:failed to compile JSON schema: )?(?:invalid regex "(?:\\.|[^"\\])*+" \(in regex\): )?(?:regex parse error:\n)?'
)
_PICTURE = re.compile(r"^(?: |~|\d+: ).*\n?", re.M)
"""A line of the constraint that an error shows, or what marks a place in it."""
# What an error quotes from the constraint may be long and contain anything: patterns skip a bounded part of it.
_SCHEMAS = (
    (r"(\w+) \((\S{1,40}?)\) is greater than (\w+) \((\S{1,40}?)\)", "{0}, {1}, is greater than {2}, {3}"),
    (r"incompatible types", "two of its types or constants exclude each other"),
    (r"incompatible boolean", "it has to be true and false"),
    (r"required > maxProperties", "it requires more properties than maxProperties"),
    (r"minProperties > maxProperties", "minProperties is greater than maxProperties"),
    (r"required property '(.{1,200}?)' is", 'nothing can be the value of the required property "{0}"'),
    (r"required item is|prefixItems\[\d+\] is", "nothing can be an item that minItems requires"),
    (r"contains no integer", "no integer is in the range"),
    (r"does not contain a multiple|multipleOf is 0", "no multiple of multipleOf is in the range"),
)
"""Contradictions in schemas."""
_SYNTAX = (
    (r"Resource '([^'\n]*)' is not present", '"{0}" is not fetched: copy it into $defs and refer to that'),
    (
        r"circular references with sibling keys are not supported: json-schema:///(\S*)",
        '"{0}" leads into itself, and other keywords beside such a reference are not supported: remove them',
    ),
    (
        r"min/maxProperties only",
        'minProperties and maxProperties are only supported where all "properties" are required: require them',
    ),
    (r"Unimplemented keys: \[(.{0,200}?)\]", "{0} is not supported: remove it"),
    (r"^panic", "makes the library that enforces constraints fail: change it"),
    (r"oneOf constraints", '"oneOf" is not supported where several options may match: use anyOf'),
    (
        r"special token",
        "special tokens are not supported: remove them; the end-of-sequence token is added automatically",
    ),
    (r"NoExtension|Regex is empty", IMPOSSIBLE),
    (r"lookarounds not supported yet; Start", '"^" is only supported at the beginning of a pattern: remove it'),
    (r"lookarounds not supported yet; End", '"$" is only supported at the end of a pattern: remove it'),
    (r"lookarounds not", "word boundaries are not supported: write out the characters around them"),
)
"""Errors with their remedies."""
_PLACED = (
    # Of regular expressions.
    (r"range, the start must be <= the end", "the range ends before it begins"),
    (r"must be a literal", "a bound of the range is not a character"),
    (r"unclosed counted repetition|valid decimal", "the number of repetitions is not complete"),
    (r"repetition operator missing", "there is nothing to repeat"),
    (r"unclosed character class", "unclosed class of characters"),
    (r"unclosed capture group name", "unclosed name of a group"),
    (r"(unclosed|unopened) group", "{0} group"),
    (r"capture group", "the name of the group is empty, wrong or used twice"),
    (r"hexadecimal|invalid Unicode|unrecognized escape|escape sequence", "there is no such escape"),
    (r"[Uu]nicode (property|class|not allowed)|Unicode character class", "there is no such class of characters"),
    (r"backreferences", "backreferences are not supported"),
    (r"look-around", "look-around is not supported"),
    (r"l-flag|flag", "there is no such flag"),
    (r"invalid UTF-8", "it may match what is not Unicode"),
    # Of Lark grammars.
    (r"lexer error", "the syntax is not that of Lark"),
    (r"Expected token (\S{1,20}?),? found", "{0} is missing"),
    (r"Expected token a number", "a number is missing"),
    (r"Expected token", "a name is missing"),
    (r"Expected value|Unexpected expression", "there is no value"),
    (r"expecting rule", "a rule, a terminal or a statement is missing"),
    (r'unknown name: "(.{1,200}?)"|rule "(.{1,200}?)" not found', '"{0}" is not defined'),
    (r"unknown grammar (\S{1,200})", '"{0}" is not defined'),
    (r'(?:duplicate|redefinition of) (?:rule|token)?:? ?"(.{1,200}?)"', '"{0}" is defined twice'),
    (r'circular reference in token "(.{1,200}?)"', 'the terminal "{0}" contains itself'),
    (r"no start rule", 'no rule has the name "start"'),
    (r"Unknown common regex: (\S{1,200}?);", '"{0}" is not among the terminals that can be imported'),
    (r"template usage|params not|parametric|bit index", "rules with parameters are not supported here"),
    (r"(declare|override|extend) statement", '"%{0}" is not supported'),
    (r"priority not", "priorities are not supported"),
    (r"%regex|on %regex", '"%regex" needs substring_words, substring_chars or substring_chunks'),
    (r'"%llguidance"|%llguidance', 'what follows "%llguidance" is not valid JSON'),
    (r'"%json"|empty json', 'what follows "%json" is not valid JSON'),
    (r"Unmatched %lark", '"%lark" has no end'),
    (r"range end must be|range order", "the range ends before it begins"),
    (r"range start must be >=", "the range begins below 0"),
    (r"single character", "the bounds of the range are not single characters"),
    (r"error parsing string", "the string has an escape that does not exist"),
    (r"only supported for tokens", "only possible in terminals, whose names are in upper case"),
    (r"cannot be used in terminals", "not possible in a terminal, whose name is in upper case"),
    (r"too deeply nested|nested parentheses", "nested too deeply"),
    # Of schemas.
    (r"must be an object or boolean", "a schema inside of it is not an object, true or false"),
    (r"multiple ?of", "multipleOf is not greater than 0"),
)
"""What is wrong at a place."""


def refusal_reason(error: str) -> str:
    """Returns an llguidance error in one line."""
    line = _PLACE.match(error)
    found = error[line.end() :] if line else error
    what = _PICTURE.sub("", _CONTEXT.sub("", found, count=1)).removeprefix("error: ")
    if what.startswith("Unsatisfiable schema: "):
        why = _translated(_SCHEMAS, what.removeprefix("Unsatisfiable schema: "))
        return f"no output can satisfy it: {why}: change it" if why else IMPOSSIBLE
    if reason := _translated(_SYNTAX, what):
        return reason
    if _COSTLY.match(what):
        return TOO_COSTLY
    reason = _translated(_PLACED, what) or "the syntax is not supported"
    if marked := re.search(r"^    (.*)\n    ( *)(\^+)$", error, re.M):
        if place := marked[1][len(marked[2]) :][: len(marked[3])]:
            reason += f' ("{shortened(place, 20)}")'
    elif line:
        reason += f" at line {line[1]}, column {line[2]}"
    return f"{reason}: change it"


def shortened(text: str, max_length: int) -> str:
    return text if len(text) <= max_length else text[: max_length - 1] + "…"


def _translated(table: tuple[tuple[str, str], ...], what: str) -> str | None:
    """Returns the text of the first pattern that is found outside of quotes, with what its groups quote."""
    for pattern, text in table:
        if found := re.match(f"{_BEFORE}(?:{pattern})", what):
            return text.format(*(shortened(group, _MAX_SHOWN) for group in found.groups() if group is not None))
    return None

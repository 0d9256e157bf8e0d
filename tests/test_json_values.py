"""JSON of callers is read unchanged, or refused in their words."""

from __future__ import annotations

import pytest

from mpt_grpc.json_values import is_deeper_than, parse_json


@pytest.mark.parametrize(
    ("text", "value"),
    [('{"a": [1, -2.5e3, "é", null, true]}', {"a": [1, -2500.0, "é", None, True]}), ("9" * 640, int("9" * 640))],
)
def test_values_are_read_exactly(text: str, value: object) -> None:
    assert parse_json(text) == value


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("1" * 641, "an integer has more than 640 digits"),
        ("[1e400]", "1e400 is beyond the range of a double"),
        ("1" * 500 + ".0", "1" * 100 + "… is beyond the range of a double"),
        ("-Infinity", "-Infinity is not a number in JSON"),
        ("{", "a name in double quotes is missing at line 1, column 2"),
        ("", "a value is missing at line 1, column 1"),
        ('{"a" 1}', "a colon is missing at line 1, column 6"),
        ("[1\n2]", "a comma or a closing bracket is missing at line 2, column 1"),
        ("{} {}", "the value ends, but the text goes on at line 1, column 4"),
        ('["a', "the string has no end at line 1, column 2"),
        ('"\t"', "a control character is not escaped at line 1, column 2"),
        (r'"\x"', "there is no such escape at line 1, column 2"),
        ("\ufeff{}", "it begins with a byte order mark"),
    ],
)
def test_what_is_not_json_is_refused_with_the_reason(text: str, why: str) -> None:
    with pytest.raises(ValueError) as raised:  # noqa: PT011  (the whole text is compared)
        parse_json(text)
    assert str(raised.value) == why


@pytest.mark.parametrize(
    ("value", "num_levels"),
    [(1, 0), ("[", 0), ([], 1), ({"a": 1}, 1), ([1, [2], {"a": 3}], 2), ({"a": {"b": []}, "c": 0}, 3)],
)
def test_levels_of_arrays_and_objects_are_counted(value: object, num_levels: int) -> None:
    assert not is_deeper_than(value, num_levels)
    assert num_levels == 0 or is_deeper_than(value, num_levels - 1)

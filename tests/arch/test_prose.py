"""The check of the project's prose reports phrases that the project does not use, and passes ordinary English."""

from __future__ import annotations

from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType

import pytest

TOOL = Path(__file__).parents[2] / "tools/check_prose.py"


@pytest.fixture(scope="module")
def prose() -> ModuleType:
    loader = SourceFileLoader("check_prose", str(TOOL))
    module = ModuleType(loader.name)
    module.__file__ = loader.path
    loader.exec_module(module)
    return module


def test_every_listed_example_is_reported(prose: ModuleType) -> None:
    examples = prose.PROSE["examples"]["reported"]
    assert [text for text in examples if not prose.check("a.md", text)] == []


def test_ordinary_english_passes(prose: ModuleType) -> None:
    assert [prose.check("a.md", text) for text in prose.PROSE["examples"]["passed"]] == [
        [] for _ in prose.PROSE["examples"]["passed"]
    ]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.py", "x = 1\n# fields that are passed\n# over\n"),
        ("a.py", "x = 1\nerror('unknown fields are passed '\n      'over')\n"),
        ("a.py", 'def f():\n    """Unknown fields are passed\n    over."""\n'),
        ("a.proto", "message A {\n  // Unknown fields are passed\n  // over.\n}\n"),
        ("a.md", "# A\nUnknown fields are passed\nover.\n"),
        ("a.js", "let x = 1;\n// Unknown fields are passed\n// over.\n"),
    ],
)
def test_a_phrase_is_found_across_lines_with_the_number_of_its_first(prose: ModuleType, name: str, text: str) -> None:
    assert prose.check(name, text) == [(2, "passed over -> ignored, skipped")]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.py", "passed = over\n"),
        ("a.py", "f('passed', 'over')\n"),
        ("a.proto", "message passed {} // over\n"),
        ("a.md", "`passed over`\n\n```sh\necho passed over\n```\n"),
    ],
)
def test_code_is_not_prose(prose: ModuleType, name: str, text: str) -> None:
    assert prose.check(name, text) == []

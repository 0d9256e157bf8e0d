"""Checks the project's prose: documents, comments, docstrings and other texts in the code.

Prints `FILE:LINE: ...` for each problem and exits with status 1 if there are any. tools/prose.toml lists the phrases
that this project does not use, each with a replacement; proselint contributes its own checks of English usage.
"""

from __future__ import annotations

import io
import re
import subprocess
import sys
import tokenize
import tomllib
from pathlib import Path

from proselint.checks import __register__ as usage_checks
from proselint.config import DEFAULT, Config
from proselint.registry import CheckRegistry
from proselint.registry.checks import Check, CheckFlags, Padding
from proselint.registry.checks.engine import Fancy
from proselint.registry.checks.types import PreferredForms
from proselint.tools import LintFile

ROOT = Path(__file__).resolve().parents[1]
PROSE = tomllib.loads(ROOT.joinpath("tools/prose.toml").read_text(encoding="utf-8"))
# Generated code, the list of phrases itself, its tests, and sample texts.
EXCLUDED = re.compile(
    r"clients/python/mpt_grpc_client/proto/v|tools/prose\.toml$|tests/arch/test_prose\.py$|.*\.(jsonl|json)$"
)
CHECKED = ("*.py", "*.md", "*.proto", "*.toml", "*.html", "*.js", "*.css", "*.jinja", "Makefile", ".ci/run")


def main() -> int:
    listed = ("git", "ls-files", "--cached", "--others", "--exclude-standard", *CHECKED)
    names = subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()
    problems = [
        f"{name}:{line}: {message}"
        for name in sorted(names)
        if not EXCLUDED.match(name)
        for line, message in check(name, ROOT.joinpath(name).read_text(encoding="utf-8"))
    ]
    print("\n".join(problems) or f"checked the prose of {len(names)} files")
    return 1 if problems else 0


def check(name: str, text: str) -> list[tuple[int, str]]:
    """Returns the line and a message for each problem in a file of this name."""
    prose = _prose(name, text)
    if not prose.strip():
        return []
    return [
        (result.pos[0], " ".join(result.check_result.message.split()))
        for result in LintFile(name, prose).lint(_configure(name))
    ]


def _configure(name: str) -> Config:
    registry = CheckRegistry()
    if not registry.checks:
        registry.register_many(usage_checks)
        phrases = {_pattern(phrase): better for phrase, better in PROSE["phrases"].items()}
        registry.register(
            Check(
                path="phrases",
                check_type=PreferredForms(phrases, padding=Padding.RAW),
                engine=Fancy(),
                message="{1} -> {0}",
                flags=CheckFlags(allow_quotes=True),
            )
        )
    usage = PROSE["checks"] if Path(name).suffix in (".md", ".proto", ".py") else {}
    return Config(max_errors=DEFAULT["max_errors"], checks={"phrases": True, **usage})


def _pattern(phrase: str) -> str:
    """Lets the words of a phrase stand on several lines; \\b would not match beside punctuation."""
    words = phrase.replace(" ", r"\s+")
    return rf"(?<!\w)(?:{words})(?!\w)"


def _prose(name: str, text: str) -> str:
    """Returns the text without what is not prose, and with the same lines.

    A null character stands for each character of code, so that the texts on both sides do not read as one sentence.
    """
    match Path(name).suffix:
        case ".py":
            return _python_prose(text)
        case ".md":
            return re.sub(r"^ *```.*?^ *```|`[^`]*`", _as_code, text, flags=re.MULTILINE | re.DOTALL)
        case ".proto":
            code_and_mark = re.compile(r"^([^/\n]*)(//)?", flags=re.MULTILINE)
            return code_and_mark.sub(lambda match: _as_code(match[1]) + _as_space(match[2] or ""), text)
        case _:
            return re.sub(r"^\s*(#|//)", _as_space, text, flags=re.MULTILINE)


def _python_prose(text: str) -> str:
    lines = [_as_code(line) for line in text.splitlines(keepends=True)]
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in (tokenize.COMMENT, tokenize.STRING):
            prose = re.sub(r"^#|^\w*[\"']+|[\"']+$", _as_space, token.string)
            column = token.start[1]
            for row, part in enumerate(prose.splitlines(), start=token.start[0] - 1):
                line = lines[row]
                lines[row] = line[:column] + part + line[column + len(part) :]
                column = 0
    return "".join(lines)


def _as_code(text: str | re.Match[str]) -> str:
    return re.sub(r"\S", "\0", text if isinstance(text, str) else text[0])


def _as_space(text: str | re.Match[str]) -> str:
    return re.sub(r"\S", " ", text if isinstance(text, str) else text[0])


if __name__ == "__main__":
    sys.exit(main())

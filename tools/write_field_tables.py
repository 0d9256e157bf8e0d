"""Writes the tables of docs/checkpoints.md from the table of the fields of config.json.

Usage: python tools/write_field_tables.py
"""

from __future__ import annotations

from pathlib import Path

from mpt_grpc.model.config_fields import IGNORED, LIMITED, READ

PAGE = Path(__file__).resolve().parents[1] / "docs" / "checkpoints.md"
START = "<!-- The following tables are written by tools/write_field_tables.py. -->\n"


def tables() -> str:
    """Returns the tables as Markdown."""
    implemented = "".join(f"| `{name}` | {meaning} |\n" for name, meaning in READ.items())
    limited = "".join(f"| `{field.name}` | {field.supported} | {field.needs} |\n" for field in LIMITED)
    return (
        f"\n### Implemented\n\n| Field | Meaning |\n|---|---|\n{implemented}"
        "\n### Implemented for some values\n\n| Field | Supported values | Others would need |\n|---|---|---|\n"
        f"{limited}"
        f"\n### Ignored\n\nThese do not affect the output: {', '.join(f'`{name}`' for name in sorted(IGNORED))}.\n"
    )


def page() -> str:
    """Returns the whole page with fresh tables."""
    return PAGE.read_text(encoding="utf-8").partition(START)[0] + START + tables()


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")

"""The documentation of the fields of config.json is up to date."""

import importlib.util
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_page_has_the_table_of_fields() -> None:
    spec = importlib.util.spec_from_file_location("write_field_tables", ROOT / "tools/write_field_tables.py")
    assert spec is not None
    assert spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    assert tool.page() == (ROOT / "docs/checkpoints.md").read_text(encoding="utf-8"), "run tools/write_field_tables.py"

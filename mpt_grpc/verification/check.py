"""The result of a check."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Check:
    """The result of one check."""

    name: str
    verdict: Literal["same", "ok", "skipped", "DIFFERS", "FAILED"]
    """'same' and 'DIFFERS' compare with a reference."""
    detail: str

    @property
    def passed(self) -> bool:
        """Whether the check found no fault."""
        return self.verdict not in ("DIFFERS", "FAILED")

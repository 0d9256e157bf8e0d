"""The progress bars of commands, on standard error if it is a terminal."""

from __future__ import annotations

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress


def make_progress() -> Progress:
    """Returns bars that count what has been completed."""
    console = Console(stderr=True)
    columns = (*Progress.get_default_columns(), MofNCompleteColumn())
    return Progress(*columns, console=console, disable=not console.is_terminal)

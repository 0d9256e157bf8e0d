"""The log of `serve` and `gateway`, written to standard error."""

from __future__ import annotations

import argparse
import logging
from typing import cast

LEVELS = ("debug", "info", "warning", "error")
_POLLED_PATHS = ("/debug/engine", "/health", "/ready")


def add_log_level(parser: argparse._ActionsContainer) -> None:
    """Adds the flag for the log level."""
    parser.add_argument(
        "--log-level",
        choices=LEVELS,
        default="info",
        help="info logs a line for each call; debug also logs calls that clients make periodically",
    )


def configure(level: str) -> None:
    """Sets up the log of this process."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("mpt_grpc").setLevel(level.upper())
    access = logging.getLogger("uvicorn.access")
    access.setLevel(level.upper())
    if level != "debug":
        access.addFilter(_is_not_polling)
    # A caller who disconnects during a send is not an error; failures of a method are logged by our interceptor.
    logging.getLogger("grpc._cython.cygrpc").setLevel(logging.CRITICAL)


def _is_not_polling(record: logging.LogRecord) -> bool:
    """Whether a line of uvicorn's access log is about something other than a successful periodic call."""
    _, _, path, _, status = cast(tuple[str, str, str, str, int], record.args)
    return path.partition("?")[0] not in _POLLED_PATHS or status >= 400

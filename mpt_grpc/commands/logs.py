"""The log of `serve` and `gateway`, written to standard error."""

from __future__ import annotations

import argparse
import json
import logging
import sys
import threading
from datetime import UTC, datetime
from typing import Any

_LEVELS = ("debug", "info", "warning", "error")
FORMATS = ("text", "json")
_TEXT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def add_log(parser: argparse._ActionsContainer) -> None:
    """Adds the flags for the log."""
    parser.add_argument(
        "--log-level",
        choices=_LEVELS,
        default="info",
        help="info logs a line for each call; debug also logs calls that clients make periodically",
    )
    parser.add_argument(
        "--log-format", choices=FORMATS, default="text", help="json logs one JSON object per line, with named fields"
    )


def configure(level: str, line_format: str = "text") -> None:
    """Sets up the log of this process, which also gets warnings and exceptions that nothing has caught."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonFormatter() if line_format == "json" else logging.Formatter(_TEXT))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("mpt_grpc").setLevel(level.upper())
    # While a collector is down, one line for each failed export is enough, without its retries.
    logging.getLogger("opentelemetry.exporter").setLevel(logging.ERROR)
    # Its warnings would quote the headers of callers in full.
    logging.getLogger("opentelemetry.trace").setLevel(logging.ERROR)
    # A caller who disconnects during a send is not an error; failures of a method are logged by our interceptor.
    logging.getLogger("grpc._cython.cygrpc").setLevel(logging.CRITICAL)
    logging.captureWarnings(True)
    sys.excepthook = lambda _, error, __: _log_uncaught(error)
    threading.excepthook = lambda ended: _log_uncaught(ended.exc_value)


def _log_uncaught(error: BaseException | None) -> None:
    logging.getLogger("mpt_grpc").critical("an exception was not caught", exc_info=error)


class _JsonFormatter(logging.Formatter):
    """Formats a record as one line of JSON, with the fields that it was logged with."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": getattr(record, "summary", None) or record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        # In ASCII, whatever the encoding of the terminal, and without the line breaks of Unicode.
        return json.dumps(line, default=str)

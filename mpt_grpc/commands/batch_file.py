"""The files of a batch, in the format of OpenAI's Batch API: a request on each line, and a result on each line."""

from __future__ import annotations

import fcntl
import json
import shutil
import sys
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, BinaryIO

from mpt_grpc.errors import BatchError
from mpt_grpc.gateway.parsing import MAX_DEPTH
from mpt_grpc.json_values import is_deeper_than, parse_json

STANDARD_STREAM = "-"
_URLS = ("/v1/chat/completions", "/v1/completions", "/v1/responses")
_ID_PREFIX = "batch_req_"
_BEGINNING = f'{{"id": "{_ID_PREFIX}'.encode()


@dataclass(frozen=True)
class BatchRequest:
    """A request to send."""

    id: str
    custom_id: str
    url: str
    body: dict[str, Any]


@dataclass(frozen=True)
class InvalidLine:
    """A line of the input that is not a request, with the reason."""

    id: str
    custom_id: str | None
    code: str
    message: str


@contextmanager
def open_input(path: str) -> Iterator[BinaryIO]:
    """Opens a file, or a copy of standard input, which can be read several times. Raises BatchError."""
    if path == STANDARD_STREAM:
        with TemporaryFile() as copy:
            shutil.copyfileobj(sys.stdin.buffer, copy)
            yield copy
        return
    try:
        file = Path(path).open("rb")  # noqa: SIM115 - an error inside the block would be another one
    except OSError as error:
        raise BatchError(f"{path}: {error.strerror}") from error
    with file:
        yield file


def count_lines(file: BinaryIO) -> int:
    """Returns the number of lines that are not blank."""
    file.seek(0)
    return sum(1 for line in file if line.strip())


def read_requests(file: BinaryIO) -> Generator[BatchRequest | InvalidLine]:
    """Yields the request on each line that is not blank, or the reason why it is not one."""
    file.seek(0)
    custom_ids: set[str] = set()
    for number, line in enumerate(file, 1):
        if line.strip():
            request = _parsed(f"{_ID_PREFIX}{number}", line, custom_ids)
            if request.custom_id is not None:
                custom_ids.add(request.custom_id)
            yield request


def _parsed(id_: str, line: bytes, earlier_custom_ids: set[str]) -> BatchRequest | InvalidLine:
    try:
        fields = parse_json(line.decode())
    except UnicodeDecodeError:
        return InvalidLine(id_, None, "invalid_json_line", "the line is not valid UTF-8")
    except (ValueError, RecursionError) as error:
        why = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        return InvalidLine(id_, None, "invalid_json_line", f"the line is not valid JSON: {why}")
    if not isinstance(fields, dict):
        return InvalidLine(id_, None, "invalid_json_line", "the line is not a JSON object")
    custom_id, url, body = fields.get("custom_id"), fields.get("url"), fields.get("body")
    if not isinstance(custom_id, str) or not custom_id:
        return InvalidLine(id_, None, "invalid_custom_id", "custom_id: must be text that identifies the request")
    if custom_id in earlier_custom_ids:
        why = "custom_id: an earlier line has the same; each must be unique"
        return InvalidLine(id_, custom_id, "duplicate_custom_id", why)
    if fields.get("method") != "POST":
        return InvalidLine(id_, custom_id, "invalid_method", "method: must be POST")
    if url not in _URLS:
        return InvalidLine(id_, custom_id, "invalid_url", f"url: must be one of {', '.join(_URLS)}")
    if not isinstance(body, dict):
        return InvalidLine(id_, custom_id, "invalid_body", "body: must be an object, the body of the request")
    if is_deeper_than(body, MAX_DEPTH):
        return InvalidLine(
            id_, custom_id, "invalid_body", f"body: nested more than {MAX_DEPTH} levels deep; simplify it"
        )
    if body.get("stream"):
        return InvalidLine(id_, custom_id, "invalid_body", "body.stream: not supported in a batch; omit it")
    return BatchRequest(id_, custom_id, url, body)


class BatchOutput:
    """The results. Each is complete with its newline, so a run that is killed leaves at most one incomplete line."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._statuses: dict[str, int] = {}
        self._invalid_ids: set[str] = set()

    def is_success(self, line: BatchRequest | InvalidLine) -> bool | None:
        """Returns whether an earlier result of a line is a success, or None if it has no result."""
        if isinstance(line, InvalidLine):
            return False if line.id in self._invalid_ids else None
        status = self._statuses.get(line.custom_id)
        return None if status is None else status == 200

    def write_response(self, request: BatchRequest, status: int, request_id: str, body: Any) -> None:
        """Adds what the server responded to a request, which may be an error."""
        response = {"status_code": status, "request_id": request_id, "body": body}
        self._write({"id": request.id, "custom_id": request.custom_id, "response": response, "error": None})

    def write_error(self, line: InvalidLine) -> None:
        """Adds why a line was not sent."""
        error = {"code": line.code, "message": line.message}
        self._write({"id": line.id, "custom_id": line.custom_id, "response": None, "error": error})

    def _write(self, result: dict[str, Any]) -> None:
        try:
            self._file.write(json.dumps(result).encode() + b"\n")
            self._file.flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            raise BatchError(f"--output: {error.strerror}") from error

    def read_earlier(self, path: str) -> None:
        """Reads the results of earlier runs and drops an incomplete one. Raises BatchError if it is another file."""
        self._file.seek(0)
        end = 0
        for number, line in enumerate(self._file, 1):
            if not line.endswith(b"\n") and line.startswith(_BEGINNING[: len(line)]):
                self._file.truncate(end)
                return
            end += len(line)
            try:
                result = json.loads(line)
                if result["error"] is None:
                    self._statuses[result["custom_id"]] = result["response"]["status_code"]
                else:
                    self._invalid_ids.add(result["id"])
            except (ValueError, LookupError, TypeError) as error:
                why = f"line {number} of {path} is not a result of a batch; choose another file"
                raise BatchError(f"--output: {why}") from error


@contextmanager
def open_output(path: str) -> Iterator[BatchOutput]:
    """Opens a file for this process alone, with the results of earlier runs, or standard output. Raises BatchError."""
    if path == STANDARD_STREAM:
        yield BatchOutput(sys.stdout.buffer)
        return
    is_special = Path(path).exists() and not Path(path).is_file()
    try:
        file = Path(path).open("wb" if is_special else "ab+")  # noqa: SIM115 - an error inside the block would be another one
    except OSError as error:
        raise BatchError(f"--output: {path}: {error.strerror}") from error
    try:
        output = BatchOutput(file)
        if not is_special:  # a device or a pipe has no earlier results, and others may write to it
            _lock(file, path)
            output.read_earlier(path)
        yield output
    finally:
        with suppress(OSError):  # writes once more what could not be written, which has been reported
            file.close()


def _lock(file: BinaryIO, path: str) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise BatchError(f"--output: another run is writing to {path}") from error

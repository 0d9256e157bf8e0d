"""Has grammars built by `constraint_probe.py`, in other processes, before they are built in this one."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mpt_grpc.errors import FieldViolation, InternalError, InvalidRequestError, OverloadedError
from mpt_grpc.text.refusals import TOO_COSTLY, refusal_reason

_PROBE = Path(__file__).with_name("constraint_probe.py")
_PROBE_WALL_S = 4.5
# Nearly all constraints pass the first attempt; the others must not take time from the model's threads.
_ATTEMPTS = ({"cpu_s": 0.05, "niceness": 0}, {"cpu_s": 1.0, "niceness": 19})


class SlowConstraintError(Exception):
    """A constraint that takes longer to build than nearly all do, or that cannot be built."""


class Probe:
    """Builds grammars in other processes first, because that may crash, and refuses those that do.

    May be used by several threads. The processes end with the server.
    """

    def __init__(self, parser_limits: dict[str, Any]) -> None:
        self._parser_limits = parser_limits
        self._running: tuple[socket.socket, Callable[[], object]] | None = None
        """The socket that controls the process, and what stops it."""
        self._lock = threading.Lock()

    def check(self, grammar: str, field: str, *, may_be_slow: bool) -> None:
        """Raises InvalidRequestError if the grammar is refused, OverloadedError if the machine is too busy.

        One that needs more than the first attempt, although it may not be slow, raises SlowConstraintError.
        """
        for limits in _ATTEMPTS if may_be_slow else _ATTEMPTS[:1]:
            try:
                answer = self._ask({"grammar": grammar, "limits": self._parser_limits, **limits})
            except TimeoutError as error:  # it did not get its share of CPU time
                raise OverloadedError("the server is too busy to check a new constraint", retry_after_s=1.0) from error
            if answer == "ok":
                return
            if answer:
                raise InvalidRequestError(FieldViolation(field, refusal_reason(answer.removeprefix("refused: "))))
        if not may_be_slow:
            raise SlowConstraintError
        # It overflowed its stack, or exceeded its CPU time or memory.
        raise InvalidRequestError(FieldViolation(field, TOO_COSTLY))

    def _ask(self, task: dict[str, Any]) -> str:
        connection, end = socket.socketpair()
        with connection, end:
            self._hand_over(end)
            end.close()
            connection.settimeout(_PROBE_WALL_S)
            with connection.makefile("rw", encoding="utf-8") as stream:
                try:
                    stream.write(f"{json.dumps(task)}\n")
                    stream.flush()
                    return stream.read()
                except ConnectionError:  # the process was stopped before it had read everything
                    return ""

    def _hand_over(self, end: socket.socket) -> None:
        with self._lock:
            for _ in range(2):
                if self._running is None:
                    control, process = _start_probe()
                    self._running = control, weakref.finalize(self, _stop_probe, control, process)
                control, stop = self._running
                try:
                    socket.send_fds(control, [b"\0"], [end.fileno()])
                    return
                except OSError:  # it has ended; the kernel may choose it when memory is short
                    stop()
                    self._running = None
        raise InternalError("the process that checks constraints ends as soon as it is started")


def _start_probe() -> tuple[socket.socket, subprocess.Popen[bytes]]:
    """Returns a new process and the socket that controls it; it ends when the socket is closed."""
    control, end = socket.socketpair()
    with end:
        # In its own session, so that Ctrl-C in the server's terminal does not reach it.
        process = subprocess.Popen(
            [sys.executable, "-P", str(_PROBE), str(end.fileno())],
            pass_fds=[end.fileno()],
            start_new_session=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
    return control, process


def _stop_probe(control: socket.socket, process: subprocess.Popen[bytes]) -> None:
    control.close()
    process.wait()

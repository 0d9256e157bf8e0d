"""Commands in a pseudo-terminal."""

from __future__ import annotations

import os
import pty
import re
import signal
import subprocess
import sys
from typing import Any

CLI = (sys.executable, "-m", "mpt_grpc.cli")


class Terminal:
    """A command in a pseudo-terminal."""

    def __init__(self, server: Any, *arguments: str, **variables: str) -> None:
        self._terminal, other = pty.openpty()
        environment = {**os.environ, "MPT_GRPC_TARGET": server.target, "TERM": "dumb", **variables}
        self.process = subprocess.Popen(
            [*CLI, *arguments],
            stdin=other,
            stdout=other,
            stderr=other,
            env=environment,
            start_new_session=True,
            # The tests may run where it is ignored, as in the background of a script.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        os.close(other)
        self.output = ""

    def type(self, text: str) -> None:
        self.output = ""
        os.write(self._terminal, text.encode())

    def wait_for(self, pattern: str) -> None:
        """Blocks until the output since the last input matches. Fails if the command ends before."""
        while not re.search(pattern, self.output, re.DOTALL):
            try:
                self.output += os.read(self._terminal, 4096).decode(errors="replace")
            except OSError as error:  # how Linux reports that no process has the terminal open any more
                why = f"the command ended with status {self.process.wait()} before {pattern!r}: {self.output!r}"
                raise AssertionError(why) from error

    def interrupt(self) -> None:
        self.output = ""
        self.process.send_signal(signal.SIGINT)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._terminal)

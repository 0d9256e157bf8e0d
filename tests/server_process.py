"""Runs `mpt-grpc serve` and `mpt-grpc gateway` as processes, as users do."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

CLI = (sys.executable, "-m", "mpt_grpc.cli")
SERVE = ("serve", "--http-port", "0", "--dtype", "float32", "--kv-cache", "256MiB")


class ServerProcess:
    """A running `mpt-grpc serve` or `mpt-grpc gateway` that has printed its welcome."""

    def __init__(self, *arguments: str, cli: Sequence[str] = CLI, **variables: str) -> None:
        """variables: environment variables, in addition to those of this process other than OpenTelemetry's."""
        environment = {key: value for key, value in os.environ.items() if not key.startswith("OTEL_")} | variables
        self._process = subprocess.Popen(
            (*cli, *arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
        self.stderr = ""
        self._reader = threading.Thread(target=self._read_stderr)
        self._reader.start()
        self.welcome: list[str] = []
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.welcome.append(line.rstrip())
            if line.strip().startswith("try"):
                return
        raise AssertionError(f"the server did not start: {self.wait()} {self.stderr}")

    @property
    def target(self) -> str:
        (address,) = (line.split()[1] for line in self.welcome if line.split()[0] == "gRPC")
        return address

    @property
    def openai_url(self) -> str:
        (url,) = (line.split()[1] for line in self.welcome if line.split()[0] == "OpenAI")
        return url

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def processor_s(self) -> float:
        """The processor time that the process has taken, by Linux's clock for it."""
        return time.clock_gettime(~self.pid << 3 | 2)

    def terminate(self) -> None:
        self._process.send_signal(signal.SIGTERM)

    def pause(self) -> None:
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def wait(self) -> int:
        """Waits for the process and returns its exit status; `stderr` is complete from then on."""
        status = self._process.wait(60)
        self._reader.join()
        return status

    def kill(self) -> None:
        self._process.kill()
        self.wait()

    def _read_stderr(self) -> None:
        assert self._process.stderr is not None
        self.stderr = self._process.stderr.read()


@contextmanager
def running(*flags: str, cli: Sequence[str] = CLI) -> Iterator[ServerProcess]:
    """Runs a server with additional flags, from this environment or with the command `cli`."""
    port = () if "--grpc-socket" in flags else ("--grpc-port", "0")
    with _killed_at_exit(ServerProcess(*SERVE, *port, *flags, cli=cli)) as server:
        yield server


@contextmanager
def running_gateway(*flags: str, **variables: str) -> Iterator[ServerProcess]:
    """Runs a gateway on a free port, with additional flags and environment variables."""
    with _killed_at_exit(ServerProcess("gateway", "--http-port", "0", *flags, **variables)) as gateway:
        yield gateway


@contextmanager
def _killed_at_exit(process: ServerProcess) -> Iterator[ServerProcess]:
    try:
        yield process
    finally:
        process.kill()

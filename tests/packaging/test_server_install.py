"""The server runs where it is installed from its wheel or from its folder, with and without PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from server_process import ServerProcess, running

from mpt_grpc_client.version import __version__

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]  # the kernels are compiled


def assert_generates(environment: Any, target: str) -> None:
    arguments = ("generate", "Once upon a time", "--max-new-tokens", "4", "--temperature", "0", "--target", target)
    generated = environment.run("mpt-grpc", *arguments)
    assert (generated.returncode, generated.stderr) == (0, "")
    assert generated.stdout.strip()


def assert_serves_and_generates(environment: Any) -> None:
    with running(cli=environment.command("mpt-grpc")) as server:
        assert_generates(environment, server.target)


def assert_reports_one_version(environment: Any) -> None:
    assert environment.run("mpt-grpc", "--version").stdout == f"mpt-grpc {__version__}\n"
    assert environment.run("python", "-m", "mpt_grpc", "--version").stdout == f"mpt-grpc {__version__}\n"
    versions = "import mpt_grpc, mpt_grpc_client as client; print(mpt_grpc.__version__, client.__version__)"
    assert environment.run("python", "-c", versions).stdout == f"{__version__} {__version__}\n"


def test_without_torch_serve_names_the_extra_and_generate_works(
    environment: Any, server_wheel: Path, server: ServerProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    for compiler in ("CC", "CXX"):
        monkeypatch.setenv(compiler, "/bin/false")  # a wheel needs none
    environment.install(str(server_wheel))
    assert_reports_one_version(environment)
    assert_generates(environment, server.target)
    served = environment.run("mpt-grpc", "serve", "--grpc-port", "0", "--http-port", "0")
    assert (served.returncode, served.stdout) == (1, "")
    (line,) = served.stderr.splitlines()
    assert "the extra 'torch'" in line


def test_with_torch_the_wheel_and_the_folder_serve(
    environment: Any, server_wheel: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for compiler in ("CC", "CXX"):
        monkeypatch.setenv(
            compiler, "/bin/false"
        )  # the kernels of the wheel have been compiled, and the folder needs none
    environment.install(f"{server_wheel}[torch]")
    assert_reports_one_version(environment)
    assert_serves_and_generates(environment)

    environment.pip("uninstall", "--yes", "mpt-grpc")
    environment.install(f"{source}[torch]")
    assert_serves_and_generates(environment)

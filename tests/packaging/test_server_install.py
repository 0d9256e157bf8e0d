"""The server runs where it is installed from its wheel or from its folder, with and without PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from server_process import ServerProcess, running

from mpt_grpc_client.version import __version__

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("packaging")]

PROMPT = ("generate", "Once upon a time", "--max-new-tokens", "4", "--temperature", "0", "--target")


@pytest.fixture(scope="module")
def without_torch(make_environment: Callable[[], Any], server_wheel: Path) -> Any:
    environment = make_environment()
    environment.install(str(server_wheel))
    return environment


@pytest.fixture(scope="module")
def with_torch(make_environment: Callable[[], Any], server_wheel: Path) -> Any:
    environment = make_environment()
    environment.install(f"{server_wheel}[torch]")
    return environment


def assert_serves_and_generates(environment: Any) -> None:
    with running(cli=environment.command("mpt-grpc")) as server:
        generated = environment.run("mpt-grpc", *PROMPT, server.target)
    assert (generated.returncode, generated.stderr) == (0, "")
    assert generated.stdout.strip()


def test_without_torch_serve_fails_with_one_line_that_names_the_extra(without_torch: Any) -> None:
    served = without_torch.run("mpt-grpc", "serve", "--grpc-port", "0", "--http-port", "0")
    assert (served.returncode, served.stdout) == (1, "")
    (line,) = served.stderr.splitlines()
    assert "the extra 'torch'" in line


def test_without_torch_generate_calls_a_running_server(without_torch: Any, server: ServerProcess) -> None:
    generated = without_torch.run("mpt-grpc", *PROMPT, server.target)
    assert (generated.returncode, generated.stderr) == (0, "")
    assert generated.stdout.strip()


def test_the_command_and_the_packages_report_one_version(without_torch: Any) -> None:
    expected = f"mpt-grpc {__version__}\n"
    assert without_torch.run("mpt-grpc", "--version").stdout == expected
    assert without_torch.run("python", "-m", "mpt_grpc", "--version").stdout == expected
    versions = "import mpt_grpc, mpt_grpc_client as client; print(mpt_grpc.__version__, client.__version__)"
    assert without_torch.run("python", "-c", versions).stdout == f"{__version__} {__version__}\n"


def test_the_wheel_serves_and_generates(with_torch: Any) -> None:
    assert_serves_and_generates(with_torch)


def test_the_folder_installs_from_elsewhere_and_serves_and_generates(with_torch: Any, source: Path) -> None:
    with_torch.pip("uninstall", "--yes", "mpt-grpc")
    with_torch.install(f"{source}[torch]")
    assert_serves_and_generates(with_torch)

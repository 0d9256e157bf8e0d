"""The commands, curl and grpcurl with a server that has a certificate and requires access tokens."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from certificates import Authority
from server_process import running

from mpt_grpc.cli import main

CLI = (sys.executable, "-m", "mpt_grpc.cli")
FLAGS = ("--max-new-tokens", "12", "--temperature", "0")
BODY = '{"prompt": "The fox", "max_tokens": 12, "temperature": 0}'


def run(*command: str, token: str = "") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "MPT_GRPC_TOKEN": token}
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=environment)


class Protected:
    """A server with its certificate's authority in a file, and a token."""

    def __init__(self, folder: Path) -> None:
        authority = Authority.new()
        self.tls = authority.write_server(folder)
        self.root = str(folder / "root.pem")
        Path(self.root).write_bytes(authority.pem)
        made = run(*CLI, "token", "new", "alice", "--role", "generate", "--days", "1")
        self.token = made.stderr.split()[-1]
        self.tokens_file = folder / "tokens.toml"
        self.tokens_file.write_text(made.stdout, encoding="utf-8")
        assert self.token not in made.stdout
        self.process: Any = None


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Protected]:
    protected = Protected(tmp_path_factory.mktemp("access"))
    tls = ("--tls-cert", str(protected.tls.certificate), "--tls-key", str(protected.tls.key))
    with running(*tls, "--tokens-file", str(protected.tokens_file)) as protected.process:
        yield protected


def test_a_command_needs_the_token_and_the_authority(server: Protected) -> None:
    assert server.process.openai_url.startswith("https://")
    generate = (*CLI, "generate", "The fox", *FLAGS, "--target", server.process.target)
    ended = run(*generate, "--root-certificates", server.root, token=server.token)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.strip()

    refused = run(*generate, "--root-certificates", server.root)
    assert refused.returncode == 1
    assert refused.stderr.startswith("mpt-grpc: an access token is required")
    distrusted = run(*generate, "--timeout", "20s", token=server.token)
    assert distrusted.returncode == 1
    assert distrusted.stderr.startswith("mpt-grpc: TLS with 127.0.0.1:")


def test_a_gateway_in_front_of_it_passes_tokens_on(server: Protected, start_gateway: Callable[..., Any]) -> None:
    gateway = start_gateway("--target", server.process.target, "--root-certificates", server.root)
    for side in (gateway, server.process):
        for token, status in (server.token, "200"), ("wrong", "401"):
            curl = ("curl", "-s", "--cacert", server.root, "-H", f"authorization: Bearer {token}", "-d", BODY)
            ended = run(*curl, "-w", "%{http_code}", f"{side.openai_url}/completions")
            assert ended.stdout[-3:] == status, ended.stdout
            assert ('"text"' in ended.stdout) == (status == "200")


def test_grpcurl_describes_and_calls_it(server: Protected) -> None:
    grpcurl = shutil.which("grpcurl", path=str(Path(sys.executable).parent))
    if grpcurl is None:
        pytest.skip("grpcurl is not in this environment")
    address = server.process.target.removeprefix("grpcs://")
    options = (grpcurl, "-cacert", server.root, "-H", f"authorization: Bearer {server.token}")
    assert "max_new_tokens" in run(*options, address, "describe", "mpt.v1.StoppingCriteria").stdout
    assert "vocab_size" in run(*options, address, "mpt.v1.TextGenerationService/GetModelInfo").stdout.replace(
        "vocabSize", "vocab_size"
    )
    assert "Unauthenticated" in run(grpcurl, "-cacert", server.root, address, "list").stderr


def test_a_gateway_says_that_it_does_not_pass_tokens_on_to_another_machine_without_tls(
    start_gateway: Callable[..., Any],
) -> None:
    gateway = start_gateway("--target", "models.invalid:50051")
    gateway.kill()
    assert "access tokens of callers are not passed on: models.invalid:50051 is another machine" in gateway.stderr


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("serve", "--tls-cert", "x"), "--tls-key: required with --tls-cert"),
        (("gateway", "--tls-key", "x"), "--tls-cert: required with --tls-key"),
        (("serve", "--tls-client-ca", "x"), "--tls-client-ca: requires --tls-cert and --tls-key"),
        (("generate", "x", "--client-key", __file__), "--client-certificate, --client-key: pass both or neither"),
        (("generate", "x", "--root-certificates", "/missing"), "--root-certificates: /missing: No such file"),
        (("token", "new", "a b"), "NAME: 1 to 64 letters, digits and ._@- are required"),
    ],
)
def test_flags_that_do_not_fit_are_named(
    arguments: tuple[str, ...], error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        sys.exit(main(arguments))
    assert ended.value.code in (1, 2)
    assert error in capsys.readouterr().err


def test_a_command_does_not_send_a_token_to_another_machine_without_tls() -> None:
    ended = run(*CLI, "generate", "x", "--target", "models.invalid:50051", token="secret")
    assert ended.returncode == 1
    assert "target 'models.invalid:50051' is another machine, and the token would be readable" in ended.stderr


def test_an_evaluation_reports_that_the_token_is_refused(
    server: Protected, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", server.root)
    monkeypatch.setenv("OPENAI_API_KEY", "wrong")
    assert main(("eval", "--url", server.process.openai_url)) == 1
    assert "refuses the request with 401 Unauthorized" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("target", "token", "message"),
    [
        ("localhost:1", "a b", "mpt-grpc: MPT_GRPC_TOKEN: token: must consist of visible ASCII characters"),
        ("10.0.0.1:50051", "secret", "use TLS ('grpcs://10.0.0.1:50051'), or --allow-insecure-token inside"),
    ],
)
def test_a_token_that_cannot_be_sent_is_one_line(target: str, token: str, message: str) -> None:
    ended = subprocess.run(
        [*CLI, "generate", "x", "--target", target],
        capture_output=True, text=True, timeout=60, check=False, env={**os.environ, "MPT_GRPC_TOKEN": token},
    )  # fmt: skip
    assert ended.returncode == 1
    assert message in ended.stderr
    assert len(ended.stderr.splitlines()) == 1

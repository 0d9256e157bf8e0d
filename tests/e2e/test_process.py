"""The server as a process: its output, its text, how it stops and how it fails to start."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import http2
import pytest
import torch
from server_process import CLI, running
from tokenizers import Tokenizer
from transformers import MptForCausalLM

from mpt_grpc import __version__
from mpt_grpc_client import Client, DeadlineExceededError, UnavailableError

DEMO = Path(__file__).parents[2] / "mpt_grpc" / "demo"
PROMPTS = (
    "Once upon a time",
    "The fox said to the",
    "“Où est la lune?” asked the child. ",
    "There was once a king who had three sons. The two elder were proud and strong, but the youngest",
    "Peter",
)


def failed_start(*flags: str) -> tuple[int, list[str]]:
    """Returns the exit status of a server that fails to start, and its lines on stderr; stdout is empty."""
    command = (sys.executable, "-m", "mpt_grpc.cli", "serve", *flags)
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert not ended.stdout
    return ended.returncode, ended.stderr.splitlines()


def test_the_welcome_lists_the_model_and_the_addresses(server: Any) -> None:
    assert server.welcome == [
        f"mpt-grpc {__version__} serving demo: 7.3 M parameters, float32, cpu",
        "  weights   28.0 MiB",
        "  KV cache  256.0 MiB: 1,024 blocks of 16 = 16,384 tokens",
        "  context   2,048 tokens per request",
        "  chat      template base",
        f"  gRPC      {server.target}",
        f"  OpenAI    {server.openai_url}",
        f"  web page  {server.openai_url.removesuffix('v1')}",
        f'  try       mpt-grpc generate "Once upon a time" --target {server.target}',
    ]


def test_served_text_equals_what_transformers_generates(server: Any) -> None:
    oracle = MptForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval()
    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    with Client(server.target, timeout=120) as client:
        for prompt in PROMPTS:
            served = client.generate(prompt, max_new_tokens=64, temperature=0, return_token_ids=True)
            prompt_ids = tokenizer.encode(prompt, add_special_tokens=False).ids
            expected = oracle.generate(torch.tensor([prompt_ids]), max_new_tokens=64, do_sample=False)[0].tolist()
            assert list(served.token_ids) == expected[len(prompt_ids) :]
            assert prompt + served.text == tokenizer.decode(expected)


def test_sigterm_during_a_stream_loses_no_token(start_server: Callable[..., Any], server: Any) -> None:
    options = {"max_new_tokens": 300, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    with Client(server.target, timeout=120) as client:
        complete = client.generate("The fox", **options)
    stopping = start_server()
    with Client(stopping.target, timeout=120) as client, client.stream("The fox", **options) as stream:
        next(stream)
        stopping.terminate()
        for _ in stream:
            pass
    assert stream.token_ids == complete.token_ids
    assert stream.text == complete.text
    assert stopping.wait() == 0
    assert "Traceback" not in stopping.stderr
    assert "draining: waiting up to 30 s for requests in progress" in stopping.stderr


def test_an_idle_server_stops_immediately(start_server: Callable[..., Any]) -> None:
    server = start_server("--grace", "1h")  # far longer than this test may take
    server.terminate()
    assert server.wait() == 0
    draining, stopped = server.stderr.splitlines()
    assert "draining: waiting up to 3600 s" in draining
    assert stopped.endswith(": stopped")


def test_a_port_in_use_is_one_line_with_a_remedy(server: Any) -> None:
    status, lines = failed_start("--grpc-port", server.target.rpartition(":")[2])
    assert status == 1
    (line,) = lines
    assert line.startswith(
        f"mpt-grpc: --grpc-port: cannot listen on {server.target}: the port is in use; is another mpt-grpc running?"
        " --grpc-port 0 selects a free one"
    )


@pytest.mark.parametrize(
    ("flag", "value", "status"),
    [
        ("--grpc-port", "70000", 1),
        ("--grpc-port", "many", 2),
        ("--dtype", "int3", 2),
        ("--kv-cache", "0", 2),
        ("--kv-cache", "0GiB", 1),
        ("--memory-fraction", "1.5", 1),
        ("--max-running-requests", "0", 1),
        ("--max-step-tokens", "3", 1),
        ("--max-context-tokens", "-1", 1),
        ("--grace", "30", 2),
        ("--read-timeout", "0s", 1),
        ("--stall-timeout", "nan", 2),
        ("--stall-timeout", "0s", 1),
        ("--max-connection-age", "0s", 1),
        ("--log-level", "loud", 2),
        ("--generation-config", "mine", 2),
        ("--trace-file", "/nowhere/spans.jsonl", 1),
    ],
)
def test_an_invalid_value_is_one_line_that_names_the_flag(flag: str, value: str, status: int) -> None:
    code, lines = failed_start(flag, value)
    assert code == status
    assert flag in lines[-1]
    assert len(lines) == 1


def test_a_model_that_does_not_exist_is_one_line(tmp_path: Path) -> None:
    status, lines = failed_start("--grpc-port", "0", "--model", str(tmp_path / "nothing"))
    assert status == 1
    assert len(lines) == 1
    assert str(tmp_path / "nothing") in lines[0]


FAULTY = """
import sys
from mpt_grpc import cli
from mpt_grpc.model.runner import Runner
from mpt_grpc.schedule.scheduler import Scheduler
from mpt_grpc.server import server

commit, run = Scheduler.commit, Runner.run
server._STOP_TIMEOUT_S = 0.5

def commit_or_fail(self, plan, *outcome):
    if any(step.request_id == "fatal" for step in plan.sequences):
        raise RuntimeError("inconsistent state")
    return commit(self, plan, *outcome)

def run_or_hang(self, plan, *rest):
    if any(step.request_id == "endless" for step in plan.sequences):
        __import__("time").sleep(3600)
    return run(self, plan, *rest)

Scheduler.commit, Runner.run = commit_or_fail, run_or_hang
sys.exit(cli.main())
"""
"""A server in whose scheduler thread a request can cause a fault or a hang."""


def test_a_server_whose_scheduler_thread_dies_ends_its_streams_and_exits_with_an_error() -> None:
    with running(cli=(sys.executable, "-c", FAULTY)) as faulty, Client(faulty.target, retries=False) as client:
        neighbour = client.stream("The fox", max_new_tokens=2000, ignore_eos=True)
        next(neighbour)
        body = {"prompt": "The fox", "max_tokens": 2000, "ignore_eos": True, "stream": True}
        with urllib.request.urlopen(f"{faulty.openai_url}/completions", json.dumps(body).encode(), 60) as events:
            events.readline()
            for stream in (client.stream("The fox", request_id="fatal"), neighbour):
                with pytest.raises(UnavailableError, match="the engine has stopped") as caught:
                    list(stream)
                assert caught.value.reason == "ENGINE_STOPPED"
            *_, last = (line for line in events if line.strip())
        error = json.loads(last.removeprefix(b"data: "))["error"]
        assert error["message"].startswith("the engine has stopped")
        assert error["code"] == "unavailable"
        assert faulty.wait() == 1
    assert faulty.stderr.splitlines()[-1].startswith("mpt-grpc: the engine has stopped: RuntimeError")


def is_refused(client: Client) -> bool:
    try:
        client.generate("The fox", timeout=0.5)
    except (DeadlineExceededError, UnavailableError) as error:
        return "shutting down" in str(error)
    raise AssertionError("the model hangs")


def test_a_second_signal_ends_a_server_whose_model_hangs() -> None:
    with running("--grace", "1h", cli=(sys.executable, "-c", FAULTY)) as faulty:
        with Client(faulty.target, retries=False) as client:
            stream = client.stream("The fox", request_id="endless")
            with pytest.raises(DeadlineExceededError):
                client.generate("The fox", timeout=1)
            faulty.terminate()
            while not is_refused(client):
                pass  # it has not got the signal yet
            faulty.terminate()
            with pytest.raises(UnavailableError):
                list(stream)
        assert faulty.wait() == 1
    assert "the engine has not stopped within 0.5 s" in faulty.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="needs prlimit and /proc")
def test_connections_that_use_up_all_files_stop_no_stream_and_leave_few_lines_in_the_log() -> None:
    max_files = 48
    with running(cli=("prlimit", f"--nofile={max_files}", *CLI)) as server, ExitStack() as stack:
        client = stack.enter_context(Client(server.target, timeout=60))
        stream = client.stream("Once", max_new_tokens=300, ignore_eos=True)
        next(stream)
        host, _, port = server.openai_url.removeprefix("http://").removesuffix("/v1").partition(":")
        for _ in range(2 * max_files):
            stack.enter_context(socket.create_connection((host, int(port))))
        while len(os.listdir(f"/proc/{server.pid}/fd")) < max_files:
            pass
        for _ in stream:
            pass
        assert stream.num_tokens == 300
        server.terminate()
        assert server.wait() == 0
        assert 0 < server.stderr.count("out of system resource") < 60  # one a second


def test_a_call_whose_path_is_not_utf_8_makes_the_server_drain_and_exit_with_an_error() -> None:
    path = "/mpt.v1.TextGenerationService/Generate"
    call = http2.call(path, b"").replace(path.encode(), path.replace("Generate", "\x80enerate").encode("latin-1"))
    with running("--grace", "60s") as server, Client(server.target) as client:
        with client.stream(PROMPTS[0], max_new_tokens=1000, ignore_eos=True) as stream:
            next(stream)
            host, _, port = server.target.rpartition(":")
            with socket.create_connection((host, int(port))) as connection:
                connection.sendall(http2.PREFACE + http2.settings() + call)
                for _ in stream:
                    pass
                assert stream.result.usage.num_output_tokens == 1000
                assert server.wait() == 1
    assert "draining" in server.stderr
    assert server.stderr.splitlines()[-1].startswith("mpt-grpc: gRPC's server has ended: ")

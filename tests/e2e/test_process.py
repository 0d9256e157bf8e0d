"""The server as a process: what it prints, how it stops, how it fails to start, and that its text is the model's."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from transformers import MptForCausalLM

from mpt_grpc_client import Client

DEMO = Path(__file__).parents[2] / "mpt_grpc" / "demo"
PROMPTS = (
    "Once upon a time",
    "The fox said to the",
    "“Où est la lune?” asked the child. ",
    "There was once a king who had three sons. The two elder were proud and strong, but the youngest",
    "Peter",
)


def failed_start(*flags: str) -> tuple[int, list[str]]:
    """The exit status of a start that fails, and its lines on stderr. Nothing comes on stdout."""
    command = (sys.executable, "-m", "mpt_grpc.cli", "serve", *flags)
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert not ended.stdout
    return ended.returncode, ended.stderr.splitlines()


def test_the_welcome_says_what_is_served_and_where(server: Any) -> None:
    assert server.welcome == [
        "mpt-grpc serves demo: 7.3 M parameters in float32 on cpu",
        "  weights   28.0 MiB",
        "  KV cache  256.0 MiB: 1,024 blocks of 16 = 16,384 tokens",
        "  context   2,048 tokens a request",
        "  chat      template base",
        f"  gRPC      {server.target}",
        f"  OpenAI    {server.openai_url}",
        f"  page      {server.openai_url.removesuffix('v1')}",
        f'  try       grpcurl -plaintext -d \'{{"text": "Once upon a time"}}\' {server.target}'
        " mpt.v1.TextGenerationService/StreamGenerate",
    ]


def test_served_text_is_what_transformers_generates(server: Any) -> None:
    oracle = MptForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval()
    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    with Client(server.target, timeout=120) as client:
        for prompt in PROMPTS:
            served = client.generate(prompt, max_new_tokens=64, temperature=0, return_token_ids=True)
            prompt_ids = tokenizer.encode(prompt, add_special_tokens=False).ids
            expected = oracle.generate(torch.tensor([prompt_ids]), max_new_tokens=64, do_sample=False)[0].tolist()
            assert list(served.token_ids) == expected[len(prompt_ids) :]
            assert prompt + served.text == tokenizer.decode(expected)


def test_sigterm_in_mid_stream_loses_no_token(start_server: Callable[..., Any], server: Any) -> None:
    asked = {"max_new_tokens": 300, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    with Client(server.target, timeout=120) as client:
        whole = client.generate("The fox", **asked)
    stopping = start_server()
    with Client(stopping.target, timeout=120) as client, client.stream("The fox", **asked) as stream:
        next(stream)
        stopping.terminate()
        for _ in stream:
            pass
    assert stream.token_ids == whole.token_ids
    assert stream.text == whole.text
    assert stopping.wait() == 0
    assert "Traceback" not in stopping.stderr


def test_an_idle_server_stops_at_once_without_a_word(start_server: Callable[..., Any]) -> None:
    server = start_server("--grace", "3600")  # if it were waited for, so would this test
    server.terminate()
    assert server.wait() == 0
    assert server.stderr == ""


def test_a_port_that_is_taken_is_one_clear_line(server: Any) -> None:
    status, lines = failed_start("--grpc-port", server.target.rpartition(":")[2])
    assert status == 1
    (line,) = lines
    assert line.startswith(f"mpt-grpc: --port: cannot listen on {server.target}: is --host an address of this machine")


@pytest.mark.parametrize(
    ("flag", "value", "status"),
    [
        ("--grpc-port", "70000", 1),
        ("--grpc-port", "many", 2),
        ("--dtype", "int3", 2),
        ("--kv-cache", "0", 1),
        ("--memory-fraction", "1.5", 1),
        ("--max-running-requests", "0", 1),
        ("--max-step-tokens", "3", 1),
        ("--max-context-tokens", "-1", 1),
        ("--grace", "-1", 1),
        ("--stall-timeout", "nan", 1),
        ("--trace-file", "/nowhere/spans.jsonl", 1),
    ],
)
def test_a_bad_value_ends_with_a_line_that_names_the_flag(flag: str, value: str, status: int) -> None:
    code, lines = failed_start(flag, value)
    assert code == status
    assert flag in lines[-1]
    assert value in lines[-1]
    assert status == 2 or len(lines) == 1


def test_a_model_that_is_not_there_is_one_clear_line(tmp_path: Path) -> None:
    status, lines = failed_start("--grpc-port", "0", "--model", str(tmp_path / "nothing"))
    assert status == 1
    assert len(lines) == 1
    assert str(tmp_path / "nothing") in lines[0]

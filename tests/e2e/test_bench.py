"""`mpt-grpc bench` as a process, with a real server."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

CLI = (sys.executable, "-m", "mpt_grpc.cli", "bench")
BRIEF = ("--num-requests", "6", "--prompt-tokens", "2-9", "--output-tokens", "12", "--warm-up", "1")


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run((*CLI, *arguments), capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("protocol", ["grpc", "http", "chat"])
@pytest.mark.parametrize("load", [("--concurrency", "1,3"), ("--rate", "50,100")])
def test_the_results_are_a_table_and_json(server: Any, tmp_path: Path, protocol: str, load: tuple[str, ...]) -> None:
    file = tmp_path / "results.json"
    where = {
        "grpc": ("--target", server.target),
        "http": ("--url", server.openai_url),
        "chat": ("--url", server.openai_url, "--chat"),
    }
    ended = bench(*where[protocol], *load, *BRIEF, "--objective", "ttft=60s,tpot=10s", "--output", str(file))
    assert (ended.returncode, ended.stderr) == (0, "")
    results = json.loads(file.read_text(encoding="utf-8"))
    assert results["model"] == "demo"
    assert results["prompts"] == ("words" if protocol == "chat" else "token IDs")
    assert len(results["loads"]) == 2
    for measured in results["loads"]:
        assert measured["num_completed"] == len(measured["requests"]) == 6
        assert measured["failures"] == {}
        assert all(request["num_output_tokens"] == 12 for request in measured["requests"])
        assert protocol == "chat" or all(2 <= request["num_prompt_tokens"] <= 9 for request in measured["requests"])
        assert measured["goodput"] == measured["requests_per_second"]
        assert measured["output_tokens_per_second"] == pytest.approx(72 / measured["duration"])
        assert (measured["start_delay"] is None) == (load[0] == "--concurrency")
        first, total = measured["time_to_first_token"], measured["end_to_end_latency"]
        assert 0 < first["p50"] <= first["p90"] <= first["p99"] < total["p99"] <= measured["duration"]
        assert first["mean"] + 11 * measured["time_per_output_token"]["mean"] == pytest.approx(total["mean"])
        rate = f"{measured['output_tokens_per_second']:,.1f}"
        assert re.search(rf"output tokens/s .*\b{re.escape(rate)}\b", ended.stdout)


def test_requests_in_progress_are_as_many_as_the_concurrency(server: Any, tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    assert bench("--target", server.target, "--concurrency", "3", *BRIEF, "--output", str(file)).returncode == 0
    requests = json.loads(file.read_text(encoding="utf-8"))["loads"][0]["requests"]
    in_progress = [sum(other["start"] <= one["start"] < other["end"] for other in requests) for one in requests]
    assert max(in_progress) == 3


def test_a_trace_is_replayed_in_the_context_of_the_server(server: Any, tmp_path: Path) -> None:
    trace, file = tmp_path / "trace.csv", tmp_path / "results.json"
    rows = [f"2023-11-16 18:15:4{second}.6805900,{prompt},40" for second, prompt in ((0, 8152), (3, 100), (9, 4056))]
    trace.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *rows]), encoding="utf-8")
    flags = ("--trace", str(trace), "--rate", "10", "--warm-up", "0", "--output", str(file))
    ended = bench("--target", server.target, *flags)
    assert (ended.returncode, ended.stderr) == (0, "")
    requests = json.loads(file.read_text(encoding="utf-8"))["loads"][0]["requests"]
    by_start = sorted(requests, key=lambda request: request["start"])
    assert [request["num_output_tokens"] for request in by_start] == [9, 9, 9]
    assert [request["num_prompt_tokens"] for request in by_start] == pytest.approx([2037, 25, 1013], abs=2)


def test_plots_are_a_png(server: Any, tmp_path: Path) -> None:
    file = tmp_path / "results.png"
    assert bench("--target", server.target, "--concurrency", "1,2", *BRIEF, "--plot", str(file)).returncode == 0
    assert file.read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_only_plots_fail_and_name_the_extra(server: Any) -> None:
    absent = "import sys; sys.modules['matplotlib'] = None"
    script = f"{absent}; from mpt_grpc.cli import main; sys.exit(main(sys.argv[1:]))"
    command = (sys.executable, "-c", script, "bench", "--target", server.target, *BRIEF)
    assert subprocess.run(command, capture_output=True, timeout=120, check=False).returncode == 0
    ended = subprocess.run((*command, "--plot", "x.png"), capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 1
    assert ended.stderr == "mpt-grpc: --plot requires matplotlib; install the extra 'bench' (see docs/install.md)\n"


def test_refused_requests_are_counted_by_status(start_server: Any, tmp_path: Path) -> None:
    server = start_server("--max-waiting-requests", "1", "--max-running-requests", "1")
    file = tmp_path / "results.json"
    flags = ("--concurrency", "8", *BRIEF, "--num-requests", "16", "--output", str(file))
    for where, status in ((("--target", server.target), "RESOURCE_EXHAUSTED"), (("--url", server.openai_url), "429")):
        ended = bench(*where, *flags)
        assert (ended.returncode, ended.stderr) == (0, "")
        (measured,) = json.loads(file.read_text(encoding="utf-8"))["loads"]
        assert set(measured["failures"]) == {status}
        assert measured["num_completed"] + measured["failures"][status] == 16
        assert f"failed: {status}" in ended.stdout


def test_ctrl_c_ends_with_the_results_so_far(server: Any, tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    flags = (
        "--concurrency",
        "1,2",
        "--num-requests",
        "20000",
        "--prompt-tokens",
        "1",
        "--output-tokens",
        "1",
        "--output",
        str(file),
    )
    terminal, other = os.openpty()  # a progress bar shows when requests have ended
    process = subprocess.Popen(
        (*CLI, "--target", server.target, *flags),
        stdout=subprocess.PIPE,
        stderr=other,
        text=True,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "120"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    os.close(other)
    shown = ""
    while not re.search(r"[1-9]\d*/20000", shown):
        shown += os.read(terminal, 4096).decode(errors="replace")
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=60)
    os.close(terminal)
    assert process.returncode == 130
    (measured,) = json.loads(file.read_text(encoding="utf-8"))["loads"]
    assert 0 < measured["num_completed"] < 20_000
    assert measured["failures"] == {}
    assert re.search(rf"requests +\| +{measured['num_completed']} ", printed)


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (("--target", "127.0.0.1:1"), 1, "no server responds at 127.0.0.1:1"),
        (("--url", "http://127.0.0.1:1/v1"), 1, "--url: no server with OpenAI's API responds at http://127.0.0.1:1/v1"),
        (("--url", "localhost:8451"), 1, "--url: 'localhost:8451' is not a URL"),
        (
            ("--prompt-tokens", "2000"),
            1,
            "--prompt-tokens: 2000 prompt and 64 output tokens exceed the server's context",
        ),
        (("--trace", "absent.csv"), 1, "--trace: cannot read absent.csv"),
        (("--trace", "x", "--prompt-tokens", "5"), 2, "argument --trace: the trace sets the lengths"),
        (("--chat",), 2, "argument --chat: requires --url"),
        (("--concurrency", "0"), 2, "argument --concurrency: 0 is not above 0"),
        (("--concurrency", "many"), 2, "argument --concurrency: 'many' is not a number"),
        (("--rate", "inf"), 2, "argument --rate: inf is not above 0"),
        (("--rate", "1", "--concurrency", "1"), 2, "not allowed with"),
        (("--prompt-tokens", "9-2"), 2, "argument --prompt-tokens: 9-2 is not a range"),
        (("--prompt-tokens", "few"), 2, "argument --prompt-tokens: 'few' is not a number or a range"),
        (("--objective", "speed=1s"), 2, "argument --objective: 'speed=1s' is not NAME=TIME with a name of ttft"),
        (("--objective", "ttft=1"), 2, "argument --objective: '1' is not a number with a unit"),
        (("--output", "no/such/folder/x.json"), 2, "argument --output: no/such/folder/x.json: not a file"),
    ],
)
def test_a_failure_is_one_line_and_an_exit_status(
    server: Any, arguments: tuple[str, ...], status: int, message: str
) -> None:
    where = () if {"--target", "--url"} & set(arguments) else ("--target", server.target)
    where = () if "--chat" in arguments else where
    ended = bench(*where, *arguments)
    assert ended.returncode == status
    assert message in ended.stderr
    assert len(ended.stderr.splitlines()) == 1
    assert ended.stdout == ""

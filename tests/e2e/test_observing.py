"""The commands that show what a server does and did."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from server_process import ServerProcess, running
from terminal import Terminal

from mpt_grpc.commands.trace import print_waterfall
from mpt_grpc_client import Client


@pytest.fixture(scope="module")
def trace_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("traces") / "spans.jsonl"


@pytest.fixture(scope="module")
def traced(trace_file: Path) -> Iterator[ServerProcess]:
    with running("--trace-file", str(trace_file)) as server:
        yield server


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = (sys.executable, "-m", "mpt_grpc.cli", *arguments)
    environment = os.environ | variables
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=environment)


def test_top_shows_the_load_and_the_requests_in_progress(traced: Any) -> None:
    with Client(traced.target) as client:
        client.generate("Once", max_new_tokens=3)
        client.generate("Twice", max_new_tokens=3)
        with client.stream("Once", max_new_tokens=1900, ignore_eos=True, request_id="the-long-one\x1b[2J\n") as stream:
            next(iter(stream))
            shown = run("top", "--once", "--interval", "100ms", "--target", traced.target)
            stream.cancel()
    assert shown.returncode == 0, shown.stderr
    assert "1 running (at most 64), 0 waiting, 0 preparing" in shown.stdout
    assert "over the last 3 completed requests" in shown.stdout  # with the warm-up
    (row,) = [line.split() for line in shown.stdout.splitlines() if "the-long-one" in line]
    assert "decode" in row
    assert "\x1b" not in shown.stdout, "a caller's text is not obeyed by the terminal"


COLUMNS = ["age", "state", "output", "tokens/s", "first", "prompt", "cached", "preempted"]


@pytest.mark.parametrize(("width", "shown"), [(80, COLUMNS), (40, COLUMNS[:4])])
def test_in_a_narrow_terminal_ids_are_shortened_and_further_columns_left_out(
    traced: Any, width: int, shown: list[str]
) -> None:
    request_id = str(uuid.uuid4())
    with (
        Client(traced.target) as client,
        client.stream("Once", max_new_tokens=1900, ignore_eos=True, request_id=request_id) as stream,
    ):
        next(stream)
        page = run("top", "--interval", "100ms", "--target", traced.target, COLUMNS=str(width)).stdout
    lines = page.splitlines()
    assert max(map(len, lines)) <= width
    head = next(line for line in lines if line.startswith("request "))
    row = next(line for line in lines if line.startswith(request_id[:7]))
    assert head.split() == ["request", *shown]
    shortened, rest = row.split("… ")
    assert shortened == request_id[: len(shortened)]
    assert len(shortened) >= 7
    assert re.match(r" *\d+\.\d s +decode +\d+ ", rest)


def test_top_goes_on_when_its_server_is_started_again() -> None:
    with running() as server, Client(server.target) as client:
        client.generate("Once", max_new_tokens=200, ignore_eos=True)
        target = server.target
        watching = Terminal(server, "top", "--interval", "50ms", TERM="xterm", COLUMNS="100", LINES="30")
        try:
            watching.wait_for("outputs.*KV cache")
            server.kill()
            watching.type("")
            watching.wait_for("no server responds.*trying again")
            with running("--grpc-port", target.rpartition(":")[2]):
                watching.type("")
                watching.wait_for("outputs.*KV cache")
                assert not re.search(r"-\d+/s", watching.output), "what the old server had counted is not subtracted"
            watching.interrupt()
            assert watching.process.wait(30) == 130
        finally:
            watching.close()


def test_trace_show_prints_the_last_trace_of_a_request_or_the_one_that_is_named(traced: Any, trace_file: Path) -> None:
    with Client(traced.target) as client:
        ids = [client.generate("Once", max_new_tokens=3).trace_id for _ in range(2)]
    traced.terminate()
    assert traced.wait() == 0
    last, first = run("trace", "show", str(trace_file)), run("trace", "show", str(trace_file), ids[0][:12])
    assert last.stdout.splitlines()[0] == f"trace {ids[1]}"
    title, *bars = first.stdout.splitlines()
    assert title == f"trace {ids[0]}"
    assert [bar.split()[0] for bar in bars] == ["Generate", "queue", "prefill", "decode"]
    assert bars[-1].endswith("first token")


def test_a_trace_that_does_not_exist_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    ended = run("trace", "show", str(tmp_path / "empty"))
    assert (ended.returncode, ended.stderr) == (1, f"mpt-grpc: {tmp_path}/empty: has no trace of a request\n")


SPAN = {
    "name": "Generate",
    "context": {"trace_id": "0x1", "span_id": "0x2"},
    "parent_id": None,
    "start_time": "2026-11-29T12:00:00Z",
    "end_time": "2026-11-29T12:00:01Z",
    "status": {"status_code": "ERROR", "description": "refused"},
    "events": [],
}


def test_lines_that_a_full_disk_has_cut_off_are_left_out_of_a_trace(tmp_path: Path) -> None:
    line, file = json.dumps(SPAN), tmp_path / "spans"
    file.write_text(f"{line[:40]}\n{line}\n{line[:90]}")
    shown = run("trace", "show", str(file))
    assert shown.stdout.splitlines()[1].startswith("Generate")
    assert shown.stderr == f"mpt-grpc: {file}: broken lines that are left out: 2\n"
    file.write_text(line[:40])
    assert run("trace", "show", str(file)).stderr == f"mpt-grpc: {file}: is not a file of serve --trace-file\n"


@pytest.mark.parametrize(
    "change",
    [{"parent_id": {}}, {"context": 5}, {"events": [{"name": 5}]}, {"start_time": None}, {"status": []}, {"name": 5}],
)
def test_a_line_that_is_no_span_is_left_out_of_a_trace(tmp_path: Path, change: dict[str, Any]) -> None:
    file = tmp_path / "spans"
    file.write_text("\n".join(["[" * 100_000, "null", "\x00", json.dumps(SPAN | change), json.dumps(SPAN)]))
    shown = run("trace", "show", str(file))
    assert (shown.returncode, shown.stderr) == (0, f"mpt-grpc: {file}: broken lines that are left out: 4\n")
    assert len(shown.stdout.splitlines()) == 2


def test_the_trace_of_a_step_is_shown_only_if_it_is_named(tmp_path: Path) -> None:
    step = SPAN | {"name": "step", "context": {"trace_id": "0x5", "span_id": "0x6"}}
    file = tmp_path / "spans"
    file.write_text("\n".join(json.dumps(span) for span in (SPAN, step)))
    assert run("trace", "show", str(file)).stdout.startswith("trace 1\nGenerate ")
    assert run("trace", "show", str(file), "5").stdout.startswith("trace 5\nstep ")


def test_a_trace_of_many_spans_in_each_other_is_shown(tmp_path: Path) -> None:
    ids = [{"context": {"trace_id": "0x1", "span_id": f"{n}"}, "parent_id": f"{n - 1}"} for n in range(3000)]
    (tmp_path / "spans").write_text("\n".join(json.dumps(SPAN | one) for one in ids))
    assert len(run("trace", "show", str(tmp_path / "spans")).stdout.splitlines()) == 3001


def test_a_call_that_was_refused_shows_why_although_its_span_is_no_error(tmp_path: Path) -> None:
    refused = {"status": {"status_code": "UNSET"}, "attributes": {"error.type": "OVERLOADED"}}
    (tmp_path / "spans").write_text(json.dumps(SPAN | refused))
    shown = io.StringIO()
    print_waterfall(Console(file=shown, width=80, force_terminal=True, color_system="standard"), tmp_path / "spans")
    assert re.search("\x1b\\[31m.*OVERLOADED", shown.getvalue())


def test_a_trace_fits_in_a_narrow_terminal(tmp_path: Path) -> None:
    (tmp_path / "spans").write_text(json.dumps(SPAN))
    shown = io.StringIO()
    print_waterfall(Console(file=shown, width=80, force_terminal=True, color_system=None), tmp_path / "spans")
    (bar,) = shown.getvalue().splitlines()[1:]
    assert bar.endswith("refused")
    assert len(bar) <= 80


@pytest.mark.parametrize("no_color", [{}, {"NO_COLOR": "1"}])
def test_a_trace_from_standard_input_has_colors_unless_no_color_is_set(no_color: dict[str, str]) -> None:
    command = (sys.executable, "-m", "mpt_grpc.cli", "trace", "show", "-")
    others = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
    terminal = {"FORCE_COLOR": "1", "TERM": "xterm"}
    shown = subprocess.run(
        command, input=json.dumps(SPAN), capture_output=True, text=True, check=True, env=others | terminal | no_color
    )
    assert "refused" in shown.stdout
    assert ("\x1b[31m" in shown.stdout) == (not no_color)


def test_what_a_caller_wrote_is_not_obeyed_by_the_terminal_that_shows_a_trace(tmp_path: Path) -> None:
    time = "2026-01-01T00:00:00Z"
    span = {
        "name": "Generate",
        "context": {"trace_id": "0x1", "span_id": "0x2"},
        "parent_id": None,
        "start_time": time,
        "end_time": time,
        "status": {"status_code": "ERROR", "description": "not supported: \x1b[2J\n"},
        "events": [],
    }
    (tmp_path / "spans").write_text(json.dumps(span))
    assert (
        run("trace", "show", str(tmp_path / "spans")).stdout.splitlines()[1].endswith("not supported: \ufffd[2J\ufffd")
    )

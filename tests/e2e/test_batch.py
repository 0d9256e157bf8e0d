"""`mpt-grpc batch` as a process, with real servers."""

from __future__ import annotations

import fcntl
import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import access_tokens
import pytest
from http_calls import call
from server_process import ServerProcess, running

from mpt_grpc_client import Client

CLI = (sys.executable, "-m", "mpt_grpc.cli", "batch")
COMPLETIONS, CHAT, RESPONSES = "/v1/completions", "/v1/chat/completions", "/v1/responses"


def line(custom_id: str, max_tokens: int = 8, url: str = COMPLETIONS, **body: Any) -> str:
    """Returns a line with a greedy request of exactly this many tokens."""
    prompt = {"messages": [{"role": "user", "content": "Hello"}]} if url == CHAT else {"prompt": "Once upon a time"}
    body = {**prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True, **body}
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": url, "body": body})


def start(server: Any, folder: Path, lines: Sequence[str], *flags: str) -> subprocess.Popen[str]:
    """Starts a batch with these lines, which writes to `out.jsonl`."""
    (folder / "in.jsonl").write_text("\n".join(lines), encoding="utf-8")
    command = (*CLI, str(folder / "in.jsonl"), "-o", str(folder / "out.jsonl"), "--target", server.target, *flags)
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def run(server: Any, folder: Path, lines: Sequence[str], *flags: str) -> tuple[int, list[str]]:
    """Returns the exit status of a batch and the lines that it prints."""
    with start(server, folder, lines, *flags) as process:
        _, stderr = process.communicate(timeout=120)
    return process.returncode, stderr.splitlines()


def results(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(result) for result in (folder / "out.jsonl").read_text(encoding="utf-8").splitlines()]


def num_results(folder: Path) -> int:
    output = folder / "out.jsonl"
    return output.read_bytes().count(b"\n") if output.exists() else 0


def wait_for_results(folder: Path, number: int) -> None:
    """Waits until `tail`, which follows the output, has printed `number` results."""
    command = ("timeout", "60", "tail", "-F", "-n", "+1", str(folder / "out.jsonl"))
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as tail:
        assert tail.stdout is not None
        while num_results(folder) < number:
            assert tail.stdout.readline(), "too few results in a minute"
        tail.terminate()


@pytest.fixture(scope="module")
def small_server() -> Iterator[ServerProcess]:
    """Runs one request at a time and lets eight wait."""
    with running("--max-running-requests", "1", "--max-waiting-requests", "8") as process:
        yield process


def test_a_result_is_what_the_same_request_returns_over_http(server: Any, tmp_path: Path) -> None:
    lines = [
        line("text", logprobs=1, echo=True),
        line("chat", url=CHAT),
        line("choice", guided_choice=["x", "y"], ignore_eos=False),
        json.dumps({"custom_id": "response", "method": "POST", "url": RESPONSES, "body": {"input": "Hi", "seed": 1}}),
    ]
    status, printed = run(server, tmp_path, lines)
    assert (status, printed) == (0, ["4 of 4 requests: 4 succeeded, 0 failed"])
    found = {result.pop("custom_id"): result for result in results(tmp_path)}
    for number, request in enumerate(map(json.loads, lines), 1):
        result = found.pop(request["custom_id"])
        assert result.keys() == {"id", "response", "error"}
        assert (result["id"], result["error"]) == (f"batch_req_{number}", None)
        assert result["response"].keys() == {"status_code", "request_id", "body"}
        assert result["response"]["status_code"] == 200
        body, expected = result["response"]["body"], call(server, request["url"], request["body"])
        assert result["response"]["request_id"] in body["id"]
        assert body.keys() == expected.keys()
        if request["url"] == RESPONSES:
            assert body["output"][0]["content"] == expected["output"][0]["content"]
        else:
            assert body["choices"] == expected["choices"]
    assert not found


def test_a_large_file_is_not_read_into_memory(server: Any, tmp_path: Path) -> None:
    """Its lines are not sent, since they lack the method."""
    program = (
        "import sys; from mpt_grpc.cli import main; main(sys.argv[1:]);"
        " print([line for line in open('/proc/self/status') if line.startswith('VmHWM')][0].split()[1])"
    )
    peaks = []
    for number in (1, 48):
        lines = (json.dumps({"custom_id": str(index), "body": {"prompt": "x" * (1 << 20)}}) for index in range(number))
        source = tmp_path / f"{number}.jsonl"
        source.write_text("\n".join(lines), encoding="utf-8")
        arguments = ("batch", str(source), "-o", str(tmp_path / f"out_{number}.jsonl"), "--target", server.target)
        ended = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True)
        assert f"{number} of {number} requests: 0 succeeded, {number} failed" in ended.stderr
        peaks.append(int(ended.stdout))
    assert peaks[1] - peaks[0] < 32 << 10


@pytest.mark.parametrize(("output", "status"), [("/dev/null", 0), ("/dev/full", 1)])
def test_the_output_may_be_a_device_that_others_use(server: Any, tmp_path: Path, output: str, status: int) -> None:
    (tmp_path / "in.jsonl").write_text(line("one", 1), encoding="utf-8")
    command = (*CLI, str(tmp_path / "in.jsonl"), "-o", output, "--target", server.target)
    with Path(output).open("wb") as other:
        fcntl.flock(other, fcntl.LOCK_SH)
        ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == status
    assert ("mpt-grpc: --output: No space left on device" in ended.stderr) is (status == 1)


def test_a_line_that_fails_has_an_error_and_does_not_end_the_run(server: Any, tmp_path: Path) -> None:
    lines = [
        "{not JSON",
        "[]",
        '{"method": "POST", "url": "/v1/completions", "body": {}}',
        line("embeddings", url="/v1/embeddings"),
        line("stream", stream=True),
        '{"custom_id": "method", "method": "GET", "url": "/v1/completions", "body": {}}',
        '{"custom_id": "body", "method": "POST", "url": "/v1/completions"}',
        line("same"),
        line("same"),
        "",
        line("typing", temprature=1),
        line("deep").replace("0", "[" * 900 + "]" * 900),
        "[" * 100_000,
        '{"custom_id": ' + "1" * 5000 + "}",
    ]
    status, printed = run(server, tmp_path, lines)
    assert status == 1
    assert printed == [
        "13 of 13 requests: 1 succeeded, 12 failed",
        "mpt-grpc: not all requests succeeded; the lines of those that failed have the errors",
    ]
    found = {result["id"]: result for result in results(tmp_path)}
    errors = {id_: result["error"]["code"] for id_, result in found.items() if result["error"]}
    assert errors == {
        "batch_req_1": "invalid_json_line",
        "batch_req_2": "invalid_json_line",
        "batch_req_3": "invalid_custom_id",
        "batch_req_4": "invalid_url",
        "batch_req_5": "invalid_body",
        "batch_req_6": "invalid_method",
        "batch_req_7": "invalid_body",
        "batch_req_9": "duplicate_custom_id",
        "batch_req_12": "invalid_body",
        "batch_req_13": "invalid_json_line",
        "batch_req_14": "invalid_json_line",
    }
    assert found["batch_req_14"]["error"]["message"].endswith("an integer has more than 640 digits")
    refused = found["batch_req_11"]["response"]
    assert refused["status_code"] == 400
    assert "did you mean 'temperature'?" in refused["body"]["error"]["message"]
    assert found["batch_req_8"]["response"]["status_code"] == 200
    # Nothing is sent or written a second time.
    before = (tmp_path / "out.jsonl").read_bytes()
    assert run(server, tmp_path, lines) == (status, printed)
    assert (tmp_path / "out.jsonl").read_bytes() == before


def test_bytes_that_are_not_text_and_lines_of_any_length_have_their_own_error(server: Any, tmp_path: Path) -> None:
    invalid = [
        b"\xef\xbb\xbf" + line("marked").encode(),
        b'{"custom_id": "\xff"}',
        line("long", prompt="x" * 5_000_000).encode(),
    ]
    (tmp_path / "in.jsonl").write_bytes(b"\r\n".join([*invalid, b"  ", line("last").encode()]))
    command = (*CLI, str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "out.jsonl"), "--target", server.target)
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 1
    assert ended.stderr.startswith("4 of 4 requests: 1 succeeded, 3 failed")
    found = {result["id"]: result for result in results(tmp_path)}
    assert found["batch_req_1"]["error"]["message"].endswith("not valid JSON: it begins with a byte order mark")
    assert found["batch_req_2"]["error"]["message"] == "the line is not valid UTF-8"
    assert found["batch_req_3"]["response"]["status_code"] == 413
    assert found["batch_req_5"]["response"]["status_code"] == 200


def test_killed_runs_continue_without_a_line_lost_or_twice(server: Any, tmp_path: Path) -> None:
    # The last one takes so long that no run ends before it is killed.
    lines = [line(f"request {number}", 16 + 4 * (number % 5) if number < 39 else 600) for number in range(40)]
    output, before = tmp_path / "out.jsonl", b""
    for least in (3, 12, 21):
        with start(server, tmp_path, lines, "--concurrency", "4") as process:
            wait_for_results(tmp_path, least)
            process.send_signal(signal.SIGKILL)
        assert output.read_bytes().startswith(before)
        assert num_results(tmp_path) < 40
        before = output.read_bytes()[: output.read_bytes().rindex(b"\n") + 1]
        output.write_bytes(before + b'{"id": "batch_req_40", "custom_id": "request 39", "resp')
    status, printed = run(server, tmp_path, lines)
    assert (status, printed) == (0, ["40 of 40 requests: 40 succeeded, 0 failed"])
    assert output.read_bytes().startswith(before)
    found = sorted(result["custom_id"] for result in results(tmp_path))
    assert found == sorted(f"request {number}" for number in range(40))


def test_ctrl_c_ends_the_run_with_status_130_and_how_to_continue(server: Any, tmp_path: Path) -> None:
    with start(server, tmp_path, [line("short"), line("long", 2000)], "--concurrency", "1") as process:
        wait_for_results(tmp_path, 1)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    hint = "run the same command again to continue"
    assert (process.returncode, stderr) == (130, f"1 of 2 requests: 1 succeeded, 0 failed; {hint}\n")


def test_a_run_ends_when_its_server_does(start_server: Callable[..., Any], tmp_path: Path) -> None:
    server = start_server()
    lines = [line("short"), line("long", 2000), line("later")]
    with start(server, tmp_path, lines, "--concurrency", "1") as process:
        wait_for_results(tmp_path, 1)
        server.kill()
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    assert stderr.splitlines()[0] == ("1 of 3 requests: 1 succeeded, 0 failed; run the same command again to continue")
    assert "no server responds at" in stderr
    assert num_results(tmp_path) == 1


def test_requests_in_progress_end_when_their_server_drains(start_server: Callable[..., Any], tmp_path: Path) -> None:
    server = start_server("--grace", "10m")  # far longer than this test may take
    lines = [line("long", 200), *(line(f"short {number}", 8) for number in range(1000))]
    with start(server, tmp_path, lines, "--concurrency", "2") as process:
        wait_for_results(tmp_path, 1)
        server.terminate()
        assert process.wait(120) == 1
    found = {result["custom_id"]: result["response"]["status_code"] for result in results(tmp_path)}
    assert found["long"] == 200
    assert set(found.values()) == {200}
    assert len(found) < len(lines)


def test_requests_refused_by_an_overloaded_server_are_sent_again(small_server: Any, tmp_path: Path) -> None:
    lines = [line(str(number), 80) for number in range(30)]
    assert run(small_server, tmp_path, lines, "--concurrency", "30")[0] == 0
    assert len(results(tmp_path)) == 30
    with urlopen(f"{small_server.openai_url.removesuffix('/v1')}/metrics") as page:
        refused = re.search(
            r'^mpt_requests_failed_total{error_type="OVERLOADED"} (.*)', page.read().decode(), re.MULTILINE
        )
    assert refused
    assert float(refused[1]) > 0


def test_other_requests_start_before_those_of_a_batch(small_server: Any, tmp_path: Path) -> None:
    with start(small_server, tmp_path, [line(str(n), 100) for n in range(16)], "--concurrency", "8") as process:
        wait_for_results(tmp_path, 1)
        before = num_results(tmp_path)
        with Client(small_server.target) as client:
            client.generate("Once upon a time", max_new_tokens=1)
        assert num_results(tmp_path) - before < 7, "seven were waiting"
        assert process.wait(60) == 0


def test_both_files_may_be_standard_streams(server: Any) -> None:
    command = (*CLI, "-", "-o", "-", "--target", server.target)
    ended = subprocess.run(command, input=line("one"), capture_output=True, text=True, timeout=60, check=True)
    (result,) = ended.stdout.splitlines()
    assert json.loads(result)["custom_id"] == "one"


def test_a_file_that_is_no_output_or_is_in_use_is_left_alone(server: Any, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    for content in (line("request") + "\n", "notes without a newline"):
        output.write_text(content, encoding="utf-8")
        status, printed = run(server, tmp_path, [line("request")])
        why = f"mpt-grpc: --output: line 1 of {output} is not a result of a batch; choose another file"
        assert (status, printed, output.read_text(encoding="utf-8")) == (1, [why], content)
    output.write_text("", encoding="utf-8")
    with output.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        why = f"mpt-grpc: --output: another run is writing to {output}"
        assert run(server, tmp_path, [line("request")]) == (1, [why])


@pytest.mark.parametrize("path", ["absent.jsonl", "."])
def test_an_input_that_cannot_be_read_is_an_error(server: Any, path: str) -> None:
    command = (*CLI, path, "-o", "-", "--target", server.target)
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 1
    assert ended.stderr.startswith(f"mpt-grpc: {path}: ")


def test_a_batch_sends_the_access_token(
    start_server: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = start_server("--tokens-file", str(access_tokens.write(tmp_path / "tokens.toml")))
    status, printed = run(server, tmp_path, [line("one")])
    assert status == 1
    assert "access token" in printed[-1]
    assert num_results(tmp_path) == 0
    monkeypatch.setenv("MPT_GRPC_TOKEN", access_tokens.SECRETS["alice"])
    assert run(server, tmp_path, [line("one")])[0] == 0

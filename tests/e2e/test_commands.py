"""`mpt-grpc generate` and `mpt-grpc chat` as processes, with a real server."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from server_process import running
from terminal import Terminal

from mpt_grpc import __version__

CLI = (sys.executable, "-m", "mpt_grpc.cli")


def run(server: Any, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Runs a command that connects to the server."""
    environment = {**os.environ, "MPT_GRPC_TARGET": server.target}
    return subprocess.run(
        [*CLI, *arguments], input=stdin, capture_output=True, text=True, timeout=120, check=False, env=environment
    )


def output_of(server: Any, *arguments: str, stdin: str = "") -> str:
    """Returns what a command prints. Fails the test if the command fails or prints errors."""
    ended = run(server, *arguments, stdin=stdin)
    assert (ended.returncode, ended.stderr) == (0, "")
    return ended.stdout


def test_the_prompt_is_an_argument_or_standard_input(server: Any) -> None:
    flags = ("--max-new-tokens", "20", "--temperature", "0")
    text = output_of(server, "generate", "Once upon a time", *flags)
    assert len(text) > 20
    assert text.endswith("\n")
    assert output_of(server, "generate", "-", *flags, stdin="Once upon a time") == text
    assert output_of(server, "generate", *flags, stdin="Once upon a time") == text
    for targets in (server.target, f"localhost:1,{server.target}"):
        assert output_of(server, "generate", "Once upon a time", "--target", targets, *flags) == text


def test_json_is_the_complete_result(server: Any) -> None:
    flags = "--json --seed 7 --max-new-tokens 6 --return-token-ids --return-logprobs --return-prompt-logprobs"
    result = json.loads(output_of(server, "generate", "The fox", *flags.split(), "--top-logprobs", "2"))
    (output,) = result["outputs"]
    assert output["finish"]["reason"] == "MAX_NEW_TOKENS"
    assert result["seed"] == output["seed"] == 7
    assert len(output["token_ids"]) == output["num_tokens"] == result["usage"]["num_output_tokens"] == 6
    assert [p["token_id"] for p in output["logprobs"]] == output["token_ids"]
    assert "".join(p["token_bytes"] for p in output["logprobs"]) == output["text"]
    assert all(len(p["top_logprobs"]) == 2 for p in result["prompt_logprobs"])
    assert result["timings"]["time_to_first_token"] > 0


def test_every_flag_sets_an_option_that_the_server_accepts(server: Any, tmp_path: Path) -> None:
    flags = """--temperature 0.9 --top-k 50 --top-p 0.9 --min-p 0.01 --typical-p 0.9 --seed 3
        --repetition-penalty 1.1 --frequency-penalty 0.1 --presence-penalty 0.1 --logit-bias 77=-5 --logit-bias 78=-5
        --max-new-tokens 30 --min-new-tokens 2 --stop-strings never --stop-strings a\\nb --stop-token-ids 5,6
        --include-stop-string --time-limit 60s --repetition-guard 5,9 --num-sequences 2 --truncate-prompt-tokens 3
        --no-skip-special-tokens --request-id mine --model demo --priority 3 --cache-bypass --cache-salt s
        --timeout 60s --json"""
    result = json.loads(output_of(server, "generate", "Once upon a time", *flags.split()))
    assert result["request_id"] == "mine"
    assert result["usage"]["num_prompt_tokens"] == 3
    assert [output["index"] for output in result["outputs"]] == [0, 1]
    schema = tmp_path / "schema.json"
    schema.write_text('{"enum": ["a", "b"]}', encoding="utf-8")
    for constraint, pattern in (
        (("--json-schema", str(schema)), '"[ab]"\n'),
        (("--json-schema", '{"type": "boolean"}'), "(true|false)\n"),
        (("--regex", "[0-9]{4}"), r"\d{4}\n"),
        (("--choice", "red", "--choice", "blue"), "(red|blue)\n"),
        (("--lark-grammar", 'start: "x" "y"'), "xy\n"),
    ):
        assert re.fullmatch(pattern, output_of(server, "generate", "Say:", *constraint)), constraint
    assert output_of(server, "generate", "Say:", "--json-object", "--max-new-tokens", "5").lstrip().startswith("{")
    compact = ("--json-object", "--max-whitespace", "0", "--max-new-tokens", "2")
    assert re.match(r'\{["}]', output_of(server, "generate", "Say:", *compact))
    allowed = json.loads(
        output_of(server, "generate", "x", "--allowed-token-ids", "77", "--max-new-tokens", "3", "--json")
    )
    assert allowed["outputs"][0]["num_tokens"] == 3
    resumed = ("--resume-token-ids", "300,301", "--temperature", "0", "--max-new-tokens", "5", "--json", "--ignore-eos")
    assert json.loads(output_of(server, "generate", "x", *resumed))["outputs"][0]["num_tokens"] == 3
    assert output_of(server, "generate", "x", "--repetition-guard", "--max-new-tokens", "3")


def test_several_outputs_are_printed_with_their_index(server: Any) -> None:
    printed = output_of(server, "generate", "The fox", "--num-sequences", "3", "--max-new-tokens", "5", "--seed", "1")
    assert re.findall(r"^\[\d\]$", printed, re.MULTILINE) == ["[0]", "[1]", "[2]"]


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (("generate", "x", "--temperature", "-1"), 1, "mpt-grpc: --temperature: -1.0 is not in [0, 100]"),
        (("generate", "x", "--model", "gpt"), 1, "model 'gpt' is not loaded"),
        (
            ("generate", "x", "--target", "127.0.0.1:1", "--timeout", "5s"),
            1,
            "no server responds at 127.0.0.1:1; start one with",
        ),
        (("generate", "x", "--target", "localhost"), 1, "target 'localhost' has no port: write 'localhost:50051'"),
        (("generate", "x", "--target", "http://localhost:50051"), 1, "target 'http://localhost:50051' is a URL: use"),
        (("generate", "x", "--seed", "-1"), 1, "mpt-grpc: --seed: "),
        (("generate", "x", "--json-schema", "absent.json"), 2, "--json-schema: absent.json: No such file"),
        (("generate", "x", "--lark-grammar", "absent.lark"), 2, "--lark-grammar: absent.lark: No such file"),
        (("generate", "x", "--json-schema", "{"), 2, "--json-schema: {: not valid JSON"),
        (("generate", "x", "--top-k", "many"), 2, "--top-k"),
        (("generate", "x", "--logit-bias", "5"), 2, "ID=NUMBER"),
        (("generate", "x", "--regex", "a", "--choice", "b"), 2, "not allowed with"),
        (("generate", "x", "--repetition-guard", "1,2,3"), 2, "has more than two numbers"),
        (("generate", "x", "--timeout", "5"), 2, "argument --timeout: '5' is not a number with a unit, such as 30s"),
        (("generate", "x", "--top-logprobs", "2"), 2, "argument --top-logprobs: requires --json"),
        (("generate", "x", "--num-sequence", "2"), 2, "unknown argument --num-sequence (did you mean --num-sequences"),
        (("chat", "--temperature", "-1"), 1, "mpt-grpc: --temperature: "),
        (
            ("generate", "x", "--max-new-tokens", "1900", "--ignore-eos", "--json", "--timeout", "10ms"),
            1,
            "mpt-grpc: --timeout of 0.01 s has passed before the response",
        ),
    ],
)
def test_a_failure_is_one_line_and_an_exit_status(
    server: Any, arguments: tuple[str, ...], status: int, message: str
) -> None:
    ended = run(server, *arguments, stdin="hello\n")
    assert ended.returncode == status
    assert message in ended.stderr
    assert len(ended.stderr.splitlines()) == 1
    assert ended.stdout == ""


def test_the_version_is_printed(server: Any) -> None:
    assert output_of(server, "--version") == f"mpt-grpc {__version__}\n"


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_standard_input_that_is_not_utf_8_is_an_error(server: Any, command: str) -> None:
    environment = {**os.environ, "MPT_GRPC_TARGET": server.target, "LC_ALL": "C"}
    ended = subprocess.run(
        [*CLI, command], input=b"caf\xe9\n", capture_output=True, timeout=120, env=environment, check=False
    )
    assert ended.returncode == 1
    assert ended.stderr.startswith(b"mpt-grpc: standard input is not UTF-8")


def test_a_reader_that_closes_the_pipe_ends_generate_without_an_error(server: Any) -> None:
    command = f"{sys.executable} -m mpt_grpc.cli generate x --max-new-tokens 1500 --ignore-eos | head -c 5"
    environment = {**os.environ, "MPT_GRPC_TARGET": server.target}
    ended = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=120, env=environment)
    assert (len(ended.stdout), ended.stderr) == (5, "")


@pytest.mark.parametrize(
    ("redirection", "status", "stderr"),
    [(">/dev/full", 1, "mpt-grpc: standard output: No space left on device\n"), (">&-", 0, "")],
)
@pytest.mark.parametrize("form", ["", "--json"])
def test_output_that_cannot_be_written_is_one_line(
    server: Any, redirection: str, status: int, stderr: str, form: str
) -> None:
    command = f"{sys.executable} -m mpt_grpc.cli generate x --max-new-tokens 2 {form} {redirection}"
    environment = {**os.environ, "MPT_GRPC_TARGET": server.target}
    ended = subprocess.run(
        ["sh", "-c", command], stderr=subprocess.PIPE, text=True, timeout=120, env=environment, check=False
    )
    assert (ended.returncode, ended.stderr) == (status, stderr)


@pytest.mark.parametrize("command", ["serve", "gateway", "generate", "chat", "batch", "verify", "eval", "bench"])
def test_help_imports_neither_torch_nor_grpc(command: str) -> None:
    code = f"""
import sys
from mpt_grpc.cli import main
try:
    main([{command!r}, "--help"])
finally:
    assert not {{"torch", "grpc"}} & set(sys.modules)
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--" in ended.stdout
    assert "None" not in ended.stdout


def test_piped_lines_are_messages_of_one_conversation(server: Any) -> None:
    lines = "Who are you?\n\n/system You are a fox.\nAnd now?\n/new\nHello\n/dance\n/help\n/quit\nnever sent\n"
    printed = output_of(server, "chat", "--max-new-tokens", "8", "--seed", "1", stdin=lines)
    assert "unknown command /dance; /help lists the commands" in printed
    assert "/system TEXT" in printed
    assert ">" not in printed
    flags = ("--max-new-tokens", "24", "--temperature", "0")
    statement = "The king had a golden crown and three sons."
    first = output_of(server, "chat", *flags, stdin=f"{statement}\nAnd now?\n")
    again = output_of(server, "chat", *flags, stdin="And now?\n")
    assert not first.endswith(again), "the reply depends on the earlier messages"


@pytest.fixture
def chat(server: Any) -> Iterator[Terminal]:
    terminal = Terminal(server, "chat", *"--min-new-tokens 1200 --max-new-tokens 1200 --seed 1".split())
    yield terminal
    terminal.close()


def test_ctrl_c_in_a_terminal_stops_the_reply_and_not_the_program(chat: Terminal) -> None:
    chat.wait_for("> ")
    for question in ("Who are you?", "And then?"):
        chat.type(f"{question}\n")
        chat.wait_for(re.escape(question) + r"\r\n.{12}")
        chat.interrupt()
        chat.wait_for("> ")
    chat.type("/quit\n")
    assert chat.process.wait(30) == 0


def test_ctrl_c_between_replies_does_not_end_the_program(chat: Terminal) -> None:
    """It comes while the program prints more than the terminal takes."""
    chat.wait_for("> ")
    chat.type("/help\n" * 200)
    chat.wait_for("list the commands.*list the commands")
    chat.interrupt()
    chat.wait_for("Press Ctrl-D to quit.*> ")
    chat.type("/quit\n")
    with pytest.raises(AssertionError, match="ended with status 0"):
        chat.wait_for("(?!)")  # reads all that it prints


def test_ctrl_c_ends_generate_with_status_130(server: Any) -> None:
    terminal = Terminal(server, "generate", "Once", "--max-new-tokens", "1200", "--ignore-eos")
    terminal.wait_for(".{12}")
    terminal.interrupt()
    assert terminal.process.wait(30) == 130
    terminal.close()


def test_ctrl_c_while_modules_are_imported_ends_the_program_without_a_traceback() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "mpt_grpc", "generate", "Once", "--target", "127.0.0.1:1"]
    with subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        assert process.stderr is not None
        next(line for line in process.stderr if line.endswith("mpt_grpc.errors\n"))
        process.send_signal(signal.SIGINT)
        assert "Traceback" not in process.stderr.read()
    assert process.returncode in (130, -signal.SIGINT)  # which a shell shows as 130, too


def test_generated_control_characters_do_not_reach_a_terminal(server: Any) -> None:
    flags = ("--regex", "\x1b\\[31m[a-c]\\n\x9b", "--max-new-tokens", "32")
    terminal = Terminal(server, "generate", "Once", *flags)
    terminal.wait_for("\N{REPLACEMENT CHARACTER}\\[31m[a-c]\r\n\N{REPLACEMENT CHARACTER}\r\n")
    assert terminal.process.wait(30) == 0
    terminal.close()
    assert output_of(server, "generate", "Once", *flags).startswith("\x1b[31m")


def test_new_conversations_forget_the_earlier_one(server: Any) -> None:
    """A conversation that was discarded leaves no trace: the same message gets the same reply."""
    flags = ("--max-new-tokens", "16", "--temperature", "0")
    for command in ("/new", "/system"):
        printed = output_of(server, "chat", *flags, stdin=f"Who are you?\n{command}\nWho are you?\n")
        reply = output_of(server, "chat", *flags, stdin="Who are you?\n")
        assert printed == reply * 2
    system = output_of(server, "chat", *flags, stdin="/system Speak of kings.\nWho are you?\n")
    assert system == output_of(server, "chat", *flags, "--system", "Speak of kings.", stdin="Who are you?\n")


def test_a_conversation_outlives_its_server(tmp_path: Path) -> None:
    """The part of a reply stays on a line of its own, and the next message is answered by a server that is back."""
    socket, flags = ("--grpc-socket", str(tmp_path / "socket")), "--min-new-tokens 1200 --max-new-tokens 1200"
    with running(*socket) as server:
        chat = Terminal(server, "chat", *flags.split(), NO_COLOR="1")
        with closing(chat):
            chat.wait_for("> ")
            chat.type("Who are you?\n")
            chat.wait_for(r"you\?\r\n.{12}")
            server.kill()
            chat.wait_for("\r\nmpt-grpc: no server responds at .*\r\n> ")
            chat.type("And then?\n")
            chat.wait_for("\r\nmpt-grpc: no server responds at .*\r\n> ")
            with running(*socket):
                # gRPC waits up to 5 s before it tries to connect again.
                while "no server responds" in chat.output:
                    chat.type("And then?\n")
                    chat.wait_for(r"then\?\r\n(mpt-grpc.*\n> |(?!mpt-grpc).{12})")
                chat.interrupt()
                chat.wait_for("> ")
            chat.type("\x04")
            assert chat.process.wait(30) == 0
            assert "\x1b" not in chat.output

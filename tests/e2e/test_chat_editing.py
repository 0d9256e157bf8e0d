"""The editing of messages in `mpt-grpc chat`, with the extra `chat`."""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest
from terminal import Terminal

pytest.importorskip("prompt_toolkit", reason="the extra chat is not installed")

ENTER, ALT_ENTER, UP, TAB, CTRL_C, CTRL_D = "\r", "\x1b\r", "\x1b[A", "\t", "\x03", "\x04"
PASTE = "\x1b[200~{}\x1b[201~"
"""What a terminal sends for text from the clipboard."""
EDITING, SENT = r"\x1b\[\?2004h", r"\x1b\[\?2004l"
"""What a terminal gets when a message may be edited, and when it is sent."""


@pytest.fixture
def start_chat(server: Any, tmp_path: Path) -> Iterator[Callable[[], Terminal]]:
    """Starts programs that share a history."""
    variables = {"TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1", "XDG_STATE_HOME": str(tmp_path)}
    with ExitStack() as stack:

        def start() -> Terminal:
            chat = Terminal(server, "chat", "--max-new-tokens", "4", "--min-new-tokens", "4", **variables)
            stack.enter_context(closing(chat))
            chat.wait_for(EDITING)
            return chat

        yield start


@pytest.mark.parametrize("message", [f"Who are{ALT_ENTER}/quit", PASTE.format("Who are\n/quit")])
def test_a_message_of_several_lines_gets_one_reply(start_chat: Callable[[], Terminal], message: str) -> None:
    chat = start_chat()
    chat.type(message)
    chat.wait_for(r"Who are.*\n.*/quit")
    chat.type(ENTER)
    chat.wait_for(f"{SENT}.*{EDITING}")
    chat.type(CTRL_D)
    assert chat.process.wait(30) == 0


def test_earlier_messages_are_kept_where_only_their_owner_can_read_them(
    start_chat: Callable[[], Terminal], tmp_path: Path
) -> None:
    chat = start_chat()
    chat.type(f"/dance{ENTER}")
    chat.wait_for(f"unknown command.*{EDITING}")
    chat.type(f"/quit{ENTER}")
    assert chat.process.wait(30) == 0
    history = tmp_path / "mpt-grpc/chat_history"
    assert stat.S_IMODE(history.stat().st_mode) == 0o600
    chat = start_chat()
    chat.type(UP + UP)
    chat.wait_for("/dance")
    chat.type(ENTER)
    chat.wait_for("unknown command /dance")


def test_tab_completes_commands_and_ctrl_c_discards_a_message(start_chat: Callable[[], Terminal]) -> None:
    chat = start_chat()
    chat.type(f"/sy{TAB}")
    chat.wait_for("stem")
    chat.type(CTRL_C)
    chat.wait_for(f"Press Ctrl-D to quit.*{EDITING}")
    chat.type(f"/he{TAB}")
    chat.wait_for("lp")
    chat.type(ENTER)
    chat.wait_for("/system TEXT .*Alt-Enter ")


def test_a_history_that_cannot_be_written_lasts_as_long_as_the_program(
    start_chat: Callable[[], Terminal], tmp_path: Path
) -> None:
    (tmp_path / "mpt-grpc").touch()
    chat = start_chat()
    chat.type(f"/dance{ENTER}")
    chat.wait_for(f"unknown command.*{EDITING}")
    chat.type(UP)
    chat.wait_for("/dance")

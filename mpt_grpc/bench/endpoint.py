"""What the runner needs of a server: prompts that it accepts, and the times at which a request's tokens arrive."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Protocol

Prompt = Sequence[int] | str
"""Token IDs, or a text."""


@dataclass(frozen=True)
class Answer:
    """A complete stream; see `Timeline` for the fields. Times are those of `time.perf_counter`."""

    message_times_s: tuple[float, ...]
    message_num_tokens: tuple[int, ...]
    num_prompt_tokens: int
    num_output_tokens: int


class RequestFailedError(Exception):
    """A request that failed: its status, by which failures are counted, and the server's reason."""

    def __init__(self, status: str, reason: str = "") -> None:
        super().__init__(f"{status}: {reason}" if reason else status)
        self.status = status


class Endpoint(Protocol):
    """A server under load."""

    @property
    def model(self) -> str:
        """The name of the model."""

    @property
    def max_context_tokens(self) -> int | None:
        """The maximum of prompt and output together; None if the server does not tell."""

    @property
    def prompts(self) -> str:
        """What prompts consist of, for the report."""

    def prompt(self, num_tokens: int, random: Random) -> Prompt:
        """Returns a random prompt."""

    async def send(self, prompt: Prompt, num_output_tokens: int) -> Answer:
        """Sends a request and reads its stream to the end. Raises RequestFailedError."""

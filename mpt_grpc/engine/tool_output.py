"""Separates calls of tools from the text of an output."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from hashlib import blake2b

from mpt_grpc.conversation import ToolCalls
from mpt_grpc.engine.assembly import OutputAssembly
from mpt_grpc.results import Finish, FinishReason, OutputDelta, TokenEvent
from mpt_grpc.text.tool_calls import ToolCallReader

_ENDS_OF_MODEL = (FinishReason.EOS_TOKEN, FinishReason.STOP_TOKEN)
_ENDS = (*_ENDS_OF_MODEL, FinishReason.STOP_STRING)


class ToolOutput:
    """Assembles an output that may call tools: reads the calls out of the text that another assembly returns."""

    def __init__(
        self, output: OutputAssembly, request_id: str, index: int, constraint: ToolCalls, resumed_text: Iterable[str]
    ) -> None:
        """resumed_text: the text that the reader already has of a resumed output."""
        self.finish: Finish | None = None
        self._output, self._resumed_text = output, resumed_text

        def call_id(number: int) -> str:
            """Returns the same ID on every server that continues the request."""
            return f"call_{blake2b(f'{request_id}/{index}/{number}'.encode(), digest_size=12).hexdigest()}"

        self._reader = ToolCallReader(constraint, call_id)

    def resume(self) -> None:
        self._output.resume()
        for text in self._resumed_text:
            self._reader.feed(text)

    def feed(self, event: TokenEvent) -> None:
        self._output.feed(event)

    def take(self) -> OutputDelta | None:
        delta = self._output.take()
        if delta is None:
            return None
        text, calls = self._reader.feed(delta.text)
        self.finish = delta.finish
        if self.finish is not None:
            text += self._reader.finish(is_cut_short=self.finish.reason not in _ENDS_OF_MODEL)
            if self._reader.has_complete_calls and self.finish.reason in _ENDS:
                self.finish = replace(self.finish, reason=FinishReason.TOOL_CALLS)
        return delta._replace(text=text, finish=self.finish, tool_calls=calls)

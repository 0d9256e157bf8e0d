"""Chooses how the outputs of a request are assembled: plain, under guards, or with calls of tools."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from mpt_grpc.conversation import ToolCalls
from mpt_grpc.engine.assembly import GuardedOutput, OutputAssembly, PlainOutput, RequestAssembly
from mpt_grpc.engine.prepare import Preparation, PreparedRequest
from mpt_grpc.engine.tool_output import ToolOutput
from mpt_grpc.results import Finish
from mpt_grpc.text.detokenizer import TextAssembler
from mpt_grpc.text.guards import watch_all

_QUICK_RESUMED, _QUICK_STOP_CHARACTERS = 64, 1024
"""That many resumed tokens are read, and that many characters of stop strings prepared, in less than a millisecond."""


def request_assembly(
    prepared: PreparedRequest, preparation: Preparation, end: Callable[[Finish, int], None]
) -> RequestAssembly:
    """Returns the assembly of a request; `end` ends its output with the given index."""
    request, guards = prepared.request, preparation.guards
    stopping = request.stopping

    def assembler() -> TextAssembler:
        return TextAssembler(
            preparation.tokenizer.detokenizer(prepared.prompt_token_ids, request.skip_special_tokens),
            stopping.stop_strings,
            stopping.include_stop_string,
            stopping.min_new_tokens,
        )

    def resumed_text(resumed: tuple[int, ...]) -> Iterator[str]:
        text = assembler()
        yield from map(text.feed, resumed)
        if guards:  # text that a stop string may begin has been sent, too
            yield text.finish()

    def output(index: int, resumed: tuple[int, ...]) -> OutputAssembly:
        def end_output(finish: Finish) -> None:
            end(finish, index)

        output: OutputAssembly
        if guards:
            output = GuardedOutput(index, assembler(), watch_all(guards), end_output, resumed)
        else:
            output = PlainOutput(index, assembler(), end_output, resumed)
        if not isinstance(request.constraint, ToolCalls):
            return output
        return ToolOutput(output, request.request_id, index, request.constraint, resumed_text(resumed))

    outputs = {index: output(index, resumed) for index, resumed in request.outputs.items()}
    begins_slowly = (
        sum(map(len, request.outputs.values())) > _QUICK_RESUMED
        or sum(map(len, stopping.stop_strings)) > _QUICK_STOP_CHARACTERS
    )
    return RequestAssembly(outputs, request.chunks, is_guarded=bool(guards), begins_slowly=begins_slowly)

"""The client library's results as responses of `/v1/responses`: complete ones, and the events of a stream."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from mpt_grpc.gateway.response_request import ResponseRequest
from mpt_grpc.gateway.responses import Json, finish_reason, token_logprobs
from mpt_grpc_client import AsyncTextStream, Delta, Finish, Generation, ToolCall, ToolCallDelta, Usage

_INCOMPLETE = {"length": "max_output_tokens", "content_filter": "content_filter"}
"""The reasons for which a response is incomplete, by the finish reason of a chat completion."""


@dataclass
class _Message:
    """The text of an output so far."""

    id: str
    pieces: list[str] = field(default_factory=list)
    logprobs: list[Json] = field(default_factory=list)

    def item(self, status: str) -> Json:
        return self._item(status, [_text_part("".join(self.pieces), self.logprobs)])

    def first_events(self) -> Iterator[Json]:
        yield {"type": "response.output_item.added", "item": self._item("in_progress", [])}
        yield {"type": "response.content_part.added", **self._place, "part": _text_part("", [])}

    def event(self, text: str, logprobs: list[Json]) -> Json:
        """Returns the event that adds text to the message."""
        self.pieces.append(text)
        self.logprobs += logprobs
        return {"type": "response.output_text.delta", **self._place, "delta": text, "logprobs": logprobs}

    def last_events(self, status: str) -> Iterator[Json]:
        """Yields the events of the end. They repeat the text, but not the log probabilities, which are large."""
        part = _text_part("".join(self.pieces), [])
        yield {"type": "response.output_text.done", **self._place, "text": part["text"], "logprobs": []}
        yield {"type": "response.content_part.done", **self._place, "part": part}
        yield {"type": "response.output_item.done", "item": self._item(status, [part])}

    @property
    def _place(self) -> Json:
        return {"item_id": self.id, "content_index": 0}

    def _item(self, status: str, content: list[Json]) -> Json:
        return {"id": self.id, "type": "message", "status": status, "role": "assistant", "content": content}


@dataclass
class _Call:
    """A call of a function so far."""

    id: str
    call: ToolCall | ToolCallDelta
    pieces: list[str] = field(default_factory=list)

    def item(self, status: str) -> Json:
        call = {"call_id": self.call.id, "name": self.call.name, "arguments": "".join(self.pieces)}
        return {"id": self.id, "type": "function_call", "status": status, **call}

    def first_events(self) -> Iterator[Json]:
        yield {"type": "response.output_item.added", "item": self.item("in_progress")}

    def event(self, arguments: str) -> Json:
        """Returns the event that adds to the arguments."""
        self.pieces.append(arguments)
        return {"type": "response.function_call_arguments.delta", "item_id": self.id, "delta": arguments}

    def last_events(self, status: str) -> Iterator[Json]:
        item = self.item(status)
        done = {"item_id": self.id, "name": item["name"], "arguments": item["arguments"]}
        yield {"type": "response.function_call_arguments.done", **done}
        yield {"type": "response.output_item.done", "item": item}


class ModelResponse:
    """Builds one response, or the events of one that is streamed."""

    end = b""

    def __init__(self, model: str, request_id: str, request: ResponseRequest) -> None:
        self._model, self._request_id, self._request = model, request_id, request
        self._created_at = int(time.time())
        self._num_events = 0
        self._items: list[_Message | _Call] = []
        self._logprobs: list[Json] = []
        """The log probabilities of tokens whose text has not come yet."""

    def complete(self, generation: Generation) -> Json:
        """Returns the response for a finished generation."""
        (output,) = generation.outputs
        if output.text or not output.tool_calls:
            logprobs = token_logprobs(output.logprobs) if self._request.has_logprobs else []
            self._items.append(_Message(self._item_id("msg"), [output.text], logprobs))
        for call in output.tool_calls:
            self._items.append(_Call(self._item_id("fc"), call, [call.arguments]))
        return self._ended(output.finish, generation.usage)

    async def chunks(self, begin: Callable[[], AsyncTextStream]) -> AsyncIterator[Json]:
        """Yields the events of the stream that `begin` returns. Raises MptGrpcError."""
        async with begin() as stream:
            async for delta in stream.deltas(keep_logprobs=False):
                if not self._num_events:
                    yield self._event("response.created", response=self._response("in_progress"))
                    yield self.empty_chunk()
                for event in self._delta_events(delta):
                    yield event
            result = stream.result
        if not self._items:
            for event in self._begin(_Message(self._item_id("msg"))):
                yield event
        response = self._ended(result.finish, result.usage)
        for event in self._finish_item(response["status"]):
            yield event
        yield self._event(f"response.{response['status']}", response=response)

    def failure(self, error: Exception, _names: Mapping[str, str]) -> Json:
        """Returns the last event of a stream that has begun and failed."""
        why = {"code": "server_error", "message": str(error)}
        response = self._response("failed", output=self._output("incomplete"), error=why)
        return self._event("response.failed", response=response)

    def empty_chunk(self) -> Json:
        """Returns an event without news, which keeps an idle stream alive."""
        return self._event("response.in_progress", response=self._response("in_progress"))

    def _delta_events(self, delta: Delta) -> Iterator[Json]:
        if self._request.has_logprobs:
            self._logprobs += token_logprobs(delta.logprobs)
        message = self._items[-1] if self._items else None
        if delta.text and not isinstance(message, _Message):
            message = _Message(self._item_id("msg"))
            yield from self._begin(message)
        if isinstance(message, _Message) and (delta.text or self._logprobs):
            logprobs, self._logprobs = self._logprobs, []
            yield self._item_event(message.event(delta.text, logprobs))
        for part in delta.tool_calls:
            if part.id:
                yield from self._begin(_Call(self._item_id("fc"), part))
            call = self._items[-1]
            assert isinstance(call, _Call)
            if part.arguments:
                yield self._item_event(call.event(part.arguments))

    def _begin(self, item: _Message | _Call) -> Iterator[Json]:
        if self._items:
            yield from self._finish_item("completed")
        self._items.append(item)
        yield from map(self._item_event, item.first_events())

    def _finish_item(self, status: str) -> Iterator[Json]:
        yield from map(self._item_event, self._items[-1].last_events(status))

    def _item_event(self, event: Json) -> Json:
        return self._event(event.pop("type"), output_index=len(self._items) - 1, **event)

    @cached_property
    def _envelope(self) -> Json:
        """What does not change. Built once the server has accepted the request, and so limited its size."""
        return {
            "id": f"resp_{self._request_id}",
            "object": "response",
            "created_at": self._created_at,
            "model": self._model,
            "background": False,
            "previous_response_id": None,
            "store": False,
            **self._request.settings(),
        }

    def _event(self, type_: str, **fields: Any) -> Json:
        number = self._num_events
        self._num_events += 1
        return {"type": type_, "sequence_number": number, **fields}

    def _item_id(self, prefix: str) -> str:
        return f"{prefix}_{self._request_id}-{len(self._items)}"

    def _ended(self, finish: Finish, usage: Usage) -> Json:
        reason = _INCOMPLETE.get(finish_reason(finish))
        status = "incomplete" if reason else "completed"
        response = self._response(status, output=self._output(status), usage=_usage(usage))
        return {**response, "incomplete_details": {"reason": reason} if reason else None}

    def _output(self, last_status: str) -> list[Json]:
        """Returns the items; all but the last are complete."""
        last = len(self._items) - 1
        return [item.item(last_status if index == last else "completed") for index, item in enumerate(self._items)]

    def _response(
        self, status: str, *, output: Sequence[Json] = (), usage: Json | None = None, error: Json | None = None
    ) -> Json:
        now = {"status": status, "error": error, "incomplete_details": None, "output": output, "usage": usage}
        return {**self._envelope, **now}


def _text_part(text: str, logprobs: list[Json]) -> Json:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}


def _usage(usage: Usage) -> Json:
    return {
        "input_tokens": usage.num_prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.num_cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.num_output_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.num_prompt_tokens + usage.num_output_tokens,
    }

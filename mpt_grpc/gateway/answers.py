"""The client library's results in OpenAI's form: objects, and the chunks of a stream."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Sequence
from typing import Any

from mpt_grpc_client import Delta, Finish, FinishReason, Generation, TokenLogprob, Usage

Json = dict[str, Any]

_LENGTH = (FinishReason.MAX_NEW_TOKENS, FinishReason.CONTEXT_LENGTH, FinishReason.TIME_LIMIT)


def usage(usages: Iterable[Usage]) -> Json:
    """The sum over the prompts of a request."""
    usages = tuple(usages)
    num_prompt = sum(usage.num_prompt_tokens for usage in usages)
    num_output = sum(usage.num_output_tokens for usage in usages)
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_output,
        "total_tokens": num_prompt + num_output,
        "prompt_tokens_details": {"cached_tokens": sum(usage.num_cached_tokens for usage in usages)},
    }


class ChatAnswer:
    """The answer to a chat completion: a message, or the call of the function that had to be called."""

    def __init__(self, model: str, request_id: str | None, function_name: str | None = None) -> None:
        self._frame = _frame("chatcmpl", model, request_id)
        self._function_name = function_name

    def whole(self, generation: Generation, with_logprobs: bool) -> Json:
        choices = [
            {
                "index": output.index,
                "message": {"role": "assistant", "refusal": None, **self._content(output.text)},
                "logprobs": _chat_logprobs(output.logprobs) if with_logprobs else None,
                "finish_reason": self._finish_reason(output.finish),
            }
            for output in generation.outputs
        ]
        return {**self._frame, "object": "chat.completion", "choices": choices, "usage": usage([generation.usage])}

    def first_chunk(self, index: int) -> Json:
        content: Json = {"content": ""}
        if self._function_name is not None:
            content = {"content": None, "tool_calls": [{"index": 0, **_call(self._function_name, "")}]}
        return self._chunk(index, {"role": "assistant", **content}, None, None)

    def chunk(self, delta: Delta, with_logprobs: bool) -> Json:
        logprobs = _chat_logprobs(delta.logprobs) if with_logprobs and delta.logprobs else None
        content: Json = {"content": delta.text}
        if self._function_name is not None:
            content = {"tool_calls": [{"index": 0, "function": {"arguments": delta.text}}]}
        return self._chunk(delta.index, content if delta.text else {}, logprobs, delta.finish)

    def idle_chunk(self) -> Json:
        """Says nothing, but that the answer is still being made."""
        return self._chunk(0, {}, None, None)

    def usage_chunk(self, usages: Iterable[Usage]) -> Json:
        return {**self._frame, "object": "chat.completion.chunk", "choices": [], "usage": usage(usages)}

    def _content(self, text: str) -> Json:
        if self._function_name is None:
            return {"content": text}
        return {"content": None, "tool_calls": [_call(self._function_name, text)]}

    def _chunk(self, index: int, delta: Json, logprobs: Json | None, finish: Finish | None) -> Json:
        choice = {
            "index": index,
            "delta": delta,
            "logprobs": logprobs,
            "finish_reason": None if finish is None else self._finish_reason(finish),
        }
        return {**self._frame, "object": "chat.completion.chunk", "choices": [choice]}

    def _finish_reason(self, finish: Finish) -> str:
        reason = finish_reason(finish)
        return "tool_calls" if reason == "stop" and self._function_name is not None else reason


class TextAnswer:
    """The answer to a completion, which may have several prompts: the choices of one follow those of another."""

    def __init__(self, model: str, request_id: str | None) -> None:
        self._frame = {**_frame("cmpl", model, request_id), "object": "text_completion"}

    def whole(self, choices: list[Json], usages: Iterable[Usage]) -> Json:
        return {**self._frame, "choices": choices, "usage": usage(usages)}

    def chunk(self, choice: Json) -> Json:
        return {**self._frame, "choices": [choice]}

    def idle_chunk(self) -> Json:
        """Says nothing, but that the answer is still being made."""
        return self.chunk(text_choice(0, "", None, None))

    def usage_chunk(self, usages: Iterable[Usage]) -> Json:
        return self.whole([], usages)


def text_choice(index: int, text: str, logprobs: Json | None, finish: Finish | None) -> Json:
    return {
        "index": index,
        "text": text,
        "logprobs": logprobs,
        "finish_reason": None if finish is None else finish_reason(finish),
    }


def text_logprobs(logprobs: Sequence[TokenLogprob], offset: int, num_top: int, first: str | None = None) -> Json:
    """Of tokens whose text begins `offset` characters into the choice's; `first` is the text of a prompt's first
    token, which has no log probability."""
    tokens = [] if first is None else [first]
    values: list[float | None] = [] if first is None else [None]
    top: list[Json | None] = [] if first is None else [None]
    for logprob in logprobs:
        tokens.append(_token(logprob.token_bytes))
        values.append(logprob.logprob)
        top.append({_token(other.token_bytes): other.logprob for other in logprob.top_logprobs})
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token)
    return {
        "tokens": tokens,
        "token_logprobs": values,
        "top_logprobs": top if num_top else None,
        "text_offset": offsets,
    }


def finish_reason(finish: Finish) -> str:
    """OpenAI's word for why an output ended."""
    if finish.reason is FinishReason.CONTENT_FILTER:
        return "content_filter"
    return "length" if finish.reason in _LENGTH else "stop"


def _call(name: str, arguments: str) -> Json:
    return {
        "id": f"call_{uuid.uuid4().hex}",
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    }


def _chat_logprobs(logprobs: Iterable[TokenLogprob]) -> Json:
    content = [
        {
            "token": _token(logprob.token_bytes),
            "bytes": list(logprob.token_bytes),
            "logprob": logprob.logprob,
            "top_logprobs": [
                {"token": _token(top.token_bytes), "bytes": list(top.token_bytes), "logprob": top.logprob}
                for top in logprob.top_logprobs
            ],
        }
        for logprob in logprobs
    ]
    return {"content": content, "refusal": None}


def _token(token: bytes) -> str:
    """A token's text; one that is no whole characters is spelt as OpenAI does it."""
    try:
        return token.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token)


def _frame(kind: str, model: str, request_id: str | None) -> Json:
    return {"id": f"{kind}-{request_id or uuid.uuid4().hex}", "created": int(time.time()), "model": model}

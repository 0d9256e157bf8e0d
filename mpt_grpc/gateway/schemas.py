"""The schemas of responses, for `/openapi.json`. `responses` builds the responses."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

FinishReason = Literal["stop", "length", "tool_calls", "content_filter"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class PromptTokensDetails(_Strict):
    cached_tokens: int = Field(description="Prompt tokens that were read from the prefix cache.")


class Usage(_Strict):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class FunctionCall(_Strict):
    name: str
    arguments: str = Field(description="JSON that conforms to the parameters of the function.")


class ToolCall(_Strict):
    id: str
    type: Literal["function"]
    function: FunctionCall


class AssistantMessage(_Strict):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[ToolCall] = Field(default=[], description="The calls of `tools`.")


class ChatChoice(_Strict):
    index: int
    message: AssistantMessage
    logprobs: dict[str, Any] | None
    finish_reason: FinishReason


class ChatCompletion(_Strict):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class ChatChunkChoice(_Strict):
    index: int
    delta: dict[str, Any] = Field(description="The new part of the message.")
    logprobs: dict[str, Any] | None
    finish_reason: FinishReason | None


class ChatCompletionChunk(_Strict):
    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = Field(default=None, description="In the last chunk, with stream_options.include_usage.")


class TextLogprobs(_Strict):
    tokens: list[str]
    token_logprobs: list[float | None] = Field(description="null for the first token of a prompt.")
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class TextChoice(_Strict):
    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: FinishReason | None = Field(description="null only in a chunk before the last of the choice.")


class Completion(_Strict):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage | None = Field(
        default=None, description="Always set outside of a stream; in a stream, in the last chunk with include_usage."
    )


class OutputText(_Strict):
    type: Literal["output_text"]
    text: str
    annotations: list[Any]
    logprobs: list[dict[str, Any]] = Field(description="Empty unless included.")


class OutputMessage(_Strict):
    type: Literal["message"]
    id: str
    status: Literal["in_progress", "completed", "incomplete"]
    role: Literal["assistant"]
    content: list[OutputText]


class OutputFunctionCall(_Strict):
    type: Literal["function_call"]
    id: str
    status: Literal["in_progress", "completed", "incomplete"]
    call_id: str
    name: str
    arguments: str = Field(description="JSON that conforms to the parameters of the function.")


class InputTokensDetails(_Strict):
    cached_tokens: int = Field(description="Input tokens that were read from the prefix cache.")
    cache_write_tokens: int


class OutputTokensDetails(_Strict):
    reasoning_tokens: int


class ResponseUsage(_Strict):
    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class IncompleteDetails(_Strict):
    reason: Literal["max_output_tokens", "content_filter"]


class ModelResponse(_Strict):
    id: str
    object: Literal["response"]
    created_at: int
    model: str
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    output: list[OutputMessage | OutputFunctionCall]
    usage: ResponseUsage | None
    incomplete_details: IncompleteDetails | None
    error: dict[str, Any] | None
    background: Literal[False]
    previous_response_id: None
    store: Literal[False] = Field(description="Responses are not stored.")
    # These repeat the request.
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    parallel_tool_calls: bool
    temperature: float | None
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_logprobs: int
    top_p: float | None
    truncation: Literal["auto", "disabled"]


class ResponseEvent(BaseModel):
    model_config = ConfigDict(extra="allow")

    type: str
    sequence_number: int
    response: ModelResponse | None = Field(default=None, description="In events about the whole response.")


class Model(_Strict):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int = Field(description="The maximum tokens of a request, prompt and output together.")


class ModelList(_Strict):
    object: Literal["list"]
    data: list[Model]


class Error(_Strict):
    message: str
    type: str
    param: str | None = Field(description="The path of the invalid field.")
    code: str | None


class ErrorResponse(_Strict):
    error: Error

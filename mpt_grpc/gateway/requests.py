"""The bodies of requests and their translation into the client library's options.

The fields are those of OpenAI's API and vLLM's extensions to it. The gRPC server checks their ranges.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Annotated, Any, Self, cast

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from mpt_grpc.gateway.errors import FIELD_NAMES, BadRequestError
from mpt_grpc.gateway.messages import ChatMessage, check_template_kwargs, message_fields
from mpt_grpc.gateway.output_formats import ResponseFormat, StructuredOutputs
from mpt_grpc.gateway.strict import Many, Some, Strict
from mpt_grpc.gateway.tools import Tool, ToolChoice, tool_options
from mpt_grpc.limits import MAX_LOGPROBS, RANGES
from mpt_grpc_client import (
    Choice,
    Constraint,
    GenerateOptions,
    JsonObject,
    JsonSchema,
    LarkGrammar,
    Message,
    Regex,
)

Uint = Annotated[int, Field(ge=0, lt=1 << 32)]
"""An integer that fits in the gRPC API's uint32 fields."""
_MAX_TOKENS = 16
"""The `max_tokens` of text completions that do not set it, as OpenAI's."""
_MAX_PRIORITY = int(RANGES["priority"].high)
_MAX_ALTERNATIVES = int(RANGES["output_options.top_logprobs"].high)
Text = Annotated[str, Field(min_length=1)]
Seed = Annotated[int, Field(ge=0, lt=1 << 64)]


def _token_id(key: str) -> int | str:
    """Returns the number that a key is, as JSON writes it: two keys are never the same token."""
    return int(key) if re.fullmatch(r"0|[1-9]\d{0,9}", key, re.ASCII) else key


class StreamOptions(Strict):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None
    continuous_usage_stats: bool | None = None


class GenerationFields(Strict):
    """The fields shared by all endpoints that generate text."""

    model: str = ""
    temperature: float | None = None
    top_p: float | None = None
    seed: Seed | None = None
    stop: str | Many[str] | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: dict[Annotated[Uint, BeforeValidator(_token_id)], float] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # Extensions of vLLM.
    top_k: Annotated[int, Field(ge=-1, lt=1 << 32)] | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: Uint | None = None
    stop_token_ids: Many[Uint] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    allowed_token_ids: Many[Uint] | None = None
    truncate_prompt_tokens: Uint | None = None
    cache_salt: str | None = None
    max_whitespace: Uint | None = None
    chunk_tokens: Uint | None = None
    chunk_interval: Annotated[float, Field(gt=0, le=86_400)] | None = None
    priority: Annotated[int, Field(ge=-_MAX_PRIORITY, le=_MAX_PRIORITY)] | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: Many[str] | None = None
    guided_grammar: str | None = None
    structured_outputs: StructuredOutputs | None = None

    @property
    def includes_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def options(self) -> GenerateOptions:
        """Returns the client library's options. Raises BadRequestError."""
        top_k = None if self.top_k == -1 else self.top_k  # In vLLM, -1 keeps all tokens.
        return GenerateOptions(
            min_new_tokens=self.min_tokens,
            temperature=self.temperature,
            top_k=top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            typical_p=self.typical_p,
            seed=self.seed,
            repetition_penalty=self.repetition_penalty,
            frequency_penalty=self.frequency_penalty,
            presence_penalty=self.presence_penalty,
            logit_bias=self.logit_bias,
            allowed_token_ids=self.allowed_token_ids,
            constraint=self.constraint[1] if self.constraint else None,
            max_whitespace=self.max_whitespace,
            stop_strings=[self.stop] if isinstance(self.stop, str) else self.stop,
            stop_token_ids=self.stop_token_ids,
            include_stop_string=self.include_stop_str_in_output,
            ignore_eos=self.ignore_eos,
            skip_special_tokens=self.skip_special_tokens,
            truncate_prompt_tokens=self.truncate_prompt_tokens,
            priority=None if self.priority is None else -self.priority,  # In vLLM, lower values run first.
            cache_salt=self.cache_salt,
            chunk_tokens=self.chunk_tokens,
            chunk_interval=self.chunk_interval,
        )

    @property
    def field_names(self) -> Mapping[str, str]:
        """The names of this request's fields for the client library's options, where they differ."""
        stop = {"stop_strings[0]": "stop"} if isinstance(self.stop, str) else {}
        return {**FIELD_NAMES, "constraint": self.constraint[0] if self.constraint else "", **stop}

    @cached_property
    def constraint(self) -> tuple[str, Constraint] | None:
        """The field that constrains the output, and its constraint. Raises BadRequestError if several do."""
        given = [(name, constraint) for name, constraint in self._constraints() if constraint is not None]
        if len(given) > 1:
            names = ", ".join(name for name, _ in given)
            raise BadRequestError(f"more than one constraint: {names}; set only one", given[1][0])
        return given[0] if given else None

    @model_validator(mode="after")
    def _serialize(self) -> Self:
        """Serializes the schema of a constraint where the body is parsed, since it may be long."""
        _ = self.constraint
        return self

    def _constraints(self) -> Iterator[tuple[str, Constraint | None]]:
        outputs = self.structured_outputs or StructuredOutputs()
        yield "structured_outputs.json_object", JsonObject() if outputs.json_object else None
        for prefix, schema, regex, choice, grammar in (
            ("structured_outputs.", outputs.json_, outputs.regex, outputs.choice, outputs.grammar),
            ("guided_", self.guided_json, self.guided_regex, self.guided_choice, self.guided_grammar),
        ):
            yield f"{prefix}json", None if schema is None else JsonSchema(schema)
            yield f"{prefix}regex", None if regex is None else Regex(regex)
            yield f"{prefix}choice", None if choice is None else Choice(*choice)
            yield f"{prefix}grammar", None if grammar is None else LarkGrammar(grammar)


class CompletionFields(GenerationFields):
    """The fields shared by chat and text completions."""

    n: Uint | None = None
    max_tokens: Uint | None = None
    response_format: ResponseFormat | None = None

    def options(self) -> GenerateOptions:
        return {**super().options(), "num_sequences": self.n, "max_new_tokens": self.max_tokens}

    def _constraints(self) -> Iterator[tuple[str, Constraint | None]]:
        if self.response_format is not None:
            yield self.response_format.constraint
        yield from super()._constraints()


class ConversationFields(GenerationFields):
    """The fields shared by chat completions and responses; vLLM's."""

    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: Annotated[dict[str, Any], AfterValidator(check_template_kwargs)] | None = None

    def options(self) -> GenerateOptions:
        templated: GenerateOptions = {
            "add_generation_prompt": self.add_generation_prompt,
            "continue_final_message": self.continue_final_message,
            "chat_template_kwargs": self.chat_template_kwargs,
        }
        return {**super().options(), **templated}


class ChatCompletionRequest(ConversationFields, CompletionFields):
    messages: Some[ChatMessage]
    max_completion_tokens: Uint | None = None
    logprobs: bool | None = None
    top_logprobs: Uint | None = None
    drop_oldest_turns: bool = False
    tools: Many[Tool] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None

    @property
    def conversation(self) -> list[Message]:
        return [message.message() for message in self.messages]

    @property
    def has_logprobs(self) -> bool:
        return bool(self.logprobs)

    @property
    def field_names(self) -> Mapping[str, str]:
        # The limit has two names; errors use the one that was sent.
        newer = {} if self.max_completion_tokens is None else {"max_new_tokens": "max_completion_tokens"}
        tools = {f"tools[{index}]": f"tools[{index}].function" for index in range(len(self.tools or ()))}
        messages = message_fields(self.messages, is_prefixed=not self.continue_final_message)
        return {**super().field_names, "allowed_tools": "tool_choice", **newer, **tools, **messages}

    def options(self) -> GenerateOptions:
        options = super().options()
        if self.max_completion_tokens is not None:
            options["max_new_tokens"] = self.max_completion_tokens
        if self.top_logprobs and not self.logprobs:
            raise BadRequestError("top_logprobs: requires logprobs; set it to true", "top_logprobs")
        options["drop_oldest_turns"] = self.drop_oldest_turns
        if self.messages[-1].prefix:
            options["continue_final_message"] = True
        functions = [tool.function for tool in self.tools or ()]
        options.update(tool_options(functions, self.tool_choice, self.parallel_tool_calls))
        options["return_logprobs"] = self.has_logprobs
        options["top_logprobs"] = self.top_logprobs
        return options


class CompletionRequest(CompletionFields):
    prompt: Text | Some[Text] | Some[Uint] | Some[Some[Uint]]
    echo: bool = False
    logprobs: Annotated[Uint | None, BeforeValidator(lambda value: None if value is False else value)] = None
    best_of: Uint | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, each a text or token IDs."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return cast("list[str | list[int]]", self.prompt)

    def check_num_outputs(self, limit: int) -> None:
        """Raises BadRequestError if the prompts have more outputs than `limit` together."""
        num_prompts, n = len(self.prompts), self.n or 1
        if num_prompts * n > limit:
            why = f"{num_prompts} prompts with {n} outputs each exceed the limit of {limit} outputs in one request"
            raise BadRequestError(f"n: {why}", "n")

    def check_num_logprobs(self) -> None:
        """Raises BadRequestError if the outputs of all prompts would have too many log probabilities together."""
        if self.logprobs is not None:
            num_tokens = (
                len(self.prompts) * (self.n or 1) * (_MAX_TOKENS if self.max_tokens is None else self.max_tokens)
            )
            num_logprobs = num_tokens * (1 + min(self.logprobs, _MAX_ALTERNATIVES))
            if num_logprobs > MAX_LOGPROBS:
                why = f"up to {num_tokens} tokens would have {num_logprobs} log probabilities with their alternatives"
                raise BadRequestError(
                    f"logprobs: {why}; at most {MAX_LOGPROBS} are returned in one response", "logprobs"
                )

    @property
    def field_names(self) -> Mapping[str, str]:
        # For text completions, `logprobs` is the number of alternatives.
        return {**super().field_names, "top_logprobs": "logprobs"}

    def options(self) -> GenerateOptions:
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise BadRequestError("best_of: must equal n; set n instead", "best_of")
        options = super().options()
        if self.max_tokens is None:
            options["max_new_tokens"] = _MAX_TOKENS
        options["return_logprobs"] = self.logprobs is not None
        options["return_prompt_logprobs"] = self.echo and self.logprobs is not None
        options["return_prompt_token_ids"] = self.echo
        options["top_logprobs"] = self.logprobs
        return options

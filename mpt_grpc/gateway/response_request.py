"""The body of a request to `/v1/responses`, and its translation into messages and the client library's options."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, field_validator

from mpt_grpc.gateway.errors import BadRequestError
from mpt_grpc.gateway.messages import RefusalPart
from mpt_grpc.gateway.output_formats import format_constraint
from mpt_grpc.gateway.requests import ConversationFields, Text, Uint
from mpt_grpc.gateway.strict import Many, Some, Strict, check_num_items, kind_of_content
from mpt_grpc.gateway.tools import Function, FunctionChoice, FunctionTool, chosen, tool_options
from mpt_grpc_client import Constraint, GenerateOptions, Message, Role, ToolCall

_LOGPROBS = "message.output_text.logprobs"
_ROLES = {"user": Role.USER, "assistant": Role.ASSISTANT}


class TextItemPart(Strict):
    type: Literal["input_text", "output_text"]
    text: str
    # What a response adds to its parts, and what is sent for OpenAI's cache.
    annotations: Any = None
    logprobs: Any = None
    parsed: Any = None
    prompt_cache_breakpoint: Any = None


ItemParts = Many[Annotated[TextItemPart | RefusalPart, Field(discriminator="type")]]
ItemContent = Annotated[
    Annotated[str, Tag("text")] | Annotated[ItemParts, Tag("parts")], Discriminator(kind_of_content)
]


class MessageItem(Strict):
    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: ItemContent
    # What a response adds to its items.
    id: str | None = None
    status: str | None = None
    phase: str | None = None

    _check_num_items = field_validator("content", mode="before")(check_num_items)


class FunctionCallItem(BaseModel):
    """A call, as this or another server has sent it."""

    model_config = ConfigDict(extra="ignore")

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str


class FunctionCallOutputItem(Strict):
    type: Literal["function_call_output"]
    call_id: str
    output: ItemContent
    # What clients add; `call_id` identifies the call.
    id: str | None = None
    status: str | None = None
    name: str | None = None
    namespace: str | None = None
    caller: Any = None

    _check_num_items = field_validator("output", mode="before")(check_num_items)


class ReasoningItem(BaseModel):
    """What another server's model thought. Ignored, as in the messages of a chat completion."""

    model_config = ConfigDict(extra="ignore")

    type: Literal["reasoning"]


class ItemReference(BaseModel):
    """A reference to an item that OpenAI's server would have stored. Refused by `ResponseRequest.conversation`."""

    model_config = ConfigDict(extra="ignore")

    type: Literal["item_reference"]


def _item_type(item: Any) -> str:
    type_ = item.get("type") if isinstance(item, dict) else getattr(item, "type", None)
    return type_ if isinstance(type_, str) else "message"


Item = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[FunctionCallItem, Tag("function_call")]
    | Annotated[FunctionCallOutputItem, Tag("function_call_output")]
    | Annotated[ReasoningItem, Tag("reasoning")]
    | Annotated[ItemReference, Tag("item_reference")],
    Discriminator(_item_type),
]


Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=16)
]


class TextFormat(Strict):
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class TextOptions(Strict):
    format: TextFormat | None = None
    verbosity: str | None = None
    """Ignored."""


class ResponseRequest(ConversationFields):
    input: Annotated[Annotated[Text, Tag("text")] | Annotated[Some[Item], Tag("parts")], Discriminator(kind_of_content)]
    instructions: str | None = None
    max_output_tokens: Uint | None = None
    text: TextOptions | None = None
    tools: Many[FunctionTool] | None = None
    tool_choice: FunctionChoice | None = None
    parallel_tool_calls: bool | None = None
    truncation: Literal["auto", "disabled"] | None = None
    include: (
        Many[
            Literal[
                "message.output_text.logprobs",
                # The following concern what is never in a response here.
                "reasoning.encrypted_content",
                "file_search_call.results",
                "web_search_call.results",
                "web_search_call.action.sources",
                "message.input_image.image_url",
                "computer_call_output.output.image_url",
                "code_interpreter_call.outputs",
            ]
        ]
        | None
    ) = None
    top_logprobs: Uint | None = None
    metadata: Metadata | None = None
    background: Literal[False] | None = None

    @property
    def has_logprobs(self) -> bool:
        return _LOGPROBS in (self.include or ())

    @property
    def conversation(self) -> list[Message]:
        """The instructions and the input as messages."""
        return self._messages_and_names[0]

    @property
    def field_names(self) -> Mapping[str, str]:
        names = {"allowed_tools": "tool_choice", "max_new_tokens": "max_output_tokens"}
        messages = {"prompt": "input", "prompt.tool_calls": "input", **self._messages_and_names[1]}
        return {**super().field_names, **names, **messages}

    def options(self) -> GenerateOptions:
        if self.top_logprobs and not self.has_logprobs:
            raise BadRequestError(f"top_logprobs: requires {_LOGPROBS!r} in include; add it", "top_logprobs")
        options = super().options()
        options["max_new_tokens"] = self.max_output_tokens
        options["drop_oldest_turns"] = self.truncation == "auto"
        options.update(tool_options(self.tools or (), chosen(self.tool_choice), self.parallel_tool_calls))
        options["return_logprobs"] = self.has_logprobs
        options["top_logprobs"] = self.top_logprobs
        return options

    def settings(self) -> dict[str, Any]:
        """Returns the fields that the response repeats."""
        text_format = self.text and self.text.format
        choice = self.tool_choice or "auto"
        return {
            "instructions": self.instructions,
            "max_output_tokens": self.max_output_tokens,
            "metadata": self.metadata or {},
            "parallel_tool_calls": self.parallel_tool_calls is not False,
            "temperature": self.temperature,
            "text": {"format": text_format.model_dump(by_alias=True, exclude_none=True) if text_format else _PLAIN},
            "tool_choice": choice if isinstance(choice, str) else choice.model_dump(),
            "tools": [
                {name: getattr(tool, name) for name in ("type", *Function.model_fields)} for tool in self.tools or ()
            ],
            "top_logprobs": self.top_logprobs or 0,
            "top_p": self.top_p,
            "truncation": self.truncation or "disabled",
        }

    def _constraints(self) -> Iterator[tuple[str, Constraint | None]]:
        if self.text is not None and (form := self.text.format) is not None:
            yield format_constraint(form.type, form.schema_, "text.format", "text.format.schema")
        yield from super()._constraints()

    @cached_property
    def _messages_and_names(self) -> tuple[list[Message], Mapping[str, str]]:
        """The messages, and the field or item from which each message and call comes, by its path in the prompt."""
        messages: list[Message] = []
        names: dict[str, str] = {}

        def add(message: Message, name: str) -> None:
            names[f"prompt[{len(messages)}]"] = name
            messages.append(message)

        if self.instructions:
            add(Message(Role.SYSTEM, self.instructions), "instructions")
        if isinstance(self.input, str):
            add(Message(Role.USER, self.input), "input")
            return messages, names
        for index, item in enumerate(self.input):
            name = f"input[{index}]"
            if isinstance(item, MessageItem):
                add(Message(_ROLES.get(item.role, Role.SYSTEM), _text(item.content)), name)
            elif isinstance(item, FunctionCallOutputItem):
                names[f"prompt[{len(messages)}].tool_call_id"] = f"{name}.call_id"
                add(Message(Role.TOOL, _text(item.output), tool_call_id=item.call_id), name)
            elif isinstance(item, FunctionCallItem):
                if not messages or messages[-1].role is not Role.ASSISTANT:
                    names[f"prompt[{len(messages)}].role"] = name
                    add(Message(Role.ASSISTANT, ""), name)
                calls = messages[-1].tool_calls
                place = f"prompt[{len(messages) - 1}].tool_calls[{len(calls)}]"
                names[place], names[f"{place}.id"] = name, f"{name}.call_id"
                call = ToolCall(item.call_id, item.name, item.arguments)
                messages[-1] = replace(messages[-1], tool_calls=[*calls, call])
            elif isinstance(item, ItemReference):
                why = "an item_reference is not supported, since items are not stored; send the item itself"
                raise BadRequestError(f"{name}: {why}, as clients do if store is false", name)
        if not messages:
            raise BadRequestError("input: has no message, call or output; add one", "input")
        return messages, names


_PLAIN = {"type": "text"}


def _text(content: str | ItemParts) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)

"""How each endpoint handles the fields that its model does not have, and what it says of invalid values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from pydantic_core import ErrorDetails


@dataclass(frozen=True)
class FieldRules:
    """How the fields of an endpoint are handled, besides those of its model."""

    ignored: frozenset[str] = frozenset()
    """Fields that SDKs send and that do not affect what is generated here."""
    refused: Mapping[str, str] = field(default_factory=dict)
    """Fields of OpenAI's API, and one of vLLM's, that would change the response and are not supported: the reasons."""
    expected: Mapping[str, str] = field(default_factory=dict)
    """The valid values of fields with several types, for each of which Pydantic would report its own error."""
    equivalents: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """The fields that do the same as one of another endpoint or of Anthropic's API, the likeliest first."""


_IGNORED = "user store service_tier safety_identifier prompt_cache_key prompt_cache_options prompt_cache_retention"
_REFUSED = {
    "chat_template": "not supported per request; set it on the server, with --chat-template",
    "moderation": "not supported; set a guard on the server",
}
_EXPECTED = {
    "stop": "must be a string or a list of strings",
    "priority": "must be an integer from -100 to 100",
    "seed": "must be an integer from 0 to 2^64 - 1",
    "logit_bias": "must map token IDs to numbers",
    "guided_json": "must be a JSON schema",
    "structured_outputs.json": "must be a JSON schema",
    "tool_choice": "must be none, auto, required, a function in tools, or allowed_tools",
}
_EXPECTED_MESSAGES = {
    "messages": "must be a list of at least one message, each with a role and content",
    "messages[]": "must be an object with a role and content",
    "messages[].role": "must be system, developer, user, assistant or tool",
    "messages[].tool_calls": "must be a list of calls, each with an id and a function with its name and arguments",
    "messages[].function_call": "not supported; use tool_calls",
    "messages[].audio": "not supported",
    "messages[].content": "must be text, or a list of parts of type text",
    "messages[].content[]": "must be a part of type text; images, audio and files cannot be sent",
}
COMPLETION_RULES = FieldRules(
    frozenset(f"{_IGNORED} metadata reasoning_effort verbosity modalities".split()),
    {
        "functions": "not supported; use tools",
        "function_call": "not supported; use tool_choice",
        "suffix": "not supported; the model can only continue a prompt",
        "audio": "not supported",
        "prediction": "not supported",
        "web_search_options": "not supported",
        **_REFUSED,
    },
    {
        **_EXPECTED,
        "prompt": "must be text, a list of token IDs, or a list of either, and not empty",
        **_EXPECTED_MESSAGES,
    },
    {
        "input": ("messages", "prompt"),
        "instructions": ("messages", "prompt"),
        "max_output_tokens": ("max_completion_tokens", "max_tokens"),
        "max_completion_tokens": ("max_tokens",),
        "max_new_tokens": ("max_tokens",),
        "messages": ("prompt",),
        "prompt": ("messages",),
        "stop_sequences": ("stop",),
        "system": ("messages", "prompt"),
        "text": ("response_format",),
    },
)
"""The rules of chat and text completions."""
RESPONSE_RULES = FieldRules(
    frozenset(f"{_IGNORED} reasoning max_tool_calls image access_programs".split()),
    {
        "previous_response_id": "not supported, since responses are not stored; send the conversation as input",
        "conversation": "not supported, since conversations are not stored; send the conversation as input",
        "prompt": "not supported, since prompts are not stored; send instructions and input",
        "background_options": "not supported, since responses are not stored; read the response, or its stream",
        "context_management": "not supported; shorten the input, or set truncation to auto",
        **_REFUSED,
    },
    {
        **_EXPECTED,
        "background": "must be false, since responses are not stored",
        "input": "must be text, or a list of items of type message, function_call, function_call_output or reasoning,"
        " and not empty",
        "input[]": "must be an item of type message, function_call, function_call_output or reasoning",
        "input[].role": "must be system, developer, user or assistant",
        "input[].content": "must be text, or a list of parts of type input_text or output_text",
        "input[].content[]": "must be a part of type input_text or output_text; images, audio and files cannot be sent",
        "input[].call_id": "must be text, the call_id of a call",
        "input[].name": "must be text, the name of a function",
        "input[].arguments": "must be JSON, as text",
        "input[].output": "must be text, or a list of parts of type input_text",
        "input[].output[]": "must be a part of type input_text; images and files cannot be sent",
        "metadata": "must map at most 16 names, of up to 64 characters, to text of up to 512",
        "tools.type": "must be function; the server has no tools of its own",
    },
    {
        **dict.fromkeys(("max_tokens", "max_completion_tokens", "max_new_tokens"), ("max_output_tokens",)),
        "messages": ("input",),
        "logprobs": ("include",),
        "response_format": ("text",),
        "stop_sequences": ("stop",),
        "system": ("instructions",),
    },
)
"""The rules of responses."""
TOKENIZATION_RULES = FieldRules(COMPLETION_RULES.ignored, expected=_EXPECTED_MESSAGES)

_REASONS = {
    **dict.fromkeys(("bool_type", "bool_parsing"), "must be true or false"),
    **dict.fromkeys(("dict_type", "model_type", "model_attributes_type"), "must be an object"),
    **dict.fromkeys(("float_type", "float_parsing"), "must be a number"),
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float"), "must be an integer"),
    "greater_than": "must be greater than {gt:g}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le}",
    "list_type": "must be a list",
    "literal_error": "must be {expected}",
    "missing": "required",
    "none_required": "must be null",
    "string_too_long": "more than {max_length} characters",
    "string_too_short": "must not be empty",
    "string_type": "must be a string",
    "too_long": "more than {max_length} items",
    "too_short": "must not be empty",
}
"""What is wrong with a value, by the type of Pydantic's error."""


def reason(error: ErrorDetails) -> str:
    """Returns what is wrong with a value."""
    return _REASONS.get(error["type"], "not valid").format(**error.get("ctx", {}))

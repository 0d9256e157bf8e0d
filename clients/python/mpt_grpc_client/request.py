"""The translation of a call's arguments into the API's request."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any, Unpack, cast, get_type_hints

from google.protobuf.duration_pb2 import Duration

from mpt_grpc_client.constraints import Choice, JsonObject, JsonSchema, LarkGrammar, Regex
from mpt_grpc_client.conversation import conversation
from mpt_grpc_client.errors import FieldViolation, InvalidRequestError
from mpt_grpc_client.messages import is_message
from mpt_grpc_client.options import GenerateOptions, RepetitionGuard
from mpt_grpc_client.prompts import MessageLike, Prompt
from mpt_grpc_client.proto.v1 import text_generation_pb2 as pb

_OTHER_NAMES = {
    **dict.fromkeys(("max_tokens", "max_length", "max_completion_tokens"), "max_new_tokens"),
    **dict.fromkeys(("n", "num_return_sequences"), "num_sequences"),
    **dict.fromkeys(("json_schema", "schema", "response_format"), "constraint=JsonSchema(...)"),
    "choice": "constraint=Choice(...)",
    "json_object": "constraint=JsonObject()",
    "lark_grammar": "constraint=LarkGrammar(...)",
    "logprobs": "return_logprobs",
    "min_tokens": "min_new_tokens",
    "regex": "constraint=Regex(...)",
    "stop": "stop_strings",
}
"""The options that other interfaces and libraries call by these names."""


_KINDS_OF_TYPES: dict[Any, str] = {
    float | None: "a number",
    int | None: "a whole number",
    bool | None: "True or False",
    str | None: "a string",
    Sequence[int] | None: "a list of whole numbers",
    Sequence[str] | None: "a list of strings",
    str | Sequence[str] | None: "a string or a list of strings",
    Mapping[int, float] | None: "a mapping of token IDs to numbers",
    RepetitionGuard | None: "a RepetitionGuard",
}
"""What an option must be, by its type. The errors of others say it themselves."""
_MAX_FLOAT = (2 - 2**-23) * 2.0**127
_BYTES = (bytes, bytearray, memoryview)
_KINDS = {
    "time_limit": "a number of seconds",
    "chunk_interval": "a number of seconds",
    "allowed_tools": "a list of names",
}


class PreparedPrompt:
    """A prompt with its options, translated into what is sent. `generate` and `stream` take it in place of a prompt.

    It may be used any number of times; with a `request_id` one after the other, since that of a request in progress is
    refused. Making one from thousands of messages or token IDs takes milliseconds, in which an event loop would stand
    still: `await asyncio.to_thread(PreparedPrompt, prompt, **options)` makes it in a thread.
    """

    def __init__(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> None:
        """Raises TypeError or InvalidRequestError, as `Client.generate` does."""
        self._request = build_request(prompt, **options)


def request_of(prompt: Prompt | PreparedPrompt, **options: Unpack[GenerateOptions]) -> pb.GenerateRequest:
    """Returns the request of a call, which must not be changed: further calls may have the same one.

    Raises TypeError or InvalidRequestError, as `build_request` does.
    """
    if not isinstance(prompt, PreparedPrompt):
        return build_request(prompt, **options)
    if options:
        raise TypeError(f"{', '.join(options)}: a PreparedPrompt has its options already; set them there")
    return prompt._request


def build_request(prompt: Prompt, **options: Unpack[GenerateOptions]) -> pb.GenerateRequest:
    """Returns the request for a prompt. The server checks the ranges.

    Raises TypeError for an unknown option or a value of the wrong type, and InvalidRequestError for a value that does
    not fit in its field. Both name the option.
    """
    unknown = options.keys() - GenerateOptions.__optional_keys__
    if unknown:
        raise TypeError("; ".join(map(unknown_option, sorted(unknown))))
    values = cast(dict[str, Any], options)
    for name, value in values.items():
        if isinstance(value, _BYTES):  # which protobuf takes for text or for a list of numbers
            raise _invalid(name, TypeError(f"must not be {type(value).__name__}"), _kind(name), value)
    try:
        return _request(prompt, options)
    except (TypeError, ValueError, OverflowError) as error:
        name = _invalid_argument(prompt, options)
        raise _invalid(name, error, _kind(name), values.get(name)) from error


def tokenize_request(text: str) -> pb.TokenizeRequest:
    with _naming("text", "a string", text):
        return pb.TokenizeRequest(text=text)


def detokenize_request(token_ids: Sequence[int], skip_special_tokens: bool) -> pb.DetokenizeRequest:
    with _naming("token_ids", "a list of whole numbers", token_ids):
        return pb.DetokenizeRequest(token_ids=token_ids, skip_special_tokens=skip_special_tokens)


def cancel_request(request_ids: Sequence[str]) -> pb.CancelRequest:
    with _naming("request_ids", "strings", request_ids):
        return pb.CancelRequest(request_ids=request_ids)


@contextmanager
def _naming(name: str, kind: str, value: Any) -> Iterator[None]:
    """Names the argument in errors of the block, which converts it."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise _invalid(name, error, kind, value) from error


def _kind(name: str) -> str | None:
    """Returns the kind of value that an option takes, in words."""
    return _KINDS.get(name) or _KINDS_OF_TYPES.get(get_type_hints(GenerateOptions).get(name))


def _invalid(name: str, error: Exception, kind: str | None, value: Any) -> Exception:
    """Returns the error for an argument. `kind`: what it must be, if another type is to be explained by that."""
    if isinstance(error, TypeError):
        return TypeError(f"{name}: must be {kind}, not {reprlib.repr(value)}" if kind else f"{name}: {error}")
    return InvalidRequestError(f"{name}: {error}", violations=(FieldViolation(name, str(error)),))


def unknown_option(name: str) -> str:
    """Returns the error text for an option that does not exist, with the closest one that does."""
    meant = _OTHER_NAMES.get(name) or next(iter(get_close_matches(name, GenerateOptions.__optional_keys__, n=1)), None)
    return f"unknown option '{name}'" + (f"; did you mean '{meant}'?" if meant else "")


def _invalid_argument(prompt: Prompt, options: GenerateOptions) -> str:
    """Returns the name of the first argument that is invalid by itself."""
    for name, value in {"prompt": None, **options}.items():
        try:
            _request(prompt, cast(GenerateOptions, {name: value}))
        except (TypeError, ValueError, OverflowError):
            return name
    raise AssertionError("arguments that are valid one by one are valid together")


def _request(prompt: Prompt, options: GenerateOptions) -> pb.GenerateRequest:
    request = pb.GenerateRequest(
        request_id=options.get("request_id") or "",
        model=options.get("model") or "",
        sampling=pb.SamplingParameters(
            temperature=_float(options.get("temperature")),
            top_k=options.get("top_k"),
            top_p=_float(options.get("top_p")),
            min_p=_float(options.get("min_p")),
            typical_p=_float(options.get("typical_p")),
            seed=options.get("seed"),
            num_sequences=options.get("num_sequences"),
        ),
        decoding=_decoding(options),
        stopping=_stopping(options),
        output_options=pb.OutputOptions(
            return_token_ids=options.get("return_token_ids"),
            return_prompt_token_ids=options.get("return_prompt_token_ids"),
            return_logprobs=options.get("return_logprobs"),
            return_prompt_logprobs=options.get("return_prompt_logprobs"),
            top_logprobs=options.get("top_logprobs"),
            skip_special_tokens=options.get("skip_special_tokens"),
            chunk_tokens=options.get("chunk_tokens"),
            chunk_interval=_duration(options.get("chunk_interval")),
        ),
        cache=pb.CacheOptions(bypass=options.get("cache_bypass"), salt=options.get("cache_salt")),
        priority=options.get("priority"),
        truncate_prompt_tokens=options.get("truncate_prompt_tokens"),
        resume_token_ids=options.get("resume_token_ids") or (),
    )
    _set_prompt(request, prompt, options)
    return request


def _set_prompt(request: pb.GenerateRequest, prompt: Prompt, options: GenerateOptions) -> None:
    if isinstance(prompt, str):
        request.text = prompt
    elif isinstance(prompt, (*_BYTES, Mapping)) or not isinstance(prompt, Iterable):
        why = ": put it in a list" if is_message(prompt) else ""
        raise TypeError(f"must be a string, token IDs or messages, not {type(prompt).__name__}{why}")
    elif isinstance(prompt, Iterator):
        raise TypeError("must be a list of token IDs or messages, which can be read several times, not an iterator")
    elif set(map(type, prompt)) == {int}:  # of all checks of a long prompt, this costs least
        request.token_ids.ids.extend(cast(Sequence[int], prompt))
    elif any(map(is_message, prompt)):
        request.conversation.CopyFrom(conversation(cast(Sequence[MessageLike], prompt), options))
        return
    elif any(isinstance(part, str) for part in prompt):
        raise TypeError("must be one string, token IDs, or messages such as Message(Role.USER, 'Hello')")
    else:
        try:
            request.token_ids.CopyFrom(pb.TokenIds(ids=cast(Sequence[int], prompt)))
        except TypeError as error:
            raise TypeError(f"token IDs must be whole numbers, not {reprlib.repr(prompt)}") from error
    if options.get("drop_oldest_turns"):
        raise ValueError("requires a prompt of messages; use truncate_prompt_tokens for other prompts")
    of_messages = ("add_generation_prompt", "continue_final_message", "chat_template_kwargs")
    of_tools = ("tools", "tool_choice", "allowed_tools", "parallel_tool_calls")
    if any(options.get(name) not in (None, (), [], {}) for name in (*of_messages, *of_tools)):
        raise ValueError("requires a prompt of messages, to which the chat template applies")


def _decoding(options: GenerateOptions) -> pb.DecodingOptions:
    biases = options.get("logit_bias") or {}
    for bias in biases.values() if isinstance(biases, Mapping) else ():
        _float(bias)
    decoding = pb.DecodingOptions(
        repetition_penalty=_float(options.get("repetition_penalty")),
        frequency_penalty=_float(options.get("frequency_penalty")),
        presence_penalty=_float(options.get("presence_penalty")),
        logit_bias=biases,
        allowed_token_ids=options.get("allowed_token_ids") or (),
        max_whitespace=options.get("max_whitespace"),
    )
    match options.get("constraint"):
        case JsonSchema(schema=schema):
            decoding.json_schema = schema
        case JsonObject():
            decoding.json_object.SetInParent()
        case Regex(pattern=pattern):
            decoding.regex = pattern
        case Choice(options=strings):
            decoding.choice.CopyFrom(pb.Choice(options=strings))
        case LarkGrammar(grammar=grammar):
            decoding.lark_grammar = grammar
        case None:
            pass
        case other:
            raise TypeError(f"{other!r} is not a constraint: use JsonSchema, JsonObject, Regex, Choice or LarkGrammar")
    return decoding


def _stopping(options: GenerateOptions) -> pb.StoppingCriteria:
    strings = options.get("stop_strings") or ()
    guard = options.get("repetition_guard")
    stopping = pb.StoppingCriteria(
        max_new_tokens=options.get("max_new_tokens"),
        min_new_tokens=options.get("min_new_tokens"),
        stop_strings=[strings] if isinstance(strings, str) else strings,
        stop_token_ids=options.get("stop_token_ids") or (),
        include_stop_string=options.get("include_stop_string"),
        ignore_eos=options.get("ignore_eos"),
        time_limit=_duration(options.get("time_limit")),
    )
    if guard is not None:
        if not isinstance(guard, RepetitionGuard):
            raise TypeError(f"{guard!r} is not a RepetitionGuard")
        stopping.repetition_guard.CopyFrom(
            pb.RepetitionGuard(min_repeats=guard.min_repeats, max_cycle_tokens=guard.max_cycle_tokens)
        )
    return stopping


def _float(value: float | None) -> float | None:
    """Returns a value for a field of 32 bits. Raises ValueError for one that protobuf would make infinite."""
    if isinstance(value, int | float) and _MAX_FLOAT < abs(value) < math.inf:
        raise ValueError(f"{reprlib.repr(value)} is beyond the range of 32-bit numbers")
    return value


def _duration(seconds: float | None) -> Duration | None:
    if seconds is None:
        return None
    if not isinstance(seconds, int | float):
        raise TypeError(f"must be a number of seconds, not {type(seconds).__name__}")
    duration = Duration()
    duration.FromNanoseconds(round(seconds * 1e9))
    return duration

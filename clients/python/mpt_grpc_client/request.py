"""What a caller can ask of a generation, and its one translation into the API's `GenerateRequest`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TypedDict, Unpack, cast

from google.protobuf.duration_pb2 import Duration

from mpt.v1 import text_generation_pb2 as pb
from mpt_grpc_client.constraints import Choice, Constraint, JsonObject, JsonSchema, LarkGrammar, Regex
from mpt_grpc_client.errors import FieldViolation, InvalidRequestError
from mpt_grpc_client.prompts import Message, Prompt, Role


@dataclass(frozen=True)
class RepetitionGuard:
    """Ends an output whose last tokens are one cycle of up to `max_cycle_tokens`, `min_repeats` times in a row."""

    min_repeats: int = 4
    """Range 2 to 1,000."""
    max_cycle_tokens: int = 32
    """Range 1 to 256."""


class GenerateOptions(TypedDict, total=False):
    """The keyword arguments of `generate` and `stream`. One that is left out, or None, takes the server's default."""

    max_new_tokens: int | None
    """At most so many new tokens; 0 only computes the prompt. Default: 256, or what the context has room for."""
    min_new_tokens: int | None
    """Until there are so many, end marks and stop tokens are not chosen and stop strings do not count. Default 0."""
    temperature: float | None
    """0 is greedy, whatever the filters say. Range 0 to 100, default 1."""
    top_k: int | None
    """Keep the k likeliest tokens; 0, the default, keeps all."""
    top_p: float | None
    """Keep the fewest likeliest tokens whose probabilities reach this sum. Above 0 to 1, default 1."""
    min_p: float | None
    """Drop tokens less likely than this share of the likeliest. Range 0 to 1, default 0."""
    typical_p: float | None
    """Keep the tokens closest to the expected surprise whose probabilities reach this sum. Above 0 to 1, default 1."""
    seed: int | None
    """The same request with the same seed gives the same tokens. Uint64; default: the server draws one and tells it."""
    num_sequences: int | None
    """So many outputs of one prompt, each with a seed of its own. Range 1 to 16, default 1."""
    repetition_penalty: float | None
    """Divides the scores of tokens that are in the prompt or the output. Above 0 to 10, default 1."""
    frequency_penalty: float | None
    """Taken from a token's score for each time that it is in the output. Range -2 to 2, default 0."""
    presence_penalty: float | None
    """Taken from a token's score if it is in the output. Range -2 to 2, default 0."""
    logit_bias: Mapping[int, float] | None
    """Added to the scores of these tokens. At most 1,024 tokens, range -100 to 100."""
    allowed_token_ids: Sequence[int] | None
    """Only these tokens may be chosen; default: all. Not together with a constraint."""
    constraint: Constraint | None
    """What the output may be: a JsonSchema, JsonObject, Regex, Choice or LarkGrammar."""
    stop: str | Sequence[str] | None
    """The output ends where this string, or one of these, appears. At most 16, each 1 to 256 bytes."""
    stop_token_ids: Sequence[int] | None
    """The output ends with one of these tokens; its text is left out. At most 64."""
    include_stop_string: bool
    """Whether the text ends with the stop string that was met. Default False: it ends before it."""
    ignore_eos: bool
    """Whether to go on after the model's end mark, for benchmarks. Default False. Not together with a constraint."""
    time_limit_s: float | None
    """The output ends with what there is, so many seconds after the request's arrival. Above 0; default: no limit."""
    repetition_guard: RepetitionGuard | None
    """Ends an output that goes in circles. Default: off."""
    skip_special_tokens: bool | None
    """Whether special tokens, such as the end mark, are left out of the text. Default True."""
    return_token_ids: bool
    """Whether the result has the output's `token_ids`. Default False."""
    return_prompt_token_ids: bool
    """Whether the result has the `prompt_token_ids`. Default False."""
    return_logprobs: bool
    """Whether the result has the `logprobs` of the output's tokens. Default False."""
    return_prompt_logprobs: bool
    """Whether the result has the `prompt_logprobs`; the prompt is computed anew then. Default False."""
    top_logprobs: int | None
    """With each log probability, so many of the likeliest tokens. Range 0 to 20, default 0."""
    truncate_prompt_tokens: int | None
    """Use only so many of the prompt's last tokens, 1 or more; default: all. Not with messages."""
    drop_oldest_turns: bool
    """With messages: leave out the oldest turns where all do not fit. Default False, which refuses them."""
    resume_token_ids: Sequence[int] | None
    """An output's tokens as far as it has come: the answer is what would have followed, with the same seed."""
    request_id: str | None
    """Names the request in `abort`, traces and logs. At most 128 bytes; default: the server makes one up."""
    model: str | None
    """The model that has to answer, by its name in `model_info`. Default: whichever is loaded."""
    priority: int | None
    """Higher goes first; among equals the earlier arrival. Range -100 to 100, default 0."""
    cache_bypass: bool
    """Whether to neither read nor fill the prefix cache. Default False."""
    cache_salt: str | None
    """The prefix cache is shared only among requests with the same salt. At most 128 bytes, default empty."""


def build_request(prompt: Prompt, **options: Unpack[GenerateOptions]) -> pb.GenerateRequest:
    """The request for a prompt. Ranges are the server's to check.

    Raises TypeError for an option that does not exist or is of another type, InvalidRequestError for a value that its
    field cannot hold. Both name the option.
    """
    unknown = options.keys() - GenerateOptions.__optional_keys__
    if unknown:
        raise TypeError(f"no such option: {', '.join(map(_with_likeliest, sorted(unknown)))}")
    try:
        return _request(prompt, options)
    except (TypeError, ValueError, OverflowError) as error:
        name = _culprit(prompt, options)
        if isinstance(error, TypeError):
            raise TypeError(f"{name}: {error}") from error
        raise InvalidRequestError(f"{name}: {error}", violations=(FieldViolation(name, str(error)),)) from error


def _with_likeliest(unknown: str) -> str:
    likeliest = get_close_matches(unknown, GenerateOptions.__optional_keys__, n=1)
    return f"{unknown} (is {likeliest[0]} meant?)" if likeliest else unknown


def _culprit(prompt: Prompt, options: GenerateOptions) -> str:
    """What makes no request even by itself: the prompt, or the name of an option."""
    for name, value in {"prompt": None, **options}.items():
        try:
            _request(prompt, cast(GenerateOptions, {name: value}))
        except (TypeError, ValueError, OverflowError):
            return name
    raise AssertionError("options that make requests one by one make one together")


def _request(prompt: Prompt, options: GenerateOptions) -> pb.GenerateRequest:
    request = pb.GenerateRequest(
        request_id=options.get("request_id") or "",
        model=options.get("model") or "",
        sampling=_sampling(options),
        decoding=_decoding(options),
        stopping=_stopping(options),
        response=pb.ResponseOptions(
            prompt_token_ids=options.get("return_prompt_token_ids", False),
            output_token_ids=options.get("return_token_ids", False),
            skip_special_tokens=options.get("skip_special_tokens"),
            prompt_logprobs=options.get("return_prompt_logprobs", False),
            output_logprobs=options.get("return_logprobs", False),
            top_logprobs=options.get("top_logprobs") or 0,
        ),
        cache=pb.CacheOptions(bypass=options.get("cache_bypass", False), salt=options.get("cache_salt") or ""),
        priority=options.get("priority") or 0,
        truncate_prompt_tokens=options.get("truncate_prompt_tokens"),
        resume_token_ids=options.get("resume_token_ids") or (),
    )
    _set_prompt(request, prompt, options.get("drop_oldest_turns", False))
    return request


def _set_prompt(request: pb.GenerateRequest, prompt: Prompt, drop_oldest_turns: bool) -> None:
    if not isinstance(prompt, str) and any(isinstance(part, Message) for part in prompt):
        request.conversation.drop_oldest_turns = drop_oldest_turns
        for message in cast(Sequence[Message], prompt):
            request.conversation.messages.add(role=Role(message.role).value, content=message.content)
        return
    if not isinstance(prompt, str) and any(isinstance(part, Mapping | str) for part in prompt):
        raise TypeError("must be a text, token ids, or a list of Message(Role.USER, text)")
    if drop_oldest_turns:
        raise ValueError("needs a prompt of messages; for others there is truncate_prompt_tokens")
    if isinstance(prompt, str):
        request.text = prompt
    else:
        request.token_ids.CopyFrom(pb.TokenIds(ids=cast(Sequence[int], prompt)))


def _sampling(options: GenerateOptions) -> pb.SamplingParameters:
    return pb.SamplingParameters(
        temperature=options.get("temperature"),
        top_k=options.get("top_k") or 0,
        top_p=options.get("top_p"),
        min_p=options.get("min_p") or 0,
        typical_p=options.get("typical_p"),
        seed=options.get("seed"),
        num_sequences=options.get("num_sequences"),
    )


def _decoding(options: GenerateOptions) -> pb.DecodingOptions:
    decoding = pb.DecodingOptions(
        repetition_penalty=options.get("repetition_penalty"),
        frequency_penalty=options.get("frequency_penalty") or 0,
        presence_penalty=options.get("presence_penalty") or 0,
        logit_bias=options.get("logit_bias") or {},
        allowed_token_ids=options.get("allowed_token_ids") or (),
    )
    match options.get("constraint"):
        case JsonSchema(schema=schema):
            decoding.json_schema = schema
        case JsonObject():
            decoding.json_object = True
        case Regex(pattern=pattern):
            decoding.regex = pattern
        case Choice(options=strings):
            decoding.choice.CopyFrom(pb.Choice(options=strings))
        case LarkGrammar(grammar=grammar):
            decoding.lark_grammar = grammar
        case None:
            pass
        case other:
            raise TypeError(f"not a constraint: {other!r}")
    return decoding


def _stopping(options: GenerateOptions) -> pb.StoppingCriteria:
    stop, limit_s, guard = options.get("stop") or (), options.get("time_limit_s"), options.get("repetition_guard")
    stopping = pb.StoppingCriteria(
        max_new_tokens=options.get("max_new_tokens"),
        min_new_tokens=options.get("min_new_tokens") or 0,
        stop_strings=[stop] if isinstance(stop, str) else stop,
        stop_token_ids=options.get("stop_token_ids") or (),
        include_stop_string=options.get("include_stop_string", False),
        ignore_eos=options.get("ignore_eos", False),
    )
    if limit_s is not None:
        limit = Duration()
        limit.FromNanoseconds(round(limit_s * 1e9))
        stopping.time_limit.CopyFrom(limit)
    if guard is not None:
        stopping.repetition_guard.CopyFrom(
            pb.RepetitionGuard(min_repeats=guard.min_repeats, max_cycle_tokens=guard.max_cycle_tokens)
        )
    return stopping

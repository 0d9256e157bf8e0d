"""Each field of a request is accepted up to its limits, which are named where it is refused."""

from __future__ import annotations

import ctypes
import math
import struct
from dataclasses import replace
from typing import Any

import pytest

from mpt_grpc.constraint import JsonObject, Regex
from mpt_grpc.conversation import Conversation, Message
from mpt_grpc.engine.validation import RequestLimits, prompt_violations, request_violations
from mpt_grpc.errors import FieldViolation
from mpt_grpc.limits import MAX_BYTES, MAX_COUNTS, MAX_LOGPROBS, RANGES
from mpt_grpc.request import (
    CacheOptions,
    ChunkOptions,
    DecodingOptions,
    GenerationRequest,
    LogprobOptions,
    PartialOutput,
    RepetitionGuard,
    SamplingParameters,
    StoppingCriteria,
)

LIMITS = RequestLimits(
    vocab_size=1000, max_context_tokens=100, default_max_new_tokens=50, max_num_sequences=8, max_token_bytes=7
)
TINY = 1e-9


def request(field: str, value: Any, **others: Any) -> GenerationRequest:
    """Returns a request with the option at a path in the API, such as `sampling.top_k`, set to `value`.

    `others` are whole fields of the request.
    """
    group, _, name = field.rpartition(".")
    base = replace(GenerationRequest("r", "Hi", logprobs=LogprobOptions(output=True)), **others)
    match group:
        case "":
            return replace(base, **{name: value})
        case "stopping.repetition_guard":
            return replace(
                base, stopping=StoppingCriteria(repetition_guard=replace(RepetitionGuard(), **{name: value}))
            )
        case "decoding" if name == "max_whitespace":
            return replace(base, decoding=DecodingOptions(constraint=JsonObject(value)))
        case "output_options" if name == "chunk_tokens":
            return replace(base, chunks=ChunkOptions(num_tokens=value))
        case "output_options":
            return replace(base, logprobs=LogprobOptions(output=True, num_top=value))
        case _:
            return replace(base, **{group: replace(getattr(base, group), **{name: value})})


def violations(request: GenerationRequest, limits: RequestLimits = LIMITS) -> list[FieldViolation]:
    return list(request_violations(request, limits))


def fields(request: GenerationRequest) -> list[str]:
    return [violation.field for violation in violations(request)]


NUMBERS = sorted(RANGES.keys() - {"sampling.num_sequences", "decoding.logit_bias"})
"""The fields that hold one number, without the one whose limit depends on the server."""


@pytest.mark.parametrize("field", NUMBERS)
def test_numbers_are_accepted_up_to_the_ends_of_their_range(field: str) -> None:
    limits = RANGES[field]
    step = 1 if field == "priority" or "guard" in field or "output_options" in field else TINY
    lowest = limits.low + step if limits.excludes_low else limits.low
    for value in (lowest, limits.high):
        assert fields(request(field, value)) == []
    for value in (lowest - step, limits.high * (1 + TINY) + step, math.nan, math.inf, -math.inf):
        (violation,) = violations(request(field, value))
        assert violation == FieldViolation(field, f"{value} is not in {limits}")


@pytest.mark.parametrize(
    ("field", "low", "high"),
    [
        ("sampling.top_k", 0, 1000),
        ("sampling.seed", 0, (1 << 64) - 1),
        ("sampling.num_sequences", 1, 8),
        ("stopping.max_new_tokens", 0, None),
        ("stopping.min_new_tokens", 0, 50),
        ("stopping.time_limit_s", TINY, 1e300),
        ("truncate_prompt_tokens", 1, None),
    ],
)
def test_numbers_whose_range_depends_on_the_server_are_accepted_up_to_its_ends(
    field: str, low: float, high: float | None
) -> None:
    outside = [low - 1 if low != TINY else 0, *([] if high is None else [math.inf if high == 1e300 else high + 1])]
    for value in (low, low + 1, *([] if high is None else [high])):
        assert fields(request(field, value)) == []
    for value in outside:
        violation = violations(request(field, value))[0]
        assert violation.field == field.removesuffix("_s")
        assert violation.description.startswith(str(value))


@pytest.mark.parametrize("field", ["request_id", "cache.salt"])
def test_texts_are_accepted_up_to_their_size_in_bytes(field: str) -> None:
    most = MAX_BYTES[field]
    assert fields(request(field, "é" * (most // 2))) == []
    (violation,) = violations(request(field, "é" * (most // 2) + "a"))
    assert violation == FieldViolation(field, f"longer than {most} bytes")


@pytest.mark.parametrize("stop", ["a", "é" * (MAX_BYTES["stopping.stop_strings"] // 2)])
def test_stop_strings_of_any_legal_size_are_accepted(stop: str) -> None:
    assert fields(request("stopping.stop_strings", ("ok", stop))) == []


@pytest.mark.parametrize(("stop", "size"), [("", 0), ("é" * 128 + "a", 257)])
def test_stop_strings_of_other_sizes_are_refused(stop: str, size: int) -> None:
    (violation,) = violations(request("stopping.stop_strings", ("ok", stop)))
    assert violation == FieldViolation("stopping.stop_strings[1]", f"its length, {size} bytes, is not in [1, 256]")


@pytest.mark.parametrize(
    ("field", "most", "items"),
    [
        ("stopping.stop_strings", MAX_COUNTS["stopping.stop_strings"], lambda count: ("a",) * count),
        ("stopping.stop_token_ids", MAX_COUNTS["stopping.stop_token_ids"], lambda count: (1,) * count),
        ("decoding.allowed_token_ids", 1000, lambda count: (1,) * count),
    ],
)
def test_lists_are_accepted_up_to_their_count(field: str, most: int, items: Any) -> None:
    assert fields(request(field, items(most))) == []
    (violation,) = violations(request(field, items(most + 1)))
    assert violation == FieldViolation(field, f"{most + 1} items; at most {most} are allowed")


def test_biases_are_accepted_up_to_their_count() -> None:
    limits, most = replace(LIMITS, vocab_size=5000), MAX_COUNTS["decoding.logit_bias"]
    assert violations(request("decoding.logit_bias", dict.fromkeys(range(most), 1.0)), limits) == []
    (violation,) = violations(request("decoding.logit_bias", dict.fromkeys(range(most + 1), 1.0)), limits)
    assert violation == FieldViolation("decoding.logit_bias", f"{most + 1} items; at most {most} are allowed")


@pytest.mark.parametrize("sent", [100.1, -0.1, 1e30, -1e-30])
def test_a_number_that_arrives_as_a_float_is_shown_as_it_was_sent(sent: float) -> None:
    (arrived,) = struct.unpack("f", struct.pack("f", sent))
    (violation,) = violations(request("sampling.temperature", arrived))
    assert violation.description.startswith(f"{sent} is not in ")


def test_each_bias_is_in_its_range() -> None:
    assert fields(request("decoding.logit_bias", {0: -100.0, 999: 100.0})) == []
    refused = violations(request("decoding.logit_bias", {1: -100.1, 2: 100.1, 3: math.nan}))
    assert refused == [
        FieldViolation(f"decoding.logit_bias[{token}]", f"{bias} is not in [-100, 100]")
        for token, bias in ((1, -100.1), (2, 100.1), (3, math.nan))
    ]


@pytest.mark.parametrize(
    ("field", "place"),
    [
        ("stopping.stop_token_ids", "[1]"),
        ("decoding.allowed_token_ids", "[1]"),
        ("resume_token_ids", "[1]"),
        ("decoding.logit_bias", "[{}]"),
    ],
)
def test_token_ids_are_those_of_the_vocabulary(field: str, place: str) -> None:
    def with_ids(*ids: int) -> GenerationRequest:
        value = dict.fromkeys(ids, 1.0) if field == "decoding.logit_bias" else ids
        return request(field, value, **({} if "." in field else {"sampling": SamplingParameters(seed=1)}))

    assert fields(with_ids(0, 999)) == []
    for token in (-1, 1000):
        (violation,) = violations(with_ids(5, token))
        why = f"{token} is not a token ID: IDs are below 1000"
        assert violation == FieldViolation(field + place.format(token), why)


TWO = SamplingParameters(seed=1, num_sequences=2)
TOO_MANY_RESUMED = {"resume_token_ids": (1,) * 6, "sampling": SamplingParameters(seed=1)}
SAMPLED, GREEDY = SamplingParameters(), SamplingParameters(temperature=0)
PROMPT_ONLY = StoppingCriteria(max_new_tokens=0)
REGEX = DecodingOptions(constraint=Regex("a"))


@pytest.mark.parametrize(
    ("options", "field", "why"),
    [
        (
            {"prompt": Conversation((Message("user", "Hi"),)), "truncate_prompt_tokens": 5},
            "truncate_prompt_tokens",
            "drop_oldest_turns",
        ),
        ({"logprobs": LogprobOptions(num_top=1)}, "output_options.top_logprobs", "requires return_logprobs"),
        ({"logprobs": LogprobOptions(output=True, num_top=1)}, None, ""),
        ({"logprobs": LogprobOptions(prompt=True, num_top=1)}, None, ""),
        ({"logprobs": LogprobOptions()}, None, ""),
        ({"stopping": StoppingCriteria(min_new_tokens=5, max_new_tokens=5)}, None, ""),
        ({"stopping": StoppingCriteria(min_new_tokens=6, max_new_tokens=5)}, "stopping.min_new_tokens", "[0, 5]"),
        ({"stopping": StoppingCriteria(ignore_eos=True)}, None, ""),
        ({"decoding": REGEX}, None, ""),
        ({"decoding": replace(REGEX, allowed_token_ids=(1,))}, "decoding.allowed_token_ids", "constraint"),
        ({"decoding": REGEX, "stopping": StoppingCriteria(ignore_eos=True)}, "stopping.ignore_eos", "constraint"),
        ({"stopping": PROMPT_ONLY}, None, ""),
        (
            {"stopping": replace(PROMPT_ONLY, max_new_tokens=1), "sampling": SamplingParameters(num_sequences=2)},
            None,
            "",
        ),
        ({"stopping": PROMPT_ONLY, "sampling": SamplingParameters(num_sequences=2)}, "sampling.num_sequences", "be 1"),
        ({"resume_token_ids": (1,), "sampling": GREEDY}, None, ""),
        ({"resume_token_ids": (1,), "sampling": replace(SAMPLED, seed=0)}, None, ""),
        ({"resume_token_ids": (1,), "sampling": SAMPLED}, "sampling.seed", "required to resume an output"),
        (
            {"resume_token_ids": (1,), "sampling": replace(GREEDY, temperature=TINY)},
            "sampling.seed",
            "temperature is 0",
        ),
        (
            {"resume_token_ids": (1,), "sampling": SamplingParameters(seed=1, num_sequences=2)},
            "resume_token_ids",
            "num_sequences above 1",
        ),
        ({"resume_outputs": (PartialOutput(1, ()), PartialOutput(0, (1,))), "sampling": TWO}, None, ""),
        ({"resume_outputs": (PartialOutput(2, ()),), "sampling": TWO}, "resume_outputs[0].index", "not in [0, 2)"),
        ({"resume_outputs": (PartialOutput(1, ()),) * 2, "sampling": TWO}, "resume_outputs", "twice"),
        ({"resume_outputs": (PartialOutput(0, ()),), "sampling": SAMPLED}, "sampling.seed", "required to resume"),
        (
            {"resume_outputs": (PartialOutput(0, ()),), "resume_token_ids": (1,), "sampling": GREEDY},
            "resume_token_ids",
            "combined with resume_outputs",
        ),
        (
            {"resume_outputs": (PartialOutput(1, (1,) * 51), PartialOutput(0, ())), "sampling": TWO},
            "resume_outputs[0].token_ids",
            "which is 50",
        ),
        ({"stopping": StoppingCriteria(max_new_tokens=6), **TOO_MANY_RESUMED}, None, ""),
        ({"stopping": StoppingCriteria(max_new_tokens=5), **TOO_MANY_RESUMED}, "resume_token_ids", "6 tokens exceed"),
        ({"sampling": SamplingParameters(seed=1), "resume_token_ids": (1,) * 51}, "resume_token_ids", "which is 50"),
    ],
)
def test_fields_that_contradict_each_other_are_refused(options: dict[str, Any], field: str | None, why: str) -> None:
    found = violations(replace(GenerationRequest("r", "Hi"), **options))
    assert [violation.field for violation in found] == ([] if field is None else [field])
    assert all(why in violation.description for violation in found)


@pytest.mark.parametrize(
    ("num_tokens", "max_new_tokens", "num_resumed", "field"),
    [
        (1, None, 0, None),
        (99, None, 0, None),
        (99, 1, 0, None),
        (100, 0, 0, None),
        (50, 50, 50, None),
        (0, None, 0, "prompt"),
        (100, None, 0, "token_ids.ids"),
        (100, 1, 0, "token_ids.ids"),
        (101, 0, 0, "token_ids.ids"),
        (99, 2, 0, "stopping.max_new_tokens"),
        (50, None, 51, "resume_token_ids"),
    ],
)
def test_prompt_and_output_fit_in_the_context(
    num_tokens: int, max_new_tokens: int | None, num_resumed: int, field: str | None
) -> None:
    prompt = (1,) * num_tokens
    stopping = StoppingCriteria(max_new_tokens=max_new_tokens)
    admitted = GenerationRequest("r", prompt, stopping=stopping, resume_token_ids=(1,) * num_resumed)
    found = list(prompt_violations(admitted, prompt, LIMITS))
    assert [violation.field for violation in found] == ([] if field is None else [field])
    for text in prompt_violations(replace(admitted, prompt="text"), prompt, LIMITS):
        assert text.field == ("text" if field == "token_ids.ids" else field)


def test_the_error_of_a_long_output_says_how_many_tokens_are_left() -> None:
    (violation,) = prompt_violations(request("stopping.max_new_tokens", 61), (1,) * 40, LIMITS)
    assert "request at most 60" in violation.description


@pytest.mark.parametrize(("token", "is_valid"), [(0, True), (999, True), (-1, False), (1000, False)])
def test_a_prompt_of_token_ids_is_in_the_vocabulary(token: int, is_valid: bool) -> None:
    prompt = (5, token, token)
    found = list(prompt_violations(GenerationRequest("r", prompt), prompt, LIMITS))
    assert [violation.field for violation in found] == ([] if is_valid else ["token_ids.ids[1]"])


def test_the_longest_prompt_in_bytes_is_a_context_of_the_longest_tokens() -> None:
    assert LIMITS.max_prompt_bytes == 700


def test_every_invalid_field_is_listed() -> None:
    invalid = GenerationRequest(
        "r" * 200,
        "Hi",
        SamplingParameters(top_p=0),
        stopping=StoppingCriteria(min_new_tokens=-1),
        cache=CacheOptions(salt="s" * 200),
    )
    assert fields(invalid) == ["request_id", "cache.salt", "sampling.top_p", "stopping.min_new_tokens"]


@pytest.mark.parametrize(
    ("num_top", "num_sequences", "has_prompt", "max_new_tokens", "beyond"),
    [
        (15, 1, False, MAX_LOGPROBS // 16, 0),
        (15, 1, False, MAX_LOGPROBS // 16 + 1, MAX_LOGPROBS + 16),
        (15, 2, False, MAX_LOGPROBS // 32 + 1, MAX_LOGPROBS + 32),
        (15, 1, True, MAX_LOGPROBS // 16 - 2, 0),
        (15, 1, True, MAX_LOGPROBS // 16 - 1, MAX_LOGPROBS + 16),
        (19, 8, False, None, 8 * 20 * 100_000),
        (0, 8, False, None, 0),
    ],
)
def test_log_probabilities_beyond_those_of_a_message_are_refused(
    num_top: int, num_sequences: int, has_prompt: bool, max_new_tokens: int | None, beyond: int
) -> None:
    asked = replace(
        GenerationRequest("r", (1, 2)),
        sampling=SamplingParameters(num_sequences=num_sequences),
        stopping=StoppingCriteria(max_new_tokens=max_new_tokens),
        logprobs=LogprobOptions(prompt=has_prompt, output=True, num_top=num_top),
    )
    limits = replace(LIMITS, max_context_tokens=100_002, default_max_new_tokens=200_000)
    found = list(prompt_violations(asked, (1, 2), limits))
    assert [violation.field for violation in found] == ["output_options.top_logprobs"] * bool(beyond)
    assert all(f" {beyond} log probabilities" in violation.description for violation in found)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (100.1, "100.1"),
        (ctypes.c_float(100.1).value, "100.1"),
        (-0.1, "-0.1"),
        (1e-8 - 1, "-0.99999999"),
        (1e39, "1e+39"),
    ],
)
def test_a_number_out_of_range_is_shown_as_it_was_written(value: float, shown: str) -> None:
    (violation,) = request_violations(request("sampling.temperature", value), LIMITS)
    assert violation.description == f"{shown} is not in [0, 100]"


def test_an_invalid_token_is_found_where_it_is_in_a_prompt_that_is_truncated() -> None:
    asked = GenerationRequest("r", (1, 2, 3, 1000), truncate_prompt_tokens=2)
    (violation,) = prompt_violations(asked, (3, 1000), LIMITS)
    assert violation.field == "token_ids.ids[3]"


@pytest.mark.parametrize("seconds", [0.0, -0.5, math.inf, math.nan])
def test_an_interval_of_chunks_is_positive_and_finite(seconds: float) -> None:
    base = GenerationRequest("r", "Hi")
    (violation,) = request_violations(replace(base, chunks=ChunkOptions(interval_s=seconds)), LIMITS)
    assert violation.field == "output_options.chunk_interval"
    assert list(request_violations(replace(base, chunks=ChunkOptions(interval_s=1e-9)), LIMITS)) == []

"""What a caller can ask of a generation, and its one translation into the API's `GenerateRequest`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict, Unpack

from mpt.v1 import text_generation_pb2 as pb


class GenerateOptions(TypedDict, total=False):
    """The keyword arguments of `generate` and `stream`. One that is left out, or None, takes the server's default."""

    max_new_tokens: int | None
    """At most so many new tokens, 1 or more. Default: 256, or what the context has room for if that is less."""
    temperature: float | None
    """0 is greedy, whatever the other options say. Range 0 to 100, default 1."""
    top_k: int | None
    """Keep the k likeliest tokens; 0, the default, keeps all."""
    top_p: float | None
    """Keep the fewest likeliest tokens whose probabilities reach this sum. Above 0 to 1, default 1."""
    min_p: float | None
    """Drop tokens less likely than this share of the likeliest. Range 0 to 1, default 0."""
    seed: int | None
    """The same request with the same seed gives the same tokens. Uint64; default: the server draws one and tells it."""
    stop: str | Sequence[str]
    """The output ends where this string, or one of these, appears. At most 16, each 1 to 256 bytes."""
    stop_token_ids: Sequence[int]
    """The output ends with one of these tokens; its text is left out. At most 64."""
    include_stop_string: bool
    """Whether the text ends with the stop string that was met. Default False: it ends before it."""
    ignore_eos: bool
    """Whether to go on after the model's end mark, for benchmarks. Default False."""
    skip_special_tokens: bool
    """Whether special tokens, such as the end mark, are left out of the text. Default True."""
    return_token_ids: bool
    """Whether the result has the output's `token_ids`. Default False."""
    return_prompt_token_ids: bool
    """Whether the result has the `prompt_token_ids`. Default False."""
    request_id: str | None
    """Names the request in `abort`, traces and logs. At most 128 bytes; default: the server makes one up."""
    model: str | None
    """The model that has to answer, by its name in `model_info`. Default: whichever is loaded."""
    priority: int
    """Higher goes first; among equals the earlier arrival. Range -100 to 100, default 0."""
    cache_bypass: bool
    """Whether to neither read nor fill the prefix cache. Default False."""
    cache_salt: str
    """The prefix cache is shared only among requests with the same salt. At most 128 bytes, default empty."""


def build_request(prompt: str | Sequence[int], **options: Unpack[GenerateOptions]) -> pb.GenerateRequest:
    """The request for a prompt: text, or token ids. Ranges are the server's to check.

    Raises TypeError for an option that does not exist, TypeError or ValueError for a value that its field cannot hold.
    """
    unknown = options.keys() - GenerateOptions.__optional_keys__
    if unknown:
        raise TypeError(f"no such option: {', '.join(sorted(unknown))}")
    stop = options.get("stop", ())
    request = pb.GenerateRequest(
        request_id=options.get("request_id") or "",
        model=options.get("model") or "",
        sampling=pb.SamplingParameters(
            temperature=options.get("temperature"),
            top_k=options.get("top_k") or 0,
            top_p=options.get("top_p"),
            min_p=options.get("min_p") or 0,
            seed=options.get("seed"),
        ),
        stopping=pb.StoppingCriteria(
            max_new_tokens=options.get("max_new_tokens"),
            stop_strings=[stop] if isinstance(stop, str) else stop,
            stop_token_ids=options.get("stop_token_ids", ()),
            include_stop_string=options.get("include_stop_string", False),
            ignore_eos=options.get("ignore_eos", False),
        ),
        response=pb.ResponseOptions(
            prompt_token_ids=options.get("return_prompt_token_ids", False),
            output_token_ids=options.get("return_token_ids", False),
            skip_special_tokens=options.get("skip_special_tokens"),
        ),
        cache=pb.CacheOptions(bypass=options.get("cache_bypass", False), salt=options.get("cache_salt", "")),
        priority=options.get("priority", 0),
    )
    if isinstance(prompt, str):
        request.text = prompt
    else:
        request.token_ids.CopyFrom(pb.TokenIds(ids=prompt))
    return request

"""Quotas of callers: requests in progress, and tokens per minute."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import grpc
import pytest
from access_tokens import entry, write
from conftest import demo_settings
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from http_calls import fetch, read_response, send
from hypothesis import given
from hypothesis import strategies as st

from mpt_grpc.caller import Caller, Quota
from mpt_grpc.errors import QuotaExceededError as QuotaExceeded
from mpt_grpc.server.quotas import Quotas
from mpt_grpc.server.server import RunningServer, running_server
from mpt_grpc.settings import HttpSettings
from mpt_grpc_client import AsyncClient, QuotaExceededError
from mpt_grpc_client.proto.v1 import text_generation_pb2 as pb
from mpt_grpc_client.proto.v1.text_generation_pb2_grpc import TextGenerationServiceStub

LONG: Any = {"max_new_tokens": 1900, "temperature": 0, "ignore_eos": True}
SHORT: Any = {"max_new_tokens": 5, "temperature": 0, "ignore_eos": True}
BODY = {"prompt": "The fox", "max_tokens": 5, "temperature": 0, "ignore_eos": True}
QUOTAS = "[quotas.busy]\nmax_requests = 1\n" + "".join(
    f"[quotas.{name}]\ntokens_per_minute = 12\n" for name in ("chatty", "resuming")
)


@pytest.fixture(scope="module")
async def server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[RunningServer]:
    entries = [entry(name, name) for name in ("busy", "chatty", "resuming", "other")]
    file = write(tmp_path_factory.mktemp("quotas") / "tokens.toml", *entries, QUOTAS)
    settings = demo_settings()
    listening = replace(settings.server, tokens_file=file)
    async with running_server(replace(settings, server=listening, http=HttpSettings(port=0))) as running:
        yield running


@asynccontextmanager
async def client_of(server: RunningServer, name: str) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(server.target, token=name, retries=False) as client:
        yield client


async def test_a_request_beyond_those_in_progress_is_refused_until_one_has_ended(server: RunningServer) -> None:
    async with client_of(server, "busy") as busy, client_of(server, "other") as other:
        async with busy.stream("The fox", **LONG) as stream:
            await anext(stream)
            with pytest.raises(
                QuotaExceededError, match=r"busy has as many requests in progress as its quota allows \(1\)"
            ) as raised:
                await busy.generate("The fox", **SHORT)
            error = raised.value
            assert (error.quota, error.limit, error.reason) == ("requests", 1, "QUOTA_EXCEEDED")
            assert error.retry_after is not None
            assert (await fetch(server, "POST", "/v1/completions", BODY, authorization="Bearer busy"))[0] == 429
            assert (await other.generate("The fox", **SHORT)).text
            assert await busy.cancel(str(stream.request_id))
            async for _ in stream:
                pass
        assert (await busy.generate("The fox", **SHORT)).text


async def test_tokens_beyond_those_of_a_minute_are_refused_with_the_time_to_wait(server: RunningServer) -> None:
    async with client_of(server, "chatty") as chatty, client_of(server, "other") as other:
        for _ in range(2):  # of 2 + 5 tokens; the second begins within the quota
            usage = (await chatty.generate("The fox", **SHORT)).usage
            assert (usage.num_prompt_tokens, usage.num_output_tokens) == (2, 5)
        with pytest.raises(QuotaExceededError, match="chatty has used its quota of 12 tokens per minute") as raised:
            await chatty.generate("The fox", **SHORT)
        assert (raised.value.quota, raised.value.limit) == ("tokens", 12)
        assert 5 < (raised.value.retry_after or 0) <= 15  # 3 tokens too many, at 12 per minute
        assert await chatty.tokenize("The fox")
        assert (await other.generate("The fox", **SHORT)).text

    sent = await send(server, "POST", "/v1/completions", BODY, authorization="Bearer chatty")
    status, headers, body = await read_response(*sent)
    assert (status, body["error"]["code"]) == (429, "rate_limit_exceeded")
    assert int(headers["retry-after"]) == math.ceil(float(headers["retry-after-ms"]) / 1000)
    assert headers["x-ratelimit-limit-tokens"] == "12"
    assert headers["x-ratelimit-remaining-tokens"] == "0"
    assert float(headers["x-ratelimit-reset-tokens"].removesuffix("s")) == float(headers["retry-after-ms"]) / 1000

    async with grpc.aio.insecure_channel(server.target, options=[("grpc.enable_retries", 0)]) as channel:
        generate: Any = TextGenerationServiceStub(channel).Generate
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await generate(pb.GenerateRequest(text="The fox"), metadata=(("authorization", "Bearer chatty"),))
    details = rpc_status.from_call(refused.value).details
    kinds = [detail.TypeName() for detail in details]
    assert kinds == [f"google.rpc.{kind}" for kind in ("ErrorInfo", "RetryInfo", "QuotaFailure")]
    failure = error_details_pb2.QuotaFailure.FromString(details[2].value)
    assert failure.violations[0].subject == "chatty:tokens"


async def test_tokens_to_resume_are_used_like_those_of_a_prompt(server: RunningServer) -> None:
    async with client_of(server, "resuming") as resuming:
        resumed = await resuming.generate("The fox", max_new_tokens=21, temperature=0, resume_token_ids=[300] * 20)
        assert (resumed.usage.num_prompt_tokens, resumed.usage.num_output_tokens) == (2, 1)
        with pytest.raises(QuotaExceededError) as raised:
            await resuming.generate("The fox", **SHORT)
        assert 45 < (raised.value.retry_after or 0) <= 60  # 12 tokens too many, at 12 per minute


@pytest.mark.parametrize("stream", [False, True])
async def test_more_prompts_than_a_caller_may_have_in_progress_are_not_to_be_sent_again(
    stream: bool, server: RunningServer
) -> None:
    body = BODY | {"prompt": ["The fox", "The wolf", "The bear"], "stream": stream}
    reader, writer = await send(server, "POST", "/v1/completions", body, authorization="Bearer busy")
    response = (await reader.read()).decode()
    writer.close()
    why = "3 prompts start at once; the quota allows 1 in progress: send fewer"
    assert f'{{"error":{{"message":"prompt: {why}","type":"invalid_request_error","param":"prompt"' in response
    assert "429" not in response.splitlines()[0]


@given(
    per_minute=st.integers(1, 1000),
    steps=st.lists(st.tuples(st.floats(0, 120), st.integers(1, 500)), min_size=1, max_size=60),
)
def test_a_caller_uses_what_is_granted_evenly_a_minutes_worth_and_its_last_request(
    per_minute: int, steps: list[tuple[float, int]]
) -> None:
    now_s = total = 0.0
    caller = Caller("c", quota=Quota(tokens_per_minute=per_minute))
    quotas = Quotas(now=lambda: now_s)
    for wait_s, num_tokens in steps:
        now_s += wait_s
        try:
            with quotas.request(caller) as meter:
                assert meter is not None
                meter.count(num_tokens)
                total += num_tokens
        except QuotaExceeded as error:
            now_s += error.retry_after_s + 1e-6
            with quotas.request(caller):
                pass  # no longer refused
        assert total <= per_minute * (1 + now_s / 60) + max(tokens for _, tokens in steps)

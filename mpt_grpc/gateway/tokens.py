"""Tokenization, in the format of vLLM, which tools that count tokens support."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Sequence
from functools import partial
from typing import Any

from fastapi import Request
from pydantic import BaseModel, ConfigDict
from starlette.responses import JSONResponse

from mpt_grpc.gateway.errors import BadRequestError
from mpt_grpc.gateway.messages import ChatMessage, message_fields
from mpt_grpc.gateway.requests import Uint
from mpt_grpc.gateway.responses import Json
from mpt_grpc.gateway.strict import Many, Some
from mpt_grpc.worker_threads import WorkerThreads
from mpt_grpc_client import AsyncClient, Client, PreparedPrompt, Token

# Two threads, which bound the memory of texts and tokens.
_tokenizers = WorkerThreads(2, "tokenize")
DETOKENIZE_FIELD_NAMES = {"token_ids": "tokens"}
"""The field of a detokenization request, by its name in the API."""


class TokenizeRequest(BaseModel):
    """`add_special_tokens` has no effect, since MPT's tokenizers add none."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str = ""
    prompt: str | None = None
    messages: Some[ChatMessage] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = None
    add_special_tokens: bool = True
    return_token_strs: bool = False


class DetokenizeRequest(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    model: str = ""
    tokens: Many[Uint]


async def tokenize(
    client: AsyncClient, blocking_client: Client | None, body: TokenizeRequest, generate: PreparedPrompt | None
) -> JSONResponse:
    """Returns the token IDs of a text and, with `return_token_strs`, the text of each token, or the token IDs of
    messages after the chat template, whose request is `generate`. Raises MptGrpcError.

    blocking_client: makes the call if its response is parsed.
    """
    loop = asyncio.get_running_loop()
    max_context_tokens = (await client.get_model_info()).max_context_tokens
    if generate is not None:
        generation = await client.generate(generate)
        return _ids_response(generation.prompt_token_ids, max_context_tokens, None)
    text = body.prompt or ""

    def call() -> JSONResponse:
        if blocking_client is None:
            tokens = asyncio.run_coroutine_threadsafe(client.tokenize(text), loop).result()
        else:
            tokens = blocking_client.tokenize(text)
        return _response(tokens, max_context_tokens, body.return_token_strs)

    # A text has up to a million tokens, so nothing that depends on their number runs on the event loop.
    return await asyncio.wrap_future(_tokenizers.submit(partial(contextvars.copy_context().run, call)))


def read_tokenization(request: Request, body: TokenizeRequest) -> tuple[TokenizeRequest, PreparedPrompt | None]:
    """Returns the body and, for messages, the request that computes their prompt, which so is limited by the context.

    Raises BadRequestError or InvalidRequestError.
    """
    if (body.prompt is None) == (body.messages is None):
        raise BadRequestError("prompt, messages: pass one of them", "prompt")
    if body.messages is None:
        return body, None
    request.state.field_names = message_fields(body.messages)
    if body.return_token_strs:
        raise BadRequestError("return_token_strs: requires prompt; send the tokens to /detokenize", "return_token_strs")
    generate = PreparedPrompt(
        [message.message() for message in body.messages],
        max_new_tokens=0,
        return_prompt_token_ids=True,
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=body.continue_final_message,
        chat_template_kwargs=body.chat_template_kwargs,
        request_id=request.state.request_id,
    )
    return body, generate


def _response(tokens: Sequence[Token], max_context_tokens: int, has_strings: bool) -> JSONResponse:
    strings = [token.token_bytes.decode(errors="replace") for token in tokens] if has_strings else None
    return _ids_response([token.token_id for token in tokens], max_context_tokens, strings)


def _ids_response(ids: Sequence[int], max_context_tokens: int, strings: Sequence[str] | None) -> JSONResponse:
    return JSONResponse({"count": len(ids), "max_model_len": max_context_tokens, "tokens": ids, "token_strs": strings})


async def detokenize(client: AsyncClient, body: DetokenizeRequest) -> Json:
    """Returns the text of token IDs, including special tokens. Raises MptGrpcError."""
    return {"prompt": await client.detokenize(body.tokens, skip_special_tokens=False)}


async def tokenizer_info(client: AsyncClient) -> Json:
    """Returns the special tokens; MPT's tokenizers have no beginning-of-sequence token. Raises MptGrpcError."""
    info = await client.get_model_info()
    ends = [await client.detokenize([token], skip_special_tokens=False) for token in info.eos_token_ids[:1]]
    return {"eos_token": ends[0] if ends else None, "bos_token": None, "model_max_length": info.max_context_tokens}

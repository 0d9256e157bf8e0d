"""Tokenization, in the format of vLLM, which tools that count tokens support."""

from __future__ import annotations

import asyncio
import contextvars
import functools
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from pydantic import BaseModel, ConfigDict
from starlette.responses import JSONResponse

from mpt_grpc.gateway.requests import Many, Uint
from mpt_grpc_client import AsyncClient, Client

Json = dict[str, Any]
# Two threads, which bound the memory of texts and tokens.
_tokenizers = ThreadPoolExecutor(2, thread_name_prefix="tokenize")
DETOKENIZE_FIELD_NAMES = {"token_ids": "tokens"}
"""The field of a detokenization request, by its name in the API."""


class TokenizeRequest(BaseModel):
    """`add_special_tokens` has no effect, since MPT's tokenizers add none."""

    model_config = ConfigDict(extra="forbid")

    model: str = ""
    prompt: str
    add_special_tokens: bool = True
    return_token_strs: bool = False


class DetokenizeRequest(BaseModel):
    model_config = ConfigDict(extra="forbid")

    model: str = ""
    tokens: Many[Uint]


async def tokenize(client: Client, body: TokenizeRequest) -> JSONResponse:
    """Returns the token IDs of a text and, with `return_token_strs`, the text of each token. Raises MptGrpcError."""
    # A text has up to a million tokens, so nothing of this runs on the event loop.
    call = functools.partial(contextvars.copy_context().run, _tokenize, client, body)
    return await asyncio.get_running_loop().run_in_executor(_tokenizers, call)


def _tokenize(client: Client, body: TokenizeRequest) -> JSONResponse:
    tokens = client.tokenize(body.prompt)
    strings = [token.token_bytes.decode(errors="replace") for token in tokens] if body.return_token_strs else None
    return JSONResponse(
        {
            "count": len(tokens),
            "max_model_len": client.get_model_info().max_context_tokens,
            "tokens": [token.token_id for token in tokens],
            "token_strs": strings,
        }
    )


async def detokenize(client: AsyncClient, body: DetokenizeRequest) -> Json:
    """Returns the text of token IDs, including special tokens. Raises MptGrpcError."""
    return {"prompt": await client.detokenize(body.tokens, skip_special_tokens=False)}


async def tokenizer_info(client: AsyncClient) -> Json:
    """Returns the special tokens; MPT's tokenizers have no beginning-of-sequence token. Raises MptGrpcError."""
    info = await client.get_model_info()
    ends = [await client.detokenize([token], skip_special_tokens=False) for token in info.eos_token_ids[:1]]
    return {"eos_token": ends[0] if ends else None, "bos_token": None, "model_max_length": info.max_context_tokens}

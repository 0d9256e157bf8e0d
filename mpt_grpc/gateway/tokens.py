"""Text to tokens and back, in vLLM's form, which tools that count tokens know."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict

from mpt_grpc.gateway.requests import Uint
from mpt_grpc_client import AsyncClient

Json = dict[str, Any]


class TokenizeRequest(BaseModel):
    """MPT's tokenizers add no special tokens, so that `add_special_tokens` changes nothing."""

    model_config = ConfigDict(extra="forbid")

    model: str = ""
    prompt: str
    add_special_tokens: bool = True
    return_token_strs: bool = False


class DetokenizeRequest(BaseModel):
    model_config = ConfigDict(extra="forbid")

    model: str = ""
    tokens: list[Uint]


async def tokenize(client: AsyncClient, asked: TokenizeRequest) -> Json:
    """The ids of a text; with `return_token_strs` also what each stands for. Raises MptGrpcError."""
    tokens = await client.tokenize(asked.prompt)
    return {
        "count": len(tokens),
        "max_model_len": (await client.get_model_info()).max_context_tokens,
        "tokens": [token.token_id for token in tokens],
        "token_strs": [token.token_bytes.decode(errors="replace") for token in tokens]
        if asked.return_token_strs
        else None,
    }


async def detokenize(client: AsyncClient, asked: DetokenizeRequest) -> Json:
    """The text of ids, special tokens included. Raises MptGrpcError."""
    return {"prompt": await client.detokenize(asked.tokens, skip_special_tokens=False)}


async def tokenizer_info(client: AsyncClient) -> Json:
    """The special tokens; MPT's have none for a beginning. Raises MptGrpcError."""
    info = await client.get_model_info()
    ends = [await client.detokenize([token], skip_special_tokens=False) for token in info.eos_token_ids[:1]]
    return {"eos_token": ends[0] if ends else None, "bos_token": None, "model_max_length": info.max_context_tokens}

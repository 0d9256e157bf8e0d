"""Makes unary, streaming and invalid calls to sys.argv[1], in environments that contain only the client."""

import asyncio
import sys

from mpt_grpc_client import AsyncClient, Client, InvalidRequestError

PROMPT = "Once upon a time"
TARGET = sys.argv[1]


async def stream_with_asyncio() -> str:
    async with (
        AsyncClient(TARGET, timeout=30) as client,
        client.stream(PROMPT, temperature=0, max_new_tokens=8) as stream,
    ):
        return "".join([piece async for piece in stream])


with Client(TARGET, timeout=30) as client:
    text = client.generate(PROMPT, temperature=0, max_new_tokens=8).text
    assert text

    with client.stream(PROMPT, temperature=0, max_new_tokens=8) as stream:
        assert "".join(stream) == text
    assert asyncio.run(stream_with_asyncio()) == text

    invalid: list[str] = []
    try:
        client.generate(PROMPT, temperature=-1)
    except InvalidRequestError as error:
        invalid += [violation.field for violation in error.violations]
    assert invalid == ["temperature"]

print("generated, streamed, refused")

"""Reads several asynchronous generators at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from typing import TypeVar

_Item = TypeVar("_Item")


async def interleave(generators: Sequence[AsyncGenerator[_Item]]) -> AsyncGenerator[_Item]:
    """Yields the items of all generators as they become available. The first error is raised and closes the others."""
    reading = {asyncio.ensure_future(anext(generator, None)): generator for generator in generators}
    try:
        while reading:
            done, _ = await asyncio.wait(reading, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                generator = reading.pop(task)
                if (item := task.result()) is not None:
                    reading[asyncio.ensure_future(anext(generator, None))] = generator
                    yield item
    finally:
        for task in reading:
            task.cancel()
        await asyncio.gather(*reading, return_exceptions=True)
        for generator in generators:
            await generator.aclose()

"""Texts are tokenized a few at once, and the number of those that wait is limited."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from functools import partial

import pytest

from mpt_grpc.errors import OverloadedError
from mpt_grpc.server.text_work import MAX_IN_PROGRESS, TextWork


class Text(str):
    """A text that weak references may refer to."""


async def test_long_texts_beyond_those_that_may_wait_are_refused_and_short_ones_are_not() -> None:
    work, may_end = TextWork(), threading.Event()
    tasks = [asyncio.create_task(work.run(may_end.wait, is_quick=False)) for _ in range(MAX_IN_PROGRESS)]
    await asyncio.sleep(0)
    with pytest.raises(OverloadedError, match="retry later"):
        await work.run(may_end.wait, is_quick=False)
    assert await work.run(lambda: "short", is_quick=True) == "short"
    may_end.set()
    assert all(await asyncio.gather(*tasks))
    assert await work.run(lambda: "long", is_quick=False) == "long"


async def test_the_work_of_a_caller_who_leaves_before_its_turn_is_not_done() -> None:
    work, may_end, done = TextWork(), threading.Event(), list[int]()
    first = [asyncio.create_task(work.run(may_end.wait, is_quick=False)) for _ in range(2)]
    waiting = [
        asyncio.create_task(work.run(lambda number=number: done.append(number), is_quick=False)) for number in range(3)
    ]
    await asyncio.sleep(0)
    waiting[1].cancel()
    await asyncio.wait({waiting[1]})
    may_end.set()
    await asyncio.gather(*first, waiting[0], waiting[2])
    assert sorted(done) == [0, 2]


async def test_the_text_of_a_caller_who_leaves_before_its_turn_is_freed_at_once() -> None:
    work, may_end, text = TextWork(), threading.Event(), Text("long")
    first = [asyncio.create_task(work.run(may_end.wait, is_quick=False)) for _ in range(2)]
    freed = weakref.ref(text)
    waiting = asyncio.create_task(work.run(partial(len, text), is_quick=False))
    del text
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.wait({waiting})
    del waiting
    gc.collect()
    assert freed() is None
    may_end.set()
    await asyncio.gather(*first)

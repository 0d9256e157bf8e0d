"""The execution of a load: starts each request at its time and records what arrives."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from random import Random
from time import perf_counter

from mpt_grpc.bench.endpoint import Answer, Endpoint, Prompt, RequestFailedError
from mpt_grpc.bench.load import Load, PlannedRequest
from mpt_grpc.bench.metrics import Timeline


async def run_load(endpoint: Endpoint, load: Load, report: Callable[[Timeline], object]) -> None:
    """Sends the requests of a load and reports each when it has ended. A cancellation cancels those in progress."""
    # Not from the seed: a second run must not find its prompts in the server's prefix cache.
    random = Random()
    prompts = [endpoint.prompt(request.num_prompt_tokens, random) for request in load.requests]
    slots = asyncio.Semaphore(load.concurrency or len(load.requests))
    begin_s = perf_counter()

    async def send(request: PlannedRequest, prompt: Prompt) -> None:
        planned_s = request.start_s if load.concurrency is None else None
        start_s, answer, failure = perf_counter(), Answer((), (), 0, 0), None
        try:
            answer = await endpoint.send(prompt, request.num_output_tokens)
        except RequestFailedError as error:
            failure = error.status
        finally:
            slots.release()
        report(
            Timeline(
                planned_s=planned_s,
                start_s=start_s - begin_s,
                end_s=perf_counter() - begin_s,
                message_times_s=tuple(time_s - begin_s for time_s in answer.message_times_s),
                message_num_tokens=answer.message_num_tokens,
                num_prompt_tokens=answer.num_prompt_tokens,
                num_output_tokens=answer.num_output_tokens,
                failure=failure,
            )
        )

    async with asyncio.TaskGroup() as tasks:
        for request, prompt in zip(load.requests, prompts, strict=True):
            await asyncio.sleep(begin_s + request.start_s - perf_counter())
            await slots.acquire()
            tasks.create_task(send(request, prompt))

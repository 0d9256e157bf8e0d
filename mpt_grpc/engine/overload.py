"""The refusals of requests for which a server has too much to do, and when their callers may return.

They go by the measured times of requests. A deadline that would pass is noticed at the arrival and again in the queue:
a request that ends too late is of no use, and costs others time.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable

from mpt_grpc.engine.request_record import RequestRecord
from mpt_grpc.engine.service_times import RunTime, ServiceTimes
from mpt_grpc.engine.state import EngineLoad
from mpt_grpc.errors import OverloadedError
from mpt_grpc.request import GenerationRequest

_CAUTION = 1.25
"""How many times as long as expected a request may wait and end in time."""
_MIN_RETRY_AFTER_S, _MAX_RETRY_AFTER_S = 0.1, 30.0


def queue_full(num_sequences: int, times: ServiceTimes, load: EngineLoad) -> OverloadedError:
    """Returns the refusal of a request for which there is no place."""
    why = f"the queue is full, with {num_sequences} outputs in progress: retry later"
    return OverloadedError(why, _jittered(times.wait_s(1, load.num_running)))


def too_late_at_arrival(
    record: RequestRecord, others: Iterable[GenerationRequest], times: ServiceTimes, load: EngineLoad
) -> OverloadedError | None:
    """Returns the refusal of a new request that would probably end too late, or None; `others` are in flight."""
    if record.deadline_s is None:
        return None
    wait_s = times.wait_s(_num_ahead(record.request, others) - load.num_running + 1, load.num_running)
    needed_s = _CAUTION * wait_s + times.run_time().seconds(max_new_tokens(record.request))
    left_s = record.deadline_s - record.arrival_time_s
    if needed_s <= left_s:
        return None
    return _too_late(f"{needed_s:.1f} s, {wait_s:.1f} s of them in the queue", left_s, needed_s - left_s)


def too_late_in_queue(record: RequestRecord, run_time: RunTime, now_s: float) -> OverloadedError | None:
    """Returns the refusal of a waiting request that would end too late even if it started now, or None."""
    if record.deadline_s is None:
        return None
    run_s, left_s = run_time.seconds(max_new_tokens(record.request)), max(0.0, record.deadline_s - now_s)
    if run_s <= left_s:
        return None
    waited_s = now_s - record.arrival_time_s
    return _too_late(f"{run_s:.1f} s, after {waited_s:.1f} s in the queue", left_s, waited_s)


def max_new_tokens(request: GenerationRequest) -> int | None:
    """Returns how many tokens each output may get besides the resumed ones, or None if the request does not set it."""
    most = request.stopping.max_new_tokens
    return None if most is None else most - min(map(len, request.outputs.values()))


def _num_ahead(request: GenerationRequest, others: Iterable[GenerationRequest]) -> float:
    """Returns how many sequences of the requests in flight run or start before those of a new one.

    The callers of one priority take turns by weight, as `FairQueue` has it for sequences that are equally long.
    """
    caller = request.caller
    num_urgent, num_of, weights = 0, Counter[str](), {caller.name: caller.quota.weight}
    for other in others:
        if other.priority > request.priority:
            num_urgent += other.sampling.num_sequences
        elif other.priority == request.priority:
            num_of[other.caller.name] += other.sampling.num_sequences
            weights[other.caller.name] = other.caller.quota.weight
    num_own = num_of.pop(caller.name, 0)
    num_turns = (num_own + 1) / caller.quota.weight
    return num_urgent + num_own + sum(min(number, num_turns * weights[name]) for name, number in num_of.items())


def _too_late(needed: str, left_s: float, retry_after_s: float) -> OverloadedError:
    why = f"the request would take about {needed}, and its timeout leaves {left_s:.1f} s: retry later"
    return OverloadedError(why, _jittered(retry_after_s))


def _jittered(wait_s: float) -> float:
    """Returns about this time, never twice the same: callers that are refused together do not return together."""
    return min(max(wait_s, _MIN_RETRY_AFTER_S), _MAX_RETRY_AFTER_S) * random.uniform(1, 2)

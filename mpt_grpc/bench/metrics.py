"""The statistics of a load, computed from the times at which tokens arrived. docs/benchmarking.md defines each."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

OBJECTIVES = ("ttft", "tpot", "e2e")
"""The times of a request that an objective can limit."""


@dataclass(frozen=True)
class Timeline:
    """What happened to one request. Times are in seconds after the start of the load."""

    planned_s: float | None
    """When it was to start; None in a closed loop, where that is when another ends."""
    start_s: float
    end_s: float
    message_times_s: tuple[float, ...] = ()
    """When each message with tokens arrived."""
    message_num_tokens: tuple[int, ...] = ()
    """The number of tokens in each of these messages."""
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    failure: str | None = None
    """The status of a request that failed; None if it succeeded."""

    @property
    def time_to_first_token(self) -> float:
        return self.message_times_s[0] - self.start_s

    @property
    def end_to_end_latency(self) -> float:
        """From the start to the last token."""
        return self.message_times_s[-1] - self.start_s

    @property
    def time_per_output_token(self) -> float | None:
        """The mean time of a token after the first; None if there is no second token."""
        if self.num_output_tokens < 2:
            return None
        return (self.end_to_end_latency - self.time_to_first_token) / (self.num_output_tokens - 1)

    def inter_token_latencies(self) -> list[float]:
        """Returns a value for each token after the first message. A message of n tokens counts as n equal gaps."""
        gaps: list[float] = []
        last_s = self.message_times_s[0]
        for time_s, num_tokens in zip(self.message_times_s[1:], self.message_num_tokens[1:], strict=True):
            if num_tokens:
                gaps += [(time_s - last_s) / num_tokens] * num_tokens
                last_s = time_s
        return gaps

    def meets(self, objective: Mapping[str, float]) -> bool:
        """Whether no time exceeds its limit."""
        times = {
            "ttft": self.time_to_first_token,
            "tpot": self.time_per_output_token or 0,
            "e2e": self.end_to_end_latency,
        }
        return all(times[name] <= limit_s for name, limit_s in objective.items())


@dataclass(frozen=True)
class Distribution:
    """Percentiles are interpolated linearly between the two nearest values, as in numpy."""

    mean: float
    p50: float
    p90: float
    p99: float


@dataclass(frozen=True)
class Summary:
    """The statistics of a load. Times are in seconds; distributions are None if they have no values."""

    num_completed: int
    failures: dict[str, int]
    """The number of requests that failed, by status. They count in no other value."""
    duration: float
    """From the start of the first request to the end of the last."""
    requests_per_second: float
    goodput: float | None
    """Requests per second that meet the objective; None without one."""
    output_tokens_per_second: float
    total_tokens_per_second: float
    """The rate of the tokens of prompts and outputs."""
    time_to_first_token: Distribution | None
    inter_token_latency: Distribution | None
    time_per_output_token: Distribution | None
    end_to_end_latency: Distribution | None
    start_delay: Distribution | None
    """How late the generator started requests; None in a closed loop."""


def summarize(timelines: Sequence[Timeline], objective: Mapping[str, float]) -> Summary:
    """Returns the statistics of at least one request. The objective has limits in seconds by name in OBJECTIVES."""
    completed = [timeline for timeline in timelines if timeline.failure is None]
    duration = max(timeline.end_s for timeline in timelines) - min(timeline.start_s for timeline in timelines)
    num_output_tokens = sum(timeline.num_output_tokens for timeline in completed)
    num_prompt_tokens = sum(timeline.num_prompt_tokens for timeline in completed)
    tpots = (timeline.time_per_output_token for timeline in completed)
    return Summary(
        num_completed=len(completed),
        failures=dict(Counter(timeline.failure for timeline in timelines if timeline.failure is not None)),
        duration=duration,
        requests_per_second=len(completed) / duration,
        goodput=sum(timeline.meets(objective) for timeline in completed) / duration if objective else None,
        output_tokens_per_second=num_output_tokens / duration,
        total_tokens_per_second=(num_prompt_tokens + num_output_tokens) / duration,
        time_to_first_token=_distribution([timeline.time_to_first_token for timeline in completed]),
        inter_token_latency=_distribution([gap for timeline in completed for gap in timeline.inter_token_latencies()]),
        time_per_output_token=_distribution([tpot for tpot in tpots if tpot is not None]),
        end_to_end_latency=_distribution([timeline.end_to_end_latency for timeline in completed]),
        start_delay=_distribution([t.start_s - t.planned_s for t in timelines if t.planned_s is not None]),
    )


def batch_over_time(timelines: Sequence[Timeline]) -> list[tuple[float, int]]:
    """Returns the number of streams between their first and last token, from each time at which it changes."""
    changes: Counter[float] = Counter()
    for timeline in timelines:
        if timeline.failure is None:
            changes[timeline.message_times_s[0]] += 1
            changes[timeline.message_times_s[-1]] -= 1
    steps, size = [], 0
    for time_s in sorted(changes):
        size += changes[time_s]
        steps.append((time_s, size))
    return steps


def _distribution(values: list[float]) -> Distribution | None:
    if not values:
        return None
    values.sort()
    mean = math.fsum(values) / len(values)
    return Distribution(mean, *(_percentile(values, fraction) for fraction in (0.5, 0.9, 0.99)))


def _percentile(ordered: list[float], fraction: float) -> float:
    position = fraction * (len(ordered) - 1)
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)

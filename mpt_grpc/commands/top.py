"""`mpt-grpc top`: what a server is doing, refreshed in the terminal."""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from statistics import quantiles

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from mpt_grpc.commands.connection import client_options
from mpt_grpc.commands.printable import printable
from mpt_grpc.errors import SettingsError
from mpt_grpc_client import Client, DeadlineExceededError, Load, ServerInfo, UnavailableError
from mpt_grpc_client.debug import EngineState, RequestState
from mpt_grpc_client.targets import resolve_targets

_TIMEOUT_S = 10
_BAR_WIDTH = 30
_MIN_ID, _MAX_ID = 8, 36
_COLUMNS = ("age", "state", "output", "tokens/s", "first", "prompt", "cached", "preempted")
_WIDTH, _NUM_COLUMNS_IF_NARROW = 72, 4
"""The width of a terminal that has room for all columns, and how many others show."""
_NO_LOAD = Load(0, 0, 0, 0, 0, 0, 0)


def run(parsed: argparse.Namespace) -> None:
    """Shows a server until Ctrl-C, also across restarts; only once with --once or without a terminal.

    Raises SettingsError for several targets, and MptGrpcError if the first measurement fails.
    """
    if len(resolve_targets(parsed.target)) > 1:
        raise SettingsError("--target: top shows one server; name one")
    console = Console(highlight=False)
    with Client(parsed.target, timeout=_TIMEOUT_S, **client_options(parsed)) as client:
        view = _View(client, console, parsed.rows)
        time.sleep(parsed.interval)
        if parsed.once or not console.is_interactive:
            console.print(view.frame())
            return
        with Live(view.frame(), console=console, screen=True, auto_refresh=False) as live:
            live.refresh()
            while True:
                time.sleep(parsed.interval)
                try:
                    frame = view.frame()
                except (UnavailableError, DeadlineExceededError) as error:
                    frame = Text(f"{error}; trying again")
                live.update(frame, refresh=True)


@dataclass(frozen=True)
class _Rates:
    """What a server did in an interval."""

    tokens_per_s: float
    steps_per_s: float
    batch_size: float
    accepted: float | None
    """The fraction of the drafts that were accepted, or None without any."""


class _View:
    """A server, as it is since the last measurement."""

    def __init__(self, client: Client, console: Console, num_rows: int) -> None:
        self._client, self._console, self._num_rows = client, console, num_rows
        self._before, self._before_s = client.get_server_info(), time.monotonic()

    def frame(self) -> RenderableType:
        """Measures. Raises MptGrpcError."""
        info, state = self._client.get_server_info(), self._client.get_engine_state()
        now_s = time.monotonic()
        load, duration_s = self._before.load, now_s - self._before_s
        if info.uptime < self._before.uptime or info.load.num_steps < load.num_steps:  # it was started again
            load, duration_s = _NO_LOAD, info.uptime
        self._before, self._before_s = info, now_s
        summary = _summary(info, state, _rates(load, info.load, duration_s))
        num_columns = len(_COLUMNS) if self._console.width >= _WIDTH else _NUM_COLUMNS_IF_NARROW
        return Group(summary, Text(), _requests(state, self._num_rows, num_columns))


def _rates(before: Load, after: Load, duration_s: float) -> _Rates:
    num_steps = after.num_steps - before.num_steps
    num_drafts = after.num_draft_tokens - before.num_draft_tokens
    num_accepted = after.num_accepted_tokens - before.num_accepted_tokens
    return _Rates(
        tokens_per_s=(after.num_output_tokens - before.num_output_tokens) / duration_s,
        steps_per_s=num_steps / duration_s,
        batch_size=(after.num_batched_sequences - before.num_batched_sequences) / num_steps if num_steps else 0,
        accepted=num_accepted / num_drafts if num_drafts else None,
    )


def _summary(info: ServerInfo, state: EngineState, rates: _Rates) -> RenderableType:
    load, limits = state.load, info.limits
    usage = 1 - load.num_free_blocks / load.num_blocks
    summary = Table.grid(padding=(0, 2))
    for name, value in (
        (
            "outputs",
            f"{load.num_running_requests} running (at most {limits.max_running_requests}),"
            f" {load.num_waiting_requests} waiting, {load.num_preparing_requests} preparing",
        ),
        (
            "tokens",
            f"{rates.tokens_per_s:.0f}/s in {rates.steps_per_s:.0f} steps/s,"
            f" {rates.batch_size:.1f} outputs in a step{_accepted(rates)}",
        ),
        ("first token", _first_tokens(state.completed_requests)),
    ):
        summary.add_row(name, value)
    bar = Table.grid(padding=(0, 1))
    bar.add_row(ProgressBar(total=1, completed=usage, width=_BAR_WIDTH), f"{usage:.0%} of {load.num_blocks:,} blocks")
    summary.add_row("KV cache", bar)
    title = Text(f"mpt-grpc {info.version}, up {_duration(info.uptime)}", style="bold")
    return Group(title, summary)


def _accepted(rates: _Rates) -> str:
    return "" if rates.accepted is None else f", {rates.accepted:.0%} of drafts accepted"


def _first_tokens(completed: tuple[RequestState, ...]) -> str:
    times_s = [t for request in completed if (t := request.timings.time_to_first_token) is not None]
    if len(times_s) < 2:
        return "too few completed requests"
    cuts = quantiles(times_s, n=20, method="inclusive")
    return f"median {_ms(cuts[9])}, p95 {_ms(cuts[18])}, over the last {len(times_s)} completed requests"


def _requests(state: EngineState, num_rows: int, num_columns: int) -> RenderableType:
    """Returns the requests in progress that are the oldest."""
    requests = sorted(state.active_requests, key=lambda request: request.arrival_time)
    table = Table(box=None, padding=(0, 1, 0, 0))
    # The only column that may wrap is the one that a narrow terminal shortens first. Its text does not.
    table.add_column("request", min_width=_MIN_ID)
    for column in _COLUMNS[:num_columns]:
        table.add_column(column, no_wrap=True, justify="right")
    for request in requests[:num_rows]:
        usage, timings = request.usage, request.timings
        decode_s = timings.decode_time or 0
        cells = (
            _duration(state.time - request.arrival_time),
            _phase(request),
            str(usage.num_output_tokens),
            f"{usage.num_output_tokens / decode_s:.0f}" if decode_s else "",
            "" if timings.time_to_first_token is None else _ms(timings.time_to_first_token),
            str(usage.num_prompt_tokens),
            str(usage.num_cached_tokens),
            str(usage.num_preemptions or ""),
        )
        request_id = Text(printable(request.request_id[:_MAX_ID]), no_wrap=True, overflow="ellipsis")
        table.add_row(request_id, *cells[:num_columns])
    more = len(requests) - num_rows
    return Group(table, Text(f"and {more} newer requests")) if more > 0 else table


def _phase(request: RequestState) -> str:
    if not request.sequences:
        return "preparing"
    if not any(sequence.blocks for sequence in request.sequences):
        return "waiting"
    return "prefill" if request.timings.time_to_first_token is None else "decode"


def _ms(time_s: float) -> str:
    return f"{time_s * 1e3:.0f} ms"


def _duration(time_s: float) -> str:
    minutes, seconds = divmod(max(0.0, time_s), 60)
    if not minutes:
        return f"{seconds:.1f} s"
    hours, minutes = divmod(int(minutes), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds:.0f} s"

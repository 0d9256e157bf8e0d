"""Functions run in order in a few threads, and a cancelled one leaves the queue with what it holds."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future
from functools import partial

import pytest

from mpt_grpc.worker_threads import WorkerThreads


class Text(str):
    """A text that weak references may refer to."""


@pytest.fixture
def may_end() -> Iterator[threading.Event]:
    event = threading.Event()
    yield event
    event.set()


def test_functions_run_in_the_order_in_which_they_were_submitted(may_end: threading.Event) -> None:
    threads, done = WorkerThreads(1, "test"), list[int]()
    threads.submit(may_end.wait)
    futures = [threads.submit(partial(done.append, number)) for number in range(5)]
    futures[2].cancel()
    may_end.set()
    for future in futures[:2] + futures[3:]:
        future.result(30)
    assert done == [0, 1, 3, 4]


def test_as_many_functions_run_at_once_as_there_are_threads() -> None:
    threads, both = WorkerThreads(2, "test"), threading.Barrier(2)
    futures = [threads.submit(lambda: both.wait(30)) for _ in range(8)]
    assert sorted(future.result(30) for future in futures) == [0] * 4 + [1] * 4


def test_an_error_is_raised_by_the_future_and_the_thread_goes_on() -> None:
    threads = WorkerThreads(1, "test")
    failed = threads.submit(lambda: 1 // 0)
    assert threads.submit(lambda: "next").result(30) == "next"
    with pytest.raises(ZeroDivisionError):
        failed.result(30)


def test_what_a_cancelled_function_holds_is_freed_while_the_threads_are_busy(may_end: threading.Event) -> None:
    threads, text = WorkerThreads(1, "test"), Text("long")
    threads.submit(may_end.wait)
    freed = weakref.ref(text)
    future = threads.submit(partial(len, text))
    del text
    future.cancel()
    gc.collect()
    assert freed() is None


def test_a_future_that_was_cancelled_before_does_not_run(may_end: threading.Event) -> None:
    threads, done, future = WorkerThreads(1, "test"), list[int](), Future[None]()
    threads.submit(may_end.wait)
    future.cancel()
    threads.submit(partial(done.append, 1), future)
    may_end.set()
    threads.submit(partial(done.append, 2)).result(30)
    assert done == [2]


def test_nothing_more_runs_once_the_threads_are_closed(may_end: threading.Event) -> None:
    threads, has_begun = WorkerThreads(1, "test"), threading.Event()
    running = threads.submit(lambda: has_begun.set() or may_end.wait())
    waiting = threads.submit(lambda: "waiting")
    assert has_begun.wait(30)
    threads.close()
    late = threads.submit(lambda: "late")
    for future in (waiting, late):
        with pytest.raises(CancelledError):
            future.result(30)
    may_end.set()
    assert running.result(30)

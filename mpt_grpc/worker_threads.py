"""Threads for work that callers may cancel: work that is cancelled while it waits leaves the queue at once.

An executor of the standard library keeps a cancelled function in its queue until a thread is free.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

_Result = TypeVar("_Result")


class WorkerThreads:
    """Runs functions in a few threads, in the order in which they are submitted. Any thread may submit and cancel."""

    def __init__(self, num_threads: int, name: str) -> None:
        self._num_threads = num_threads
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix=name)
        self._lock = threading.Lock()
        self._waiting: OrderedDict[Future[Any], Callable[[], Any]] = OrderedDict()
        self._num_busy = 0
        self._is_closed = False

    def submit(self, function: Callable[[], _Result], future: Future[_Result] | None = None) -> Future[_Result]:
        """Returns the future of a function's result, which may be made before; cancelled, the function is dropped."""
        future = Future() if future is None else future
        with self._lock:
            if not self._is_closed:
                self._waiting[future] = function
                if self._num_busy < self._num_threads:
                    self._threads.submit(self._work)
                    self._num_busy += 1
        if self._is_closed:
            future.cancel()
        future.add_done_callback(self._drop)  # at once if it has been cancelled
        return future

    def close(self) -> None:
        """Cancels what waits, and all that is submitted from now on. Does not wait for what runs."""
        with self._lock:
            self._is_closed = True
            waiting = list(self._waiting)
        for future in waiting:
            future.cancel()
        self._threads.shutdown(wait=False)

    def _drop(self, future: Future[Any]) -> None:
        with self._lock:
            self._waiting.pop(future, None)

    def _work(self) -> None:
        """Runs functions until none waits."""
        while True:
            with self._lock:
                if not self._waiting:
                    self._num_busy -= 1
                    return
                future, function = self._waiting.popitem(last=False)
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function())
                except BaseException as error:
                    future.set_exception(error)
            del future, function  # while the thread waits, it holds nothing

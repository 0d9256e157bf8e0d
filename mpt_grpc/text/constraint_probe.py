"""Builds grammars in processes of their own. Started by `probe.py` before the first constraint.

A grammar may never terminate or may overflow the stack, which no exception handler can catch; here that takes down only
the process that builds it. Each is forked from this one, which has imported everything already: that takes 2 ms instead
of 80. This program imports nothing from its package, and ends when the server closes the socket given as argument.

Each message on that socket carries one end of another one, on which the new process receives
{"grammar": ..., "limits": ..., "cpu_s": ..., "niceness": ...} and sends "ok", or why the grammar is refused after
"refused: ". If it is stopped by a limit, or crashes, it sends nothing.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import sys

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

WALL_S = 5.0
MEMORY_BYTES = 1 << 30
# Half of a server thread's stack, so that a grammar that passes here does not overflow the stack there.
STACK_BYTES = 4 << 20


def serve(control: socket.socket, tokenizer: LLTokenizer) -> None:
    """Forks a process for each socket that arrives, until `control` is closed."""
    while received := socket.recv_fds(control, 1, 1)[1]:
        with socket.socket(fileno=received[0]) as connection:
            if os.fork() == 0:
                control.close()
                build(connection, tokenizer)
                os._exit(0)


def build(connection: socket.socket, tokenizer: LLTokenizer) -> None:
    """Builds the grammar and computes its first mask within the limits."""
    with connection.makefile("rw", encoding="utf-8") as stream:
        task = json.loads(stream.readline())
        os.nice(task["niceness"])
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
        signal.setitimer(signal.ITIMER_PROF, task["cpu_s"])  # the signals of both timers end the process
        signal.setitimer(signal.ITIMER_REAL, WALL_S)
        matcher = LLMatcher(tokenizer, task["grammar"], limits=LLParserLimits(**task["limits"]), log_level=0)
        if not matcher.is_error():
            matcher.compute_bitmask()
        stream.write(f"refused: {matcher.get_error()}" if matcher.is_error() else "ok")


if __name__ == "__main__":
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # lets the kernel forget processes that have ended
    resource.setrlimit(resource.RLIMIT_STACK, (STACK_BYTES, resource.getrlimit(resource.RLIMIT_STACK)[1]))
    serve(socket.socket(fileno=int(sys.argv[1])), LLTokenizer("byte"))

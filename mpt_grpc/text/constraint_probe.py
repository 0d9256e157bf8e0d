"""Builds one grammar and exits: a program of its own, so that a grammar that never ends or that overflows the stack,
which no exception can stop, takes down only this process. Its reader is `constraints.py`.

Standard input: {"grammar": …, "limits": …}. Standard output: why the grammar is refused, or nothing.
It imports nothing of this package and little else, because every new constraint waits for it.
"""

from __future__ import annotations

import json
import os
import resource
import sys

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

CPU_S = 1
MEMORY_BYTES = 1 << 30
# Half of what a thread of the server has, so that what passes here has room there.
STACK_BYTES = 4 << 20

if __name__ == "__main__":
    os.nice(19)  # the model's threads go first
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_S, CPU_S))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_STACK, (STACK_BYTES, STACK_BYTES))
    task = json.load(sys.stdin)
    matcher = LLMatcher(LLTokenizer("byte"), task["grammar"], limits=LLParserLimits(**task["limits"]), log_level=0)
    if not matcher.is_error():
        matcher.compute_bitmask()
    print(matcher.get_error())

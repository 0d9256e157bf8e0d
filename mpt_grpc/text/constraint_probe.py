"""Builds one grammar and exits. Run by `constraints.py` for every new constraint.

This is a separate program because a grammar may never terminate or may overflow the stack, which no exception handler
can catch; that then takes down only this process.

Standard input: {"grammar": ..., "limits": ...}. Standard output: why the grammar is refused, or nothing.
It imports nothing from this package and little else, because every new constraint has to wait for it.
"""

from __future__ import annotations

import json
import os
import resource
import sys

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

CPU_S = 1
MEMORY_BYTES = 1 << 30
# Half of a server thread's stack, so that a grammar that passes here does not overflow the stack there.
STACK_BYTES = 4 << 20

if __name__ == "__main__":
    os.nice(19)  # give priority to the model's threads
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_S, CPU_S))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_STACK, (STACK_BYTES, STACK_BYTES))
    task = json.load(sys.stdin)
    matcher = LLMatcher(LLTokenizer("byte"), task["grammar"], limits=LLParserLimits(**task["limits"]), log_level=0)
    if not matcher.is_error():
        matcher.compute_bitmask()
    print(matcher.get_error())

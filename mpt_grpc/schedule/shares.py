"""How the running sequences share the tokens of a step.

Each gets one. Beyond that, higher priorities come first, and among equal ones the callers have equal parts of the step,
by weight; what one does not need is shared among the others. A caller's sequences get its part in the order of arrival.
So a prompt waits for those of its own caller, and for no more of another than if that one had a single prompt.
"""

from __future__ import annotations

import math
from itertools import groupby

from mpt_grpc.schedule.sequence import Sequence


def shares(by_rank: list[Sequence], num_tokens: int, head: Sequence | None = None) -> dict[Sequence, int]:
    """Returns the number of tokens that each sequence computes in a step of `num_tokens`, at least one for each.

    `head` is one of them that is not running yet: it may get none. One that has nothing to compute gets none.
    """
    counts = {sequence: sequence.num_uncomputed for sequence in by_rank}
    if sum(counts.values()) <= num_tokens:
        return counts
    least = {sequence: min(1, num) if sequence is not head else 0 for sequence, num in counts.items()}
    rest, reserved = num_tokens, sum(least.values())
    for _, peers in groupby(by_rank, key=lambda sequence: sequence.request.priority):
        by_caller: dict[str, list[Sequence]] = {}
        for sequence in peers:
            by_caller.setdefault(sequence.request.caller.name, []).append(sequence)
        callers = [(sum(counts[s] for s in own), own[0].request.caller.quota.weight, own) for own in by_caller.values()]
        callers.sort(key=lambda caller: caller[0] / caller[1])
        weights = sum(weight for _, weight, _ in callers)
        for wanted, weight, own in callers:
            own_least = sum(least[sequence] for sequence in own)
            reserved -= own_least
            share = max(own_least, min(wanted, math.ceil(rest * weight / weights), rest - reserved))
            weights, rest = weights - weight, rest - share
            spare = share - own_least
            for sequence in own:
                more = min(counts[sequence] - least[sequence], spare)
                counts[sequence], spare = least[sequence] + more, spare - more
    return counts

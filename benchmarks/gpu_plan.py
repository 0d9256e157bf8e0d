"""What a step of MPT-7B must cost at least on a card, from the bytes that it reads and the products that it computes.

python -m benchmarks.gpu_plan [--card H200] [--limits build/bench/gpu.json] [--share 0.8] [--memory]

A decoding step reads all weights and each sequence's keys and values once. The limits of a card are those of its data
sheet, or those that `make bench-gpu` measured. The last columns say how long a step may take to reach a share of the
limit, and how much of that is left for everything else. `--memory` prints how many tokens the cache of a card holds.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

from mpt_grpc.model.config import MPTConfig
from mpt_grpc.model.weights import num_parameters
from mpt_grpc.settings import CacheSettings

MPT_7B = {"model_type": "mpt", "d_model": 4096, "n_heads": 32, "n_layers": 32, "vocab_size": 50432, "max_seq_len": 2048}


@dataclass(frozen=True)
class Limits:
    """What a card can do in a second."""

    bytes_per_s: float
    operations_per_s: float
    """The operations of 16-bit matrix products; a multiplication and an addition count as two."""


DATA_SHEETS = {
    "L4": Limits(0.30e12, 121e12),
    "A100": Limits(2.04e12, 312e12),
    "H100": Limits(3.35e12, 989e12),
    "H200": Limits(4.80e12, 989e12),
}


MEMORY_GIB = {
    "V100, 16 GB": 15.8,
    "A100 and newer, with `--memory-limit 16GiB`": 16.0,
    "L4, A10, 24 GB": 22.5,
    "A100, 40 GB": 39.5,
    "A100, H100, 80 GB": 79.2,
    "H200, 141 GB": 139.8,
}
"""What the driver reports, which is less than on the box."""
OTHER_GIB = 0.8
"""An estimate of what the driver, the recorded steps and a step's tensors take."""
MEMORY_FRACTION = CacheSettings().memory_fraction


@dataclass(frozen=True)
class StepCost:
    """What a step must read and compute."""

    weight_bytes: int
    cache_bytes: int
    operations: int

    def seconds(self, limits: Limits) -> float:
        """Returns the time that the card needs, if it reads and computes at the same time."""
        num_bytes = self.weight_bytes + self.cache_bytes
        return max(num_bytes / limits.bytes_per_s, self.operations / limits.operations_per_s)


def step_cost(config: MPTConfig, num_sequences: int, context: int, *, chunk: int = 0, cache_bits: int = 16) -> StepCost:
    """Returns the cost of a step in which sequences decode after `context` tokens, beside `chunk` tokens of a prompt.

    The weights have 16 bits.
    """
    token_bytes = _token_bytes(config, cache_bits)
    parameters = num_parameters(config)
    tokens = num_sequences + chunk
    pairs = num_sequences * context + chunk * (chunk + 1) // 2
    return StepCost(
        weight_bytes=2 * parameters,
        cache_bytes=(num_sequences * context + chunk) * token_bytes,
        operations=2 * parameters * tokens + 4 * pairs * config.d_model * config.n_layers,
    )


def _token_bytes(config: MPTConfig, cache_bits: int) -> int:
    """Returns the size of a token's keys and values."""
    head_bytes = config.head_dim * cache_bits // 8 + (2 if cache_bits == 8 else 0)
    return 2 * config.n_layers * config.n_kv_heads * head_bytes


def cache_tokens(config: MPTConfig, memory_gib: float, *, weight_bits: int = 16, cache_bits: int = 16) -> int:
    """Returns the tokens for which a card has memory beside the weights, by the default of `--memory-fraction`."""
    left_gib = MEMORY_FRACTION * memory_gib - weight_bits / 8 * num_parameters(config) / 2**30 - OTHER_GIB
    return int(left_gib * 2**30 / _token_bytes(config, cache_bits))


def memory_table() -> str:
    """Returns the tokens of KV cache, and the requests of 600 tokens, beside MPT-7B on cards, in Markdown."""
    config = MPTConfig.from_dict(MPT_7B)
    rows = ["| Card | float16 | `--quantize int8` | `--quantize int8 --kv-cache-dtype int8` |", "|---|---|---|---|"]
    for card, gib in MEMORY_GIB.items():
        cells = [card]
        for bits, cache_bits in ((16, 16), (8, 16), (8, 8)):
            tokens = cache_tokens(config, gib, weight_bits=bits, cache_bits=cache_bits) // 100 * 100
            has_triton = not card.startswith("V100")
            cells.append(f"{tokens:,} ({tokens // 600})" if has_triton or cache_bits == 16 else "needs Triton")
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def table(limits: Limits, share: float) -> str:
    """Returns the costs of steps in Markdown."""
    config = MPTConfig.from_dict(MPT_7B)
    rows = [
        "| sequences | context | chunk | cache | weights GB | cache GB | limit ms | tokens/s"
        f" | {share:.0%} of the limit ms | left ms |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for num_sequences, context, chunk, bits in (
        *((n, context, 0, 16) for n in (1, 16, 64) for context in (512, 2048)),
        *((64, 2048, 0, 8), (0, 0, 512, 16), (16, 512, 512, 16)),
    ):
        cost = step_cost(config, num_sequences, context, chunk=chunk, cache_bits=bits)
        seconds = cost.seconds(limits)
        allowed = seconds / share
        cells: tuple[object, ...] = (
            *(num_sequences, context, chunk, f"{bits} bits"),
            *(f"{cost.weight_bytes / 1e9:.1f}", f"{cost.cache_bytes / 1e9:.1f}", f"{1000 * seconds:.2f}"),
            f"{(num_sequences + chunk) / seconds:,.0f}",
            *(f"{1000 * allowed:.2f}", f"{1000 * (allowed - seconds):.2f}"),
        )
        rows.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--card", choices=DATA_SHEETS, default="H200", help="the limits of its data sheet")
    parser.add_argument("--limits", type=Path, help="a file of make bench-gpu, whose limits apply instead")
    parser.add_argument("--share", type=float, default=0.8, help="the share of the limit to reach")
    parser.add_argument("--memory", action="store_true", help="print the tokens of KV cache by card instead")
    parsed = parser.parse_args()
    if parsed.memory:
        print(memory_table())
        return
    limits = DATA_SHEETS[parsed.card]
    if parsed.limits is not None:
        limits = Limits(**json.loads(parsed.limits.read_text(encoding="utf-8"))["limits"][0])
    print(table(limits, parsed.share))


if __name__ == "__main__":
    main()

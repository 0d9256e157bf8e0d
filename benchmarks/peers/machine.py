"""What the machine could reach: the limits of a run, measured in it."""

from __future__ import annotations

import os
import platform
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.engine_throughput import read_bandwidth
from benchmarks.peers.checkpoint import Shape

_CPU_INFO = Path("/proc/cpuinfo")
_FLAGS = {
    "avx2": "AVX2",
    "avx512f": "AVX-512",
    "avx512_vnni": "AVX512-VNNI",
    "avx512_bf16": "AVX512-BF16",
    "amx_bf16": "AMX-BF16",
    "amx_int8": "AMX-INT8",
}
_ROWS, _SIZE = 512, 2048


@dataclass(frozen=True)
class Limits:
    """Measured with the threads of the run."""

    read_bytes_per_s: float
    """The rate of the fastest sum over a gibibyte of memory."""
    flops_per_s: float
    """The rate of PyTorch's matrix products, in float32 or in bfloat16, whichever is faster here."""

    def decode(self, shape: Shape, num_sequences: int) -> float:
        """Returns the tokens per second if a step only reads the weights, of 16 bits, or only multiplies."""
        steps_per_s = self.read_bytes_per_s / (2 * shape.num_parameters)
        return min(num_sequences * steps_per_s, self.flops_per_s / (2 * shape.num_parameters))

    def prefill(self, shape: Shape) -> float:
        """Returns the tokens per second of the layers' products alone."""
        return self.flops_per_s / (2 * shape.num_layer_parameters)


def description(threads: int) -> str:
    """Returns the processor, the number of cores, and which instructions for matrices it has."""
    lines = _CPU_INFO.read_text(encoding="utf-8").splitlines() if _CPU_INFO.exists() else []
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = fields.get("flags", "").split()
    name = fields.get("model name", platform.machine())
    known = ", ".join(label for flag, label in _FLAGS.items() if flag in flags)
    return f"{name}, {os.cpu_count()} cores ({threads} threads used){f' with {known}' if known else ''}"


def measure() -> Limits:
    """Measures with PyTorch's number of threads."""
    return Limits(read_bandwidth(torch.device("cpu")), max(_flops_per_s(torch.float32), _flops_per_s(torch.bfloat16)))


def _flops_per_s(dtype: torch.dtype) -> float:
    x, weight = torch.rand(_ROWS, _SIZE).to(dtype), torch.rand(_SIZE, _SIZE).to(dtype)
    best_s = float("inf")
    for _ in range(5):
        start_s = time.perf_counter()
        torch.nn.functional.linear(x, weight)
        best_s = min(best_s, time.perf_counter() - start_s)
    return 2 * _ROWS * _SIZE * _SIZE / best_s

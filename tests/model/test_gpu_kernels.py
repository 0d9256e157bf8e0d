"""The kernels for GPUs compile for cards that this machine does not have, and fit into them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton, which is built for Linux")


import triton
from model import triton_checks as checks
from triton.backends.compiler import GPUTarget

from benchmarks.gpu_kernels import CARDS, SHAPES, Shape, compile_launch, launches_of, products
from mpt_grpc.model.attention.triton_backend import TritonAttention
from mpt_grpc.model.triton_launch import Launch

SMALLEST_SHARED_BYTES = 99 << 10
"""What a program may have on any card with compute capability 8.0 or newer."""
TENSOR_CORES = {80: ("mma", "mma"), 90: ("wgmma", "mma"), 100: ("tcgen05", "mma")}
"""The instructions of prefill and decoding; a decoding tile is too small for the newer ones."""


@pytest.fixture(autouse=True)
def _empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.mark.parametrize("capability", TENSOR_CORES)
@pytest.mark.parametrize("shape", [pytest.param(shape, id=shape.name) for shape in SHAPES])
def test_no_kernel_spills_registers_and_attention_uses_tensor_cores(shape: Shape, capability: int) -> None:
    prefill, decode = TENSOR_CORES[capability]
    expected = {"store": "", "attend, prefill": prefill, "attend, decode": decode, "merge": ""}
    instructions = {}
    for name, launch in launches_of(shape):
        compiled = compile_launch(launch, capability)
        instructions[name] = compiled.tensor_cores
        assert compiled.spilled_bytes == 0, name
        assert compiled.shared_bytes <= SMALLEST_SHARED_BYTES
        assert compiled.programs(CARDS[capability], launch.num_warps) >= 2
    assert instructions == expected


@pytest.mark.parametrize("capability", TENSOR_CORES)
def test_products_of_many_rows_use_the_larger_instructions(capability: int) -> None:
    """Batch-invariant ones use the same for any number of rows."""
    many, few = TENSOR_CORES[capability]
    for form, rows, launch in products():
        compiled = compile_launch(launch, capability)
        assert compiled.tensor_cores == (few if rows == "1 row" else many), (form, rows)
        assert compiled.spilled_bytes == 0
        assert compiled.shared_bytes <= SMALLEST_SHARED_BYTES


class Driver:
    """What Triton asks about a card before it compiles for it."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return device


def test_steps_of_all_sizes_run_the_same_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton compiles for the values and addresses of arguments, while requests wait, unless they are exempt."""
    monkeypatch.setattr(triton.runtime.driver, "_active", Driver())
    compiled = []

    def compile_only(launch: Launch) -> None:
        options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
        compiled.append(launch.kernel.warmup(**launch.arguments, grid=launch.grid, **options))

    monkeypatch.setattr(Launch, "__call__", compile_only)
    config = checks.make_config({})
    backend = TritonAttention(config, torch.device("cpu"))
    for spans in ([(0, 1)], [(300, 1), (5, 1), (16, 1)], [(255, 1)] * 16, [(3, 70)], [(40, 3), (1, 1), (10, 200)]):
        step = checks.make_step(config, spans, torch.float16, torch.float16)
        for layer in (0, 1):
            backend.bind(step.cache, step.metadata)(layer, step.query, step.key, step.value)
    assert len(compiled) > 20
    names = sorted(kernel.name for kernel in set(compiled))
    assert names == ["attend", "attend", "merge", "store"], "attend has one form for chunks and one for decoding"

"""The kernels for GPUs compile for cards that this machine does not have, and fit into them."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is only built for Linux")

from benchmarks.gpu_kernels import CARDS, SHAPES, Shape, compile_launch, launches_of

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

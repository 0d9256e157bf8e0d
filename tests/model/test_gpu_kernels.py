"""The kernels for GPUs compile for cards that this machine does not have, and fit into them."""

from __future__ import annotations

import random
from contextlib import suppress
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton, which is built for Linux")


import triton
from model import triton_checks as checks
from triton.backends.compiler import GPUTarget

from benchmarks.gpu_kernels import CARDS, SHAPES, Shape, compile_launch, launches_of, products
from mpt_grpc.model.attention.triton_backend import TritonAttention
from mpt_grpc.model.config import MPTConfig
from mpt_grpc.model.kv_cache import KVCache
from mpt_grpc.model.linear import WeightFormat
from mpt_grpc.model.runner import Runner
from mpt_grpc.model.triton_launch import Launch
from mpt_grpc.model.weights import load_model
from mpt_grpc.step import PromptScoring, SequenceStep, StepPlan

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


@pytest.mark.parametrize("max_sequences", [3, 20])
def test_a_warm_up_launches_every_form_of_each_kernel(
    max_sequences: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A form is compiled when it is first launched, so that requests would wait for another one."""
    forms: set[tuple[object, ...]] = set()

    def note(launch: Launch) -> None:
        constants = sorted((name, value) for name, value in launch.arguments.items() if name.isupper())
        forms.add((launch.kernel, *constants, launch.num_warps, launch.num_stages))

    monkeypatch.setattr(Launch, "__call__", note)
    checks.make_checkpoint(tmp_path, checks.tiny_config())
    weight_format = WeightFormat(torch.float16, checks.CPU, quantize=True, by_triton=True)
    config = MPTConfig.from_file(tmp_path / "config.json")
    model = load_model(tmp_path, config, weight_format)
    cache = KVCache(config, 64, checks.BLOCK_SIZE, torch.float16, checks.CPU)
    attention, recorder = TritonAttention(config, checks.CPU), checks.Repeating()
    runner = Runner(model, cache, attention, checks.CPU, config.vocab_size, recorder)
    runner.warm_up(max_sequences, max_tokens=300)
    known = len(forms)
    chunks = [[(0, length)] for length in (2, 16, 17, 70, 129, 200)]
    decoding = [[(9, 1)] * number for number in range(1, max_sequences + 1)]
    for spans in chunks + decoding:
        plan, _ = checks.make_plan(spans, random.Random(0))
        runner.run(plan)
    scored = SequenceStep(0, "scored", (1,) * 70, 0, tuple(range(5)), (), scoring=PromptScoring(0, (1,) * 69, 0))
    with suppress(FloatingPointError):  # nothing has been computed
        runner.run(StepPlan((scored,)))
    assert len(forms) == known > 15

"""Compiles the kernels for GPUs, without one, and prints what they use of each card and how many run there at once.

python -m benchmarks.gpu_kernels [--capability 8.0 9.0]

The tiles are those of `model/attention/tiling.py`, for the shapes of published checkpoints and others, and of
`model/triton_linear.py`. Nothing is run or timed.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mpt_grpc.model.attention.triton_operator import launches
from mpt_grpc.model.triton_launch import Launch
from mpt_grpc.model.triton_linear import launch as product

_TYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.int8: "i8",
    torch.int64: "i64",
}
_META = torch.device("meta")
_BLOCK_SIZE, _CONTEXT = 16, 2048
_REGISTERS, _RESERVED_BYTES = 65_536, 1024
"""Registers of a multiprocessor, and the shared memory that each of its programs takes besides its own."""


@dataclass(frozen=True)
class Card:
    """The limits of one multiprocessor (CUDA's programming guide, technical specifications by compute capability)."""

    name: str
    shared_bytes: int
    max_warps: int
    max_programs: int


CARDS = {
    80: Card("A100", 164 << 10, 64, 32),
    86: Card("A10, RTX 30", 100 << 10, 48, 16),
    90: Card("H100, H200", 228 << 10, 64, 32),
    100: Card("B200", 228 << 10, 64, 32),
    120: Card("RTX 50", 100 << 10, 48, 24),
}
"""By compute capability, times 10."""


@dataclass(frozen=True)
class Shape:
    """What determines the kernels of a model."""

    name: str
    n_heads: int
    n_kv_heads: int
    head_dim: int
    dtype: torch.dtype = torch.float16
    cache_dtype: torch.dtype = torch.float16
    window: int = -1


SHAPES = (
    Shape("MPT-7B", 32, 32, 128),
    Shape("MPT-7B, int8 cache", 32, 32, 128, cache_dtype=torch.int8),
    Shape("MPT-30B", 64, 64, 112),
    Shape("8 heads of 64, sliding window", 8, 8, 64, window=4096),
    Shape("24 heads over 8", 24, 8, 128),
    Shape("32 heads over 1", 32, 1, 128, torch.bfloat16, torch.bfloat16),
    Shape("32 heads over 1, int8 cache", 32, 1, 128, cache_dtype=torch.int8),
)


@dataclass(frozen=True)
class Compiled:
    """What a kernel uses of a multiprocessor."""

    registers: int
    """For each thread."""
    spilled_bytes: int
    """For each thread; registers that did not suffice."""
    shared_bytes: int
    tensor_cores: str
    """The instruction that multiplies matrices; empty if there is none."""

    def programs(self, card: Card, num_warps: int) -> int:
        """Returns how many programs run on a multiprocessor at once."""
        by_registers = _REGISTERS // (num_warps * -(-self.registers * 32 // 256) * 256)
        by_memory = card.shared_bytes // (self.shared_bytes + _RESERVED_BYTES)
        return min(by_registers, by_memory, card.max_warps // num_warps, card.max_programs)


def launches_of(shape: Shape) -> Iterator[tuple[str, Launch]]:
    """Yields the launches of a step with sequences that decode and one with a chunk, with their names."""
    num_sequences, num_tokens, num_blocks = 64, 64 + 512, 8192
    row = shape.head_dim + (2 if shape.cache_dtype == torch.int8 else 0)
    width = (shape.n_heads + 2 * shape.n_kv_heads) * shape.head_dim
    qkv = _tensor(num_tokens, width, dtype=shape.dtype)
    heads = (shape.n_heads, shape.n_kv_heads, shape.n_kv_heads)
    parts = qkv.split([n * shape.head_dim for n in heads], dim=-1)
    query, key, value = (part.unflatten(-1, (n, shape.head_dim)) for part, n in zip(parts, heads, strict=True))
    cache = _tensor(32, num_blocks, shape.n_kv_heads, _BLOCK_SIZE, row, dtype=shape.cache_dtype)
    splits = (num_sequences, 1, shape.n_heads, _CONTEXT // 256)
    kernels = launches(
        *(query, key, value, cache, cache, 3),
        *(_indices(num_tokens), _indices(num_tokens), _indices(num_sequences + 1), _indices(num_sequences)),
        *(_indices(num_sequences, _CONTEXT // _BLOCK_SIZE), _indices(64, 2), _indices(8, 2), _tensor(shape.n_heads)),
        *(0.1, shape.window),
        *(_tensor(num_tokens, shape.n_kv_heads), _tensor(*splits, shape.head_dim), _tensor(*splits), _tensor(*splits)),
        context=query.contiguous(),
    )
    yield from zip(("store", "attend, prefill", "attend, decode", "merge"), kernels, strict=True)


def products() -> Iterator[tuple[str, str, Launch]]:
    """Yields the launches of products with a matrix of MPT-7B's, with the names of its form and of the rows."""
    d_in, d_out = 4096, 12288
    scales = _tensor(d_out)
    for form, weight in (
        ("8 bits", _tensor(d_out, d_in, dtype=torch.int8)),
        ("batch-invariant", _tensor(d_out, d_in, dtype=torch.float16)),
    ):
        is_invariant = weight.dtype != torch.int8
        for num_rows in (1, 64, 512)[is_invariant:]:
            x, y = (_tensor(num_rows, size, dtype=torch.float16) for size in (d_in, d_out))
            one = product(x, weight, None if is_invariant else scales, None, None, is_invariant, y=y)
            yield form, f"{num_rows} row{'s'[: num_rows > 1]}", one


def compile_launch(launch: Launch, capability: int) -> Compiled:
    """Compiles what a launch would compile on a card of this compute capability, times 10."""
    kernel = launch.kernel
    signature, constants, alignment = {}, {}, {}
    for number, parameter in enumerate(kernel.params):
        argument = launch.arguments[parameter.name]
        if parameter.is_constexpr:
            signature[parameter.name], constants[(number,)] = "constexpr", argument
            continue
        signature[parameter.name] = _type(argument)
        is_aligned = isinstance(argument, Tensor) or (isinstance(argument, int) and argument % 16 == 0)
        if is_aligned and not (parameter.do_not_specialize or parameter.do_not_specialize_on_alignment):
            alignment[(number,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, alignment)
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    registers, spilled_bytes = _usage(compiled.asm["cubin"])
    instructions = re.search(r"mma\.sync|wgmma\.mma_async|tcgen05\.mma", compiled.asm["ptx"])
    tensor_cores = instructions.group().split(".")[0] if instructions else ""
    return Compiled(registers, spilled_bytes, compiled.metadata.shared, tensor_cores)


def _type(argument: Any) -> str:
    if isinstance(argument, Tensor):
        return f"*{_TYPES[argument.dtype]}"
    if isinstance(argument, float):
        return "fp32"
    return "i32" if abs(argument) < 1 << 31 else "i64"


def _usage(cubin: bytes) -> tuple[int, int]:
    """Returns the registers and the bytes of stack of each thread."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = (triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name)
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", report)
    assert found is not None, f"cuobjdump reports no registers: {report}"
    return int(found[1]), int(found[2])


def _tensor(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=_META)


def _indices(*shape: int) -> Tensor:
    return _tensor(*shape, dtype=torch.int64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    choices = [f"{capability // 10}.{capability % 10}" for capability in CARDS]
    parser.add_argument("--capability", nargs="+", choices=choices, default=choices)
    parsed = parser.parse_args()
    print(
        "| card | shape | kernel | registers | spilled bytes | shared KiB | tensor cores | programs at once | warps |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for capability in (round(10 * float(text)) for text in parsed.capability):
        card = CARDS[capability]
        attention = ((shape.name, *named) for shape in SHAPES for named in launches_of(shape))
        for form, name, launch in chain(attention, products()):
            one = compile_launch(launch, capability)
            programs = one.programs(card, launch.num_warps)
            cells: tuple[object, ...] = (
                *(card.name, form, name, one.registers, one.spilled_bytes),
                *(f"{one.shared_bytes / 1024:.0f}", one.tensor_cores or "-", programs),
                f"{programs * launch.num_warps} of {card.max_warps}",
            )
            print("|", " | ".join(map(str, cells)), "|", flush=True)


if __name__ == "__main__":
    main()

"""The compiled kernels for CPUs: products with packed weights, norms, attention over the paged cache, and choices of
tokens.

`native/` holds their source, which is compiled once for each instruction set when the package is installed. They
compute with their own threads in float32, in products with 8-bit weights in integers, and in products with weights or a
cache of bfloat16, where the processor multiplies pairs of them, from rounded inputs. Each row's result has the same
bits whatever rows are beside it.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator, Sequence
from ctypes import POINTER, Array, Structure, c_bool, c_float, c_int32, c_int64, c_void_p, pointer
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mpt_grpc.errors import SettingsError
from mpt_grpc.model import pages

_AVX2 = frozenset("avx2 fma f16c bmi1 bmi2 abm movbe".split())
_AVX512 = frozenset("avx512f avx512bw avx512cd avx512dq avx512vl avx512_vnni".split()) | _AVX2
_AVX512_BF16 = frozenset({"avx512_bf16"}) | _AVX512
INSTRUCTION_SETS = {
    "amx": frozenset("amx_tile amx_bf16 amx_int8".split()) | _AVX512_BF16,
    "avx512_bf16": _AVX512_BF16,
    "avx512": _AVX512,
    "avx2": _AVX2,
    "portable": frozenset[str](),
}
"""The instruction sets that the kernels are compiled for, and the CPU flags that each needs."""
_VARIABLE = "MPT_GRPC_ISA"
_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
ACTIVATIONS = ("none", "gelu", "gelu_tanh", "quick_gelu", "relu", "silu")
"""As numbered by the library."""


class _Matrix(Structure):
    _fields_: ClassVar = [
        ("data", c_void_p),
        ("scales", c_void_p),
        ("outputs", c_int64),
        ("inputs", c_int64),
        ("type", c_int32),
    ]


class NativeLinear(Structure):
    """A linear layer; without a matrix, none."""

    _fields_: ClassVar = [
        ("matrix", POINTER(_Matrix)),
        ("bias", c_void_p),
        ("activation", c_int32),
        ("clip", c_float),
    ]


class NativeNorm(Structure):
    """Layer norm, or RMS norm; without a weight, none."""

    _fields_: ClassVar = [("weight", c_void_p), ("bias", c_void_p), ("eps", c_float), ("is_rms", c_bool)]


class NativeLayer(Structure):
    """A layer of the model, described in native/layers.hpp. It does not keep its tensors alive."""

    _fields_: ClassVar = [
        *(("norm_1", NativeNorm), ("qkv", NativeLinear), ("q_norm", NativeNorm), ("k_norm", NativeNorm)),
        *(("out", NativeLinear), ("norm_2", NativeNorm), ("up", NativeLinear), ("gate", NativeLinear)),
        ("down", NativeLinear),
    ]


class AttentionStep(Structure):
    """The arguments of `Kernels.attend`, described in native/cache.hpp."""

    _fields_: ClassVar = [
        *((name, c_int64) for name in ("num_tokens", "num_sequences", "n_heads", "n_kv_heads", "head_dim")),
        *((name, c_int64) for name in ("block_size", "query_stride", "key_stride", "value_stride")),
        *((name, c_void_p) for name in ("query", "key", "value", "context", "keys", "values")),
        *((name, c_void_p) for name in ("query_starts", "starts", "block_tables")),
        ("table_stride", c_int64),
        ("slopes", c_void_p),
        ("scale", c_float),
        ("window", c_int64),
    ]


DRAW_OPTIONS = np.dtype(
    [
        *(("logits", np.uint64), ("seed", np.uint64), ("position", np.uint64), ("top_k", np.int64)),
        *(("top_p", np.float64), ("temperature", np.float32), ("min_p", np.float32)),
    ]
)
"""How a token is drawn from a row of logits, described in native/draw.hpp."""


_SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "prepare": (c_int32, ()),
    "set_threads": (None, (c_int32,)),
    "packed_bytes": (c_int64, (c_int32, c_int64, c_int64)),
    "pack": (None, (POINTER(_Matrix), c_void_p, c_int32, c_void_p, c_void_p)),
    "linear": (c_int32, (POINTER(NativeLinear), c_void_p, c_int64, c_void_p, c_void_p)),
    "layers": (c_int32, (POINTER(NativeLayer), c_int64, c_void_p, POINTER(AttentionStep), c_int32, c_int64)),
    "embedding": (None, (POINTER(_Matrix), c_void_p, c_int64, c_void_p)),
    "norm": (None, (POINTER(NativeNorm), c_void_p, c_int64, c_int64, c_void_p)),
    "draw_rows": (c_int32, (c_void_p, c_int64, c_int64, c_void_p)),
    "argmax_rows": (None, (c_void_p, c_int64, c_int64, c_int64, c_void_p, c_void_p)),
    "attend": (None, (POINTER(AttentionStep), c_int32)),
}


class Kernels:
    """The kernels for one instruction set. If two threads call at once, the second computes without the workers."""

    def __init__(self, instruction_set: str, library: Path) -> None:
        self.instruction_set, self.library = instruction_set, library
        functions = ctypes.CDLL(str(library))
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(functions, name)
            function.restype, function.argtypes = result, arguments
        self._functions: Any = functions
        self.is_permitted = bool(functions.prepare())
        """Whether the system lets this process use the instruction set: if not, nothing else may be called."""

    def set_threads(self, count: int) -> None:
        """Sets how many threads share the work of a call, the caller's included."""
        self._functions.set_threads(count)

    def norm(self, norm: NativeNorm, x: Tensor) -> Tensor:
        """Returns the normalized rows of x [rows, size]; everything is float32."""
        x = x.contiguous()
        y = torch.empty_like(x)
        rows, size = x.shape
        self._functions.norm(norm, x.data_ptr(), rows, size, y.data_ptr())
        return y

    def argmax(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the index of the first maximum of each row, int64 [n], and whether the row is finite, bool [n].

        logits: float32 [n, size], whose rows are contiguous. The index in a row that is not finite may be any.
        """
        rows, size = logits.shape
        indices, are_finite = torch.empty(rows, dtype=torch.int64), torch.empty(rows, dtype=torch.bool)
        outputs = indices.data_ptr(), are_finite.data_ptr()
        self._functions.argmax_rows(logits.data_ptr(), logits.stride(0), rows, size, *outputs)
        return indices, are_finite

    def draw(self, logits: Tensor, rows: NDArray[np.int64], options: NDArray[np.void]) -> Tensor:
        """Returns tokens drawn at random from some rows of the logits, int64 [n].

        logits: float32, whose rows are contiguous.
        options: those of each of the `rows`, of the type `DRAW_OPTIONS`; their `logits` are set here.
        """
        options["logits"] = logits.data_ptr() + rows * (logits.element_size() * logits.stride(0))
        tokens = torch.empty(len(rows), dtype=torch.int64)
        if not self._functions.draw_rows(options.ctypes.data, len(rows), logits.shape[1], tokens.data_ptr()):
            raise MemoryError("no memory to draw tokens")
        return tokens

    def attend(self, step: AttentionStep, cache_dtype: torch.dtype) -> None:
        """Writes the step's keys and values to the cache and attends."""
        self._functions.attend(step, _TYPES[cache_dtype])

    def run_layers(self, layers: Array[NativeLayer], x: Tensor, step: AttentionStep, keys: Tensor) -> Tensor:
        """Returns the hidden states after the layers for x [num_tokens, d_model], which is overwritten.

        step: the attention of the first layer, without what the layers compute.
        keys: the cache of all layers.
        """
        layer_bytes, cache_type = keys[0].nbytes, _TYPES[keys.dtype]
        if not self._functions.layers(layers, len(layers), x.data_ptr(), step, cache_type, layer_bytes):
            raise MemoryError(f"no memory for the layers of {len(x)} tokens")
        return x

    def pack(self, weight: Tensor, *, quantize: bool) -> PackedMatrix:
        """Packs a weight [outputs, inputs] of float32 or bfloat16; the number of inputs is a multiple of 4.

        quantize: whether to round it to 8 bits, with one scale for each output.
        """
        return PackedMatrix(self._functions, weight, quantize)


class PackedMatrix:
    """A weight in the kernels' layout."""

    def __init__(self, functions: Any, weight: Tensor, quantize: bool) -> None:
        self._functions = functions
        self.outputs, self.inputs = weight.shape
        rows = weight.contiguous()
        kind = _TYPES[torch.int8 if quantize else rows.dtype]
        self._scales = torch.empty(self.outputs) if quantize else None
        self._data = pages.zeros(functions.packed_bytes(kind, self.outputs, self.inputs))
        scales, data = _pointer(self._scales), self._data.data_ptr()
        self._matrix = _Matrix(data, scales, self.outputs, self.inputs, kind)
        functions.pack(self._matrix, rows.data_ptr(), _TYPES[rows.dtype], data, scales)

    def layer(self, bias: Tensor | None, activation: str, clip: float | None) -> NativeLinear:
        """Returns the linear layer activation(x Wᵀ + bias), clipped to [-clip, clip]."""
        most = float("inf") if clip is None else clip
        return NativeLinear(pointer(self._matrix), _pointer(bias), ACTIVATIONS.index(activation), most)

    def linear(self, layer: NativeLinear, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Returns the layer of x, plus the residual: float32 [rows, outputs]. `layer` is one of this matrix."""
        x = x.contiguous()
        y = torch.empty(len(x), self.outputs)
        if not self._functions.linear(layer, x.data_ptr(), len(x), y.data_ptr(), _pointer(residual)):
            raise MemoryError(f"no memory for a product of {len(x)} rows")
        return y

    def rows(self, indices: Tensor) -> Tensor:
        """Returns the rows of the matrix with these indices, float32 [n, inputs]."""
        indices = indices.contiguous()
        y = torch.empty(len(indices), self.inputs)
        self._functions.embedding(self._matrix, indices.data_ptr(), len(indices), y.data_ptr())
        return y


class NativeAttend:
    """The attention of one step in place over the paged cache: an `Attend`, or with the layers in one call."""

    def __init__(self, kernels: Kernels, step: AttentionStep, keys: Tensor, values: Tensor, *owners: Tensor) -> None:
        """keys, values: the cache of all layers. owners: what the step points to besides."""
        self._kernels, self._step, self._keys, self._values, self._owners = kernels, step, keys, values, owners

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        step, context = self._step, torch.empty(query.shape)
        step.query, step.query_stride = query.data_ptr(), query.stride(0)
        step.key, step.key_stride = key.data_ptr(), key.stride(0)
        step.value, step.value_stride = value.data_ptr(), value.stride(0)
        step.context = context.data_ptr()
        step.keys, step.values = self._keys[layer].data_ptr(), self._values[layer].data_ptr()
        self._kernels.attend(step, self._keys.dtype)
        return context

    def run(self, layers: Array[NativeLayer], x: Tensor) -> Tensor:
        """Returns the hidden states after the layers; see `Kernels.run_layers`."""
        self._step.keys, self._step.values = self._keys.data_ptr(), self._values.data_ptr()
        return self._kernels.run_layers(layers, x, self._step, self._keys)


def layer_array(layers: Sequence[NativeLayer]) -> Array[NativeLayer]:
    """Returns the layers side by side."""
    return (NativeLayer * len(layers))(*layers)


def load_kernels() -> Kernels | None:
    """Loads the kernels for the best instruction set of this machine; None if none was compiled.

    The environment variable MPT_GRPC_ISA chooses another one, or "none". Raises SettingsError if this machine or this
    installation lacks the chosen one.
    """
    wanted = os.environ.get(_VARIABLE)
    if wanted == "none":
        return None
    if wanted is None:
        return next(map(_load, _available()), None)
    available = available_instruction_sets()
    if wanted not in available:
        supported = ", ".join((*available, "none"))
        raise SettingsError(f"{_VARIABLE}: {wanted!r} is not available here; use one of {supported}")
    return _load(wanted)


def available_instruction_sets() -> list[str]:
    """Returns the instruction sets that were compiled and that this machine has, best first."""
    return list(_available())


def supported_instruction_sets(cpuinfo: str) -> list[str]:
    """Returns the instruction sets that a processor has, best first.

    cpuinfo: what Linux says of it in /proc/cpuinfo; other systems say nothing.
    """
    fields: dict[str, str] = {}
    for line in cpuinfo.splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    flags = frozenset(fields.get("flags", "").split())
    names = [name for name, needed in INSTRUCTION_SETS.items() if needed <= flags]
    if fields.get("vendor_id") == "GenuineIntel" and "avx512_bf16" in names:
        # Products of pairs of bfloat16 took 1.7 times as long as those of float32 on the one that was measured.
        names.remove("avx512_bf16")
        names.insert(names.index("avx512") + 1, "avx512_bf16")
    return names


def _available() -> Iterator[str]:
    cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8") if sys.platform == "linux" else ""
    for name in supported_instruction_sets(cpuinfo):
        if _library(name) is not None and _load(name).is_permitted:
            yield name


@cache
def _load(instruction_set: str) -> Kernels:
    library = _library(instruction_set)
    assert library is not None
    return Kernels(instruction_set, library)


def _library(instruction_set: str) -> Path | None:
    candidates = (Path(__file__).with_name(instruction_set + suffix) for suffix in EXTENSION_SUFFIXES)
    return next((path for path in candidates if path.is_file()), None)


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()

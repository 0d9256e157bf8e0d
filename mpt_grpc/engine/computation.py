"""Decides what computes the model where settings leave it open: the device, types, kernels and attention."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Literal

import torch

from mpt_grpc.engine.accelerator import Gpu, why_unused
from mpt_grpc.errors import SettingsError
from mpt_grpc.model.attention import AttentionBackend
from mpt_grpc.model.attention.native_backend import NativeAttention
from mpt_grpc.model.attention.torch_backend import TorchAttention
from mpt_grpc.model.config import MPTConfig
from mpt_grpc.model.linear import WeightFormat
from mpt_grpc.model.native import Kernels, load_kernels
from mpt_grpc.settings import CacheSettings, ModelSettings

AttentionName = Literal["native", "triton", "torch"]
_log = logging.getLogger(__name__)
_NEEDS_KERNELS = "needs the compiled kernels on a CPU, a type other than float16, and widths divisible by 4"


def choose_computation(wanted: ModelSettings, config: MPTConfig) -> tuple[WeightFormat, AttentionName]:
    """Returns the format of the weights, and the name of the attention backend.

    Raises SettingsError if what is wanted is not available.
    """
    weight_format = choose_weight_format(wanted, config)
    attention = _choose_attention(wanted, config, weight_format)
    is_triton = attention == "triton"
    return replace(weight_format, by_triton=is_triton, batch_invariant=is_triton and wanted.batch_invariant), attention


def choose_weight_format(wanted: ModelSettings, config: MPTConfig) -> WeightFormat:
    """Returns the device, the type of the weights, and the compiled kernels if they compute.

    Raises SettingsError if what is wanted is not available.
    """
    device = _device(wanted)
    kernels = _kernels(config) if device.type == "cpu" and wanted.dtype != "float16" else None
    if wanted.quantize == "int8" and kernels is None and device.type == "cpu":
        raise SettingsError(f"--quantize: int8 {_NEEDS_KERNELS}")
    if wanted.batch_invariant and kernels is None and device.type == "cpu":
        raise SettingsError(f"--batch-invariant: {_NEEDS_KERNELS}; omit it")
    if wanted.dtype != "auto":
        dtype = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}[wanted.dtype]
    elif device.type == "cuda":
        dtype = torch.float16
    elif kernels is not None or torch.ops.mkldnn._is_mkldnn_bf16_supported():
        dtype = torch.bfloat16
    else:
        dtype = torch.float32
    return WeightFormat(dtype, device, kernels, quantize=wanted.quantize == "int8")


def _choose_attention(wanted: ModelSettings, config: MPTConfig, weight_format: WeightFormat) -> AttentionName:
    """Returns the name of the attention backend, which is logged for a GPU. Raises SettingsError if it cannot run."""
    if weight_format.device.type == "cpu":
        if wanted.attention != "auto":
            why = "the compiled kernels attend, or PyTorch where there are none or MPT_GRPC_ISA is none"
            raise SettingsError(f"--attention: {wanted.attention} is a choice for a GPU; on a CPU {why}")
        return "torch" if weight_format.kernels is None else "native"
    gpu = Gpu.present()
    attention = gpu.attention(wanted.attention, config, weight_format.dtype, batch_invariant=wanted.batch_invariant)
    why_not = gpu.why_no_triton(config, weight_format.dtype) if wanted.attention == "auto" else None
    _log.info("computing on %s; attention by %s", gpu, attention if why_not is None else f"torch: triton {why_not}")
    return attention


def attention_backend(name: AttentionName, config: MPTConfig, weight_format: WeightFormat) -> AttentionBackend:
    """Returns the backend of this name."""
    if name == "triton":
        from mpt_grpc.model.attention.triton_backend import TritonAttention  # Triton is not installed everywhere

        return TritonAttention(config, weight_format.device, batch_invariant=weight_format.batch_invariant)
    if name == "native":
        assert weight_format.kernels is not None
        return NativeAttention(config, weight_format.kernels)
    return TorchAttention(config, weight_format.device)


def choose_cache_dtype(wanted: CacheSettings, weight_format: WeightFormat, attention: AttentionName) -> torch.dtype:
    """Returns the type of the KV cache. Raises SettingsError if the attention cannot read it."""
    if wanted.kv_cache_dtype == "auto":
        return weight_format.dtype
    if attention == "torch":
        why = "needs Triton on a GPU" if weight_format.device.type == "cuda" else _NEEDS_KERNELS
        raise SettingsError(f"--kv-cache-dtype: int8 {why}")
    return torch.int8


def _device(wanted: ModelSettings) -> torch.device:
    if wanted.device == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        why = why_unused()
        if wanted.device == "cuda":
            raise SettingsError(f"--device: cuda is not available: {why or 'this machine has no GPU'}; use cpu")
        if why is not None:
            _log.warning("%s; the CPU computes", why)
        return torch.device("cpu")
    if (why := Gpu.present().why_unsupported) is not None:
        raise SettingsError(f"--device: {why}")
    return torch.device("cuda")


def _kernels(config: MPTConfig) -> Kernels | None:
    """Returns the compiled kernels, if there are any and the model's sizes suit them."""
    kernels = load_kernels()
    if kernels is None:
        _log.warning(
            "PyTorch computes, which is slower, because there are no compiled kernels or MPT_GRPC_ISA is none;"
            " to compile them, install a C++ compiler, such as g++, and install mpt-grpc again"
        )
    elif config.d_model % 4 != 0 or config.d_ffn % 4 != 0:
        _log.warning("PyTorch computes, which is slower, because the compiled kernels need widths divisible by 4")
        return None
    return kernels

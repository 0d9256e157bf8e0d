"""The layers with weights, which the compiled kernels or Triton may compute from a weight in another form."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpt_grpc.model.gpu_matrix import GpuMatrix, rounded
from mpt_grpc.model.native import Kernels, NativeLinear, NativeNorm, PackedMatrix

_ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "silu": F.silu,
}


@dataclass(frozen=True)
class WeightFormat:
    """The form in which weights are held."""

    dtype: torch.dtype
    device: torch.device
    kernels: Kernels | None = None
    """The compiled kernels that will compute with them on a CPU."""
    quantize: bool = False
    """Whether matrices are rounded to 8 bits."""
    by_triton: bool = False
    """Whether Triton multiplies on a GPU instead of PyTorch: with 8 bits, or to be batch-invariant."""
    batch_invariant: bool = False
    """Whether a row must have the same bits in any batch on a GPU; the kernels for CPUs always ensure it."""

    @property
    def stored_dtype(self) -> torch.dtype:
        """The type that determines the size of the weights."""
        return torch.int8 if self.quantize else self.dtype

    def gpu_matrix(self, weight: Tensor) -> GpuMatrix | None:
        """Returns a weight for products that are not PyTorch's own; None if those do."""
        if self.kernels is not None or not (self.quantize or self.batch_invariant):
            return None
        stored, scales = rounded(weight) if self.quantize else (weight, None)
        return GpuMatrix(stored, scales, self.by_triton, self.batch_invariant)


class Linear(nn.Module):
    """y = activation(x Wᵀ + b), clipped, plus a residual; `weight` W is [d_out, d_in], `bias` b [d_out] or None."""

    weight: Tensor
    bias: Tensor | None

    def __init__(
        self, d_in: int, d_out: int, bias: bool, *, activation: str = "none", clip: float | None = None
    ) -> None:
        """clip: the largest magnitude of the result before the residual is added; None does not limit it."""
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d_out, d_in))
        self.bias = nn.Parameter(torch.empty(d_out)) if bias else None
        self._activation, self._clip = activation, clip
        self._adds_within = activation == "none" and clip is None
        """Whether the residual may be added within the product."""
        self._packed: PackedMatrix | GpuMatrix | Tensor | None = None
        self._adds_in_place = False

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """`x` is [n, d_in], and `residual` [n, d_out], which may be overwritten by the result."""
        if self._adds_in_place and residual is not None:
            return residual.addmm_(x, self.weight.t())
        if isinstance(self._packed, PackedMatrix):
            return self._packed.linear(self.native(), x, residual)
        if isinstance(self._packed, GpuMatrix):
            y = self._packed.linear(x, self.bias, residual if self._adds_within else None)
            residual = None if self._adds_within else residual
        elif self._packed is None:
            y = F.linear(x, self.weight, self.bias)
        else:
            y = torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, "none", [], "")
        y = _ACTIVATIONS[self._activation](y)
        if self._clip is not None:
            y = y.clamp(-self._clip, self._clip)
        return y if residual is None else residual + y

    def native(self) -> NativeLinear:
        """Returns the layer for the kernels, which must have packed its weight."""
        assert isinstance(self._packed, PackedMatrix)
        return self._packed.layer(self.bias, self._activation, self._clip)

    def prepack(self, weight_format: WeightFormat) -> None:
        """Replaces the weight with a copy in the layout of the kernels, or of oneDNN for bfloat16 without kernels.

        oneDNN's results are bit-identical, but faster: at 12288 x 4096 on two cores with AVX512-BF16, 1.8 ms instead of
        5.0 ms for one row and 9.4 ms instead of 12.8 ms for 64 rows.
        """
        weight = self.weight.detach()
        # A GPU adds the residual within the product, which is a kernel less to start.
        self._adds_in_place = self._adds_within and self.bias is None and weight_format.device.type == "cuda"
        if (matrix := weight_format.gpu_matrix(weight)) is not None:
            self._packed, self._adds_in_place = matrix, False
        elif weight_format.kernels is not None:
            self._packed = weight_format.kernels.pack(weight, quantize=weight_format.quantize)
        elif weight.is_cpu and weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported():
            self._packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)
        else:
            return
        self.register_parameter("weight", None)


class Embedding(nn.Module):
    """The rows of a `weight` [rows, size], which may also serve as the weight of the output layer."""

    weight: Tensor

    def __init__(self, rows: int, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, size))
        self._packed: PackedMatrix | GpuMatrix | None = None
        self._dtype = torch.float32

    def forward(self, indices: Tensor) -> Tensor:
        if isinstance(self._packed, GpuMatrix):
            return self._packed.rows(indices, self._dtype)
        return F.embedding(indices, self.weight) if self._packed is None else self._packed.rows(indices)

    def project(self, x: Tensor) -> Tensor:
        """Returns x Wᵀ."""
        if self._packed is None:
            return F.linear(x, self.weight)
        if isinstance(self._packed, GpuMatrix):
            return self._packed.linear(x, None, None)
        return self._packed.linear(self._packed.layer(None, "none", None), x)

    def prepack(self, weight_format: WeightFormat) -> None:
        """Replaces the weight with a copy in the layout of the kernels, or in 8 bits."""
        weight, self._dtype = self.weight.detach(), weight_format.dtype
        self._packed = weight_format.gpu_matrix(weight)
        if weight_format.kernels is not None:
            self._packed = weight_format.kernels.pack(weight, quantize=weight_format.quantize)
        if self._packed is not None:
            self.register_parameter("weight", None)


class Norm(nn.Module):
    """Layer norm, or RMS norm, with `weight` [size] and an optional `bias` [size]."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, size: int, eps: float, bias: bool, *, is_rms: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.bias = nn.Parameter(torch.empty(size)) if bias and not is_rms else None
        self._eps, self._is_rms = eps, is_rms
        self._kernels: Kernels | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self._kernels is not None:
            return self._kernels.norm(self.native(), x)
        if self._is_rms:
            return F.rms_norm(x, self.weight.shape, self.weight, self._eps)
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self._eps)

    def native(self) -> NativeNorm:
        """Returns the norm for the kernels."""
        bias = None if self.bias is None else self.bias.data_ptr()
        return NativeNorm(self.weight.data_ptr(), bias, self._eps, self._is_rms)

    def prepack(self, weight_format: WeightFormat) -> None:
        """Takes the kernels; there is nothing to pack."""
        self._kernels = weight_format.kernels

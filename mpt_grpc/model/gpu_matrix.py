"""Matrices of weights on a GPU that cuBLAS does not multiply by: of 8 bits, or with equal bits in every batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

_ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class GpuMatrix:
    """A matrix [d_out, d_in]."""

    weight: Tensor
    """In 16 bits, or int8 in units of `scales`."""
    scales: Tensor | None
    """[d_out], float32."""
    by_triton: bool
    """Whether Triton multiplies; otherwise PyTorch does, with a copy of the matrix in the type of its operand."""
    batch_invariant: bool

    def linear(self, x: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
        """Returns x Wᵀ, plus `bias` [d_out] and `residual` [n, d_out] if there are any; `x` is [n, d_in]."""
        if self.by_triton:
            from mpt_grpc.model.triton_linear import linear  # Triton is not installed everywhere

            return linear(x, self.weight, self.scales, bias, residual, self.batch_invariant)
        y = F.linear(x, self._restored(self.weight, self.scales, x.dtype), bias)
        return y if residual is None else residual + y

    def rows(self, indices: Tensor, dtype: torch.dtype) -> Tensor:
        """Returns the rows at `indices` [n] in the given type."""
        scales = None if self.scales is None else self.scales[indices]
        return self._restored(self.weight[indices], scales, dtype)

    @staticmethod
    def _restored(weight: Tensor, scales: Tensor | None, dtype: torch.dtype) -> Tensor:
        if scales is None:
            return weight
        # Rounded once, without a copy in float32.
        return torch.mul(weight, scales[:, None], out=weight.new_empty(weight.shape, dtype=dtype))


def rounded(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Returns a matrix rounded to 8 bits, in units of the scales [d_out], float32, that it also returns."""
    lowest, highest = weight.aminmax(dim=1)
    scales = (torch.maximum(-lowest, highest).to(torch.float32) / 127).clamp_(min=torch.finfo(torch.float32).tiny)
    units = torch.empty_like(weight, dtype=torch.int8)
    # In parts: while a model is loaded, its card has little room for a whole matrix in float32.
    parts = (tensor.split(_ROWS_AT_ONCE) for tensor in (weight, scales[:, None], units))
    for part, scale, to in zip(*parts, strict=True):
        to.copy_((part / scale).round_())
    return units, scales

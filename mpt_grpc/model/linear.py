"""A linear layer that can pack its weight for the CPU's matrix kernels once, when it is loaded."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Module):
    """y = x Wᵀ + b, with `weight` [d_out, d_in] and an optional `bias` [d_out]."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, d_in: int, d_out: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d_out, d_in))
        self.bias = nn.Parameter(torch.empty(d_out)) if bias else None
        self._packed: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self._packed is None:
            return F.linear(x, self.weight, self.bias)
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, "none", [], "")
        return y

    def prepack(self) -> None:
        """Replaces a bfloat16 weight on the CPU with oneDNN's blocked copy: faster, with bit-identical results.

        Measured at 12288 x 4096 on two cores with AVX512-BF16: from 5.0 ms to 1.8 ms for one row and from 12.8 ms to
        9.4 ms for 64 rows. With any other dtype or device it does nothing.
        """
        weight = self.weight
        if weight.is_cpu and weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported():
            self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)
            self.register_parameter("weight", None)

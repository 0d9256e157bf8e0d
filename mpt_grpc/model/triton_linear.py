"""Products with a matrix of weights on a GPU, in Triton: for weights of 8 bits, and for equal bits in every batch.

A program sums the products of a row in the order of the inputs, whatever other rows there are. The oracle is
`F.linear`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mpt_grpc.model.triton_launch import Launch, jit


@dataclass(frozen=True)
class Tiling:
    """The tiles of rows, outputs and inputs of which a program computes products."""

    rows: int
    outputs: int
    inputs: int
    num_warps: int
    num_stages: int
    """How many tiles of inputs are read ahead, plus 1."""


_FEW = Tiling(rows=16, outputs=16, inputs=256, num_warps=2, num_stages=4)
"""For up to 16 rows: enough programs, and enough bytes on their way, to keep all processors reading."""
_SOME = Tiling(rows=64, outputs=32, inputs=64, num_warps=4, num_stages=6)
_MANY = Tiling(rows=128, outputs=128, inputs=64, num_warps=8, num_stages=3)


def tiling(num_rows: int, *, batch_invariant: bool) -> Tiling:
    """Returns the tiling for a number of rows.

    If rows must have the same bits in any batch, only tilings that multiply by the same instructions are chosen.
    """
    if num_rows <= _FEW.rows and not batch_invariant:
        return _FEW
    return _SOME if num_rows <= _MANY.rows else _MANY


@jit(varying=("num_rows",))
def multiply(
    x,
    x_stride,
    weight,
    scales,
    bias,
    residual,
    y,
    num_rows,
    D_IN: tl.constexpr,
    D_OUT: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_OUTPUTS: tl.constexpr,
    TILE_INPUTS: tl.constexpr,
):
    """Computes a tile of y = x Wᵀ, scaled, plus bias and residual; grid [tiles of rows, tiles of outputs].

    Programs of consecutive tiles of rows run together, so that the weights are read from memory once.
    """
    rows = tl.program_id(0) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    outputs = tl.program_id(1) * TILE_OUTPUTS + tl.arange(0, TILE_OUTPUTS)
    is_row, is_output = rows < num_rows, outputs < D_OUT
    x_rows = x + rows[:, None].to(tl.int64) * x_stride
    w_outputs = weight + outputs[None, :].to(tl.int64) * D_IN
    acc = tl.zeros([TILE_ROWS, TILE_OUTPUTS], tl.float32)
    for first in range(0, D_IN, TILE_INPUTS):
        inputs = first + tl.arange(0, TILE_INPUTS)
        is_input = inputs < D_IN
        a = tl.load(x_rows + inputs[None, :], mask=is_row[:, None] & is_input[None, :], other=0.0)
        b = tl.load(w_outputs + inputs[:, None], mask=is_output[None, :] & is_input[:, None], other=0)
        acc = tl.dot(a, b.to(a.dtype), acc, input_precision="ieee")
    if HAS_SCALES:
        acc *= tl.load(scales + outputs, mask=is_output, other=0.0)[None, :]
    if HAS_BIAS:
        acc += tl.load(bias + outputs, mask=is_output, other=0.0).to(tl.float32)[None, :]
    to = rows[:, None].to(tl.int64) * D_OUT + outputs[None, :]
    is_item = is_row[:, None] & is_output[None, :]
    if HAS_RESIDUAL:
        acc += tl.load(residual + to, mask=is_item, other=0.0).to(tl.float32)
    tl.store(y + to, acc.to(y.dtype.element_ty), mask=is_item)


def launch(
    x: Tensor,
    weight: Tensor,
    scales: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    batch_invariant: bool,
    *,
    y: Tensor,
) -> Launch:
    """Returns the launch that computes y = x Wᵀ, plus `bias` [d_out] and `residual` [n, d_out], which is contiguous.

    `x` is [n, d_in], and `weight` [d_out, d_in] has its type or is int8, in units of `scales` [d_out], float32.
    """
    (num_rows, d_in), d_out = x.shape, len(weight)
    tile = tiling(num_rows, batch_invariant=batch_invariant)
    arguments = {
        "x": x,
        "x_stride": x.stride(0),
        "weight": weight,
        "scales": weight if scales is None else scales,
        "bias": weight if bias is None else bias,
        "residual": weight if residual is None else residual,
        "y": y,
        "num_rows": num_rows,
        "D_IN": d_in,
        "D_OUT": d_out,
        "HAS_SCALES": scales is not None,
        "HAS_BIAS": bias is not None,
        "HAS_RESIDUAL": residual is not None,
        "TILE_ROWS": tile.rows,
        "TILE_OUTPUTS": tile.outputs,
        "TILE_INPUTS": tile.inputs,
    }
    grid = (triton.cdiv(num_rows, tile.rows), triton.cdiv(d_out, tile.outputs))
    return Launch(multiply, grid, arguments, tile.num_warps, tile.num_stages)


_LIBRARY = torch.library.Library("mpt_grpc", "FRAGMENT")
_LIBRARY.define(
    "linear(Tensor x, Tensor weight, Tensor? scales, Tensor? bias, Tensor? residual, bool batch_invariant) -> Tensor"
)


def _linear(x: Tensor, weight: Tensor, *arguments: Any) -> Tensor:
    y = x.new_empty(len(x), len(weight))
    if len(x):
        launch(x, weight, *arguments, y=y)()
    return y


def _shape_of_result(x: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return x.new_empty(len(x), len(weight))


_LIBRARY.impl("linear", _linear, "CompositeExplicitAutograd")
_LIBRARY.impl("linear", _shape_of_result, "Meta")

linear = torch.ops.mpt_grpc.linear.default
"""Takes the arguments of `launch` but y [n, d_out], which it returns."""

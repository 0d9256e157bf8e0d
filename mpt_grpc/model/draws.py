"""Draws tokens at random, from the rows of a batch whose temperature is above 0.

The compiled kernels draw on a CPU, and PyTorch elsewhere and with typical-p. Both use the Gumbel-max trick with noise
from a counter-based hash of (seed, output position, token ID), so that a token depends only on the request itself
(https://arxiv.org/abs/1611.01144; the mixing constants are those of splitmix64).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from mpt_grpc.model.logits import apply_filters, argmax, rows_per_chunk
from mpt_grpc.model.native import DRAW_OPTIONS, Kernels
from mpt_grpc.model.transfer import send
from mpt_grpc.request import SamplingParameters

_MIN_TEMPERATURE = torch.finfo(torch.float32).tiny
"""Below the smallest normal float32, a temperature would round to 0."""


class Draws(Protocol):
    """Some rows of a batch, and how their tokens are drawn."""

    rows: Sequence[int]
    indices: Tensor
    """The rows as a tensor on the device."""

    def tokens(self, logits: Tensor, positions: Sequence[int]) -> Tensor:
        """Returns a token for each of the rows, int64 [n]; it is arbitrary where all logits are -inf.

        logits: those of the whole batch, float32. positions: the numbers of output tokens before these.
        """
        ...


def draws(parameters: Sequence[SamplingParameters], logits: Tensor, kernels: Kernels | None) -> list[Draws]:
    """Returns the draws of a batch with these parameters, of which `logits` is an example."""
    by_kernels, others = list[int](), list[int]()
    for row, one in enumerate(parameters):
        if one.temperature > 0:
            (by_kernels if kernels is not None and one.typical_p == 1 else others).append(row)
    size = rows_per_chunk(logits)
    chunks = [others[start : start + size] for start in range(0, len(others), size)]
    result: list[Draws] = [_TorchDraws(rows, parameters, logits.device) for rows in chunks]
    if kernels is not None and by_kernels:
        result.append(_NativeDraws(by_kernels, parameters, logits.shape[1], kernels))
    return result


class _NativeDraws:
    def __init__(
        self, rows: Sequence[int], parameters: Sequence[SamplingParameters], vocab_size: int, kernels: Kernels
    ) -> None:
        self.rows, self.indices, self._kernels = rows, torch.tensor(rows), kernels
        self._rows, self._options = np.array(rows), np.zeros(len(rows), dtype=DRAW_OPTIONS)
        own = [parameters[row] for row in rows]
        self._options["seed"] = [(one.seed or 0) % (1 << 64) for one in own]
        self._options["temperature"] = [max(one.temperature, _MIN_TEMPERATURE) for one in own]
        self._options["top_k"] = [one.top_k or vocab_size for one in own]
        self._options["top_p"] = [one.top_p for one in own]
        self._options["min_p"] = [one.min_p for one in own]

    def tokens(self, logits: Tensor, positions: Sequence[int]) -> Tensor:
        self._options["position"] = positions
        return self._kernels.draw(logits, self._rows, self._options)


class _TorchDraws:
    def __init__(self, rows: Sequence[int], parameters: Sequence[SamplingParameters], device: torch.device) -> None:
        self.rows, self._parameters = rows, [parameters[row] for row in rows]
        self.indices = send(torch.tensor(rows), device)
        temperatures = [max(one.temperature, _MIN_TEMPERATURE) for one in self._parameters]
        self._temperatures = send(torch.tensor(temperatures), device)
        self._seeds = send(torch.tensor([_signed(one.seed or 0) for one in self._parameters]), device)

    def tokens(self, logits: Tensor, positions: Sequence[int]) -> Tensor:
        logits, counters = logits.index_select(0, self.indices), send(torch.tensor(positions), logits.device)
        # Subtracting the maximum prevents overflow.
        logits.sub_(logits.amax(dim=-1, keepdim=True)).div_(self._temperatures[:, None])
        apply_filters(logits, self._parameters)
        return argmax(logits.add_(_gumbel(self._seeds, counters, logits.shape[1])))


def _gumbel(seeds: Tensor, positions: Tensor, vocab_size: int) -> Tensor:
    """Returns standard Gumbel noise [n, vocab_size]: a pure function of seed, output position and token ID."""
    stream = _mix(seeds + _mix(positions + 1))
    tokens = torch.arange(1, vocab_size + 1, device=seeds.device) * _signed(0x9E3779B97F4A7C15)
    bits = _mix(stream[:, None] + tokens[None, :]).bitwise_and_(0xFFFFFFFF)
    uniform = bits.to(torch.float32).add_(0.5).mul_(2.0**-32)
    # log1p keeps the exponential variate exact near 0, where the winners are. A value of 1 would give -inf, as if the
    # token were filtered out, so it is clamped to the largest float32 below 1.
    return uniform.clamp_(max=1 - 2.0**-24).neg_().log1p_().neg_().log_().neg_()


def _mix(x: Tensor) -> Tensor:
    """Applies splitmix64's finalizer to int64 values, whose products wrap like those of uint64; overwrites `x`."""
    # In place throughout: on a CPU this is bound by memory bandwidth.
    x.bitwise_xor_(_shift_right(x, 30)).mul_(_signed(0xBF58476D1CE4E5B9))
    x.bitwise_xor_(_shift_right(x, 27)).mul_(_signed(0x94D049BB133111EB))
    return x.bitwise_xor_(_shift_right(x, 31))


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Returns the logical right shift; int64's own shift replicates the sign bit."""
    return (x >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value

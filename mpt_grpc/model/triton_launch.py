"""How Triton's kernels are compiled and launched."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import triton


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]
    """The kernel's arguments, compile-time constants included."""
    num_warps: int
    num_stages: int = 1

    def __call__(self) -> None:
        self.kernel[self.grid](**self.arguments, num_warps=self.num_warps, num_stages=self.num_stages)


def jit(
    *, varying: Collection[str], unaligned: Collection[str] = ()
) -> Callable[[Callable[..., None]], triton.JITFunction]:
    """Compiles a kernel once for all values of the `varying` arguments and for all addresses of the `unaligned` ones.

    They change between steps; specializing on them would compile while requests wait. A kernel may have some of them.
    """

    def compiled(kernel: Callable[..., None]) -> triton.JITFunction:
        names = inspect.signature(kernel).parameters
        any_value, any_address = ([name for name in names if name in group] for group in (varying, unaligned))
        return triton.jit(kernel, do_not_specialize=any_value, do_not_specialize_on_alignment=any_address)

    return compiled

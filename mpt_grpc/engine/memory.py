"""Whether a model fits in memory, decided before anything is allocated, and the settings with which it would."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch

STEP_BYTES = 256 << 20
"""The memory left for the tensors of a step and for the rest of the process."""


@dataclass(frozen=True)
class MemoryNeeds:
    """What a server allocates: the weights, once in their type, and the KV cache; a reserve stays free."""

    num_parameters: int
    dtype: torch.dtype
    cache_bytes: int
    reserved_bytes: int = STEP_BYTES

    @property
    def weight_bytes(self) -> int:
        return self.num_parameters * self.dtype.itemsize

    @property
    def total_bytes(self) -> int:
        return self.weight_bytes + self.cache_bytes + self.reserved_bytes


def why_too_large(needs: MemoryNeeds, free_bytes: int, *, small_dtype: torch.dtype, min_cache_bytes: int) -> str | None:
    """Returns why a model does not fit and which settings would; None if it fits.

    small_dtype: the type to suggest, if it is smaller than that of the weights.
    min_cache_bytes: the smallest KV cache worth suggesting.
    """
    if needs.total_bytes <= free_bytes:
        return None
    small = replace(needs, dtype=small_dtype)
    is_smaller = small.weight_bytes < needs.weight_bytes
    remedies = []
    if is_smaller and small.total_bytes <= free_bytes:
        remedies.append(f"--dtype {dtype_name(small_dtype)} would need {size(small.total_bytes)}")
    if (room := _room_for_cache(needs, free_bytes)) >= min_cache_bytes:
        remedies.append(f"--kv-cache {room >> 20}MiB would fit")
    if not remedies and is_smaller and (room := _room_for_cache(small, free_bytes)) >= min_cache_bytes:
        remedies.append(f"--dtype {dtype_name(small_dtype)} --kv-cache {room >> 20}MiB would fit")
    weights, cache, computation = map(size, (needs.weight_bytes, needs.cache_bytes, needs.reserved_bytes))
    return (
        f"the weights take {weights} in {dtype_name(needs.dtype)}, the KV cache {cache} and computation {computation},"
        f" but only {size(free_bytes)} of memory are free:"
        f" {' or '.join(remedies) or 'the model needs a larger machine'}"
    )


class Memory(Protocol):
    """The memory of the device that computes."""

    def free_bytes(self) -> int:
        """Returns the bytes that can still be allocated."""
        ...


class GpuMemory(Memory, Protocol):
    """The memory of a GPU."""

    total_bytes: int

    def peak_bytes(self, work: Callable[[], object]) -> int:
        """Does the work; returns how many bytes more than before it took at most at the same time."""
        ...


class CudaMemory:
    """The `GpuMemory` on which PyTorch computes, or the part of it that a limit allows."""

    def __init__(self, limit_bytes: int | None) -> None:
        free_bytes, self._card_bytes = torch.cuda.mem_get_info()
        self.total_bytes = min(limit_bytes or self._card_bytes, self._card_bytes)
        if self.total_bytes < self._card_bytes:
            # What others have, and what the driver keeps for this process, counts as well.
            own_bytes = max(0, self.total_bytes - (self._card_bytes - free_bytes))
            torch.cuda.set_per_process_memory_fraction(own_bytes / self._card_bytes)

    def free_bytes(self) -> int:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0] - (self._card_bytes - self.total_bytes)

    def peak_bytes(self, work: Callable[[], object]) -> int:
        before_bytes = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before_bytes


class CpuMemory:
    """The memory of this machine; the cgroups of this process may allow less."""

    def __init__(self, root: Path = Path("/")) -> None:
        """`root`: where /proc and /sys are found."""
        self._root = root

    def free_bytes(self) -> int:
        """Returns the bytes that can be allocated; `sys.maxsize` if the system does not report them.

        Files in the page cache count as free.
        """
        return min((max(0, free) for free in (*_machine(self._root), *_cgroups(self._root))), default=sys.maxsize)


def size(num_bytes: int) -> str:
    """Returns a number of bytes in GiB or MiB."""
    unit, factor = ("GiB", 1 << 30) if num_bytes >= 1 << 30 else ("MiB", 1 << 20)
    return f"{num_bytes / factor:,.1f} {unit}"


def dtype_name(dtype: torch.dtype) -> str:
    """Returns the name of a type as `--dtype` takes it."""
    return str(dtype).removeprefix("torch.")


def _room_for_cache(needs: MemoryNeeds, free_bytes: int) -> int:
    """Returns the largest KV cache that fits, in whole MiB."""
    return max(0, free_bytes - needs.weight_bytes - STEP_BYTES) >> 20 << 20


def _machine(root: Path) -> Iterator[int]:
    available = _numbers(root / "proc/meminfo").get("MemAvailable:")
    if available is not None:
        yield available << 10


def _cgroups(root: Path) -> Iterator[int]:
    """Yields the bytes that each cgroup of this process leaves, of version 1 or 2, from its own up to the root."""
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if not controllers:
            mount, limit, usage = root / "sys/fs/cgroup", "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            mount, limit, usage = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        group = mount / path.lstrip("/")
        for folder in (group, *(parent for parent in group.parents if parent.is_relative_to(mount))):
            limits, used = _lines(folder / limit), _lines(folder / usage)
            if used and limits and limits[0] != "max":
                stat = _numbers(folder / "memory.stat")
                prefix = "total_" if "total_active_file" in stat else ""  # version 1 with its descendants
                files = sum(stat.get(f"{prefix}{list_}_file", 0) for list_ in ("active", "inactive"))
                yield int(limits[0]) - int(used[0]) + files


def _numbers(file: Path) -> dict[str, int]:
    return {words[0]: int(words[1]) for words in map(str.split, _lines(file))}


def _lines(file: Path) -> list[str]:
    """Returns the lines of a file of the system; none if there is no such file."""
    try:
        return file.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []

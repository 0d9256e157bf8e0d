"""What an NVIDIA GPU can compute with: whether PyTorch's build has kernels for it, and whether Triton runs."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from mpt_grpc.errors import SettingsError
from mpt_grpc.model.attention.tiling import MAX_GROUP, MAX_HEAD_DIM
from mpt_grpc.model.config import MPTConfig

GpuAttention = Literal["triton", "torch"]
_TRITON_CAPABILITY = (8, 0)
"""The oldest compute capability for which the Triton kernels are compiled by a test."""


@dataclass(frozen=True)
class Gpu:
    """A card and the build of PyTorch that is to compute on it."""

    name: str
    capability: tuple[int, int]
    """The compute capability, major and minor."""
    architectures: Sequence[str]
    """What the build has kernels for, such as sm_90, or compute_90 for those that the driver compiles further."""
    torch_version: str

    @classmethod
    def present(cls) -> Gpu:
        """Returns the GPU on which PyTorch computes; there must be one."""
        name, capability = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
        return cls(name, capability, torch.cuda.get_arch_list(), torch.__version__)

    def __str__(self) -> str:
        return f"{self.name} (compute capability {_text(self.capability)}, PyTorch {self.torch_version})"

    @property
    def why_unsupported(self) -> str | None:
        """Why the build cannot compute on the card, with a remedy; None if it can."""
        if any(_runs_on(architecture, self.capability) for architecture in self.architectures):
            return None
        has = ", ".join(self.architectures) or "no GPU"
        return (
            f"this build of PyTorch ({self.torch_version}) has kernels for {has}, but not for {self.name}, whose"
            f" compute capability is {_text(self.capability)}: install a build that has them (docs/install.md), or"
            " use --device cpu"
        )

    def attention(
        self,
        wanted: Literal["auto", "triton", "torch"],
        config: MPTConfig,
        dtype: torch.dtype,
        *,
        batch_invariant: bool = False,
    ) -> GpuAttention:
        """Returns the library that computes attention. Raises SettingsError if Triton is required and cannot run."""
        why_not = self.why_no_triton(config, dtype)
        if wanted == "triton" and why_not is not None:
            raise SettingsError(f"--attention: triton {why_not}; use torch")
        if batch_invariant and (wanted == "torch" or why_not is not None):
            why = "which --attention torch excludes" if wanted == "torch" else f"but triton {why_not}"
            raise SettingsError(f"--batch-invariant: needs attention by Triton, {why}; omit it")
        return "torch" if wanted == "torch" or why_not is not None else "triton"

    def why_no_triton(self, config: MPTConfig, dtype: torch.dtype) -> str | None:
        """What Triton needs or lacks, as the end of a sentence that begins with its name; None if it can attend."""
        if self.capability < _TRITON_CAPABILITY:
            needed = f"needs compute capability {_text(_TRITON_CAPABILITY)} or newer"
            return f"{needed}, and {self.name} has {_text(self.capability)}"
        if (why_not := why_triton_cannot_start()) is not None:
            return why_not
        if dtype == torch.float32:
            return "computes in float16 or bfloat16, not in float32"
        if config.head_dim > MAX_HEAD_DIM:
            return f"has heads of at most {MAX_HEAD_DIM} dimensions, and the model's have {config.head_dim}"
        if config.n_heads // config.n_kv_heads > MAX_GROUP:
            return f"shares a key head among at most {MAX_GROUP} heads"
        return None


def why_triton_cannot_start() -> str | None:
    """What Triton lacks on this machine, as the end of a sentence that begins with its name; None if nothing."""
    if importlib.util.find_spec("triton") is None:
        return "is not installed"
    # It compiles what starts its kernels when the first one runs.
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "needs a C compiler, such as gcc"
    # As Triton does: the default scheme of some distributions is for what users install.
    if not Path(sysconfig.get_path("include", "posix_prefix"), "Python.h").exists():
        return "needs the headers of Python, which Linux distributions have in a package such as python3-dev"
    return None


def why_unused(root: Path = Path("/")) -> str | None:
    """Why PyTorch, which sees no GPU, does not use the one whose driver is loaded; None if there is no such driver.

    `root` is that of the file system.
    """
    if not (root / "proc/driver/nvidia/version").exists():
        return None
    if torch.version.cuda is None:
        return f"this machine has an NVIDIA GPU, but PyTorch {torch.__version__} is a build for CPUs (docs/install.md)"
    return (
        f"this machine has an NVIDIA GPU, but PyTorch {torch.__version__} cannot use it: its driver may be too old for"
        f" CUDA {torch.version.cuda} (docs/install.md)"
    )


def _runs_on(architecture: str, capability: tuple[int, int]) -> bool:
    """Whether what was compiled for an architecture runs on a card.

    Machine code runs on cards of the same generation that are not older; `compute_` stands for code that the driver
    compiles for any newer card. A letter at the end binds it to that card or its family.
    """
    kind, _, number = architecture.partition("_")
    digits = number.rstrip("abcdefghijklmnopqrstuvwxyz")
    if not digits.isdecimal():
        return False
    built = divmod(int(digits), 10)
    if kind == "compute":
        return built <= capability
    return built == capability if digits != number else built[0] == capability[0] and built[1] <= capability[1]


def _text(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))

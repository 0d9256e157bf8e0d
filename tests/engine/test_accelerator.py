"""Which build of PyTorch and which attention a card gets, decided from what PyTorch reports of the card."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from mpt_grpc.engine.accelerator import Gpu, why_triton_cannot_start, why_unused
from mpt_grpc.errors import SettingsError
from mpt_grpc.model.config import MPTConfig

CUDA_13 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]
CUDA_12_6 = ["sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90"]

needs_triton = pytest.mark.skipif(
    why_triton_cannot_start() is not None, reason="needs Triton, which is built for Linux, and a C compiler"
)


def gpu(*capability: int, architectures: Sequence[str] = CUDA_13) -> Gpu:
    major, minor = capability
    return Gpu(f"card {major}.{minor}", (major, minor), architectures, "2.13.0+cu130")


def config(**fields: Any) -> MPTConfig:
    attn_config = fields.pop("attn_config", {})
    base = {"model_type": "mpt", "d_model": 512, "n_heads": 4, "n_layers": 1, "vocab_size": 96}
    return MPTConfig.from_dict({**base, **fields, "attn_config": attn_config})


@pytest.mark.parametrize(
    ("capability", "architectures", "is_supported"),
    [
        pytest.param((7, 0), CUDA_13, False, id="V100-cuda-13"),
        pytest.param((7, 0), CUDA_12_6, True, id="V100-cuda-12.6"),
        pytest.param((7, 5), CUDA_13, True, id="T4"),
        pytest.param((8, 9), CUDA_13, True, id="L4-runs-code-for-8.6"),
        pytest.param((9, 0), CUDA_13, True, id="H200"),
        pytest.param((10, 3), CUDA_13, True, id="B300-runs-code-for-10.0"),
        pytest.param((13, 0), CUDA_13, True, id="compiled-by-the-driver"),
        pytest.param((10, 0), CUDA_12_6, False, id="B200-cuda-12.6"),
        pytest.param((8, 0), ["sm_86"], False, id="older-than-the-code"),
        pytest.param((9, 0), ["sm_90a"], True, id="code-for-one-card"),
        pytest.param((10, 3), ["sm_100a"], False, id="code-for-another-card"),
        pytest.param((9, 0), [], False, id="no-gpu-in-the-build"),
    ],
)
def test_a_build_without_kernels_for_the_card_is_recognized(
    capability: tuple[int, int], architectures: Sequence[str], is_supported: bool
) -> None:
    assert (gpu(*capability, architectures=architectures).why_unsupported is None) == is_supported


def test_the_reason_names_the_card_the_build_and_the_remedy() -> None:
    why = gpu(7, 0).why_unsupported
    assert why is not None
    for words in ("2.13.0+cu130", "sm_75", "card 7.0", "capability is 7.0", "docs/install.md", "--device cpu"):
        assert words in why
    assert "\n" not in why


def test_a_gpu_that_pytorch_does_not_see_is_named(tmp_path: Path) -> None:
    assert why_unused(tmp_path) is None
    driver = tmp_path / "proc/driver/nvidia/version"
    driver.parent.mkdir(parents=True)
    driver.touch()
    why = why_unused(tmp_path)
    assert why is not None
    assert torch.__version__ in why
    assert "docs/install.md" in why


@needs_triton
def test_triton_attends_from_8_0_on_in_16_bit_types() -> None:
    assert gpu(8, 0).attention("auto", config(), torch.float16) == "triton"
    assert gpu(9, 0).attention("triton", config(), torch.bfloat16) == "triton"
    assert gpu(9, 0).attention("torch", config(), torch.float16) == "torch"


@pytest.mark.parametrize(
    ("card", "fields", "dtype", "why"),
    [
        (gpu(7, 5), {}, torch.float16, "needs compute capability 8.0 or newer, and card 7.5 has 7.5"),
        (gpu(9, 0), {}, torch.float32, "not in float32"),
        (gpu(9, 0), {"n_heads": 2}, torch.float16, "at most 128 dimensions, and the model's have 256"),
        (
            gpu(9, 0),
            {"n_heads": 64, "attn_config": {"attn_type": "multiquery_attention"}},
            torch.float16,
            "at most 32 heads",
        ),
    ],
)
@needs_triton
def test_where_triton_cannot_attend_torch_does_and_a_wish_for_triton_is_refused(
    card: Gpu, fields: dict[str, Any], dtype: torch.dtype, why: str
) -> None:
    assert card.attention("auto", config(**fields), dtype) == "torch"
    with pytest.raises(SettingsError, match=why):
        card.attention("triton", config(**fields), dtype)


@needs_triton
def test_equal_bits_in_every_batch_need_triton() -> None:
    assert gpu(8, 0).attention("auto", config(), torch.float16, batch_invariant=True) == "triton"
    for card, wanted, why in (
        (gpu(7, 5), "auto", "but triton needs compute capability 8.0"),
        (gpu(9, 0), "torch", "which --attention torch excludes"),
    ):
        with pytest.raises(SettingsError, match=f"--batch-invariant: needs attention by Triton, {why}.*; omit it"):
            card.attention(wanted, config(), torch.float16, batch_invariant=True)


def test_without_triton_torch_attends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert gpu(9, 0).attention("auto", config(), torch.float16) == "torch"
    with pytest.raises(SettingsError, match="--attention: triton is not installed; use torch"):
        gpu(9, 0).attention("triton", config(), torch.float16)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton, which is built for Linux")
def test_triton_needs_a_c_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    assert gpu(9, 0).attention("auto", config(), torch.float16) == "torch"
    assert gpu(9, 0).why_no_triton(config(), torch.float16) == "needs a C compiler, such as gcc"

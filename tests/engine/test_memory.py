"""A model that does not fit in memory is refused before anything is allocated, with settings that fit."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import demo_settings

from mpt_grpc.checkpoint import DEMO
from mpt_grpc.engine.load import load_engine
from mpt_grpc.engine.memory import STEP_BYTES, CpuMemory, MemoryNeeds, why_too_large
from mpt_grpc.errors import ModelError
from mpt_grpc.settings import CacheSettings, ModelSettings

GIB = 1 << 30
BLOCK_BYTES = 16 << 20
MPT_7B = MemoryNeeds(num_parameters=6_649_286_656, dtype=torch.float32, cache_bytes=GIB)
"""MPT-7B has 24.8 GiB of weights in float32 and 12.4 GiB in bfloat16."""


def refusal(needs: MemoryNeeds, free_gib: float) -> str | None:
    return why_too_large(needs, int(free_gib * GIB), small_dtype=torch.bfloat16, min_cache_bytes=BLOCK_BYTES)


@pytest.mark.parametrize(
    ("needs", "free_gib", "remedy"),
    [
        (MPT_7B, 22.9, "--dtype bfloat16 would need 13.6 GiB"),
        (MPT_7B, 25.5, "--dtype bfloat16 would need 13.6 GiB or --kv-cache 490MiB would fit"),
        (MPT_7B, 13.2, "--dtype bfloat16 --kv-cache 578MiB would fit"),
        (MPT_7B, 12.6, "the model needs a larger machine"),
        (replace(MPT_7B, dtype=torch.float16), 13.2, "--kv-cache 578MiB would fit"),
        (replace(MPT_7B, dtype=torch.bfloat16), 1, "the model needs a larger machine"),
        # A GPU of which --memory-fraction leaves less than the weights take.
        (replace(MPT_7B, dtype=torch.float16, reserved_bytes=2 * GIB), 15, "--kv-cache 2421MiB would fit"),
    ],
)
def test_a_refusal_gives_the_sum_and_settings_that_fit(needs: MemoryNeeds, free_gib: float, remedy: str) -> None:
    why = refusal(needs, free_gib)
    assert why is not None
    for part in (needs.weight_bytes, needs.cache_bytes, free_gib * GIB):
        assert f"{part / GIB:,.1f} GiB" in why
    assert str(needs.dtype).removeprefix("torch.") in why
    assert why.endswith(f": {remedy}")
    for option in remedy.split(" or "):
        dtype = torch.bfloat16 if "--dtype" in option else needs.dtype
        cache = re.search(r"--kv-cache (\d+)MiB", option)
        cache_bytes = int(cache[1]) << 20 if cache else needs.cache_bytes
        if "--" in option:
            assert refusal(MemoryNeeds(needs.num_parameters, dtype, cache_bytes), free_gib) is None


@pytest.mark.parametrize("spare", [0, 1])
def test_a_model_that_fits_is_accepted(spare: int) -> None:
    assert refusal(MPT_7B, (MPT_7B.total_bytes + spare) / GIB) is None


def config(folder: Path, **sizes: int) -> Path:
    """Makes a checkpoint without weights."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / name, folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "mpt", **sizes}))
    return folder


def test_a_model_larger_than_any_machine_is_refused_before_it_is_loaded(tmp_path: Path) -> None:
    folder = config(tmp_path, d_model=1 << 17, n_heads=1 << 10, n_layers=96, vocab_size=50432)
    model = ModelSettings(str(folder), device="cpu", dtype="bfloat16", load_format="random")
    with pytest.raises(ModelError, match=r"^the weights take [\d,.]+ GiB in bfloat16, the KV cache .* larger machine$"):
        load_engine(replace(demo_settings(), model=model, cache=CacheSettings()))


def test_a_cache_larger_than_any_machine_is_refused_with_one_that_fits() -> None:
    with pytest.raises(ModelError, match=r"the KV cache 1,048,576\.0 GiB .*: --kv-cache \d+MiB would fit$"):
        load_engine(replace(demo_settings(), cache=CacheSettings(kv_cache_bytes=1 << 50)))


def test_serve_refuses_in_one_line(tmp_path: Path) -> None:
    folder = config(tmp_path, d_model=1 << 17, n_heads=1 << 10, n_layers=96, vocab_size=50432)
    command = (sys.executable, "-m", "mpt_grpc.cli", "serve", "--grpc-port", "0", "--no-http", "--device", "cpu")
    command = (*command, "--load-format", "random", "--model", str(folder))
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 1
    (line,) = ended.stderr.splitlines()
    assert re.fullmatch(r"mpt-grpc: the weights take .* GiB of memory are free: .*", line)


def write(root: Path, files: dict[str, str]) -> Path:
    for path, content in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(content)
    return root


MEMINFO = {"proc/meminfo": "MemTotal:       16777216 kB\nMemAvailable:    8388608 kB\nHugePages_Total:       0\n"}
V2 = {"proc/self/cgroup": "0::/pod/app\n"}
V1 = {"proc/self/cgroup": "9:cpu,cpuacct:/app\n4:memory:/app\n0::/\n"}


def version_2(group: str, limit: str, used: int, files: int) -> dict[str, str]:
    stat = f"anon {used - files}\nfile {files}\ninactive_file {files}\nactive_file 0\n"
    return {f"{group}/memory.max": limit, f"{group}/memory.current": str(used), f"{group}/memory.stat": stat}


def version_1(group: str, limit: int, used: int, files: int) -> dict[str, str]:
    stat = f"active_file 0\ninactive_file 0\ntotal_active_file {files}\ntotal_inactive_file 0\n"
    names = {"memory.limit_in_bytes": str(limit), "memory.usage_in_bytes": str(used), "memory.stat": stat}
    return {f"{group}/{name}": content for name, content in names.items()}


@pytest.mark.parametrize(
    ("files", "free_gib"),
    [
        (MEMINFO, 8),
        (MEMINFO | V2 | version_2("sys/fs/cgroup/pod/app", "max", GIB, 0), 8),
        (MEMINFO | V2 | version_2("sys/fs/cgroup/pod/app", f"{4 * GIB}\n", 2 * GIB, GIB), 3),
        (MEMINFO | V2 | version_2("sys/fs/cgroup/pod", str(4 * GIB), 3 * GIB, 0), 1),
        # A container sees its own group at the root.
        (MEMINFO | V2 | version_2("sys/fs/cgroup", str(2 * GIB), GIB, 0), 1),
        (MEMINFO | V1 | version_1("sys/fs/cgroup/memory/app", 4 * GIB, 2 * GIB, GIB), 3),
        (MEMINFO | V1 | version_1("sys/fs/cgroup/memory", 4 * GIB, 2 * GIB, 0), 2),
        (MEMINFO | V1 | version_1("sys/fs/cgroup/memory/app", (1 << 63) - 4096, 2 * GIB, 0), 8),
        (MEMINFO | V2 | version_2("sys/fs/cgroup", str(GIB), 2 * GIB, 0), 0),
        ({}, sys.maxsize / GIB),
    ],
)  # fmt: skip
def test_free_memory_is_what_the_machine_has_and_the_cgroups_allow(
    files: dict[str, str], free_gib: float, tmp_path: Path
) -> None:
    assert CpuMemory(write(tmp_path, files)).free_bytes() == pytest.approx(free_gib * GIB)


def test_the_real_machine_reports_its_memory() -> None:
    assert STEP_BYTES < CpuMemory().free_bytes() < sys.maxsize

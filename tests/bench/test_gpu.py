"""The programs for GPUs, as far as they run without one."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks import gpu_serving, gpu_speed
from benchmarks.gpu_plan import DATA_SHEETS, MPT_7B, Limits, memory_table, step_cost
from mpt_grpc.model.config import MPTConfig

CONFIG = MPTConfig.from_dict(MPT_7B)


def test_a_step_of_mpt_7b_reads_its_weights_and_half_a_mebibyte_of_cache_for_each_token() -> None:
    cost = step_cost(CONFIG, 16, 1000)
    assert cost.weight_bytes == 2 * 6_649_286_656
    assert cost.cache_bytes == 16 * 1000 << 19
    assert step_cost(CONFIG, 16, 1000, cache_bits=8).cache_bytes == 16 * 1000 * 2 * 32 * 32 * (128 + 2)


def test_decoding_is_limited_by_memory_and_a_long_chunk_by_products() -> None:
    card = DATA_SHEETS["H200"]
    faster_memory = Limits(2 * card.bytes_per_s, card.operations_per_s)
    decoding, chunk = step_cost(CONFIG, 1, 512), step_cost(CONFIG, 0, 0, chunk=2048)
    assert decoding.seconds(faster_memory) < decoding.seconds(card)
    assert chunk.seconds(faster_memory) == chunk.seconds(card)


def test_the_table_of_memory_is_that_of_the_readme() -> None:
    assert memory_table() in Path("README.md").read_text(encoding="utf-8")


def test_serving_is_measured_beside_transformers(tmp_path: Path) -> None:
    output = tmp_path / "serving.json"
    gpu_serving.main(["--device", "cpu", "--output", str(output)])
    report = json.loads(output.read_text(encoding="utf-8"))
    assert set(report["served"]) == {"alone", "64 at once", "mixed lengths"}
    assert set(report["in process"]) == {"alone", "64 at once"}
    assert all(row["output_tokens_per_s"] > 0 and row["ttft_ms"] > 0 for row in report["served"].values())
    assert all(report["transformers"][load] > 0 for load in report["served"])


def test_the_program_for_a_card_runs_all_its_parts_on_a_cpu(tmp_path: Path) -> None:
    output = tmp_path / "gpu.json"
    gpu_speed.main(["--device", "cpu", "--output", str(output)])
    report = json.loads(output.read_text(encoding="utf-8"))
    assert set(report) == {"torch", "device", "limits", "checks", "steps", "attention", "products"}
    assert all(row.get("error", 0) < 0.02 for row in report["checks"])
    assert not any("failed" in row for part in report.keys() - {"torch", "device"} for row in report[part])

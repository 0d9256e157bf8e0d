"""The comparison with other libraries: the protocol of its drivers, its checkpoint, and its table."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import MptForCausalLM

from benchmarks.peers import checkpoint, report
from benchmarks.peers.checkpoint import Shape
from benchmarks.peers.drivers.ladder import PREFILL, PREFILL_TOKENS
from benchmarks.peers.peer import OURS, ROOT, Column, Peer, PeerError, convert, measure

SHAPE = Shape(d_model=32, n_layers=2, n_heads=4, vocab_size=5_000)
DRIVER, HERE = "tests.bench.peer_driver", sys.prefix


def test_a_driver_converts_once_and_reports_rates_by_row_whatever_its_library_prints(tmp_path: Path) -> None:
    column = Column(Peer("scripted", DRIVER, 8, HERE))
    for _ in range(2):
        folder = convert(column.peer, tmp_path / "checkpoint", 1)
        measure(column, folder, 1, [1, 2])
    assert [file.read_text(encoding="utf-8") for file in folder.iterdir()] == ["checkpoint 8"]
    # What only one of two sequences decodes does not count.
    rates = {"1": [8.0] * 2, "2": [16.0] * 2, PREFILL: [PREFILL_TOKENS / 1.0] * 2}
    assert column.rates == {row: pytest.approx(values) for row, values in rates.items()}
    assert column.version == f"pytest {pytest.__version__}"


@pytest.mark.parametrize(
    ("peer", "message"),
    [
        (Peer("fails", DRIVER, 7, HERE), "no memory for four (see "),
        (Peer("stops early", DRIVER, 5, HERE), "RuntimeError: [3, 3, 3, 3] tokens instead of 4 times 4 (see "),
        (Peer("absent", DRIVER, 8, ".venv/peer-absent"), "not installed: make .venv/peer-absent/ready"),
        (Peer("broken", "tests.bench.no_such_driver", 8, HERE), "No module named tests.bench.no_such_driver"),
    ],
)
def test_a_peer_that_fails_says_why_and_keeps_what_was_measured(peer: Peer, message: str, tmp_path: Path) -> None:
    column = Column(peer)
    with pytest.raises(PeerError) as raised:
        measure(column, tmp_path / "weights", 1, [1, 4, 8])
    assert message in str(raised.value)
    assert list(column.rates) == (["1"] if peer.name in ("fails", "stops early") else [])


def test_the_weights_are_those_that_transformers_expects(tmp_path: Path) -> None:
    checkpoint.write(tmp_path, SHAPE, ROOT / "mpt_grpc/demo")
    model = MptForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    expected = {name: weight for name, weight in model.state_dict().items() if name != "lm_head.weight"}
    weights = load_file(tmp_path / "model.safetensors")
    assert weights.keys() == expected.keys()
    assert SHAPE.num_parameters == sum(weight.numel() for weight in weights.values())
    for name, bits in checkpoint.read_weights(tmp_path):
        assert torch.equal(weights[name], expected[name])
        assert torch.equal(torch.from_numpy(checkpoint.as_float32(bits)), weights[name].float())
    embedding = weights["transformer.wte.weight"].float()
    assert (embedding.mean().item(), embedding.std().item()) == pytest.approx((0, 0.02), abs=2e-4)


def test_the_table_divides_our_rates_by_those_of_the_fastest_peer_round_by_round(tmp_path: Path) -> None:
    columns = [
        Column(OURS[0], "mpt-grpc 1", {"1": [10, 12, 8], PREFILL: [150, 150, 150]}),
        Column(OURS[1], "mpt-grpc 1", {"1": [20, 20, 20]}),
        Column(Peer("fast", DRIVER, 16), "fast 2", {"1": [5, 8, 4], PREFILL: [1_200, 1_200, 1_200]}),
        Column(Peer("slow", DRIVER, 16), "slow 3", {"1": [4, 4, 9]}, failure="no memory"),
        Column(Peer("absent", DRIVER, 8), failure="not installed"),
    ]
    results = report.Results("a run", columns, {"1": [12.5] * 3, PREFILL: [2_000] * 3})
    lines = report.table(results).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    header = ["mpt-grpc", "mpt-grpc int8", "fast", "slow", "limit, 16-bit weights", "ours / best 16-bit peer"]
    assert cells[0] == ["at once", *header]
    one = ["10.0 (8.0 to 12.0)", "20.0 (20.0 to 20.0)", "5.0 (4.0 to 8.0)", "4.0 (4.0 to 9.0)"]
    assert cells[2] == ["1", *one, "12.5 (12.5 to 12.5)", "2.00 (1.50 to 2.00)"]
    prefill = ["150 (150 to 150)", "", "1,200 (1,200 to 1,200)", "", "2,000 (2,000 to 2,000)", "0.12 (0.12 to 0.12)"]
    assert cells[3] == [PREFILL, *prefill]
    assert {"Versions: mpt-grpc 1, fast 2, slow 3.", "- slow: no memory", "- absent: not installed"} < set(lines)
    assert json.loads(json.dumps(report.as_json(results)))["columns"][0]["rates"]["1"] == [10, 12, 8]
    report.save_plot(results, tmp_path / "results.png")
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")

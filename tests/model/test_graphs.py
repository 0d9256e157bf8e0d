"""Decoding steps that are recorded once and replayed, on a device that records by remembering what to call."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from model.conftest import CPU, Repeating, Stepper, make_checkpoint, random_tokens, random_weights, tiny_config

from mpt_grpc.model.config import MPTConfig
from mpt_grpc.model.linear import WeightFormat
from mpt_grpc.model.mpt import MPT
from mpt_grpc.model.weights import load_model
from mpt_grpc.step import PromptScoring


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> MPT:
    folder = tmp_path_factory.mktemp("model")
    make_checkpoint(folder, tiny_config())
    return load_model(folder, MPTConfig.from_file(folder / "config.json"), WeightFormat(torch.float32, CPU))


def test_replayed_steps_have_the_logits_of_computed_ones(model: MPT) -> None:
    """Sequences come, grow across blocks and splits, and go, so that sizes change and blocks have new owners."""
    rng, recorder = random.Random(0), Repeating()
    steppers = [Stepper(model, num_blocks=512), Stepper(model, num_blocks=512, recorder=recorder)]
    for stepper in steppers:
        stepper.warm_up(max_sequences=10, max_tokens=1000)
    assert recorder.num_recordings == 5 * 3, "1, 2, 4, 8 and 16 sequences of up to 256, 512 and 1,024 tokens"
    names: list[str] = []
    for number in range(40):
        if number % 4 == 0:
            names.append(f"r{number}")
            prompt = {names[-1]: random_tokens(rng.choice([3, 100, 254]), seed=number)}
            for stepper in steppers:
                stepper.step(prompt)
        if number % 11 == 10:
            gone = names.pop(rng.randrange(len(names)))
            for stepper in steppers:
                stepper.release(gone)
        chunks = {name: [rng.randrange(96)] for name in rng.sample(names, rng.randint(1, len(names)))}
        expected, logits = (stepper.step(chunks) for stepper in steppers)
        assert list(logits) == list(expected)
        for name, row in expected.items():
            torch.testing.assert_close(logits[name], row, rtol=0, atol=1e-5)
    assert (recorder.num_recordings, recorder.num_replays) == (5 * 3, 40)


def test_pending_tokens_are_those_that_the_step_before_has_chosen(model: MPT) -> None:
    """In chunks and decoding steps, whether replayed or computed."""
    recorder = Repeating()
    chosen = torch.tensor([7, 0, 95, 41])
    known = {"a": [chosen[2].item()], "b": [8], "c": [chosen[0].item()]}
    pending = {"a": [~2], "b": [8], "c": [~0]}
    for stepper in (Stepper(model), Stepper(model, recorder=recorder)):
        stepper.warm_up()
        expected = Stepper(model)
        for rest in ([], [], [3, 4]):
            chunks = ({name: [*rest, *tokens] for name, tokens in of.items()} for of in (known, pending))
            rows, actual = expected.step(next(chunks)), stepper.step(next(chunks), pending=chosen)
            for name, row in rows.items():
                torch.testing.assert_close(actual[name], row, rtol=0, atol=1e-5)
    assert recorder.num_replays == 2


def test_a_sequence_with_more_blocks_than_it_needs_is_replayed(model: MPT) -> None:
    """At the end of a split, too, where the further blocks are beyond those of its recording."""
    recorder = Repeating()
    steppers = [Stepper(model, num_blocks=512), Stepper(model, num_blocks=512, recorder=recorder)]
    for stepper in steppers:
        stepper.warm_up(max_sequences=2, max_tokens=512)
        stepper.step({"a": random_tokens(254)})
        stepper.reserve("a", 5)
    expected, actual = (stepper.step({"a": [1]})["a"] for stepper in steppers)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
    assert recorder.num_replays == 1


def test_results_of_all_sizes_share_the_memory_of_the_largest(model: MPT) -> None:
    stepper = Stepper(model, recorder=Repeating())
    stepper.warm_up(max_sequences=3, max_tokens=200)
    rows = [stepper.step({name: [1] for name in names})["a"] for names in ("a", "ab", "abc")]
    assert len({row.untyped_storage().data_ptr() for row in rows}) == 1


def test_only_steps_that_decode_are_replayed(model: MPT) -> None:
    recorder = Repeating()
    stepper = Stepper(model, recorder=recorder)
    stepper.warm_up()
    stepper.step({"a": [1, 2], "b": [3]})
    stepper.step({"a": [1], "b": [3]}, samples=["a"])
    stepper.score({"a": [4]}, {"a": PromptScoring(0, (5,), 0)})
    assert recorder.num_replays == 0
    stepper.step({"a": [1], "b": [3]})
    assert recorder.num_replays == 1


def test_a_replayed_step_that_is_not_finite_fails(tmp_path: Path) -> None:
    config = tiny_config()
    weights = random_weights(config)
    weights["transformer.wte.weight"][5] = torch.nan
    make_checkpoint(tmp_path, config, weights)
    sick = load_model(tmp_path, MPTConfig.from_file(tmp_path / "config.json"), WeightFormat(torch.float32, CPU))
    recorder = Repeating()
    stepper = Stepper(sick, recorder=recorder)
    stepper.warm_up()
    stepper.step({"a": [1]})
    with pytest.raises(FloatingPointError):
        stepper.step({"a": [5]})
    stepper.step({"b": [2]})
    assert recorder.num_replays == 3


@pytest.mark.parametrize("most_recordings", [0, 3])
def test_what_a_device_cannot_record_is_computed(
    model: MPT, most_recordings: int, caplog: pytest.LogCaptureFixture
) -> None:
    """The largest steps are recorded first."""
    recorder = Repeating(most_recordings)
    stepper, expected = Stepper(model, recorder=recorder), Stepper(model)
    stepper.warm_up(max_sequences=2, max_tokens=600)
    warnings = [record.message for record in caplog.records if "CUDA graphs" in record.message]
    assert len(warnings) == 1
    for names in ("ab", "a", "ab"):
        chunks = {name: [1] for name in names}
        rows = stepper.step(chunks)
        for name, row in expected.step(chunks).items():
            torch.testing.assert_close(rows[name], row)
    assert recorder.num_replays == (2 if most_recordings else 0)


def test_a_warm_up_leaves_nothing_behind(model: MPT) -> None:
    prompt = {"a": random_tokens(20)}
    for num_blocks in (8, 512):
        stepper, warm = (Stepper(model, num_blocks=num_blocks) for _ in range(2))
        warm.warm_up()
        assert torch.equal(warm.step(prompt)["a"], stepper.step(prompt)["a"])

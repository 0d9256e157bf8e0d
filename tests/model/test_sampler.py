"""Sampling: which tokens the filters keep, how often each is sampled, and independence from the rest of the batch."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from mpt_grpc.errors import InternalError
from mpt_grpc.model.native import load_kernels
from mpt_grpc.model.sampler import Sampler
from mpt_grpc.request import SamplingParameters
from mpt_grpc.step import SamplingInputs, SequenceStep

NewSampler = Callable[[int], Sampler]


@pytest.fixture(params=["PyTorch", "kernels"])
def new_sampler(request: pytest.FixtureRequest) -> NewSampler:
    """Makes samplers for a vocabulary of some size."""
    kernels = load_kernels() if request.param == "kernels" else None
    assert kernels is not None or request.param == "PyTorch"
    return lambda vocab_size: Sampler(vocab_size, kernels)


def sequence(sequence_id: int = 0, position: int = 0, **sampling: Any) -> SequenceStep:
    inputs = SamplingInputs(SamplingParameters(**{"seed": 0, **sampling}))
    return SequenceStep(sequence_id, "r", (1,), 8, (3,), (inputs,), position)


def random_logits(rows: int, vocab_size: int, seed: int = 0, std: float = 1.0) -> Tensor:
    return torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * std


def samples(new_sampler: NewSampler, logits: Tensor, count: int, **sampling: Any) -> list[int]:
    """Returns the tokens sampled from the same logits [vocab_size] at `count` output positions."""
    steps = [sequence(position, position, **sampling) for position in range(count)]
    result = new_sampler(len(logits)).sample(logits.expand(count, -1).clone(), steps)
    assert not result.errors
    return [token_id for position in range(count) for token_id in result.token_ids[position]]


def kept(logits: Sequence[float], temperature: float, top_k: int, top_p: float, min_p: float) -> set[int]:
    """Returns the tokens that remain after temperature, top-k, top-p and min-p, computed in plain Python."""
    order = sorted(range(len(logits)), key=lambda token: -logits[token])
    order = order[: top_k or len(logits)]
    powers = [math.exp((logits[token] - max(logits)) / temperature) for token in order]
    left, before = [], 0.0
    for token, power in zip(order, powers, strict=True):
        if before < top_p or not left:
            left.append((token, power))
        before += power / sum(powers)
    return {token for token, power in left if power >= min_p * powers[0]}


def chi_square(tokens: Sequence[int], probabilities: Sequence[float]) -> float:
    counts = Counter(tokens)
    expected = [probability * len(tokens) for probability in probabilities]
    return sum((counts[token] - mean) ** 2 / mean for token, mean in enumerate(expected))


CHI_SQUARE_15 = 37.7
"""The critical value for 15 degrees of freedom at p = 0.001; the samples, and so the tests, are deterministic."""


def test_temperature_0_chooses_the_highest_logit_and_the_lowest_id_among_equals(new_sampler: NewSampler) -> None:
    logits = random_logits(8, 50)
    logits[7] = 0.0
    result = new_sampler(50).sample(logits, [sequence(row, temperature=0, seed=row) for row in range(8)])
    assert [result.token_ids[row] for row in range(8)] == [(token,) for token in logits.argmax(dim=-1).tolist()]
    assert result.token_ids[7] == (0,)


@pytest.mark.parametrize("top_k", [0, 1, 3, 12, 40])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.5, 0.0])
@pytest.mark.parametrize("min_p", [0.0, 0.3, 1.0])
def test_exactly_the_tokens_that_the_filters_keep_are_sampled(
    new_sampler: NewSampler, top_k: int, top_p: float, min_p: float
) -> None:
    logits = random_logits(1, 12, seed=top_k)[0]
    tokens = samples(new_sampler, logits, 3000, temperature=1.5, top_k=top_k, top_p=top_p, min_p=min_p)
    assert set(tokens) == kept(logits.tolist(), 1.5, top_k, top_p, min_p)


def test_each_row_of_a_batch_has_its_own_filters(new_sampler: NewSampler) -> None:
    logits, rng = random_logits(1, 12, seed=5)[0], random.Random(0)
    settings = [
        (rng.choice([0.5, 1.0, 2.0]), rng.choice([0, 2, 5]), rng.choice([1.0, 0.8, 0.4]), rng.choice([0.0, 0.2]))
        for _ in range(3000)
    ]
    names = ("temperature", "top_k", "top_p", "min_p")
    steps = [sequence(i, i, **dict(zip(names, values, strict=True))) for i, values in enumerate(settings)]
    result = new_sampler(12).sample(logits.expand(3000, -1).clone(), steps)
    for i, values in enumerate(settings):
        assert result.token_ids[i][0] in kept(logits.tolist(), *values), values


def test_top_p_keeps_no_more_tokens_than_reach_the_sum(new_sampler: NewSampler) -> None:
    assert set(samples(new_sampler, torch.zeros(4), 2000, top_p=0.5)) == {0, 1}
    assert set(samples(new_sampler, torch.zeros(50), 2000, top_p=0.1)) == {0, 1, 2, 3, 4}


def test_typical_p_0_keeps_the_token_whose_surprise_is_closest_to_the_expected_one(new_sampler: NewSampler) -> None:
    probabilities = torch.tensor([0.6, 0.25, 0.1, 0.05])  # the expected surprise is 1.03
    assert set(samples(new_sampler, probabilities.log(), 200, typical_p=0.0)) == {1}


def test_top_k_keeps_k_of_several_equal_tokens(new_sampler: NewSampler) -> None:
    assert set(samples(new_sampler, torch.zeros(12), 2000, top_k=3)) == {0, 1, 2}


def test_top_k_1_is_greedy_even_where_the_hash_rounds_to_1(new_sampler: NewSampler) -> None:
    """At seed 0, position 4350, the hash gives token 3814 the largest 32-bit value, which rounds to 1 in float32."""
    logits = torch.zeros(1, 4096)
    logits[0, 3814] = 1.0
    result = new_sampler(4096).sample(logits, [sequence(0, 4350, top_k=1)])
    assert result.token_ids[0] == (3814,)


def splitmix64(x: int) -> int:
    """The finalizer of splitmix64, in unsigned integers."""
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % (1 << 64)
    x = (x ^ x >> 27) * 0x94D049BB133111EB % (1 << 64)
    return x ^ x >> 31


def test_the_noise_is_that_of_the_documented_hash(new_sampler: NewSampler) -> None:
    """Resumed outputs rely on it. Of equal logits the one with the smallest hash wins."""
    for seed in (0, 1, 1 << 32, (1 << 63) - 1, 1 << 63, (1 << 64) - 1):
        for position in (0, 1, 1000):
            stream = splitmix64((seed + splitmix64(position + 1)) % (1 << 64))
            tokens = [(token + 1) * 0x9E3779B97F4A7C15 for token in range(300)]
            hashes = [splitmix64((stream + token) % (1 << 64)) % (1 << 32) for token in tokens]
            ((chosen,),) = (
                new_sampler(300).sample(torch.zeros(1, 300), [sequence(0, position, seed=seed)]).token_ids.values()
            )
            assert chosen == hashes.index(min(hashes))


@pytest.mark.parametrize("difference", [-0.01, 0.01])
@pytest.mark.parametrize(
    ("seed", "extreme", "uniform"),
    [
        (973995008045323301, 0, 2.0**-33),
        (15510417207562066079, 1, 1.5 * 2.0**-32),
        (2547881648330384964, (1 << 32) - 1, 1 - 2.0**-24),
    ],
)
def test_the_noise_is_exact_where_it_is_largest_and_smallest(
    new_sampler: NewSampler, seed: int, extreme: int, uniform: float, difference: float
) -> None:
    """The smallest hashes stand for the middle of their 2^-32, the largest for the float32 below 1."""
    stream = splitmix64((seed + splitmix64(1)) % (1 << 64))
    hashes = [splitmix64((stream + (token + 1) * 0x9E3779B97F4A7C15) % (1 << 64)) % (1 << 32) for token in range(2)]
    assert hashes[0] == extreme
    first, second = (-math.log(-math.log1p(-value)) for value in (uniform, (hashes[1] + 0.5) / (1 << 32)))
    logits = torch.tensor([[0.0, first - second + difference]])
    assert new_sampler(2).sample(logits, [sequence(seed=seed)]).token_ids == {0: (int(difference > 0),)}


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_token_frequencies_over_positions_match_softmax(new_sampler: NewSampler, temperature: float) -> None:
    logits = random_logits(1, 16)[0]
    expected = (logits / temperature).softmax(-1).tolist()
    assert chi_square(samples(new_sampler, logits, 20_000, temperature=temperature), expected) < CHI_SQUARE_15


@pytest.mark.parametrize("first_seed", [0, 1 << 63, (1 << 64) - 20_000])
def test_token_frequencies_over_seeds_match_softmax(new_sampler: NewSampler, first_seed: int) -> None:
    logits = random_logits(1, 16)
    steps = [sequence(row, 7, seed=first_seed + row) for row in range(20_000)]
    tokens = [token for (token,) in new_sampler(16).sample(logits.repeat(20_000, 1), steps).token_ids.values()]
    assert chi_square(tokens, logits[0].softmax(-1).tolist()) < CHI_SQUARE_15


def test_token_frequencies_after_filtering_match_softmax_over_the_remaining_tokens(new_sampler: NewSampler) -> None:
    logits = random_logits(1, 40)[0]
    top = logits.topk(16).indices
    tokens = samples(new_sampler, logits, 20_000, top_k=16)
    expected = logits[top].softmax(-1).tolist()
    assert chi_square([top.tolist().index(token) for token in tokens], expected) < CHI_SQUARE_15


@pytest.mark.parametrize("seeds", [(0, 1), (0, 1 << 32), (5, (1 << 64) - 1)])
def test_different_seeds_and_positions_are_independent(new_sampler: NewSampler, seeds: tuple[int, int]) -> None:
    """Token pairs of two seeds, and of adjacent positions of one seed, are uniform over 4 x 4 cells."""
    first, second = (samples(new_sampler, torch.zeros(4), 20_000, seed=seed) for seed in seeds)
    even = [1 / 16] * 16
    assert chi_square([4 * a + b for a, b in zip(first, second, strict=True)], even) < CHI_SQUARE_15
    assert chi_square([4 * a + b for a, b in zip(first[::2], first[1::2], strict=True)], even) < CHI_SQUARE_15


def test_a_sampled_token_depends_only_on_seed_position_and_logits(new_sampler: NewSampler) -> None:
    """It does not depend on the row or on the other rows, whether greedy or filtered."""
    rng = random.Random(0)
    logits = random_logits(16, 200, std=2.0)
    steps = [
        sequence(
            row,
            rng.randrange(1000),
            seed=rng.getrandbits(64),
            temperature=rng.choice([0.0, 0.7, 1.3]),
            top_k=rng.choice([0, 0, 20]),
            top_p=rng.choice([1.0, 0.9]),
            min_p=rng.choice([0.0, 0.05]),
        )
        for row in range(16)
    ]
    sampler = new_sampler(200)
    alone = {}
    for row, step in enumerate(steps):
        alone |= sampler.sample(logits[row : row + 1].clone(), [step]).token_ids
    for _ in range(10):
        rows = rng.sample(range(16), rng.randint(2, 16))
        together = sampler.sample(logits[rows], [steps[row] for row in rows]).token_ids
        assert together == {row: alone[row] for row in rows}


@pytest.mark.parametrize("position", [0, 1, 2**31, 2**40])
@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1])
def test_every_seed_and_position_is_accepted(new_sampler: NewSampler, seed: int, position: int) -> None:
    step = sequence(0, position, seed=seed)
    once, again = (new_sampler(1000).sample(torch.zeros(1, 1000), [step]).token_ids for _ in range(2))
    assert once.keys() == {0}
    assert once == again


def test_all_64_bits_of_a_seed_matter(new_sampler: NewSampler) -> None:
    seeds = [0, *(1 << bit for bit in range(64)), (1 << 64) - 1]
    steps = [sequence(row, seed=seed) for row, seed in enumerate(seeds)]
    tokens = new_sampler(1 << 16).sample(torch.zeros(len(seeds), 1 << 16), steps).token_ids
    assert len(set(tokens.values())) == len(seeds)


@pytest.mark.parametrize("padding", [1e4, torch.inf, torch.nan])
@pytest.mark.parametrize("temperature", [0.0, 1.0, 100.0])
def test_vocabulary_padding_is_never_chosen(new_sampler: NewSampler, temperature: float, padding: float) -> None:
    logits = random_logits(500, 16)
    logits[:, 10:] = padding
    steps = [sequence(row, row, temperature=temperature, top_k=row % 16, top_p=0.9) for row in range(500)]
    result = new_sampler(10).sample(logits, steps)
    assert not result.errors
    assert len(result.token_ids) == 500
    assert max(result.token_ids.values()) < (10,)


def test_a_batch_that_grows_or_shrinks_is_sampled_like_a_new_one(new_sampler: NewSampler) -> None:
    logits, sampler = random_logits(4, 50), new_sampler(50)
    steps = [sequence(row, temperature=temperature) for row, temperature in enumerate((0.0, 1.0, 1.0, 1.0))]
    for count in (2, 4, 1, 3):
        expected = new_sampler(50).sample(logits[:count], steps[:count]).token_ids
        assert sampler.sample(logits[:count], steps[:count]).token_ids == expected


@pytest.mark.parametrize("fault", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_non_finite_row_fails_only_its_own_sequence(
    new_sampler: NewSampler, temperature: float, fault: float
) -> None:
    logits = random_logits(4, 50)
    steps = [sequence(row, temperature=temperature, top_p=0.9) for row in range(4)]
    sound = new_sampler(50).sample(logits.clone(), steps).token_ids
    logits[2, 17] = fault
    result = new_sampler(50).sample(logits, steps)
    assert result.token_ids == {row: sound[row] for row in (0, 1, 3)}
    assert list(result.errors) == [2]
    assert isinstance(result.errors[2], InternalError)
    assert "not finite" in str(result.errors[2])


@pytest.mark.parametrize("filters", [{}, {"top_k": 5}, {"top_p": 0.5}, {"min_p": 0.1}])
@pytest.mark.parametrize("temperature", [1e-6, 1e-30, 1e-45, 1e-300])
def test_at_a_tiny_temperature_the_highest_logit_is_chosen(
    new_sampler: NewSampler, temperature: float, filters: dict[str, Any]
) -> None:
    logits = random_logits(1, 100, std=50.0)[0]
    assert set(samples(new_sampler, logits, 200, temperature=temperature, **filters)) == {int(logits.argmax())}


@pytest.mark.parametrize("temperature", [1e-6, 1e-300])
def test_at_a_tiny_temperature_equal_logits_stay_equally_likely(new_sampler: NewSampler, temperature: float) -> None:
    assert set(samples(new_sampler, torch.tensor([3.0, 7.0, 7.0, 5.0]), 200, temperature=temperature)) == {1, 2}


def test_at_temperature_100_sampling_is_almost_uniform(new_sampler: NewSampler) -> None:
    logits = random_logits(1, 16)[0]
    tokens = samples(new_sampler, logits, 20_000, temperature=100.0)
    assert chi_square(tokens, (logits / 100).softmax(-1).tolist()) < CHI_SQUARE_15
    assert chi_square(tokens, [1 / 16] * 16) < CHI_SQUARE_15


def drafted(position: int, drafts: tuple[int, ...], **sampling: Any) -> SequenceStep:
    """Returns a step of one known token and drafts."""
    inputs = SamplingInputs(SamplingParameters(**{"seed": 5, **sampling}), num_top_logprobs=1)
    return SequenceStep(0, "r", (1, *drafts), 8, (3,), (inputs,) * (1 + len(drafts)), position)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_sequence_gets_its_right_drafts_and_the_token_after_them(new_sampler: NewSampler, temperature: float) -> None:
    logits = random_logits(5, 50)
    alone = [
        new_sampler(50).sample(logits[row : row + 1], [drafted(7 + row, (), temperature=temperature)])
        for row in range(5)
    ]
    right = [token_id for one in alone for token_id in one.token_ids[0]]
    for num_right in range(5):
        drafts = (*right[:num_right], *((right[i] + 1) % 50 for i in range(num_right, 4)))
        result = new_sampler(50).sample(logits, [drafted(7, drafts, temperature=temperature)])
        assert result.token_ids == {0: tuple(right[: num_right + 1])}
        assert result.logprobs == {0: tuple(one.logprobs[0][0] for one in alone[: num_right + 1])}


def test_a_single_draft_counts(new_sampler: NewSampler) -> None:
    logits = random_logits(2, 50)
    best = logits.argmax(dim=-1).tolist()
    step = drafted(0, (best[0],), temperature=0)
    assert new_sampler(50).sample(logits, [step]).token_ids == {0: tuple(best)}


def test_no_draft_counts_after_a_wrong_one(new_sampler: NewSampler) -> None:
    logits = random_logits(3, 50)
    best = logits.argmax(dim=-1).tolist()
    step = drafted(0, ((best[0] + 1) % 50, best[0]), temperature=0)
    assert new_sampler(50).sample(logits, [step]).token_ids == {0: (best[0],)}


def test_drafts_of_one_sequence_do_not_disturb_the_next(new_sampler: NewSampler) -> None:
    logits = random_logits(4, 50)
    best = logits.argmax(dim=-1).tolist()
    steps = [drafted(0, (best[0], 49), temperature=0), sequence(1, temperature=0)]
    assert new_sampler(50).sample(logits, steps).token_ids == {0: (best[0], best[1]), 1: (best[3],)}


def test_a_fault_after_a_right_draft_waits_for_its_own_step(new_sampler: NewSampler) -> None:
    logits = random_logits(3, 50)
    best = logits.argmax(dim=-1).tolist()
    logits[1] = torch.nan
    result = new_sampler(50).sample(logits, [drafted(0, (best[0], 1), temperature=0)])
    assert (result.token_ids, result.errors) == ({0: (best[0],)}, {})
    masks = {0: [b"\xff" * 7, bytes(7), b"\xff" * 7]}
    result = new_sampler(50).sample(random_logits(3, 50), [drafted(0, (best[0], 1), temperature=0)], masks)
    assert (result.token_ids, result.errors) == ({0: (best[0],)}, {})
    logits[1] = torch.inf
    masks = {0: [b"\xff" * 7] * 3}
    result = new_sampler(50).sample(logits, [drafted(0, (best[0], 1), temperature=0)], masks)
    assert (result.token_ids, result.errors) == ({0: (best[0],)}, {})
    logits[0] = torch.nan
    result = new_sampler(50).sample(logits, [drafted(0, (best[0], 1), temperature=0)])
    assert (result.token_ids, list(result.errors)) == ({}, [0])


def test_drafts_count_only_as_far_as_there_are_masks(new_sampler: NewSampler) -> None:
    logits = random_logits(3, 16)
    best = logits.argmax(dim=-1).tolist()
    step = drafted(0, (best[0], best[1]), temperature=0)
    everything, other = b"\xff\xff", (1 << (best[1] + 1) % 16).to_bytes(2, "little")
    assert new_sampler(16).sample(logits, [step], {0: [everything]}).token_ids == {0: (best[0],)}
    assert new_sampler(16).sample(logits, [step], {0: [everything, other]}).token_ids == {
        0: (best[0], (best[1] + 1) % 16)
    }

"""Penalties, biases, masks and filters, compared with transformers' logits processors.

Where transformers has no equivalent, the oracle is the formula in plain Python.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    PrefixConstrainedLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from mpt_grpc.errors import InternalError
from mpt_grpc.model.logits import adjust, apply_filters, is_adjusted, top_tokens
from mpt_grpc.model.sampler import Sampler
from mpt_grpc.request import DecodingOptions, SamplingParameters
from mpt_grpc.step import SamplingInputs, SequenceStep, StepResult

VOCAB = 200
PROMPT, OUTPUT = (3, 7, 7, 50, 199), (7, 8, 8, 8, 0, 3)
PLAIN = SamplingInputs(SamplingParameters(seed=0))


def random_logits(rows: int, vocab_size: int = VOCAB, seed: int = 0, std: float = 2.0) -> Tensor:
    return torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * std


def greedy_inputs(
    *,
    prompt: tuple[int, ...] = (),
    output: tuple[int, ...] = (),
    forbidden: tuple[int, ...] = (),
    sampling: Mapping[str, Any] | None = None,
    **decoding: Any,
) -> SamplingInputs:
    """Returns sampling inputs that are greedy unless `sampling` sets a temperature."""
    parameters = SamplingParameters(**{"temperature": 0, "seed": 0, **(sampling or {})})
    return SamplingInputs(parameters, DecodingOptions(**decoding), prompt, output, forbidden)


def adjusted(logits: Tensor, one: SamplingInputs, mask: bytes | None = None) -> Tensor:
    """Returns the middle one of three rows, [vocab_size], and checks that its plain neighbours are unchanged."""
    rows = torch.stack([logits + 1, logits, logits - 1])
    processed = adjust(rows, [PLAIN, one, PLAIN], {} if mask is None else {1: mask})
    assert torch.equal(processed[[0, 2]], rows[[0, 2]])
    assert torch.equal(rows[1], logits), "the model's own logits must not be modified"
    return processed[1]


def mask_of(allowed: Collection[int], num_bytes: int = VOCAB // 8 + 4) -> bytes:
    return sum(1 << token for token in allowed).to_bytes(num_bytes, "little")


def sample(logits: Tensor, *inputs: SamplingInputs, masks: Mapping[int, bytes] | None = None) -> StepResult:
    """Samples one row for each of `inputs`; the sequence IDs are 10, 11 and so on, the output positions 0, 1 and so
    on."""
    steps = [SequenceStep(10 + row, "r", (1,), 8, (3,), (one,), row) for row, one in enumerate(inputs)]
    by_sequence = {sequence_id: [mask] for sequence_id, mask in (masks or {}).items()}
    return Sampler(logits.shape[1]).sample(logits, steps, by_sequence)


def chosen(result: StepResult) -> set[int]:
    return {token_id for token_ids in result.token_ids.values() for token_id in token_ids}


@pytest.mark.parametrize("penalty", [0.5, 1.3, 10.0])
def test_the_repetition_penalty_matches_transformers(penalty: float) -> None:
    logits = random_logits(1)
    expected = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([PROMPT + OUTPUT]), logits.clone())[0]
    processed = adjusted(logits[0], greedy_inputs(prompt=PROMPT, output=OUTPUT, repetition_penalty=penalty))
    assert torch.equal(processed, expected)
    assert (processed != logits[0]).sum() == len({*PROMPT, *OUTPUT})


def test_frequency_and_presence_penalties_count_only_the_output() -> None:
    logits = random_logits(1)[0]
    processed = adjusted(
        logits, greedy_inputs(prompt=PROMPT, output=OUTPUT, frequency_penalty=0.7, presence_penalty=-0.4)
    )
    expected = logits.tolist()
    for token, count in Counter(OUTPUT).items():
        expected[token] += -0.7 * count + 0.4
    torch.testing.assert_close(processed, torch.tensor(expected), rtol=0, atol=1e-6)


@pytest.mark.parametrize("penalties", [{"frequency_penalty": 1.5}, {"presence_penalty": 1.5}])
def test_each_penalty_works_alone(penalties: dict[str, float]) -> None:
    logits = random_logits(1)[0]
    times = Counter(OUTPUT) if "frequency_penalty" in penalties else Counter(set(OUTPUT))
    expected = [logit - 1.5 * times[token] for token, logit in enumerate(logits.tolist())]
    processed = adjusted(logits, greedy_inputs(output=OUTPUT, **penalties))
    torch.testing.assert_close(processed, torch.tensor(expected), rtol=0, atol=1e-6)


def test_nothing_is_penalized_before_the_first_token() -> None:
    logits = random_logits(1)[0]
    assert torch.equal(adjusted(logits, greedy_inputs(frequency_penalty=2.0, presence_penalty=2.0)), logits)


def test_the_logit_bias_matches_transformers() -> None:
    bias = {0: 100.0, 17: -0.25, 199: -100.0}
    logits = random_logits(1)
    processor = SequenceBiasLogitsProcessor([[[token], value] for token, value in bias.items()])
    assert torch.equal(adjusted(logits[0], greedy_inputs(logit_bias=bias)), processor(torch.tensor([[1]]), logits)[0])


def test_only_allowed_tokens_keep_their_logits() -> None:
    allowed, logits = (199, 0, 64, 64), random_logits(1)
    expected = PrefixConstrainedLogitsProcessor(lambda *_: list(allowed), 1)(torch.tensor([[1]]), logits)[0]
    assert torch.equal(adjusted(logits[0], greedy_inputs(allowed_token_ids=allowed)), expected)


@pytest.mark.parametrize("vocab_size", [1, 8, 13, 200])
def test_only_tokens_allowed_by_the_mask_keep_their_logits(vocab_size: int) -> None:
    logits = random_logits(1, vocab_size)[0]
    allowed = set(random.Random(vocab_size).sample(range(vocab_size), vocab_size // 2)) | {0}
    beyond = {vocab_size, vocab_size + 9}
    processed = adjusted(logits, greedy_inputs(), mask_of(allowed | beyond, num_bytes=vocab_size // 8 + 5))
    expected = [logit if token in allowed else -torch.inf for token, logit in enumerate(logits.tolist())]
    assert processed.tolist() == expected


def test_suppression_of_forbidden_tokens_matches_transformers() -> None:
    logits = random_logits(1)
    expected = SuppressTokensLogitsProcessor([0, 5, 199])(torch.tensor([[1]]), logits)[0]
    assert torch.equal(adjusted(logits[0], greedy_inputs(forbidden=(0, 5, 199, 5))), expected)


def test_forbidden_tokens_are_chosen_if_no_other_token_is_allowed() -> None:
    logits = random_logits(3)
    ends = greedy_inputs(forbidden=(0, 5))
    masks = {10: mask_of({0, 5}), 11: mask_of({0, 5, 9}), 12: mask_of({5})}
    result = sample(logits, ends, ends, ends, masks=masks)
    assert result.token_ids == {10: (int(logits[0, 5] > logits[0, 0]) * 5,), 11: (9,), 12: (5,)}
    assert not result.errors


def test_processing_steps_are_applied_in_the_documented_order() -> None:
    """The repetition penalty comes before the additive ones: both apply to tokens 0, 3, 7 and 8."""
    logits = random_logits(1)
    processors = LogitsProcessorList(
        [
            RepetitionPenaltyLogitsProcessor(1.7),
            SequenceBiasLogitsProcessor([[[8], 0.7 * -3.0], [[7], 0.7 * -1.0], [[0], -0.7], [[3], -0.7]]),
            SequenceBiasLogitsProcessor([[[token], 0.3] for token in (7, 8, 0, 3)]),
            SequenceBiasLogitsProcessor([[[8], 2.5], [[100], -1.5]]),
            PrefixConstrainedLogitsProcessor(lambda *_: list(range(0, 200, 2)), 1),
            PrefixConstrainedLogitsProcessor(lambda *_: list(range(4, 104)), 1),
            SuppressTokensLogitsProcessor([50, 51]),
        ]
    )
    everything = greedy_inputs(
        prompt=PROMPT,
        output=OUTPUT,
        forbidden=(50, 51),
        repetition_penalty=1.7,
        frequency_penalty=0.7,
        presence_penalty=-0.3,
        logit_bias={8: 2.5, 100: -1.5},
        allowed_token_ids=tuple(range(0, 200, 2)),
    )
    expected = processors(torch.tensor([PROMPT + OUTPUT]), logits.clone())[0]
    processed = adjusted(logits[0], everything, mask_of(range(4, 104)))
    torch.testing.assert_close(processed, expected, rtol=0, atol=1e-6)
    assert int(processed.isfinite().sum()) == 49


def test_default_options_return_the_logits_unchanged() -> None:
    logits = random_logits(2)
    assert torch.equal(adjust(logits, [PLAIN, PLAIN], {}), logits)
    assert not is_adjusted(PLAIN)


@pytest.mark.parametrize("std", [0.3, 2.0, 6.0])
@pytest.mark.parametrize("seed", range(4))
def test_the_filters_match_transformers(std: float, seed: int) -> None:
    """The vocabulary is large enough that a probability sum may need more than the top thousand tokens."""
    rng = random.Random(f"{std} {seed}")
    parameters = [
        SamplingParameters(
            top_k=rng.choice([0, 0, 1, 40, 1500, 5000]),
            top_p=rng.choice([1.0, 0.95, 0.5]),
            min_p=rng.choice([0.0, 0.0, 0.1]),
            typical_p=rng.choice([1.0, 0.9, 0.3]),
        )
        for _ in range(16)
    ]
    logits = random_logits(16, 4000, seed, std)
    processed = logits.clone()
    apply_filters(processed, parameters)
    for row, p in enumerate(parameters):
        warpers = LogitsProcessorList()
        warpers += [TopKLogitsWarper(p.top_k)] if p.top_k else []
        warpers += [TopPLogitsWarper(p.top_p)] if p.top_p < 1 else []
        warpers += [MinPLogitsWarper(p.min_p)] if p.min_p else []
        warpers += [TypicalLogitsWarper(p.typical_p)] if p.typical_p < 1 else []
        expected = warpers(torch.tensor([[1]]), logits[row : row + 1])[0]
        assert torch.equal(processed[row], expected), p


@pytest.mark.parametrize("name", ["top_p", "typical_p"])
@pytest.mark.parametrize("share", [0.125, 0.25, 0.5])
def test_among_equal_logits_the_lower_ids_are_kept(name: str, share: float) -> None:
    """512, 1024 and 2048 of 4096 tokens: fewer, exactly as many and more than are searched first."""
    logits = torch.zeros(1, 4096)
    apply_filters(logits, [SamplingParameters(**{name: share})])
    assert logits[0].isfinite().nonzero()[:, 0].tolist() == list(range(int(4096 * share)))


def test_typical_p_drops_the_most_likely_token_if_its_surprise_is_too_low() -> None:
    """One token has probability 0.3 and 70 have 0.01: of the expected 3.58 nats, 4.6 is closer than 1.2."""
    logits = torch.tensor([[0.3] + [0.01] * 70]).log()
    apply_filters(logits, [SamplingParameters(typical_p=0.495)])
    assert logits[0].isfinite().nonzero()[:, 0].tolist() == list(range(1, 51))


def test_top_tokens_are_sorted_by_logit_then_by_id() -> None:
    logits = torch.tensor([[-1.0, 2.0, -0.0, 0.0, 2.0, -torch.inf, -3.0, 1e-40], [5.0] * 8])
    assert top_tokens(logits, 8).tolist() == [[1, 4, 7, 2, 3, 0, 6, 5], list(range(8))]
    assert top_tokens(logits, 2).tolist() == [[1, 4], [0, 1]]
    neighbours = torch.tensor([2.0, 2.0 + 2**-22, -2.0, -2.0 - 2**-22])
    assert top_tokens(neighbours[None], 4).tolist() == [[1, 0, 2, 3]]


def test_greedy_sampling_respects_penalties_biases_and_masks() -> None:
    logits = torch.tensor([4.0, 3.9, 3.8, -5.0, -5.1]).expand(8, -1)
    inputs = [
        greedy_inputs(),
        greedy_inputs(prompt=(0,), repetition_penalty=1.5),
        greedy_inputs(output=(0, 1, 1), frequency_penalty=0.12),
        greedy_inputs(output=(0, 1), presence_penalty=0.5),
        greedy_inputs(logit_bias={4: 20.0}),
        greedy_inputs(allowed_token_ids=(3, 4)),
        greedy_inputs(),
        greedy_inputs(forbidden=(0,)),
    ]
    result = sample(logits, *inputs, masks={16: mask_of({2, 4}), 99: mask_of({0})})
    assert list(result.token_ids.values()) == [(0,), (1,), (0,), (2,), (4,), (3,), (2,), (1,)]


@pytest.mark.parametrize("temperature", [1.0, 100.0])
def test_excluded_tokens_are_never_chosen(temperature: float) -> None:
    allowed = {3, 90, 150, 199}
    parameters = {"temperature": temperature}
    narrow = greedy_inputs(sampling=parameters, allowed_token_ids=tuple(allowed))
    inputs = [narrow] * 400
    masked = [replace(narrow, decoding=DecodingOptions(), forbidden_token_ids=(90,))] * 400
    logits = random_logits(1).expand(400, -1)
    assert chosen(sample(logits, *inputs)) == allowed
    masks = {10 + row: mask_of(allowed) for row in range(400)}
    assert chosen(sample(logits, *masked, masks=masks)) == allowed - {90}


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 3, "typical_p": 0.9}])
def test_a_row_with_no_allowed_token_fails_only_its_own_sequence(sampling: dict[str, Any]) -> None:
    logits = random_logits(3)
    one = greedy_inputs(sampling=sampling, forbidden=(0,))
    alone = sample(logits, one, one, one).token_ids
    result = sample(logits, one, replace(one, num_top_logprobs=2), one, masks={11: mask_of(())})
    assert result.token_ids == {10: alone[10], 12: alone[12]}
    assert isinstance(result.errors[11], InternalError)
    assert "allows no token" in str(result.errors[11])
    assert not result.logprobs


@pytest.mark.parametrize("penalty", [1e-300, 1e-45, 1e-30, 10.0])
@pytest.mark.parametrize("scale", [1.0, 1e38])
def test_an_extreme_repetition_penalty_does_not_overflow(penalty: float, scale: float) -> None:
    logits = torch.tensor([0.5, -0.5, 0.0, 3.0]) * scale
    sampling = {"temperature": 1.0, "top_p": 0.9, "typical_p": 0.9}
    penalized = greedy_inputs(prompt=(0, 1, 2, 3), repetition_penalty=penalty, sampling=sampling)
    processed = adjusted(logits, penalized)
    assert processed.isfinite().all()
    assert processed.sign().equal(logits.sign())
    result = sample(logits[None], penalized)
    assert not result.errors
    assert result.token_ids[10] in ((0,), (3,))


def random_inputs(rng: random.Random, vocab_size: int) -> SamplingInputs:
    def tokens(count: int) -> tuple[int, ...]:
        return tuple(rng.choices(range(vocab_size), k=rng.randint(1, count)))

    sampling = SamplingParameters(
        temperature=rng.choice([0.0, 0.7, 1.0, 3.0]),
        top_k=rng.choice([0, 0, 5, 1200]),
        top_p=rng.choice([1.0, 0.9, 0.6]),
        min_p=rng.choice([0.0, 0.0, 0.02]),
        typical_p=rng.choice([1.0, 1.0, 0.8]),
        seed=rng.getrandbits(64),
    )
    decoding = DecodingOptions(
        repetition_penalty=rng.choice([1.0, 1.0, 1.3]),
        frequency_penalty=rng.choice([0.0, 0.0, 0.5]),
        presence_penalty=rng.choice([0.0, 0.0, -0.5]),
        logit_bias=rng.choice([{}, {token: rng.uniform(-5, 5) for token in tokens(20)}]),
        allowed_token_ids=rng.choice([(), (), tokens(300)]),
    )
    return SamplingInputs(
        sampling,
        decoding,
        tokens(50),
        tokens(30),
        rng.choice([(), tokens(3)]),
        num_top_logprobs=rng.choice([None, 0, 3]),
    )


def test_tokens_and_log_probabilities_do_not_depend_on_other_rows() -> None:
    """Rows with random options, sampled alone and in random batches, with a vocabulary as large as MPT-7B's."""
    rng, vocab_size = random.Random(0), 50_277
    logits = random_logits(16, vocab_size, std=3.0)
    inputs = [random_inputs(rng, vocab_size) for _ in range(16)]
    steps = [SequenceStep(row, "r", (1,), 8, (3,), (one,), rng.randrange(1000)) for row, one in enumerate(inputs)]
    masks = {row: [rng.randbytes(vocab_size // 8 + 1)] for row in range(0, 16, 3)}
    sampler = Sampler(vocab_size)
    alone = [sampler.sample(logits[row : row + 1], [step], masks) for row, step in enumerate(steps)]
    for _ in range(4):
        rows = rng.sample(range(16), rng.randint(2, 16))
        together = sampler.sample(logits[rows], [steps[row] for row in rows], masks)
        assert together.token_ids == {row: alone[row].token_ids[row] for row in rows}
        assert together.logprobs == {row: one for row in rows for one in alone[row].logprobs.values()}

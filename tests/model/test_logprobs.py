"""Log probabilities of chosen tokens and of prompts, compared with torch and transformers."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from model.conftest import Stepper, load, make_checkpoint, random_tokens, random_weights, tiny_config
from torch import Tensor
from transformers import MptForCausalLM

from mpt_grpc.model.logprobs import token_logprobs
from mpt_grpc.model.mpt import MPT
from mpt_grpc.model.sampler import Sampler
from mpt_grpc.request import DecodingOptions, SamplingParameters
from mpt_grpc.results import TokenLogprob
from mpt_grpc.step import PromptScoring, SamplingInputs, SequenceStep


def test_log_probabilities_match_torch() -> None:
    logits = torch.randn(6, 500, generator=torch.Generator().manual_seed(0)) * 4
    expected = logits.log_softmax(dim=-1)
    tokens, num_top = [0, 499, 7, 8, 9, int(logits[5].argmax())], [0, 1, 20, 3, 0, 5]
    for row, logprob in enumerate(token_logprobs(logits, tokens, num_top)):
        values, ids = expected[row].topk(num_top[row])
        assert logprob.token_id == tokens[row]
        assert logprob.logprob == expected[row, tokens[row]].item()
        assert logprob.rank == 1 + sum(logit > logits[row, tokens[row]] for logit in logits[row])
        assert logprob.top == tuple(zip(ids.tolist(), values.tolist(), strict=True))


def test_equal_tokens_share_a_rank_and_are_ordered_by_id() -> None:
    (logprob,) = token_logprobs(torch.tensor([[1.0, 5.0, 1.0, 5.0, 5.0, 0.0]]), [2], [4])
    assert logprob.rank == 4
    assert [token for token, _ in logprob.top] == [1, 3, 4, 0]


def test_top_logprobs_are_limited_to_the_vocabulary() -> None:
    (logprob,) = token_logprobs(torch.tensor([[0.0, 1.0, 2.0]]), [0], [20])
    assert [token for token, _ in logprob.top] == [2, 1, 0]


def test_log_probabilities_of_chosen_tokens_use_the_models_raw_logits() -> None:
    """Neither logits processing nor vocabulary padding affects them."""
    logits = torch.randn(3, 60, generator=torch.Generator().manual_seed(0))
    logits[:, 50:] = 100.0
    before = logits.clone()
    decoding = DecodingOptions(frequency_penalty=2.0, logit_bias={4: 50.0}, allowed_token_ids=(4, 5, 6))
    sampling = SamplingParameters(temperature=3.0, top_k=1, seed=0)
    with_logprobs = SamplingInputs(sampling, decoding, output_token_ids=(5, 6), num_top_logprobs=2)
    without = SamplingInputs(sampling, decoding)
    inputs = (with_logprobs, without, with_logprobs)
    steps = [SequenceStep(9 - row, "r", (1,), 0, (0,), (one,)) for row, one in enumerate(inputs)]
    result = Sampler(50).sample(logits, steps)
    assert result.token_ids == {9: (4,), 8: (4,), 7: (4,)}
    assert result.logprobs == {
        sequence_id: tuple(token_logprobs(before[row : row + 1, :50], [4], [2]))
        for row, sequence_id in ((0, 9), (2, 7))
    }
    assert torch.equal(logits, before)


def prompt_logprobs(model: MPT, tokens: list[int], sizes: list[int], num_top: int = 5) -> tuple[TokenLogprob, ...]:
    """Returns the log probabilities of all but the first token, computed in chunks of these sizes.

    Another sequence is scored in the same steps.
    """
    stepper, logprobs, start = Stepper(model, num_blocks=512), [], 0
    for size in sizes:
        chunk = tokens[start : start + size]
        following = tuple(tokens[start + 1 : start + 1 + size])
        scored = stepper.score(
            {"other": [5, 6], "prompt": chunk, "unscored": [1]},
            {"other": PromptScoring(1, (7,), 0), "prompt": PromptScoring(0, following, num_top)},
        )
        assert scored.keys() == {"other", "prompt"}
        assert [logprob.token_id for logprob in scored["other"]] == [7]
        logprobs += scored["prompt"]
        start += size
    return tuple(logprobs)


def transformers_logprobs(folder: Path, tokens: list[int]) -> Tensor:
    model = MptForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.inference_mode():
        return model(torch.tensor([tokens])).logits[0].log_softmax(dim=-1)


def test_prompt_log_probabilities_match_transformers(tmp_path: Path) -> None:
    """100 tokens exceed the number that is scored at once."""
    make_checkpoint(tmp_path, tiny_config())
    tokens = random_tokens(100)
    expected = transformers_logprobs(tmp_path, tokens)
    logprobs = prompt_logprobs(load(tmp_path), tokens, [100])
    assert [logprob.token_id for logprob in logprobs] == tokens[1:]
    for row, logprob in enumerate(logprobs):
        own = expected[row, logprob.token_id]
        assert logprob.logprob == pytest.approx(own.item(), abs=1e-3)
        assert int((expected[row] > own + 1e-3).sum()) < logprob.rank <= 1 + int((expected[row] > own - 1e-3).sum())
        values, ids = zip(*[(value, token) for token, value in logprob.top], strict=True)
        torch.testing.assert_close(torch.tensor(values), expected[row].topk(5).values, rtol=0, atol=1e-3)
        torch.testing.assert_close(torch.tensor(values), expected[row, list(ids)], rtol=0, atol=1e-3)


def test_scoring_may_start_and_end_inside_a_chunk(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, tiny_config())
    tokens, model = random_tokens(40), load(tmp_path)
    whole = prompt_logprobs(model, tokens, [40], 2)
    stepper = Stepper(model)
    stepper.score({"a": tokens[:10]}, {})
    logprobs = stepper.score(
        {"neighbour": [1], "a": tokens[10:], "b": tokens},
        {"a": PromptScoring(7, tuple(tokens[18:30]), 2), "b": PromptScoring(38, (tokens[39],), 2)},
    )
    for one, other in zip(logprobs["a"] + logprobs["b"], whole[17:29] + whole[38:], strict=True):
        assert one.token_id == other.token_id
        assert one.logprob == pytest.approx(other.logprob, abs=1e-5)
        assert [token for token, _ in one.top] == [token for token, _ in other.top]


@pytest.mark.parametrize("seed", range(4))
def test_a_chunked_prompt_has_the_same_log_probabilities_as_a_whole_one(tmp_path: Path, seed: int) -> None:
    make_checkpoint(tmp_path, tiny_config(max_seq_len=256))
    model, tokens, rng = load(tmp_path), random_tokens(150), random.Random(seed)
    sizes: list[int] = []
    while sum(sizes) < 150:
        sizes.append(min(rng.choice([1, 7, 80]), 150 - sum(sizes)))
    whole, chunked = prompt_logprobs(model, tokens, [150], 0), prompt_logprobs(model, tokens, sizes, 0)
    assert [logprob.token_id for logprob in chunked] == tokens[1:]
    for one, other in zip(whole, chunked, strict=True):
        assert other.logprob == pytest.approx(one.logprob, abs=1e-5)
        assert other.rank == one.rank


def test_vocabulary_padding_gets_no_probability(tmp_path: Path) -> None:
    """Ids from 90 on are padding: not even non-finite logits there have an effect."""
    weights = random_weights(tiny_config())
    make_checkpoint(tmp_path / "sound", tiny_config(), weights)
    weights["transformer.wte.weight"][90:] = torch.nan
    make_checkpoint(tmp_path / "padded", tiny_config(), weights)
    tokens = random_tokens(30, vocab_size=90)
    logits = transformers_logprobs(tmp_path / "sound", tokens)[:, :90].log_softmax(dim=-1)
    stepper = Stepper(load(tmp_path / "padded"), vocab_size=90)
    logprobs = stepper.score({"a": tokens}, {"a": PromptScoring(0, tuple(tokens[1:]), 0)})["a"]
    expected = logits[torch.arange(29), tokens[1:]]
    torch.testing.assert_close(torch.tensor([one.logprob for one in logprobs]), expected, rtol=0, atol=1e-3)


def test_a_non_finite_logit_raises_an_error_instead_of_returning_a_log_probability(tmp_path: Path) -> None:
    weights = random_weights(tiny_config())
    weights["transformer.wte.weight"][95] = torch.nan
    make_checkpoint(tmp_path, tiny_config(), weights)
    stepper = Stepper(load(tmp_path), vocab_size=95)
    assert stepper.score({"a": [1, 2]}, {"a": PromptScoring(0, (2,), 0)})
    stepper = Stepper(load(tmp_path))
    with pytest.raises(FloatingPointError):
        stepper.score({"a": [1, 2]}, {"a": PromptScoring(0, (2,), 0)})

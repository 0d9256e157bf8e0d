"""The forward pass, compared with transformers where it implements a field and with NumPy in float64 where it does not.

Everything is computed in float32 unless stated otherwise. The tolerance of 1e-4 is for logits several units apart.
"""

from __future__ import annotations

import json
import random
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from model.conftest import (
    Stepper,
    as_arrays,
    load,
    make_checkpoint,
    random_tokens,
    random_weights,
    run_prompt,
    tiny_config,
)
from transformers import MptForCausalLM

from mpt_grpc.model.native import available_instruction_sets
from mpt_grpc.verification.reference import Array, reference_logits

GQA = {"attn_type": "grouped_query_attention"}
STORYWRITER = {"alibi_bias_max": 16, "clip_qkv": 6}
REPLIT = {**GQA, "kv_n_heads": 8}


@pytest.fixture(autouse=True, params=["none", *available_instruction_sets()])
def _instruction_set(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs every test with torch and with the kernels for each instruction set of this machine."""
    monkeypatch.setenv("MPT_GRPC_ISA", request.param)


def transformers_model(folder: Path) -> MptForCausalLM:
    return MptForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


@cache
def expected_logits(config: str, qkv_std: float, num_tokens: int) -> Array:
    """Returns the reference's logits for random tokens, which are the same for every instruction set."""
    parsed = json.loads(config)
    return reference_logits(as_arrays(random_weights(parsed, qkv_std=qkv_std)), parsed, random_tokens(num_tokens))


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(tiny_config(), id="plain"),
        pytest.param(tiny_config(n_heads=1), id="1-head"),
        pytest.param(tiny_config(d_model=72, n_heads=6), id="6-heads"),
        pytest.param(tiny_config(d_model=96, n_heads=24), id="24-heads"),
        pytest.param(tiny_config({"softmax_scale": 0.05}), id="softmax_scale"),
        pytest.param(tiny_config({"clip_qkv": 1.5}), id="clip_qkv"),
        pytest.param(tiny_config(layer_norm_epsilon=0.1), id="layer_norm_epsilon"),
        pytest.param(tiny_config(learned_pos_emb=False), id="alibi-without-learned_pos_emb"),
    ],
)
def test_logits_match_transformers(tmp_path: Path, config: dict[str, Any]) -> None:
    make_checkpoint(tmp_path, config)
    tokens = random_tokens(48)
    with torch.inference_mode():
        expected = transformers_model(tmp_path)(torch.tensor([tokens])).logits[0]
    torch.testing.assert_close(run_prompt(load(tmp_path), tokens, [1] * 48), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("n_heads", [4, 24])
def test_64_greedy_tokens_match_transformers(tmp_path: Path, n_heads: int) -> None:
    make_checkpoint(tmp_path, tiny_config(d_model=96, n_heads=n_heads))
    prompt = random_tokens(9)
    expected = transformers_model(tmp_path).generate(
        torch.tensor([prompt]), max_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=0
    )[0, len(prompt) :]
    stepper = Stepper(load(tmp_path))
    tokens = [int(stepper.step({"a": prompt})["a"].argmax())]
    while len(tokens) < 64:
        tokens.append(int(stepper.step({"a": tokens[-1:]})["a"].argmax()))
    assert tokens == expected.tolist()
    assert len(set(tokens)) > 8, "a constant output would prove little"


# Fields that transformers ignores or rejects. The weights of Wqkv are large where clipping at 6 must have an effect.
@pytest.mark.parametrize(
    ("config", "qkv_std"),
    [
        pytest.param(tiny_config(), 0.2, id="plain"),
        pytest.param(tiny_config({"alibi_bias_max": 16}), 0.2, id="alibi_bias_max"),
        pytest.param(tiny_config({"clip_qkv": 6}), 0.6, id="clip_qkv"),
        pytest.param(tiny_config(STORYWRITER), 0.6, id="storywriter"),
        pytest.param(tiny_config({**GQA, "kv_n_heads": 2}), 0.2, id="gqa"),
        pytest.param(tiny_config({"attn_type": "multiquery_attention"}), 0.2, id="mqa"),
        pytest.param(tiny_config(expansion_ratio=3), 0.2, id="expansion_ratio"),
        pytest.param(tiny_config(expansion_ratio=2.5), 0.2, id="expansion_ratio-float"),
        pytest.param(tiny_config(logit_scale=0.25), 0.2, id="logit_scale"),
        pytest.param(tiny_config(logit_scale="inv_sqrt_d_model"), 0.2, id="inv_sqrt_d_model"),
        pytest.param(tiny_config({"softmax_scale": 0.5}), 0.2, id="softmax_scale"),
        pytest.param(tiny_config({"qk_ln": True}), 0.2, id="qk_ln"),
        pytest.param(tiny_config({"qk_ln": True, **GQA, "kv_n_heads": 2}, no_bias=False), 0.2, id="qk_ln-gqa-biases"),
        pytest.param(tiny_config(no_bias=False), 0.2, id="biases"),
        pytest.param(tiny_config({"alibi": False}), 0.2, id="learned-positions"),
        pytest.param(tiny_config(REPLIT, d_model=96, n_heads=24), 0.2, id="replit-1.5"),
        pytest.param(tiny_config({"alibi_bias_max": 16}, d_model=60, n_heads=5), 0.2, id="5-heads"),
        pytest.param(tiny_config({"alibi": False}, learned_pos_emb=False), 0.2, id="no-positions"),
        pytest.param(tiny_config({"rope": True}), 0.2, id="rope"),
        pytest.param(tiny_config({"rope": True, "rope_theta": 100, **GQA, "kv_n_heads": 2}), 0.2, id="rope-gqa"),
        pytest.param(tiny_config({"rope": True, "alibi": True, "qk_ln": True}), 0.2, id="rope-alibi-qk_ln"),
        pytest.param(
            tiny_config({"rope": True, "rope_impl": "hf", "rope_hf_config": {"type": "linear", "factor": 4.0}}),
            0.2,
            id="rope-linear",
        ),
        pytest.param(tiny_config({"sliding_window_size": 7}), 0.2, id="sliding-window"),
        pytest.param(tiny_config({"rope": True, "sliding_window_size": 16}), 0.2, id="rope-sliding-window"),
        pytest.param(tiny_config(norm_type="rmsnorm"), 0.2, id="rmsnorm"),
        pytest.param(
            tiny_config({"qk_ln": True}, norm_type="LOW_PRECISION_RMSNORM", no_bias=False, norm_eps=0.1),
            0.2,
            id="rmsnorm-biases",
        ),
        pytest.param(tiny_config(tie_word_embeddings=False, logit_scale=0.5), 0.2, id="untied"),
        pytest.param(tiny_config(final_logit_softcapping=5.0, logit_scale=2.0), 0.2, id="softcapping"),
        pytest.param(tiny_config(attention_bias=True), 0.2, id="attention-bias"),
        pytest.param(tiny_config(attention_bias=False, no_bias=False), 0.2, id="no-attention-bias"),
        pytest.param(tiny_config(ffn_config={"ffn_type": "mptglu"}, no_bias=False), 0.2, id="glu"),
        *(
            pytest.param(
                tiny_config(ffn_config={"ffn_type": ffn_type, "ffn_act_fn": act_fn}), 0.2, id=f"{ffn_type}-{act_fn}"
            )
            for ffn_type in ("mptmlp", "mptglu")
            for act_fn in (
                *({"name": name} for name in ("gelu", "quick_gelu", "relu", "silu")),
                {"name": "gelu", "approximate": "tanh"},
            )
        ),
    ],
)
def test_logits_match_the_numpy_reference(tmp_path: Path, config: dict[str, Any], qkv_std: float) -> None:
    make_checkpoint(tmp_path, config, random_weights(config, qkv_std=qkv_std))
    tokens, expected = random_tokens(48), expected_logits(json.dumps(config), qkv_std, 48)
    np.testing.assert_allclose(run_prompt(load(tmp_path), tokens, [1] * 48).numpy(), expected, rtol=0, atol=1e-4)
    np.testing.assert_allclose(run_prompt(load(tmp_path), tokens, [48]).numpy(), expected[-1:], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("field", "without"),
    [
        ("alibi_bias_max", tiny_config({"clip_qkv": 6})),
        ("clip_qkv", tiny_config({"alibi_bias_max": 16})),
        ("logit_scale", tiny_config(STORYWRITER)),
    ],
)
def test_ignoring_a_field_would_change_the_reference_logits(field: str, without: dict[str, Any]) -> None:
    config = tiny_config(STORYWRITER, logit_scale=0.5) if field == "logit_scale" else tiny_config(STORYWRITER)
    weights = as_arrays(random_weights(config, qkv_std=0.6))
    tokens = random_tokens(48)
    assert np.abs(reference_logits(weights, config, tokens) - reference_logits(weights, without, tokens)).max() > 0.1


@pytest.mark.parametrize(
    "variant",
    [
        tiny_config({"alibi": False}, learned_pos_emb=False),
        tiny_config({"rope": True}),
        tiny_config({"rope": True, "rope_theta": 100}),
        tiny_config({"rope": True, "rope_impl": "hf", "rope_hf_config": {"type": "linear", "factor": 4.0}}),
        tiny_config({"sliding_window_size": 16}),
        tiny_config(norm_type="rmsnorm"),
        tiny_config(final_logit_softcapping=5.0),
        tiny_config(ffn_config={"ffn_act_fn": {"name": "silu"}}),
        tiny_config(ffn_config={"ffn_act_fn": {"name": "quick_gelu"}}),
    ],
)
def test_every_variant_has_logits_of_its_own(variant: dict[str, Any]) -> None:
    """The weights are the same, so that a variant that is read but not computed would be found above."""
    weights, tokens = as_arrays(random_weights(tiny_config())), random_tokens(48)
    plain = [tiny_config(), tiny_config({"rope": True})]
    others = [reference_logits(weights, config, tokens) for config in plain if config != variant]
    logits = reference_logits(weights, variant, tokens)
    assert min(np.abs(logits - other).max() for other in others) > 0.01


def test_prefill_and_decode_agree_at_every_position(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, tiny_config({**GQA, "kv_n_heads": 2}))
    model, tokens = load(tmp_path), random_tokens(40)
    decoded = run_prompt(model, tokens, [1] * 40)
    prefilled = torch.cat([run_prompt(model, tokens[:count], [count]) for count in range(1, 41)])
    torch.testing.assert_close(prefilled, decoded, rtol=0, atol=1e-5)


@pytest.mark.parametrize("seed", range(8))
def test_any_chunking_gives_the_same_logits(tmp_path: Path, seed: int) -> None:
    make_checkpoint(tmp_path, tiny_config(d_model=72, n_heads=6))
    model, tokens, rng = load(tmp_path), random_tokens(70), random.Random(seed)
    sizes: list[int] = []
    while sum(sizes) < 70:
        sizes.append(min(rng.randint(1, 17), 70 - sum(sizes)))
    ends = np.cumsum(sizes) - 1
    whole = run_prompt(model, tokens, [1] * 70)
    chunked = run_prompt(model, tokens, sizes, block_size=rng.choice([1, 3, 16]))
    torch.testing.assert_close(chunked, whole[ends], rtol=0, atol=1e-5)


def test_a_prompt_whose_biases_do_not_fit_in_memory_at_once_has_the_same_logits(tmp_path: Path) -> None:
    """With 64 heads the torch backend computes the biases of 600 tokens once per layer, and those of 60 once."""
    make_checkpoint(tmp_path, tiny_config(n_heads=64))
    model, tokens = load(tmp_path), random_tokens(600)
    whole = run_prompt(model, tokens, [600], block_size=16)
    torch.testing.assert_close(run_prompt(model, tokens, [60] * 10, block_size=16)[-1:], whole, rtol=0, atol=1e-4)


def test_16_batched_sequences_have_the_same_logits_as_alone(tmp_path: Path) -> None:
    """The lengths differ and chunk sizes vary from step to step, so that prefill and decode share steps."""
    make_checkpoint(tmp_path, tiny_config({**GQA, "kv_n_heads": 2}))
    model, rng = load(tmp_path), random.Random(0)
    prompts = {f"r{i}": random_tokens(3 + 5 * i, seed=i) for i in range(16)}
    alone = {name: run_prompt(model, tokens, [1] * len(tokens)) for name, tokens in prompts.items()}
    stepper, done, mixed_steps = Stepper(model, num_blocks=512), dict.fromkeys(prompts, 0), 0
    while waiting := [name for name in prompts if done[name] < len(prompts[name])]:
        sizes = {name: rng.choice([1, 1, 2, 9]) for name in waiting}
        mixed_steps += len({size == 1 for size in sizes.values()}) == 2
        rows = stepper.step({name: prompts[name][done[name] : done[name] + size] for name, size in sizes.items()})
        for name, row in rows.items():
            done[name] = min(done[name] + sizes[name], len(prompts[name]))
            expected = alone[name][done[name] - 1]
            torch.testing.assert_close(row, expected, rtol=0, atol=1e-5)
            assert row.argmax() == expected.argmax()
    assert mixed_steps > 10


def test_only_sequences_with_sampling_inputs_get_logits(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, tiny_config())
    model = load(tmp_path)
    stepper = Stepper(model)
    assert stepper.step({"a": [1, 2], "b": [3]}, samples=()) == {}
    rows = stepper.step({"a": [4], "b": [5, 6], "c": [7]}, samples=("b", "c"))
    assert list(rows) == ["b", "c"]
    torch.testing.assert_close(rows["b"], run_prompt(model, [3, 5, 6], [3])[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(rows["c"], run_prompt(model, [7], [1])[0], rtol=0, atol=1e-5)


def test_alibi_extrapolates_to_12000_tokens_with_a_max_seq_len_of_2048(tmp_path: Path) -> None:
    """With slopes of 2^-8 and 2^-16 the second head attends to the whole context."""
    config = tiny_config({"alibi_bias_max": 16}, d_model=32, n_heads=2, max_seq_len=2048)
    make_checkpoint(tmp_path, config)
    model, tokens = load(tmp_path), random_tokens(12_000)
    sizes = [4096, 4096, 3800] + [1] * 8
    ends = np.cumsum(sizes) - 1
    logits = run_prompt(model, tokens, sizes, block_size=16).numpy()
    expected = expected_logits(json.dumps(config), 0.2, 12_000)
    np.testing.assert_allclose(logits, expected[ends], rtol=0, atol=1e-4)


def test_decoding_in_a_batch_with_much_longer_contexts_equals_decoding_alone(tmp_path: Path) -> None:
    """The lengths fall into different groups of the torch backend; two of them share one."""
    make_checkpoint(tmp_path, tiny_config())
    model = load(tmp_path)
    contexts = {f"{n} tokens": random_tokens(n, seed=n) for n in (3, 30, 33, 70, 150, 500)}
    stepper = Stepper(model)
    for name, tokens in contexts.items():
        stepper.step({name: tokens[:-1]})
    rows = stepper.step({name: tokens[-1:] for name, tokens in contexts.items()})
    for name, tokens in contexts.items():
        alone = run_prompt(model, tokens, [len(tokens)])[-1]
        torch.testing.assert_close(rows[name], alone, rtol=0, atol=1e-5)


def test_non_finite_values_do_not_spread_to_other_sequences(tmp_path: Path) -> None:
    """Token 5 has an embedding of NaN. Its sequence runs in a batch with a sound one; its blocks are then reused."""
    config = tiny_config()
    weights = random_weights(config)
    weights["transformer.wte.weight"][5] = torch.nan
    make_checkpoint(tmp_path, config, weights)
    model = load(tmp_path)
    others = [token for token in range(96) if token != 5]
    sound = [token for token in random_tokens(24) if token != 5]
    alone = run_prompt(model, sound, [len(sound)])[0, others]
    stepper = Stepper(model)
    with pytest.raises(FloatingPointError):
        stepper.step({"bad": [5] * 41})
    with pytest.raises(FloatingPointError):
        stepper.step({"bad": [5], "neighbour": sound})
    stepper.release("neighbour")
    rows = stepper.step({"again": sound})
    torch.testing.assert_close(rows["again"][others], alone, rtol=0, atol=1e-5)
    stepper.release("bad")
    stepper.step({"after": sound[:-1]})
    rows = stepper.step({"after": sound[-1:], "again": [1]})
    torch.testing.assert_close(rows["after"][others], alone, rtol=0, atol=1e-5)


def test_an_overflowing_key_raises_an_error_instead_of_changing_the_text(tmp_path: Path) -> None:
    """In float16 a projection may overflow even if its input does not."""
    config = tiny_config()
    weights = random_weights(config)
    d_model = config["d_model"]
    weights["transformer.blocks.0.attn.Wqkv.weight"][d_model : 2 * d_model] *= 1e38
    make_checkpoint(tmp_path, config, weights)
    with pytest.raises(FloatingPointError):
        Stepper(load(tmp_path)).step({"prompt": random_tokens(24)})


def test_bfloat16_is_close_to_float32(tmp_path: Path) -> None:
    """With its 8 bits of precision, two layers err by a few hundredths of the logits' spread, without drift."""
    make_checkpoint(tmp_path, tiny_config(STORYWRITER))
    tokens = random_tokens(64)
    sizes = [30] + [1] * 34
    exact = run_prompt(load(tmp_path), tokens, sizes)
    rounded = run_prompt(load(tmp_path, torch.bfloat16), tokens, sizes)
    error = (rounded - exact).std() / exact.std()
    assert error < 0.05

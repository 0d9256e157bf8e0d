"""The compiled kernels, for every instruction set of this machine."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

import pytest
import torch
import torch.nn.functional as F
from model.conftest import (
    KERNELS_BLOCK_SIZE,
    Stepper,
    load,
    make_checkpoint,
    random_tokens,
    random_weights,
    run_prompt,
    tiny_config,
)
from torch import Tensor

from mpt_grpc.engine.computation import choose_weight_format
from mpt_grpc.engine.load import load_engine
from mpt_grpc.errors import SettingsError
from mpt_grpc.model.attention import AttentionMetadata, MetadataBuilder
from mpt_grpc.model.attention.native_backend import NativeAttention
from mpt_grpc.model.config import MPTConfig
from mpt_grpc.model.kv_cache import KVCache
from mpt_grpc.model.linear import Linear, Norm, WeightFormat
from mpt_grpc.model.mpt import Attend, alibi_slopes
from mpt_grpc.model.native import (
    ACTIVATIONS,
    INSTRUCTION_SETS,
    Kernels,
    available_instruction_sets,
    load_kernels,
    supported_instruction_sets,
)
from mpt_grpc.model.sampler import Sampler
from mpt_grpc.request import SamplingParameters
from mpt_grpc.settings import CacheSettings, ModelSettings, Settings
from mpt_grpc.step import SamplingInputs, SequenceStep, StepPlan

CPU = torch.device("cpu")
ROWS = (1, 2, 3, 5, 7, 12, 13, 24, 97, 200)


@pytest.fixture(params=available_instruction_sets())
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Kernels:
    monkeypatch.setenv("MPT_GRPC_ISA", request.param)
    kernels = load_kernels()
    assert kernels is not None
    kernels.set_threads(2)
    return kernels


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def layer(
    weight: Tensor, kernels: Kernels, bias: Tensor | None = None, *, quantize: bool = False, **options: object
) -> Linear:
    linear = Linear(weight.shape[1], weight.shape[0], bias is not None, **options)  # type: ignore[arg-type]
    linear.weight = torch.nn.Parameter(weight, requires_grad=False)
    linear.bias = None if bias is None else torch.nn.Parameter(bias, requires_grad=False)
    linear.prepack(WeightFormat(weight.dtype, CPU, kernels, quantize))
    return linear


def test_this_machine_has_kernels() -> None:
    assert "portable" in available_instruction_sets()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("outputs", "inputs"), [(16, 4), (1, 8), (70, 132), (200, 2500)])
def test_products_are_those_of_float64(kernels: Kernels, dtype: torch.dtype, outputs: int, inputs: int) -> None:
    weight, bias, x, residual = (random(*s) for s in ((outputs, inputs), (outputs,), (13, inputs), (13, outputs)))
    weight = weight.to(dtype)
    linear, clipping = layer(weight, kernels, bias), layer(weight, kernels, bias, clip=0.5)
    y, clipped = linear(x), clipping(x, residual)
    if dtype == torch.bfloat16 and kernels.instruction_set in ("amx", "avx512_bf16"):
        x = x.to(dtype)  # as the processor multiplies it
    expected = x.double() @ weight.double().T + bias.double()
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-4)
    expected = expected.clamp(-0.5, 0.5) + residual
    torch.testing.assert_close(clipped.double(), expected, rtol=1e-5, atol=1e-4)


def test_8_bit_products_are_within_one_percent(kernels: Kernels) -> None:
    weight, x = random(96, 516), random(40, 516)
    weight[7] = 0
    x[3] *= 1e-20
    x[4] = 0
    expected = x @ weight.T
    error = layer(weight, kernels, quantize=True)(x) - expected
    assert (error.norm(dim=1) <= 0.015 * expected.norm(dim=1)).all()


@pytest.mark.parametrize(
    ("vendor", "best", "names"),
    [
        ("AuthenticAMD", "avx512_bf16", ["avx512_bf16", "avx512", "avx2", "portable"]),
        ("AuthenticAMD", "avx2", ["avx2", "portable"]),
        ("GenuineIntel", "amx", ["amx", "avx512", "avx512_bf16", "avx2", "portable"]),
        ("GenuineIntel", "avx512_bf16", ["avx512", "avx512_bf16", "avx2", "portable"]),
        ("GenuineIntel", "avx512", ["avx512", "avx2", "portable"]),
    ],
)
def test_pairs_of_bfloat16_are_multiplied_where_that_is_faster(vendor: str, best: str, names: list[str]) -> None:
    core = f"processor\t: 0\nvendor_id\t: {vendor}\nflags\t\t: fpu {' '.join(INSTRUCTION_SETS[best])}\n\n"
    assert supported_instruction_sets(core * 2) == names


def test_an_unknown_processor_has_portable_kernels() -> None:
    assert supported_instruction_sets("") == ["portable"]


@pytest.mark.skipif("amx" not in available_instruction_sets(), reason="the processor has no AMX")
def test_8_bit_products_have_the_same_bits_with_amx_as_with_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, bias, x = random(170, 2500), random(170), random(40, 2500)
    results = []
    for instruction_set in ("amx", "avx512_bf16"):
        monkeypatch.setenv("MPT_GRPC_ISA", instruction_set)
        kernels = load_kernels()
        assert kernels is not None
        results.append(layer(weight, kernels, bias, quantize=True)(x))
    assert torch.equal(*results)


@pytest.mark.parametrize("quantize", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_has_the_same_bits_in_any_crowd_and_with_any_number_of_threads(
    kernels: Kernels, dtype: torch.dtype, quantize: bool
) -> None:
    weight, x = random(170, 2056).to(dtype), random(max(ROWS), 2056)
    linear, norm = layer(weight, kernels, activation="gelu", quantize=quantize), Norm(2056, 1e-5, False, is_rms=False)
    norm.weight = torch.nn.Parameter(random(2056, seed=1))
    norm.prepack(WeightFormat(dtype, CPU, kernels))
    residual = random(max(ROWS), 170, seed=2)
    expected = torch.cat([linear(norm(x[i : i + 1]), residual[i : i + 1]) for i in range(max(ROWS))])
    for threads in (1, 2, 3):
        kernels.set_threads(threads)
        for rows in ROWS:
            assert torch.equal(linear(norm(x[-rows:]), residual[-rows:]), expected[-rows:]), (threads, rows)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_are_those_of_float64(kernels: Kernels, activation: str) -> None:
    x = torch.cat([torch.linspace(-12, 12, 4093), torch.tensor([-1e30, 0.0, 1e30])])
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "none": lambda x: x,
        "gelu": F.gelu,
        "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
        "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
        "relu": F.relu,
        "silu": F.silu,
    }
    inputs = torch.zeros(len(x), 4)
    inputs[:, 0] = x
    y = layer(torch.tensor([[1.0, 0, 0, 0]]), kernels, activation=activation)(inputs)[:, 0]
    torch.testing.assert_close(y.double(), functions[activation](x.double()), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    ("dtype", "quantize"), [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)]
)
def test_what_is_not_finite_reaches_its_own_row_only(
    kernels: Kernels, activation: str, dtype: torch.dtype, quantize: bool, value: float
) -> None:
    weight, x = random(32, 260).to(dtype), random(6, 260)
    linear = layer(weight, kernels, activation=activation, quantize=quantize)
    expected = linear(x)
    x[2, 200] = value
    y = linear(x)
    assert not y[2].isfinite().all()
    others = [0, 1, 3, 4, 5]
    assert torch.equal(y[others], expected[others])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_weight_that_is_not_finite_reaches_its_own_output_only_when_it_is_rounded(
    kernels: Kernels, value: float, dtype: torch.dtype
) -> None:
    weight, x = random(40, 260).to(dtype), random(3, 260)
    expected = layer(weight, kernels, quantize=True)(x)
    weight[17, 200] = value
    y = layer(weight, kernels, quantize=True)(x)
    assert not y[:, 17].isfinite().any()
    others = [output for output in range(40) if output != 17]
    assert torch.equal(y[:, others], expected[:, others])


@pytest.mark.parametrize("is_rms", [False, True])
@pytest.mark.parametrize("size", [4, 60, 1024])
def test_norms_are_those_of_float64(kernels: Kernels, size: int, is_rms: bool) -> None:
    norm, x = Norm(size, 1e-3, bias=True, is_rms=is_rms), random(50, size) * 3 + 1
    norm.weight = torch.nn.Parameter(random(size, seed=1))
    norm.bias = None if is_rms else torch.nn.Parameter(random(size, seed=2))
    expected = norm.to(torch.float64)(x.double())
    norm.to(torch.float32).prepack(WeightFormat(torch.float32, CPU, kernels))
    torch.testing.assert_close(norm(x).double(), expected, rtol=1e-5, atol=1e-5)


# Each two of a width, a kind of attention and a kind of numbers are tested together.
@pytest.mark.parametrize(
    ("d_model", "attention", "numbers"),
    [
        (width, kind, ((False, None), (True, None), (True, torch.int8))[(i + j) % 3])
        for i, width in enumerate((60, 80, 128, 384))
        for j, kind in enumerate(({}, {"sliding_window_size": 150}, {"attn_type": "multiquery_attention"}))
    ],
)
@pytest.mark.usefixtures("kernels")
def test_logits_have_the_same_bits_alone_in_a_crowd_and_in_chunks(
    tmp_path: Path, attention: dict[str, object], d_model: int, numbers: tuple[bool, torch.dtype | None]
) -> None:
    quantize, cache_dtype = numbers
    make_checkpoint(tmp_path, tiny_config(attention, d_model=d_model, max_seq_len=512))
    model, tokens = load(tmp_path, torch.bfloat16, quantize=quantize), random_tokens(300)
    alone = run_prompt(model, tokens, [1] * 300, cache_dtype=cache_dtype)
    assert torch.equal(run_prompt(model, tokens, [300], cache_dtype=cache_dtype)[0], alone[299])
    stepper, done = Stepper(model, cache_dtype=cache_dtype), 0
    for size, neighbours in ((1, 1), (5, 3), (130, 2), (3, 40), (1, 60), (160, 5)):
        chunks = {"a": tokens[done : done + size]} | {f"n{i}": random_tokens(i + 1) for i in range(neighbours)}
        done += size
        assert torch.equal(stepper.step(chunks)["a"], alone[done - 1]), done


@pytest.mark.parametrize(
    ("cache_dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 0.01), (torch.int8, 0.03)]
)
@pytest.mark.parametrize("attention", [{}, {"sliding_window_size": 150}, {"attn_type": "multiquery_attention"}])
@pytest.mark.parametrize("head_dim", [15, 20, 32, 80, 160])
def test_attention_is_that_of_float64(
    kernels: Kernels, head_dim: int, attention: dict[str, object], cache_dtype: torch.dtype, tolerance: float
) -> None:
    config = MPTConfig.from_dict(tiny_config({"alibi": True, **attention}, d_model=4 * head_dim, max_seq_len=512))
    builder, backend = MetadataBuilder(KERNELS_BLOCK_SIZE, CPU), NativeAttention(config, kernels)
    cache, blocks = KVCache(config, 24, KERNELS_BLOCK_SIZE, cache_dtype, CPU), tuple(range(23, -1, -1))
    query, (key, value) = random(350, 4, head_dim), random(2, 350, config.n_kv_heads, head_dim, seed=1)
    contexts, start = [], 0
    for count in (203, 1, 146):
        step = SequenceStep(0, "", (0,) * count, start, blocks, ())
        attend = backend.bind(cache, builder.build(StepPlan((step,))))
        contexts.append(attend(1, *(tensor[start : start + count] for tensor in (query, key, value))))
        start += count
    scores = torch.einsum("qhd,khd->hqk", query.double(), key.expand(-1, 4, -1).double()) * config.softmax_scale
    distance = torch.arange(350) - torch.arange(350)[:, None]
    scores += alibi_slopes(4, config.alibi_bias_max).double()[:, None, None] * distance
    oldest = -350 if config.sliding_window is None else -config.sliding_window
    scores.masked_fill_((distance > 0) | (distance < oldest), -torch.inf)
    expected = torch.einsum("hqk,khd->qhd", scores.softmax(-1), value.expand(-1, 4, -1).double())
    error = torch.cat(contexts).double() - expected
    assert (error.norm(dim=(1, 2)) <= tolerance * expected.norm(dim=(1, 2))).all()


@pytest.mark.parametrize("size", [1, 3, 16, 17, 50, 4096, 50277])
def test_the_highest_logit_is_the_first_of_its_row(kernels: Kernels, size: int) -> None:
    logits = random(64, size + 3).round(decimals=1)[:, :size]  # there are equals, and rows are not side by side
    assert logits.stride(0) == size + 3
    logits[0] = -torch.inf
    logits[1] = 0.0
    logits[1, size // 2] = -0.0
    for row, value in enumerate((torch.nan, torch.inf, -torch.inf), start=2):
        logits[row, -1] = value
    indices, are_finite = kernels.argmax(logits)
    assert torch.equal(are_finite, logits.isfinite().all(dim=1))
    numbers = ~logits.isnan().any(dim=1)
    # NumPy's is the first, too.
    assert torch.equal(indices[numbers], torch.from_numpy(logits.numpy().argmax(axis=1))[numbers])
    assert 0 <= indices.min() <= indices.max() < size


def random_draws(count: int, vocab_size: int) -> list[SequenceStep]:
    """Returns steps with sampling options of all kinds, of which every fourth is greedy."""
    rng, steps = Random(vocab_size), []
    for row in range(count):
        options = SamplingParameters(
            temperature=rng.choice([0.7, 1.0, 1.5, 1e-30, 100.0]) if row % 4 else 0,
            top_k=rng.choice([0, 0, 1, 6, 50, vocab_size]),
            top_p=rng.choice([1.0, 1.0, 0.9, 0.999, 0.1, 0.0]),
            min_p=rng.choice([0.0, 0.0, 0.01, 1.0]),
            typical_p=rng.choice([1.0, 1.0, 1.0, 0.7]),
            seed=rng.getrandbits(64),
        )
        steps.append(SequenceStep(row, "", (1,), 8, (1,), (SamplingInputs(options),), rng.randrange(1 << 40)))
    return steps


@pytest.mark.parametrize("size", [1, 7, 50, 300, 4096, 50277])
def test_tokens_are_drawn_as_by_pytorch(kernels: Kernels, size: int) -> None:
    usual = [random(60, size), 3 * random(60, size).round(decimals=1), 10 * random(60, size)]
    odd = [torch.zeros(60, size), 3e38 * random(60, size).clamp(-1, 1)]
    logits = torch.cat([*usual, *odd])
    logits[1::3] = logits[1::3].masked_fill(random(100, size) > 0.5, -1e30)
    padded = F.pad(logits, (0, 5), value=torch.nan)
    steps = random_draws(len(logits), size)
    drawn, expected = (Sampler(size, one).sample(padded, steps) for one in (kernels, None))
    assert drawn.token_ids == expected.token_ids
    assert len(drawn.token_ids) == len(logits)


def test_threads_draw_at_once_from_vocabularies_of_several_sizes(kernels: Kernels) -> None:
    def draw(number: int) -> bool:
        logits, steps = 3 * random(8, 40 + number), random_draws(8, 40 + number)
        drawn, expected = (Sampler(40 + number, one).sample(logits, steps) for one in (kernels, None))
        return drawn.token_ids == expected.token_ids

    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(draw, range(200)))


class LayerByLayer:
    """The attention of the kernels, one layer at a time, so that the model's modules call each kernel."""

    def __init__(self, config: MPTConfig, kernels: Kernels) -> None:
        self._native = NativeAttention(config, kernels)

    def bind(self, cache: KVCache, metadata: AttentionMetadata) -> Attend:
        attend = self._native.bind(cache, metadata)
        return lambda layer, query, key, value: attend(layer, query, key, value)


@pytest.mark.parametrize("quantize", [False, True])
@pytest.mark.parametrize(
    ("attention", "fields"),
    [
        ({}, {}),
        ({"qk_ln": True, "clip_qkv": 0.5}, {"no_bias": False}),
        ({"attn_type": "grouped_query_attention", "kv_n_heads": 2}, {"ffn_config": {"ffn_type": "mptglu"}}),
    ],
)
def test_all_layers_in_one_call_give_the_bits_of_the_modules(
    tmp_path: Path, kernels: Kernels, attention: dict[str, object], fields: dict[str, object], quantize: bool
) -> None:
    make_checkpoint(tmp_path, tiny_config(attention, max_seq_len=512, **fields))
    model = load(tmp_path, torch.bfloat16, quantize=quantize)
    together, one_by_one = Stepper(model), Stepper(model, attention=LayerByLayer(model.config, kernels))
    for chunks in ({"a": random_tokens(200)}, {"a": random_tokens(1), "b": random_tokens(17)}):
        results = together.step(chunks), one_by_one.step(chunks)
        assert all(torch.equal(results[0][name], results[1][name]) for name in chunks)


@pytest.mark.usefixtures("kernels")
def test_a_cache_of_8_bits_is_within_three_percent(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, tiny_config(d_model=128, max_seq_len=512))
    model, tokens = load(tmp_path), random_tokens(200)
    expected = run_prompt(model, tokens, [1] * 200)
    error = run_prompt(model, tokens, [1] * 200, cache_dtype=torch.int8) - expected
    assert 0 < error.norm() <= 0.03 * expected.norm()


def test_a_cache_of_8_bits_holds_almost_twice_the_tokens() -> None:
    model, size = ModelSettings(device="cpu"), 4 << 20
    tokens = []
    for dtype in ("auto", "int8"):
        engine, loaded = load_engine(Settings(model, CacheSettings(dtype, size)))  # type: ignore[arg-type]
        engine.close()
        tokens.append(loaded.cache_tokens)
        assert size - size // 100 <= loaded.cache_bytes <= size
    assert 1.85 < tokens[1] / tokens[0] <= 2


def test_an_instruction_set_that_is_missing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPT_GRPC_ISA", "none")
    assert load_kernels() is None
    monkeypatch.setenv("MPT_GRPC_ISA", "avx9")
    with pytest.raises(SettingsError, match=r"MPT_GRPC_ISA: 'avx9' is not available here; use one of .*portable, none"):
        load_kernels()


def test_the_best_available_instruction_set_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MPT_GRPC_ISA", raising=False)
    kernels = load_kernels()
    assert kernels is not None
    assert kernels.instruction_set == available_instruction_sets()[0]


def test_a_server_without_kernels_says_how_to_get_them(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MPT_GRPC_ISA", "none")
    with pytest.raises(SettingsError, match="--quantize: int8 needs the compiled kernels"):
        load_engine(Settings(model=ModelSettings(device="cpu", quantize="int8")))
    with pytest.raises(SettingsError, match=r"--batch-invariant: needs .*, a type other than float16"):
        load_engine(Settings(model=ModelSettings(device="cpu", dtype="float16", batch_invariant=True)))
    with pytest.raises(SettingsError, match="--kv-cache-dtype: int8 needs the compiled kernels"):
        load_engine(Settings(model=ModelSettings(device="cpu"), cache=CacheSettings(kv_cache_dtype="int8")))
    warning, _ = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert "to compile them, install a C++ compiler, such as g++, and install mpt-grpc again" in warning


def test_a_server_whose_model_does_not_suit_the_kernels_says_so(caplog: pytest.LogCaptureFixture) -> None:
    config = MPTConfig.from_dict(tiny_config(d_model=62, n_heads=2))
    assert choose_weight_format(ModelSettings(device="cpu"), config).kernels is None
    assert "the compiled kernels need widths divisible by 4" in caplog.text


@pytest.mark.usefixtures("kernels")
def test_queries_that_are_not_finite_end_the_request(tmp_path: Path) -> None:
    """Its keys and values are finite, so that only the softmax can show it."""
    config = tiny_config()
    weights = random_weights(config)
    weights["transformer.blocks.1.attn.Wqkv.weight"][0] = torch.nan
    make_checkpoint(tmp_path, config, weights)
    with pytest.raises(FloatingPointError, match="the model's activations are not finite"):
        run_prompt(load(tmp_path), random_tokens(5), [5])

"""What a step queues on a GPU, counted without one: on PyTorch's meta device, which computes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from model.conftest import tiny_config
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from mpt_grpc.model.attention import AttentionBackend, MetadataBuilder
from mpt_grpc.model.attention.torch_backend import TorchAttention
from mpt_grpc.model.config import MPTConfig
from mpt_grpc.model.kv_cache import KVCache
from mpt_grpc.model.linear import Linear, WeightFormat
from mpt_grpc.model.mpt import MPT
from mpt_grpc.model.runner import Runner
from mpt_grpc.model.sampler import Sampler
from mpt_grpc.request import DecodingOptions, SamplingParameters
from mpt_grpc.step import SamplingInputs, SequenceStep, StepPlan

pytest.importorskip("triton", reason="needs Triton, which is built for Linux")

from mpt_grpc.model.attention.triton_backend import TritonAttention

DEVICE, BLOCK_SIZE, VOCAB_SIZE = torch.device("meta"), 16, 96
MAX_CALLS_A_LAYER, MAX_CALLS_A_STEP = 20, 50
"""The calls of each layer, and the others; a layer of MPT-7B makes 15."""
MAX_CALLS_FOR_PENDING = 6
LONG = [(2000 + 16 * i, 1) for i in range(64)]
"""Context and new tokens of each sequence."""
SAMPLED = SamplingParameters(temperature=0.8, top_k=40, top_p=0.9, min_p=0.01, typical_p=0.95, seed=1)
ADJUSTED = SamplingInputs(
    SAMPLED,
    DecodingOptions(repetition_penalty=1.2, frequency_penalty=0.5, presence_penalty=0.5, logit_bias={3: 1.0}),
    prompt_token_ids=(1, 2),
    output_token_ids=(3, 4),
    forbidden_token_ids=(5, 6),
)
DATA_DEPENDENT = {
    f"aten::{name}"
    for name in ("_local_scalar_dense", "item", "equal", "is_nonzero", "nonzero", "masked_select", "_unique2")
}
"""Calls for whose result the host waits, or on whose values a shape depends."""


class Calls(TorchDispatchMode):
    """The names of the operators that were called, and how many of them took tensors of the host to the device."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.num_transfers = 0
        self.waiting: list[str] = []
        """The transfers for which the host waits on a GPU until all queued work is done."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, options = func._schema.name, kwargs or {}
        self.names.append(name)
        devices = {argument.device for argument in args if isinstance(argument, Tensor)}
        is_copy = name in {"aten::to", "aten::_to_copy"} and DEVICE in (*args, *options.values())
        is_transfer = torch.device("cpu") in devices and (is_copy or len(devices) > 1)
        self.num_transfers += is_transfer
        # torch.tensor copies lists, and an assignment to elements copies the number, in a way that no mode sees.
        is_list = name == "aten::lift_fresh" and DEVICE in devices
        is_number = name == "aten::index_put_" and args[2].ndim == 0
        if is_list or is_number or (is_transfer and not options.get("non_blocking")):
            self.waiting.append(name)
        return func(*args, **options)


def make_plan(spans: Sequence[tuple[int, int]], parameters: SamplingParameters) -> StepPlan:
    steps, num_blocks = [], 0
    for index, (start, count) in enumerate(spans):
        needed = -(-(start + count) // BLOCK_SIZE)
        table = tuple(range(num_blocks, num_blocks + needed))
        num_blocks += needed
        inputs = (SamplingInputs(parameters),)
        steps.append(SequenceStep(index, str(index), (1,) * count, start, table, inputs))
    return StepPlan(tuple(steps))


def make_runner(attention: type[TritonAttention] | type[TorchAttention], n_layers: int, **fields: Any) -> Runner:
    config = MPTConfig.from_dict(tiny_config(fields.pop("attn_config", None), n_layers=n_layers, **fields))
    with DEVICE:
        model = MPT(config).to(torch.float16)
    for module in model.modules():
        if isinstance(module, Linear):
            module.prepack(WeightFormat(torch.float16, torch.device("cuda")))
    cache = KVCache(config, 16_384, BLOCK_SIZE, torch.float16, DEVICE)
    backend: AttentionBackend = attention(config, DEVICE)
    return Runner(model, cache, backend, DEVICE, VOCAB_SIZE)


def calls_of_a_step(
    runner: Runner, plan: StepPlan, sampler: Sampler | None = None, pending: Tensor | None = None
) -> Calls:
    """Returns the calls of the model and the sampler up to the first result that the host reads, which are the tokens.

    After them it only reads log probabilities, if they are requested. `pending` are tokens of the step before.
    """
    calls, sampler = Calls(), sampler or Sampler(VOCAB_SIZE)
    with calls:
        output = runner.run(plan, pending)
        chosen = sampler.choose(output.logits, plan.sequences, are_finite=output.are_finite)
    with calls, pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
        chosen.result()
    return calls


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({}, id="mpt-7b"),
        pytest.param({"no_bias": False, "attn_config": {"clip_qkv": 6, "qk_ln": True}}, id="biases-clip-qk_ln"),
    ],
)
def test_a_decoding_step_makes_few_calls_however_many_sequences_there_are(fields: dict[str, Any]) -> None:
    def count(n_layers: int, spans: Sequence[tuple[int, int]]) -> int:
        runner = make_runner(TritonAttention, n_layers, **fields)
        return len(calls_of_a_step(runner, make_plan(spans, SamplingParameters(temperature=0, seed=0))).names)

    few, many = count(2, LONG), count(6, LONG)
    a_layer = (many - few) / 4
    assert a_layer <= MAX_CALLS_A_LAYER
    assert few - 2 * a_layer <= MAX_CALLS_A_STEP
    assert count(2, LONG[:1]) == few


@pytest.mark.parametrize("parameters", [SamplingParameters(temperature=0, seed=0), SAMPLED], ids=["greedy", "sampled"])
def test_a_decoding_step_is_read_back_once(parameters: SamplingParameters) -> None:
    calls = calls_of_a_step(make_runner(TritonAttention, 2), make_plan(LONG, parameters))
    assert not DATA_DEPENDENT & set(calls.names)


def test_a_decoding_step_takes_one_transfer_and_one_more_for_random_numbers() -> None:
    runner = make_runner(TritonAttention, 2)
    sampler = Sampler(VOCAB_SIZE)
    for parameters, num_transfers in (
        (SamplingParameters(temperature=0, seed=0), 1),
        (SamplingParameters(temperature=1, seed=0), 2),
    ):
        plan = make_plan(LONG, parameters)
        calls_of_a_step(runner, plan, sampler)  # what stays the same from step to step
        assert calls_of_a_step(runner, plan, sampler).num_transfers == num_transfers


def test_pending_tokens_stay_on_the_device() -> None:
    runner, sampler = make_runner(TritonAttention, 2), Sampler(VOCAB_SIZE)
    plan = make_plan(LONG, SamplingParameters(temperature=0, seed=0))
    known = calls_of_a_step(runner, plan, sampler)
    steps = tuple(step._replace(token_ids=(~row,)) for row, step in enumerate(plan.sequences))
    chosen = torch.empty(len(steps), dtype=torch.int64, device=DEVICE)
    calls = calls_of_a_step(runner, StepPlan(steps), sampler, chosen)
    assert not DATA_DEPENDENT & set(calls.names)
    assert calls.num_transfers == known.num_transfers
    assert len(calls.names) <= len(known.names) + MAX_CALLS_FOR_PENDING


def test_the_model_takes_nothing_from_the_host() -> None:
    """So that it can be recorded as a CUDA graph."""
    runner = make_runner(TritonAttention, 2)
    metadata = MetadataBuilder(BLOCK_SIZE, DEVICE).build(make_plan(LONG, SAMPLED))
    with torch.inference_mode(), Calls() as calls:
        runner.compute(metadata)
    assert len(calls.names) > 2 * 10
    assert calls.num_transfers == 0


def test_a_step_with_chunks_is_read_back_once() -> None:
    calls = calls_of_a_step(make_runner(TritonAttention, 2), make_plan([*LONG[:4], (100, 300)], SAMPLED))
    assert not DATA_DEPENDENT & set(calls.names)


@pytest.mark.parametrize("attention", [TritonAttention, TorchAttention])
@pytest.mark.parametrize("inputs", [SamplingInputs(SAMPLED), ADJUSTED], ids=["sampled", "adjusted"])
def test_the_host_waits_for_no_transfer_to_the_device(
    attention: type[TritonAttention] | type[TorchAttention], inputs: SamplingInputs
) -> None:
    steps = make_plan([*LONG[:4], (100, 300), (0, 20)], SAMPLED).sequences
    plan = StepPlan(tuple(step._replace(choices=(inputs,)) for step in steps))
    calls = calls_of_a_step(make_runner(attention, 2), plan)
    assert calls.num_transfers > 1
    assert calls.waiting == []


def test_the_torch_backend_makes_many_more_calls() -> None:
    """So that the counts above mean something."""
    plan = make_plan(LONG, SamplingParameters(temperature=0, seed=0))
    counts = [len(calls_of_a_step(make_runner(kind, 2), plan).names) for kind in (TorchAttention, TritonAttention)]
    assert counts[0] > counts[1] + 2 * MAX_CALLS_A_LAYER


@torch.no_grad()
def test_a_decoding_step_is_traced_as_one_graph() -> None:
    """No operation depends on values, so the same graph serves every step of as many sequences."""
    runner = make_runner(TritonAttention, 2)
    metadata = MetadataBuilder(BLOCK_SIZE, DEVICE).build(make_plan(LONG, SAMPLED))

    def step(token_ids: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
        return runner.compute(replace(metadata, token_ids=token_ids, positions=positions))

    trace = make_fx(step, tracing_mode="fake", _allow_non_fake_inputs=True)
    targets = [node.target for node in trace(metadata.token_ids, metadata.positions).graph.nodes]
    assert targets.count(torch.ops.mpt_grpc.paged_attention.default) == 2


@pytest.mark.parametrize("bias", [False, True])
def test_a_residual_is_added_within_the_product(bias: bool) -> None:
    """The matrix is told that it is on a GPU."""
    linear = Linear(8, 6, bias)
    torch.nn.init.normal_(linear.weight)
    if linear.bias is not None:
        torch.nn.init.normal_(linear.bias)
    x, residual = torch.randn(5, 8), torch.randn(5, 6)
    with torch.inference_mode():
        expected = linear(x, residual.clone())
        linear.prepack(WeightFormat(torch.float32, torch.device("cuda")))
        with Calls() as calls:
            actual = linear(x, residual)
    torch.testing.assert_close(actual, expected)
    assert ("aten::add" in calls.names) == bias

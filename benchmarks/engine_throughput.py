"""Measures the engine's throughput and latency at several batch sizes, and optionally those of a peer.

    python benchmarks/engine_throughput.py --sequences 1 8 32 --peer transformers
    python benchmarks/engine_throughput.py --model FOLDER --load-format random --sequences 1 16 64

Every sequence has its own random prompt and the same number of new tokens. A decoding step cannot be faster than one
read of all weights: this limit is measured in the same run, by summing a gibibyte.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from typing import Any

import torch

from mpt_grpc import __version__
from mpt_grpc.checkpoint import find_checkpoint
from mpt_grpc.commands.units import num_bytes
from mpt_grpc.engine.engine import Engine
from mpt_grpc.engine.load import LoadedModel, load_engine
from mpt_grpc.engine.stream import ThreadStream, collect
from mpt_grpc.request import CacheOptions, GenerationRequest, SamplingParameters, StoppingCriteria
from mpt_grpc.results import Generation
from mpt_grpc.settings import CacheSettings, ModelSettings, Settings

PROMPT_TOKENS = 64


def main() -> None:
    arguments = _arguments()
    settings = Settings(
        model=ModelSettings(
            model=arguments.model, dtype=arguments.dtype, quantize=arguments.quantize, load_format=arguments.load_format
        ),
        cache=CacheSettings(kv_cache_bytes=arguments.kv_cache),
    )
    engine, model = load_engine(settings)
    # In a separate thread, because of OpenMP's workers: see engine/load.py.
    with ThreadPoolExecutor(max_workers=1) as thread:
        limit_s = model.weight_bytes / thread.submit(read_bandwidth, torch.device(model.device)).result()
    processor = torch.cuda.get_device_name() if model.device == "cuda" else f"{os.cpu_count()} CPU cores"
    print(
        f"{date.today()}, {model.name}, {model.num_parameters / 1e6:,.0f} M parameters in {model.dtype} on {processor},"
        f" mpt-grpc {__version__}, torch {torch.__version__}, Python {platform.python_version()};"
        f" prompts of {PROMPT_TOKENS}, {arguments.new_tokens} new tokens each\n"
    )
    print("| sequences | new tokens/s | TTFT ms, median | TPOT ms, median | reading the weights once, ms |")
    print("|---|---|---|---|---|")
    with engine:
        _run(engine, max(arguments.sequences), 4)
        for n in arguments.sequences:
            elapsed_s, outputs = _run(engine, n, arguments.new_tokens)
            print(
                f"| {n} | {n * arguments.new_tokens / elapsed_s:,.1f} | {_median_ms(outputs, _ttft_s):,.1f}"
                f" | {_median_ms(outputs, _tpot_s):,.1f} | {limit_s * 1e3:,.2f} |",
                flush=True,
            )
    if arguments.peer:
        _run_transformers(arguments, model)


def _run(engine: Engine, n: int, new_tokens: int) -> tuple[float, list[Generation]]:
    generator = torch.Generator().manual_seed(n)
    prompts = torch.randint(1, engine.preparation.limits.vocab_size, (n, PROMPT_TOKENS), generator=generator).tolist()
    requests = [
        GenerationRequest(
            f"{index}",
            tuple(prompt),
            SamplingParameters(temperature=0),
            stopping=StoppingCriteria(max_new_tokens=new_tokens, ignore_eos=True),
            cache=CacheOptions(bypass=True),
        )
        for index, prompt in enumerate(prompts)
    ]
    start_s = time.perf_counter()
    streams = [engine.submit(engine.preparation.prepare(request), ThreadStream) for request in requests]
    outputs = [collect(stream) for stream in streams]
    return time.perf_counter() - start_s, outputs


def _run_transformers(arguments: argparse.Namespace, model: LoadedModel) -> None:
    """Measures transformers' `generate` on one batch, with the same checkpoint, dtype and number of threads."""
    import transformers

    folder = find_checkpoint(arguments.model).folder
    dtype = getattr(torch, model.dtype)
    peer: Any = transformers.MptForCausalLM.from_pretrained(folder, dtype=dtype)
    peer.to(model.device).eval()
    print(f"\ntransformers {transformers.__version__}, `generate`, the same prompts in one batch\n")
    print("| sequences | new tokens/s |")
    print("|---|---|")
    for n in arguments.sequences:
        generator = torch.Generator().manual_seed(n)
        prompts = torch.randint(1, peer.config.vocab_size, (n, PROMPT_TOKENS), generator=generator).to(model.device)
        length = {"min_new_tokens": arguments.new_tokens, "max_new_tokens": arguments.new_tokens}
        options = {"attention_mask": torch.ones_like(prompts), "do_sample": False, "pad_token_id": 0, **length}
        peer.generate(prompts, **{**options, "min_new_tokens": 4, "max_new_tokens": 4})
        start_s = time.perf_counter()
        peer.generate(prompts, **options)
        print(f"| {n} | {n * arguments.new_tokens / (time.perf_counter() - start_s):,.1f} |", flush=True)


def read_bandwidth(device: torch.device) -> float:
    """Returns the device's read bandwidth in bytes per second: the best of five sums over a gibibyte."""
    data = torch.ones(1 << 28, dtype=torch.float32, device=device)
    best_s = float("inf")
    for _ in range(5):
        start_s = time.perf_counter()
        data.sum().item()
        best_s = min(best_s, time.perf_counter() - start_s)
    return data.nbytes / best_s


def _ttft_s(output: Generation) -> float:
    assert output.stats.first_token_time_s is not None
    return output.stats.first_token_time_s - output.stats.arrival_time_s


def _tpot_s(output: Generation) -> float:
    assert output.stats.first_token_time_s is not None
    return (output.stats.end_time_s - output.stats.first_token_time_s) / (len(output.token_ids) - 1)


def _median_ms(outputs: list[Generation], measure: Callable[[Generation], float]) -> float:
    return statistics.median(measure(output) for output in outputs) * 1e3


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--load-format", choices=("auto", "random"), default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--kv-cache", type=num_bytes, help="the size of the KV cache, such as 1GiB")
    parser.add_argument("--quantize", choices=("none", "int8"), default="none")
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--peer", choices=("transformers",), help="also measure this peer on the same checkpoint")
    return parser.parse_args()


if __name__ == "__main__":
    main()

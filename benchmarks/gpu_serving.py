"""Measures MPT-7B with random weights as served on the card of this machine, beside transformers, in minutes.

python -m benchmarks.gpu_serving [--output build/bench/gpu_serving.json] [--minutes 5]

Three loads: one prompt of 512 tokens and 64 new tokens; 64 of them at once; and 256 requests of mixed lengths, which
transformers computes in static batches of 32, as many as there is time for. The first two are measured in the engine's
own process as well, since what the service adds is the difference. Each row is written to the file as it comes.
`--device cpu` tries the program with a tiny model.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import shutil
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from time import perf_counter
from typing import Any

import torch

import mpt_grpc
from benchmarks.gpu_plan import MPT_7B
from benchmarks.peers.drivers.ours import served
from mpt_grpc.engine.engine import Engine
from mpt_grpc.engine.load import load_engine
from mpt_grpc.engine.stream import ThreadStream, collect
from mpt_grpc.request import CacheOptions, GenerationRequest, SamplingParameters, StoppingCriteria
from mpt_grpc.settings import ModelSettings, SchedulerSettings, Settings
from mpt_grpc_client import AsyncClient

_DEMO = Path(mpt_grpc.__file__).parent / "demo"
_TINY = {**MPT_7B, "d_model": 64, "n_heads": 4, "n_layers": 2, "vocab_size": 4096, "max_seq_len": 256}
_MAX_RUNNING = 64
_STATIC_BATCH = 32
_NUM_TOKEN_IDS = 4000
"""The prompts' token IDs are below it; the built-in tokenizer, which stands in for the model's, has 4,096."""

Load = Sequence[tuple[int, int]]
"""The number of prompt and output tokens of each request, all of which start at once."""


@dataclass(frozen=True)
class Measured:
    """A load's results."""

    output_tokens_per_s: float
    """The rate of all requests together, from the start to the last token."""
    ttft_ms: float
    """The median time to the first token."""

    @classmethod
    def of(cls, load: Load, first_s: Sequence[float], elapsed_s: float) -> Measured:
        return cls(sum(output for _, output in load) / elapsed_s, 1000 * statistics.median(first_s))


def make_model(folder: Path, config: dict[str, Any]) -> None:
    """Writes a configuration, and the built-in model's tokenizer."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(_DEMO / name, folder)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def prompts_of(load: Load) -> list[list[int]]:
    random = Random()  # not from a seed: a second run must not find its prompts in the prefix cache
    return [random.choices(range(1, _NUM_TOKEN_IDS), k=num_tokens) for num_tokens, _ in load]


def in_process(folder: Path, device: str, loads: Mapping[str, Load]) -> Iterator[tuple[str, Measured]]:
    """Measures loads in the engine without the service."""
    gc.collect()  # what is left of other models
    settings = Settings(
        model=ModelSettings(model=str(folder), load_format="random", device="cuda" if device == "cuda" else "cpu"),
        scheduler=SchedulerSettings(max_running_requests=_MAX_RUNNING),
    )
    engine, _ = load_engine(settings)
    with engine:
        for name, load in loads.items():
            yield name, [_computed(engine, load) for _ in range(2)][1]  # the first time does not count


def _computed(engine: Engine, load: Load) -> Measured:
    requests = [
        GenerationRequest(
            f"{number}",
            tuple(prompt),
            SamplingParameters(temperature=0),
            stopping=StoppingCriteria(max_new_tokens=num_output, ignore_eos=True),
            cache=CacheOptions(bypass=True),
        )
        for number, (prompt, (_, num_output)) in enumerate(zip(prompts_of(load), load, strict=True))
    ]
    start_s = perf_counter()
    streams = [engine.submit(engine.preparation.prepare(request), ThreadStream) for request in requests]
    stats = [collect(stream).stats for stream in streams]
    elapsed_s = perf_counter() - start_s
    first_s = [(one.first_token_time_s or 0) - one.arrival_time_s for one in stats]
    return Measured.of(load, first_s, elapsed_s)


async def over_grpc(target: str, load: Load) -> Measured:
    """Measures streams of one client in this process."""
    async with AsyncClient(target) as client:

        async def read(prompt: list[int], num_output: int) -> float:
            start_s, first_s = perf_counter(), 0.0
            async with client.stream(prompt, temperature=0, max_new_tokens=num_output, ignore_eos=True) as stream:
                async for delta in stream.deltas():
                    if delta.num_tokens and not first_s:
                        first_s = perf_counter() - start_s
            return first_s

        for _ in range(2):  # the first time does not count
            prompts, start_s = prompts_of(load), perf_counter()
            reading = (read(prompt, num_output) for prompt, (_, num_output) in zip(prompts, load, strict=True))
            first_s = await asyncio.gather(*reading)
            elapsed_s = perf_counter() - start_s
    return Measured.of(load, first_s, elapsed_s)


class Transformers:
    """`generate` of transformers with random weights, in batches that start and end together."""

    def __init__(self, folder: Path, device: str) -> None:
        import transformers

        self.version, self._device = transformers.__version__, device
        config = transformers.AutoConfig.from_pretrained(folder)
        dtype = torch.float16 if device == "cuda" else torch.float32
        with torch.device(device):
            self._model: Any = transformers.MptForCausalLM._from_config(config, dtype=dtype).eval()

    @torch.inference_mode()
    def run(self, load: Load, batch: int, end_s: float = float("inf")) -> float:
        """Returns the output tokens per second that were asked for; what a batch computes beyond them is lost.

        No batch starts after `end_s`, except the first.
        """
        prompts, num_tokens = prompts_of(load), 0
        start_s = perf_counter()
        for first in range(0, len(load), batch):
            if first and perf_counter() > end_s:
                break
            part, lengths = prompts[first : first + batch], load[first : first + batch]
            longest, num_output = max(map(len, part)), max(output for _, output in lengths)
            # Padded on the left, as for any model that decodes.
            tokens = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in part], device=self._device)
            self._model.generate(
                tokens,
                attention_mask=(tokens != 0).long(),
                do_sample=False,
                min_new_tokens=num_output,
                max_new_tokens=num_output,
                pad_token_id=0,
            )
            num_tokens += sum(output for _, output in lengths)
        if self._device == "cuda":
            torch.cuda.synchronize()
        return num_tokens / (perf_counter() - start_s)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("build/bench/gpu_serving.json"))
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parsed = parser.parse_args(arguments)
    end_s = perf_counter() + 60 * parsed.minutes
    is_gpu = parsed.device == "cuda"
    num_prompt, num_output, num_mixed = (512, 64, 256) if is_gpu else (32, 4, 8)
    random = Random(0)
    loads: dict[str, Load] = {
        "alone": [(num_prompt, num_output)],
        "64 at once": [(num_prompt, num_output)] * 64,
        "mixed lengths": [
            (random.randint(num_prompt // 16, 2 * num_prompt), random.randint(num_output // 4, 8 * num_output))
            for _ in range(num_mixed)
        ],
    }
    report: dict[str, Any] = {
        "mpt-grpc": mpt_grpc.__version__,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if is_gpu else "cpu",
    }
    parsed.output.parent.mkdir(parents=True, exist_ok=True)

    def note(what: str, name: str, value: object) -> None:
        report.setdefault(what, {})[name] = value
        print(what, name, json.dumps(value), flush=True)
        parsed.output.write_text(json.dumps(report, indent=1), encoding="utf-8")

    def serve(folder: Path) -> None:
        flags = ["--model", str(folder), "--load-format", "random", "--device", parsed.device]
        start_s = perf_counter()
        with served(*flags, "--max-running-requests", str(_MAX_RUNNING)) as target:
            note("start", "served_s", perf_counter() - start_s)
            for load_name, load in loads.items():
                note("served", load_name, vars(asyncio.run(over_grpc(target, load))))

    def compute(folder: Path) -> None:
        without_mixed = {load_name: loads[load_name] for load_name in ("alone", "64 at once")}
        for load_name, measured in in_process(folder, parsed.device, without_mixed):
            note("in process", load_name, vars(measured))

    def generate(folder: Path) -> None:
        peer = Transformers(folder, parsed.device)
        note("transformers", "version", peer.version)
        peer.run(loads["alone"], 1)  # does not count
        for load_name, batch in (("alone", 1), ("64 at once", 64), ("mixed lengths", _STATIC_BATCH)):
            note("transformers", load_name, peer.run(loads[load_name], batch, end_s))

    with tempfile.TemporaryDirectory() as name:
        make_model(Path(name), MPT_7B if is_gpu else _TINY)
        for part in (serve, generate, compute):
            if perf_counter() > end_s:
                note("left out", part.__name__, "no time was left")
                continue
            try:
                part(Path(name))
            except (Exception, SystemExit) as error:  # the other parts are still worth running
                note("failed", part.__name__, repr(error))


if __name__ == "__main__":
    main()

"""OpenVINO GenAI: its pipeline with continuous batching, and the export of optimum-intel."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter

import numpy
import openvino
import openvino_genai

from benchmarks.peers.drivers import ladder
from benchmarks.peers.drivers.ladder import Generate, Generation, Prompts

_STEP_TOKENS = 512
"""The most tokens that it computes in one step, as many as this project's server does by default."""
_CACHE_GIB = 4


def convert(checkpoint: Path, folder: Path, bits: int) -> None:
    # optimum-intel installs it for other models, and some of its builds cannot be imported beside PyTorch for CPUs.
    sys.modules["torchvision"] = None  # type: ignore[assignment]
    from openvino_tokenizers import convert_tokenizer
    from optimum.intel import OVModelForCausalLM
    from transformers import AutoTokenizer

    model = OVModelForCausalLM.from_pretrained(checkpoint, export=True, compile=False, load_in_8bit=bits == 8)
    model.save_pretrained(folder)
    tokenizer = convert_tokenizer(AutoTokenizer.from_pretrained(checkpoint))
    openvino.save_model(tokenizer, folder / "openvino_tokenizer.xml")


@contextmanager
def open_model(folder: Path, _bits: int, threads: int) -> Iterator[Generate]:
    scheduler = openvino_genai.SchedulerConfig()
    scheduler.max_num_batched_tokens = _STEP_TOKENS
    scheduler.cache_size = _CACHE_GIB
    pipeline = openvino_genai.ContinuousBatchingPipeline(folder, scheduler, "CPU", {"INFERENCE_NUM_THREADS": threads})

    def generate(prompts: Prompts, new_tokens: int) -> Generation:
        config = openvino_genai.GenerationConfig(max_new_tokens=new_tokens, ignore_eos=True, do_sample=False)
        inputs = [openvino.Tensor(numpy.array([prompt], numpy.int64)) for prompt in prompts]
        times_s: list[list[float]] = [[] for _ in prompts]
        start_s = perf_counter()
        handles = [pipeline.add_request(number, ids, config) for number, ids in enumerate(inputs)]
        while pipeline.has_non_finished_requests():
            pipeline.step()
            now_s = perf_counter()
            for handle, times in zip(handles, times_s, strict=True):
                if handle.can_read():
                    times += [now_s] * sum(len(output.generated_ids) for output in handle.read().values())
        return Generation(start_s, times_s)

    yield generate


if __name__ == "__main__":
    ladder.run("openvino-genai", open_model, convert)

"""CTranslate2: `Generator.generate_batch` on one batch, with weights of 8 bits, its only integer type for CPUs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any

import ctranslate2
import numpy
from ctranslate2.specs import common_spec, transformer_spec

from benchmarks.peers.checkpoint import Weights, as_float32, read_config, read_weights
from benchmarks.peers.drivers import ladder
from benchmarks.peers.drivers.ladder import Generate, Generation, Prompts


def convert(checkpoint: Path, folder: Path, bits: int) -> None:
    """Does from the weights what CTranslate2's converter does, which only knows the code of the published models."""
    assert bits == 8
    config = read_config(checkpoint)
    spec = transformer_spec.TransformerDecoderModelSpec.from_config(
        config["n_layers"], config["n_heads"], activation=common_spec.Activation.GELU, alibi=True
    )
    weights = {name.removeprefix("transformer."): as_float32(half) for name, half in read_weights(checkpoint)}
    decoder = spec.decoder
    decoder.scale_embeddings = False
    decoder.embeddings.weight = decoder.projection.weight = weights["wte.weight"]
    _set_norm(decoder.layer_norm, weights["norm_f.weight"])
    for number, layer in enumerate(decoder.layer):
        block = f"blocks.{number}"
        _set_norm(layer.self_attention.layer_norm, weights[f"{block}.norm_1.weight"])
        layer.self_attention.linear[0].weight = weights[f"{block}.attn.Wqkv.weight"]
        layer.self_attention.linear[1].weight = weights[f"{block}.attn.out_proj.weight"]
        _set_norm(layer.ffn.layer_norm, weights[f"{block}.norm_2.weight"])
        layer.ffn.linear_0.weight = weights[f"{block}.ffn.up_proj.weight"]
        layer.ffn.linear_1.weight = weights[f"{block}.ffn.down_proj.weight"]
    # The tokens are named by their numbers.
    spec.register_vocabulary([str(token_id) for token_id in range(config["vocab_size"])])
    spec.config.bos_token = spec.config.eos_token = spec.config.unk_token = "0"
    spec.validate()
    spec.optimize(quantization="int8")
    spec.save(str(folder))


@contextmanager
def open_model(folder: Path, _bits: int, threads: int) -> Iterator[Generate]:
    generator = ctranslate2.Generator(str(folder), compute_type="int8", inter_threads=1, intra_threads=threads)

    def generate(prompts: Prompts, new_tokens: int) -> Generation:
        times_s: list[list[float]] = [[] for _ in prompts]

        def record(step: Any) -> bool:
            times_s[step.batch_id].append(perf_counter())
            return False

        tokens = [[str(token_id) for token_id in prompt] for prompt in prompts]
        lengths = {"min_length": new_tokens, "max_length": new_tokens}
        start_s = perf_counter()
        generator.generate_batch(tokens, sampling_topk=1, include_prompt_in_result=False, callback=record, **lengths)
        return Generation(start_s, times_s)

    yield generate


def _set_norm(norm: Any, weight: Weights) -> None:
    norm.gamma, norm.beta = weight, numpy.zeros_like(weight)


if __name__ == "__main__":
    ladder.run("ctranslate2", open_model, convert)

"""llama.cpp: its interface for batches through llama-cpp-python, compiled for the machine's own instructions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any

import gguf
import llama_cpp
import numpy

from benchmarks.peers.checkpoint import as_float32, read_config, read_weights
from benchmarks.peers.drivers import ladder
from benchmarks.peers.drivers.ladder import Generate, Generation, Prompts

_FILE = "model.gguf"
_NAMES = {
    "norm_1": "attn_norm",
    "attn.Wqkv": "attn_qkv",
    "attn.out_proj": "attn_output",
    "norm_2": "ffn_norm",
    "ffn.up_proj": "ffn_up",
    "ffn.down_proj": "ffn_down",
}
# Contexts grow in steps of this size.
_CONTEXT_STEP = 256


def convert(checkpoint: Path, folder: Path, bits: int) -> None:
    """llama.cpp's own converter refuses tokenizers that it does not know; this file has none."""
    config = read_config(checkpoint)
    writer = gguf.GGUFWriter(folder / _FILE, "mpt")
    writer.add_context_length(config["max_seq_len"])
    writer.add_embedding_length(config["d_model"])
    writer.add_block_count(config["n_layers"])
    writer.add_feed_forward_length(config["expansion_ratio"] * config["d_model"])
    writer.add_head_count(config["n_heads"])
    writer.add_layer_norm_eps(1e-5)
    writer.add_max_alibi_bias(config["attn_config"]["alibi_bias_max"])
    writer.add_tokenizer_model("none")
    writer.add_vocab_size(config["vocab_size"])
    for name, weights in read_weights(checkpoint):
        if weights.ndim == 1:
            writer.add_tensor(_name(name), as_float32(weights))
        elif bits == 8:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(_name(name), gguf.quantize(as_float32(weights), kind), raw_dtype=kind)
        else:
            kind = gguf.GGMLQuantizationType.BF16
            writer.add_tensor(_name(name), numpy.ascontiguousarray(weights).view(numpy.uint8), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _name(published: str) -> str:
    names = {"transformer.wte.weight": "token_embd.weight", "transformer.norm_f.weight": "output_norm.weight"}
    if published in names:
        return names[published]
    _, _, layer, *parts, kind = published.split(".")
    return f"blk.{layer}.{_NAMES['.'.join(parts)]}.{kind}"


@contextmanager
def open_model(folder: Path, _bits: int, threads: int) -> Iterator[Generate]:
    llama_cpp.llama_backend_init()
    file = str(folder / _FILE).encode()
    model = llama_cpp.llama_model_load_from_file(file, llama_cpp.llama_model_default_params())
    if model is None:
        raise RuntimeError(f"llama.cpp cannot load {folder / _FILE}")
    vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))

    def generate(prompts: Prompts, new_tokens: int) -> Generation:
        parameters = llama_cpp.llama_context_default_params()
        tokens_each = max(map(len, prompts)) + new_tokens
        parameters.n_ctx = len(prompts) * -(-tokens_each // _CONTEXT_STEP) * _CONTEXT_STEP
        parameters.n_batch = sum(map(len, prompts))
        parameters.n_seq_max = len(prompts)
        parameters.n_threads = parameters.n_threads_batch = threads
        context = llama_cpp.llama_init_from_model(model, parameters)
        batch = llama_cpp.llama_batch_init(parameters.n_batch, 0, 1)
        try:
            return _generate(_Decoder(context, batch, vocab_size), prompts, new_tokens)
        finally:
            llama_cpp.llama_batch_free(batch)
            llama_cpp.llama_free(context)

    yield generate


def _generate(decoder: _Decoder, prompts: Prompts, new_tokens: int) -> Generation:
    start_s = perf_counter()
    step, times_s = [(0, prompt) for prompt in prompts], []
    for _ in range(new_tokens):
        ids = decoder.decode(step)
        times_s.append(perf_counter())
        step = [(start + len(tokens), [token_id]) for (start, tokens), token_id in zip(step, ids, strict=True)]
    return Generation(start_s, [times_s] * len(prompts))


class _Decoder:
    """Steps of all sequences of a context at once."""

    def __init__(self, context: Any, batch: Any, vocab_size: int) -> None:
        self._context, self._batch, self._vocab_size = context, batch, vocab_size

    def decode(self, sequences: Sequence[tuple[int, Sequence[int]]]) -> list[int]:
        """Appends to each sequence, from a position on, its tokens; returns the most probable next token of each."""
        batch, last = self._batch, []
        batch.n_tokens = 0
        for sequence, (start, tokens) in enumerate(sequences):
            for position, token_id in enumerate(tokens, start):
                index = batch.n_tokens
                batch.token[index], batch.pos[index] = token_id, position
                batch.n_seq_id[index], batch.seq_id[index][0] = 1, sequence
                batch.logits[index] = position == start + len(tokens) - 1
                batch.n_tokens += 1
            last.append(batch.n_tokens - 1)
        if status := llama_cpp.llama_decode(self._context, batch):
            raise RuntimeError(f"llama_decode returned {status}")
        return [int(self._logits(index).argmax()) for index in last]

    def _logits(self, index: int) -> Any:
        return numpy.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(self._context, index), (self._vocab_size,))


if __name__ == "__main__":
    ladder.run("llama-cpp-python", open_model, convert)

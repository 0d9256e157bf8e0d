"""Trains the demo model that ships in mpt_grpc/demo: a small MPT on public-domain children's stories.

    python tools/train_demo.py --corpus stories.txt --work /tmp/demo            # trains, or resumes from a checkpoint
    python tools/train_demo.py --corpus stories.txt --work /tmp/demo --export   # writes mpt_grpc/demo

The corpus is one text file with `<|endoftext|>` between documents; every 40th document is held out. The model is the
server's own `MPT`; only attention differs, since nothing is cached in training. The learning rate warms up, stays
constant and decays to zero at the end, so a run can be shortened or extended at a checkpoint with `--steps`.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from mpt_grpc.model.config import MPTConfig
from mpt_grpc.model.mpt import MPT, Attend, alibi_slopes

END = "<|endoftext|>"
VOCAB_SIZE = 4096
CONTEXT = 512
HELD_OUT_EVERY = 40
WARMUP_STEPS, DECAY_FRACTION = 60, 0.45
CONFIG = {
    "architectures": ["MPTForCausalLM"],
    "model_type": "mpt",
    "d_model": 256,
    "n_heads": 8,
    "n_layers": 8,
    "expansion_ratio": 4,
    "max_seq_len": 2048,
    "vocab_size": VOCAB_SIZE,
    "no_bias": True,
    "norm_type": "low_precision_layernorm",
    "learned_pos_emb": False,
    "attn_config": {"attn_type": "multihead_attention", "alibi": True, "alibi_bias_max": 8},
    "eos_token_id": 0,
    "bos_token_id": 0,
    "torch_dtype": "bfloat16",
}
DEMO = Path(__file__).parent.parent / "mpt_grpc" / "demo"


def main() -> None:
    arguments = _arguments()
    arguments.work.mkdir(parents=True, exist_ok=True)
    train_documents, held_out = _documents(arguments.corpus)
    tokenizer = _tokenizer(arguments.work / "tokenizer.json", train_documents)
    model = MPT(MPTConfig.from_dict(CONFIG)).to(arguments.device)
    checkpoint = arguments.work / "checkpoint.pt"
    if arguments.export:
        model.load_state_dict(torch.load(checkpoint, weights_only=True)["model"])
        _export(model, tokenizer, held_out)
        return
    stream = _encode(tokenizer, train_documents)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(stream):,} training tokens", flush=True)
    _train(model, stream, tokenizer, held_out, arguments, checkpoint)


def _train(
    model: MPT,
    stream: Tensor,
    tokenizer: Tokenizer,
    held_out: list[str],
    arguments: argparse.Namespace,
    checkpoint: Path,
) -> None:
    _initialise(model)
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "wte" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim == 1 or "wte" in name]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=0.004, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    base_rates = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    start = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        start = state["step"]
    attend = causal_attention(model.config, arguments.batch, CONTEXT, arguments.device)
    start_s, num_tokens = time.monotonic(), 0
    for step in range(start, arguments.steps):
        for optimizer, rate in zip(optimizers, base_rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * _schedule(step, arguments.steps)
        inputs, targets = _batch(stream, step, arguments.batch, arguments.device)
        loss = _loss(model, inputs, targets, attend, arguments.device)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        num_tokens += inputs.numel()
        if (step + 1) % 20 == 0:
            rate = num_tokens / (time.monotonic() - start_s)
            print(f"step {step + 1}/{arguments.steps} loss {loss.item():.4f} {rate:,.0f} tokens/s", flush=True)
        if (step + 1) % arguments.checkpoint_every == 0 or step + 1 == arguments.steps:
            states = [optimizer.state_dict() for optimizer in optimizers]
            torch.save({"model": model.state_dict(), "optimizers": states, "step": step + 1}, checkpoint)
            bits = _bits_per_byte(model, tokenizer, held_out)
            with (arguments.work / "log.jsonl").open("a") as log:
                log.write(json.dumps({"step": step + 1, "held_out_bits_per_byte": round(bits, 4)}) + "\n")
            print(f"step {step + 1}: held-out bits per byte {bits:.4f}", flush=True)


def causal_attention(config: MPTConfig, batch: int, length: int, device: str) -> Attend:
    """Returns attention for `batch` concatenated sequences of `length` tokens each; nothing is cached."""
    distance = torch.arange(length)[None, :] - torch.arange(length)[:, None]
    slopes = alibi_slopes(config.n_heads, config.alibi_bias_max)
    bias = (slopes[:, None, None] * distance).masked_fill(distance > 0, -torch.inf)[None].to(device)

    def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:  # noqa: ARG001 - the same for every layer
        q, k, v = (t.unflatten(0, (batch, length)).transpose(1, 2) for t in (query, key, value))
        context = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype), scale=config.softmax_scale)
        return context.transpose(1, 2).flatten(0, 1)

    return attend


def _loss(model: MPT, inputs: Tensor, targets: Tensor, attend: Attend, device: str) -> Tensor:
    with torch.autocast(torch.device(device).type, torch.bfloat16):
        positions = torch.zeros_like(inputs)
        logits = model.logits(model(inputs, positions, attend))
    return F.cross_entropy(logits, targets)


def _batch(stream: Tensor, step: int, batch: int, device: str) -> tuple[Tensor, Tensor]:
    """Returns inputs and targets of windows sampled without replacement.

    Each epoch shifts the grid of windows by a random offset and reshuffles it.
    """
    windows = (len(stream) - 1) // CONTEXT - 1
    rows = []
    for index in range(step * batch, (step + 1) * batch):
        epoch, position = divmod(index, windows)
        rng = np.random.default_rng(epoch)
        offset = int(rng.integers(CONTEXT))
        rows.append(offset + int(rng.permutation(windows)[position]) * CONTEXT)
    picked = torch.stack([stream[row : row + CONTEXT + 1] for row in rows]).to(device)
    return picked[:, :-1].flatten(), picked[:, 1:].flatten()


def _schedule(step: int, steps: int) -> float:
    return min(1.0, (step + 1) / WARMUP_STEPS, (steps - step) / (steps * DECAY_FRACTION))


def _initialise(model: MPT) -> None:
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            out = name.endswith(("out_proj.weight", "down_proj.weight"))
            std = 0.02 if "wte" in name else 1 / math.sqrt(parameter.shape[1])
            torch.nn.init.normal_(parameter, std=std / math.sqrt(2 * model.config.n_layers) if out else std)


@torch.no_grad()
def _bits_per_byte(model: MPT, tokenizer: Tokenizer, documents: list[str]) -> float:
    """Returns the cross-entropy in bits per UTF-8 byte, over windows that each start with `<|endoftext|>`."""
    bits, num_bytes = 0.0, 0
    end = tokenizer.token_to_id(END)
    device = next(model.parameters()).device
    for document in documents:
        ids = tokenizer.encode(document).ids
        num_bytes += len(document.encode())
        for start in range(0, len(ids), CONTEXT):
            targets = torch.tensor(ids[start : start + CONTEXT], device=device)
            inputs = torch.cat([torch.tensor([end], device=device), targets[:-1]])
            attend = causal_attention(model.config, 1, len(inputs), str(device))
            logits = model.logits(model(inputs, torch.zeros_like(inputs), attend))
            bits += F.cross_entropy(logits, targets, reduction="sum").item() / math.log(2)
    return bits / num_bytes


def _documents(corpus: Path) -> tuple[list[str], list[str]]:
    documents = [text.strip() for text in corpus.read_text(encoding="utf-8").split(END)]
    documents = [text for text in documents if text]
    held_out = documents[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]
    train = [text for index, text in enumerate(documents) if (index + 1) % HELD_OUT_EVERY]
    return train, held_out


def _tokenizer(path: Path, documents: list[str]) -> Tokenizer:
    if not path.exists():
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=VOCAB_SIZE, special_tokens=[END], initial_alphabet=alphabet)
        tokenizer.train_from_iterator(documents, trainer)
        tokenizer.save(str(path))
    return Tokenizer.from_file(str(path))


def _encode(tokenizer: Tokenizer, documents: list[str]) -> Tensor:
    end = tokenizer.token_to_id(END)
    ids = [token for encoding in tokenizer.encode_batch(documents) for token in [end, *encoding.ids]]
    return torch.tensor(ids, dtype=torch.int64)


def _export(model: MPT, tokenizer: Tokenizer, held_out: list[str]) -> None:
    DEMO.mkdir(exist_ok=True)
    weights = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in model.state_dict().items()}
    model.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    save_file(weights, DEMO / "model.safetensors", metadata={"format": "pt"})
    (DEMO / "model.safetensors").chmod(0o644)
    tokenizer.save(str(DEMO / "tokenizer.json"))
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END,
        "eos_token": END,
        "unk_token": END,
        "clean_up_tokenization_spaces": False,
        "model_max_length": CONFIG["max_seq_len"],
    }
    for name, content in (
        ("config.json", CONFIG),
        ("generation_config.json", {"bos_token_id": 0, "eos_token_id": 0}),
        ("tokenizer_config.json", tokenizer_config),
    ):
        (DEMO / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    bits = _bits_per_byte(model, tokenizer, held_out)
    print(f"exported to {DEMO}: held-out bits per byte {bits:.4f} as exported (bfloat16 weights)")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="folder for the tokenizer, the checkpoint and the log")
    parser.add_argument(
        "--steps", type=int, default=2000, help="total number of steps, including those of a checkpoint"
    )
    parser.add_argument("--batch", type=int, default=16, help="number of 512-token windows per step")
    parser.add_argument("--checkpoint-every", type=int, default=100)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--export", action="store_true", help="write the checkpoint to mpt_grpc/demo and exit")
    return parser.parse_args()


if __name__ == "__main__":
    main()

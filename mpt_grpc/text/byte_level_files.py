"""Converts `vocab.json` and `merges.txt`, as GPT-2's tokenizer saves them, to a `tokenizer.json`."""

from __future__ import annotations

from pathlib import Path

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from mpt_grpc.errors import ModelError
from mpt_grpc.model_files import BYTE_LEVEL_FILES, read_json, read_text


def tokenizer_json(folder: Path, class_name: str) -> str:
    """Returns the `tokenizer.json` of the tokenizer with this class. Raises ModelError, which names the file."""
    vocab, merges = (folder / name for name in BYTE_LEVEL_FILES)
    if not class_name.startswith(("GPT2", "GPTNeoX", "CodeGen")):
        why = f"tokenizer_class: without tokenizer.json, {class_name!r} is not supported; save it as a fast tokenizer"
        raise ModelError(f"{folder / 'tokenizer_config.json'}: {why}")
    ids = read_json(vocab) or {}
    if not all(type(token_id) is int and 0 <= token_id < 1 << 32 for token_id in ids.values()):
        raise ModelError(f"{vocab}: expected an object of tokens and their IDs")
    lines = (line.strip().partition(" ") for line in (read_text(merges) or "").split("\n"))
    pairs = [(left, right) for left, _, right in lines if left and not left.startswith("#version")]
    try:
        tokenizer = tokenizers.Tokenizer(models.BPE(ids, pairs))
    except Exception as error:  # tokenizers raises no narrower class
        raise ModelError(f"{vocab}, {merges.name}: not the files of a byte-level tokenizer: {error}") from error
    if class_name.startswith("GPTNeoX"):
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer.to_str()

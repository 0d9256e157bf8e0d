"""The model's tokenizer, loaded from its folder: converts text to IDs and back, and knows which tokens end an output.

`detokenizer.py` converts an output to text while it grows. Spaces are never cleaned up.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models

from mpt_grpc.errors import ModelError
from mpt_grpc.model_files import (
    BYTE_LEVEL_FILES,
    SENTENCEPIECE_FILES,
    found_weights,
    has_file,
    names_in,
    read_json,
    read_text,
)
from mpt_grpc.text import byte_level_files, sentencepiece_model
from mpt_grpc.text.detokenizer import ByteDetokenizer, Detokenizer, StreamDetokenizer
from mpt_grpc.text.literals import SpecialTexts
from mpt_grpc.text.tokenizer_config import TokenizerConfig, read_tokenizer_config

_PROMPT_TAIL_TOKENS = 8
"""How many of a prompt's last tokens are checked for an incomplete character; it has at most 3 bytes, so 3 would do."""

QUICK_SIZE = 1024
"""Texts of up to this many bytes, each of which may be a token, and lists of as many tokens take a millisecond."""
_SPACE = "▁"
_BYTE_TOKEN = re.compile("<0x([0-9A-F]{2})>")


class Tokenizer:
    """A tokenizer loaded from a Hugging Face `tokenizer.json`. Immutable, so threads may share it."""

    vocab_size: int
    """The upper bound of the token IDs that the model has, including those of added tokens."""
    num_ids: int
    """The upper bound of all token IDs, those of `extra_tokens` included."""
    extra_tokens: tuple[str, ...]
    """The added tokens that the model does not have; `encode` returns their IDs, which no request may use."""
    max_token_bytes: int
    """The number of bytes in the longest vocabulary entry; in byte-level BPE no token has more bytes of text."""
    eos_token_ids: frozenset[int]
    """The tokens that end an output; empty if the model's files specify none."""
    special_texts: SpecialTexts
    """The texts that `encode` turns into special tokens."""
    omitted_tokens: tuple[str, ...]
    """The tokens that transformers adds to every text and `encode` does not."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        eos_token_ids: frozenset[int] = frozenset(),
        omitted_tokens: Sequence[str] = (),
        num_rows: int = sys.maxsize,
    ) -> None:
        """num_rows: the number of rows of the model's embedding."""
        backend.no_truncation()  # a file may enable both, but prompts must not be silently truncated or padded
        backend.no_padding()
        if isinstance(backend.model, models.BPE):
            backend.model.dropout = None  # which makes the tokens of a text random
        self.num_ids = _num_tokens(backend)
        self.vocab_size = min(self.num_ids, num_rows)
        self.max_token_bytes = max(map(len, (t.encode() for t in backend.get_vocab(with_added_tokens=True))), default=0)
        self.eos_token_ids = eos_token_ids
        added = backend.encode("").tokens if backend.num_special_tokens_to_add(is_pair=False) else ()
        self.omitted_tokens = tuple(omitted_tokens or added)
        self._backend = backend
        added_tokens = backend.get_added_tokens_decoder()
        self.extra_tokens = tuple(token.content for i, token in sorted(added_tokens.items()) if i >= self.vocab_size)
        special = {i: token.content for i, token in added_tokens.items() if token.special}
        self._special_ids = frozenset(i for i in special if i < self.vocab_size)
        self.special_texts = SpecialTexts(special.values())
        self._is_byte_level = isinstance(backend.decoder, decoders.ByteLevel)
        self._has_marked_spaces = _SPACE in repr(backend.decoder)
        self._byte_of_character = _byte_level_alphabet()
        self._bytes_of: dict[int, bytes] = {}
        """The bytes of the tokens looked up so far."""

    @classmethod
    def from_folder(cls, folder: Path, num_rows: int = sys.maxsize) -> Tokenizer:
        """Loads tokenizer.json, or the files from which it can be made, with the tokens that the files beside it add,
        and the end-of-sequence tokens.

        The end-of-sequence tokens come from the first of generation_config.json, config.json and the tokenizer's files
        that specifies them. `num_rows` is the number of rows of the model's embedding, which only added tokens may
        exceed. Raises ModelError, which names the file.
        """
        path, config = folder / "tokenizer.json", read_tokenizer_config(folder)
        text = read_text(path)
        if text is None:
            found = [folder / name for name in SENTENCEPIECE_FILES if has_file(folder / name)]
            if found:
                path = found[0]
                text = sentencepiece_model.tokenizer_json(path)
            elif all(has_file(folder / name) for name in BYTE_LEVEL_FILES):
                text = byte_level_files.tokenizer_json(folder, config.class_name)
            else:
                raise ModelError(f"{path}: not found; {_missing(folder)}")
        try:
            backend = tokenizers.Tokenizer.from_str(_with_prefix_space(text, config.add_prefix_space))
        except Exception as error:  # tokenizers raises no narrower class
            raise ModelError(f"{path}: not a valid tokenizer: {error}") from error
        eos_token = config.special_tokens.get("eos_token")
        is_eos_known = eos_token is None or backend.token_to_id(eos_token) is not None
        _add_tokens(backend, config, folder)
        if (num_tokens := _num_tokens(backend, with_added_tokens=False)) > num_rows:
            raise ModelError(f"{path}: {num_tokens} tokens, more than the model's {num_rows}: use the model's own")
        eos_token_ids = _eos_token_ids(folder, min(_num_tokens(backend), num_rows))
        files = "tokenizer_config.json or special_tokens_map.json"
        if eos_token_ids is None and eos_token is not None:
            # transformers would add it, but the model cannot generate a token that it was not trained with.
            if not is_eos_known and config.added_tokens[eos_token][0] is None:
                raise ModelError(f"{folder}: eos_token {eos_token!r} is not in tokenizer.json; correct it in {files}")
            eos_token_ids = frozenset(i for i in (backend.token_to_id(eos_token),) if i is not None)
            if max(eos_token_ids, default=-1) >= num_rows:
                why = f"is token {max(eos_token_ids)}, but the model has only {num_rows}; correct it in {files}"
                raise ModelError(f"{folder}: eos_token {eos_token!r} {why}")
        return cls(backend, eos_token_ids or frozenset(), config.added_to_texts, num_rows)

    def encode(self, text: str) -> tuple[int, ...]:
        """Returns the IDs of `text`; no tokens are added. The text of a special token, such as `<|endoftext|>`, is
        encoded as that token."""
        # Unlike the method for a single text, the batch method releases the GIL.
        (encoding,) = self._backend.encode_batch_fast([text], add_special_tokens=False)
        return tuple(encoding.ids)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Returns the text of `ids`. Bytes that are not valid UTF-8 become U+FFFD; unknown IDs are ignored."""
        if len(ids) <= QUICK_SIZE:
            return self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
        (text,) = self._backend.decode_batch([list(ids)], skip_special_tokens=skip_special_tokens)  # as in `encode`
        return text

    def token_bytes(self, token_id: int) -> bytes:
        """Returns the bytes of one token, which may end inside a character; b"" for an unknown ID.

        In byte-level BPE, these are exactly the bytes that `decode` joins, and in SentencePiece's models those that it
        joins after the first word. Other tokenizers have no such bytes: the result is then the UTF-8 encoding of the
        token decoded alone.
        """
        piece = self._bytes_of.get(token_id)
        if piece is None:
            piece = self._bytes_of[token_id] = self._compute_bytes(token_id)
        return piece

    def _compute_bytes(self, token_id: int) -> bytes:
        token = self._backend.id_to_token(token_id) or ""
        if self._has_marked_spaces and token_id not in self._special_ids:
            byte = _BYTE_TOKEN.fullmatch(token)
            return bytes.fromhex(byte[1]) if byte else token.replace(_SPACE, " ").encode()
        if not self._is_byte_level:
            return self.decode((token_id,), skip_special_tokens=False).encode()
        try:
            return bytes(self._byte_of_character[character] for character in token)
        except KeyError:  # an added token is plain text; the decoder, too, detects it by any character not in the map
            return token.encode()

    @property
    def special_token_ids(self) -> frozenset[int]:
        """The tokens that do not represent text, such as end-of-sequence tokens."""
        return self._special_ids

    def plain_text_encoder(self) -> Callable[[str], Sequence[int]]:
        """Returns an `encode` that treats the text of special tokens as plain text.

        Creating it takes as long as creating the tokenizer.
        """
        backend = tokenizers.Tokenizer.from_str(self._backend.to_str())
        backend.encode_special_tokens = True
        return lambda text: backend.encode_batch_fast([text], add_special_tokens=False)[0].ids

    def special_token_id(self, text: str) -> int | None:
        """Returns the ID of the special token with this text, or None."""
        token_id = self._backend.token_to_id(text)
        return token_id if token_id in self._special_ids else None

    def detokenizer(self, prompt_ids: Sequence[int] = (), skip_special_tokens: bool = True) -> Detokenizer:
        """Returns a detokenizer for the output that follows `prompt_ids`.

        The prompt's text plus the detokenizer's text is `decode(prompt_ids + output)`. The prompt's text consists of
        its complete characters. An incomplete one at its end belongs to the output, which completes it or turns it
        into U+FFFD.
        """
        skipped = self._special_ids if skip_special_tokens else frozenset()
        detokenizer = (
            ByteDetokenizer(self.token_bytes, skipped)
            if self._is_byte_level
            else StreamDetokenizer(self._backend, skipped)
        )
        not_skipped = (token_id for token_id in reversed(prompt_ids) if token_id not in skipped)
        for token_id in reversed(tuple(islice(not_skipped, _PROMPT_TAIL_TOKENS))):
            detokenizer.feed(token_id)  # text returned here is the prompt's; what is held back goes to the output
        return detokenizer


def encodes_quickly(text: str) -> bool:
    """Whether a text is tokenized in about a millisecond, and so may be on an event loop."""
    return len(text) <= QUICK_SIZE and len(text.encode(errors="surrogatepass")) <= QUICK_SIZE


def _missing(folder: Path) -> str:
    """Returns a remedy for a model without a tokenizer."""
    name = (read_json(folder / "config.json") or {}).get("tokenizer_name")
    where = f"; config.json names that of {name[:100]!r}" if isinstance(name, str) and name else ""
    others = f"one of {', '.join(SENTENCEPIECE_FILES)}, or {' and '.join(BYTE_LEVEL_FILES)}"
    found = f"; {found}" if (found := found_weights(names_in(folder))) else ""
    return f"a model's folder must contain it, {others}{where}{found}"


def _byte_level_alphabet() -> dict[str, int]:
    """Returns GPT-2's map from characters to bytes.

    Printable Latin-1 characters represent themselves; the other bytes are numbered from U+0100 upwards.
    """
    printable = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
    others = (byte for byte in range(0x100) if byte not in printable)
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


def _with_prefix_space(text: str, add_prefix_space: bool | None) -> str:
    """Returns tokenizer.json with the prefix space of its byte-level pre-tokenizers set."""
    if add_prefix_space is None:
        return text
    content = json.loads(text)
    pre_tokenizer: dict[str, Any] = content.get("pre_tokenizer") or {}
    for part in (pre_tokenizer, *pre_tokenizer.get("pretokenizers", ())):
        if part.get("type") == "ByteLevel":
            part["add_prefix_space"] = add_prefix_space
    return json.dumps(content)


def _add_tokens(backend: tokenizers.Tokenizer, config: TokenizerConfig, folder: Path) -> None:
    """Adds the tokens that tokenizer.json lacks, in the order of their IDs, and replaces the flags of others.

    A token with a name is special, whatever its flags.
    """
    known = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    named = frozenset(config.special_tokens.values())
    entries = sorted(config.added_tokens.values(), key=lambda entry: (entry[0] is None, entry[0] or 0))
    tokens = []
    for _, listed in entries:
        old = known.get(listed.content)
        token = listed if old is None or config.replaces_flags else old
        # Special tokens stay special, as the backend does not forget them.
        token.special |= token.content in named or (old is not None and old.special)
        tokens.append(token)
    backend.add_tokens(tokens)
    for token_id, token in entries:
        actual = backend.token_to_id(token.content)
        if token_id is not None and token.content not in known and actual != token_id:
            why = f"token {token.content!r} has the ID {token_id}, but tokenizer.json has room for it at {actual}"
            raise ModelError(f"{folder}: {why}")


def _num_tokens(backend: tokenizers.Tokenizer, *, with_added_tokens: bool = True) -> int:
    """Returns the upper bound of the token IDs."""
    return max(backend.get_vocab(with_added_tokens=with_added_tokens).values(), default=-1) + 1


def _eos_token_ids(folder: Path, vocab_size: int) -> frozenset[int] | None:
    """Returns the end-of-sequence tokens that the model's configuration specifies, or None."""
    for name in ("generation_config.json", "config.json"):
        ids = (read_json(folder / name) or {}).get("eos_token_id")
        if ids is None:
            continue
        ids = ids if isinstance(ids, list) else [ids]
        if not all(type(token_id) is int and 0 <= token_id < vocab_size for token_id in ids):
            why = f"eos_token_id must be a token ID below {vocab_size} or a list of them, not {ids!r}"
            raise ModelError(f"{folder / name}: {why}")
        return frozenset(ids)
    return None

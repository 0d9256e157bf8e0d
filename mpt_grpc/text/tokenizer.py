"""The model's tokenizer, as its folder holds it. Owns text to ids, ids to text and the end marks.

How an output becomes text while it grows is `detokenizer.py`'s. No space is ever cleaned up.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders

from mpt_grpc.errors import ModelError
from mpt_grpc.text.detokenizer import ByteDetokenizer, Detokenizer, StreamDetokenizer

PROMPT_TAIL_TOKENS = 8
"""How far back a prompt is read for a character that it leaves unfinished: at most 3 bytes, so 3 tokens would do."""


class Tokenizer:
    """A Hugging Face `tokenizer.json`. Immutable; threads may share it."""

    vocab_size: int
    """All ids, those of added tokens included, are below it."""
    max_token_bytes: int
    """Of the longest token as it is spelt; in byte-level BPE no token stands for more bytes of text."""
    eos_token_ids: frozenset[int]
    """The tokens that end an output; empty if the model's files name none."""

    def __init__(self, backend: tokenizers.Tokenizer, eos_token_ids: frozenset[int] = frozenset()) -> None:
        backend.no_truncation()  # a file may ask for both; a prompt is never cut or filled up in silence
        backend.no_padding()
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.max_token_bytes = max(map(len, (t.encode() for t in backend.get_vocab(with_added_tokens=True))), default=0)
        self.eos_token_ids = eos_token_ids
        self._backend = backend
        self._special_ids = frozenset(i for i, t in backend.get_added_tokens_decoder().items() if t.special)
        self._is_byte_level = isinstance(backend.decoder, decoders.ByteLevel)
        self._byte_of_character = _byte_level_alphabet()

    @classmethod
    def from_folder(cls, folder: Path) -> Tokenizer:
        """Reads tokenizer.json, and the end marks from the first of generation_config.json, config.json and
        tokenizer_config.json that names them. Raises ModelError, which names the file."""
        path = folder / "tokenizer.json"
        text = _read(path)
        if text is None:
            raise ModelError(f"{path}: not found; a model's folder must have a tokenizer.json")
        try:
            backend = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # tokenizers raises no narrower class
            raise ModelError(f"{path}: not a tokenizer: {error}") from error
        return cls(backend, _eos_token_ids(folder, backend.token_to_id))

    def encode(self, text: str) -> tuple[int, ...]:
        """The ids of `text` as it is: no token is added. A special token's own text, such as `<|endoftext|>`, is
        read as that token."""
        # The call for a batch lets other Python threads run meanwhile, the one for a single text does not.
        (encoding,) = self._backend.encode_batch_fast([text], add_special_tokens=False)
        return tuple(encoding.ids)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of `ids`; bytes that are no UTF-8 become U+FFFD, ids without a token become nothing."""
        return self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token, which need not be whole characters; b"" for an id without a token.

        In byte-level BPE they are exactly what `decode` joins. Other kinds have no such bytes: there it is the
        UTF-8 of the token decoded alone.
        """
        if not self._is_byte_level:
            return self.decode((token_id,), skip_special_tokens=False).encode()
        token = self._backend.id_to_token(token_id) or ""
        try:
            return bytes(self._byte_of_character[character] for character in token)
        except KeyError:  # an added token is plain text: the decoder's rule is that one strange character shows it
            return token.encode()

    @property
    def special_token_ids(self) -> frozenset[int]:
        """The tokens that are no text, such as end marks, whatever they are spelt like."""
        return self._special_ids

    def plain_text_encoder(self) -> Callable[[str], Sequence[int]]:
        """An `encode` that reads a special token's own text as plain text; as costly to make as the tokenizer."""
        backend = tokenizers.Tokenizer.from_str(self._backend.to_str())
        backend.encode_special_tokens = True
        return lambda text: backend.encode_batch_fast([text], add_special_tokens=False)[0].ids

    def special_token_id(self, text: str) -> int | None:
        """The special token whose own text this is, or None."""
        token_id = self._backend.token_to_id(text)
        return token_id if token_id in self._special_ids else None

    def detokenizer(self, prompt_ids: Sequence[int] = (), skip_special_tokens: bool = True) -> Detokenizer:
        """What turns the output that follows `prompt_ids` into text, token by token.

        The text of the prompt and the detokenizer's together are `decode(prompt_ids + output)`. The prompt's text is
        its whole characters; one that it leaves unfinished is the output's, which finishes or breaks (U+FFFD) it.
        """
        skipped = self._special_ids if skip_special_tokens else frozenset()
        detokenizer = (
            ByteDetokenizer(self.token_bytes, skipped)
            if self._is_byte_level
            else StreamDetokenizer(self._backend, skipped)
        )
        told = (token_id for token_id in reversed(prompt_ids) if token_id not in skipped)
        for token_id in reversed(tuple(islice(told, PROMPT_TAIL_TOKENS))):
            detokenizer.feed(token_id)  # what comes out is the prompt's, what stays inside is the output's
        return detokenizer


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 stands for itself, the other bytes are counted up from U+0100."""
    printable = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
    others = (byte for byte in range(0x100) if byte not in printable)
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


def _eos_token_ids(folder: Path, token_to_id: Callable[[str], int | None]) -> frozenset[int]:
    for name in ("generation_config.json", "config.json"):
        ids = _read_json(folder / name).get("eos_token_id")
        if ids is None:
            continue
        ids = ids if isinstance(ids, list) else [ids]
        if not all(type(token_id) is int and token_id >= 0 for token_id in ids):
            raise ModelError(f"{folder / name}: eos_token_id must be a token id or a list of them, not {ids!r}")
        return frozenset(ids)

    path = folder / "tokenizer_config.json"
    token = _read_json(path).get("eos_token")
    if isinstance(token, dict):
        token = token.get("content")
    if token is None:
        return frozenset()
    token_id = token_to_id(token) if isinstance(token, str) else None
    if token_id is None:
        raise ModelError(f"{path}: eos_token {token!r} is not in tokenizer.json")
    return frozenset({token_id})


def _read_json(path: Path) -> dict[str, Any]:
    """The object in the file; empty if there is no such file."""
    text = _read(path)
    try:
        value = {} if text is None else json.loads(text)
    except json.JSONDecodeError as error:
        raise ModelError(f"{path}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: not a JSON object")
    return value


def _read(path: Path) -> str | None:
    """The file's text; None if there is no such file."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{path}: cannot be read: {error}") from error

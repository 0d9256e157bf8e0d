"""The files beside tokenizer.json, with the precedence that transformers gives them.

`tokenizer_config.json` names the special tokens and, if it was written by a recent transformers, lists all added tokens
in `added_tokens_decoder`. Otherwise `special_tokens_map.json` overrides its names, and `added_tokens.json` lists tokens
that tokenizer.json may lack.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from mpt_grpc.errors import ModelError
from mpt_grpc.model_files import BYTE_LEVEL_FILES, read_json, read_text

_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""The named tokens, in the order in which transformers adds those that tokenizer.json lacks."""
_BYTE_LEVEL = ("GPTNeoX", "GPT2", "CodeGen")
"""How the names of the byte-level classes begin: tokenizer_config.json decides whether they add a prefix space, and
their special tokens are `<|endoftext|>` and, for GPT-NeoX's, `<|padding|>` unless the files name others."""
_END, _PADDING = "<|endoftext|>", "<|padding|>"
_ADDABLE = ("bos_token", "eos_token")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


@dataclass(frozen=True)
class TokenizerConfig:
    """What the files beside tokenizer.json specify."""

    class_name: str
    """The name of the tokenizer's class in transformers."""
    special_tokens: Mapping[str, str]
    """The text of each named token: `bos_token`, `eos_token` and so on."""
    added_tokens: Mapping[str, tuple[int | None, AddedToken]]
    """The tokens that the tokenizer must have, by their text, with their IDs where the files specify them."""
    replaces_flags: bool
    """Whether the flags of these tokens replace those in tokenizer.json."""
    added_to_texts: tuple[str, ...]
    """The named tokens that transformers adds at the beginning or the end of every text."""
    add_prefix_space: bool | None
    """Whether byte-level tokenization puts a space before the text; None leaves it to tokenizer.json."""
    chat_template: object
    """The value of `chat_template` in tokenizer_config.json."""


def read_tokenizer_config(folder: Path) -> TokenizerConfig:
    """Reads the files in a model's folder, all of which are optional. Raises ModelError, which names the file."""
    path = folder / "tokenizer_config.json"
    config = _read(path)
    if not config.get("tokenizer_class"):
        config["tokenizer_class"] = (read_json(folder / "config.json") or {}).get("tokenizer_class")
    has_decoder = config.get("added_tokens_decoder") is not None
    if not has_decoder:
        config |= _read(folder / "special_tokens_map.json")
    if config.get("split_special_tokens"):
        raise ModelError(f"{path}: split_special_tokens: special tokens are always recognized; remove the field")
    others = (key for key in config if key.endswith("_token"))
    values = {**_defaults(folder, config), **config}
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    names = extra if isinstance(extra, dict) else {}
    named = _tokens({key: values.get(key) for key in dict.fromkeys((*_NAMED, *others))} | names)
    extra = _tokens({} if names else dict(enumerate(extra)))
    special = {token.content: token for token in (*named.values(), *extra.values())}
    added = _from_decoder(path, config["added_tokens_decoder"]) if has_decoder else _legacy(folder, special)
    for text, token in special.items():
        added.setdefault(text, (None, token))
    return TokenizerConfig(
        class_name=_class_name(config),
        special_tokens={key: token.content for key, token in named.items()},
        added_tokens=added,
        replaces_flags=has_decoder,
        added_to_texts=tuple(
            token.content for key, token in named.items() if key in _ADDABLE and config.get(f"add_{key}") is True
        ),
        add_prefix_space=config.get("add_prefix_space") is True if _is_byte_level(config) else None,
        chat_template=config.get("chat_template"),
    )


def _read(path: Path) -> dict[str, Any]:
    """Returns the content of a file that names special tokens, empty if it does not exist. Raises ModelError."""
    content = read_json(path) or {}
    for key in _NAMED:
        if content.get(key) is not None and _token(content[key]) is None:
            raise ModelError(f"{path}: {key}: expected a token, not {content[key]!r}")
    for key in ("extra_special_tokens", "additional_special_tokens"):
        if content.get(key) and not isinstance(content[key], dict | list):
            raise ModelError(f"{path}: {key}: expected a list of tokens, not {content[key]!r}")
    return content


def _defaults(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Returns the named tokens of the tokenizer's class that the files need not name, if the vocabulary has them."""
    if not _is_byte_level(config):
        return {}
    defaults = dict.fromkeys(("bos_token", "eos_token", "unk_token"), _END)
    if _class_name(config).startswith("GPTNeoX"):
        defaults["pad_token"] = _PADDING
    vocabulary = read_text(folder / "tokenizer.json") or read_text(folder / BYTE_LEVEL_FILES[0]) or ""
    return {name: text for name, text in defaults.items() if json.dumps(text) in vocabulary}


def _is_byte_level(config: Mapping[str, Any]) -> bool:
    return _class_name(config).startswith(_BYTE_LEVEL)


def _class_name(config: Mapping[str, Any]) -> str:
    return str(config.get("tokenizer_class") or "GPTNeoXTokenizer")  # that of MPT's tokenizers


def _from_decoder(path: Path, decoder: Any) -> dict[str, tuple[int | None, AddedToken]]:
    """Returns the tokens of `added_tokens_decoder`."""
    added: dict[str, tuple[int | None, AddedToken]] = {}
    try:
        for token_id, entry in decoder.items():
            flags = {flag: bool(entry[flag]) for flag in _FLAGS if flag in entry}
            added[entry["content"]] = int(token_id), AddedToken(entry["content"], **{"special": False, **flags})
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{path}: added_tokens_decoder: not a map of IDs to tokens: {error!r}") from error
    return added


def _legacy(folder: Path, special: Collection[str]) -> dict[str, tuple[int | None, AddedToken]]:
    """Returns the tokens of added_tokens.json."""
    path = folder / "added_tokens.json"
    added: dict[str, tuple[int | None, AddedToken]] = {}
    for text, token_id in (read_json(path) or {}).items():
        if type(token_id) is not int:
            raise ModelError(f"{path}: {text!r}: expected a token ID, not {token_id!r}")
        added[text] = token_id, AddedToken(text, normalized=text not in special, special=text in special)
    return added


def _tokens(values: Mapping[Any, object]) -> dict[Any, AddedToken]:
    return {key: token for key, value in values.items() if (token := _token(value)) is not None}


def _token(value: object) -> AddedToken | None:
    """Returns the special token that a text, or an object with its text and flags, stands for."""
    entry = value if isinstance(value, dict) else {"content": value}
    text = entry.get("content")
    if not isinstance(text, str) or any("\ud800" <= character <= "\udfff" for character in text):
        return None
    return AddedToken(text, **{**{flag: bool(entry[flag]) for flag in _FLAGS if flag in entry}, "special": True})

"""Converts a SentencePiece model to a `tokenizer.json` that gives the same tokens and the same text.

The package sentencepiece, which describes the file's format, is an extra and imported only here. transformers converts
the models of its own architectures: it takes their normalization for granted instead of reading it from the file.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from mpt_grpc.errors import ModelError

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4  # types of pieces
_UNIGRAM, _BPE = 1, 2  # types of models
_SPACE = "▁"
_NEVER = -1e5
"""A score so low that the piece is not chosen, however long the text that it would replace."""


def tokenizer_json(path: Path) -> str:
    """Returns the `tokenizer.json` of the model in the file. Raises ModelError, which names the file."""
    try:
        from sentencepiece import SentencePieceProcessor
        from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]  # made at run time
    except Exception as error:  # it is missing, or made for another version of protobuf
        why = f"a SentencePiece model without tokenizer.json; install the extra 'convert' to load it: {error}"
        raise ModelError(f"{path}: {why}") from error
    try:
        data = path.read_bytes()
        SentencePieceProcessor().LoadFromSerializedProto(data)  # checks that it is complete and consistent
        model = ModelProto.FromString(data)
    except Exception as error:  # protobuf's errors, which this layer does not import, are among them
        raise ModelError(f"{path}: not a SentencePiece model: {error}") from error
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    if trainer.model_type not in (_UNIGRAM, _BPE):
        raise ModelError(f"{path}: only SentencePiece models of the types unigram and bpe are supported")
    if trainer.treat_whitespace_as_suffix or not normalizer.escape_whitespaces:
        raise ModelError(f"{path}: only SentencePiece models that write spaces as prefixes of words are supported")
    tokenizer = _unigram(model) if trainer.model_type == _UNIGRAM else _bpe(model)
    tokenizer.normalizer = _normalizer(normalizer)
    tokenizer.decoder = _decoder(normalizer)
    special = [piece.piece for piece in model.pieces if piece.type in (_UNKNOWN, _CONTROL)]
    tokenizer.pre_tokenizer = _pre_tokenizer(model, special)
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    return tokenizer.to_str()


def _unigram(model: Any) -> tokenizers.Tokenizer:
    """Returns a tokenizer whose scores are those with which SentencePiece searches."""
    vocab = [(p.piece, p.score if p.type in (_NORMAL, _USER_DEFINED) else _NEVER) for p in model.pieces]
    unk_id = model.trainer_spec.unk_id
    return tokenizers.Tokenizer(models.Unigram(vocab, unk_id, byte_fallback=model.trainer_spec.byte_fallback))


def _bpe(model: Any) -> tokenizers.Tokenizer:
    """Returns a tokenizer that merges two pieces wherever they make up a third, the one with the highest score first.

    Symbols that the user defined are not merged with anything: they are split off before, and so found as a whole.
    """
    scores = {piece.piece: piece.score for piece in model.pieces if piece.type == _NORMAL}
    pairs = [
        (-score, -end, piece[:end], piece[end:])
        for piece, score in scores.items()
        for end in range(1, len(piece))
        if piece[:end] in scores and piece[end:] in scores
    ]
    return tokenizers.Tokenizer(
        models.BPE(
            {piece.piece: token_id for token_id, piece in enumerate(model.pieces)},
            [(left, right) for _, _, left, right in sorted(pairs)],
            unk_token=model.pieces[model.trainer_spec.unk_id].piece,
            fuse_unk=True,
            byte_fallback=model.trainer_spec.byte_fallback,
            ignore_merges=any(piece.type == _USER_DEFINED for piece in model.pieces),
        )
    )


def _pre_tokenizer(model: Any, special: list[str]) -> pre_tokenizers.PreTokenizer:
    """Returns a step that splits the texts of special pieces after the first character, so that none is found whole."""
    texts = [(text[0], text[1], text[2:]) for text in special if len(text) > 1]
    parts = [("<", "0", "x[0-9A-F]{2}>"), *(tuple(map(re.escape, parts)) for parts in texts)]
    within = Regex("|".join(f"(?<={first}){second}(?={rest})" for first, second, rest in parts))
    steps: list[pre_tokenizers.PreTokenizer] = [pre_tokenizers.Split(within, "merged_with_next")]
    symbols = [piece.piece for piece in model.pieces if piece.type == _USER_DEFINED]
    if symbols and model.trainer_spec.model_type == _BPE:
        whole = Regex("|".join(map(re.escape, sorted(symbols, key=len, reverse=True))))
        steps.insert(0, pre_tokenizers.Split(whole, "isolated"))
    return pre_tokenizers.Sequence(steps)


def _normalizer(spec: Any) -> normalizers.Normalizer:
    steps: list[normalizers.Normalizer] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(" "))
    return normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])


def _decoder(spec: Any) -> decoders.Decoder:
    steps: list[decoders.Decoder] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if spec.add_dummy_prefix or spec.remove_extra_whitespaces:
        steps.append(decoders.Strip(" ", left=1, right=0))
    return decoders.Sequence(steps)

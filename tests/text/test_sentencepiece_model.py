"""SentencePiece models give the tokens and the text that SentencePiece gives, also while streaming."""

from __future__ import annotations

import io
import random
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece

from mpt_grpc.errors import ModelError
from mpt_grpc.text.tokenizer import Tokenizer

SENTENCES = (
    "the little fox said hello to the world",
    "def main():\n    return 1  # the <end>",
    "naïve café 日本語 🦊 hello",
    "It was a cat -- no, a cat --- that sat on the mat 12345 times; and then?",
)
FRAGMENTS = (*SENTENCES, *"abc the-\n\t<>/s日🦊жﬁé", " ", "  ", "    ", "<sep>", "<0x41>")
SYMBOLS = ("<sep>", "▁▁", "▁▁▁▁")
NORMALIZATION = {
    "as SentencePiece does by default": {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True},
    "spaces collapsed": {"normalization_rule_name": "identity", "remove_extra_whitespaces": True},
    "none": {"normalization_rule_name": "identity", "remove_extra_whitespaces": False},
    "no space in front": {
        "normalization_rule_name": "identity", "remove_extra_whitespaces": False, "add_dummy_prefix": False
    },
}  # fmt: skip


def train(path: Path, model_type: str = "unigram", **options: object) -> sentencepiece.SentencePieceProcessor:
    """Writes a model to the path and returns SentencePiece's own reader of it."""
    written = io.BytesIO()
    options = {"vocab_size": 400, "byte_fallback": True, "hard_vocab_limit": False, "minloglevel": 2} | options
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 50), model_writer=written, model_type=model_type, **options
    )
    path.write_bytes(written.getvalue())
    return sentencepiece.SentencePieceProcessor(model_proto=written.getvalue())


def texts() -> list[str]:
    chooser = random.Random(0)
    return ["", " ", *("".join(chooser.choices(FRAGMENTS, k=chooser.randint(1, 12))) for _ in range(150))]


@pytest.mark.parametrize("normalization", NORMALIZATION)
@pytest.mark.parametrize("symbols", [(), SYMBOLS], ids=["plain", "user-defined symbols"])
@pytest.mark.parametrize("has_bytes", [True, False], ids=["byte fallback", "no byte fallback"])
@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
def test_tokens_and_texts_are_those_of_sentencepiece(
    tmp_path: Path, model_type: str, has_bytes: bool, symbols: tuple[str, ...], normalization: str
) -> None:
    options = NORMALIZATION[normalization] | {"user_defined_symbols": symbols, "byte_fallback": has_bytes}
    expected = train(tmp_path / "spiece.model", model_type, **options)
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.vocab_size == expected.get_piece_size()
    for text in texts():
        ids = expected.encode(text)
        assert list(tokenizer.encode(text)) == ids, text
        if expected.unk_id() not in ids:  # SentencePiece writes a sign for it
            assert tokenizer.decode(ids) == expected.decode(ids), text
            whole, pieces = tokenizer.decode(ids), [tokenizer.token_bytes(token_id) for token_id in ids]
            start = b"".join(pieces).decode().removesuffix(whole)  # the space in front of the first word
            assert start in ("", " ")
            for cut in range(0, len(ids), 3):
                streamed = tokenizer.detokenizer(ids[:cut])
                output = "".join(map(streamed.feed, ids[cut:])) + streamed.flush()
                prompt = b"".join(pieces[:cut]).decode(errors="ignore").removeprefix(start)
                assert prompt + output == whole


@pytest.mark.parametrize("symbols", [(), SYMBOLS], ids=["plain", "user-defined symbols"])
@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
def test_special_tokens_are_tokens_only_where_their_text_is_not_plain(
    tmp_path: Path, model_type: str, symbols: tuple[str, ...]
) -> None:
    model = train(tmp_path / "tokenizer.model", model_type, user_defined_symbols=symbols, add_dummy_prefix=False)
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.special_token_ids == {model.unk_id(), model.bos_id(), model.eos_id()}
    assert tokenizer.encode("the</s>")[-1] == model.eos_id()
    for text in ("</s>", "<s>the</s>", "<sep></s><sep>", "<0x41>"):
        ids = list(tokenizer.plain_text_encoder()(text))
        assert model.decode(ids) == text
        assert tokenizer.special_token_ids.isdisjoint(ids)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"model_type": "char"}, "only SentencePiece models of the types unigram and bpe"),
        ({"treat_whitespace_as_suffix": True}, "only SentencePiece models that write spaces as prefixes"),
    ],
)
def test_other_kinds_of_models_are_refused(tmp_path: Path, options: dict[str, str], reason: str) -> None:
    train(tmp_path / "spiece.model", **options)
    with pytest.raises(ModelError, match=rf"spiece\.model: {reason}"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\xff not a model", b"\x12\x02\x18\x02", b"version https://git-lfs\n"])
def test_a_file_that_is_not_a_model_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "spiece.model").write_bytes(content)
    with pytest.raises(ModelError, match=r"spiece\.model: not a SentencePiece model"):
        Tokenizer.from_folder(tmp_path)


def test_without_the_package_the_error_names_the_extra(tmp_path: Path) -> None:
    train(tmp_path / "spiece.model")
    code = (
        "import sys; sys.modules['sentencepiece'] = None; from pathlib import Path;"
        "from mpt_grpc.text.tokenizer import Tokenizer; Tokenizer.from_folder(Path(sys.argv[1]))"
    )
    process = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=False)
    assert "spiece.model: a SentencePiece model without tokenizer.json; install the extra 'convert'" in process.stderr

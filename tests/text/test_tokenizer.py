"""Tokenizers loaded from a folder: IDs, bytes, end-of-sequence tokens, and errors that name the file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from mpt_grpc.errors import ModelError
from mpt_grpc.text.tokenizer import QUICK_SIZE, Tokenizer, encodes_quickly

NEOX = Path(__file__).parents[2].parent / "shared" / "data" / "neox"
CORPUS = ["The little fox said: hello, world! <b>日本語</b> 🦊 naïve café", "one two three, and the little fox again"]


@pytest.fixture(scope="module")
def backend() -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_tokens(["    ", "🐙"])
    backend.add_special_tokens(["<|im_end|>"])
    return backend


@pytest.fixture
def folder(backend: tokenizers.Tokenizer, tmp_path: Path) -> Path:
    backend.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


@pytest.fixture(scope="module")
def neox() -> Tokenizer:
    if not NEOX.is_dir():
        pytest.skip(f"MPT-7B's tokenizer is not available: {NEOX} does not exist")
    return Tokenizer.from_folder(NEOX)


def test_mpt_7b_tokenizer_encodes_hello_world(neox: Tokenizer) -> None:
    assert neox.encode("Hello world") == (12092, 1533)
    assert neox.vocab_size == 50277
    assert neox.eos_token_ids == {0}


def test_token_bytes_match_decode_for_every_token_of_mpt_7b(neox: Tokenizer) -> None:
    for token_id in range(neox.vocab_size):
        text = neox.token_bytes(token_id).decode(errors="replace")
        assert text == neox.decode((token_id,), skip_special_tokens=False)


@pytest.mark.parametrize(
    "text", ["", "Hello world", "日本語のテキスト", "👩‍👩‍👧‍👦 and 🏳️‍🌈", "a    b\n\t", "naïve café"]
)
def test_encoding_and_decoding_preserves_text_and_its_bytes(folder: Path, text: str) -> None:
    tokenizer = Tokenizer.from_folder(folder)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()
    assert all(token_id < tokenizer.vocab_size for token_id in ids)


def test_text_of_a_special_token_is_encoded_as_that_token(folder: Path) -> None:
    tokenizer = Tokenizer.from_folder(folder)
    ids = tokenizer.encode("a<|endoftext|>b")
    assert len(ids) == 3
    assert tokenizer.token_bytes(ids[1]) == b"<|endoftext|>"
    assert tokenizer.decode(ids) == "ab"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "a<|endoftext|>b"


def test_encoding_adds_no_tokens_and_neither_truncates_nor_pads(backend: tokenizers.Tokenizer, tmp_path: Path) -> None:
    truncating = tokenizers.Tokenizer.from_str(backend.to_str())
    truncating.enable_truncation(4)
    truncating.enable_padding(length=4)
    truncating.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    truncating.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.decode(tokenizer.encode("x, y, z and more"), skip_special_tokens=False) == "x, y, z and more"
    assert tokenizer.encode("") == ()


def test_spaces_are_never_cleaned_up(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps({"clean_up_tokenization_spaces": True}))
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.decode(tokenizer.encode("Well , do n't !")) == "Well , do n't !"


def test_added_tokens_are_part_of_the_vocabulary_and_have_bytes(folder: Path, backend: tokenizers.Tokenizer) -> None:
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.vocab_size == backend.get_vocab_size() == 323
    for text in ("    ", "🐙", "<|im_end|>"):
        assert [tokenizer.token_bytes(token_id) for token_id in tokenizer.encode(text)] == [text.encode()]
    assert tokenizer.token_bytes(tokenizer.vocab_size + 5) == b""


def test_token_bytes_of_other_tokenizers_are_those_of_the_decoded_token() -> None:
    backend = tokenizers.Tokenizer(models.WordLevel({"é": 0, "fox": 1}, unk_token="é"))
    tokenizer = Tokenizer(backend)
    assert [tokenizer.token_bytes(token_id) for token_id in range(3)] == ["é".encode(), b"fox", b""]


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, {"<|endoftext|>"}),
        ({"tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast"}}, set()),
        ({"tokenizer_config.json": {"eos_token": "<|endoftext|>"}}, {"<|endoftext|>"}),
        ({"tokenizer_config.json": {"eos_token": {"content": "<|im_end|>", "lstrip": False}}}, {"<|im_end|>"}),
        ({"tokenizer_config.json": {"eos_token": None}}, set()),
        ({"config.json": {"eos_token_id": 0}, "tokenizer_config.json": {"eos_token": "<|im_end|>"}}, {0}),
        ({"config.json": {"eos_token_id": None}, "tokenizer_config.json": {"eos_token": "<|im_end|>"}}, {"<|im_end|>"}),
        ({"generation_config.json": {"eos_token_id": [0, 7]}, "config.json": {"eos_token_id": 3}}, {0, 7}),
    ],
)
def test_eos_tokens_come_from_the_first_file_that_specifies_them(
    folder: Path, backend: tokenizers.Tokenizer, files: dict[str, object], expected: set[int | str]
) -> None:
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    ids = {backend.token_to_id(token) if isinstance(token, str) else token for token in expected}
    assert Tokenizer.from_folder(folder).eos_token_ids == ids


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", "{}"),
        ("tokenizer.json", "no JSON"),
        ("tokenizer_config.json", "{"),
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", '{"eos_token": "<|nowhere|>"}'),
        ("tokenizer_config.json", '{"eos_token": 5}'),
        ("config.json", '{"eos_token_id": "0"}'),
        ("config.json", '{"eos_token_id": true}'),
        ("generation_config.json", '{"eos_token_id": [0, -1]}'),
    ],
)
def test_error_about_an_invalid_file_names_it(folder: Path, name: str, content: str) -> None:
    (folder / name).write_text(content)
    with pytest.raises(ModelError, match=name.replace(".", r"\.")):
        Tokenizer.from_folder(folder)


def test_error_about_a_missing_or_unreadable_tokenizer_names_the_file(folder: Path) -> None:
    (folder / "tokenizer.json").write_bytes(b"\xff\xfe")
    with pytest.raises(ModelError, match=r"tokenizer\.json: cannot be read"):
        Tokenizer.from_folder(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"tokenizer\.json: not found"):
        Tokenizer.from_folder(folder)


def test_plain_text_encoder_returns_no_special_tokens(folder: Path) -> None:
    tokenizer = Tokenizer.from_folder(folder)
    text = "a<|endoftext|>b"
    ids = tokenizer.plain_text_encoder()(text)
    assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()
    assert tokenizer.special_token_ids.isdisjoint(ids)
    assert len(tokenizer.encode(text)) == 3


@pytest.mark.parametrize("character", ["a", "é", "日", "🦊", "\ud800"])
def test_a_text_that_is_quick_to_encode_has_few_bytes_in_any_script(character: str) -> None:
    num_bytes = len(character.encode(errors="surrogatepass"))
    longest = QUICK_SIZE // num_bytes
    assert encodes_quickly(character * longest)
    assert not encodes_quickly(character * (longest + 1))

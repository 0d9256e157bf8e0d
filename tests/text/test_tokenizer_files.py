"""The files beside tokenizer.json mean what they mean in transformers, which is the oracle."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

from mpt_grpc.errors import ModelError
from mpt_grpc.text.template_sources import find_chat_template
from mpt_grpc.text.tokenizer import Tokenizer

TEXTS = (
    "Hello <|im_start|>user",
    "a<|im_end|> b",
    " the fox",
    "<extra> and <|endoftext|>",
    "x <|im_start|> <pad>",
    "a <extra> b<extra>c",
    "日本語",
    "a <|padding|> b",
)
END, PADDING = "<|endoftext|>", "<|padding|>"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=[END, PADDING], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(["the fox and the hello of a user, the fox"], trainer)
    backend.save(str(tmp_path / "tokenizer.json"))
    write(tmp_path, "config.json", {"model_type": "mpt"})
    return tmp_path


def write(folder: Path, name: str, content: Any) -> None:
    (folder / name).write_text(json.dumps(content), encoding="utf-8")


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def next_id(folder: Path) -> int:
    return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size(with_added_tokens=True)


def assert_as_in_transformers(folder: Path) -> Tokenizer:
    expected, tokenizer = AutoTokenizer.from_pretrained(folder), Tokenizer.from_folder(folder)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert list(ids) == expected.encode(text, add_special_tokens=False), text
        assert tokenizer.decode(ids) == expected.decode(ids, skip_special_tokens=True)
    assert tokenizer.eos_token_ids == ({expected.eos_token_id} if expected.eos_token_id is not None else set())
    return tokenizer


def test_tokenizer_json_alone(folder: Path) -> None:
    write(folder, "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})
    assert_as_in_transformers(folder)


@pytest.mark.parametrize("class_name", ["GPT2Tokenizer", "GPTNeoXTokenizer", "CodeGenTokenizer"])
def test_a_vocabulary_and_merges_are_a_tokenizer(folder: Path, class_name: str) -> None:
    first = next_id(folder)
    tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).model.save(str(folder))
    (folder / "tokenizer.json").unlink()
    write(folder, "tokenizer_config.json", {"tokenizer_class": class_name, "add_prefix_space": False})
    write(folder, "added_tokens.json", {"<|im_start|>": first})
    write(folder, "special_tokens_map.json", {"eos_token": END})
    tokenizer, composed = assert_as_in_transformers(folder), "cafe\u0301"
    assert tokenizer.vocab_size == first + 1
    assert list(tokenizer.encode(composed)) == AutoTokenizer.from_pretrained(folder).encode(composed)
    for name in ("vocab.json", "merges.txt"):
        (folder / name).write_text((folder / name).read_text(encoding="utf-8") + "\n\n", encoding="utf-8-sig")
    assert list(tokenizer.encode(composed)) == list(Tokenizer.from_folder(folder).encode(composed))
    (folder / "merges.txt").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ModelError, match=r"merges\.txt: cannot be read: it is a pointer of Git LFS"):
        Tokenizer.from_folder(folder)
    (folder / "merges.txt").write_text("a b c\n")
    with pytest.raises(ModelError, match=r"vocab\.json, merges\.txt: not the files of a byte-level tokenizer"):
        Tokenizer.from_folder(folder)
    write(folder, "tokenizer_config.json", {"tokenizer_class": "BartTokenizer"})
    with pytest.raises(ModelError, match=r"without tokenizer\.json, 'BartTokenizer' is not supported"):
        Tokenizer.from_folder(folder)


def test_added_tokens_json_adds_tokens(folder: Path) -> None:
    first = next_id(folder)
    write(folder, "added_tokens.json", {"<|im_end|>": first + 1, "<|im_start|>": first})
    write(folder, "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END})
    tokenizer = assert_as_in_transformers(folder)
    assert tokenizer.encode("<|im_start|><|im_end|>") == (first, first + 1)


def test_added_tokens_decoder_adds_tokens_with_their_flags(folder: Path) -> None:
    first, flags = next_id(folder), {"lstrip": True, "rstrip": False, "normalized": False, "single_word": False}
    decoder = {
        "0": {"content": END, **flags, "lstrip": False, "special": True},
        str(first): {"content": "<|im_start|>", **flags, "special": True},
        str(first + 1): {"content": "<|im_end|>", **flags, "special": False},
    }
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "added_tokens_decoder": decoder}
    write(folder, "tokenizer_config.json", config)
    write(folder, "special_tokens_map.json", {"eos_token": END})  # ignored if the decoder lists the tokens
    tokenizer = assert_as_in_transformers(folder)
    assert tokenizer.eos_token_ids == {first + 1}


def test_special_tokens_map_names_the_eos_token_and_fills_templates(folder: Path) -> None:
    write(folder, "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>"})
    write(folder, "special_tokens_map.json", {"eos_token": {"content": END}, "additional_special_tokens": ["<extra>"]})
    assert_as_in_transformers(folder)
    assert find_chat_template("auto", folder, "x").tokens["eos_token"] == END


@pytest.mark.parametrize("config", [None, {}, {"tokenizer_class": "GPTNeoXTokenizer"}, {"bos_token": None}])
def test_tokens_that_no_file_names_are_those_of_the_class(folder: Path, config: dict[str, Any] | None) -> None:
    if config is not None:
        write(folder, "tokenizer_config.json", config)
    assert_as_in_transformers(folder)
    expected, tokens = AutoTokenizer.from_pretrained(folder), find_chat_template("auto", folder, "x").tokens
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        assert tokens.get(name) == getattr(expected, name), name


def test_special_tokens_are_added_with_their_flags(folder: Path) -> None:
    flags = {"lstrip": True, "rstrip": True, "normalized": False, "single_word": False}
    write(folder, "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END})
    write(folder, "special_tokens_map.json", {"pad_token": {"content": "<pad>", **flags}, "eos_token": END})
    assert_as_in_transformers(folder)


FLAGS = ("lstrip", "rstrip", "single_word", "normalized")


@pytest.mark.parametrize("flag", [*FLAGS, "special"])
@pytest.mark.parametrize("listed", [True, False])
def test_flags_in_the_configuration_replace_those_in_tokenizer_json(folder: Path, flag: str, listed: bool) -> None:
    content, plain = read(folder / "tokenizer.json"), dict.fromkeys(FLAGS, False) | {"special": True}
    first = next_id(folder)
    content["added_tokens"].append({"id": first, "content": "<extra>", **plain, flag: not listed})
    write(folder, "tokenizer.json", content)
    decoder = {"0": {"content": END, "special": True}, str(first): {"content": "<extra>", **plain, flag: listed}}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "added_tokens_decoder": decoder}
    write(folder, "tokenizer_config.json", config)
    assert_as_in_transformers(folder)


@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize("flag", FLAGS)
@pytest.mark.parametrize(
    ("naming", "is_special"),
    [
        ({"eos_token": "<|im_end|>"}, True),
        ({"turn_token": "<|im_end|>"}, True),
        ({"extra_special_tokens": {"turn": "<|im_end|>"}}, True),
        ({"extra_special_tokens": ["<|im_end|>"]}, False),
        ({"additional_special_tokens": ["<|im_end|>"]}, False),
    ],
)
def test_a_known_token_becomes_special_by_a_name(
    folder: Path, naming: dict[str, Any], is_special: bool, flag: str, listed: bool
) -> None:
    content, first = read(folder / "tokenizer.json"), next_id(folder)
    flags = dict.fromkeys(FLAGS, False) | {"special": False, flag: True}
    content["added_tokens"].append({"id": first, "content": "<|im_end|>", **flags})
    write(folder, "tokenizer.json", content)
    decoder = {"added_tokens_decoder": {str(first): {"content": "<|im_end|>", **flags}}} if listed else {}
    write(folder, "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **naming, **decoder})
    assert (first in assert_as_in_transformers(folder).special_token_ids) == is_special


def test_named_tokens_that_tokenizer_json_lacks_are_added_in_the_order_of_their_names(folder: Path) -> None:
    names = ("mask_token", "cls_token", "pad_token", "sep_token", "unk_token", "image_token")
    tokens = {name: f"<{name}>" for name in names}
    write(folder, "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, **tokens})
    tokenizer, expected = assert_as_in_transformers(folder), AutoTokenizer.from_pretrained(folder)
    text = "".join(tokens.values())
    assert list(tokenizer.encode(text)) == expected.encode(text)


def test_tokens_of_texts_are_not_random(folder: Path) -> None:
    content, text = read(folder / "tokenizer.json"), "the fox and the hello of a user" * 9
    expected = Tokenizer.from_folder(folder).encode(text)
    content["model"]["dropout"] = 0.5
    write(folder, "tokenizer.json", content)
    assert Tokenizer.from_folder(folder).encode(text) == expected


def test_tokens_that_transformers_adds_to_texts_are_known_and_not_added(folder: Path) -> None:
    write(folder, "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": END})
    assert assert_as_in_transformers(folder).omitted_tokens == ()
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.post_processor = processors.TemplateProcessing(single=f"{END} $A", special_tokens=[(END, 0)])
    backend.save(str(folder / "tokenizer.json"))
    assert assert_as_in_transformers(folder).omitted_tokens == (END,)
    assert AutoTokenizer.from_pretrained(folder).encode("")[0] == 0


def test_a_token_that_the_configuration_adds_to_texts_is_known(folder: Path) -> None:
    write(folder, "tokenizer_config.json", {"add_bos_token": True, "add_eos_token": False, "bos_token": END})
    assert Tokenizer.from_folder(folder).omitted_tokens == (END,)


def test_tokenization_without_special_tokens_is_refused(folder: Path) -> None:
    write(folder, "tokenizer_config.json", {"split_special_tokens": True})
    with pytest.raises(ModelError, match="split_special_tokens: special tokens are always recognized"):
        Tokenizer.from_folder(folder)


def test_the_error_for_a_model_without_tokenizer_says_which_one_it_has(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    write(folder, "config.json", {"model_type": "mpt", "tokenizer_name": "EleutherAI/gpt-neox-20b"})
    with pytest.raises(ModelError, match=r"must contain it, .*; config.json names that of 'EleutherAI/gpt-neox-20b'$"):
        Tokenizer.from_folder(folder)


@pytest.mark.parametrize("class_name", ["GPTNeoXTokenizer", "GPT2Tokenizer", "PreTrainedTokenizerFast", None])
@pytest.mark.parametrize("adds", [{"add_prefix_space": True}, {"add_prefix_space": False}, {}])
@pytest.mark.parametrize("adds_otherwise", [True, False])
def test_byte_level_classes_obey_add_prefix_space_of_the_configuration(
    folder: Path, class_name: str | None, adds: dict[str, bool], adds_otherwise: bool
) -> None:
    content = read(folder / "tokenizer.json")
    content["pre_tokenizer"]["add_prefix_space"] = adds_otherwise
    write(folder, "tokenizer.json", content)
    write(folder, "tokenizer_config.json", {"tokenizer_class": class_name, **adds, "eos_token": END})
    assert_as_in_transformers(folder)


def test_a_token_with_an_id_that_is_not_free_is_refused(folder: Path) -> None:
    write(folder, "added_tokens.json", {"<|im_start|>": next_id(folder) + 7})
    with pytest.raises(
        ModelError, match=r"token '<\|im_start\|>' has the ID \d+, but tokenizer.json has room for it at"
    ):
        Tokenizer.from_folder(folder)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize(
    ("field", "value"),
    [("eos_token", 3), ("eos_token", "\ud800"), ("eos_token", {"content": None}), ("additional_special_tokens", "<a>")],
)
def test_a_value_that_is_not_a_token_is_refused(folder: Path, name: str, field: str, value: object) -> None:
    write(folder, name, {field: value})
    with pytest.raises(ModelError, match=rf"{name}: {field}: expected a (list of )?token"):
        Tokenizer.from_folder(folder)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
def test_an_eos_token_that_the_vocabulary_lacks_is_refused(folder: Path, name: str) -> None:
    write(folder, name, {"eos_token": "<|im_end|>"})
    with pytest.raises(
        ModelError, match=rf"eos_token '<\|im_end\|>' is not in tokenizer\.json; correct it in .*{name}"
    ):
        Tokenizer.from_folder(folder)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "added_tokens.json", "config.json"])
def test_an_empty_file_is_refused(folder: Path, name: str) -> None:
    (folder / name).write_text("\n")
    with pytest.raises(ModelError, match=rf"{name}: the file is empty; download it again"):
        Tokenizer.from_folder(folder)


def test_a_link_to_nothing_is_no_missing_file(folder: Path) -> None:
    (folder / "tokenizer_config.json").symlink_to("../blobs/1")
    with pytest.raises(
        ModelError, match=r"tokenizer_config.json: a symbolic link to \.\./blobs/1, which does not exist"
    ):
        Tokenizer.from_folder(folder)


@pytest.mark.timeout(30)
@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json", "tokenizer.json", "config.json"])
def test_a_pipe_in_place_of_a_file_is_refused_without_waiting_for_its_writer(folder: Path, name: str) -> None:
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(ModelError, match=rf"{name}: not a regular file"):
        Tokenizer.from_folder(folder)


def test_a_device_in_place_of_a_file_is_refused(folder: Path) -> None:
    (folder / "tokenizer_config.json").symlink_to("/dev/zero")
    with pytest.raises(ModelError, match=r"tokenizer_config\.json: not a regular file"):
        Tokenizer.from_folder(folder)


@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
def test_an_eos_token_outside_the_vocabulary_is_refused(folder: Path, name: str) -> None:
    write(folder, name, {"model_type": "mpt", "eos_token_id": 50_000})
    with pytest.raises(ModelError, match=rf"{name}: eos_token_id must be a token ID below \d+"):
        Tokenizer.from_folder(folder)

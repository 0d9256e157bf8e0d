"""Chat templates: where they are found, and which takes precedence."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from mpt_grpc.checkpoint import DEMO
from mpt_grpc.conversation import Message
from mpt_grpc.errors import ModelError, SettingsError
from mpt_grpc.text.template_sources import find_chat_template

HI = Message("user", "Hi")


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    """Returns a function that writes a tokenizer_config.json with the given fields and returns its folder."""

    def write(**config: Any) -> Path:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        return tmp_path

    return write


@pytest.mark.parametrize(
    ("name", "stop_strings"),
    [("base", ("\nUser:",)), ("instruct", ("\n### Instruction:",)), ("chatml", ("<|im_end|>",))],
)
def test_built_in_templates_stop_where_the_next_turn_would_begin(name: str, stop_strings: tuple[str, ...]) -> None:
    assert find_chat_template(name, Path("none"), "demo").stop_strings == stop_strings


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("mpt-7b-instruct", "instruct"),
        ("MPT-30B-Instruct", "instruct"),
        ("mpt-7b-chat", "chatml"),
        ("mpt-7b", "base"),
        ("chat-7b", "base"),
    ],
)
def test_model_without_a_template_gets_one_by_its_name(tmp_path: Path, model: str, name: str) -> None:
    assert find_chat_template("auto", tmp_path, model).name == name


def test_template_containing_im_end_uses_it_as_a_stop_string(save: Callable[..., Path]) -> None:
    folder = save(chat_template="{{ messages[0].content }}<|im_end|>")
    assert find_chat_template("auto", folder, "demo").stop_strings == ("<|im_end|>",)


@pytest.mark.parametrize("own", ["own", 7])
def test_given_template_file_takes_precedence_over_the_models_own(
    save: Callable[..., Path], tmp_path: Path, own: Any
) -> None:
    folder = save(chat_template=own, eos_token="</s>")
    file = tmp_path / "mine.jinja"
    file.write_text("{{ messages[0].content }}{{ eos_token }}")
    template = find_chat_template(str(file), folder, "demo")
    assert (template.name, template.stop_strings, template.render([HI])) == ("file", (), "Hi</s>")
    assert find_chat_template("base", folder, "demo").name == "base"


def prompt(wanted: str, folder: Path) -> str:
    return find_chat_template(wanted, folder, "demo").render([HI])


@pytest.mark.parametrize("in_files", [True, False])
@pytest.mark.parametrize("names", [("default",), ("default", "rag", "base"), ("rag", "tool_use")])
def test_the_models_templates_are_those_that_transformers_saves(
    tmp_path: Path, names: tuple[str, ...], in_files: bool
) -> None:
    templates = {name: f"{name}: {{{{ messages[0].content }}}}" for name in names}
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(DEMO / "tokenizer.json"), chat_template=templates)
    tokenizer.save_pretrained(tmp_path, save_jinja_files=in_files)
    for name in set(names) - {"base"}:
        template = find_chat_template(name, tmp_path, "demo")
        assert (template.name, template.render([HI])) == ("model", f"{name}: Hi")
    expected = prompt("default" if "default" in names else "base", tmp_path)
    assert prompt("auto", tmp_path) == expected
    assert find_chat_template("base", tmp_path, "demo").name == "base"


def test_template_files_replace_the_templates_of_the_tokenizer_config(save: Callable[..., Path]) -> None:
    folder = save(chat_template="config")
    (folder / "chat_template.jinja").write_text("file")
    assert prompt("auto", folder) == "file"


def test_an_object_of_templates_is_read_as_transformers_does(save: Callable[..., Path]) -> None:
    folder = save(chat_template={"default": "own", "rag": "another"})
    (folder / "tokenizer.json").write_bytes((DEMO / "tokenizer.json").read_bytes())
    expected = PreTrainedTokenizerFast.from_pretrained(folder)
    conversation = [{"role": "user", "content": "Hi"}]
    for wanted, name in (("auto", None), ("rag", "rag")):
        text = expected.apply_chat_template(conversation, chat_template=name, tokenize=False)
        assert prompt(wanted, folder) == text


def test_a_list_without_a_default_is_reported_with_what_is_used_instead(
    save: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    folder = save(chat_template=[{"name": name, "template": "own"} for name in ("rag", "tool_use")])
    with caplog.at_level(logging.WARNING):
        assert find_chat_template("auto", folder, "mpt-7b-chat").name == "chatml"
    assert "so the built-in 'chatml' is used; select one of its own with --chat-template: rag, tool_use" in caplog.text
    caplog.clear()
    assert prompt("rag", folder) == "own"
    assert not caplog.records


@pytest.mark.parametrize("text", ["{{ messages[0].content }}{{ eos_token }}", "{% if true %}Hi</s>{% endif %}"])
@pytest.mark.parametrize("own", [None, "own", 7])
def test_a_given_text_takes_precedence_over_the_models_own(save: Callable[..., Path], text: str, own: Any) -> None:
    template = find_chat_template(text, save(chat_template=own, eos_token="</s>"), "demo")
    assert (template.name, template.render([HI])) == ("text", "Hi</s>")


def test_an_unknown_template_is_refused_with_those_that_there_are(save: Callable[..., Path]) -> None:
    folder = save(chat_template=[{"name": "rag", "template": "own"}])
    expected = "--chat-template: expected auto, base, instruct, chatml, rag, a Jinja file, or a text .* got 'alpaca'"
    for wanted in ("alpaca", "default"):
        with pytest.raises(SettingsError, match=expected.replace("alpaca", wanted)):
            find_chat_template(wanted, folder, "demo")


def test_a_template_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.jinja").write_bytes(b"\xff")
    with pytest.raises(SettingsError, match=r"--chat-template: .*mine\.jinja: cannot be read"):
        find_chat_template(str(tmp_path / "mine.jinja"), tmp_path, "demo")


def test_syntax_error_in_a_given_template_is_reported_with_its_line(tmp_path: Path) -> None:
    file, text = tmp_path / "mine.jinja", "{% for m in messages %}\n{{ m.content }}\n{% endif %}"
    file.write_text(text)
    for wanted, where in ((str(file), r"mine\.jinja, line 3: "), (text, "^--chat-template: line 3: ")):
        with pytest.raises(SettingsError, match=where):
            find_chat_template(wanted, tmp_path, "demo")


@pytest.mark.parametrize(
    "template",
    ["a\n{% if %}", 7, [{"name": "default", "template": 7}], {"default": 7}],
)
def test_invalid_template_of_a_model_raises_model_error(save: Callable[..., Path], template: Any) -> None:
    folder = save(chat_template=template)
    with pytest.raises(ModelError, match=str(folder)):
        find_chat_template("auto", folder, "demo")
    assert find_chat_template("base", folder, "demo").name == "base"


def test_an_empty_template_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").touch()
    with pytest.raises(ModelError, match=r"chat_template\.jinja: the file is empty; download it again"):
        find_chat_template("auto", tmp_path, "demo")
    assert find_chat_template("base", tmp_path, "demo").name == "base"


@pytest.mark.parametrize("template", ["", [], {}])
def test_an_empty_value_is_no_template(save: Callable[..., Path], template: Any) -> None:
    assert find_chat_template("auto", save(chat_template=template), "mpt-7b-chat").name == "chatml"


def test_tokenizer_config_that_is_not_json_raises_model_error(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ModelError, match=r"tokenizer_config\.json"):
        find_chat_template("auto", tmp_path, "demo")


@pytest.mark.parametrize(
    "source", ["{% if x %}" * 3000, "{% for x in y %}" * 25 + "{% endfor %}" * 25, f"{{{{ 1{'0' * 5000} }}}}"]
)
def test_a_template_that_python_cannot_compile_is_refused_in_one_line(tmp_path: Path, source: str) -> None:
    (tmp_path / "chat_template.jinja").write_text(source)
    with pytest.raises(ModelError, match="invalid chat template 'default', line 1: ") as error:
        find_chat_template("auto", tmp_path, "x")
    assert "\n" not in str(error.value)

"""Finds the chat template: in the model's files, among the built-in ones in `templates/`, or in what was given."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path

from jinja2 import TemplateSyntaxError

from mpt_grpc.errors import ModelError, SettingsError
from mpt_grpc.model_files import read_text
from mpt_grpc.text.chat_template import ChatTemplate, compiled, takes_tools
from mpt_grpc.text.tokenizer_config import read_tokenizer_config

_log = logging.getLogger(__name__)
_FOLDER = Path(__file__).with_name("templates")
_BUILT_IN = {"base": ("\nUser:",), "instruct": ("\n### Instruction:",), "chatml": ("<|im_end|>",)}
"""The built-in templates, each with the strings that end the assistant's message."""
_BY_NAME_SUFFIX = {"-instruct": "instruct", "-chat": "chatml"}


def find_chat_template(wanted: str, folder: Path, model_name: str) -> ChatTemplate:
    """Returns the template that `wanted` specifies.

    wanted: in this order, a template's text, which contains `{{` or `{%`; 'base', 'instruct' or 'chatml'; the path of a
      Jinja file; or the name of a template in the model's files. 'auto' is the model's default template, else the
      built-in one for the suffix of the model's name, else 'base'.
    Raises ModelError or SettingsError if the template cannot be read.
    """
    config = read_tokenizer_config(folder)
    tokens = config.special_tokens
    if "{{" in wanted or "{%" in wanted:
        return _given("text", wanted, tokens, "--chat-template:")
    if wanted in _BUILT_IN:
        return _built_in(wanted, tokens)
    if os.path.isfile(wanted):
        return _given("file", _read(wanted), tokens, f"--chat-template: {wanted},")
    own = _own_sources(folder, config.chat_template)
    name = "default" if wanted == "auto" else wanted
    if name in own:
        try:
            return _from_source("model", own[name], tokens)
        except TemplateSyntaxError as error:
            raise ModelError(
                f"{folder}: invalid chat template {name!r}, line {error.lineno}: {error.message}"
            ) from error
    if wanted != "auto":
        names = ", ".join(("auto", *_BUILT_IN, *own))
        why = f"expected {names}, a Jinja file, or a text with {{{{ or {{%, got {wanted!r}"
        raise SettingsError(f"--chat-template: {why}")
    matching = (name for suffix, name in _BY_NAME_SUFFIX.items() if model_name.lower().endswith(suffix))
    built_in = next(matching, "base")
    if own:
        _log.warning(
            "no chat template of the model is its default, so the built-in %r is used; select one of its own with"
            " --chat-template: %s",
            built_in,
            ", ".join(own),
        )
    return _built_in(built_in, tokens)


def _own_sources(folder: Path, configured: object) -> dict[str, str]:
    """Returns the checkpoint's templates by name, as transformers finds them.

    Template files, if there are any, replace `configured`, the chat_template of tokenizer_config.json.
    """
    additional = sorted((folder / "additional_chat_templates").glob("*.jinja"))
    paths = {"default": folder / "chat_template.jinja", **{path.stem: path for path in additional}}
    texts = {name: text for name, path in paths.items() if (text := read_text(path)) is not None}
    if texts or not configured:
        return texts
    match configured:
        case str():
            return {"default": configured}
        case list():
            entries = [(entry.get("name"), entry.get("template")) for entry in configured if isinstance(entry, dict)]
            named = [(name, text) for name, text in entries if isinstance(name, str) and isinstance(text, str)]
            if len(named) == len(configured):
                return dict(named)
        case dict() if all(isinstance(text, str) for text in configured.values()):
            return configured
    why = "chat_template must be a string, or named templates in a list or an object"
    raise ModelError(f"{folder / 'tokenizer_config.json'}: {why}")


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"--chat-template: {path}: cannot be read: {error}") from error


def _given(name: str, source: str, tokens: Mapping[str, str], where: str) -> ChatTemplate:
    try:
        return _from_source(name, source, tokens)
    except TemplateSyntaxError as error:
        raise SettingsError(f"{where} line {error.lineno}: {error.message}") from error


def _from_source(name: str, source: str, tokens: Mapping[str, str]) -> ChatTemplate:
    stop_strings = ("<|im_end|>",) if "<|im_end|>" in source else ()
    return ChatTemplate(name, stop_strings, compiled(source), tokens, takes_tools(source))


def _built_in(name: str, tokens: Mapping[str, str]) -> ChatTemplate:
    source = (_FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    return ChatTemplate(name, _BUILT_IN[name], compiled(source), tokens)

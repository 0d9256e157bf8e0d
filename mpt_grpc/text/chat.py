"""Renders conversations as prompts, with the model's own chat template or a built-in one from `templates/`."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import dropwhile
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import Template, TemplateSyntaxError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mpt_grpc.errors import FieldViolation, InvalidRequestError, ModelError, SettingsError
from mpt_grpc.model_files import read_text
from mpt_grpc.request import Conversation, Message
from mpt_grpc.text.tokenizer_config import read_tokenizer_config

MAX_MESSAGES = 1024
_log = logging.getLogger(__name__)
_FOLDER = Path(__file__).with_name("templates")
_BUILT_IN = {"base": ("\nUser:",), "instruct": ("\n### Instruction:",), "chatml": ("<|im_end|>",)}
"""The built-in templates, each with the strings that end the assistant's message."""
_BY_NAME_SUFFIX = {"-instruct": "instruct", "-chat": "chatml"}
_ROLES = ("system", "user", "assistant")
_FIELD = "conversation.messages"


class _RefusedByTemplateError(Exception):
    """Raised by the template itself, through `raise_exception`."""


@dataclass(frozen=True)
class ChatTemplate:
    """Renders conversations as prompts."""

    name: str
    """'base', 'instruct' or 'chatml'; 'model' if it is from the model's files, 'file' if it is from a given file."""
    stop_strings: tuple[str, ...]
    """The strings that end the assistant's message, in addition to the end-of-sequence token."""
    template: Template
    tokens: Mapping[str, str]
    """The special tokens that the template may refer to, such as `eos_token`."""

    def render(self, messages: Sequence[Message]) -> str:
        """Returns the prompt for the assistant's next message. Raises InvalidRequestError if the template fails."""
        turns = [{"role": message.role, "content": message.content} for message in messages]
        try:
            # Templates check for tools and documents, and many distinguish None from undefined.
            absent = dict.fromkeys(("tools", "documents"))
            return self.template.render(messages=turns, add_generation_prompt=True, **absent, **self.tokens)
        except _RefusedByTemplateError as error:
            raise InvalidRequestError(
                FieldViolation(_FIELD, f"refused by the model's chat template: {error}")
            ) from error
        except Exception as error:  # a template is a program and may fail in any way
            why = f"the model's chat template fails on these messages ({type(error).__name__}): use others"
            raise InvalidRequestError(FieldViolation(_FIELD, why)) from error


def find_chat_template(wanted: str, folder: Path, model_name: str) -> ChatTemplate:
    """Returns the template that `wanted` specifies: 'base', 'instruct', 'chatml', the path of a Jinja file, or 'auto'.

    'auto' uses the template in the model's folder; else the one for the suffix of the model's name; else 'base'.
    Raises ModelError or SettingsError if the template cannot be read.
    """
    config = read_tokenizer_config(folder)
    tokens = config.special_tokens
    if wanted in _BUILT_IN:
        return _built_in(wanted, tokens)
    if wanted != "auto":
        try:
            source = Path(wanted).read_text(encoding="utf-8")
            return _from_source("file", source, tokens)
        except (OSError, UnicodeDecodeError) as error:
            known = ", ".join(_BUILT_IN)
            cause = error.strerror if isinstance(error, OSError) else error
            why = f"expected auto, {known} or a readable file, got {wanted!r}: {cause}"
            raise SettingsError(f"--chat-template: {why}") from error
        except TemplateSyntaxError as error:
            raise SettingsError(f"--chat-template: {wanted}, line {error.lineno}: {error}") from error
    if (own := _own_source(folder, config.chat_template)) is not None:
        try:
            return _from_source("model", own, tokens)
        except TemplateSyntaxError as error:
            raise ModelError(f"{folder}: invalid chat template, line {error.lineno}: {error}") from error
    matching = (name for suffix, name in _BY_NAME_SUFFIX.items() if model_name.lower().endswith(suffix))
    return _built_in(next(matching, "base"), tokens)


def conversation_token_ids(
    conversation: Conversation,
    template: ChatTemplate,
    encode: Callable[[str], tuple[int, ...]],
    max_context_tokens: int,
    max_new_tokens: int | None,
) -> tuple[int, ...]:
    """Returns the prompt's tokens, leaving space in the context for `max_new_tokens`, or for one token if it is None.

    If the conversation allows it, as many of the oldest turns as necessary are dropped. Raises InvalidRequestError.
    """
    _check(conversation.messages)
    num_new_tokens = 1 if max_new_tokens is None else max_new_tokens
    max_prompt_tokens = max_context_tokens - num_new_tokens

    def tokens_without(turns: int) -> tuple[int, ...]:
        return encode(template.render(candidates[turns]))

    candidates = _shortened(_with_one_leading_system_message(conversation.messages))
    token_ids = tokens_without(0)
    if len(token_ids) <= max_prompt_tokens:
        return token_ids
    shortest = tokens_without(len(candidates) - 1) if conversation.drop_oldest_turns else token_ids
    if len(shortest) > max_prompt_tokens:
        remedy = "the last message" if conversation.drop_oldest_turns else "the messages or set drop_oldest_turns"
        lengths = f"{len(shortest)} + {num_new_tokens} tokens (prompt + output)"
        why = f"{lengths} exceed the context of {max_context_tokens}: shorten {remedy}"
        raise InvalidRequestError(FieldViolation(_FIELD, why))
    # Binary search: the smallest sufficient number of turns to drop is above `too_few`, and at most `enough`.
    too_few, enough = 0, len(candidates) - 1
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        token_ids = tokens_without(middle)
        if len(token_ids) <= max_prompt_tokens:
            enough, shortest = middle, token_ids
        else:
            too_few = middle
    return shortest


def _check(messages: Sequence[Message]) -> None:
    violations = []
    if not 1 <= len(messages) <= MAX_MESSAGES:
        raise InvalidRequestError(FieldViolation(_FIELD, f"{len(messages)} messages; 1 to {MAX_MESSAGES} are allowed"))
    for index, message in enumerate(messages):
        field = f"{_FIELD}[{index}].role"
        if message.role not in _ROLES:
            violations.append(FieldViolation(field, f"unknown role: use one of {', '.join(_ROLES)}"))
    if messages[-1].role in ("system", "assistant"):
        why = "the last message must have the role 'user': the assistant replies to it"
        violations.append(FieldViolation(f"{_FIELD}[{len(messages) - 1}].role", why))
    if violations:
        raise InvalidRequestError(*violations)


def _with_one_leading_system_message(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """Merges the leading system messages, of which most templates expect one; later ones are left to the template."""
    rest = list(dropwhile(lambda message: message.role == "system", messages))
    leading = messages[: len(messages) - len(rest)]
    if len(leading) < 2:
        return messages
    return (Message("system", "\n\n".join(message.content for message in leading)), *rest)


def _shortened(messages: tuple[Message, ...]) -> list[tuple[Message, ...]]:
    """Returns the messages without their 0, 1, 2, ... oldest turns.

    A turn is a user message and everything up to the next user message.
    """
    system = messages[:1] if messages[0].role == "system" else ()
    starts = [i for i, message in enumerate(messages) if message.role == "user" and i > len(system)]
    return [messages, *(system + messages[start:] for start in starts)]


def _built_in(name: str, tokens: Mapping[str, str]) -> ChatTemplate:
    source = (_FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    return ChatTemplate(name, _BUILT_IN[name], _compiled(source), tokens)


def _from_source(name: str, source: str, tokens: Mapping[str, str]) -> ChatTemplate:
    stop_strings = ("<|im_end|>",) if "<|im_end|>" in source else ()
    return ChatTemplate(name, stop_strings, _compiled(source), tokens)


class _GenerationTag(Extension):
    """Renders the content of `{% generation %}`, with which templates mark the text to train on."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 declares it so)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _compiled(source: str) -> Template:
    """Compiles a template as transformers does, in a sandbox because templates come from untrusted sources."""
    extensions = [loopcontrols, _GenerationTag]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().astimezone().strftime(form)
    return environment.from_string(source)


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    # Jinja's own filter would escape for HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _raise_exception(message: str) -> NoReturn:
    raise _RefusedByTemplateError(message)


def _own_source(folder: Path, own: object) -> str | None:
    """Returns the checkpoint's template: its own file, or `own`, the chat_template of tokenizer_config.json."""
    if (source := read_text(folder / "chat_template.jinja")) is not None:
        return source
    if isinstance(own, list):
        named = {entry.get("name"): entry.get("template") for entry in own if isinstance(entry, dict)}
        if named and "default" not in named:
            names = ", ".join(map(str, named))
            _log.warning("tokenizer_config.json has no default chat template, so its others are not used: %s", names)
        own = named.get("default")
    if own is not None and not isinstance(own, str):
        raise ModelError(
            f"{folder / 'tokenizer_config.json'}: chat_template must be a string or a list of named templates"
        )
    return own

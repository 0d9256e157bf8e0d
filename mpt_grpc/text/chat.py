"""Conversations to prompts: the model's own chat template, or one of the built-in ones in `templates/`."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import Template, TemplateSyntaxError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mpt_grpc.errors import FieldViolation, InvalidRequestError, ModelError, SettingsError
from mpt_grpc.request import Conversation, Message

MAX_MESSAGES = 1024
_FOLDER = Path(__file__).with_name("templates")
_BUILT_IN = {"base": ("\nUser:",), "instruct": ("\n### Instruction:",), "chatml": ("<|im_end|>",)}
"""The built-in templates, and the strings that end an answer."""
_BY_ENDING = {"-instruct": "instruct", "-chat": "chatml"}
_ROLES = ("system", "user", "assistant")
_FIELD = "conversation.messages"


class _RefusedByTemplateError(Exception):
    """The template's own `raise_exception`."""


@dataclass(frozen=True)
class ChatTemplate:
    """Makes prompts of conversations."""

    name: str
    """'base', 'instruct' or 'chatml', 'model' for the one in the model's files, 'file' for one that was given."""
    stop_strings: tuple[str, ...]
    """What ends the assistant's answer, beside the end mark."""
    template: Template
    tokens: dict[str, str]
    """The special tokens that the template may name, such as `eos_token`."""

    def render(self, messages: Sequence[Message]) -> str:
        """The prompt that the assistant's next message follows. Raises InvalidRequestError if the template refuses."""
        turns = [{"role": message.role, "content": message.content} for message in messages]
        try:
            # Templates ask whether there are tools and documents: none is not the same as undefined.
            absent = dict.fromkeys(("tools", "documents"))
            return self.template.render(messages=turns, add_generation_prompt=True, **absent, **self.tokens)
        except _RefusedByTemplateError as error:
            raise InvalidRequestError(FieldViolation(_FIELD, f"the model's chat template says: {error}")) from error
        except Exception as error:  # a template computes, and may do so wrongly in any way
            why = f"the model's chat template fails on them ({type(error).__name__}): use other messages"
            raise InvalidRequestError(FieldViolation(_FIELD, why)) from error


def find_chat_template(wanted: str, folder: Path, model_name: str) -> ChatTemplate:
    """The template called `wanted`: 'base', 'instruct', 'chatml', a Jinja file, or 'auto'.

    'auto' takes the one in the model's folder, else one by how the model's name ends, else 'base'. Raises ModelError
    or SettingsError for one that cannot be read.
    """
    config = _tokenizer_config(folder)
    tokens = _special_tokens(config)
    if wanted in _BUILT_IN:
        return _built_in(wanted, tokens)
    if wanted != "auto":
        try:
            source = Path(wanted).read_text(encoding="utf-8")
            return _from_source("file", source, tokens)
        except (OSError, UnicodeDecodeError) as error:
            known = ", ".join(_BUILT_IN)
            raise SettingsError(f"--chat-template: {wanted} is no file, nor auto, {known}: {error}") from error
        except TemplateSyntaxError as error:
            raise SettingsError(f"--chat-template: {wanted}, line {error.lineno}: {error}") from error
    if (own := _own_source(folder, config)) is not None:
        try:
            return _from_source("model", own, tokens)
        except TemplateSyntaxError as error:
            raise ModelError(f"{folder}: its chat template cannot be read, line {error.lineno}: {error}") from error
    endings = (name for ending, name in _BY_ENDING.items() if model_name.lower().endswith(ending))
    return _built_in(next(endings, "base"), tokens)


def conversation_token_ids(
    conversation: Conversation,
    template: ChatTemplate,
    encode: Callable[[str], tuple[int, ...]],
    max_context_tokens: int,
    max_new_tokens: int | None,
) -> tuple[int, ...]:
    """The prompt in tokens, with room for `max_new_tokens`, or for one if that is None.

    The oldest turns are left out as far as they must, if the conversation allows it. Raises InvalidRequestError.
    """
    _check(conversation.messages)
    num_new_tokens = 1 if max_new_tokens is None else max_new_tokens
    room = max_context_tokens - num_new_tokens

    def tokens_without(turns: int) -> tuple[int, ...]:
        return encode(template.render(kept[turns]))

    kept = _shortened(conversation.messages)
    token_ids = tokens_without(0)
    if len(token_ids) <= room:
        return token_ids
    shortest = tokens_without(len(kept) - 1) if conversation.drop_oldest_turns else token_ids
    if len(shortest) > room:
        remedy = "shorten the last message" if conversation.drop_oldest_turns else "shorten them or drop_oldest_turns"
        why = f"{len(shortest)} tokens and {num_new_tokens} new ones exceed the context of {max_context_tokens}"
        raise InvalidRequestError(FieldViolation(_FIELD, f"{why}: {remedy}"))
    # The fewest turns to leave out are between `too_few` and `enough`.
    too_few, enough = 0, len(kept) - 1
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        token_ids = tokens_without(middle)
        if len(token_ids) <= room:
            enough, shortest = middle, token_ids
        else:
            too_few = middle
    return shortest


def _check(messages: Sequence[Message]) -> None:
    violations = []
    if not 1 <= len(messages) <= MAX_MESSAGES:
        raise InvalidRequestError(FieldViolation(_FIELD, f"{len(messages)}, at least 1 and at most {MAX_MESSAGES}"))
    for index, message in enumerate(messages):
        field = f"{_FIELD}[{index}].role"
        if message.role not in _ROLES:
            violations.append(FieldViolation(field, f"unknown: set one of {', '.join(_ROLES)}"))
        elif message.role == "system" and index > 0:
            violations.append(FieldViolation(field, "only the first message may be the system's"))
    if messages[-1].role in ("system", "assistant"):
        why = "the last message must be the user's: the assistant answers it"
        violations.append(FieldViolation(f"{_FIELD}[{len(messages) - 1}].role", why))
    if violations:
        raise InvalidRequestError(*violations)


def _shortened(messages: tuple[Message, ...]) -> list[tuple[Message, ...]]:
    """The messages without 0, 1, 2 … of their oldest turns. A turn is the user's and all up to the user's next."""
    system = messages[:1] if messages[0].role == "system" else ()
    starts = [i for i, message in enumerate(messages) if message.role == "user" and i > len(system)]
    return [messages, *(system + messages[start:] for start in starts)]


def _built_in(name: str, tokens: dict[str, str]) -> ChatTemplate:
    source = (_FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    return ChatTemplate(name, _BUILT_IN[name], _compiled(source), tokens)


def _from_source(name: str, source: str, tokens: dict[str, str]) -> ChatTemplate:
    stop_strings = ("<|im_end|>",) if "<|im_end|>" in source else ()
    return ChatTemplate(name, stop_strings, _compiled(source), tokens)


class _GenerationTag(Extension):
    """`{% generation %}`, with which templates mark what is trained on: here just what it encloses."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 declares it so)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _compiled(source: str) -> Template:
    """As transformers compiles it, in a sandbox: a template is data from a stranger."""
    extensions = [loopcontrols, _GenerationTag]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().astimezone().strftime(form)
    return environment.from_string(source)


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    # Jinja's own would escape for HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _raise_exception(message: str) -> NoReturn:
    raise _RefusedByTemplateError(message)


def _own_source(folder: Path, config: dict[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ModelError(f"{file}: cannot be read: {error}") from error
    own = config.get("chat_template")
    if isinstance(own, list):
        entries = [entry for entry in own if isinstance(entry, dict)]
        own = next((entry.get("template") for entry in entries if entry.get("name") == "default"), None)
    if own is not None and not isinstance(own, str):
        raise ModelError(f"{folder / 'tokenizer_config.json'}: chat_template must be a string or a list of them")
    return own


def _tokenizer_config(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer_config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read: {error}") from error
    return config if isinstance(config, dict) else {}


def _special_tokens(config: dict[str, Any]) -> dict[str, str]:
    """bos_token, eos_token and so on, as they are spelt."""
    tokens = {}
    for key, value in config.items():
        spelt = value.get("content") if isinstance(value, dict) else value
        if key.endswith("_token") and isinstance(spelt, str):
            tokens[key] = spelt
    return tokens

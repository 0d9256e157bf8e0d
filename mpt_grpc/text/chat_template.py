"""A chat template: a Jinja program, compiled in a sandbox, that renders a conversation as a prompt."""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import Template, TemplateSyntaxError, meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mpt_grpc.conversation import Message, Tool
from mpt_grpc.errors import FieldViolation, InvalidRequestError
from mpt_grpc.text.literals import applied
from mpt_grpc.text.tools import CALL_START, argument_values, function

_MAX_SHOWN = 200
# Ends with a space, so that it shows whether the template removes whitespace there.
_END = "<END OF THE CONTINUED MESSAGE> "


class _RefusedByTemplateError(Exception):
    """Raised by the template itself, through `raise_exception`."""


@dataclass(frozen=True)
class ChatTemplate:
    """Renders conversations as prompts."""

    name: str
    """'base', 'instruct' or 'chatml'; 'model' if it is from the model's files; 'file' or 'text' if it is from a given
    file or text."""
    stop_strings: tuple[str, ...]
    """The strings that end the assistant's message, in addition to the end-of-sequence token."""
    template: Template
    tokens: Mapping[str, str]
    """The special tokens that the template may refer to, such as `eos_token`."""
    takes_tools: bool = False
    """Whether the template itself shows tools, calls and results, in the format that the server reads."""

    @property
    def reserved_names(self) -> frozenset[str]:
        """The variables that `render` and the sandbox set, which `kwargs` cannot replace."""
        return frozenset(("messages", "add_generation_prompt", *_FUNCTIONS, *self.tokens))

    def render(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        kwargs: Mapping[str, Any] | None = None,
        tools: Sequence[Tool] = (),
        change: Callable[[str], str] = str,
        values_of: Callable[[str], Any] = argument_values,
        continue_final_message: bool = False,
    ) -> str:
        """Returns the prompt for the assistant's next message, whose beginning `add_generation_prompt` adds, or for the
        rest of the last message if `continue_final_message`.

        `kwargs` are further variables of the template. `change` is applied to all that the caller wrote. `values_of`
        parses the arguments of calls. Raises InvalidRequestError if the template fails.
        """
        names = {call.id: call.name for message in messages for call in message.tool_calls}
        variables = {
            # Templates check for tools and documents, and many distinguish None from undefined.
            **dict.fromkeys(("tools", "documents")),
            **applied(change, kwargs or {}),
            **self.tokens,
            **({"tools": [applied(change, function(tool)) for tool in tools]} if tools else {}),
            "messages": [_variables(message, names, change, values_of) for message in messages],
            "add_generation_prompt": add_generation_prompt and not continue_final_message,
        }
        if continue_final_message:
            variables["messages"][-1]["content"] += _END
        try:
            prompt = self.template.render(variables)
            prompt.encode()  # which fails on a lone surrogate, as the tokenizer would
            return _before_end(prompt) if continue_final_message else prompt
        except _RefusedByTemplateError as error:
            what = "refused by the model's chat template"
            why = ": ".join(filter(None, (what, _shown(error))))
            raise _invalid(why, what + _place(error)) from error
        except Exception as error:  # a template is a program and may fail in any way
            given = "these messages and chat_template_kwargs" if kwargs else "these messages"
            what = type(error).__name__ + _place(error)
            why = f"the model's chat template fails on {given}: use others, or another template"
            raise _invalid(f"{why} ({what}: {_shown(error)})", f"{why} ({what})") from error


def _invalid(why: str, logged: str) -> InvalidRequestError:
    """Returns the error for messages; a template may quote them in `why`, and the log has `logged` instead."""
    return InvalidRequestError(FieldViolation("conversation.messages", why, logged=logged))


def _shown(error: Exception) -> str:
    """Returns the message of an error on one line, or its beginning."""
    text = " ".join(str(error).split())
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}…"


def _place(error: Exception) -> str:
    """Returns the line of the template on which an error occurred; Jinja adds it to the traceback."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == "<template>"]
    return f" on line {lines[-1]}" if lines else ""


def _before_end(prompt: str) -> str:
    """Returns a prompt up to the end of the message that is continued."""
    end = prompt.rfind(_END.strip())
    if end < 0:
        raise _RefusedByTemplateError("it does not show the last message, which therefore cannot be continued")
    return prompt[:end] if prompt.startswith(_END, end) else prompt[:end].rstrip()


def _variables(
    message: Message, names: Mapping[str, str], change: Callable[[str], str], values_of: Callable[[str], Any]
) -> dict[str, Any]:
    """Returns a message as transformers passes it; `names` maps IDs of calls to names of tools."""
    variables: dict[str, Any] = {"role": message.role, "content": change(message.content)}
    if message.tool_calls:
        variables["tool_calls"] = [
            {
                "id": change(call.id),
                "type": "function",
                "function": {
                    "name": call.name,
                    "arguments": applied(change, values_of(call.arguments), to_names=True),
                },
            }
            for call in message.tool_calls
        ]
    if message.tool_call_id:
        variables["tool_call_id"] = change(message.tool_call_id)
    if message.tool_call_id in names:
        variables["name"] = names[message.tool_call_id]
    return variables


def takes_tools(source: str) -> bool:
    """Whether a template uses the variable `tools`, and writes calls in the format that the server reads."""
    return CALL_START in source and "tools" in meta.find_undeclared_variables(_environment().parse(source))


def compiled(source: str) -> Template:
    """Compiles a template as transformers does, in a sandbox because templates come from untrusted sources.

    Raises jinja2.TemplateSyntaxError.
    """
    try:
        return _environment().from_string(source)
    except TemplateSyntaxError:
        raise
    except Exception as error:  # those of Python, to which Jinja translates a template: of its depth or its numbers
        why = " ".join(str(error).split()) or type(error).__name__
        raise TemplateSyntaxError(why, lineno=1) from error


def _environment() -> ImmutableSandboxedEnvironment:
    extensions = [loopcontrols, _GenerationTag]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.filters["tojson"] = _to_json
    environment.globals.update(_FUNCTIONS)
    return environment


class _GenerationTag(Extension):
    """Renders the content of `{% generation %}`, with which templates mark the text to train on."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 declares it so)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    # Jinja's own filter would escape for HTML. The order of the options is that of transformers.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise _RefusedByTemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().astimezone().strftime(form)


_FUNCTIONS = {"raise_exception": _raise_exception, "strftime_now": _strftime_now}

"""Compares the tokenizer and the chat template with transformers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpt_grpc.checkpoint import Checkpoint
from mpt_grpc.conversation import Message
from mpt_grpc.model_files import read_json
from mpt_grpc.settings import ModelSettings
from mpt_grpc.text.chat_template import ChatTemplate
from mpt_grpc.text.template_sources import find_chat_template
from mpt_grpc.text.tokenizer import Tokenizer
from mpt_grpc.verification.check import Check
from mpt_grpc.verification.texts import CONVERSATIONS, TEXTS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def text_checks(wanted: ModelSettings, checkpoint: Checkpoint) -> Iterator[Check]:
    """Yields the results in turn. Raises ModelError or SettingsError if a file cannot be read."""
    folder = checkpoint.folder
    tokenizer = Tokenizer.from_folder(folder)
    template = find_chat_template(wanted.chat_template, folder, checkpoint.name)
    try:
        peer = _peer(folder)
    except Exception as error:  # whatever the files make it raise
        why = str(error).partition("\n")[0]
        yield Check("tokenizer", "skipped", f"transformers cannot load it: {why}")
        return
    yield _ids_check(tokenizer, peer)
    yield _decoding_check(tokenizer, peer)
    if template.name == "model":
        name = None if wanted.chat_template in ("auto", "default") else wanted.chat_template
        yield _template_check(template, peer, name)
    else:
        yield Check("chat template", "skipped", f"served with {template.name!r} instead of one from the checkpoint")


def _peer(folder: Path) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer, MptConfig

    # transformers, which may refuse the configuration, needs only its class and the name of the tokenizer's class.
    fields: dict[str, Any] = {"tokenizer_class": (read_json(folder / "config.json") or {}).get("tokenizer_class")}
    return AutoTokenizer.from_pretrained(folder, config=MptConfig(**fields))


def _ids_check(tokenizer: Tokenizer, peer: PreTrainedTokenizerBase) -> Check:
    differing = [text for text in TEXTS if peer.encode(text, add_special_tokens=False) != list(tokenizer.encode(text))]
    ends = [f"{tokenizer.decode([i], skip_special_tokens=False)} ({i})" for i in sorted(tokenizer.eos_token_ids)]
    return _agreement("token IDs", differing, f"of {len(TEXTS)} texts; end of sequence: {', '.join(ends) or 'none'}")


def _decoding_check(tokenizer: Tokenizer, peer: PreTrainedTokenizerBase) -> Check:
    """Compares the text as streamed, token by token, with transformers' text of all tokens."""

    def streamed(token_ids: tuple[int, ...]) -> str:
        detokenizer = tokenizer.detokenizer(skip_special_tokens=False)
        return "".join(map(detokenizer.feed, token_ids)) + detokenizer.flush()

    decoded = {text: streamed(tokenizer.encode(text)) for text in TEXTS}
    differing = [
        text
        for text in TEXTS
        if decoded[text] != peer.decode(list(tokenizer.encode(text)), clean_up_tokenization_spaces=False)
    ]
    num_kept = sum(text == again for text, again in decoded.items())
    return _agreement("text of tokens", differing, f"{num_kept} of {len(TEXTS)} texts come back unchanged")


def _template_check(template: ChatTemplate, peer: PreTrainedTokenizerBase, name: str | None) -> Check:
    """Compares the prompts; `name` is that of one of several templates, None for the default."""

    def ours(messages: list[dict[str, str]]) -> str:
        return template.render([Message(message["role"], message["content"]) for message in messages])

    def theirs(messages: list[dict[str, str]]) -> str:
        return str(peer.apply_chat_template(messages, chat_template=name, tokenize=False, add_generation_prompt=True))

    differing = [str(messages) for messages in CONVERSATIONS if _prompt(ours, messages) != _prompt(theirs, messages)]
    return _agreement("chat template", differing, f"for {len(CONVERSATIONS)} conversations")


def _prompt(render: Callable[[Any], str], messages: list[dict[str, str]]) -> str | None:
    """Returns the prompt, or None if the template refuses the messages, as it may."""
    try:
        return render(messages)
    except Exception:  # the two libraries raise errors of different classes
        return None


def _agreement(name: str, differing: list[str], detail: str) -> Check:
    if differing:
        return Check(name, "DIFFERS", f"{len(differing)} times, first for {differing[0]!r}")
    return Check(name, "same", detail)

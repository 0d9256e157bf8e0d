"""`/tokenize`, `/detokenize` and `/tokenizer_info` over HTTP."""

from __future__ import annotations

import json
import urllib.error
from typing import Any

import pytest
from http_calls import call


@pytest.mark.parametrize("text", ["Once upon a time", "“Où est la lune?”", "", "<|endoftext|>"])
def test_detokenizing_the_tokens_of_a_text_returns_the_text(text: str, server: Any) -> None:
    tokenized = call(server, "/tokenize", {"prompt": text, "add_special_tokens": False})
    assert tokenized["count"] == len(tokenized["tokens"])
    assert tokenized["max_model_len"] == 2048
    assert call(server, "/detokenize", {"tokens": tokenized["tokens"]}) == {"prompt": text}


def test_token_strings_are_returned_on_request(server: Any) -> None:
    body = {"prompt": "Once upon a time"}
    assert call(server, "/tokenize", body)["token_strs"] is None
    assert "".join(call(server, "/tokenize", {**body, "return_token_strs": True})["token_strs"]) == body["prompt"]


def test_the_end_of_sequence_token_is_one_token(server: Any) -> None:
    info = call(server, "/tokenizer_info")
    assert info == {"eos_token": "<|endoftext|>", "bos_token": None, "model_max_length": 2048}
    assert call(server, "/tokenize", {"prompt": info["eos_token"]})["count"] == 1


def test_messages_become_the_tokens_of_the_rendered_prompt(server: Any) -> None:
    messages = [{"role": "system", "content": "You are a fox."}, {"role": "user", "content": "Are you sly?"}]
    tokenized = call(server, "/tokenize", {"messages": messages})
    text = call(server, "/detokenize", {"tokens": tokenized["tokens"]})["prompt"]
    assert tokenized["count"] == len(tokenized["tokens"])
    assert "You are a fox." in text
    assert "Are you sly?" in text
    without_reply = call(server, "/tokenize", {"messages": messages, "add_generation_prompt": False})
    assert without_reply["count"] < tokenized["count"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "prompt, messages: pass one of them"),
        ({"prompt": "a", "messages": [{"role": "user", "content": "b"}]}, "prompt, messages: pass one of them"),
        (
            {"messages": [{"role": "user", "content": "b"}], "return_token_strs": True},
            "return_token_strs: requires prompt",
        ),
        ({"messages": [{"role": "user", "content": "a " * 3000}]}, "messages[0]: "),
        ({"messages": []}, "messages: must be a list of at least one message"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content: must be text, or a list of parts"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content[0]: the type 'image_url' is not supported; must be a part of type text",
        ),
    ],
)
def test_what_cannot_be_tokenized_is_refused(body: dict[str, Any], message: str, server: Any) -> None:
    with pytest.raises(urllib.error.HTTPError) as refused:
        call(server, "/tokenize", body)
    assert refused.value.code == 400
    assert json.load(refused.value)["error"]["message"].startswith(message)

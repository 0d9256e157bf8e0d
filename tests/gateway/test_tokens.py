"""`/tokenize` and its like over HTTP, and what `/openapi.json` says of the endpoints."""

from __future__ import annotations

import json
import re
import urllib.error
import urllib.request
from typing import Any

import pytest


def ask(server: Any, path: str, body: Any = None) -> Any:
    url = f"{server.openai_url.removesuffix('/v1')}{path}"
    content = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(url, content), timeout=60) as answer:
        return json.load(answer)


@pytest.mark.parametrize("text", ["Once upon a time", "“Où est la lune?”", "", "<|endoftext|>"])
def test_a_text_comes_back_from_its_tokens(text: str, server: Any) -> None:
    tokenized = ask(server, "/tokenize", {"prompt": text, "add_special_tokens": False})
    assert tokenized["count"] == len(tokenized["tokens"])
    assert tokenized["max_model_len"] == 2048
    assert ask(server, "/detokenize", {"tokens": tokenized["tokens"]}) == {"prompt": text}


def test_what_each_token_stands_for_is_told_where_it_is_asked_for(server: Any) -> None:
    asked = {"prompt": "Once upon a time"}
    assert ask(server, "/tokenize", asked)["token_strs"] is None
    assert "".join(ask(server, "/tokenize", {**asked, "return_token_strs": True})["token_strs"]) == asked["prompt"]


def test_the_end_mark_is_one_token(server: Any) -> None:
    info = ask(server, "/tokenizer_info")
    assert info == {"eos_token": "<|endoftext|>", "bos_token": None, "model_max_length": 2048}
    assert ask(server, "/tokenize", {"prompt": info["eos_token"]})["count"] == 1


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": []}, "messages"),
        ("/detokenize", {"tokens": "a"}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": [999_999]}, "tokens"),
        ("/v1/completions", {"prompt": [-1]}, "prompt"),
        ("/v1/completions", {"prompt": []}, "prompt"),
        ("/v1/completions", {"prompt": "\ud83d"}, "prompt"),
        ("/v1/completions", {"prompt": "a", "stop": ["\ud83d"]}, "stop"),
        ("/v1/completions", {"prompt": "a", "logprobs": 21}, "logprobs"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "\ud83d"}]}, "messages"),
        ("/v1/completions", {"prompt": "a", "max_tokens": -1}, "max_tokens"),
        ("/v1/completions", {"prompt": "a", "top_k": 1 << 40}, "top_k"),
        ("/v1/completions", {"prompt": "a", "logit_bias": {"-1": 1}}, "logit_bias"),
        ("/v1/completions", {"prompt": "a", "priority": 1 << 40}, "priority"),
    ],
)
def test_bad_input_names_the_field(path: str, body: Any, param: str, server: Any) -> None:
    with pytest.raises(urllib.error.HTTPError) as raised:
        ask(server, path, body)
    assert raised.value.code == 400
    assert json.load(raised.value)["error"]["param"] == param


def test_the_document_of_the_api_knows_every_body_and_every_form_it_refers_to(server: Any) -> None:
    document = ask(server, "/openapi.json")
    for path in ("/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"):
        assert document["paths"][path]["post"]["requestBody"]["required"]
    forms = document["components"]["schemas"]
    assert "temperature" in forms["ChatCompletionRequest"]["properties"]
    referred = set(re.findall(r'"\$ref": "([^"]+)"', json.dumps(document)))
    assert referred <= {f"#/components/schemas/{name}" for name in forms}

"""`/tokenize` and its like over HTTP, and what `/openapi.json` says of the endpoints."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from http_calls import ask


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


def test_the_document_of_the_api_knows_every_body_and_every_form_it_refers_to(server: Any) -> None:
    document = ask(server, "/openapi.json")
    for path in ("/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"):
        assert document["paths"][path]["post"]["requestBody"]["required"]
    forms = document["components"]["schemas"]
    assert "temperature" in forms["ChatCompletionRequest"]["properties"]
    referred = set(re.findall(r'"\$ref": "([^"]+)"', json.dumps(document)))
    assert referred <= {f"#/components/schemas/{name}" for name in forms}

"""`/tokenize`, `/detokenize` and `/tokenizer_info` over HTTP."""

from __future__ import annotations

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

"""The log probabilities of text completions over HTTP."""

from __future__ import annotations

from typing import Any

import pytest
from http_calls import call, stream
from server_process import ServerProcess

TEXT = "/v1/completions"
FOX = [rf"bytes:\x{byte:x}" for byte in "🦊".encode()]


def choice(server: ServerProcess, **fields: Any) -> Any:
    body = {"max_tokens": 4, "seed": 1, "logprobs": 2, **fields}
    return call(server, TEXT, body)["choices"][0]


def test_the_tokens_of_one_character_begin_where_it_does(server: ServerProcess) -> None:
    found = choice(server, prompt="Hi 🦊!", echo=True)["logprobs"]
    assert found["tokens"][:8] == ["H", "i", " ", *FOX, "!"]
    assert found["text_offset"][:9] == [0, 1, 2, 3, 3, 3, 3, 4, 5]


@pytest.mark.parametrize("is_tokenized", [False, True])
def test_the_first_token_of_a_prompt_is_written_as_the_others(server: ServerProcess, is_tokenized: bool) -> None:
    prompt: Any = "🦊!"
    if is_tokenized:
        prompt = call(server, "/tokenize", {"prompt": prompt})["tokens"]
    found = choice(server, prompt=prompt, echo=True, max_tokens=0)
    assert found["text"] == "🦊!"
    assert found["logprobs"]["tokens"] == [*FOX, "!"]
    assert found["logprobs"]["text_offset"] == [0, 0, 0, 0, 1]


def test_the_tokens_of_a_truncated_prompt_begin_where_they_are_in_the_echo(server: ServerProcess) -> None:
    whole = choice(server, prompt="The fox is 🦊 red.", echo=True, max_tokens=0)
    cut = choice(server, prompt="The fox is 🦊 red.", echo=True, max_tokens=0, truncate_prompt_tokens=2)
    assert cut["text"] == whole["text"]
    assert [cut["logprobs"][name] for name in ("tokens", "text_offset")] == [
        whole["logprobs"][name][-2:] for name in ("tokens", "text_offset")
    ]


@pytest.mark.parametrize("seed", range(3))
def test_the_alternatives_of_a_token_contain_it(server: ServerProcess, seed: int) -> None:
    found = choice(server, prompt="Once", seed=seed, temperature=2, logprobs=1, max_tokens=20)["logprobs"]
    for token, value, top in zip(found["tokens"], found["token_logprobs"], found["top_logprobs"], strict=True):
        assert top[token] == value
        assert 1 <= len(top) <= 2


def test_a_stream_has_the_same_places(server: ServerProcess) -> None:
    # The bias makes the model continue the character that the prompt begins.
    tokens = call(server, "/tokenize", {"prompt": "é!"})["tokens"]
    body = {"prompt": [tokens[-1]], "logit_bias": {str(tokens[0]): 20}, "max_tokens": 12, "seed": 3, "logprobs": 0}
    whole = call(server, TEXT, body)["choices"][0]["logprobs"]
    chunks = [chunk["choices"][0]["logprobs"] for chunk in stream(server, TEXT, body)]
    for name in ("tokens", "text_offset"):
        assert [value for chunk in chunks if chunk for value in chunk[name]] == whole[name]
    assert whole["text_offset"] == sorted(whole["text_offset"])


def test_false_asks_for_no_log_probabilities(server: ServerProcess) -> None:
    assert choice(server, prompt="Once", logprobs=False)["logprobs"] is None

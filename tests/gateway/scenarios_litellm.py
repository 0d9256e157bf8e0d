"""Uses of LiteLLM. Run by `test_sdks.py` in an environment where it is installed:

python scenarios_litellm.py NAME,NAME... URL
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from typing import Any

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # use the built-in map instead of downloading one
import litellm

HELLO: list[Any] = [{"role": "user", "content": "Who are you?"}]


def settings(url: str) -> dict[str, Any]:
    return {"model": "openai/demo", "api_base": url, "api_key": "random-string", "max_retries": 0}


def litellm_chat(url: str) -> None:
    request: dict[str, Any] = {**settings(url), "messages": HELLO, "max_tokens": 12, "seed": 4, "temperature": 0.7}
    response = litellm.completion(**request)
    assert response.choices[0].finish_reason == "length"
    assert response.usage.completion_tokens == 12
    chunks = list(litellm.completion(**request, stream=True, stream_options={"include_usage": True}))
    rebuilt = litellm.stream_chunk_builder(chunks, messages=HELLO)
    assert rebuilt.choices[0].message.content == response.choices[0].message.content
    assert rebuilt.choices[0].finish_reason == "length"
    assert rebuilt.usage.prompt_tokens == response.usage.prompt_tokens
    asynchronous = asyncio.run(litellm.acompletion(**request))
    assert asynchronous.choices[0].message.content == response.choices[0].message.content


def litellm_json(url: str) -> None:
    legs = {"enum": [2, 4]}
    schema = {"type": "object", "properties": {"legs": legs}, "required": ["legs"], "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "animal", "schema": schema}}
    response = litellm.completion(**settings(url), messages=HELLO, max_tokens=64, response_format=form)
    assert json.loads(response.choices[0].message.content)["legs"] in (2, 4)


def litellm_extra_fields(url: str) -> None:
    response = litellm.completion(
        **settings(url), messages=HELLO, max_tokens=8, extra_body={"guided_choice": ["a fox"]}
    )
    assert response.choices[0].message.content == "a fox"


def litellm_text(url: str) -> None:
    request: dict[str, Any] = {**settings(url), "model": "text-completion-openai/demo", "prompt": "Once upon a time"}
    response = litellm.text_completion(**request, max_tokens=8, temperature=0)
    assert response.choices[0].text
    assert response.usage.completion_tokens == 8


def litellm_errors(url: str) -> None:
    assert "temperature" in error_message({**settings(url), "messages": HELLO, "temperature": -1})


def error_message(request: dict[str, Any]) -> str:
    try:
        litellm.completion(**request)
    except litellm.BadRequestError as error:
        return str(error)
    raise AssertionError("nothing was raised")


if __name__ == "__main__":
    for name in sys.argv[1].split(","):
        globals()[name](*sys.argv[2:])
        print("passed", name)

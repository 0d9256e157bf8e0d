"""What users do with LiteLLM. Run by `test_sdks.py` in an environment that has it:

python scenarios_litellm.py NAME URL
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from typing import Any

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # the one it has, instead of one from elsewhere
import litellm

HELLO: list[Any] = [{"role": "user", "content": "Who are you?"}]


def to(url: str) -> dict[str, Any]:
    return {"model": "openai/demo", "api_base": url, "api_key": "random-string", "max_retries": 0}


def litellm_chat(url: str) -> None:
    asked: dict[str, Any] = {**to(url), "messages": HELLO, "max_tokens": 12, "seed": 4, "temperature": 0.7}
    whole = litellm.completion(**asked)
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage.completion_tokens == 12
    chunks = list(litellm.completion(**asked, stream=True, stream_options={"include_usage": True}))
    rebuilt = litellm.stream_chunk_builder(chunks, messages=HELLO)
    assert rebuilt.choices[0].message.content == whole.choices[0].message.content
    assert rebuilt.choices[0].finish_reason == "length"
    assert rebuilt.usage.prompt_tokens == whole.usage.prompt_tokens
    again = asyncio.run(litellm.acompletion(**asked))
    assert again.choices[0].message.content == whole.choices[0].message.content


def litellm_json(url: str) -> None:
    legs = {"enum": [2, 4]}
    schema = {"type": "object", "properties": {"legs": legs}, "required": ["legs"], "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "animal", "schema": schema}}
    answer = litellm.completion(**to(url), messages=HELLO, max_tokens=64, response_format=form)
    assert json.loads(answer.choices[0].message.content)["legs"] in (2, 4)


def litellm_extra_fields(url: str) -> None:
    answer = litellm.completion(**to(url), messages=HELLO, max_tokens=8, extra_body={"guided_choice": ["a fox"]})
    assert answer.choices[0].message.content == "a fox"


def litellm_text(url: str) -> None:
    asked: dict[str, Any] = {**to(url), "model": "text-completion-openai/demo", "prompt": "Once upon a time"}
    answer = litellm.text_completion(**asked, max_tokens=8, temperature=0)
    assert answer.choices[0].text
    assert answer.usage.completion_tokens == 8


def litellm_errors(url: str) -> None:
    assert "temperature" in refusal({**to(url), "messages": HELLO, "temperature": -1})


def refusal(asked: dict[str, Any]) -> str:
    try:
        litellm.completion(**asked)
    except litellm.BadRequestError as error:
        return str(error)
    raise AssertionError("nothing was raised")


if __name__ == "__main__":
    globals()[sys.argv[1]](sys.argv[2])
    print(json.dumps({"passed": sys.argv[1]}))

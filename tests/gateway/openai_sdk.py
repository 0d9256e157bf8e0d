"""What the scenarios of OpenAI's SDK share: a client, and the errors that it raises."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import openai


def sdk(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=url, api_key="random-string", max_retries=0)


def raised(kind: type[openai.APIStatusError], call: Callable[[], object]) -> Any:
    try:
        call()
    except kind as error:
        return error
    raise AssertionError("nothing was raised")

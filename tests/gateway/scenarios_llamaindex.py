"""Uses of llama-index. Run by `test_sdks.py` like `scenarios.py`."""

from __future__ import annotations

import asyncio
import sys
from typing import Any, Literal

from llama_index.core.agent.workflow import FunctionAgent, ToolCallResult
from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.core.workflow import Context
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel

QUESTION = "Is it sunny in Rome?"
City = Literal["Paris", "Rome"]


class Forecast(BaseModel):
    """The answer."""

    city: City
    days: Literal[1, 2, 3]


class Place(BaseModel):
    city: City


def weather(city: str) -> str:
    return f"sunny in {city}"


get_weather = FunctionTool.from_defaults(
    weather, name="get_weather", description="Tell the weather of a city.", fn_schema=Place
)


def model(url: str, **options: Any) -> OpenAILike:
    options = {"is_chat_model": True, "is_function_calling_model": True, "max_tokens": 200, **options}
    return OpenAILike(model="demo", api_base=url, api_key="random-string", context_window=2048, **options)


def llamaindex_agent(url: str) -> None:
    """The agent requires a call after each question, then replies with text; it streams by default."""
    agent = FunctionAgent(
        tools=[get_weather], llm=model(url, additional_kwargs={"seed": 1}), initial_tool_choice="required"
    )

    async def run() -> None:
        context = Context(agent)
        for question in (QUESTION, "Really?"):
            handler = agent.run(question, ctx=context)
            events = [event async for event in handler.stream_events()]
            results = [event.tool_output.content for event in events if isinstance(event, ToolCallResult)]
            assert results
            assert set(results) <= {"sunny in Paris", "sunny in Rome"}
            assert (await handler).response.content

    asyncio.run(run())


def llamaindex_structured_output(url: str) -> None:
    messages = [ChatMessage(role="system", content="Be brief."), ChatMessage(role="user", content=QUESTION)]
    for options in ({}, {"should_use_structured_outputs": True}):
        structured = model(url, **options).as_structured_llm(Forecast)
        assert isinstance(structured.chat(messages).raw, Forecast)


if __name__ == "__main__":
    for name in sys.argv[1].split(","):
        globals()[name](*sys.argv[2:])
        print("passed", name)

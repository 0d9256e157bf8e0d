"""Agents of several frameworks, whose loops of calls and results run to their ends. Run by `test_sdks.py` like
`scenarios.py`.

The demo model understands no question: the first call is required, and what it then says is of no interest.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from typing import Any, Literal

from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    Runner,
    function_tool,
    set_default_openai_client,
    set_tracing_disabled,
)
from langchain.agents import create_agent
from langchain.agents.middleware import wrap_model_call
from langchain_core.messages import HumanMessage
from langchain_openai import ChatOpenAI
from openai import AsyncOpenAI
from pydantic import BaseModel
from pydantic_ai import Agent as TypedAgent
from pydantic_ai import RunContext, ToolDefinition
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider

QUESTION = "Is it sunny in Rome?"
City = Literal["Paris", "Rome"]
asked: list[str] = []


class Forecast(BaseModel):
    """The answer."""

    city: City
    days: Literal[1, 2, 3]


def get_weather(city: City) -> str:
    """Tell the weather of a city."""
    asked.append(city)
    return "sunny"


def openai_agents(url: str) -> None:
    client = AsyncOpenAI(base_url=url, api_key="random-string")
    run_openai_agent(OpenAIChatCompletionsModel(model="demo", openai_client=client))


def openai_agents_by_default(url: str) -> None:
    """By default, agents use Responses."""
    set_default_openai_client(AsyncOpenAI(base_url=url, api_key="random-string"))
    run_openai_agent("demo")


def run_openai_agent(model: Any) -> None:
    set_tracing_disabled(True)
    # A response that is cut short is an error for agents, so the text ends with its first sentence.
    sentence = {"stop": [".", "!", "?", ";"], "seed": 1}
    once = ModelSettings(tool_choice="required", max_tokens=400, parallel_tool_calls=False, extra_body=sentence)
    tools: Any = [function_tool(get_weather)]
    agent: Any = Agent("Reporter", instructions="Be brief.", model=model, tools=tools, model_settings=once)
    forecaster: Any = Agent("Forecaster", model=model, output_type=Forecast)

    async def run() -> None:
        result = await Runner.run(agent, QUESTION)
        assert result.final_output
        assert [item.type for item in result.new_items] == [
            "tool_call_item", "tool_call_output_item", "message_output_item"
        ]  # fmt: skip
        streamed = Runner.run_streamed(agent, [*result.to_input_list(), {"role": "user", "content": "Really?"}])
        async for _ in streamed.stream_events():
            pass
        assert streamed.final_output
        assert (await Runner.run(forecaster, QUESTION)).final_output.days in (1, 2, 3)

    asyncio.run(run())
    assert len(asked) == 2
    assert set(asked) <= {"Paris", "Rome"}


@wrap_model_call
def ask_first(request: Any, answer: Callable[[Any], Any]) -> Any:
    """Requires a call after each question."""
    is_question = isinstance(request.messages[-1], HumanMessage)
    return answer(request.override(tool_choice="required" if is_question else None))


def langchain_agent(url: str) -> None:
    chat = ChatOpenAI(model="demo", base_url=url, api_key="random-string", max_tokens=200, seed=1)
    agent = create_agent(chat, [get_weather], system_prompt="Be brief.", middleware=[ask_first])
    messages = agent.invoke({"messages": [HumanMessage(QUESTION)]})["messages"]
    kinds = [message.type for message in messages]
    assert kinds == ["human", "ai", *["tool"] * len(asked), "ai"]
    assert len(asked) >= 1
    assert messages[-1].content
    num_asked = len(asked)
    chunks = list(agent.stream({"messages": [*messages, HumanMessage("Really?")]}, stream_mode="messages"))
    assert chunks[-1][0].content or len(chunks) > 2
    assert len(asked) > num_asked


async def only_first(context: RunContext[Any], definition: ToolDefinition) -> ToolDefinition | None:
    return definition if context.run_step == 1 else None


def pydantic_ai(url: str) -> None:
    """The answer is a call, too, so that the model chooses between the tool and the answer at first."""
    model = OpenAIChatModel("demo", provider=OpenAIProvider(base_url=url, api_key="random-string"))
    agent = TypedAgent(model, output_type=Forecast, instructions="Be brief.")
    agent.tool_plain(get_weather, prepare=only_first)
    for seed in range(8):
        result = agent.run_sync(
            QUESTION, model_settings={"seed": seed, "max_tokens": 300, "parallel_tool_calls": False}
        )
        assert result.output.days in (1, 2, 3)
    assert asked
    assert set(asked) <= {"Paris", "Rome"}


def pydantic_ai_with_responses(url: str) -> None:
    model = OpenAIResponsesModel("demo", provider=OpenAIProvider(base_url=url, api_key="random-string"))
    agent = TypedAgent(model, output_type=Forecast, instructions="Be brief.")
    result = agent.run_sync(QUESTION, model_settings={"max_tokens": 300, "parallel_tool_calls": False})
    assert result.output.days in (1, 2, 3)


def langchain_with_responses(url: str) -> None:
    options: Any = {"max_tokens": 60, "use_responses_api": True, "extra_body": {"seed": 1}}
    chat = ChatOpenAI(model="demo", base_url=url, api_key="random-string", **options)
    reply = chat.invoke(QUESTION)
    assert reply.text
    assert "".join(chunk.text for chunk in chat.stream([("user", QUESTION), reply, ("user", "Really?")]))
    required = chat.bind_tools([get_weather], tool_choice="required", parallel_tool_calls=False)
    called = required.invoke(QUESTION)
    (call,) = called.tool_calls
    assert call["args"]["city"] in ("Paris", "Rome")
    result = {"role": "tool", "tool_call_id": call["id"], "content": "sunny"}
    assert chat.invoke([("user", QUESTION), called, result]).text
    assert isinstance(chat.with_structured_output(Forecast).invoke(QUESTION), Forecast)


if __name__ == "__main__":
    for name in sys.argv[1].split(","):
        asked.clear()
        globals()[name](*sys.argv[2:])
        print("passed", name)

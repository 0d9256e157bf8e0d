"""Uses of OpenAI's Responses by its SDK, LangChain and agents. Run by `test_sdks.py` like `scenarios.py`.

The demo model understands no question: the first call of an agent is required, and what it then says is of no interest.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import openai
from agents import Agent, ModelSettings, Runner, function_tool, set_default_openai_client, set_tracing_disabled
from langchain_openai import ChatOpenAI
from openai import AsyncOpenAI
from openai.types.responses import response_create_params
from pydantic import BaseModel
from pydantic_ai import Agent as TypedAgent
from pydantic_ai.models.openai import OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider

QUESTION = "Is it sunny in Rome?"
City = Literal["Paris", "Rome"]
WEATHER = {
    "type": "function",
    "name": "get_weather",
    "description": "Tell the weather of a city.",
    "parameters": {"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"]},
    "strict": False,
}
asked: list[str] = []


class Forecast(BaseModel):
    """The answer."""

    city: City
    days: Literal[1, 2, 3]


def get_weather(city: City) -> str:
    """Tell the weather of a city."""
    asked.append(city)
    return "sunny"


def sdk(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=url, api_key="random-string", max_retries=0)


def raised(kind: type[openai.APIStatusError], call: Callable[[], object]) -> Any:
    try:
        call()
    except kind as error:
        return error
    raise AssertionError("nothing was raised")


def response(url: str) -> None:
    client, seed = sdk(url), {"seed": 1}
    created = client.responses.create(
        model="gpt-5", input=QUESTION, instructions="Be brief.", max_output_tokens=9, extra_body=seed
    )
    assert created.model == "demo"
    assert created.output_text
    assert (created.status, created.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert created.usage.output_tokens == 9
    assert created.usage.total_tokens == created.usage.input_tokens + 9
    messages: Any = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": QUESTION}]
    same = client.responses.create(model="demo", input=messages, max_output_tokens=9, extra_body=seed)
    assert same.output_text == created.output_text
    completion = client.chat.completions.create(model="demo", messages=messages, max_tokens=9, seed=1)
    assert completion.choices[0].message.content == created.output_text
    history: Any = [*messages, *created.output, {"role": "user", "content": "Really?"}]
    assert client.responses.create(model="demo", input=history, max_output_tokens=3).usage.output_tokens == 3
    with_logprobs = client.responses.create(
        model="demo", input=QUESTION, include=["message.output_text.logprobs"], top_logprobs=2, max_output_tokens=4
    )
    logprobs = with_logprobs.output[0].content[0].logprobs
    assert "".join(token.token for token in logprobs) == with_logprobs.output_text
    assert all(len(token.top_logprobs) == 2 for token in logprobs)


def streamed_response(url: str) -> None:
    request: dict[str, Any] = {"model": "demo", "input": QUESTION, "max_output_tokens": 12, "extra_body": {"seed": 3}}
    complete = sdk(url).responses.create(**request)
    events = list(sdk(url).responses.create(**request, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    texts = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(texts) == complete.output_text
    assert events[-1].type == "response.incomplete"
    assert events[-1].response.output_text == complete.output_text
    choices: Any = {"guided_choice": ["yes", "no"]}
    with sdk(url).responses.stream(model="demo", input=QUESTION, extra_body=choices) as stream:
        final = stream.get_final_response()
    assert final.status == "completed"
    assert final.output_text in ("yes", "no")


def structured_response(url: str) -> None:
    request: dict[str, Any] = {"model": "demo", "input": QUESTION, "text_format": Forecast, "max_output_tokens": 400}
    parsed = sdk(url).responses.parse(**request).output_parsed
    assert isinstance(parsed, Forecast)
    with sdk(url).responses.stream(**request) as stream:
        assert isinstance(stream.get_final_response().output_parsed, Forecast)
    free = sdk(url).responses.create(
        model="demo", input=QUESTION, text={"format": {"type": "json_object"}}, max_output_tokens=400
    )
    assert free.status == "incomplete" or isinstance(json.loads(free.output_text), dict)


def calls_and_results_in_items(url: str) -> None:
    """The items are those of the SDK, of complete responses and of streams, as objects and as it dumps them."""
    request: dict[str, Any] = {"model": "demo", "tools": [WEATHER], "max_output_tokens": 200, "extra_body": {"seed": 1}}
    once: dict[str, Any] = {"tool_choice": "required", "parallel_tool_calls": False}
    items: list[Any] = [{"role": "user", "content": QUESTION}]
    created = sdk(url).responses.create(input=items, **request, **once)
    assert created.status == "completed"
    (call,) = created.output
    assert json.loads(call.arguments)["city"] in ("Paris", "Rome")
    items += [call, {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}]
    named: dict[str, Any] = {"tool_choice": {"type": "function", "name": "get_weather"}, "parallel_tool_calls": False}
    with sdk(url).responses.stream(input=items, **request, **named) as stream:
        (streamed,) = stream.get_final_response().output
    assert json.loads(streamed.arguments)["city"] in ("Paris", "Rome")
    output = [{"type": "input_text", "text": "sunny"}]
    items += [streamed.model_dump(), {"type": "function_call_output", "call_id": streamed.call_id, "output": output}]
    last = sdk(url).responses.create(input=items, **{**request, "max_output_tokens": 5}, tool_choice="none")
    assert last.output_text


def response_errors(url: str) -> None:
    def bad_request(**fields: Any) -> Any:
        request = {"model": "demo", "input": QUESTION, **fields}
        return raised(openai.BadRequestError, lambda: sdk(url).responses.create(**request))

    assert bad_request(max_output_tokens=100_000).param == "input", "the input and the output exceed the context"
    assert bad_request(stream=True, temperature=-1).param == "temperature"
    assert bad_request(extra_body={"surprise": 1}).param == "surprise"
    missing = raised(openai.NotFoundError, lambda: sdk(url).responses.retrieve("resp_1"))
    assert "not stored" in str(missing)


FIELDS: dict[str, Any] = {
    "access_programs": {"cyber": "standard"},
    "background": False,
    "background_options": {"completion_window": "soonest"},
    "context_management": [{"type": "compaction"}],
    "conversation": "conv_1",
    "image": {"context_compression": "auto"},
    "include": ["reasoning.encrypted_content"],
    "input": QUESTION,
    "instructions": "Be brief.",
    "max_output_tokens": 1,
    "max_tool_calls": 3,
    "metadata": {"order": "17"},
    "model": "demo",
    "moderation": {"model": "omni-moderation-latest"},
    "parallel_tool_calls": False,
    "previous_response_id": "resp_1",
    "prompt": {"id": "pmpt_1"},
    "prompt_cache_key": "key",
    "prompt_cache_options": {"mode": "implicit"},
    "prompt_cache_retention": "24h",
    "reasoning": {"effort": "low", "summary": "auto"},
    "safety_identifier": "me",
    "service_tier": "auto",
    "store": True,
    "stream": False,
    "stream_options": {"include_obfuscation": False},
    "temperature": 0.5,
    "text": {"format": {"type": "text"}, "verbosity": "low"},
    "tool_choice": "auto",
    "tools": [WEATHER],
    "top_logprobs": 0,
    "top_p": 0.9,
    "truncation": "auto",
    "user": "me",
}


def every_field_of_a_response(url: str) -> None:
    """Each field of the SDK's request is handled as docs/openai.md says."""
    base = response_create_params.ResponseCreateParamsBase.__annotations__
    assert {*base, "stream"} == set(FIELDS)
    page = (Path(__file__).parents[2] / "docs/openai.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| (?:all|[\w, ]*responses) \| (\w+) \|", page, re.MULTILINE)
    support = dict(rows)
    assert not set(FIELDS) - set(support), "the page lists every field"
    request = {"model": "demo", "input": QUESTION, "max_output_tokens": 1}
    for name, value in FIELDS.items():
        call = lambda name=name, value=value: sdk(url).responses.create(**{**request, name: value})  # noqa: E731
        if support[name] == "refused":
            error = raised(openai.BadRequestError, call)
            assert error.param == name
            assert "unknown" not in str(error)
        else:
            assert call().status == "incomplete", name


def openai_agents_by_default(url: str) -> None:
    set_tracing_disabled(True)
    set_default_openai_client(AsyncOpenAI(base_url=url, api_key="random-string"))
    # A response that is cut short is an error for agents, so the text ends with its first sentence.
    sentence = {"stop": [".", "!", "?", ";"], "seed": 1}
    settings = ModelSettings(tool_choice="required", max_tokens=400, parallel_tool_calls=False, extra_body=sentence)
    agent: Any = Agent(
        name="Reporter",
        instructions="Be brief.",
        model="demo",
        tools=[function_tool(get_weather)],
        model_settings=settings,
    )

    async def run() -> None:
        result = await Runner.run(agent, QUESTION)
        assert result.final_output
        assert [item.type for item in result.new_items] == [
            "tool_call_item", "tool_call_output_item", "message_output_item"
        ]  # fmt: skip
        again = [*result.to_input_list(), {"role": "user", "content": "Really?"}]
        streamed = Runner.run_streamed(agent, again)
        async for _ in streamed.stream_events():
            pass
        assert streamed.final_output
        forecaster: Any = Agent(name="Forecaster", model="demo", output_type=Forecast)
        assert (await Runner.run(forecaster, QUESTION)).final_output.days in (1, 2, 3)

    asyncio.run(run())
    assert len(asked) == 2
    assert set(asked) <= {"Paris", "Rome"}


def pydantic_ai_with_responses(url: str) -> None:
    model = OpenAIResponsesModel("demo", provider=OpenAIProvider(base_url=url, api_key="random-string"))
    agent = TypedAgent(model, output_type=Forecast, instructions="Be brief.")
    result = agent.run_sync(QUESTION, model_settings={"max_tokens": 300, "parallel_tool_calls": False})
    assert result.output.days in (1, 2, 3)


def langchain_with_responses(url: str) -> None:
    chat = ChatOpenAI(model="demo", base_url=url, api_key="random-string", max_tokens=60, use_responses_api=True)
    reply = chat.invoke(QUESTION)
    assert reply.text
    assert "".join(chunk.text for chunk in chat.stream([("user", QUESTION), reply, ("user", "Really?")]))
    required = chat.bind_tools([get_weather], tool_choice="required", parallel_tool_calls=False)
    question = ("user", QUESTION)
    called = required.invoke([question])
    (call,) = called.tool_calls
    assert call["args"]["city"] in ("Paris", "Rome")
    result = {"role": "tool", "tool_call_id": call["id"], "content": "sunny"}
    assert chat.invoke([question, called, result]).text
    assert isinstance(chat.with_structured_output(Forecast).invoke(QUESTION), Forecast)


if __name__ == "__main__":
    globals()[sys.argv[1]](sys.argv[2])
    print(json.dumps({"passed": sys.argv[1]}))

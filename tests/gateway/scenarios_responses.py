"""Uses of Responses by OpenAI's SDK. Run by `test_sdks.py` like `scenarios.py`."""

from __future__ import annotations

import json
import sys
from typing import Any, Literal

import openai
from openai_sdk import raised, sdk
from pydantic import BaseModel

QUESTION = "Is it sunny in Rome?"
City = Literal["Paris", "Rome"]
WEATHER = {
    "type": "function",
    "name": "get_weather",
    "description": "Tell the weather of a city.",
    "parameters": {"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"]},
    "strict": False,
}


class Forecast(BaseModel):
    """The answer."""

    city: City
    days: Literal[1, 2, 3]


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

    assert bad_request(max_output_tokens=100_000).param == "max_output_tokens", "more than the context"
    assert bad_request(max_output_tokens=2047).param == "max_output_tokens", "with the input, more than the context"
    assert bad_request(stream=True, temperature=-1).param == "temperature"
    assert bad_request(extra_body={"surprise": 1}).param == "surprise"
    missing = raised(openai.NotFoundError, lambda: sdk(url).responses.retrieve("resp_1"))
    assert "not stored" in str(missing)


if __name__ == "__main__":
    for name in sys.argv[1].split(","):
        globals()[name](*sys.argv[2:])
        print("passed", name)

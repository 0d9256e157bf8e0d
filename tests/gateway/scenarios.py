"""Uses of OpenAI's SDK and LangChain. Run by `test_sdks.py` in an environment where they are installed:

python scenarios.py NAME,NAME... URL
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any, Literal

import openai
from langchain_core.messages import HumanMessage, SystemMessage
from langchain_core.prompts import PromptTemplate
from langchain_openai import ChatOpenAI, OpenAI
from openai import AsyncOpenAI
from openai_sdk import raised, sdk
from pydantic import BaseModel

HELLO: list[Any] = [{"role": "user", "content": "Who are you?"}]


class Animal(BaseModel):
    """An animal."""

    name: str
    legs: int


class CountLegs(BaseModel):
    """Count the legs of an animal."""

    legs: Literal[2, 4]


def chat(url: str) -> None:
    response = sdk(url).chat.completions.create(model="gpt-4o", messages=HELLO, max_completion_tokens=12, seed=1)
    assert response.model == "demo"
    assert response.choices[0].message.role == "assistant"
    assert response.choices[0].message.content
    assert response.choices[0].finish_reason == "length"
    assert response.usage is not None
    assert response.usage.completion_tokens == 12
    assert response.usage.total_tokens == response.usage.prompt_tokens + 12
    same = sdk(url).chat.completions.create(model="x", messages=HELLO, max_tokens=12, seed=1)
    assert same.choices[0].message.content == response.choices[0].message.content


def streamed_chat(url: str) -> None:
    request: dict[str, Any] = {"model": "demo", "messages": HELLO, "max_tokens": 20, "seed": 3, "n": 2}
    complete = sdk(url).chat.completions.create(**request)
    texts, finishes, roles, usages = ["", ""], [None, None], [], []
    for chunk in sdk(url).chat.completions.create(**request, stream=True, stream_options={"include_usage": True}):
        if chunk.usage is not None:
            assert chunk.choices == []
            usages.append(chunk.usage)
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            finishes[choice.index] = choice.finish_reason or finishes[choice.index]
            roles += [choice.delta.role] if choice.delta.role else []
    assert texts == [choice.message.content for choice in complete.choices]
    assert finishes == [choice.finish_reason for choice in complete.choices]
    assert roles == ["assistant"] * 2
    assert [usage.completion_tokens for usage in usages] == [complete.usage.completion_tokens]


def chat_logprobs(url: str) -> None:
    response = sdk(url).chat.completions.create(
        model="demo", messages=HELLO, max_tokens=5, logprobs=True, top_logprobs=3, seed=1
    )
    content = response.choices[0].logprobs.content
    assert len(content) == 5
    assert "".join(token.token for token in content) == response.choices[0].message.content
    assert all(len(token.top_logprobs) == 3 and token.logprob <= 0 for token in content)


def structured_output(url: str) -> None:
    response = sdk(url).chat.completions.parse(
        model="demo", messages=HELLO, response_format=Animal, max_tokens=400, seed=2
    )
    assert isinstance(response.choices[0].message.parsed, Animal)
    response = sdk(url).chat.completions.create(
        model="demo", messages=HELLO, max_tokens=60, extra_body={"guided_choice": ["yes", "no"]}
    )
    assert response.choices[0].message.content in ("yes", "no")
    assert response.choices[0].finish_reason == "stop"


def tools(url: str) -> None:
    legs = {"type": "object", "properties": {"legs": {"enum": [2, 4]}}, "required": ["legs"]}
    tools: Any = [
        {"type": "function", "function": {"name": "count_legs", "parameters": legs}},
        {"type": "function", "function": {"name": "run"}},
    ]
    named: Any = {"type": "function", "function": {"name": "count_legs"}}
    request: dict[str, Any] = {"model": "demo", "messages": HELLO, "max_tokens": 200, "seed": 5, "n": 2, "tools": tools}
    for tool_choice in (named, "required"):
        complete = sdk(url).chat.completions.create(**request, tool_choice=tool_choice, parallel_tool_calls=False)
        ids = set()
        for choice in complete.choices:
            assert choice.finish_reason == "tool_calls"
            assert choice.message.content is None
            (call,) = choice.message.tool_calls
            assert call.function.name in (("count_legs",) if tool_choice is named else ("count_legs", "run"))
            arguments = json.loads(call.function.arguments)
            assert arguments == {} if call.function.name == "run" else arguments["legs"] in (2, 4)
            ids.add(call.id)
        assert len(ids) == 2
        options: Any = {"tool_choice": tool_choice, "parallel_tool_calls": False}
        with sdk(url).chat.completions.stream(**request, **options) as stream:
            streamed = stream.get_final_completion()
        for choice, other in zip(complete.choices, streamed.choices, strict=True):
            assert other.finish_reason == "tool_calls"
            assert other.message.tool_calls[0].function.arguments == choice.message.tool_calls[0].function.arguments
            assert other.message.tool_calls[0].function.name == choice.message.tool_calls[0].function.name
    free = {**request, "max_tokens": 20, "n": 1}
    none = sdk(url).chat.completions.create(**free, tool_choice="none")
    without = sdk(url).chat.completions.create(**{**free, "tools": openai.omit})
    assert none.choices[0].message.content == without.choices[0].message.content
    truncated = sdk(url).chat.completions.create(**{**request, "max_tokens": 1}, tool_choice=named)
    assert truncated.choices[0].finish_reason == "length"


def calls_and_results_sent_back(url: str) -> None:
    """The messages are those of the SDK, as it dumps them, of complete responses and of streams."""
    tools: Any = [openai.pydantic_function_tool(CountLegs)]
    request: dict[str, Any] = {"model": "demo", "tools": tools, "max_tokens": 200, "seed": 1, "tool_choice": "required"}
    request["parallel_tool_calls"] = False
    messages: list[Any] = [*HELLO]
    created = sdk(url).chat.completions.create(messages=messages, **request).choices[0].message
    messages.append(created.model_dump())
    messages += [{"role": "tool", "tool_call_id": call.id, "content": "yes"} for call in created.tool_calls]
    with sdk(url).chat.completions.stream(messages=messages, **request) as stream:
        streamed = stream.get_final_completion().choices[0].message
    assert isinstance(streamed.tool_calls[0].function.parsed_arguments, CountLegs)
    messages.append(streamed.model_dump())
    messages += [{"role": "tool", "tool_call_id": call.id, "content": "no"} for call in streamed.tool_calls]
    last = sdk(url).chat.completions.create(messages=messages, **{**request, "tool_choice": "auto", "max_tokens": 5})
    assert 1 <= last.usage.completion_tokens <= 5


def completions(url: str) -> None:
    client = sdk(url)
    one = client.completions.create(model="demo", prompt="Once upon a time", max_tokens=6, temperature=0, logprobs=2)
    logprobs = one.choices[0].logprobs
    assert "".join(logprobs.tokens) == one.choices[0].text
    assert logprobs.text_offset[0] == 0
    assert all(len(top) >= 2 for top in logprobs.top_logprobs)
    several = client.completions.create(
        model="demo", prompt=["Once upon a time", "The fox"], n=2, max_tokens=6, temperature=0, seed=1
    )
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    assert several.choices[0].text == several.choices[1].text == one.choices[0].text
    ids = client.completions.create(
        model="demo", prompt=[300, 301, 302], max_tokens=3, stop="\n", logit_bias={"77": -100}
    )
    assert ids.usage.prompt_tokens == 3
    pieces = client.completions.create(
        model="demo", prompt="Once upon a time", max_tokens=6, temperature=0, stream=True, echo=True
    )
    assert "".join(piece.choices[0].text for piece in pieces) == "Once upon a time" + one.choices[0].text


def prompt_logprobs(url: str) -> None:
    """What evaluation harnesses request: the log probabilities of the prompt, and no new token."""
    text = "The fox said nothing."
    response = sdk(url).completions.create(model="demo", prompt=text, max_tokens=0, echo=True, logprobs=1)
    assert response.choices[0].text == text
    logprobs = response.choices[0].logprobs
    assert "".join(logprobs.tokens) == text
    assert logprobs.token_logprobs[0] is None
    assert all(value <= 0 for value in logprobs.token_logprobs[1:])
    assert [text[offset : offset + 1] for offset in logprobs.text_offset] == [token[0] for token in logprobs.tokens]
    longer = sdk(url).completions.create(model="demo", prompt=text, max_tokens=1, echo=True, logprobs=1, temperature=0)
    assert len(longer.choices[0].logprobs.tokens) == len(logprobs.tokens) + 1


def models(url: str) -> None:
    (model,) = sdk(url).models.list().data
    assert model.id == "demo"
    assert sdk(url).models.retrieve("demo").id == "demo"
    assert raised(openai.NotFoundError, lambda: sdk(url).models.retrieve("gpt-4o")).code == "model_not_found"


def errors(url: str) -> None:
    def bad_request(**fields: Any) -> Any:
        request = {"model": "demo", "messages": HELLO, **fields}
        return raised(openai.BadRequestError, lambda: sdk(url).chat.completions.create(**request))

    assert bad_request(temperature=-1).param == "temperature"
    assert bad_request(max_tokens=100_000).param == "max_tokens", "more than the context, whatever the messages are"
    assert bad_request(max_tokens=2047).param == "max_tokens", "with the messages, more than the context"
    assert bad_request(messages=[]).param == "messages"
    assert bad_request(messages=[{"role": "robot", "content": "x"}]).param == "messages[0].role"
    tools = [{"type": "function", "function": {"name": "f"}}]
    missing_function = {"type": "function", "function": {"name": "other"}}
    assert bad_request(tools=tools, tool_choice=missing_function).param == "tool_choice"
    assert bad_request(extra_body={"surprise": 1}).param == "surprise"
    assert bad_request(extra_body={"guided_regex": "("}).param == "guided_regex"
    assert "more than one" in str(bad_request(extra_body={"guided_regex": "a", "guided_choice": ["b"]}))
    response = sdk(url).chat.completions.create(model="demo", messages=HELLO, max_tokens=1, user="me", store=False)
    assert response.choices
    missing = raised(openai.NotFoundError, lambda: sdk(url).embeddings.create(model="demo", input="x"))
    assert "embeddings" in str(missing)


def async_sdk(url: str) -> None:
    async def run() -> None:
        async with AsyncOpenAI(base_url=url, api_key="random-string") as client:
            request: dict[str, Any] = {"model": "demo", "messages": HELLO, "max_tokens": 10, "seed": 1}
            responses = await asyncio.gather(*(client.chat.completions.create(**request) for _ in range(8)))
            assert len({response.choices[0].message.content for response in responses}) == 1
            stream = await client.chat.completions.create(**request, stream=True)
            text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
            assert text == responses[0].choices[0].message.content

    asyncio.run(run())


def langchain_as_documented_for_mpt(url: str) -> None:
    chat = ChatOpenAI(base_url=url, api_key="random-string", max_tokens=128)
    response = chat.invoke([HumanMessage(content="What is the capital of France?")])
    assert 1 <= response.usage_metadata["output_tokens"] <= 128
    template = PromptTemplate(
        input_variables=["user_message"],
        template="The assistant gives short, true answers.\n\nUser: {user_message}\nAssistant:",
    )
    response = (template | chat).invoke({"user_message": "Where does the fox live?"})
    assert 1 <= response.usage_metadata["output_tokens"] <= 128


def langchain(url: str) -> None:
    chat = ChatOpenAI(base_url=url, api_key="random-string", max_tokens=10, seed=1)
    messages = [SystemMessage(content="Be brief."), HumanMessage(content="Who are you?")]
    complete = chat.invoke(messages)
    assert "".join(str(chunk.content) for chunk in chat.stream(messages)) == complete.content
    assert [str(response.content) for response in chat.batch([messages, messages])] == [complete.content] * 2
    assert asyncio.run(chat.ainvoke(messages)).content == complete.content
    # With its default model name, LangChain forces a function instead of requesting a schema.
    for model in ({"model": "demo"}, {}):
        structured = ChatOpenAI(base_url=url, api_key="random-string", max_tokens=400, seed=2, **model)
        assert isinstance(structured.with_structured_output(Animal).invoke("An animal, please."), Animal)
        both = structured.with_structured_output(Animal, include_raw=True).invoke("An animal, please.")
        assert isinstance(both["parsed"], Animal)
        assert both["parsing_error"] is None
    text = OpenAI(base_url=url, api_key="random-string", max_tokens=8, temperature=0)
    assert text.invoke("Once upon a time")


def keys(url: str, key: str) -> None:
    """`key` is the access token of a caller."""
    with openai.OpenAI(base_url=url, api_key=key, max_retries=0) as client:
        assert client.chat.completions.create(model="demo", messages=HELLO, max_tokens=2).usage is not None
    with openai.OpenAI(base_url=url, api_key=f"{key}x", max_retries=0) as client:
        error = raised(openai.AuthenticationError, client.models.list)
    assert "the access token is not valid" in error.message


if __name__ == "__main__":
    for name in sys.argv[1].split(","):
        globals()[name](*sys.argv[2:])
        print("passed", name)

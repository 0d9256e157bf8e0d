"""Tests of `ChatMpt` and `MptLLM` beyond LangChain's standard tests, run by `test_langchain.py`."""

from __future__ import annotations

import asyncio
import copy
import gc
import os
import pickle
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any, Literal, TypedDict

import pytest
from langchain.agents import create_agent
from langchain.agents.middleware import wrap_model_call
from langchain_core.caches import InMemoryCache
from langchain_core.callbacks import AsyncCallbackHandler, BaseCallbackHandler
from langchain_core.exceptions import OutputParserException
from langchain_core.load import dumps, loads
from langchain_core.messages import AIMessage, BaseMessage, ChatMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.outputs import LLMResult
from langchain_core.prompts import ChatPromptTemplate
from pydantic import BaseModel, Field

from mpt_grpc_client import (
    AsyncClient,
    Choice,
    Client,
    DeadlineExceededError,
    InvalidRequestError,
    InvalidTargetError,
    Message,
    Role,
    UnavailableError,
)
from mpt_grpc_client.langchain import ChatMpt, MptLLM

TARGET = os.environ["MPT_GRPC_TARGET"]
STORY = "Once upon a time"
GREEDY: dict[str, Any] = {"temperature": 0, "max_new_tokens": 12}
TEXT = {
    "type": "object",
    "properties": {"text": {"type": "string", "minLength": 500}, "to": {"type": "string"}},
    "required": ["text", "to"],
}
LONG: dict[str, Any] = {"max_new_tokens": 1500, "ignore_eos": True, "temperature": 0}


@pytest.fixture
def client() -> Iterator[Client]:
    with Client(TARGET) as client:
        yield client


@pytest.fixture
def chat() -> ChatMpt:
    return ChatMpt(target=TARGET, **GREEDY)


@pytest.fixture
def llm() -> MptLLM:
    return MptLLM(target=TARGET, **GREEDY)


def test_the_options_of_the_connection_are_used_and_neither_printed_nor_serialized() -> None:
    for kind in (ChatMpt, MptLLM):
        model = kind(target=TARGET, connection={"token": "secret"}, **GREEDY)
        assert model.invoke(STORY)
        assert not any("secret" in text for text in (repr(model), dumps(model), str(model.model_dump())))
        insecure = kind(target="models.example:50051", connection={"token": "secret"})
        with pytest.raises(InvalidTargetError, match="the token would be readable"):
            insecure.invoke(STORY)


class Recorder(BaseCallbackHandler):
    def __init__(self) -> None:
        self.tokens: list[str] = []
        self.results: list[LLMResult] = []

    def on_llm_new_token(self, token: str, **_: Any) -> None:
        self.tokens.append(token)

    def on_llm_end(self, response: LLMResult, **_: Any) -> None:
        self.results.append(response)


class AsyncRecorder(AsyncCallbackHandler):
    def __init__(self) -> None:
        self.tokens: list[str] = []

    async def on_llm_new_token(self, token: str, **_: Any) -> None:
        self.tokens.append(token)


class TestResponses:
    def test_a_chat_model_returns_the_text_of_the_client(self, chat: ChatMpt, client: Client) -> None:
        result = chat.invoke([SystemMessage("You are a fox."), HumanMessage("Hi."), AIMessage("Oh."), ("user", "Who?")])
        turns = [(Role.SYSTEM, "You are a fox."), (Role.USER, "Hi."), (Role.ASSISTANT, "Oh."), (Role.USER, "Who?")]
        assert result.content == client.generate([Message(*turn) for turn in turns], **GREEDY).text

    def test_an_llm_returns_the_text_of_the_client(self, llm: MptLLM, client: Client) -> None:
        assert llm.invoke(STORY) == client.generate(STORY, **GREEDY).text

    async def test_every_method_returns_the_same_text(self, chat: ChatMpt, llm: MptLLM) -> None:
        for model, text in ((chat, lambda chunk: chunk.content), (llm, str)):
            whole = text(model.invoke(STORY))
            assert whole
            assert "".join(text(chunk) for chunk in model.stream(STORY)) == whole
            assert text(await model.ainvoke(STORY)) == whole
            assert "".join([text(chunk) async for chunk in model.astream(STORY)]) == whole
            assert [text(result) for result in model.batch([STORY, STORY])] == [whole] * 2
            assert [text(result) for result in await model.abatch([STORY, STORY])] == [whole] * 2

    def test_the_prompts_of_a_batch_are_generated_concurrently(self, llm: MptLLM, client: Client) -> None:
        steps = client.get_server_info().load.num_steps
        results = llm.batch([f"{STORY} {n}" for n in range(4)], ignore_eos=True)
        assert client.get_server_info().load.num_steps - steps < 4 * GREEDY["max_new_tokens"]
        assert results == [client.generate(f"{STORY} {n}", ignore_eos=True, **GREEDY).text for n in range(4)]

    async def test_a_chain_streams(self, chat: ChatMpt) -> None:
        model = chat.bind(max_new_tokens=200)
        chain = ChatPromptTemplate([("user", "{question}")]) | model | StrOutputParser()
        chunks = [chunk async for chunk in chain.astream({"question": "Who are you?"})]
        assert len(chunks) > 2
        assert "".join(chunks) == model.invoke("Who are you?").content

    def test_several_outputs_are_several_generations(self, chat: ChatMpt, llm: MptLLM) -> None:
        for result in (
            chat.generate([[HumanMessage("Hi")]], num_sequences=3, temperature=1),
            llm.generate([STORY], num_sequences=3, temperature=1),
        ):
            assert len({generation.text for generation in result.generations[0]}) == 3

    async def test_a_stream_has_one_output(self, chat: ChatMpt, llm: MptLLM) -> None:
        for model in (chat, llm):
            with pytest.raises(ValueError, match="num_sequences: streaming supports only one output"):
                next(model.stream("Hi", num_sequences=2))
            with pytest.raises(ValueError, match="num_sequences: streaming supports only one output"):
                await anext(model.astream("Hi", num_sequences=2))

    def test_tokens_are_counted_by_the_server(self, chat: ChatMpt, client: Client) -> None:
        assert chat.get_token_ids("An old fox") == [token.token_id for token in client.tokenize("An old fox")]
        assert chat.get_num_tokens("An old fox") == len(client.tokenize("An old fox"))


class TestMessages:
    def test_text_parts_are_concatenated(self, chat: ChatMpt) -> None:
        parts = [{"type": "text", "text": "Who are "}, "you?"]
        assert chat.invoke([HumanMessage(parts)]).content == chat.invoke("Who are you?").content

    @pytest.mark.parametrize(
        ("message", "named"),
        [
            (HumanMessage([{"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}]), "image"),
            (ChatMessage("4", role="robot"), "chat"),
        ],
    )
    def test_messages_other_than_text_are_refused_by_type(
        self, message: BaseMessage, named: str, chat: ChatMpt
    ) -> None:
        with pytest.raises(ValueError, match=f"{named}.* not supported"):
            chat.invoke([HumanMessage("Hi"), message, HumanMessage("And?")])


def count_legs(animal: Literal["dog", "hen"]) -> int:
    """Count the legs of an animal."""
    return {"dog": 4, "hen": 2}[animal]


class Sleep(BaseModel):
    """Sleep for some hours."""

    hours: Literal[1, 2, 3]


class TestTools:
    @pytest.fixture
    def chat(self) -> ChatMpt:
        return ChatMpt(target=TARGET, max_new_tokens=200, seed=1)

    @pytest.mark.parametrize("choice", ["any", "required", True])
    def test_a_bound_model_calls_tools_and_streams_the_same_calls(self, choice: Any, chat: ChatMpt) -> None:
        model = chat.bind_tools([count_legs, Sleep], tool_choice=choice, parallel_tool_calls=False, strict=True)
        message = model.invoke("How many legs has a hen?", request_id="langchain")
        (call,) = message.tool_calls
        assert call["args"] in [{"animal": "dog"}, {"animal": "hen"}, {"hours": 1}, {"hours": 2}, {"hours": 3}]
        assert message.response_metadata["finish_reason"] == "tool_calls"
        chunks = list(model.stream("How many legs has a hen?", request_id="langchain"))
        assert sum(chunks[1:], chunks[0]).tool_calls == message.tool_calls

    @pytest.mark.parametrize("choice", ["Sleep", {"type": "function", "function": {"name": "Sleep"}}])
    async def test_one_tool_can_be_forced(self, choice: Any, chat: ChatMpt) -> None:
        message = await chat.bind_tools([count_legs, Sleep], tool_choice=choice).ainvoke("Good night!")
        assert {call["name"] for call in message.tool_calls} == {"Sleep"}

    def test_an_unknown_tool_cannot_be_forced(self, chat: ChatMpt) -> None:
        with pytest.raises(ValueError, match="tool_choice: 'dance' is none of the tools: count_legs"):
            chat.bind_tools([count_legs], tool_choice="dance")

    def test_calls_and_results_are_sent_back(self, chat: ChatMpt) -> None:
        bound = chat.bind_tools([count_legs])
        call = chat.bind_tools([count_legs], tool_choice="any").invoke("Legs?")
        results = [ToolMessage("2", tool_call_id=made["id"]) for made in call.tool_calls]
        invalid = AIMessage("", invalid_tool_calls=[{"name": "count_legs", "args": "{", "id": "x", "error": None}])
        for made in (call, invalid):
            reply = bound.invoke([HumanMessage("Legs?"), made, *results, HumanMessage("So?")], max_new_tokens=3)
            assert reply.content

    def test_an_agent_runs_to_its_end(self, chat: ChatMpt) -> None:
        @wrap_model_call
        def ask_first(request: Any, answer: Any) -> Any:
            is_question = isinstance(request.messages[-1], HumanMessage)
            return answer(request.override(tool_choice="any" if is_question else None))

        agent = create_agent(chat, [count_legs], system_prompt="Be brief.", middleware=[ask_first])
        messages = agent.invoke({"messages": [HumanMessage("How many legs has a hen?")]})["messages"]
        assert [messages[0].type, messages[1].type, messages[2].type, messages[-1].type] == [
            "human",
            "ai",
            "tool",
            "ai",
        ]
        assert messages[2].content in ("2", "4")
        assert messages[-1].content

    def test_a_call_that_was_cut_short_is_invalid(self, chat: ChatMpt) -> None:
        model = chat.bind_tools([{"name": "say", "description": "", "parameters": TEXT}], tool_choice="any")
        message = model.invoke("Hi", max_new_tokens=70)
        (call,) = message.invalid_tool_calls
        assert call["name"] == "say"
        assert message.response_metadata["finish_reason"] == "max_new_tokens"


class TestMetadata:
    async def test_a_message_equals_the_sum_of_its_streamed_chunks(self, chat: ChatMpt, client: Client) -> None:
        options: dict[str, Any] = {"seed": 2**64 - 1, "return_logprobs": True, "top_logprobs": 2, "request_id": "mine"}
        chat.invoke("Who are you?")  # fills the cache, so that the following calls read the same blocks
        whole = chat.invoke("Who are you?", **options)
        chunks = list(chat.stream("Who are you?", **options))
        achunks = [chunk async for chunk in chat.astream("Who are you?", **options)]
        for streamed in (sum(chunks[1:], chunks[0]), sum(achunks[1:], achunks[0])):
            assert streamed.response_metadata == whole.response_metadata
            assert streamed.usage_metadata == whole.usage_metadata
        assert [chunk.usage_metadata is None for chunk in chunks] == [True] * (len(chunks) - 1) + [False]

        assert whole.usage_metadata is not None
        assert whole.usage_metadata["output_tokens"] == 12
        assert whole.usage_metadata["input_token_details"]["cache_read"] > 0
        metadata = whole.response_metadata
        assert metadata["finish_reason"] == "max_new_tokens"
        assert metadata["model_name"] == client.get_model_info().name
        assert metadata["request_id"] == "mine"
        assert metadata["seed"] == 2**64 - 1
        tokens = metadata["logprobs"]["content"]
        assert "".join(token["token"] for token in tokens) == whole.content
        assert all(len(token["top_logprobs"]) == 2 for token in tokens)

    def test_a_generation_of_an_llm_equals_the_sum_of_its_streamed_chunks(self, llm: MptLLM) -> None:
        recorder = Recorder()
        config: Any = {"callbacks": [recorder]}
        options: dict[str, Any] = {"seed": 5, "request_id": "mine", "return_token_ids": True, "cache_bypass": True}
        llm.invoke(STORY, config, **options)
        list(llm.stream(STORY, config, **options))
        [whole], [streamed] = (result.generations[0] for result in recorder.results)
        assert (streamed.text, streamed.generation_info) == (whole.text, whole.generation_info)
        assert whole.generation_info is not None
        assert whole.generation_info["usage_metadata"]["output_tokens"] == 12
        assert len(whole.generation_info["token_ids"]) == 12

    def test_callbacks_receive_each_chunk(self, chat: ChatMpt, llm: MptLLM) -> None:
        for model in (chat, llm):
            recorder = Recorder()
            stream = model.stream(STORY, {"callbacks": [recorder]}, max_new_tokens=200)
            chunks = [getattr(chunk, "content", chunk) for chunk in stream]
            assert len(chunks) > 2
            assert recorder.tokens == chunks

    async def test_async_callbacks_receive_each_chunk(self, chat: ChatMpt, llm: MptLLM) -> None:
        for model in (chat, llm):
            recorder = AsyncRecorder()
            stream = model.astream(STORY, {"callbacks": [recorder]}, max_new_tokens=200)
            chunks = [getattr(chunk, "content", chunk) async for chunk in stream]
            assert len(chunks) > 2
            assert recorder.tokens == chunks

    def test_callbacks_of_a_streaming_model_receive_the_chunks_of_an_invocation(self, chat: ChatMpt) -> None:
        recorder = Recorder()
        result = ChatMpt(target=TARGET, streaming=True, **GREEDY).invoke("Hi", {"callbacks": [recorder]})
        assert len(recorder.tokens) > 2
        assert "".join(recorder.tokens) == result.content == chat.invoke("Hi").content


class TestOptions:
    def test_options_of_a_call_override_those_of_the_model(self, client: Client) -> None:
        made: dict[str, Any] = {"max_new_tokens": 9, "temperature": 1, "top_k": 1, "seed": 3}
        model = MptLLM(target=TARGET, options={"min_p": 0.5, "ignore_eos": True}, **made)
        for call in ({}, {"max_new_tokens": 4}, {"top_k": 0, "min_p": 0}, {"top_k": None, "min_p": None, "seed": 7}):
            options = {"min_p": 0.5, "ignore_eos": True, **made, **call}
            assert model.invoke(STORY, **call) == client.generate(STORY, **options).text

    def test_bound_options_apply_to_calls(self, chat: ChatMpt) -> None:
        result = chat.bind(constraint=Choice("yes", "no")).invoke("Are you sly?")
        assert result.content in ("yes", "no")
        assert result.response_metadata["finish_reason"] == "eos_token"

    def test_stop_strings_of_a_call_replace_those_of_the_model(self, llm: MptLLM) -> None:
        whole = llm.invoke(STORY)
        stopping = MptLLM(target=TARGET, stop=whole[4], **GREEDY)
        assert stopping.invoke(STORY) == whole[: whole.index(whole[4])]
        assert stopping.invoke(STORY, stop=[whole[6]]) == whole[: whole.index(whole[6])]
        assert stopping.invoke(STORY, stop=[]) == whole

    def test_langchains_names_of_options_are_accepted(self) -> None:
        model = ChatMpt(target=TARGET, max_tokens=5, timeout=60, options={"ignore_eos": True})
        assert (model.max_new_tokens, model.timeout) == (5, 60)
        assert model.invoke("Hi", max_tokens=2).usage_metadata["output_tokens"] == 2

    def test_a_timeout_ends_the_call(self, llm: MptLLM) -> None:
        with pytest.raises(DeadlineExceededError):
            llm.invoke(STORY, timeout=0.2, **LONG)
        llm.timeout = 0.2
        with pytest.raises(DeadlineExceededError):
            llm.invoke(STORY, **LONG)

    @pytest.mark.parametrize("kind", [ChatMpt, MptLLM])
    def test_an_unknown_option_is_named(self, kind: type[ChatMpt | MptLLM]) -> None:
        with pytest.raises(ValueError, match="temprature"):
            kind(temprature=1)
        with pytest.raises(ValueError, match="unknown option 'temprature'"):
            kind(options={"temprature": 1})
        with pytest.raises(TypeError, match="unknown option 'temprature'"):
            kind(target=TARGET).invoke("Hi", temprature=1)

    def test_an_option_with_a_field_is_refused_in_options(self) -> None:
        with pytest.raises(ValueError, match="not in options: temperature"):
            ChatMpt(options={"temperature": 1})

    def test_invalid_options_raise_the_clients_error(self, llm: MptLLM) -> None:
        with pytest.raises(InvalidRequestError, match="top_p"):
            llm.batch([STORY, STORY], top_p=7)

    def test_a_cache_distinguishes_constraints(self) -> None:
        cache = InMemoryCache()
        for word in ("yes", "no", "yes"):
            model = ChatMpt(target=TARGET, cache=cache, options={"constraint": Choice(word)})
            assert model.invoke("Are you sly?").content == word


class Leg(BaseModel):
    length_cm: int = Field(ge=0, le=9)


class Animal(BaseModel):
    kind: Literal["cat", "dog"]
    front_left: Leg


class Weather(TypedDict):
    """The weather."""

    sunny: bool


WEATHER = {"type": "object", "properties": {"sunny": {"type": "boolean"}}, "required": ["sunny"]}
OPEN_ENDED = {"type": "object", "properties": {"x": {"type": "string", "minLength": 200}}, "required": ["x"]}


class TestStructuredOutput:
    @pytest.fixture
    def chat(self) -> ChatMpt:
        return ChatMpt(target=TARGET, temperature=0, max_new_tokens=200)

    async def test_a_pydantic_class_returns_instances(self, chat: ChatMpt) -> None:
        model = chat.with_structured_output(Animal)
        for animal in (
            model.invoke("What is it?"),
            await model.ainvoke("What is it?"),
            list(model.stream("What is it?"))[-1],
        ):
            assert isinstance(animal, Animal)

    @pytest.mark.parametrize(
        "schema",
        [Weather, {**WEATHER, "additionalProperties": False}, {"name": "weather", "parameters": WEATHER}],
        ids=["typed dict", "json schema", "function"],
    )
    def test_other_schemas_return_dicts(self, schema: Any, chat: ChatMpt) -> None:
        result = chat.with_structured_output(schema).invoke("How is the weather?")
        assert isinstance(result["sunny"], bool)

    def test_the_raw_message_can_be_included(self, chat: ChatMpt) -> None:
        result = chat.with_structured_output(Animal, include_raw=True).invoke("What is it?")
        assert result["parsed"] == Animal.model_validate_json(result["raw"].content)
        assert result["parsing_error"] is None

    def test_an_output_that_ends_before_its_json_is_complete_is_an_error(self) -> None:
        chat = ChatMpt(target=TARGET, max_new_tokens=12)
        model = chat.with_structured_output(OPEN_ENDED)
        with pytest.raises(OutputParserException, match="ended before its JSON was complete: max_new_tokens"):
            model.invoke("Hi")
        with pytest.raises(OutputParserException, match="ended before its JSON was complete: max_new_tokens"):
            list(model.stream("Hi"))
        result = chat.with_structured_output(OPEN_ENDED, include_raw=True).invoke("Hi")
        assert isinstance(result["parsing_error"], OutputParserException)
        assert result["parsed"] is None
        assert result["raw"].response_metadata["finish_reason"] == "max_new_tokens"

    def test_an_unknown_option_is_named(self, chat: ChatMpt) -> None:
        with pytest.raises(ValueError, match="unknown option: stricter"):
            chat.with_structured_output(Animal, stricter=True)


class TestLeavingEarly:
    @pytest.fixture(params=[ChatMpt, MptLLM])
    def model(self, request: pytest.FixtureRequest) -> ChatMpt | MptLLM:
        model: ChatMpt | MptLLM = request.param(target=TARGET)
        return model

    async def test_leaving_a_loop_cancels_the_generation(self, model: ChatMpt | MptLLM) -> None:
        async with generation_cut_short():
            for _ in model.stream(STORY, **LONG):
                break

    async def test_leaving_an_async_loop_cancels_the_generation(self, model: ChatMpt | MptLLM) -> None:
        async with generation_cut_short():
            async for _ in model.astream(STORY, **LONG):
                break

    @pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
    async def test_cancelling_a_task_cancels_the_generation(self, streamed: bool, model: ChatMpt | MptLLM) -> None:
        async def read() -> None:
            async for _ in model.astream(STORY, **LONG):
                pass

        async with generation_cut_short() as client:
            task = asyncio.create_task(read() if streamed else model.ainvoke(STORY, **LONG))
            while not (await client.get_server_info()).load.num_running_requests:
                assert not task.done()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    async def test_a_prompt_that_fails_cancels_the_rest_of_its_batch(self, llm: MptLLM) -> None:
        async with generation_cut_short():
            with pytest.raises(InvalidRequestError):
                await llm.abatch(["", STORY], **LONG)

    def test_a_prompt_that_fails_cancels_the_rest_of_its_batch_in_threads(self, llm: MptLLM) -> None:
        async def check() -> None:
            async with generation_cut_short():
                with pytest.raises(InvalidRequestError):
                    llm.batch(["", STORY], **LONG)

        asyncio.run(check())


@asynccontextmanager
async def generation_cut_short() -> AsyncIterator[AsyncClient]:
    """Checks that the server becomes idle before a generation with the options LONG would have ended."""
    async with AsyncClient(TARGET) as client:
        before = (await client.get_server_info()).load.num_output_tokens
        yield client
        while (load := (await client.get_server_info()).load).num_running_requests:
            pass
        assert load.num_output_tokens - before < LONG["max_new_tokens"]


class TestConnections:
    def test_a_model_drops_the_clients_of_closed_event_loops(self, chat: ChatMpt) -> None:
        async def invoke() -> Any:
            return (await chat.ainvoke("Hi")).content

        gc.collect()
        before = num_async_clients()
        assert asyncio.run(invoke()) == asyncio.run(invoke()) == asyncio.run(invoke()) == chat.invoke("Hi").content
        gc.collect()
        assert num_async_clients() == before + 1

    def test_a_copy_creates_its_own_connections(self, chat: ChatMpt) -> None:
        result = chat.invoke("Hi").content
        for other in (pickle.loads(pickle.dumps(chat)), copy.deepcopy(chat), chat.model_copy()):
            assert other.asdict() == chat.asdict()
            assert other.invoke("Hi").content == result

    def test_a_changed_target_is_used(self, chat: ChatMpt) -> None:
        chat.invoke("Hi")
        with pytest.raises(UnavailableError):
            chat.model_copy(update={"target": "localhost:1"}).invoke("Hi")

    def test_of_several_targets_one_that_responds_is_used(self, chat: ChatMpt) -> None:
        several = chat.model_copy(update={"target": ["localhost:1", TARGET]})
        assert several.invoke("Hi").content == chat.invoke("Hi").content
        assert "".join(chunk.text for chunk in several.stream("Hi")) == chat.invoke("Hi").content

    def test_models_can_be_serialized_and_loaded(self, chat: ChatMpt, llm: MptLLM) -> None:
        for model in (chat, llm):
            kind, serialized = type(model), dumps(model)
            loaded = loads(serialized, allowed_objects=[kind], valid_namespaces=["mpt_grpc_client"])
            assert isinstance(loaded, kind)
            assert loaded.asdict() == model.asdict()


def num_async_clients() -> int:
    return sum(isinstance(item, AsyncClient) for item in gc.get_objects())

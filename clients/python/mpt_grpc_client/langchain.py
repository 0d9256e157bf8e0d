"""LangChain models over gRPC: the chat model `ChatMpt` and the text model `MptLLM`.

Requires the extra `langchain`; the package itself does not import this module. `langchain_model.py` has what both
share, and `langchain_values.py` translates messages and results.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, ExitStack
from operator import itemgetter
from typing import Any

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel, BaseLLM, LanguageModelInput
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.outputs import ChatGenerationChunk, ChatResult, GenerationChunk, LLMResult
from langchain_core.runnables import Runnable, RunnableMap, RunnablePassthrough
from langchain_core.tools import BaseTool
from pydantic import BaseModel, ConfigDict

from mpt_grpc_client import langchain_values as values
from mpt_grpc_client.constraints import JsonSchema
from mpt_grpc_client.langchain_model import Model


class ChatMpt(Model, BaseChatModel):
    """A chat model. The server's chat template turns the messages, which must be text, into a prompt.

    A keyword argument of a call, one of `GenerateOptions` or `timeout`, overrides the model's field.
    """

    model_config = ConfigDict(extra="forbid")

    streaming: bool = False
    """Whether `invoke` streams internally, for callbacks that receive tokens."""

    @property
    def _llm_type(self) -> str:
        return "mpt-grpc-chat"

    def bind_tools(
        self,
        tools: Sequence[dict[str, Any] | type | Callable[..., Any] | BaseTool],
        *,
        tool_choice: dict[str, Any] | str | bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, AIMessage]:
        """Returns a model that may call these tools: functions, pydantic classes, LangChain's tools or schemas.

        tool_choice: `auto`, `none`, `any` or `required`, or the name of the tool that must be called.
        kwargs: `GenerateOptions` such as `parallel_tool_calls`. `strict` is accepted and ignored; the arguments always
        conform to the tool's schema.
        """
        kwargs.pop("strict", None)
        return self.bind(**values.tool_options(tools, tool_choice), **kwargs)

    def with_structured_output(
        self, schema: dict[str, Any] | type, *, include_raw: bool = False, **kwargs: Any
    ) -> Runnable[LanguageModelInput, dict[str, Any] | BaseModel]:
        """Returns a model whose outputs the server constrains to a schema: a pydantic class, a TypedDict or a JSON
        Schema.

        include_raw: return a dict with `raw`, `parsed` and `parsing_error`, and do not raise parsing errors.
        kwargs: `method` and `strict` are accepted and ignored; the output is always constrained.
        Raises ValueError for other keywords. Invoking raises OutputParserException if the output ended before its JSON.
        """
        if unknown := kwargs.keys() - {"method", "strict"}:
            raise ValueError(f"unknown option: {', '.join(sorted(unknown))}")
        form = {"kwargs": {"method": "json_schema"}, "schema": schema}
        model = self.bind(constraint=JsonSchema(values.json_schema(schema)), ls_structured_output_format=form)
        parser = values.json_parser(schema)
        if not include_raw:
            return model | parser
        parsed = RunnablePassthrough.assign(parsed=itemgetter("raw") | parser, parsing_error=lambda _: None)
        failed = RunnablePassthrough.assign(parsed=lambda _: None)
        return RunnableMap(raw=model) | parsed.with_fallbacks([failed], exception_key="parsing_error")

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,  # noqa: ARG002
        **kwargs: Any,
    ) -> ChatResult:
        client, model_name = self._connect()
        return values.chat_result(
            client.generate(values.conversation(messages), **self._asked(stop, kwargs)), model_name
        )

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,  # noqa: ARG002
        **kwargs: Any,
    ) -> ChatResult:
        client, model_name = await self._connect_async()
        generation = await client.generate(values.conversation(messages), **self._asked(stop, kwargs))
        return values.chat_result(generation, model_name)

    # LangChain itself reports the chunks of a chat model to callbacks.
    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,  # noqa: ARG002
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        client, model_name = self._connect()
        with client.stream(values.conversation(messages), **self._asked_to_stream(stop, kwargs)) as stream:
            for delta in stream.deltas():
                if chunk := values.chat_chunk(delta, stream, model_name):
                    yield chunk

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,  # noqa: ARG002
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        client, model_name = await self._connect_async()
        async with client.stream(values.conversation(messages), **self._asked_to_stream(stop, kwargs)) as stream:
            async for delta in stream.deltas():
                if chunk := values.chat_chunk(delta, stream, model_name):
                    yield chunk

    def _get_llm_string(self, stop: list[str] | None = None, **kwargs: Any) -> str:
        # LangChain's own cache key ignores the value of a constraint in `options`.
        return str(sorted(self._get_invocation_params(stop=stop, **kwargs).items()))


class MptLLM(Model, BaseLLM):
    """A model that continues text, without a chat template. The prompts of a batch are generated concurrently.

    A keyword argument of a call, one of `GenerateOptions` or `timeout`, overrides the model's field.
    """

    model_config = ConfigDict(extra="forbid")

    @property
    def _llm_type(self) -> str:
        return "mpt-grpc"

    def _generate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,  # noqa: ARG002
        **kwargs: Any,
    ) -> LLMResult:
        client, model_name = self._connect()
        asked = self._asked(stop, kwargs)
        with ExitStack() as stack:
            # Creating a stream sends its request, and an error cancels the other streams.
            streams = [stack.enter_context(client.stream(prompt, **asked)) for prompt in prompts]
            for stream in streams:
                for _ in stream.deltas():
                    pass
            return values.llm_result([stream.result for stream in streams], model_name)

    async def _agenerate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,  # noqa: ARG002
        **kwargs: Any,
    ) -> LLMResult:
        client, model_name = await self._connect_async()
        asked = self._asked(stop, kwargs)
        async with AsyncExitStack() as stack:
            streams = [await stack.enter_async_context(client.stream(prompt, **asked)) for prompt in prompts]
            for stream in streams:
                async for _ in stream.deltas():
                    pass
            return values.llm_result([stream.result for stream in streams], model_name)

    def _stream(
        self,
        prompt: str,
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[GenerationChunk]:
        client, model_name = self._connect()
        with client.stream(prompt, **self._asked_to_stream(stop, kwargs)) as stream:
            for delta in stream.deltas():
                if chunk := values.llm_chunk(delta, stream, model_name):
                    if run_manager:
                        run_manager.on_llm_new_token(chunk.text, chunk=chunk)
                    yield chunk

    async def _astream(
        self,
        prompt: str,
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[GenerationChunk]:
        client, model_name = await self._connect_async()
        async with client.stream(prompt, **self._asked_to_stream(stop, kwargs)) as stream:
            async for delta in stream.deltas():
                if chunk := values.llm_chunk(delta, stream, model_name):
                    if run_manager:
                        await run_manager.on_llm_new_token(chunk.text, chunk=chunk)
                    yield chunk

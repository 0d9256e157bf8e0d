"""LangChain models over gRPC: the chat model `ChatMpt` and the text model `MptLLM`.

Requires the extra `langchain`; the package itself does not import this module. `langchain_values.py` translates
messages and results.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, ExitStack
from operator import itemgetter
from typing import Any

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel, BaseLanguageModel, BaseLLM, LanguageModelInput
from langchain_core.language_models.base import LangSmithParams
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.outputs import ChatGenerationChunk, ChatResult, GenerationChunk, LLMResult
from langchain_core.runnables import Runnable, RunnableMap, RunnablePassthrough
from langchain_core.tools import BaseTool
from pydantic import AliasChoices, BaseModel, ConfigDict, Field, PrivateAttr, field_validator

from mpt_grpc_client import langchain_values as values
from mpt_grpc_client.async_client import AsyncClient
from mpt_grpc_client.client import Client
from mpt_grpc_client.constraints import JsonSchema
from mpt_grpc_client.options import GenerateOptions
from mpt_grpc_client.request import unknown_option
from mpt_grpc_client.targets import resolve_targets


class _Model(BaseLanguageModel[Any]):
    """The fields and connections that both models share.

    A keyword argument of a call overrides the field; None selects the server's default.
    """

    target: str | list[str] = Field(default_factory=lambda: ",".join(resolve_targets(None)))
    """As for `Client`; defaults to the environment variable MPT_GRPC_TARGET, then to `localhost:50051`. Several are a
    list, or separated by commas: each continues what another one began and could not complete."""
    connection: dict[str, Any] = Field(default_factory=dict, exclude=True, repr=False)
    """`ConnectionOptions`, such as the access token. Neither printed nor serialized, since they contain secrets."""
    timeout: float | None = None
    """The timeout of each call in seconds; None waits indefinitely."""
    model: str | None = None
    """This and the following fields are described in `GenerateOptions`."""
    max_new_tokens: int | None = Field(default=None, validation_alias=AliasChoices("max_new_tokens", "max_tokens"))
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None
    stop_strings: str | list[str] | None = Field(default=None, validation_alias=AliasChoices("stop_strings", "stop"))
    options: dict[str, Any] = Field(default_factory=dict)
    """Other `GenerateOptions`."""

    _connections: _Connections = PrivateAttr(default_factory=lambda: _Connections())

    @field_validator("options")
    @classmethod
    def _check_options(cls, options: dict[str, Any]) -> dict[str, Any]:
        unknown = options.keys() - GenerateOptions.__optional_keys__
        if unknown:
            raise ValueError("; ".join(map(unknown_option, sorted(unknown))))
        if twice := options.keys() & cls.model_fields:
            raise ValueError(f"set these as fields of the model, not in options: {', '.join(sorted(twice))}")
        return options

    @classmethod
    def is_lc_serializable(cls) -> bool:
        return True

    def get_token_ids(self, text: str) -> list[int]:
        """Returns the model's token IDs of a text, with which LangChain counts tokens."""
        client, _ = self._connect()
        return [token.token_id for token in client.tokenize(text, timeout=self.timeout)]

    def _asked(self, stop: list[str] | None, call: dict[str, Any]) -> dict[str, Any]:
        """Returns the keyword arguments of the client's call."""
        made = {name: value for name in _OPTION_FIELDS if (value := getattr(self, name)) is not None}
        asked = {**self.options, **made, **{_STANDARD_NAMES.get(name, name): value for name, value in call.items()}}
        return asked if stop is None else {**asked, "stop_strings": stop}

    def _asked_to_stream(self, stop: list[str] | None, call: dict[str, Any]) -> dict[str, Any]:
        """Returns the keyword arguments of a streaming call. Raises ValueError for several outputs."""
        asked = self._asked(stop, call)
        if asked.get("num_sequences") not in (None, 1):
            raise ValueError("num_sequences: streaming supports only one output")
        return asked

    def _connect(self) -> tuple[Client, str]:
        """Returns the client and the name of the server's model."""
        client, names = self._connections.client(self._targets, self.connection), self._connections.model_names
        if self._targets not in names:
            names[self._targets] = client.get_model_info(timeout=self.timeout).name
        return client, names[self._targets]

    async def _connect_async(self) -> tuple[AsyncClient, str]:
        client, names = self._connections.async_client(self._targets, self.connection), self._connections.model_names
        if self._targets not in names:
            names[self._targets] = (await client.get_model_info(timeout=self.timeout)).name
        return client, names[self._targets]

    @property
    def _targets(self) -> tuple[str, ...]:
        return resolve_targets(self.target)

    @property
    def _identifying_params(self) -> dict[str, Any]:
        names = ("target", *_OPTION_FIELDS, "options")
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        params, asked = super()._get_ls_params(stop=stop, **kwargs), self._asked(stop, kwargs)
        params["ls_model_name"] = asked.get("model") or "mpt"
        if (max_new_tokens := asked.get("max_new_tokens")) is not None:
            params["ls_max_tokens"] = max_new_tokens
        if stop := asked.get("stop_strings"):
            params["ls_stop"] = [stop] if isinstance(stop, str) else list(stop)
        return params


class ChatMpt(_Model, BaseChatModel):
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


class MptLLM(_Model, BaseLLM):
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


_OPTION_FIELDS = ("timeout", "model", "max_new_tokens", "temperature", "top_k", "top_p", "seed", "stop_strings")
_STANDARD_NAMES = {"max_tokens": "max_new_tokens", "stop": "stop_strings"}
"""LangChain's names of options that have another name here."""


class _Connections:
    """The clients of one model, created on first use: one for threads and one for each event loop."""

    def __init__(self) -> None:
        self.model_names: dict[tuple[str, ...], str] = {}
        """The name of the servers' model by their targets."""
        self._lock = threading.Lock()
        self._clients: dict[tuple[str, ...], Client] = {}
        self._async_clients: dict[tuple[asyncio.AbstractEventLoop, tuple[str, ...]], AsyncClient] = {}

    def __reduce__(self) -> tuple[type[_Connections], tuple[()]]:
        """Copies and unpickled models create their own connections."""
        return _Connections, ()

    def client(self, targets: tuple[str, ...], options: dict[str, Any]) -> Client:
        with self._lock:
            if targets not in self._clients:
                self._clients[targets] = Client(targets, **options)
            return self._clients[targets]

    def async_client(self, targets: tuple[str, ...], options: dict[str, Any]) -> AsyncClient:
        """Returns the client of the running loop. Clients of closed loops are discarded."""
        key = asyncio.get_running_loop(), targets
        with self._lock:
            for ended in [key for key in self._async_clients if key[0].is_closed()]:
                del self._async_clients[ended]
            if key not in self._async_clients:
                self._async_clients[key] = AsyncClient(targets, **options)
            return self._async_clients[key]

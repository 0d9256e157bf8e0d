"""The HTTP application: OpenAI's endpoints, and those around them, over one gRPC client."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi_offline import FastAPIOffline
from opentelemetry import context as trace_context
from opentelemetry import propagate
from pydantic import BaseModel
from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from mpt_grpc import __version__
from mpt_grpc.gateway import tokens
from mpt_grpc.gateway.answers import ChatAnswer, Json, TextAnswer
from mpt_grpc.gateway.api_docs import add_schemas, body_of
from mpt_grpc.gateway.body import parsed
from mpt_grpc.gateway.completions import complete, stream_completion
from mpt_grpc.gateway.errors import NAMES, BadRequestError, error_body, error_response
from mpt_grpc.gateway.page import add_page
from mpt_grpc.gateway.requests import ChatCompletionRequest, CompletionRequest
from mpt_grpc_client import AsyncClient, GenerateOptions, Message, MptGrpcError

_Result = TypeVar("_Result")
_NAME_HOLDS_S = 5
_IDLE_S = 15


def make_app(client: AsyncClient, *, strict_model_names: bool = False) -> FastAPI:
    """The application. Any model's name is answered by the loaded model unless `strict_model_names`."""
    app: FastAPI = FastAPIOffline(
        title="mpt-grpc",
        version=__version__,
        description="OpenAI's API for an MPT model.",
        redoc_url=None,
        responses={"default": {"description": "An error, in OpenAI's form"}},
    )
    gateway = _Gateway(client, strict_model_names)
    routes: tuple[tuple[str, str, Callable[..., Any], type[BaseModel] | None], ...] = (
        ("POST", "/v1/chat/completions", gateway.chat_completions, ChatCompletionRequest),
        ("POST", "/v1/completions", gateway.completions, CompletionRequest),
        ("POST", "/v1/embeddings", gateway.embeddings, None),
        ("GET", "/v1/models", gateway.models, None),
        ("GET", "/v1/models/{name:path}", gateway.model, None),
        ("POST", "/tokenize", gateway.tokenize, tokens.TokenizeRequest),
        ("POST", "/detokenize", gateway.detokenize, tokens.DetokenizeRequest),
        ("GET", "/tokenizer_info", gateway.tokenizer_info, None),
        ("GET", "/health", gateway.health, None),
        ("GET", "/ready", gateway.ready, None),
    )
    for method, path, endpoint, body in routes:
        app.add_api_route(path, endpoint, methods=[method], response_model=None, openapi_extra=body_of(body))
    add_schemas(app, [body for _, _, _, body in routes if body is not None])
    add_page(app, client)
    for kind in (MptGrpcError, BadRequestError, Exception):
        app.add_exception_handler(kind, _on_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    return app


class _Gateway:
    def __init__(self, client: AsyncClient, strict_model_names: bool) -> None:
        self._client, self._strict = client, strict_model_names
        self._name, self._name_until_s = "", 0.0

    async def chat_completions(self, request: Request) -> Response:
        """Answers a conversation, whole or as server-sent events."""
        asked = await parsed(request, ChatCompletionRequest)
        request.state.names = asked.names
        with _callers_trace(request):
            messages = [message.message() for message in asked.messages]
            function_name = None if asked.function is None else asked.function.name
            answer = ChatAnswer(await self._model_name(asked.model), _request_id(request), function_name)
            options = asked.options()
            options["request_id"] = _request_id(request)
            if asked.stream:
                chunks = self._stream_chat(asked, messages, options, answer)
                return await _events(request, chunks, answer.idle_chunk())
            generation = await _unless_left(request, self._client.generate(messages, **options))
            return JSONResponse(answer.whole(generation, bool(asked.logprobs)))

    async def completions(self, request: Request) -> Response:
        """Continues one prompt or several, whole or as server-sent events."""
        asked = await parsed(request, CompletionRequest)
        request.state.names = asked.names
        with _callers_trace(request):
            request_id = _request_id(request)
            answer = TextAnswer(await self._model_name(asked.model), request_id)
            if asked.stream:
                chunks = stream_completion(self._client, asked, answer, request_id)
                return await _events(request, chunks, answer.idle_chunk())
            whole = await _unless_left(request, complete(self._client, asked, answer, request_id))
            return JSONResponse(whole)

    async def embeddings(self) -> Response:
        """Refuses: this model has none."""
        raise BadRequestError("embeddings are not supported: the model generates text", status=404)

    async def models(self) -> Response:
        """Lists the one model that is loaded."""
        return JSONResponse({"object": "list", "data": [await self._model()]})

    async def model(self, name: str) -> Response:
        """Describes the model of this name."""
        model = await self._model()
        if model["id"] != name:
            raise _unknown(name, model["id"])
        return JSONResponse(model)

    async def tokenize(self, request: Request) -> Response:
        """Gives the tokens of a text."""
        return JSONResponse(await tokens.tokenize(self._client, await parsed(request, tokens.TokenizeRequest)))

    async def detokenize(self, request: Request) -> Response:
        """Gives the text of tokens."""
        return JSONResponse(await tokens.detokenize(self._client, await parsed(request, tokens.DetokenizeRequest)))

    async def tokenizer_info(self) -> Response:
        """Tells the special tokens."""
        return JSONResponse(await tokens.tokenizer_info(self._client))

    async def health(self) -> Response:
        """Says that this process answers."""
        return JSONResponse({"status": "ok"})

    async def ready(self) -> Response:
        """Says whether the gRPC server answers: 200 or 503."""
        try:
            await self._client.get_server_info(timeout=2)
        except MptGrpcError as error:
            return JSONResponse({"status": "unavailable", "message": str(error)}, 503)
        return JSONResponse({"status": "ready"})

    async def _stream_chat(
        self, asked: ChatCompletionRequest, messages: list[Message], options: GenerateOptions, answer: ChatAnswer
    ) -> AsyncIterator[Json]:
        begun: set[int] = set()
        async with self._client.stream(messages, **options) as stream:
            async for delta in stream.deltas():
                if delta.index not in begun:
                    begun.add(delta.index)
                    yield answer.first_chunk(delta.index)
                if delta.text or delta.logprobs or delta.finish:
                    yield answer.chunk(delta, bool(asked.logprobs))
            if asked.includes_usage:
                yield answer.usage_chunk([stream.result.usage])

    async def _model(self) -> dict[str, Any]:
        info = await self._client.get_model_info()
        return {
            "id": info.name,
            "object": "model",
            "created": 0,
            "owned_by": "mpt-grpc",
            "max_model_len": info.max_context_tokens,
        }

    async def _model_name(self, asked: str) -> str:
        # Asked for now and then only: it costs a call, and changes with the server's restart at most.
        if (now_s := time.monotonic()) > self._name_until_s:
            self._name, self._name_until_s = (await self._client.get_model_info()).name, now_s + _NAME_HOLDS_S
        if self._strict and asked not in ("", self._name):
            raise _unknown(asked, self._name)
        return self._name


def _unknown(asked: str, name: str) -> BadRequestError:
    why = f"model {asked!r} is not loaded; this server has {name!r}"
    return BadRequestError(why, "model", status=404, code="model_not_found")


def _request_id(request: Request) -> str | None:
    return request.headers.get("x-request-id")


@contextlib.contextmanager
def _callers_trace(request: Request) -> Iterator[None]:
    """Inside it calls belong to the trace that the HTTP caller has begun."""
    token = trace_context.attach(propagate.extract(dict(request.headers)))
    try:
        yield
    finally:
        trace_context.detach(token)


async def _unless_left(request: Request, call: Awaitable[_Result]) -> _Result:
    """Awaits a call, and cancels it if the HTTP caller goes away meanwhile."""
    working = asyncio.ensure_future(call)
    leaving = asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            working.cancel()
            raise BadRequestError("the caller has left", status=499)
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _events(request: Request, chunks: AsyncIterator[Json], idle_chunk: Json) -> Response:
    """Server-sent events. What fails before the first is an HTTP error, later an event that says so.

    Where nothing comes for a while, `idle_chunk` does: comments are no sign of life to LangChain, which gives up.
    """
    first = await _unless_left(request, _next(chunks))

    async def events() -> AsyncIterator[ServerSentEvent]:
        async with contextlib.aclosing(chunks):  # type: ignore[type-var]
            try:
                if first is not None:
                    yield _event(first)
                async for chunk in chunks:
                    yield _event(chunk)
            except MptGrpcError as error:
                yield _event(error_body(error, _names(request))[1])
                return
            yield ServerSentEvent("[DONE]", sep="\n")

    return EventSourceResponse(events(), ping=_IDLE_S, ping_message_factory=lambda: _event(idle_chunk))


async def _next(chunks: AsyncIterator[Json]) -> Json | None:
    return await anext(chunks, None)


def _event(chunk: Json) -> ServerSentEvent:
    return ServerSentEvent(json.dumps(chunk, ensure_ascii=False), sep="\n")


async def _on_error(request: Request, error: Exception) -> JSONResponse:
    return error_response(error, _names(request))


async def _on_http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    status, why = error.status_code, str(error.detail)
    if status in (404, 405):
        why = f"no such endpoint: {request.method} {request.url.path}; /docs shows those that there are"
    response = error_response(BadRequestError(why, status=status))
    response.headers.update(error.headers or {})
    return response


def _names(request: Request) -> Mapping[str, str]:
    """What this caller knows the gRPC API's fields by."""
    names: Mapping[str, str] = getattr(request.state, "names", NAMES)
    return names

"""What each endpoint of the HTTP application does with a request: its calls of the gRPC client and its response."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import Any

from fastapi import Request
from grpc_health.v1.health_pb2_grpc import HealthStub
from starlette.responses import JSONResponse, Response

from mpt_grpc import __version__
from mpt_grpc.gateway import tokens
from mpt_grpc.gateway.callers import Callers, KnownServer
from mpt_grpc.gateway.completions import complete, read_completion, stream_completion
from mpt_grpc.gateway.conversations import read_conversation
from mpt_grpc.gateway.disconnection import unless_disconnected
from mpt_grpc.gateway.error_handlers import field_names
from mpt_grpc.gateway.errors import BadRequestError, shortened
from mpt_grpc.gateway.events import EventStream, event
from mpt_grpc.gateway.field_rules import COMPLETION_RULES, RESPONSE_RULES, TOKENIZATION_RULES
from mpt_grpc.gateway.health import unreadiness
from mpt_grpc.gateway.model_response import ModelResponse
from mpt_grpc.gateway.parsing import parse
from mpt_grpc.gateway.requests import ChatCompletionRequest, CompletionRequest
from mpt_grpc.gateway.response_request import ResponseRequest
from mpt_grpc.gateway.responses import ChatResponse, Json, PartedResponse, TextResponse, built
from mpt_grpc_client import Client, Generation, MptGrpcError, PreparedPrompt

MAX_OUTPUTS = 256
"""The maximum number of outputs of one text completion, prompts times n: they all start at once."""


class Endpoints:
    """The functions that FastAPI calls; `/docs` displays their docstrings."""

    def __init__(
        self, callers: Callers, blocking_client: Client | None, healths: Sequence[HealthStub], strict_model_names: bool
    ) -> None:
        self._callers, self._blocking_client, self._strict = callers, blocking_client, strict_model_names
        self._healths = healths

    async def chat_completions(self, request: Request) -> Response:
        """Replies to a conversation, in one response or as server-sent events."""
        body, generate = await parse(
            request, ChatCompletionRequest, COMPLETION_RULES, partial(read_conversation, request)
        )
        model = await self._model_name(request, body.model)
        response = ChatResponse(
            model, _request_id(request), has_logprobs=body.has_logprobs, includes_usage=body.includes_usage
        )
        return await self._reply(request, body, generate, response)

    async def responses(self, request: Request) -> Response:
        """Replies to a conversation of items, in one response or as server-sent events. Nothing is stored."""
        body, generate = await parse(request, ResponseRequest, RESPONSE_RULES, partial(read_conversation, request))
        response = ModelResponse(await self._model_name(request, body.model), _request_id(request), body)
        return await self._reply(request, body, generate, response)

    async def stored_response(self) -> Response:
        """Not supported: responses are not stored."""
        raise BadRequestError("responses are not stored; send the conversation as input", status=404)

    async def other_use_of_input(self) -> Response:
        """Not supported: input is only replied to."""
        why = "not supported; /tokenize counts tokens, and truncation in /v1/responses drops the oldest messages"
        raise BadRequestError(why, status=404)

    async def _reply(
        self,
        request: Request,
        body: ChatCompletionRequest | ResponseRequest,
        generate: PreparedPrompt,
        response: ChatResponse | ModelResponse,
    ) -> Response:
        client = self._callers.client(request)
        if body.stream:
            return await _events(request, response.chunks(lambda: client.stream(generate)), response)

        def build(generation: Generation) -> Response:
            return PartedResponse(response.complete(generation))

        held = [await unless_disconnected(request, client.generate(generate))]
        return await built(build, held, has_logprobs=body.has_logprobs)

    async def completions(self, request: Request) -> Response:
        """Continues one or several prompts, in one response or as server-sent events."""
        max_outputs = min((await self._server(request)).max_in_progress, MAX_OUTPUTS)
        read = partial(read_completion, request, max_outputs)
        body, requests = await parse(request, CompletionRequest, COMPLETION_RULES, read, max_prompts=max_outputs)
        client = self._callers.client(request)
        model = await self._model_name(request, body.model)
        response = TextResponse(model, _request_id(request), includes_usage=body.includes_usage)
        if body.stream:
            return await _events(request, stream_completion(client, body, requests, response), response)
        return await unless_disconnected(request, complete(client, body, requests, response))

    async def embeddings(self) -> Response:
        """Not supported: the model only generates text."""
        raise BadRequestError("embeddings are not supported: the model only generates text", status=404)

    async def models(self, request: Request) -> Response:
        """Lists the loaded model."""
        return JSONResponse({"object": "list", "data": [await self._model(request)]})

    async def model(self, request: Request, name: str) -> Response:
        """Returns the model with this name."""
        model = await self._model(request)
        if model["id"] != name:
            raise _unknown_model(name, model["id"])
        return JSONResponse(model)

    async def tokenize(self, request: Request) -> Response:
        """Splits text into tokens."""
        read = partial(tokens.read_tokenization, request)
        body, generate = await parse(request, tokens.TokenizeRequest, TOKENIZATION_RULES, read)
        blocking_client = self._blocking_client and self._blocking_client.with_metadata(*request.state.caller)
        call = tokens.tokenize(self._callers.client(request), blocking_client, body, generate)
        return await unless_disconnected(request, call)

    async def detokenize(self, request: Request) -> Response:
        """Returns the text of token IDs."""
        request.state.field_names = tokens.DETOKENIZE_FIELD_NAMES
        body = await parse(request, tokens.DetokenizeRequest, TOKENIZATION_RULES, lambda body: body)
        call = tokens.detokenize(self._callers.client(request), body)
        return JSONResponse(await unless_disconnected(request, call))

    async def tokenizer_info(self, request: Request) -> Response:
        """Returns the special tokens and the context length."""
        return JSONResponse(await tokens.tokenizer_info(self._callers.client(request)))

    async def version(self) -> Response:
        """Returns the version of the server, or of the gateway if it runs separately."""
        return JSONResponse({"version": __version__})

    async def health(self) -> Response:
        """Returns 200 while this process runs."""
        return JSONResponse({"status": "ok"})

    async def ready(self) -> Response:
        """Returns 200 if a gRPC server reports SERVING, otherwise 503."""
        if (why := await unreadiness(self._healths)) is not None:
            return JSONResponse({"status": "unavailable", "message": why}, 503)
        return JSONResponse({"status": "ready"})

    async def _model(self, request: Request) -> dict[str, Any]:
        info = await self._callers.client(request).get_model_info()
        return {
            "id": info.name,
            "object": "model",
            "created": 0,
            "owned_by": "mpt-grpc",
            "max_model_len": info.max_context_tokens,
        }

    async def _model_name(self, request: Request, requested: str) -> str:
        """Returns the name of the loaded model. Raises BadRequestError if names are strict and it is another one."""
        name = (await self._server(request)).model_name
        if self._strict and requested not in ("", name):
            raise _unknown_model(requested, name)
        return name

    async def _server(self, request: Request) -> KnownServer:
        return await self._callers.server(request.state.caller)


def _unknown_model(requested: str, name: str) -> BadRequestError:
    why = f"model {shortened(requested)!r} is not loaded; the loaded model is {name!r}"
    return BadRequestError(why, "model", status=404, code="model_not_found")


def _request_id(request: Request) -> str:
    request_id: str = request.state.request_id
    return request_id


async def _events(
    request: Request, chunks: AsyncIterator[Json], response: ChatResponse | TextResponse | ModelResponse
) -> Response:
    """Returns chunks as server-sent events. A failure before the first is an HTTP error, a later one an error event.

    An empty chunk is sent whenever the stream has been idle for a while. A comment would not do: LangChain ignores
    comments and times out.
    """
    first = await unless_disconnected(request, anext(chunks, None))
    names = field_names(request)  # without the request, which holds the function

    def failure(error: MptGrpcError) -> bytes:
        return event(response.failure(error, names))

    request.state.failure_event = failure

    async def events() -> AsyncIterator[bytes]:
        async with contextlib.aclosing(chunks):  # type: ignore[type-var]
            try:
                if first is not None:
                    yield event(first)
                async for chunk in chunks:
                    yield event(chunk)
            except MptGrpcError as error:
                yield failure(error)
                return
            yield response.end

    return EventStream(events(), lambda: event(response.empty_chunk()))

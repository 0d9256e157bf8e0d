"""The HTTP application: the OpenAI-compatible endpoints and a few others, served by calls of one gRPC client."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI
from fastapi.routing import APIRoute
from fastapi_offline import FastAPIOffline
from grpc_health.v1.health_pb2_grpc import HealthStub
from pydantic import BaseModel

from mpt_grpc import __version__
from mpt_grpc.gateway import openapi, schemas, tokens
from mpt_grpc.gateway.callers import CallerMiddleware, Callers
from mpt_grpc.gateway.endpoints import Endpoints
from mpt_grpc.gateway.error_handlers import add_error_handlers
from mpt_grpc.gateway.page import add_page
from mpt_grpc.gateway.requests import ChatCompletionRequest, CompletionRequest
from mpt_grpc.gateway.response_request import ResponseRequest
from mpt_grpc_client import Client

_EVENTS = "text/event-stream"
_JSON = "application/json"


@dataclass(frozen=True)
class _Route:
    method: str
    path: str
    endpoint: Callable[..., Any]
    request: type[BaseModel] | None = None
    """The schema of the body."""
    responses: Mapping[str, type[BaseModel]] = field(default_factory=dict)
    """The schema of a successful response for each media type, where there is one."""


def make_app(
    callers: Callers,
    blocking_client: Client | None,
    healths: Sequence[HealthStub],
    *,
    shows_engine: bool = True,
    strict_model_names: bool = False,
) -> FastAPI:
    """Returns the application. The loaded model serves requests for any model unless `strict_model_names`.

    blocking_client: makes the calls whose responses are too large to be parsed on the event loop; None if the
        asynchronous client gets them as objects.
    healths: the health of each server.
    shows_engine: whether the web page shows the state of the engine, of which there must be one.
    """
    app: FastAPI = FastAPIOffline(
        title="mpt-grpc",
        version=__version__,
        description="OpenAI-compatible API for an MPT model.",
        redoc_url=None,
        redirect_slashes=False,
        responses={"default": openapi.response("An error, in OpenAI's format", {_JSON: schemas.ErrorResponse})},
    )
    for route in app.routes:  # FastAPI's own
        if isinstance(route, APIRoute):
            route.methods = {*(route.methods or ()), "HEAD"}
    endpoints = Endpoints(callers, blocking_client, healths, strict_model_names)
    models: dict[str, type[BaseModel]] = {_JSON: schemas.ModelList}
    chat: dict[str, type[BaseModel]] = {_JSON: schemas.ChatCompletion, _EVENTS: schemas.ChatCompletionChunk}
    model_response: dict[str, type[BaseModel]] = {_JSON: schemas.ModelResponse, _EVENTS: schemas.ResponseEvent}
    text = {_JSON: schemas.Completion, _EVENTS: schemas.Completion}
    routes = (
        _Route("POST", "/v1/chat/completions", endpoints.chat_completions, ChatCompletionRequest, chat),
        _Route("POST", "/v1/completions", endpoints.completions, CompletionRequest, text),
        _Route("POST", "/v1/responses", endpoints.responses, ResponseRequest, model_response),
        _Route("GET", "/v1/responses/{name}", endpoints.stored_response),
        _Route("DELETE", "/v1/responses/{name}", endpoints.stored_response),
        _Route("GET", "/v1/responses/{name}/input_items", endpoints.stored_response),
        _Route("POST", "/v1/responses/{name}/cancel", endpoints.stored_response),
        _Route("POST", "/v1/responses/input_tokens", endpoints.other_use_of_input),
        _Route("POST", "/v1/responses/compact", endpoints.other_use_of_input),
        _Route("POST", "/v1/embeddings", endpoints.embeddings),
        _Route("GET", "/v1/models", endpoints.models, responses=models),
        _Route("GET", "/v1/models/{name:path}", endpoints.model, responses={_JSON: schemas.Model}),
        _Route("POST", "/tokenize", endpoints.tokenize, tokens.TokenizeRequest),
        _Route("POST", "/detokenize", endpoints.detokenize, tokens.DetokenizeRequest),
        _Route("GET", "/tokenizer_info", endpoints.tokenizer_info),
        _Route("GET", "/version", endpoints.version),
        _Route("GET", "/health", endpoints.health),
        _Route("GET", "/ready", endpoints.ready),
    )
    _add_routes(app, routes)
    add_page(app, callers, shows_engine=shows_engine)
    app.add_middleware(CallerMiddleware, callers=callers)
    add_error_handlers(app)
    return app


def _add_routes(app: FastAPI, routes: Sequence[_Route]) -> None:
    for route in routes:
        app.add_api_route(
            route.path,
            route.endpoint,
            methods=[route.method],
            response_model=None,
            openapi_extra=openapi.request_body(route.request),
            responses={200: openapi.response("Success", route.responses)} if route.responses else None,
        )
        if route.method == "GET":
            # A route of its own, since FastAPI would document one with both methods twice.
            app.add_api_route(
                route.path, route.endpoint, methods=["HEAD"], response_model=None, include_in_schema=False
            )
    requests = [route.request for route in routes if route.request is not None]
    responses = {model for route in routes for model in route.responses.values()}
    openapi.add_schemas(app, requests, [*sorted(responses, key=lambda model: model.__name__), schemas.ErrorResponse])

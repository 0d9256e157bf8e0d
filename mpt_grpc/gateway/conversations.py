"""The client library's request for a conversation."""

from __future__ import annotations

from typing import TypeVar

from fastapi import Request

from mpt_grpc.gateway.requests import ChatCompletionRequest
from mpt_grpc.gateway.response_request import ResponseRequest
from mpt_grpc_client import GenerateOptions, PreparedPrompt

_Body = TypeVar("_Body", ChatCompletionRequest, ResponseRequest)


def read_conversation(request: Request, body: _Body) -> tuple[_Body, PreparedPrompt]:
    """Returns the body and its request, which takes the longer the longer the body is.

    Raises BadRequestError or InvalidRequestError.
    """
    request.state.field_names = body.field_names
    options: GenerateOptions = {**body.options(), "request_id": request.state.request_id}
    return body, PreparedPrompt(body.conversation, **options)

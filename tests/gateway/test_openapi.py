"""`/openapi.json` describes the requests and the responses that the endpoints really have."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from http_calls import call, response_events, stream

from mpt_grpc.gateway import schemas

CHAT = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}
FUNCTION = {"type": "function", "function": {"name": "f"}}


@pytest.fixture(scope="module")
def document(server: Any) -> Any:
    return call(server, "/openapi.json")


def schema_name(document: Any, path: str, method: str, media_type: str = "application/json") -> str:
    content = document["paths"][path][method]["responses"]["200"]["content"]
    return content[media_type]["schema"]["$ref"].removeprefix("#/components/schemas/")


@pytest.mark.parametrize(
    "path", ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/tokenize", "/detokenize"]
)
def test_a_request_body_is_described(document: Any, path: str) -> None:
    body = document["paths"][path]["post"]["requestBody"]
    assert body["required"]
    assert body["content"]["application/json"]["schema"]["$ref"]


def test_the_options_of_a_completion_are_described(document: Any) -> None:
    assert "temperature" in document["components"]["schemas"]["ChatCompletionRequest"]["properties"]


def test_every_schema_that_is_referred_to_exists(document: Any) -> None:
    references = set(re.findall(r'"\$ref": "([^"]+)"', json.dumps(document)))
    assert references == {f"#/components/schemas/{name}" for name in document["components"]["schemas"]}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", CHAT),
        ("/v1/chat/completions", {**CHAT, "logprobs": True, "top_logprobs": 2, "n": 2}),
        ("/v1/chat/completions", {**CHAT, "tools": [FUNCTION], "tool_choice": "required", "max_tokens": 99}),
        ("/v1/completions", {"prompt": "Once", "max_tokens": 4}),
        ("/v1/completions", {"prompt": "Once upon", "max_tokens": 4, "logprobs": 2, "echo": True}),
        ("/v1/responses", {"input": "Hi", "max_output_tokens": 4, "include": ["message.output_text.logprobs"]}),
        ("/v1/responses", {"input": "Hi", "tools": [{"type": "function", "name": "f"}], "tool_choice": "required"}),
    ],
)
def test_a_completion_has_the_documented_schema(document: Any, path: str, body: dict[str, Any], server: Any) -> None:
    schema = getattr(schemas, schema_name(document, path, "post"))
    schema.model_validate(call(server, path, body))


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_a_chunk_has_the_documented_schema(document: Any, path: str, server: Any) -> None:
    schema = getattr(schemas, schema_name(document, path, "post", "text/event-stream"))
    prompt = {"messages": CHAT["messages"]} if "chat" in path else {"prompt": "Once"}
    chunks = stream(server, path, {**prompt, "max_tokens": 4, "stream_options": {"include_usage": True}})
    assert chunks[0]["choices"]
    assert chunks[-1]["usage"]
    for chunk in chunks:
        schema.model_validate(chunk)


def test_an_event_of_a_response_has_the_documented_schema(document: Any, server: Any) -> None:
    schema = getattr(schemas, schema_name(document, "/v1/responses", "post", "text/event-stream"))
    for event in response_events(server, {"input": "Hi", "max_output_tokens": 4}):
        schema.model_validate(event)


def test_models_have_the_documented_schemas(document: Any, server: Any) -> None:
    models = call(server, "/v1/models")
    getattr(schemas, schema_name(document, "/v1/models", "get")).model_validate(models)
    model = call(server, f"/v1/models/{models['data'][0]['id']}")
    getattr(schemas, schema_name(document, "/v1/models/{name}", "get")).model_validate(model)

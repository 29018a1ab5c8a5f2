"""The worker's API as an OpenAPI document, for clients that send whatever it allows. Requests are of the vendors' own types.

So a new release of `openai` or `anthropic` brings new members. The worker takes or refuses each, in the shape of its API.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Final

from anthropic.types.message_count_tokens_params import MessageCountTokensParams
from anthropic.types.message_create_params import MessageCreateParamsNonStreaming
from openai.types.chat.completion_create_params import CompletionCreateParamsNonStreaming as ChatParams
from openai.types.completion_create_params import CompletionCreateParamsNonStreaming as TextParams
from openai.types.embedding_create_params import EmbeddingCreateParams
from openai.types.responses.input_token_count_params import InputTokenCountParams
from openai.types.responses.response_create_params import ResponseCreateParamsNonStreaming as ResponseParams
from pydantic import TypeAdapter

_TEXT: Final = {"type": "string"}
_TEXTS: Final = {"type": "array", "items": _TEXT}
_COUNT: Final = {"type": "integer", "minimum": 1, "maximum": 64}
_MESSAGES: Final = {"$ref": "#/components/schemas/chat/properties/messages"}
_STREAM: Final = {"type": ["boolean", "null"]}


def _object(required: Sequence[str], **properties: Any) -> dict[str, Any]:
    return {"type": "object", "required": [*required, "model"], "properties": {"model": _TEXT, **properties}}


# By path: a name, and the type or the schema of a body.
BODIES: Final[dict[str, tuple[str, Any]]] = {
    "/v1/chat/completions": ("chat", ChatParams),
    "/v1/completions": ("text", TextParams),
    "/v1/responses": ("response", ResponseParams),
    "/v1/responses/input_tokens": ("input_tokens", InputTokenCountParams),
    "/v1/messages": ("message", MessageCreateParamsNonStreaming),
    "/v1/messages/count_tokens": ("count_tokens", MessageCountTokensParams),
    "/v1/embeddings": ("embedding", EmbeddingCreateParams),
    "/v1/rerank": (
        "rerank",
        _object(
            ["query", "documents"],
            query=_TEXT,
            documents={"type": "array", "items": {"anyOf": [_TEXT, {"type": "object", "properties": {"text": _TEXT}}]}},
            top_n=_COUNT,
            return_documents={"type": "boolean"},
        ),
    ),
    "/infill": (
        "infill",
        _object(
            [],
            input_prefix=_TEXT,
            input_suffix=_TEXT,
            prompt=_TEXT,
            n_predict={"type": "integer", "minimum": -1, "maximum": 64},
            stop=_TEXTS,
            stream=_STREAM,
            input_extra={"type": "array", "items": {"type": "object", "properties": {"text": _TEXT, "filename": _TEXT}}},
        ),
    ),
    "/v1/explain": ("explain", _object(["messages"], messages=_MESSAGES, answer=_TEXT, lens={"type": "boolean"})),
    "/v1/tokenize": (
        "tokenize",
        {"anyOf": [_object(["prompt"], prompt=_TEXT), _object(["messages"], messages=_MESSAGES)]},
    ),
}
_ERRORS: Final[dict[str, Any]] = {
    "openai_error": {
        "type": "object",
        "required": ["error"],
        "additionalProperties": False,
        "properties": {
            "error": {
                "type": "object",
                "required": ["message", "type", "param", "code"],
                "additionalProperties": False,
                "properties": {
                    "message": {"type": "string", "minLength": 8},
                    "type": {"const": "invalid_request_error"},
                    "param": {"type": ["string", "null"]},
                    "code": {"type": ["string", "null"]},
                },
            }
        },
    },
    "anthropic_error": {
        "type": "object",
        "required": ["type", "error"],
        "properties": {
            "type": {"const": "error"},
            "error": {
                "type": "object",
                "required": ["type", "message"],
                "additionalProperties": False,
                "properties": {
                    "type": {"enum": ["invalid_request_error", "not_found_error", "request_too_large"]},
                    "message": {"type": "string", "minLength": 8},
                },
            },
        },
    },
}


def document(models: Sequence[str]) -> dict[str, Any]:
    """models: the names that a request may hold."""
    schemas = dict(_ERRORS)
    paths: dict[str, Any] = {}
    for path, (name, body) in BODIES.items():
        schemas |= _schemas(name, body, models)
        paths[path] = {"post": _operation(name, path)}
    listing = {"responses": {"200": _answer({"type": "object", "required": ["object", "data"]})}}
    one = {"responses": {"200": _answer({"type": "object", "required": ["id"]}), "404": _answer(_error("openai"))}}
    named = {"name": "name", "in": "path", "required": True, "schema": {"type": "string", "enum": [*models, "other"]}}
    paths["/v1/models"] = {"get": listing}
    paths["/v1/models/{name}"] = {"get": {**one, "parameters": [named]}}
    about = {"title": "A worker's API, inside the seal", "version": "1"}
    return {"openapi": "3.1.0", "info": about, "paths": paths, "components": {"schemas": schemas}}


def _operation(name: str, path: str) -> dict[str, Any]:
    events = {"text/event-stream": {"schema": {"type": "string"}}}
    whole = {"application/json": {"schema": {"type": "object"}}}
    refused = _answer(_error("anthropic" if path.startswith("/v1/messages") else "openai"))
    return {
        "requestBody": {"required": True, "content": {"application/json": {"schema": _ref(name)}}},
        "responses": {
            "200": {"description": "answered", "content": whole | events},
            **dict.fromkeys(("400", "404", "413"), refused),
        },
    }


def _answer(schema: dict[str, Any]) -> dict[str, Any]:
    return {"description": "told", "content": {"application/json": {"schema": schema}}}


def _error(whose: str) -> dict[str, Any]:
    return _ref(f"{whose}_error")


def _ref(name: str) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{name}"}


def _schemas(name: str, body: Any, models: Sequence[str]) -> dict[str, Any]:
    """The body's schema, and those that it refers to, under names of their own."""
    schema = (
        body if isinstance(body, dict) else TypeAdapter(body).json_schema(ref_template=f"#/components/schemas/{name}.{{model}}")
    )
    parts = {f"{name}.{part}": value for part, value in schema.pop("$defs", {}).items()} if schema is not body else {}
    properties = {**schema.get("properties", {}), "model": {"type": "string", "enum": [*models]}, "stream": _STREAM}
    if "anyOf" in schema:
        return {name: schema}
    if name in ("embedding", "rerank", "input_tokens", "count_tokens", "explain", "tokenize"):
        del properties["stream"]
    return json.loads(json.dumps({**parts, name: {**schema, "properties": properties}}))  # type: ignore[no-any-return]

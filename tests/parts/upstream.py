"""A worker's `[upstream]` for tests: a model that writes, known there by another name, and one that is none of OpenAI's."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from lacre.asgi import App, Call
from lacre_backend.settings import Upstream
from lacre_backend.upstream.app import create_app
from lacre_backend.upstream.origins import Origins
from lacre_fabric.settings import parse
from parts.behind import Answered

CHAT = "/v1/chat/completions"
PREDICT = "/v1/models/encoder:predict"
JSON = [("content-type", "application/json")]


def settings(origin: str, more: str = "", of_chat: str = "") -> Upstream:
    """more, of_chat: further lines of the table, and of the first model's."""
    return _with(f'origin = "{origin}"', more, of_chat)


def several(origins: Sequence[str], more: str = "") -> Upstream:
    """As `settings`, for several servers."""
    return _with(f"origins = {json.dumps(list(origins))}", more)


def _with(servers: str, more: str, of_chat: str = "") -> Upstream:
    text = f"""
        {servers}
        {more}
        [[models]]
        name = "writer"
        known_as = "/models/writer.gguf"
        allow = ["POST {CHAT}", "POST /v1/completions", "POST /v1/embeddings", "POST /v1/rerank",
                 "POST /v1/explain", "POST /v1/responses", "POST /v1/messages"]
        {of_chat}
        [[models]]
        name = "encoder"
        allow = ["POST {PREDICT}", "GET /v2/models/*/ready", "HEAD /v2", "DELETE /v2/%41"]
    """
    return parse(Upstream, text, Path("worker.toml"))


def forwarding(settings: Upstream) -> App:
    """The app of a worker with these settings, without the checks that run beside it."""
    return create_app(settings, Origins(settings))


def granted(action: str = "http", model: str = "encoder", max_tokens: int = 8, max_prompt_tokens: int = 100) -> Call:
    return Call("r1", model, action, max_tokens, max_prompt_tokens)


def code(answered: Answered) -> tuple[int, str]:
    return answered.status, json.loads(answered.content)["error"]["code"]


def used(call: Call) -> tuple[int, int, int]:
    return call.usage.prompt_tokens, call.usage.cached_tokens, call.usage.completion_tokens

"""Bodies of the APIs that no recorded client uses, and of images: with one value changed, they are answered, or refused in the
shape of that API. `test_recorded_bodies` does so with what clients sent.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from typing import Any, Final

import pytest

from backend.posting import CHAT, TEXT, post
from backend.test_recorded_bodies import changes
from lacre.asgi import App
from lacre_backend.api.app import create_app
from lacre_backend.engine.protocol import ControlToken, InfillTokens
from parts.echo_engine import N_VOCAB
from parts.scripted_engine import ScriptedEngine

RESPONSES, MESSAGES = "/v1/responses", "/v1/messages"
GIF: Final = "R0lGODlhAQABAAAAADs="
IMAGE: Final = f"data:image/gif;base64,{GIF}"
SCHEMA: Final = {"type": "object", "properties": {"port": {"type": "string"}}, "required": ["port"]}
TOOL: Final = {"name": "tide", "description": "Now", "parameters": SCHEMA}


def user(*parts: Any) -> list[Any]:
    return [{"role": "user", "content": [*parts]}]


# Each is answered as it stands, but for the images, which the model does not take.
ANSWERED: Final[dict[str, dict[str, Any]]] = {
    TEXT: {"prompt": ["Hi", "Ho"], "suffix": "", "logprobs": 2, "max_tokens": 4, "stop": "x", "n": 2, "seed": 3},
    "/infill": {
        "input_prefix": "a",
        "input_suffix": "b",
        "input_extra": [{"text": "c", "filename": "d"}],
        "n_predict": 4,
        "stop": ["x"],
        "stream": False,
    },
    "/v1/explain": {"messages": user({"type": "text", "id": "a", "text": "Hi"}), "answer": "Hi"},
    "/v1/tokenize": {"messages": [{"role": "user", "content": "Hi"}], "tools": [{"type": "function", "function": TOOL}]},
    f"{RESPONSES}/input_tokens": {
        "input": [
            *user({"type": "input_text", "text": "Hi"}),
            {"type": "function_call", "call_id": "c", "name": "tide", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c", "output": [{"type": "input_text", "text": "2 m"}]},
        ],
        "tools": [{"type": "function", **TOOL}],
        "instructions": "Be brief",
        "text": {"format": {"type": "text"}},
    },
    f"{MESSAGES}/count_tokens": {
        "messages": [
            *user({"type": "text", "text": "Hi", "cache_control": {"type": "ephemeral"}}),
            {"role": "assistant", "content": [{"type": "tool_use", "id": "t", "name": "tide", "input": {"port": "Faro"}}]},
            *user({"type": "tool_result", "tool_use_id": "t", "content": [{"type": "text", "text": "2 m"}]}),
        ],
        "system": [{"type": "text", "text": "Be brief"}],
        "tools": [{"name": "tide", "input_schema": SCHEMA}],
    },
}
WITH_IMAGES: Final[dict[str, dict[str, Any]]] = {
    CHAT: {"messages": user({"type": "image_url", "image_url": {"url": IMAGE, "detail": "low"}})},
    RESPONSES: {"input": user({"type": "input_image", "image_url": IMAGE, "detail": "auto"})},
    MESSAGES: {
        "messages": user({"type": "image", "source": {"type": "base64", "media_type": "image/gif", "data": GIF}}),
        "max_tokens": 4,
    },
}


@pytest.fixture
def app() -> Iterator[App]:
    with closing(ScriptedEngine(lambda _: "So", n_ctx=2048)) as engine:
        marks = InfillTokens(*(ControlToken(N_VOCAB + i, f"<|fim_{name}|>") for i, name in enumerate("psm")))
        engine.model = dataclasses.replace(engine.model, infill=marks, n_vocab=N_VOCAB + 3)
        yield create_app([engine])


def check_shape(path: str, error: Any) -> None:
    if path.startswith(MESSAGES):
        assert error.keys() == {"type", "error"} | error.keys() & {"request_id"} and error["type"] == "error"
        assert error["error"].keys() == {"type", "message"}
    else:
        assert error.keys() == {"error"} and error["error"].keys() == {"message", "type", "param", "code"}
    assert error["error"]["message"]
    assert error["error"]["type"] in ("invalid_request_error", "not_found_error")


@pytest.mark.parametrize("path", [*ANSWERED, *WITH_IMAGES])
async def test_one_value_changed(app: App, path: str) -> None:
    told: Counter[int] = Counter()
    for change, body in changes({"model": "scripted", **(ANSWERED.get(path) or WITH_IMAGES[path])}):
        reply = await post(app, path, body)
        told[reply.status] += 1
        assert reply.complete and reply.status < 500, change
        if reply.status != 200:
            check_shape(path, json.loads(reply.body))
    assert told[400] > 20 and (told[200] > 10 or path in WITH_IMAGES), told


@pytest.mark.parametrize("path", ANSWERED)
async def test_as_it_stands(app: App, path: str) -> None:
    assert (await post(app, path, {"model": "scripted", **ANSWERED[path]})).status == 200

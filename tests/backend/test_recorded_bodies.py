"""Bodies that real clients sent, trimmed: taken as they are, and with one member changed taken or refused by name."""

from __future__ import annotations

import copy
import json
import random
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import anthropic
import anthropic.types
import openai
import openai.types
import pytest

from backend.posting import Reply, post
from lacre.asgi import App
from lacre_backend.api.app import create_app
from lacre_backend.api.errors import RequestRefused
from lacre_backend.api.faces.responses import Responses
from parts import scripts
from parts.minilm import NAME
from parts.scripted_engine import ScriptedEngine

# By client and what it asked for: `path`, and `body`.
RECORDED: dict[str, dict[str, Any]] = {
    f"{file.stem}-{name}": request
    for file in sorted((Path(__file__).parent / "recorded").glob("*.json"))
    for name, request in json.loads(file.read_text()).items()
}
EMBEDDINGS = "/v1/embeddings"
CHANGES = 300  # of one body
ODD: tuple[Any, ...] = (None, True, -1, 1.5, "", "odd", [], [None], {}, {"odd": 1})
GONE, BESIDE = "(gone)", "(beside)"
Change = tuple[tuple[Any, ...], Any]

pytestmark = pytest.mark.anyio


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths to everything in it."""
    members = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, each in members:
        yield (*path, name)
        yield from places(each, (*path, name))


def changes(body: dict[str, Any]) -> Iterator[tuple[Change, bytes]]:
    """The body with one member changed, for each member and each odd value. It is also removed, and joined by a strange one."""
    for path in places(body):
        for new in (*ODD, GONE, BESIDE):
            whole = copy.deepcopy(body)
            at: Any = whole
            for name in path[:-1]:
                at = at[name]
            if new is GONE:
                del at[path[-1]]
            elif new is not BESIDE:
                at[path[-1]] = new
            elif isinstance(at, dict):
                at["strange"] = 1
            yield (path, new), json.dumps(whole).encode()


def whole(path: str, reply: Reply) -> bool:
    """Whether it is an answer to its end, or all of a stream."""
    if not reply.headers["content-type"].startswith("text/event-stream"):
        return "error" not in reply.json() or reply.json()["error"] is None
    return reply.complete and reply.body.rstrip().split(b"\n\n")[-1].startswith(LAST[path])


def refused_as_openai_does(reply: Reply) -> None:
    error = reply.error(reply.status)
    assert openai.types.ErrorObject.model_validate(error, strict=True).param


def refused_as_anthropic_does(reply: Reply) -> None:
    told = anthropic.types.ErrorResponse.model_validate(reply.json())
    assert told.error.type in ("invalid_request_error", "not_found_error")
    assert told.error.message


REFUSED: dict[str, Callable[[Reply], None]] = {
    "/v1/chat/completions": refused_as_openai_does,
    "/v1/responses": refused_as_openai_does,
    EMBEDDINGS: refused_as_openai_does,
    "/v1/messages": refused_as_anthropic_does,
}
LAST: dict[str, tuple[bytes, ...]] = {
    "/v1/chat/completions": (b"data: [DONE]",),
    "/v1/responses": (b"event: response.completed", b"event: response.incomplete"),
    "/v1/messages": (b"event: message_stop",),
}


@pytest.fixture
def app(request: pytest.FixtureRequest, name: str) -> Iterator[App]:
    if RECORDED[name]["path"] == EMBEDDINGS:
        yield create_app([request.getfixturevalue("embedder")])
        return
    with closing(ScriptedEngine(scripts.said, n_ctx=1 << 16)) as engine:
        yield create_app([engine])


def recorded(name: str) -> tuple[str, dict[str, Any]]:
    """The path, and the body for a model that is there."""
    path, body = RECORDED[name]["path"], RECORDED[name]["body"]
    return path, {**body, "model": NAME if path == EMBEDDINGS else "scripted"}


@pytest.mark.parametrize("name", RECORDED)
async def test_what_a_client_sends_is_taken(app: App, name: str) -> None:
    path, body = recorded(name)
    reply = await post(app, path, body)
    assert reply.status == 200, reply.body


@pytest.mark.slow
@pytest.mark.parametrize("name", RECORDED)
async def test_with_one_member_changed_it_is_taken_or_refused_in_the_form_of_its_api(app: App, name: str) -> None:
    path, body = recorded(name)
    every = [*changes(body)]
    tried = every if len(every) <= CHANGES else random.Random(name).sample(every, CHANGES)
    statuses: Counter[int] = Counter()
    for change, sent in tried:
        reply = await post(app, path, sent)
        statuses[reply.status] += 1
        assert reply.status == 200 or 400 <= reply.status < 500, (change, reply.body)
        if reply.status == 200:
            assert whole(path, reply), (change, reply.body)
        else:
            REFUSED[path](reply)
    assert statuses[200] > 0 and statuses[400] > len(tried) // 20, statuses


def test_a_tool_that_a_server_runs_is_refused_by_name() -> None:
    """Codex offers one unless its settings say `web_search = "disabled"`."""
    body = RECORDED["codex-edit1"]["body"]
    searching = {**body, "tools": [*body["tools"], {"type": "web_search", "external_web_access": False}]}
    with pytest.raises(RequestRefused, match=r"'web_search'.*[Tt]urn it off"):
        Responses().parse(json.dumps(searching).encode())

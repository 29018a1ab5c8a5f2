"""Bodies that real clients sent, trimmed: taken as they are, and with one member changed taken or refused by name."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from backend.posting import post
from lacre_backend.api.app import create_app
from lacre_backend.api.errors import RequestRefused
from lacre_backend.api.faces.chat import Chat
from lacre_backend.api.faces.face import Face
from lacre_backend.api.faces.messages import Messages
from lacre_backend.api.faces.responses import Responses
from parts import scripts
from parts.scripted_engine import ScriptedEngine

FACES: dict[str, Face[Any]] = {
    "/v1/chat/completions": Chat(),
    "/v1/responses": Responses(),
    "/v1/messages": Messages(),
}
# By client and what it asked for: `path`, and `body`.
RECORDED: dict[str, dict[str, Any]] = {
    f"{file.stem}-{name}": request
    for file in sorted((Path(__file__).parent / "recorded").glob("*.json"))
    for name, request in json.loads(file.read_text()).items()
}
CHANGES = 200
ODD: tuple[Any, ...] = (None, True, -1, 1.5, "", "odd", [], [None], {}, {"odd": 1})

pytestmark = pytest.mark.anyio


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths to everything in it."""
    members = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, each in members:
        yield (*path, name)
        yield from places(each, (*path, name))


def changed(body: dict[str, Any], path: tuple[Any, ...], new: Any) -> bytes:
    whole = copy.deepcopy(body)
    at: Any = whole
    for name in path[:-1]:
        at = at[name]
    at[path[-1]] = new
    return json.dumps(whole).encode()


@pytest.mark.parametrize("name", RECORDED)
async def test_what_a_client_sends_is_taken(name: str) -> None:
    path, body = RECORDED[name]["path"], RECORDED[name]["body"]
    with closing(ScriptedEngine(scripts.said, n_ctx=1 << 16)) as engine:
        reply = await post(create_app([engine]), path, {**body, "model": "scripted"})
    assert reply.status == 200, reply.body


@pytest.mark.parametrize("name", RECORDED)
def test_with_one_member_changed_it_is_taken_or_refused_by_name(name: str) -> None:
    face, body = FACES[RECORDED[name]["path"]], RECORDED[name]["body"]
    source, found = random.Random(7), [*places(body)]
    refused = taken = 0
    for _ in range(CHANGES):
        try:
            face.parse(changed(body, source.choice(found), source.choice(ODD)))
            taken += 1
        except RequestRefused as refusal:
            refused += 1
            assert refusal.body()["error"]["message"]
            assert refusal.body()["error"]["param"], refusal.body()
    assert refused > 10
    assert taken > 10


def test_a_tool_that_a_server_runs_is_refused_by_name() -> None:
    """Codex offers one unless its settings say `web_search = "disabled"`."""
    body = RECORDED["codex-asked"]["body"]
    searching = {**body, "tools": [*body["tools"], {"type": "web_search", "external_web_access": False}]}
    with pytest.raises(RequestRefused, match=r"'web_search'.*[Tt]urn it off"):
        Responses().parse(json.dumps(searching).encode())

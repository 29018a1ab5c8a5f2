"""Which calls the npm package repeats, where a route leads them, and what it remembers."""

from __future__ import annotations

import json
import time
from email.utils import formatdate
from pathlib import Path
from typing import Any

import anyio
import pytest

from lacre.trust.routes import ModelRoute, RouteTarget
from parts.chat_app import ChatApp, reply
from parts.live import Gateway, serving
from parts.node_chat import FORBIDDEN, INTEROP, NODE, NPM, ONCE, chat, command, environment, problem, responding
from parts.relay import MANIFEST, SEALED, Relay

pytestmark = pytest.mark.skipif(NODE is None or NPM is None, reason="node and npm are not installed")


async def test_x25519_only_where_it_is_offered() -> None:
    ran = await chat({"kems": ["x25519"]})
    assert ran.error["error"] == "NoUsableKeyError"
    assert ran.paths == [MANIFEST], "nothing is sent without a key"


OHTTP_KEY = "https://iana.org/assignments/http-problem-types#ohttp-key"


@pytest.mark.parametrize(("refusals", "code"), [(1, 0), (2, 1)])
async def test_an_unknown_key_is_sealed_anew_once(refusals: int, code: int) -> None:
    ran = await chat(**responding(*(problem(422, OHTTP_KEY) for _ in range(refusals))))
    assert (ran.code, ran.paths) == (code, [MANIFEST, SEALED] * 2)
    first, second = (request.content for request in ran.gateway.relay.sealed)
    assert first[7:1127] != second[7:1127], "each attempt has its own encapsulation"


async def test_a_wrong_clock_is_corrected_once() -> None:
    app = ChatApp()
    theirs = time.time() + 5000
    dates: list[bytes] = []

    async def strict(scope: Any, receive: Any, send: Any) -> None:
        dates.append(dict(scope["headers"])[b"date"])
        if len(dates) > 1:
            return await app(scope, receive, send)
        kind = "https://iana.org/assignments/http-problem-types#date"
        headers = [(b"content-type", b"application/problem+json"), (b"date", formatdate(theirs, usegmt=True).encode())]
        await send({"type": "http.response.start", "status": 400, "headers": headers})
        await send({"type": "http.response.body", "body": json.dumps({"type": kind, "status": 400}).encode()})

    ran = await chat(app=strict)
    assert ran.totals is not None, ran.error
    assert ran.totals["info"]["attempts"] == 2
    assert dates[1].decode() in {formatdate(theirs + late, usegmt=True) for late in range(-1, 30)}


PIECE = json.dumps({"choices": [{"index": 0, "delta": {"content": "one"}}]})
BROKEN = {"error": {"message": "the engine failed", "type": "server_error"}}


def telling(*datas: str) -> Any:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for i, data in enumerate(datas, 1):
            await send({"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": i < len(datas)})

    return app


async def test_a_stream_without_its_last_event_is_truncated() -> None:
    ran = await chat(ONCE, app=telling(PIECE))
    assert (ran.pieces, ran.error["error"]) == (["one"], "TruncatedError")
    ran = await chat(ONCE, app=telling(PIECE, json.dumps(BROKEN)))
    assert (ran.pieces, ran.error) == (["one"], {}), "an error event ends it too: it is the API's own"


async def test_an_error_of_the_api_keeps_its_status() -> None:
    ran = await chat(app=lambda _scope, _receive, send: reply(send, 404, BROKEN))
    assert ran.totals is not None
    assert (ran.totals["status"], ran.totals["body"]) == (404, BROKEN)


WAY = ModelRoute((RouteTarget("canary", "new", 1), RouteTarget("default", "tiny")))


@pytest.mark.parametrize(
    ("options", "refusal", "pools"),
    [
        ({"model": "assistant"}, None, ["canary"]),
        ({"model": "assistant"}, "urn:lacre:problem:no-worker", ["canary", "default"]),
        ({"model": "assistant"}, "urn:lacre:problem:unavailable", ["canary"]),
        ({"model": "assistant"}, FORBIDDEN, ["canary"]),
        ({"model": "tiny"}, None, ["default"]),
        ({}, None, ["default"]),
        ({"pool": "canary"}, None, ["canary"]),
    ],
)
async def test_a_route_leads_to_its_pools(options: dict[str, Any], refusal: str | None, pools: list[str]) -> None:
    canary = Relay(ChatApp(), model="new")
    if refusal is not None:
        canary.respond = lambda _request: problem(503, str(refusal))
    ran = await chat(ONCE | options, beside={"canary": canary}, routes={"assistant": WAY})
    sealed = [("canary", each) for each in canary.sealed] + [("default", each) for each in ran.gateway.relay.sealed]
    assert [(pool, request.headers["lacre-pool"]) for pool, request in sealed] == [(pool, pool) for pool in pools]
    if refusal is not None and len(pools) == 1:
        assert ran.error["type"] == refusal
        return
    assert ran.totals is not None, ran.error
    info = ran.totals["info"]
    assert (info["parts"][0]["pool"], info["attempts"]) == (pools[-1], len(pools))
    app = canary.app if pools[-1] == "canary" else ran.gateway.relay.app
    assert isinstance(app, ChatApp)
    assert json.loads(app.bodies[-1])["model"] == ("new" if pools[-1] == "canary" else "tiny")


async def test_a_route_without_a_pool_of_the_manifest() -> None:
    ran = await chat({"model": "assistant"}, routes={"assistant": ModelRoute(WAY.targets[:1])})
    assert (ran.error["error"], ran.paths) == ("NoUsableKeyError", [MANIFEST])


LOST = "urn:lacre:problem:worker-lost"


@pytest.mark.parametrize(
    ("kinds", "sealed", "error"),
    [
        (["busy", "busy"], 3, None),
        (["rate-limited"], 2, None),
        (["worker-lost"], 2, None),
        (["worker-lost", "worker-lost"], 2, LOST),
        (["forbidden"], 1, FORBIDDEN),
    ],
)
async def test_what_is_tried_again(kinds: list[str], sealed: int, error: str | None) -> None:
    statuses = {"busy": 503, "rate-limited": 429, "worker-lost": 502, "forbidden": 403}
    ran = await chat(**responding(*(problem(statuses[kind], f"urn:lacre:problem:{kind}") for kind in kinds)))
    assert ran.paths == [MANIFEST, *[SEALED] * sealed]
    assert ran.error.get("type") == error
    if error is None:
        assert ran.totals is not None
        assert ran.totals["info"]["attempts"] == sealed


def stored(folder: Path) -> Path:
    """The one file of remembered manifests."""
    [file] = folder.glob("seen.*.json")
    assert (file.stat().st_mode & 0o777, folder.stat().st_mode & 0o777) == (0o600, 0o700)
    return file


async def test_the_newest_manifest_is_remembered_in_a_private_file(state: Path) -> None:
    relay = Relay(ChatApp(), version=5)
    async with serving(Gateway(relay)) as gateway:
        for version, used in ((5, 5), (6, 6), (5, 6)):
            relay.version = version
            done = await anyio.run_process(command(), cwd=INTEROP, env=environment(gateway.url), check=False)
            assert done.returncode == 0, done.stderr
            assert json.loads(done.stdout.splitlines()[-1])["info"]["parts"][0]["manifestVersion"] == used
        stored(state).write_text("{}")
        done = await anyio.run_process(command(), cwd=INTEROP, env=environment(gateway.url), check=False)
        assert json.loads(done.stderr)["error"] == "ConfigurationError", "a damaged store is not forgotten silently"

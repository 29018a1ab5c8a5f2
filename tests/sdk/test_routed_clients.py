"""Every way of asking takes the manifest's routes: own clients, `openai` by one argument, httpx, and `lacre proxy`."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import httpx2
import openai
import pytest

import lacre
from lacre import legacy, problems, proxy
from lacre.trust.routes import ModelRoute, RouteTarget
from lacre_backend.api.app import create_app
from parts.echo_engine import EchoEngine
from parts.relay import AsyncWire, Relay, Wire, connect, connect_async, refusing

BODY: dict[str, Any] = {"messages": [{"role": "user", "content": "the sea"}], "max_tokens": 9}
CANARY = ModelRoute((RouteTarget("canary", "new", 1), RouteTarget("default", "tiny", 0)))
HALVES = ModelRoute((RouteTarget("default", "tiny", 1), RouteTarget("canary", "new", 1)))
SDK = {"max_retries": 0, "base_url": lacre.BASE_URL, "api_key": "sealed"}
DOOR = proxy.ProxyAccess.on(80, "k" * 32, names=["proxy"])

Said = tuple[str, str, str]  # the pool that served, as the client shows it; the answer's model; its text
Program = Callable[..., Awaitable[Said]]


async def by_client(relay: Relay, body: dict[str, Any], **options: Any) -> Said:
    def run() -> Said:
        with connect(relay, **options) as client:
            reply = client.chat(**body)
        assert reply.verification.sealed_to is not None and reply.receipt is not None
        return reply.verification.sealed_to.pool, reply.model, reply.text

    return await asyncio.to_thread(run)


async def by_async_client(relay: Relay, body: dict[str, Any], **options: Any) -> Said:
    async with connect_async(relay, **options) as client:
        stream = client.chat_stream(**body)
        text = "".join([piece async for piece in stream])
        reply = await stream.reply()
    assert reply.verification.sealed_to is not None
    return reply.verification.sealed_to.pool, reply.model, text


async def by_post(relay: Relay, body: dict[str, Any], **options: Any) -> Said:
    async with connect_async(relay, **options) as client:
        return told(await client.post("/v1/chat/completions", json=body))


async def by_openai(relay: Relay, body: dict[str, Any], **options: Any) -> Said:
    def run() -> Said:
        with connect(relay, **options) as client:
            answer = openai.OpenAI(http_client=client, **SDK).chat.completions.create(**body)
            checked = client.verification.sealed_to
        assert checked is not None
        return checked.pool, answer.model, answer.choices[0].message.content or ""

    return await asyncio.to_thread(run)


async def by_async_openai(relay: Relay, body: dict[str, Any], **options: Any) -> Said:
    made = {"token": "t", "memory": lacre.VersionMemory(), "transport": AsyncWire(relay), **options}
    async with lacre.AsyncOpenAI(relay.url, **made) as client:
        asked = {"model": body["model"], "input": "the sea", "max_output_tokens": 9}
        more = {name: value for name, value in body.items() if name not in ("messages", "max_tokens", "model")}
        raw = await client.responses.with_raw_response.create(**asked, **more)
        answer = raw.parse()
        return raw.http_response.extensions["lacre"].pool, answer.model, answer.output_text


async def by_httpx(relay: Relay, body: dict[str, Any], **options: Any) -> Said:
    def run() -> Said:
        made = {"token": "t", "memory": lacre.VersionMemory(), "transport": Wire(relay), **options}
        with legacy.Client(relay.url, **made) as client:
            return told(client.post("/v1/chat/completions", json=body))

    return await asyncio.to_thread(run)


async def by_proxy(relay: Relay, body: dict[str, Any], **options: Any) -> Said:
    async with connect_async(relay, **options) as client, caller(client) as program:
        answer = await program.post("chat/completions", json=body)
        return answer.headers["lacre-pool"], answer.json()["model"], answer.json()["choices"][0]["message"]["content"]


async def by_messages(relay: Relay, body: dict[str, Any], **options: Any) -> Said:
    """As Anthropic's clients ask."""
    user = {"metadata": {"user_id": body["user"]}} if "user" in body else {}
    asked = {**{name: value for name, value in body.items() if name != "user"}, **user}
    async with connect_async(relay, **options) as client, caller(client) as program:
        answer = await program.post("messages", json=asked)
        return answer.headers["lacre-pool"], answer.json()["model"], answer.json()["content"][0]["text"]


PROGRAMS = [by_client, by_async_client, by_post, by_openai, by_async_openai, by_httpx, by_proxy, by_messages]


def told(answer: httpx.Response | httpx2.Response) -> Said:
    assert answer.status_code == 200, answer.text
    return answer.extensions["lacre"].pool, answer.json()["model"], answer.json()["choices"][0]["message"]["content"]


def caller(client: lacre.AsyncClient) -> httpx2.AsyncClient:
    """A program of another language, at a proxy that seals with this client."""
    wire = httpx2.ASGITransport(proxy.create_app(client, DOOR))
    return httpx2.AsyncClient(base_url="http://proxy/v1/", headers={"authorization": f"Bearer {DOOR.key}"}, transport=wire)


@pytest.fixture
def relay() -> Relay:
    default, canary = (create_app([EchoEngine(name=name, n_ctx=512)]) for name in ("tiny", "new"))
    return Relay(default, beside={"canary": Relay(canary, model="new")}, routes={"assistant": CANARY, "halves": HALVES})


@pytest.mark.parametrize("ask", PROGRAMS)
async def test_a_route_is_taken_passed_and_overridden(relay: Relay, ask: Program) -> None:
    body = {**BODY, "model": "assistant"}
    assert await ask(relay, body) == ("canary", "new", "the sea")
    assert await ask(relay, body, pool="default") == ("default", "tiny", "the sea")
    relay.beside["canary"].respond = refusing(problems.NO_WORKER, retry_after="5")
    assert await ask(relay, body) == ("default", "tiny", "the sea")


@pytest.mark.parametrize("ask", PROGRAMS)
async def test_an_end_user_stays_and_no_worker_hears_of_it(relay: Relay, ask: Program, tmp_path: Any) -> None:
    """Programs name their users to these APIs. Each client here is a new one, as after a restart."""
    memory = lacre.VersionFile(tmp_path)
    drawn = {
        user: {(await ask(relay, {**BODY, "model": "halves", "user": user}, memory=memory))[0] for _ in range(2)}
        for user in (f"jo-{number}@example.com" for number in range(12))
    }
    assert all(len(pools) == 1 for pools in drawn.values())
    assert set().union(*drawn.values()) == {"default", "canary"}
    assert all(b"jo-" not in each.request.content for pool in (relay, relay.beside["canary"]) for each in pool.opened)


async def test_programs_see_the_routes_in_the_list_of_models(relay: Relay) -> None:
    async with connect_async(relay) as client, caller(client) as program:
        listed = await openai.AsyncOpenAI(http_client=program, base_url="http://proxy/v1", api_key=DOOR.key).models.list()
        assert [model.id for model in listed.data] == ["tiny", "assistant", "halves"]
        for name in ("tiny", "assistant"):
            assert (await program.get(f"models/{name}")).json()["id"] == name
        assert (await program.get("models/none")).status_code == 404
    relay.routes, relay.version = {}, 2
    async with connect_async(relay) as client, caller(client) as program:
        plain = (await program.get("models")).content
        assert plain == (await client.get("/v1/models")).content, "without routes, the worker's own bytes"


@pytest.mark.parametrize("body", [b"", b"[]", b'{"data": 1}', b'{"data": [1, {}, null]}', b"\xff"])
async def test_a_list_that_is_none_passes(body: bytes) -> None:
    async def worker(_scope: Any, _receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]})
        await send({"type": "http.response.body", "body": body})

    relay = Relay(worker, routes={"assistant": CANARY})
    async with connect_async(relay) as client, caller(client) as program:
        got = (await program.get("models")).content
    assert got == body or [entry for entry in json.loads(got)["data"] if isinstance(entry, dict) and entry.get("id")]

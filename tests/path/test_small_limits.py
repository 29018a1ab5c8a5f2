"""The whole path under a limit of 300 tokens: the SDK pads and seals, the gateway reserves what fits, a real worker counts."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import httpx2
import pytest

import lacre
from lacre.jose.jws import raw_public_key
from lacre.trust.chain import ConnectionString
from lacre_backend.api.app import REPEATABLE, WEIGHED, create_app
from lacre_backend.engine.echo import EchoEngine
from lacre_backend.node.node import Identity, Node
from parts.gateway import MODEL, Issuer, World

PLANS = 'default_plan = "p"\n[plans.p.user]\ntokens_per_day = 300\n'


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    """With a worker whose engine takes a token for each byte."""
    world = World(tmp_path, Issuer(), plans=PLANS)
    await world.publish(world.document())
    engine = EchoEngine(name=MODEL)
    manifest = world.gateway.feed.manifest
    identity = Identity("default", lambda: world.private_keys, world.receipt_key, lambda: manifest)
    fabric = world.hub.worker("default", [MODEL], slots=4)
    node = Node(fabric, create_app([engine]), identity, repeatable=REPEATABLE, weighs=WEIGHED)
    running = asyncio.create_task(node.run())
    yield world
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    await node.drain(1)
    engine.close()
    await world.gateway.close()


@pytest.fixture
async def client(world: World) -> AsyncIterator[lacre.AsyncClient]:
    url = str(ConnectionString("http://127.0.0.1:9", raw_public_key(world.root)))
    transport = httpx2.ASGITransport(world.app)
    how = {"token": world.issuer.token(), "memory": lacre.VersionMemory(), "transport": transport, "retries": 0, "resume": 0}
    async with lacre.AsyncClient(url, **how) as client:
        yield client


async def test_a_greeting_is_served_as_often_as_it_fits(world: World, client: lacre.AsyncClient) -> None:
    for number in range(1, 4):
        reply = await client.chat("hi", model=MODEL, max_tokens=16)
        assert reply.text == "hi"
        await world.trail(number)
    used = [entry["prompt_tokens"] + entry["completion_tokens"] for entry in await world.trail(3) if entry["kind"] == "outcome"]
    assert 0 < sum(used) < 300


async def test_a_prompt_of_more_than_is_left_is_refused_by_the_worker(world: World, client: lacre.AsyncClient) -> None:
    with pytest.raises(lacre.ApiError) as refused:
        await client.chat("x" * 400, model=MODEL, max_tokens=16)
    assert refused.value.code == "grant_mismatch"
    assert "granted 284" in str(refused.value)
    outcome = (await world.trail())[1]
    assert (outcome["prompt_tokens"], outcome["completion_tokens"], outcome["money"]) == (0, 0, 0), "it cost nothing"
    assert (await client.chat("hi", model=MODEL, max_tokens=16)).text == "hi"


async def test_too_much_output_is_told_with_what_would_fit(client: lacre.AsyncClient) -> None:
    with pytest.raises(lacre.Forbidden, match="max_tokens of 236 or less") as refused:
        await client.chat("hi", model=MODEL)
    assert refused.value.details["fits"] == 236
    assert (await client.chat("hi", model=MODEL, max_tokens=236)).text == "hi"

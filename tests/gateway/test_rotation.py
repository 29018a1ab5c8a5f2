"""A pool's key changes while requests come in."""

from __future__ import annotations

import asyncio

import httpx2

from lacre.wire.opening import PrivateKey
from parts.gateway import PIECES, FakeWorker, World, opened


async def post(world: World, client: httpx2.AsyncClient, body: bytes) -> httpx2.Response:
    return await client.post("/v1/sealed", content=body, headers=world.headers())


def rotate(world: World, key_id: int) -> None:
    """A new key is published; the gateway has not looked yet."""
    key = PrivateKey.generate(key_id)
    world.pool_keys = (key, *world.pool_keys)
    world.private_keys[key_id] = key
    world.published = world.document(2)


async def test_a_key_younger_than_the_last_look(world: World, worker: FakeWorker, client: httpx2.AsyncClient) -> None:
    """As with a client that another gateway told of it."""
    rotate(world, 5)
    body, opener = world.seal(key_id=5)
    answer = await post(world, client, body)
    assert answer.status_code == 200
    assert opened(opener, answer.content) == b"".join(PIECES)


async def test_key_ids_that_nobody_has_do_not_load_the_fabric(world: World, client: httpx2.AsyncClient) -> None:
    looks, fetch = 0, world.gateway.feed._fetch

    async def counted() -> bytes | None:
        nonlocal looks
        looks += 1
        return await fetch()

    world.gateway.feed._fetch = counted
    body, _ = world.seal()
    answers = await asyncio.gather(*(post(world, client, b"\x07" + body[1:]) for _ in range(20)))
    assert {answer.status_code for answer in answers} == {422}
    assert looks == 1

"""A pool's key changes while requests come in."""

from __future__ import annotations

import asyncio

import httpx2

from lacre.wire.opening import PrivateKey
from parts.by_hand import opened
from parts.fake_worker import PIECES, FakeWorker
from parts.stage import Stage


async def post(stage: Stage, client: httpx2.AsyncClient, body: bytes) -> httpx2.Response:
    return await stage.post(client, body=body)


def rotate(stage: Stage, key_id: int) -> None:
    """A new key is published; the gateway has not looked yet."""
    stage.held = {key_id: PrivateKey.generate(key_id), **stage.held}
    stage.bucket = stage.document(2)


async def test_a_key_younger_than_the_last_look(stage: Stage, worker: FakeWorker, client: httpx2.AsyncClient) -> None:
    """As with a client that another gateway told of it."""
    rotate(stage, 5)
    body, _, opener = stage.seal(key=5)
    answer = await post(stage, client, body)
    assert answer.status_code == 200
    assert opened(opener, answer.content) == b"".join(PIECES)


async def test_key_ids_that_nobody_has_do_not_load_the_fabric(stage: Stage, client: httpx2.AsyncClient) -> None:
    looks, fetch = 0, stage.gateway.feed._fetch

    async def counted() -> bytes | None:
        nonlocal looks
        looks += 1
        return await fetch()

    stage.gateway.feed._fetch = counted
    body, _, _ = stage.seal()
    answers = await asyncio.gather(*(post(stage, client, b"\x07" + body[1:]) for _ in range(20)))
    assert {answer.status_code for answer in answers} == {422}
    assert looks == 1

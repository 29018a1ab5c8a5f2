"""Two pools and a canary: a real gateway that knows nothing of routes, its policy and audit log, and workers of both pools."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

import lacre
from lacre.trust.routes import ModelRoute, RouteTarget
from lacre_gateway.settings import shipped
from parts.issuer import Issuer
from parts.keys import MODEL, OTHER_MODEL, OTHER_POOL, POOL
from parts.stage import Stage

CANARY = ModelRoute((RouteTarget(OTHER_POOL, OTHER_MODEL, 1), RouteTarget(POOL, MODEL, 0)))
HALVES = ModelRoute((RouteTarget(POOL, MODEL, 1), RouteTarget(OTHER_POOL, OTHER_MODEL, 1)))
ROUTES = {"assistant": CANARY, "halves": HALVES}
DENIED = f"""
@id("not-the-canary")
forbid (principal, action, resource)
when {{ resource in Pool::"{OTHER_POOL}" }};
"""


@pytest.fixture(scope="module")
def issuer() -> Issuer:
    return Issuer()


async def routed(folder: Path, issuer: Issuer, settings: str = "") -> Stage:
    stage = Stage(served={POOL: (MODEL,), OTHER_POOL: (OTHER_MODEL,)})
    stage.build_gateway(folder, issuer, settings=settings)
    await stage.publish(stage.document(routes=ROUTES))
    await stage.worker()
    return stage


@pytest.fixture
async def stage(tmp_path: Path, issuer: Issuer) -> AsyncIterator[Stage]:
    async with await routed(tmp_path, issuer) as stage:
        yield stage


def pool_of(reply: lacre.Reply) -> str:
    """Whose key opened the request, and whose receipt it has."""
    assert reply.receipt is not None and reply.audit is not None and reply.verification.sealed_to is not None
    return reply.verification.sealed_to.pool


async def test_the_canary_serves_and_falls_back(stage: Stage) -> None:
    canary = await stage.worker(models=[OTHER_MODEL], pool=OTHER_POOL)
    client = stage.client()
    served = await client.chat("Hi.", model="assistant")
    assert (pool_of(served), served.model, served.attempts, canary.calls) == (OTHER_POOL, OTHER_MODEL, 1, 1)
    await canary.stop()
    passed = await client.chat("Hi.", model="assistant")
    assert (pool_of(passed), passed.model, passed.attempts, canary.calls) == (POOL, MODEL, 2, 1)
    told = [(entry["pool"], entry["model"]) for entry in stage.entries("intent")]
    assert told[0] == (OTHER_POOL, OTHER_MODEL) and told[-1] == (POOL, MODEL), "the gateway saw pools and their models"
    assert "assistant" not in str(stage.entries()), "and never the route's name"


async def test_a_broken_stream_does_not_leave_its_pool(stage: Stage) -> None:
    await stage.worker(models=[OTHER_MODEL], pool=OTHER_POOL)
    client, key = stage.client(resume=2), b"k" * 32
    stream = client.chat_stream("some seas", model="assistant", max_tokens=200)
    await anext(stream)
    state = stream.state(key)
    await stream.aclose()
    await stage.publish(stage.document(2, routes={}))
    rest = stage.client(pool=POOL).continue_stream(state, key=key)
    reply = await rest.reply()
    assert (reply.text, pool_of(reply)) == ("some seas", OTHER_POOL)


async def test_users_spread_and_stay(stage: Stage) -> None:
    await stage.worker(models=[OTHER_MODEL], pool=OTHER_POOL)
    client = stage.client()

    async def drawn(user: str) -> set[str]:
        own = client.with_options(cache_scope=user)
        return {pool_of(await own.chat("Hi.", model="halves")) for _ in range(3)}

    seen = await asyncio.gather(*(drawn(f"user {number}") for number in range(16)))
    assert all(len(pools) == 1 for pools in seen)
    assert set().union(*seen) == {POOL, OTHER_POOL}


async def test_a_denial_is_the_answer(tmp_path: Path, issuer: Issuer) -> None:
    shutil.copytree(shipped(), rules := tmp_path / "rules")
    with (rules / "default.cedar").open("a") as file:
        file.write(DENIED)
    async with await routed(tmp_path, issuer, 'policies = "rules"') as stage:
        canary = await stage.worker(models=[OTHER_MODEL], pool=OTHER_POOL)
        with pytest.raises(lacre.RefusedError) as caught:
            await stage.client().chat("Hi.", model="assistant")
        assert "forbidden" in str(caught.value.problem) and canary.calls == 0
        own = await stage.client(pool=POOL).chat("Hi.", model="assistant")
        assert pool_of(own) == POOL, "the caller's own choice"

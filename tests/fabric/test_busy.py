"""A stream that has too much to write, for somebody floods it: who is refused tries again, and gets through."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import structlog

from lacre.runtime import tasks
from lacre_fabric.nats import subjects
from lacre_fabric.nats.kv import NatsBucket
from lacre_fabric.operate.nats_server import MAX_BUFFERED
from lacre_gateway.auth.tokens import Principal
from lacre_gateway.budget.in_flight import Reservation
from lacre_gateway.budget.ledger import Ledger
from lacre_gateway.budget.plans import parse
from parts.fabric import LiveFabric, new_work
from parts.stolen_nats import StolenNats, published

from .test_revocations import some

SECONDS = 2.0
PLANS = 'default_plan = "p"\n[plans.p.user]\nrequests_per_minute = 60\n'


@asynccontextmanager
async def flooded(
    folder: Path, subject: str, headers: Mapping[str, str] | None = None
) -> AsyncIterator[tuple[LiveFabric, asyncio.Task[None]]]:
    """A server that keeps one write of each stream waiting, no more; and a gateway's credential that floods a subject."""
    live = LiveFabric.make(folder)
    live.server.configure(live.roles())
    path = folder / "nats.conf"
    told, count = re.subn(rf"(max_buffered_msgs\W+){MAX_BUFFERED}\b", r"\g<1>1", path.read_text())
    assert count == 1
    path.write_text(told)
    live.process = live.server.start(live.log)
    try:
        await live.provision()
        thief = await StolenNats.open(live.server.port, live.credentials["gateway-g2"])
        batch = published(subject, b"{}", headers=headers) * 5000
        until = time.monotonic() + SECONDS

        async def flood() -> None:
            while time.monotonic() < until:
                thief.say(batch)
                await thief.settle()

        flooding = tasks.spawn("flood", flood())
        try:
            yield live, flooding
        finally:
            await tasks.end(flooding)
            await thief.close()
    finally:
        live.stop()


async def test_a_revocation(tmp_path: Path) -> None:
    async with flooded(tmp_path, subjects.revocation("gateway-g2")) as (live, flooding):
        gateway = await live.gateway("g1")
        while not flooding.done():
            await gateway.revoke(some(1))
        await gateway.close()


async def test_work(tmp_path: Path) -> None:
    never = {"Nats-Expected-Last-Sequence": "999999999"}  # so that the queue does not fill
    async with flooded(tmp_path, subjects.work("a", subjects.DEFAULT_REGION, "m1"), never) as (live, flooding):
        gateway, worker = await live.gateway("g1"), await live.worker()
        async with asyncio.timeout(10):
            while not gateway.workers("a", "m1"):
                await asyncio.sleep(0.05)
        dispatched = 0
        while not flooding.done():
            # The server may say nothing either: then the request waits in vain, for as long as its queue limit lets it.
            await (await gateway.dispatch(new_work())).cancel()
            dispatched += 1
        assert dispatched > 1
        await worker.close()
        await gateway.close()


async def test_a_budget(tmp_path: Path) -> None:
    async with flooded(tmp_path, f"$KV.{subjects.BUDGETS_BUCKET}.gateway-g2.x") as (live, flooding):
        connection = await live.connect("gateway-g1")
        plans = parse(PLANS, Path("plans.toml"))
        ledger = Ledger(lambda: plans, "g1", structlog.get_logger(), longest=60.0)
        ledger.bucket = NatsBucket(connection, subjects.BUDGETS_BUCKET)
        drawn = 0
        while not flooding.done():
            await ledger.reserve(Principal(f"user-{drawn}", "acme", "https://issuer.example"), "m1", Reservation(10, 10))
            drawn += 1
        assert drawn > 1
        await ledger.close()
        await connection.close()

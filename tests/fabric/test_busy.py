"""A stream that has too much to write, for somebody floods it: who is refused tries again, and gets through."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import structlog

from lacre.runtime import tasks
from lacre_fabric.nats import subjects
from lacre_fabric.nats.kv import NatsBucket
from lacre_fabric.operate.nats_server import MAX_BUFFERED
from lacre_gateway.auth.tokens import Principal
from lacre_gateway.budget.in_flight import Reservation
from lacre_gateway.budget.ledger import Ledger
from lacre_gateway.budget.plans import parse
from parts.fabric import LiveFabric, Parties, new_work, until
from parts.stolen_nats import published

from .test_revocations import some

SECONDS = 2.0
PLANS = 'default_plan = "p"\n[plans.p.user]\nrequests_per_minute = 60\n'


@asynccontextmanager
async def flooded(
    folder: Path, subject: str, headers: Mapping[str, str] | None = None
) -> AsyncIterator[tuple[Parties, asyncio.Task[None]]]:
    """A server that keeps one write of each stream waiting, no more; and a gateway's credential that floods a subject."""

    def one_waits(config: dict[str, Any]) -> None:
        assert config["jetstream"]["max_buffered_msgs"] == MAX_BUFFERED
        config["jetstream"]["max_buffered_msgs"] = 1

    with LiveFabric.running(folder, change=one_waits) as live:
        await live.provision()
        async with Parties.of(live) as parties:
            thief = await parties.stolen("gateway-g2")
            batch = published(subject, b"{}", headers=headers) * 5000
            over = time.monotonic() + SECONDS

            async def flood() -> None:
                while time.monotonic() < over:
                    thief.say(batch)
                    await thief.settle()

            flooding = tasks.spawn("flood", flood())
            parties.stack.push_async_callback(tasks.end, flooding)
            yield parties, flooding


async def test_a_revocation(tmp_path: Path) -> None:
    async with flooded(tmp_path, subjects.revocation("gateway-g2")) as (parties, flooding):
        gateway = await parties.gateway()
        while not flooding.done():
            await gateway.revoke(some(1))


async def test_work(tmp_path: Path) -> None:
    never = {"Nats-Expected-Last-Sequence": "999999999"}  # so that the queue does not fill
    async with flooded(tmp_path, subjects.work("a", subjects.DEFAULT_REGION, "m1"), never) as (parties, flooding):
        gateway, _ = await parties.gateway(), await parties.worker()
        await until(lambda: gateway.workers("a", "m1"))
        dispatched = 0
        while not flooding.done():
            # The server may say nothing either: then the request waits in vain, for as long as its queue limit lets it.
            await (await gateway.dispatch(new_work())).cancel()
            dispatched += 1
        assert dispatched > 1


async def test_a_budget(tmp_path: Path) -> None:
    async with flooded(tmp_path, f"$KV.{subjects.BUDGETS_BUCKET}.gateway-g2.x") as (parties, flooding):
        plans = parse(PLANS, Path("plans.toml"))
        ledger = Ledger(lambda: plans, "g1", structlog.get_logger(), longest=60.0)
        ledger.bucket = NatsBucket(await parties.connect("gateway-g1"), subjects.BUDGETS_BUCKET)
        drawn = 0
        while not flooding.done():
            await ledger.reserve(Principal(f"user-{drawn}", "acme", "https://issuer.example"), "m1", Reservation(10, 10))
            drawn += 1
        assert drawn > 1
        await ledger.close()

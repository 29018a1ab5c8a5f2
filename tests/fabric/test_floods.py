"""Who floods the message server is named in the log and cut off, and who works is neither."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import structlog
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from lacre.runtime import tasks
from lacre_fabric import logs
from lacre_fabric.nats import subjects
from lacre_fabric.nats.kv import NatsBucket
from lacre_fabric.nats.roles import CONNECTIONS, Role
from lacre_fabric.nats.servers import Servers
from lacre_fabric.operate import floods
from lacre_fabric.operate.floods import CUT_BYTES, CUT_MESSAGES, LOOKS, MESSAGES, Flood, Rates, watch
from lacre_fabric.operate.nats_server import MAX_BUFFERED
from lacre_fabric.operate.site import Site
from lacre_gateway.auth.tokens import Principal
from lacre_gateway.budget.additions import Approver
from lacre_gateway.budget.in_flight import Reservation
from lacre_gateway.budget.ledger import Ledger
from lacre_gateway.budget.plans import parse
from parts.fabric import LiveFabric, Parties, new_work
from parts.stolen_nats import StolenNats, published
from parts.waiting import until

from .test_buckets import some

LIMIT = 60.0  # seconds for what takes two or three looks; the machine may be busy
NOBODY: frozenset[str] = frozenset()


def stamp(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat()


def said(at: float, *connections: tuple[int, str, int, int], server: str = "s", started: float = 0.0) -> dict[str, object]:
    """A server's word at a time on its connections: cid, user, messages and bytes that came from it."""
    names = ("cid", "authorized_user", "in_msgs", "in_bytes")
    listed = [dict(zip(names, one, strict=True)) | {"start": stamp(started)} for one in connections]
    return {"server_id": server, "now": stamp(at), "connections": listed}


def test_what_is_a_flood() -> None:
    rates, old = Rates(), 10**5
    of_b = 30_000 * (old + 4)  # messages since it is connected
    for at, connections, found in (
        (old, [(1, "worker-a", 10**8, 0), (2, "gateway", 5, 5)], []),  # in a day and more
        (old + 2, [(1, "worker-a", 10**8 + 39_000, 0), (2, "gateway", 9, 9)], []),
        (
            old + 4,
            [(1, "worker-a", 10**8 + 39_500, 0), (3, "worker-b", of_b, 0), (4, "worker-b", 9, 0)],
            [Flood("worker-b", 30_000)],
        ),
        (old + 6, [(3, "worker-b", of_b + 2, 2**30), (4, "worker-b", 9, 1)], [Flood("worker-b", 1)]),
    ):
        assert rates.floods([said(at, *connections)]) == found


def test_a_connection_is_cut_off_when_two_looks_find_it_over() -> None:
    """The user's other connections stay, however much they send together."""
    rates, honest = Rates(), CUT_MESSAGES - 1000
    for look in range(1, 5):
        sent = look * (CUT_MESSAGES + 1)
        rates.floods(
            [said(look, (1, "worker-a", sent, 0), (2, "worker-a", look * honest, 0), (3, "gateway", 0, look * CUT_BYTES))]
        )
        assert rates.to_cut(NOBODY) == ([("s", 1)] if look >= LOOKS else [])
    rates.floods([said(5, (1, "worker-a", sent, 0), (3, "gateway", 0, 6 * CUT_BYTES))])
    assert rates.to_cut(NOBODY) == []
    assert rates.to_cut(frozenset({"gateway"})) == [("s", 3)], "by bytes; and one look is enough for one that comes back"


def test_a_look_that_comes_late_accuses_nobody() -> None:
    """By the server's clock: answers that lay about, that came twice or out of order change no rate."""
    rates, rate = Rates(), CUT_MESSAGES - 1000
    for times in ((10, 5), (20, 60, 61, 20), (61.001, 61.0005), (63,)):
        rates.floods([said(at, (1, "worker-a", round(at * rate), 0)) for at in times])
        assert not rates.over
    rates.floods([said(63.1, (1, "worker-a", 63 * rate + CUT_MESSAGES - 1, 0))])
    assert not rates.over, "a burst, shorter than a second"


def test_what_is_no_answer_says_nothing() -> None:
    rates = Rates()
    odd_ones = [{}, {"cid": "x", "in_msgs": None}, {"cid": 1, "start": "now", "in_msgs": 1, "in_bytes": 1}, 1]
    whole = said(1.0, (1, "x", 10**400, 10**400))
    odd = (None, [], {}, {"connections": 1}, {"connections": odd_ones}, said(1.0) | {"connections": odd_ones})
    for each in (*odd, whole | {"now": "?"}, whole | {"server_id": "a.*"}, whole | {"server_id": ""}):
        assert rates.floods([each]) == []
        assert rates.to_cut(frozenset({"x"})) == []
    assert rates.floods([whole]) == [Flood("x", 2**64)]


@dataclass
class Watched(Parties):
    """A nats-server with somebody who watches it. out: what it logs."""

    out: StringIO = field(default_factory=StringIO)

    def lines(self, event: str) -> list[dict[str, Any]]:
        found = [json.loads(text) for text in self.out.getvalue().splitlines()]
        return [line for line in found if line["event"] == event]


@asynccontextmanager
async def watched(folder: Path, found: list[Role]) -> AsyncIterator[Watched]:
    with LiveFabric.running(folder, found) as live:
        async with AsyncExitStack() as stack:
            watched = Watched(stack, live)
            logs.configure(watched.out)
            watching = partial(watch, Servers.of(live.server.url), live.credentials["warden"], look=0.6)
            task = tasks.start("floods", watching, restart=floods.WATCHED)
            stack.push_async_callback(task.close)
            yield watched


@pytest.fixture
def found(tmp_path: Path) -> list[Role]:
    return Site(tmp_path / "state", {"a": ("m1",)}).roles()


async def flood(thief: StolenNats, seconds: float = LIMIT) -> None:
    """Until the server hangs up. Raises TimeoutError."""
    batch = published("reply.a.g1.x", b"x") * MESSAGES
    async with asyncio.timeout(seconds):
        with suppress(ConnectionError):
            while True:
                thief.say(batch)
                await thief.settle()


@pytest.mark.slow
async def test_the_flooding_connection_is_cut_off(tmp_path: Path, found: list[Role]) -> None:
    """By nats-server, on the warden's word; the neighbour with the same credential stays. One that comes back goes sooner."""
    async with watched(tmp_path, found) as site:
        neighbour = await site.stolen("worker-a-n1")
        for _ in range(2):
            await flood(await site.stolen("worker-a-n1"))
        neighbour.publish("reply.a.g1.x", b"honest")
        assert await neighbour.settle() == []
        assert not neighbour.errors
        (line,) = site.lines("fabric.flood")
        assert line["role"] == "worker-a-n1"
        assert line["number"] > MESSAGES
        assert [(line["role"], line["number"]) for line in site.lines("fabric.cut_off")] == [("worker-a-n1", 1)]
        assert not site.lines("floods.not_cut_off")


@pytest.mark.slow
async def test_where_nobody_may_cut_off_the_user_is_named_and_the_log_says_so_once(tmp_path: Path, found: list[Role]) -> None:
    """As with accounts that were configured before there was a cut-off."""
    older = [replace(role, publish=(CONNECTIONS,)) if role.credential.name == "warden" else role for role in found]
    async with watched(tmp_path, older) as site:
        thief = await site.stolen("worker-a-n1")
        with pytest.raises(TimeoutError):
            await flood(thief, 8.0)
        assert len(site.lines("fabric.flood")) == 1
        assert ["denies warden" in str(line["reason"]) for line in site.lines("floods.not_cut_off")] == [True]
        assert await thief.settle() == []


async def test_only_the_warden_ends_connections(tmp_path: Path, found: list[Role]) -> None:
    """Of all credentials but the provisioner's, which stands in another account than the servers' own."""
    async with watched(tmp_path, found) as site:
        neighbour = await site.stolen("worker-a-n1")
        kick = f"$SYS.REQ.SERVER.{neighbour.info['server_id']}.KICK"
        for name in site.live.credentials.keys() - {"warden"}:
            other = await site.stolen(name)
            other.publish(kick, json.dumps({"cid": neighbour.info["client_id"]}).encode())
            await other.settle()
            assert await neighbour.settle() == [], name


# A stream that has too much to write, for somebody floods it: who is refused tries again, and gets through.


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

            async def go_on() -> None:
                while time.monotonic() < over:
                    thief.say(batch)
                    await thief.settle()

            flooding = tasks.spawn("flood", go_on())
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
        approver = Approver(Ed25519PrivateKey.generate())
        ledger = Ledger(lambda: plans, "g1", structlog.get_logger(), longest=60.0, approver=approver)
        ledger.bucket = NatsBucket(await parties.connect("gateway-g1"), subjects.BUDGETS_BUCKET)
        drawn = 0
        while not flooding.done():
            await ledger.reserve(Principal(f"user-{drawn}", "acme", "https://issuer.example"), "m1", Reservation(10, 10))
            drawn += 1
        assert drawn > 1
        await ledger.close()

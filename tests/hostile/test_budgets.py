"""Budgets: what a caller or a worker could get beyond them by racing, by waiting, by names, and by saying a thing twice."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import structlog
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from hostile.attacks import attack
from lacre_fabric.work.contract import FabricUnavailable
from lacre_gateway.auth.claims import Principal
from lacre_gateway.budget.additions import Approver
from lacre_gateway.budget.callers import Amounts, key_of
from lacre_gateway.budget.holds import BudgetRefused, Hold
from lacre_gateway.budget.in_flight import Reservation
from lacre_gateway.budget.ledger import Ledger
from lacre_gateway.budget.plans import parse
from parts.issuer import ISSUER
from parts.memory_bucket import MemoryBucket

CEILING = 200  # of which a lease holds some for future requests
PLANS = parse(f'default_plan = "p"\n[plans.p.user]\nrequests_per_minute = {CEILING}\n', Path("plans.toml"))
ALICE = Principal("alice", "acme", ISSUER)
ONE = Reservation(1, 1)
MINUTE = 30_000_000 * 60.0  # its first second, since the epoch


class FailingBucket(MemoryBucket):
    """fails: how many of the next writes happen, and nobody is told so."""

    fails = 0

    async def write(self, key: str, value: bytes, revision: int) -> int:
        written = await super().write(key, value, revision)
        if self.fails:
            self.fails -= 1
            raise FabricUnavailable("no answer")
        return written


@dataclass
class Books:
    """Gateways that share one bucket, and one clock."""

    bucket: FailingBucket
    gateways: list[Ledger]
    now: float = MINUTE

    @classmethod
    @asynccontextmanager
    async def of(cls, count: int) -> AsyncIterator[Books]:
        key = Ed25519PrivateKey.generate()
        books = cls(FailingBucket(lambda: books.now), [])
        for number in range(count):
            ledger = Ledger(
                lambda: PLANS,
                f"g{number}",
                structlog.get_logger(),
                longest=60.0,
                approver=Approver(key),
                clock=lambda: books.now,
            )
            ledger.bucket = books.bucket
            books.gateways.append(ledger)
        yield books
        for ledger in books.gateways:
            await ledger.close()

    async def ask(self, ledger: Ledger) -> Hold | None:
        try:
            return await ledger.reserve(ALICE, "m", ONE)
        except BudgetRefused:
            return None

    async def flood(self, *ledgers: Ledger) -> list[Hold]:
        """What is admitted of far more requests than the budget has, at once."""
        asked = (self.ask(ledger) for _ in range(2 * CEILING) for ledger in ledgers)
        return [hold for hold in await asyncio.gather(*asked) if hold is not None]


@attack("send many requests at once through several gateways, so that together they cross a budget", "client",
        "a gateway draws a lease before it admits, and all leases together never exceed the ceiling",
        gain="nothing; exactly the budget is served")  # fmt: skip
async def test_at_once() -> None:
    async with Books.of(3) as books:
        assert len(await books.flood(*books.gateways)) == CEILING
        assert await books.flood(*books.gateways) == []


@attack("answer no write of a budget, so that a gateway spends a lease that it has given back", "fabric",
        "a lease falls before the write that gives it back is sent",
        gain="nothing; the gateway serves less until a write is answered")  # fmt: skip
async def test_unanswered() -> None:
    async with Books.of(2) as books:
        first, second = books.gateways
        for hold in await books.flood(first):
            hold.settle(Amounts(0, 0, 0))  # nothing was used, so all of it is given back
        books.now += 10.0
        books.bucket.fails = 1
        [draw] = first._draws.values()
        with pytest.raises(FabricUnavailable):
            await first._write(draw, ())
        elsewhere = await books.flood(second)
        first.bucket = None
        here = await books.flood(first)
        first.bucket = books.bucket
        assert len(elsewhere) > CEILING // 2
        assert len(elsewhere) + len(here) <= CEILING


@attack("go on asking over the end of a minute, so that requests are charged to the minute before", "client",
        "kept counters are those of the present windows",
        gain="nothing; each minute has its own budget, and no more")  # fmt: skip
async def test_next_minute() -> None:
    async with Books.of(1) as books:
        [ledger] = books.gateways
        for _ in range(3):
            first = await books.ask(ledger)
            assert first is not None
            held = [first, *await books.flood(ledger)]
            assert len(held) == CEILING
            assert {hold.limits for hold in held} == {(f"user:p/requests_per_minute@{int(books.now // 60)}",)}
            held.pop().settle(Amounts(0, 0, 0))  # the lease of this minute has room left at its end
            for hold in held:
                hold.settle(Amounts(1, 2, 0))
            books.now += 60.0
            for _ in range(4):  # this minute is not spent: its lease has room, and nothing more is drawn
                last = await books.ask(ledger)
                assert last is not None
                last.settle(Amounts(1, 2, 0))
                await asyncio.sleep(0.02)
            books.now += 60.0


@attack("end an answer twice, so that its reservation is given back twice", "worker",
        "a reservation ends once", gain="nothing; exactly the budget is served")  # fmt: skip
async def test_given_back_twice() -> None:
    async with Books.of(1) as books:
        [ledger] = books.gateways
        held = [hold for _ in range(CEILING // 2) if (hold := await books.ask(ledger)) is not None]
        for hold in held:
            hold.settle(Amounts(1, 2, 0))
            hold.settle(Amounts(0, 0, 0))
        assert len(held) + len(await books.flood(ledger)) == CEILING


@attack("choose names that together read like another caller's, to spend the other one's budget", "client",
        "a budget's key is a digest of each of its owner's names", gain="nothing; the budgets are different")  # fmt: skip
def test_names() -> None:
    named = [
        ("acme", ISSUER, "alice"),
        ("acm", f"e{ISSUER}", "alice"),
        ("acme", f"{ISSUER}a", "lice"),
        ('acme", "', ISSUER, "x"),
        ("acme", f'{ISSUER}", "alice', ""),
        ("acme", ISSUER, 'alice", "'),
    ]
    keys = {key_of("user", "p", *names) for names in named}
    assert len(keys) == len(named)
    tenants = {key_of("tenant-on-plan", plan, tenant, "", "") for tenant, plan in (("ab", "c"), ("a", "bc"), ("abc", ""))}
    assert len(tenants) == 3

"""Additions to budgets over a real message server: what one gateway adds, all serve; a stolen credential adds nothing."""

from __future__ import annotations

import asyncio
import uuid
from pathlib import Path

import pytest
import structlog
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from lacre_fabric.nats import subjects
from lacre_fabric.nats.kv import NatsBucket
from lacre_gateway.auth.tokens import Principal
from lacre_gateway.budget.additions import Approver
from lacre_gateway.budget.callers import BudgetScope, named_scope
from lacre_gateway.budget.holds import AboveLimit, Exhausted
from lacre_gateway.budget.in_flight import Reservation
from lacre_gateway.budget.ledger import Ledger
from lacre_gateway.budget.plans import LimitKind, parse
from parts.fabric import Parties

DAY, ISSUER = LimitKind.TOKENS_PER_DAY, "https://issuer.example"
PLANS = parse('default_plan = "p"\n[plans.p.user]\ntokens_per_day = 100\n', Path("plans.toml"))
KEY = Ed25519PrivateKey.generate()


async def gateway(parties: Parties, name: str, key: Ed25519PrivateKey = KEY) -> Ledger:
    ledger = Ledger(lambda: PLANS, name, structlog.get_logger(), longest=60.0, approver=Approver(key))
    ledger.bucket = NatsBucket(await parties.connect(f"gateway-{name}"), subjects.BUDGETS_BUCKET)
    return ledger


@pytest.fixture
def who() -> Principal:
    return Principal(f"user-{uuid.uuid4().hex}", "acme", ISSUER)


def budget(who: Principal) -> BudgetScope:
    found = named_scope(PLANS, "user", DAY, plan="p", tenant="acme", issuer=ISSUER, subject=who.subject)
    assert found is not None
    return found


async def served(ledger: Ledger, who: Principal, tokens: int = 10) -> int:
    """How many requests, until one is refused."""
    number = 0
    try:
        while True:
            await ledger.reserve(who, "m", Reservation(tokens - 1, 1))
            number += 1
    except (Exhausted, AboveLimit):
        return number


async def test_what_one_gateway_adds_all_serve(parties: Parties, who: Principal) -> None:
    """Ten fit. Both gateways and a third admin's call add at once, one of them twice, and exactly so much more is served."""
    first, second = await gateway(parties, "g1"), await gateway(parties, "g2")
    assert await served(first, who) + await served(second, who) == 10
    calls = [(first, "a"), (second, "b"), (first, "c"), (second, "c")]
    added = await asyncio.gather(*(ledger.change(budget(who), DAY, 20, number) for ledger, number in calls))
    assert [amount for amount, _ in added] == [20] * 4
    assert await served(second, who) + await served(first, who) == 6
    assert (await served(first, who), await served(second, who)) == (0, 0)
    for ledger in (first, second):
        await ledger.close()


async def test_a_gateway_that_knows_nothing_of_it_serves_a_request_above_the_plan(parties: Parties, who: Principal) -> None:
    first, second = await gateway(parties, "g1"), await gateway(parties, "g2")
    await first.change(budget(who), DAY, 900, "a")
    assert await served(second, who, 500) == 2
    for ledger in (first, second):
        await ledger.close()


async def test_a_stolen_credential_adds_nothing(parties: Parties, who: Principal) -> None:
    """It may write its own part of the record, and has not the gateways' key."""
    thief, honest = await gateway(parties, "g2", Ed25519PrivateKey.generate()), await gateway(parties, "g1")
    await thief.change(budget(who), DAY, 10_000, "a")
    assert await served(honest, who) == 10
    for ledger in (thief, honest):
        await ledger.close()

"""`lacre usage`: what the caller has used of its limits."""

from __future__ import annotations

import time
from decimal import Decimal
from typing import Final

from lacre.cli.output import AsJson, Url, ago, printable, say, say_json, say_table, waiting
from lacre.client import Client
from lacre.exchange.own_usage import MONEY, UsedLimit

_WHOSE: Final = {"user": "you", "tenant-on-plan": "tenant/plan", "tenant": "tenant"}
_CENTS: Final = 2  # decimals that an amount of money has at least


def usage(url: Url = None, as_json: AsJson = False) -> None:
    """Show what you and your tenant have used of each limit. The gateway says so; nobody signs it."""
    with Client(url) as client, waiting("asking the gateway"):
        found = client.usage()
    if as_json:
        say_json(found.members(), indent=2)
        return
    money = f", money in {found.currency}" if any(each.unit == MONEY for each in found.limits) else ""
    say(f"plan: {printable(found.plan or 'none')}{money}")
    if not found.limits:
        say("no limit of yours counts anything")
        return
    now = time.time()
    say_table(("limit", "whose", "used", "of", "left", "resets"), [_row(each, now) for each in found.limits])


def _row(limit: UsedLimit, now: float) -> tuple[str, ...]:
    amounts = (_text(limit.in_unit(each)) for each in (limit.used, limit.ceiling, limit.remaining))
    # A clock that is ahead puts the end of the window into the past.
    resets = "-" if limit.resets_at is None else "in " + ago(max(0.0, limit.resets_at - now))
    return (limit.limit, _WHOSE.get(limit.scope, limit.scope), *amounts, resets)


def _text(amount: int | Decimal) -> str:
    """Whole numbers as they are; money without the zeros that say nothing."""
    if isinstance(amount, int):
        return str(amount)
    whole, _, decimals = f"{amount:f}".partition(".")
    return f"{whole}.{decimals.rstrip('0').ljust(_CENTS, '0')}"

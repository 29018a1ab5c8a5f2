"""Alerts when 80 % of a limit are used, and when it is used up.

Rules:
- A gateway looks at a limit whenever it writes to the budget, at least every 15 seconds of use, and when it refuses a request.
- A level counts booked amounts alone. It goes out once for each budget, limit, window, ceiling and level. Another gateway, or
  one that starts again, may send it once more, with the same id.
- A refusal also goes out once, as an alert of its own, if a request of that size was accepted before: the rest is too small.
  A larger request says nothing of the limit. A refusal never stands for a level.
- A top-up makes another ceiling, and so new alerts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable
from typing import Any, Final

from lacre_gateway.budget.lease import Account, Counter, Proposal
from lacre_gateway.budget.limit_fields import UNITS
from lacre_gateway.budget.plans import LimitKind
from lacre_gateway.budget.webhook import WebhookEvent
from lacre_gateway.budget.windows import ends

LEVELS: Final = (80, 100)  # percent
TYPE: Final = "budget.threshold"
_MAX_TOLD: Final = 65_536  # limits whose level is remembered; far more than one gateway serves in a day
_WHOLE: Final = 100
_Limit = tuple[str, LimitKind, int, int]  # a budget's key, kind, window and ceiling


class BudgetAlerts:
    """send: takes an event at once. kinds: the limits that are watched. currency: in force now."""

    def __init__(
        self, send: Callable[[WebhookEvent], None], kinds: Collection[LimitKind], gateway: str, currency: Callable[[], str]
    ) -> None:
        self._send = send
        self._kinds = frozenset(kinds)
        self._gateway = gateway
        self._currency = currency
        self._told: dict[_Limit, int] = {}
        self._refused: set[_Limit] = set()

    def wrote(self, account: Account, proposal: Proposal, now: float) -> None:
        """After a write to a budget, which tells what others have used."""
        for counter, _, _ in proposal.lots:
            self._saw(account, counter, now)

    def refused(self, charges: Iterable[tuple[Account, Counter, int]], now: float) -> None:
        """A request was refused: of these limits, some have too little left for the amount."""
        for account, counter, amount in charges:
            self._saw(account, counter, now)
            if amount <= counter.largest and _used(counter) + amount > counter.ceiling:
                self._saw_refused(account, counter, now)

    def _saw(self, account: Account, counter: Counter, now: float) -> None:
        if counter.kind not in self._kinds or not counter.ceiling:
            return
        level = max((each for each in LEVELS if _WHOLE * _used(counter) // counter.ceiling >= each), default=0)
        limit = account.key, counter.kind, counter.window, counter.ceiling
        if level <= self._told.get(limit, 0):
            return
        if len(self._told) >= _MAX_TOLD:
            self._told.clear()
        self._told[limit] = level
        self._send(self._event(account, counter, level, now))

    def _saw_refused(self, account: Account, counter: Counter, now: float) -> None:
        limit = account.key, counter.kind, counter.window, counter.ceiling
        used_up = self._told.get(limit) == _WHOLE
        if counter.kind not in self._kinds or not counter.ceiling or used_up or limit in self._refused:
            return
        if len(self._refused) >= _MAX_TOLD:
            self._refused.clear()
        self._refused.add(limit)
        self._send(self._event(account, counter, _WHOLE, now, refused=True))

    def _event(self, account: Account, counter: Counter, level: int, now: float, *, refused: bool = False) -> WebhookEvent:
        named = f"{account.key}/{counter.kind}@{counter.window}/{counter.ceiling}/{level}{'/refused' if refused else ''}"
        money = counter.kind is LimitKind.MONEY_PER_MONTH
        data: dict[str, Any] = {
            "level": level, "budget": account.name, "key": account.key, "limit": counter.kind.value, "window": counter.window,
            "used": _used(counter), "ceiling": counter.ceiling, "refused": refused, "unit": UNITS[counter.kind],
            "currency": self._currency() if money else None, "resets_at": ends(counter.kind, counter.window),
            "gateway": self._gateway,
        }  # fmt: skip
        noted = {"limit": counter.kind.value, "scope": account.key, "kind": "refused" if refused else f"{level} %"}
        number = f"msg_{hashlib.sha256(named.encode()).hexdigest()[:32]}"
        return WebhookEvent(number, TYPE, now, data, ends(counter.kind, counter.window), noted)


def _used(counter: Counter) -> int:
    """The amount that others have certainly used, and this gateway."""
    return counter.firm + counter.used

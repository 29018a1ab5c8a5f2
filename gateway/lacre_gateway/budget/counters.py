"""What a caller's requests of one minute share: the counters that they are charged to, and those counters' names.

Rules:
- They are looked up once, and again when a window has ended or an account has changed (`current`): a counter that its account
  no longer has must not be charged. If nothing came of the change, the same object serves on: open streams hold it.
- A caller may have twenty limits, and each request passes all of them five times.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Final, NamedTuple

from lacre_gateway.budget.callers import Amounts, BudgetScope, Caller, unit_of
from lacre_gateway.budget.draws import Draw
from lacre_gateway.budget.lease import Account, Charge, Counter, settle
from lacre_gateway.budget.limit_fields import Headers, LimitFields
from lacre_gateway.budget.plans import LimitKind
from lacre_gateway.budget.windows import bounds

_STREAMS: Final = LimitKind.CONCURRENT_STREAMS


class Standing(NamedTuple):
    """How far one limit is used. reset: seconds until its window ends; None if it has none."""

    scope: str
    kind: LimitKind
    ceiling: int
    remaining: int
    reset: float | None


class _Limit(NamedTuple):
    """counter: of this limit. end: of its window, in seconds since the epoch; None if it has none."""

    scope: BudgetScope
    counter: Counter
    end: float | None


class CallersCounters:
    """Of one caller, in the present windows. names: as in `Hold.limits`. keys: of the budgets. asked: when it was last used."""

    __slots__ = (
        "_accounts", "_ceilings", "_counted", "_fields", "_limits", "_streams", "_units", "_windows", "asked", "keys", "names",
    )  # fmt: skip

    def __init__(
        self, caller: Caller, windows: Mapping[LimitKind, int], accounts: Sequence[tuple[BudgetScope, Account]]
    ) -> None:
        """accounts: of the caller's budgets."""
        self._windows = windows
        self._limits = [
            _limit(scope, account.counter(kind, windows[kind], ceiling))
            for scope, account in accounts
            for kind, ceiling in scope.limits
        ]
        self._accounts = [(scope, account, account.edition) for scope, account in accounts]
        counters = [limit.counter for limit in self._limits]
        self._ceilings = [counter.ceiling for counter in counters]
        self.asked = -math.inf
        self._units = [(counter, unit_of(counter.kind)) for counter in counters]
        self._streams = [counter for counter in counters if counter.kind is _STREAMS]
        self._counted = [pair for pair in self._units if pair[0].kind is not _STREAMS]
        self._fields = LimitFields([(scope.label, counter, end) for scope, counter, end in self._limits])
        self.keys = frozenset(scope.key for scope, _ in accounts)
        self.names = tuple(limit_name(scope, caller.plan, counter) for scope, counter, _ in self._limits)

    def current(self, windows: Mapping[LimitKind, int], draws: Mapping[str, Draw]) -> bool:
        """Whether they are still those of these windows, and of the accounts of these draws."""
        if windows is not self._windows:
            return False
        changed = False
        for scope, account, edition in self._accounts:
            draw = draws.get(scope.key)
            if draw is None or draw.account is not account:
                return False
            changed = changed or account.edition != edition
        return not changed or self._unchanged()

    def _unchanged(self) -> bool:
        """Whether the accounts still have these counters, with these ceilings."""
        found = [
            account.counter(kind, self._windows[kind], ceiling)
            for scope, account, _ in self._accounts
            for kind, ceiling in scope.limits
        ]
        for counter, before, ceiling in zip(found, self._limits, self._ceilings, strict=True):
            if counter is not before.counter or counter.ceiling != ceiling:
                return False
        self._accounts = [(scope, account, account.edition) for scope, account, _ in self._accounts]
        return True

    def touch(self, now: float) -> None:
        self.asked = now
        for _, account, _ in self._accounts:
            account.touched = now

    def charges(self, amounts: Amounts) -> list[Charge]:
        """Each counter, with the amount that is charged to it."""
        asked = amounts.by_unit()
        return [(counter, asked[unit]) for counter, unit in self._units]

    def by_scope(self, amounts: Amounts) -> Iterator[tuple[BudgetScope, Counter, int]]:
        """The same, with each counter's budget."""
        return ((scope, counter, amounts.of(counter.kind)) for scope, counter, _ in self._limits)

    def remaining(self) -> Iterator[tuple[LimitKind, int]]:
        """What each limit has left, as far as this gateway knows."""
        return ((counter.kind, counter.remaining) for _, counter, _ in self._limits)

    def running_low(self) -> list[str]:
        """The keys of the budgets of which more is to be drawn ahead; each counter tells so once for each draw."""
        found = []
        for scope, counter, _ in self._limits:
            spare = counter.capacity - counter.used - counter.reserved
            if spare <= counter.low and counter.remaining > spare:
                counter.low = -1
                found.append(scope.key)
        return found

    def stream_over(self, reserved: Amounts) -> None:
        for counter in self._streams:
            counter.settle(reserved.requests, 0)

    def settle(self, reserved: Amounts, used: Amounts) -> None:
        """Gives back the unused part of everything except streams."""
        settle(self._counted, reserved.by_unit(), used.by_unit())

    def standings(self, now: float) -> tuple[Standing, ...]:
        """How far each limit is used."""
        found = []
        for scope, counter, end in self._limits:
            reset = None if end is None else max(0.0, end - now)
            found.append(Standing(scope.label, counter.kind, counter.ceiling, counter.remaining, reset))
        return tuple(found)

    def fields(self, now: float) -> Headers:
        """What the caller may know of that, as the header fields of an answer."""
        return self._fields.at(now)


def _limit(scope: BudgetScope, counter: Counter) -> _Limit:
    return _Limit(scope, counter, None if counter.kind is _STREAMS else bounds(counter.kind, counter.window)[1])


def limit_name(scope: BudgetScope, plan: str, counter: Counter) -> str:
    """As `user:standard/tokens_per_day@20782`: scope, plan, kind and number of the window."""
    return _name(scope.label, plan, counter.kind, counter.window)


@lru_cache(maxsize=4096)
def _name(label: str, plan: str, kind: LimitKind, window: int) -> str:
    """All callers of a plan share it, for as long as the window lasts."""
    return f"{label}:{plan}/{kind}@{window}"

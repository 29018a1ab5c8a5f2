"""The budget that a request holds from admission to settlement, and the reasons to refuse one."""

from __future__ import annotations

import asyncio
from collections import Counter as Counts
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Final, Self

from lacre_gateway.budget.callers import Amounts, Caller, ceiling_of
from lacre_gateway.budget.counters import CallersCounters, Standing, limit_name
from lacre_gateway.budget.in_flight import Reservation
from lacre_gateway.budget.lease import Counter
from lacre_gateway.budget.limit_fields import Headers
from lacre_gateway.budget.plans import LimitKind, Price
from lacre_gateway.budget.windows import bounds

# Seconds to wait after a refusal that was only due to unused reservations of others.
SOON: Final = 2.0
_STREAMS: Final = LimitKind.CONCURRENT_STREAMS


class BudgetRefused(Exception):
    """The request was refused and charged nothing. exceeded: the limit that it met, as in `Hold.limits`; None if it met
    none.
    """

    exceeded: str | None = None


@dataclass(frozen=True, slots=True)
class Met:
    """The limit that a request met, in its own units. scope: whose it is. asked: by the request. remaining: None if it does not
    matter. fits: the output tokens that would fit; None if unknown.
    """

    scope: str
    ceiling: int
    asked: int
    remaining: int | None = None
    fits: int | None = None


class UnknownPlan(BudgetRefused):
    """The token names a plan that is not in the plans file."""


class BudgetUnavailable(BudgetRefused):
    """The leases in hand are used up, and the shared store does not answer."""


class AboveLimit(BudgetRefused):
    """The request alone exceeds the limit: waiting does not help."""

    def __init__(self, plan: str, kind: LimitKind, met: Met) -> None:
        self.exceeded = f"{met.scope}:{plan}/{kind}"  # of any window
        super().__init__(f"above {self.exceeded}")
        self.kind = kind
        self.met = met


class Exhausted(BudgetRefused):
    """A limit is used up. retry_after: seconds. standings: of every limit of the caller.

    exceeded, met: None if the missing amount was given back meanwhile.
    """

    def __init__(
        self, kind: LimitKind, exceeded: str | None, retry_after: float, standings: tuple[Standing, ...], met: Met | None = None
    ) -> None:
        super().__init__(f"{kind.value} is used up")
        self.kind = kind
        self.exceeded = exceeded
        self.retry_after = retry_after
        self.standings = standings
        self.met = met

    @classmethod
    def of(cls, plan: str, counters: CallersCounters, amounts: Amounts, now: float) -> Self:
        """The limit for which the caller has to wait longest."""
        standings = counters.standings(now)
        short = [
            (scope, counter, _wait(counter, amount, now), amount)
            for scope, counter, amount in counters.by_scope(amounts)
            if not counter.has(amount, now)
        ]
        if not short:
            return cls(standings[0].kind, None, SOON, standings)
        scope, counter, wait, amount = max(short, key=itemgetter(2))
        met = Met(scope.label, counter.ceiling, amount, counter.remaining)
        return cls(counter.kind, limit_name(scope, plan, counter), wait, standings, met)


class Unsettled:
    """Counts, by budget, the reservations whose streams have ended and which are not settled yet. Used on one event loop."""

    def __init__(self) -> None:
        self._ended: Counts[str] = Counts()
        self._waiting: set[asyncio.Event] = set()

    def add(self, keys: Iterable[str]) -> None:
        self._ended.update(keys)

    def remove(self, keys: Iterable[str]) -> None:
        for key in keys:
            self._ended[key] -= 1
            if not self._ended[key]:
                del self._ended[key]
        for event in self._waiting:
            event.set()

    async def fewer(self, keys: Sequence[str], deadline: float) -> bool:
        """Waits for the next settlement, if any of these budgets expects one. deadline: on the loop's clock.

        False: none is expected, or none came in time.
        """
        if not any(self._ended[key] for key in keys):
            return False
        event = asyncio.Event()
        self._waiting.add(event)
        try:
            async with asyncio.timeout_at(deadline):
                await event.wait()
        except TimeoutError:
            return False
        finally:
            self._waiting.discard(event)
        return True


@dataclass(frozen=True, slots=True)
class Lender:
    """A process that makes reservations. holder: the name of its leases. unsettled: which of its reservations have ended."""

    holder: str
    unsettled: Unsettled = field(default_factory=Unsettled)


class Hold:
    """A reservation. ceilings: its amounts, which the grant may allow. lease: the holder that it was charged to.

    It ends with `stream_over` and `settle`, each once.
    """

    __slots__ = ("_counters", "_over", "_settled", "_unsettled", "caller", "ceilings", "lease", "price", "reserved")

    def __init__(
        self, caller: Caller, price: Price | None, ceilings: Reservation, lender: Lender, counters: CallersCounters
    ) -> None:  # fmt: skip
        """counters: what it was charged to."""
        self._unsettled = lender.unsettled
        self._counters = counters
        self.caller = caller
        self.price = price
        self.ceilings = ceilings
        self.reserved = ceiling_of(price, ceilings.max_prompt_tokens, ceilings.max_tokens)
        self.lease = lender.holder
        self._over = self._settled = False

    @property
    def limits(self) -> tuple[str, ...]:
        """Every limit that was charged, as `user:standard/tokens_per_day@20782`: scope, plan, kind and number of the window."""
        return self._counters.names

    def fields(self, now: float) -> Headers:
        """How far the caller's limits are used, as the header fields of an answer. now: seconds since the epoch."""
        return self._counters.fields(now)

    def stream_over(self) -> None:
        """The stream has ended, however much it will turn out to have used."""
        if not self._over:
            self._over = True
            self._unsettled.add(self._counters.keys)
            self._counters.stream_over(self.reserved)

    def settle(self, used: Amounts) -> None:
        """Gives back the unused part."""
        self.stream_over()
        if not self._settled:
            self._settled = True
            self._counters.settle(self.reserved, used)
            self._unsettled.remove(self._counters.keys)

    def cost(self, prompt_tokens: int, cached_tokens: int, completion_tokens: int) -> int:
        """Micro-units, at the prices of the reservation."""
        return 0 if self.price is None else self.price.of(prompt_tokens, cached_tokens, completion_tokens)


def _wait(counter: Counter, amount: int, now: float) -> float:
    """Seconds until the window ends, or less if unused reservations would suffice."""
    if counter.kind is _STREAMS or counter.firm + counter.used + amount <= counter.ceiling:
        return SOON
    return max(SOON, bounds(counter.kind, counter.window)[1] - now)

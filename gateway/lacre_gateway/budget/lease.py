"""One gateway's leases of one budget: how much it holds, has used and reserved, and what it may write into the record.

Rules:
- No I/O, no clock. `propose` says what to write. The caller writes it and reports the result: `confirm`, `conflict` or `doubt`.
- *Committed* is used and reserved together; it never exceeds the capacity.
- The capacity never exceeds the record, *whichever* of the sent writes have happened. So it falls before a write that lowers it
  is sent, and rises only when a write that raises it is confirmed. A write in doubt leaves it at the smaller value.
- A reservation stays in the window that it was made in, and is settled there, at no more than was reserved.
- A lease holds as much as was lately used in `COVER` seconds, so that steady callers are served while nothing can be drawn.
- The ceiling is the plan's and the additions of the last seen record. Those of a write that is not confirmed raise no capacity.
- No stream begins under a lease that would be void before the longest stream ends.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Self

from lacre_gateway.budget.additions import Limit
from lacre_gateway.budget.plans import LimitKind
from lacre_gateway.budget.record import Lot, Record, Want

IDLE: Final = 3.0  # seconds without a reservation, after which the rest is given back
TRIM: Final = 1.0  # seconds between writes that only give back a large excess
REPORT: Final = 15.0  # seconds that usage may go unreported
COVER: Final = 10.0  # seconds: choosing a new leader of the bucket takes some, and so does cutting off a flood
# Parts of the ceiling: the least and the most that a lease holds for future requests.
LEAST_SPARE: Final = 64
MOST_SPARE: Final = 8
STREAMS_TERM: Final = 60.0  # seconds in which streams may begin under a lease, before it must be renewed
# Seconds that the clocks of gateways may differ, when shares of streams become void by the clock.
CLOCK_MARGIN: Final = 30.0


@dataclass(slots=True)
class Counter:
    """One kind in one window. capacity: the most that may be committed. confirmed: the share in the record when that was last
    certain. others, firm: how much of the ceiling others had drawn then, and had certainly used. low: how much spare is too
    little. until: when the last stream may begin. beyond: the wish for future requests. largest: the largest single
    reservation. lately: how much was used in the last `COVER` seconds; `seen` is the value of `used` at the time `looked`.
    """  # fmt: skip

    kind: LimitKind
    window: int
    ceiling: int = 0
    capacity: int = 0
    confirmed: int = 0
    used: int = 0
    reserved: int = 0
    reported: int = 0
    others: int = 0
    firm: int = 0
    low: int = -1
    until: float = math.inf
    doubtful: bool = False
    beyond: int = 0
    largest: int = 0
    lately: float = 0.0
    seen: int = 0
    looked: float = 0.0

    @classmethod
    def after(cls, last: Counter | None, kind: LimitKind, window: int) -> Self:
        """An empty one, which wants as much for future requests as the counter of the last window."""
        until = -math.inf if kind is LimitKind.CONCURRENT_STREAMS else math.inf
        if last is None:
            return cls(kind, window, until=until)
        lately = last.lately + max(0, last.used - last.seen)
        return cls(kind, window, until=until, largest=last.largest, lately=lately, looked=last.looked)

    @property
    def committed(self) -> int:
        return self.used + self.reserved

    @property
    def spare(self) -> int:
        return self.capacity - self.used - self.reserved

    @property
    def remaining(self) -> int:
        """How much of the ceiling is neither drawn nor committed, as far as this gateway knows."""
        return max(0, self.ceiling - self.others - self.used - self.reserved)

    def has(self, amount: int, now: float) -> bool:
        return not lacking([(self, amount)], now)

    def reserve(self, amount: int) -> None:
        commit([(self, amount)])

    def look(self, now: float) -> None:
        """Computes how much to hold for future requests."""
        passed = max(0.0, now - self.looked)
        self.lately = self.lately * math.exp(-passed / COVER) + max(0, self.used - self.seen)
        self.seen, self.looked = self.used, now
        self.beyond = max(self.ceiling // LEAST_SPARE, min(int(self.lately), self.ceiling // MOST_SPARE))

    @property
    def excess(self) -> bool:
        """Whether there is far more spare than the next requests want."""
        return self.spare > max(2 * max(1, self.beyond), min(self.largest, self.ceiling // MOST_SPARE))

    def settle(self, reserved: int, used: int) -> None:
        settle([(self, 0)], [reserved], [used])


@dataclass(frozen=True, slots=True)
class Need:
    """How much of each kind one waiting request wants from an account. ceiling: the limit in force."""

    amounts: Mapping[LimitKind, tuple[int, int]]  # amount and ceiling


@dataclass(frozen=True, slots=True)
class Proposal:
    """A record to be written, and its effect here. met: which of its needs it meets."""

    record: Record
    lots: tuple[tuple[Counter, Want, Lot], ...]
    met: tuple[bool, ...]
    admits_until: float


@dataclass(slots=True)
class Account:
    """One holder's leases of one budget. longest: seconds that the longest stream may take. edition: rises when `current`, or a
    ceiling of a counter in it, may have changed.
    """

    key: str
    name: str
    holder: str
    longest: float
    current: dict[LimitKind, Counter] = field(default_factory=dict)
    past: list[Counter] = field(default_factory=list)
    floors: dict[LimitKind, int] = field(default_factory=dict)
    raised: Mapping[Limit, Mapping[str, int]] = field(default_factory=dict)
    touched: float = 0.0
    written: float = -math.inf
    edition: int = 0

    def counter(self, kind: LimitKind, window: int, ceiling: int) -> Counter:
        """The counter of the kind, in that window or in the oldest that is still open, if that is later. ceiling: the
        plan's.
        """
        window = max(window, self.floors.get(kind, 0))
        found = self.current.get(kind)
        if found is None or found.window < window:
            if found is not None:
                self.past.append(found)
            found = self.current[kind] = Counter.after(found, kind, window)
            self.edition += 1
        found.ceiling = self.ceiling(kind, found.window, ceiling)
        return found

    def ceiling(self, kind: LimitKind, window: int, ceiling: int) -> int:
        """The plan's ceiling as it was raised in that window."""
        return ceiling + sum(self.raised.get((kind, window), {}).values()) if self.raised else ceiling

    def propose(self, record: Record | None, windows: Mapping[LimitKind, int], needs: Sequence[Need], now: float) -> Proposal:
        """The next record in place of `record`: reports usage, gives back, and draws for the needs, in order, that fit."""
        idle = not needs and now - self.touched >= IDLE
        before, record = record, record or Record(self.name)
        self.raised = record.raised
        self.edition += 1
        for kind, (_, ceiling) in ((kind, pair) for need in needs for kind, pair in need.amounts.items()):
            self.counter(kind, windows[kind], ceiling)
        until = now + STREAMS_TERM
        lots, met = [], [True] * len(needs)
        for counter in (*self.past, *self.current.values()):
            self._know(counter, before)
            counter.look(now)
            current = self.current.get(counter.kind) is counter and counter.window >= windows[counter.kind]
            amounts = tuple(need.amounts.get(counter.kind, (0, 0))[0] for need in needs) if current else ()
            want = self._want(counter, amounts, spare=current and not idle, until=until)
            record, lot = record.allot(self.holder, want, now)
            lots.append((counter, want, lot))
            if current:
                met = [all(pair) for pair in zip(met, lot.met, strict=True)]
        return Proposal(record, tuple(lots), tuple(met), until)

    def leave(self, record: Record | None, now: float) -> Proposal:
        """The last write of a holder: it gives up present reservations as lost, and gives back the rest."""
        record = record or Record(self.name)
        lots = []
        for counter in (*self.past, *self.current.values()):
            self._know(counter, record)
            done = counter.reserved == 0
            want = self._want(counter, (), spare=False, until=now + STREAMS_TERM, closed=done)
            record, lot = record.allot(self.holder, want, now)
            lots.append((counter, want, lot))
        return Proposal(record, tuple(lots), (), -math.inf)

    def _want(self, counter: Counter, needs: tuple[int, ...], *, spare: bool, until: float, closed: bool = False) -> Want:
        streams = counter.kind is LimitKind.CONCURRENT_STREAMS
        return Want(
            kind=counter.kind,
            window=counter.window,
            ceiling=counter.ceiling,
            committed=counter.committed,
            used=counter.used,
            needs=needs,
            spare=counter.beyond if spare else 0,
            until=until + self.longest + CLOCK_MARGIN if streams else 0.0,
            closed=closed,
        )

    def _know(self, counter: Counter, record: Record | None) -> None:
        """A budget that was given back whole and forgotten here continues from the record."""
        share = None if record is None else record.share(counter.kind, counter.window, self.holder)
        if share is not None and counter.confirmed == counter.used == counter.reserved == 0 and not counter.doubtful:
            counter.used = counter.reported = counter.seen = share.used

    def send(self, proposal: Proposal) -> None:
        """Before the write: from now on, nothing is committed that would be too much after it."""
        for counter, _, lot in proposal.lots:
            counter.capacity = min(counter.capacity, lot.drawn)

    def confirm(self, proposal: Proposal, now: float) -> None:
        """The write has happened."""
        self.written = now
        for counter, want, lot in proposal.lots:
            self._see(counter, proposal.record)
            counter.capacity = counter.confirmed = counter.committed if lot.refused else lot.drawn
            counter.others, counter.firm, counter.reported, counter.doubtful = lot.others, lot.firm, want.used, False
            counter.low = counter.spare // 2 if counter.spare > 1 else -1
            if counter.kind is LimitKind.CONCURRENT_STREAMS:
                counter.until = proposal.admits_until
        self._forget(proposal.record)

    def conflict(self, proposal: Proposal) -> None:
        """The write did not happen. The amounts that it would have given back are here again, unless an earlier write is in
        doubt.
        """
        for counter, _, _ in proposal.lots:
            if not counter.doubtful:
                counter.capacity = counter.confirmed

    def doubt(self, proposal: Proposal) -> None:
        """It is unknown whether the write has happened, or will."""
        for counter, _, _ in proposal.lots:
            counter.doubtful = True

    def see(self, record: Record) -> None:
        """Takes note of a record that was read."""
        self.raised = record.raised
        self.edition += 1
        for counter in (*self.past, *self.current.values()):
            self._see(counter, record)

    def _see(self, counter: Counter, record: Record) -> None:
        self.floors[counter.kind] = max(self.floors.get(counter.kind, 0), record.floor(counter.kind))

    def _forget(self, record: Record) -> None:
        """Forgets windows that are settled and in the record, and windows that are over for good.

        A request that was settled during the write left more in the record than is used; that is still to be given back.
        """
        self.edition += 1
        self.past = [counter for counter in self.past if counter.reserved or self._owes(counter, record)]
        self.current = {
            kind: counter
            for kind, counter in self.current.items()
            if counter.reserved or counter.window >= record.floor(kind) or self._owes(counter, record)
        }

    def _owes(self, counter: Counter, record: Record) -> bool:
        """Whether a report is due that the record takes: the window is open, or a share of this holder is still there."""
        if not _is_loose(counter):
            return False
        open_still = counter.window >= record.floor(counter.kind)
        return open_still or record.share(counter.kind, counter.window, self.holder) is not None

    @property
    def at_rest(self) -> bool:
        """Whether forgetting this account would lose nothing: all is settled, given back and in the record."""
        return all(
            counter.reserved == 0 and counter.capacity == counter.used == counter.reported and not counter.doubtful
            for counter in (*self.past, *self.current.values())
        )

    def due(self, now: float) -> bool:
        """Whether it is time to write, even if no request waits for it."""
        self.touched, self.written = min(self.touched, now), min(self.written, now)  # the clock may have gone back
        since, idle = now - self.written, now - self.touched >= IDLE
        return any(_is_due(counter, since, now) or (idle and _is_loose(counter)) for counter in self.current.values()) or (
            since >= TRIM and any(_is_loose(counter) for counter in self.past)
        )


def _is_due(counter: Counter, since: float, now: float) -> bool:
    if counter.doubtful or (since >= REPORT and counter.used != counter.reported):
        return True
    if counter.kind is LimitKind.CONCURRENT_STREAMS and counter.reserved and counter.until - now < STREAMS_TERM / 2:
        return True
    return since >= TRIM and counter.excess


def _is_loose(counter: Counter) -> bool:
    """Whether the record differs from the amounts committed and used here."""
    return counter.capacity != counter.committed or counter.used != counter.reported


_STREAMS: Final = LimitKind.CONCURRENT_STREAMS
Charge = tuple[Counter, int]


def lacking(charges: Iterable[Charge], now: float) -> list[Counter]:
    """The counters that lack the amounts to be charged to them. No call for each: a request may have twenty limits."""
    return [
        counter
        for counter, amount in charges
        if (committed := counter.used + counter.reserved + amount) > counter.capacity
        or committed > counter.ceiling
        or now >= counter.until
    ]


def commit(charges: Iterable[Charge]) -> None:
    """Charges all; only if no counter lacks anything."""
    for counter, amount in charges:
        counter.reserved += amount
        if amount > counter.largest:  # noqa: PLR1730 - `max` would be a call for each limit
            counter.largest = amount


def settle(counters: Iterable[tuple[Counter, int]], reserved: Sequence[int], used: Sequence[int]) -> None:
    """Ends reservations: of each counter, with the place of its amounts in both lists. No more than was reserved is charged."""
    charged = list(map(min, reserved, used))
    for counter, place in counters:
        counter.reserved -= reserved[place]
        if counter.kind is not _STREAMS:
            counter.used += charged[place]

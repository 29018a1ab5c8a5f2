"""What all gateways know of one budget: how much of each window each has drawn. An immutable value.

Rules:
- A *share* is one holder's lease of one window: how much was drawn, and how much of it was used at the last report. Only the
  holder changes its share. It writes absolute numbers, so writing the same twice changes nothing.
- All shares of a window together never draw more than the ceiling that a draw names. A share stays with its holder while its
  window lasts, because a crashed holder may have spent it all. Until then, its unspent part is forfeited.
- A record keeps the two newest windows that were ever drawn from. Nothing is ever drawn below the older of them, so a clock
  that goes back finds no fresh budget.
- A share of streams belongs to no window. It is void at its `until`, which its holder set past the end of its longest stream.
- A share that its holder closed is final; its usage is kept in one sum with the others.
- Each gateway's credential writes its own part, and draws by the sum of all parts. Other parts are trusted only as far as they
  are plausible. An unreadable one counts as nothing drawn, and windows that have not begun count for nothing. A lying gateway
  can claim that its leases hold a whole budget. It cannot give away or take back what others drew.
- An administrator's additions stand in the part of the gateway that was asked, and raise the ceiling for all. Each is signed:
  see `additions`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

from lacre.errors import InvalidMessage
from lacre.jose.formats import MEMBER, Format
from lacre_gateway.budget import additions
from lacre_gateway.budget.additions import MAX_ADDITIONS, Addition, Additions, Check, Limit, nothing_counts
from lacre_gateway.budget.plans import LimitKind

RECORD: Final = Format("budget record", "gateway")
KEPT_WINDOWS: Final = 2
_MOST: Final = 2**63  # of anything: far more than any ceiling, and quickly added up


@dataclass(frozen=True, slots=True)
class Share:
    """used: as last reported by the holder. until: for streams, when it is void; 0 otherwise. closed: the holder has left."""

    drawn: int
    used: int = 0
    until: float = 0.0
    closed: bool = False


@dataclass(frozen=True, slots=True)
class Window:
    """settled: the usage of closed shares, as one sum."""

    shares: Mapping[str, Share] = field(default_factory=dict)
    settled: int = 0

    def drawn(self) -> int:
        """How much of the ceiling is gone."""
        return self.settled + sum(share.drawn for share in self.shares.values())

    def used(self) -> int:
        """How much was certainly used, by the reports."""
        return self.settled + sum(share.used for share in self.shares.values())

    def folded(self, own: str, now: float) -> Window:
        """Without others' shares that are closed or, for streams, void."""
        gone = {
            name: share
            for name, share in self.shares.items()
            if name != own and (share.closed or (share.until and share.until <= now))
        }
        if not gone:
            return self
        kept = {name: share for name, share in self.shares.items() if name not in gone}
        return Window(kept, self.settled + sum(share.used for share in gone.values() if not share.until))


@dataclass(frozen=True, slots=True)
class Want:
    """A holder's request to one window.

    committed: used and reserved, which it must keep. used: of it. needs: what each waiting request wants beyond, in turn.
    spare: the wish for future requests; it gets at most half of its fair part of the rest. until: for streams. closed: the
    holder leaves.
    """

    kind: LimitKind
    window: int
    ceiling: int
    committed: int
    used: int
    needs: tuple[int, ...] = ()
    spare: int = 0
    until: float = 0.0
    closed: bool = False


@dataclass(frozen=True, slots=True)
class Lot:
    """The result of a want. drawn: all that the holder has now. others: all that others have drawn. firm: what they certainly
    used. met: which of its needs. refused: the window is over.
    """

    drawn: int
    others: int = 0
    firm: int = 0
    met: tuple[bool, ...] = ()
    refused: bool = False


Windows = Mapping[LimitKind, Mapping[int, Window]]


@dataclass(frozen=True, slots=True)
class Record:
    """name: of the budget's owner, for people. windows: of the own part. others: of the parts of other credentials.

    added: the own part's additions. raised: the amounts of all parts' genuine additions, by number.
    """

    name: str
    windows: Windows = field(default_factory=dict)
    others: tuple[Windows, ...] = ()
    added: Additions = field(default_factory=dict)
    raised: Mapping[Limit, Mapping[str, int]] = field(default_factory=dict)

    def with_others(self, parts: Iterable[bytes], current: Mapping[LimitKind, int], genuine: Check = nothing_counts) -> Record:
        """current: the open windows. One more may have begun, by another clock. genuine: which additions count."""
        found, name, added = [], self.name, [self.added]
        for part in parts:
            try:
                said = Record.parse(part)
            except InvalidMessage:
                continue
            found.append(
                {kind: {at: kept[at] for at in kept if at <= current[kind] + 1} for kind, kept in said.windows.items()}
            )
            name = name or said.name
            added.append(said.added)
        return Record(name, self.windows, tuple(found), self.added, _genuine(added, current, genuine))

    def added_to(self, kind: LimitKind, window: int) -> int:
        """By how much the ceiling was raised."""
        return sum(self.raised.get((kind, window), {}).values())

    def used(self, kind: LimitKind, window: int) -> int:
        """What certainly was used, by all reports."""
        return sum(part.get(kind, {}).get(window, Window()).used() for part in (self.windows, *self.others))

    def raised_by(self, limit: Limit, number: str, addition: Addition) -> Record:
        """With one more addition in the own part, which forgets those of windows that are long over."""
        kind, window = limit
        kept = {at: each for at, each in self.added.items() if at[0] != kind or at[1] > window - KEPT_WINDOWS}
        added = {**kept, limit: {**kept.get(limit, {}), number: addition}}
        raised = {**self.raised, limit: {**self.raised.get(limit, {}), number: addition.amount}}
        return replace(self, added=added, raised=raised)

    def merged(self) -> Record:
        """All parts as one, for people, without windows that are over. If two holders have the same name, the second gets a
        number.
        """
        found: dict[LimitKind, dict[int, Window]] = {}
        for part in (self.windows, *self.others):
            for kind, kept in part.items():
                for at, window in kept.items():
                    before = found.setdefault(kind, {}).get(at, Window())
                    shares = dict(before.shares)
                    for holder, share in window.shares.items():
                        shares[holder if holder not in shares else f"{holder} ({len(shares)})"] = share
                    found[kind][at] = Window(shares, before.settled + window.settled)
        newest = {kind: dict(sorted(kept.items())[-KEPT_WINDOWS:]) for kind, kept in found.items()}
        return Record(self.name, newest, added=self.added, raised=self.raised)

    def floor(self, kind: LimitKind) -> int:
        """Earlier windows are over for good."""
        kept = {at for part in (self.windows, *self.others) for at in part.get(kind, {})}
        return sorted(kept)[-KEPT_WINDOWS] if len(kept) >= KEPT_WINDOWS else 0

    def _elsewhere(self, kind: LimitKind, window: int, now: float) -> list[Window]:
        return [part.get(kind, {}).get(window, Window()).folded("", now) for part in self.others]

    def share(self, kind: LimitKind, window: int, holder: str) -> Share | None:
        return self.windows.get(kind, {}).get(window, Window()).shares.get(holder)

    def allot(self, holder: str, want: Want, now: float) -> tuple[Record, Lot]:
        """The record after the want, and the result. now: decides which shares of streams are void."""
        kept = dict(self.windows.get(want.kind, {}))
        if want.window < self.floor(want.kind):
            return self._given_back(holder, want, kept), Lot(want.committed, met=(False,) * len(want.needs), refused=True)
        window = kept.get(want.window, Window()).folded(holder, now)
        shares = {name: share for name, share in window.shares.items() if name != holder}
        others = Window(shares, window.settled)
        every = [others, *self._elsewhere(want.kind, want.window, now)]
        gone, firm = sum(each.drawn() for each in every), sum(each.used() for each in every)
        drawn, met = _divide(want, gone, sum(len(each.shares) for each in every))
        if drawn or want.used or want.closed:
            shares = {**shares, holder: Share(drawn, want.used, want.until, want.closed)}
        if want.closed and want.until:
            shares.pop(holder)
        kept[want.window] = replace(others, shares=shares)
        newest = dict(sorted(kept.items())[-KEPT_WINDOWS:])
        lot = Lot(drawn, gone, firm, met)
        return replace(self, windows={**self.windows, want.kind: newest}), lot

    def _given_back(self, holder: str, want: Want, kept: dict[int, Window]) -> Record:
        """From a window that is over, nothing is drawn. A share that still stands in the own part is lowered."""
        window = kept.get(want.window, Window())
        share = window.shares.get(holder)
        if share is None:
            return self
        lowered = Share(min(share.drawn, want.committed), want.used, want.until, want.closed)
        kept[want.window] = replace(window, shares={**window.shares, holder: lowered})
        return replace(self, windows={**self.windows, want.kind: kept})

    def encode(self) -> bytes:
        kinds = {
            kind.value: {str(number): _encode_window(window) for number, window in windows.items()}
            for kind, windows in self.windows.items()
        }
        members: dict[str, Any] = {MEMBER: RECORD.version, "name": self.name, "kinds": kinds}
        if self.added:
            members["added"] = additions.encode(self.added)
        return json.dumps(members, separators=(",", ":")).encode()

    @classmethod
    def parse(cls, data: bytes) -> Record:
        """Raises InvalidMessage."""
        try:
            found = json.loads(data)
            RECORD.check(found)
            windows = {
                LimitKind(kind): {int(number): _parse_window(window) for number, window in kept.items()}
                for kind, kept in found["kinds"].items()
                if kind in frozenset(LimitKind)  # a newer gateway may have limits of further kinds
            }
            return cls(str(found["name"]), windows, added=additions.parse(found.get("added", {})))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as exc:
            raise InvalidMessage("the budget record is malformed") from exc


def _genuine(parts: Iterable[Additions], current: Mapping[LimitKind, int], genuine: Check) -> Mapping[Limit, Mapping[str, int]]:
    """A number counts once, and in an open window or beside one: a lying gateway cannot have more of them checked."""
    found: dict[Limit, dict[str, int]] = {}
    for part in parts:
        for limit, kept in part.items():
            if abs(limit[1] - current[limit[0]]) > 1 or len(kept) > MAX_ADDITIONS:
                continue
            for number, addition in kept.items():
                if genuine(limit, number, addition):
                    found.setdefault(limit, {}).setdefault(number, addition.amount)
    return found


def _divide(want: Want, others: int, holders: int) -> tuple[int, tuple[bool, ...]]:
    """How much the holder gets, never less than is committed; and which of its needs are met: each in turn that still fits."""
    free, drawn, met = want.ceiling - others, want.committed, []
    for need in want.needs:
        met.append(need == 0 or drawn + need <= free)
        drawn += need if met[-1] else 0
    if want.spare and all(met):
        drawn += max(0, min(want.spare, (free - drawn) // (2 * (holders + 1))))
    return drawn, tuple(met)


def _encode_window(window: Window) -> dict[str, Any]:
    shares = {
        name: [share.drawn, share.used, *([share.until] if share.until else ()), *(["closed"] if share.closed else ())]
        for name, share in window.shares.items()
    }
    return {"settled": window.settled, "shares": shares}


def _parse_window(found: Mapping[str, Any]) -> Window:
    return Window({name: _parse_share(*values) for name, values in found["shares"].items()}, _amount(found["settled"]))


def _parse_share(drawn: int, used: int, *rest: object) -> Share:
    until = next((float(value) for value in rest if isinstance(value, int | float)), 0.0)
    return Share(_amount(drawn), _amount(used), until, "closed" in rest)


def _amount(said: object) -> int:
    """Raises ValueError: a negative amount would give others more than there is."""
    if type(said) is not int or not 0 <= said <= _MOST:
        raise ValueError("not an amount")
    return said

"""What all gateways know of one budget: how much of each window each of them has drawn. A value; changing it makes another.

Rules:
- A *share* is one holder's lease of one window: so much was drawn, and so much of it was used when the holder last said so.
  Only the holder changes its share, and it writes absolute numbers: to write the same twice changes nothing.
- What all shares of a window have drawn never exceeds the ceiling that a draw names. A share is not taken from its holder
  while its window lasts: a holder that crashed may have spent it all. What it had not spent is forfeited until then.
- A record keeps the two newest windows that were ever drawn from. Below the older of them nothing is drawn, ever again: a
  clock that goes back finds no fresh budget.
- A share of streams belongs to no window: it is void at its `until`, which its holder put past the end of its longest stream.
- A share that its holder closed is final; what it used is kept in one sum with the others.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

from lacre.errors import InvalidMessage
from lacre_gateway.plans import Kind

VERSION: Final = 1
KEPT_WINDOWS: Final = 2
# What a lease may hold beyond what was asked for: this part of the ceiling, and half of its fair part of what is left.
SPARE_PART: Final = 64


@dataclass(frozen=True, slots=True)
class Share:
    """used: as the holder last reported. until: for streams, when it is void; 0 otherwise. closed: the holder has left."""

    drawn: int
    used: int = 0
    until: float = 0.0
    closed: bool = False


@dataclass(frozen=True, slots=True)
class Window:
    """settled: what closed shares had used, folded into one number."""

    shares: Mapping[str, Share] = field(default_factory=dict)
    settled: int = 0

    def drawn(self) -> int:
        """What is gone from the ceiling."""
        return self.settled + sum(share.drawn for share in self.shares.values())

    def used(self) -> int:
        """What was surely used, as far as was reported."""
        return self.settled + sum(share.used for share in self.shares.values())

    def folded(self, own: str, now: float) -> Window:
        """Without others' shares that are closed or, being of streams, void."""
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
    """What a holder asks of one window.

    committed: used and reserved: what it must keep. used: of it. needs: what each request that waits wants beyond, in turn.
    spare: whether it wants some for requests to come. until: for streams. closed: it leaves.
    """

    kind: Kind
    window: int
    ceiling: int
    committed: int
    used: int
    needs: tuple[int, ...] = ()
    spare: bool = True
    until: float = 0.0
    closed: bool = False


@dataclass(frozen=True, slots=True)
class Lot:
    """What came of a want. drawn: all that the holder has now. others: what is gone to others. firm: what they surely used.
    met: which of its needs. refused: the window is over.
    """

    drawn: int
    others: int = 0
    firm: int = 0
    met: tuple[bool, ...] = ()
    refused: bool = False


@dataclass(frozen=True, slots=True)
class Record:
    """name: whose budget it is, for people."""

    name: str
    windows: Mapping[Kind, Mapping[int, Window]] = field(default_factory=dict)

    def floor(self, kind: Kind) -> int:
        """Windows below are over for good."""
        kept = self.windows.get(kind, {})
        return min(kept) if len(kept) >= KEPT_WINDOWS else 0

    def share(self, kind: Kind, window: int, holder: str) -> Share | None:
        return self.windows.get(kind, {}).get(window, Window()).shares.get(holder)

    def allot(self, holder: str, want: Want, now: float) -> tuple[Record, Lot]:
        """The record after the want, and what came of it. now: decides which shares of streams are void."""
        if want.window < self.floor(want.kind):
            return self, Lot(want.committed, met=(False,) * len(want.needs), refused=True)
        kept = dict(self.windows.get(want.kind, {}))
        window = kept.get(want.window, Window()).folded(holder, now)
        shares = {name: share for name, share in window.shares.items() if name != holder}
        others = Window(shares, window.settled)
        drawn, met = _divide(want, others.drawn(), len(shares))
        if drawn or want.used or want.closed:
            shares = {**shares, holder: Share(drawn, want.used, want.until, want.closed)}
        if want.closed and want.until:
            shares.pop(holder)
        kept[want.window] = replace(others, shares=shares)
        newest = dict(sorted(kept.items())[-KEPT_WINDOWS:])
        lot = Lot(drawn, others.drawn(), others.used(), met)
        return replace(self, windows={**self.windows, want.kind: newest}), lot

    def encode(self) -> bytes:
        kinds = {
            kind.value: {str(number): _encode_window(window) for number, window in windows.items()}
            for kind, windows in self.windows.items()
        }
        return json.dumps({"v": VERSION, "name": self.name, "kinds": kinds}, separators=(",", ":")).encode()

    @classmethod
    def parse(cls, data: bytes) -> Record:
        """Raises InvalidMessage."""
        try:
            found = json.loads(data)
            if found["v"] != VERSION:
                raise InvalidMessage("a budget record of another version: run gateways of one version")
            windows = {
                Kind(kind): {int(number): _parse_window(window) for number, window in kept.items()}
                for kind, kept in found["kinds"].items()
            }
            return cls(str(found["name"]), windows)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as exc:
            raise InvalidMessage("a budget record that is not of its form") from exc


def _divide(want: Want, others: int, holders: int) -> tuple[int, tuple[bool, ...]]:
    """What the holder gets, never less than is committed; and which of its needs are met: each in turn that still fits."""
    free, drawn, met = want.ceiling - others, want.committed, []
    for need in want.needs:
        met.append(need == 0 or drawn + need <= free)
        drawn += need if met[-1] else 0
    if want.spare and all(met):
        drawn += max(0, min(want.ceiling // SPARE_PART, (free - drawn) // (2 * (holders + 1))))
    return drawn, tuple(met)


def _encode_window(window: Window) -> dict[str, Any]:
    shares = {
        name: [share.drawn, share.used, *([share.until] if share.until else ()), *(["closed"] if share.closed else ())]
        for name, share in window.shares.items()
    }
    return {"settled": window.settled, "shares": shares}


def _parse_window(found: Mapping[str, Any]) -> Window:
    return Window({name: _parse_share(*values) for name, values in found["shares"].items()}, int(found["settled"]))


def _parse_share(drawn: int, used: int, *rest: object) -> Share:
    until = next((float(value) for value in rest if isinstance(value, int | float)), 0.0)
    return Share(int(drawn), int(used), until, "closed" in rest)

"""The shared budgets for an auditor: how much is used, held in leases, and forfeited.

Rules:
- A lease whose holder is gone is *lost*: its unused part is forfeited until its window ends.
- With audit logs, the usage of a lost lease is counted from its outcomes, to the micro-unit. Without them, it is the holder's
  last report, which may be less.
- Every number must add up: a closed lease has drawn what its outcomes say, and no lease has used more than it drew.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from lacre_gateway.budget.callers import TOKENS, key_of, limits_of
from lacre_gateway.budget.limit_fields import UNITS
from lacre_gateway.budget.plans import LimitKind, Plans
from lacre_gateway.budget.record import Record, Window
from lacre_gateway.budget.windows import ends, label

_LIMIT: Final = re.compile(r"([a-z-]+):(.*)/([a-z_]+)@([0-9]+)", re.DOTALL)

Place = tuple[str, LimitKind, int]  # the key of a budget, its kind, and the window's number
Settled = Mapping[Place, Mapping[str, int]]  # by the holders of the leases


@dataclass(frozen=True, slots=True)
class Lease:
    """used: by its outcomes if there are audit logs, else as last reported. forfeited: the unused part of a lost one."""

    holder: str
    drawn: int
    used: int
    lost: bool

    @property
    def forfeited(self) -> int:
        return self.drawn - self.used if self.lost else 0


@dataclass(frozen=True, slots=True)
class Line:
    """One limit in one window. settled: by holders that left properly. wrong: the part that does not add up.

    ceiling: in force now; None if it is not known, or the plans no longer have the limit. raised: so much of it was added by
    administrators.
    """

    key: str
    name: str
    kind: LimitKind
    window: int
    settled: int
    leases: tuple[Lease, ...]
    wrong: str | None = None
    ceiling: int | None = None
    raised: int = 0

    @property
    def resets_at(self) -> float | None:
        """When the window ends, in seconds since the epoch; None for limits that do not count by time."""
        return ends(self.kind, self.window)

    @property
    def used(self) -> int:
        return self.settled + sum(lease.used for lease in self.leases)

    @property
    def forfeited(self) -> int:
        return sum(lease.forfeited for lease in self.leases)

    @property
    def drawn(self) -> int:
        return self.settled + sum(lease.drawn for lease in self.leases)

    def members(self, currency: str | None) -> dict[str, Any]:
        """As `lacre budget show --json` prints it. currency: of the plans; None if they are not known."""
        leases = [
            {"holder": each.holder, "drawn": each.drawn, "used": each.used, "lost": each.lost, "forfeited": each.forfeited}
            for each in self.leases
        ]
        return {
            "key": self.key, "name": self.name, "limit": self.kind.value, "window": self.window,
            "begins": label(self.kind, self.window), "drawn": self.drawn, "used": self.used, "forfeited": self.forfeited,
            "settled": self.settled, "leases": leases, "wrong": self.wrong,
            "ceiling": self.ceiling, "raised": self.raised, "resets_at": self.resets_at,
            "currency": currency if self.kind is LimitKind.MONEY_PER_MONTH else None,
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class OwnLimit:
    """A limit of a caller or of its tenant, in the present window. used: settled, or as last reported. resets_at: seconds since
    the epoch; None for limits that do not count by time.
    """

    scope: str
    kind: LimitKind
    ceiling: int
    used: int
    resets_at: float | None

    def members(self) -> dict[str, Any]:
        """As `GET /v1/me/usage` has it."""
        return {
            "limit": self.kind.value, "scope": self.scope, "unit": UNITS[self.kind], "ceiling": self.ceiling,
            "used": self.used, "remaining": max(0, self.ceiling - self.used), "resets_at": self.resets_at,
        }  # fmt: skip


def lines(
    records: Mapping[str, Record], alive: frozenset[str], settled: Settled | None = None, plans: Plans | None = None
) -> Iterator[Line]:
    """alive: holders with a recent sign of life. settled: by audit logs of all gateways; None if there are none. plans: for the
    ceilings in force.
    """
    for key, record in sorted(records.items(), key=lambda pair: pair[1].name):
        for kind, windows in record.windows.items():
            for number, window in sorted(windows.items()):
                by_holder = None if settled is None else settled.get((key, kind, number), {})
                line = _line((key, kind, number), record.name, window, alive, by_holder)
                limits = None if plans is None else limits_of(plans, key, record.name)
                ceiling = None if limits is None else getattr(limits, kind.value)
                raised = record.added_to(kind, number)
                yield line if ceiling is None else replace(line, ceiling=ceiling + raised, raised=raised)


def _line(place: Place, name: str, window: Window, alive: frozenset[str], by_holder: Mapping[str, int] | None) -> Line:
    key, kind, number = place
    leases, wrong, settled = [], None, window.settled
    logged = dict(by_holder or {})
    for holder, share in window.shares.items():
        if share.closed:
            settled += share.used
            continue
        used = share.used if by_holder is None or kind is LimitKind.CONCURRENT_STREAMS else logged.pop(holder, 0)
        if used > share.drawn or used < share.used:
            wrong = f"{holder}: drew {share.drawn} and reported {share.used}; its audit log says {used}"
        leases.append(Lease(holder, share.drawn, used, holder not in alive))
    if by_holder is not None and kind is not LimitKind.CONCURRENT_STREAMS and sum(logged.values()) != settled:
        wrong = wrong or f"closed leases settled {settled}; their audit logs say {sum(logged.values())}"
    return Line(key, name, kind, number, settled, tuple(leases), wrong)


def settled_by(entries: Iterable[Mapping[str, Any]]) -> dict[Place, dict[str, int]]:
    """The amounts that outcomes in audit logs settled, by budget and holder. entries: of each log in order."""
    found: dict[Place, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    intents: dict[str, Mapping[str, Any]] = {}
    for entry in entries:
        if entry["kind"] == "intent" and entry.get("lease"):
            intents[entry["request_id"]] = entry
        elif entry["kind"] == "outcome" and (intent := intents.pop(entry["request_id"], None)) is not None:
            for place, amount in _charged(intent, entry):
                found[place][intent["lease"]] += amount
    return found


def _charged(intent: Mapping[str, Any], outcome: Mapping[str, Any]) -> Iterator[tuple[Place, int]]:
    # An outcome without a duration was found unfinished at a start: its usage belongs to the lost lease.
    requests = int(outcome["outcome"] != "refused" and outcome["duration"] is not None)
    tokens = (outcome["prompt_tokens"] or 0) + (outcome["completion_tokens"] or 0) if requests else 0
    for limit in intent["limits"]:
        parsed = _LIMIT.fullmatch(limit)
        if parsed is None:
            continue
        scope, plan, kind, number = parsed[1], parsed[2], LimitKind(parsed[3]), int(parsed[4])
        key = key_of(scope, plan, intent["tenant"], intent["issuer"], intent["subject"])
        amount = tokens if kind in TOKENS else outcome.get("money") or 0 if kind is LimitKind.MONEY_PER_MONTH else requests
        yield (key, kind, number), amount

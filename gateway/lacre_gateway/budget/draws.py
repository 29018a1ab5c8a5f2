"""A budget as one process draws from it: its leases, the known state of its record, and who waits for the next write."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from lacre.errors import InvalidMessage
from lacre_fabric.work.contract import FabricUnavailable
from lacre_gateway.budget.additions import MAX_ADDITIONS, Approver
from lacre_gateway.budget.callers import BudgetScope, Caller
from lacre_gateway.budget.lease import Account, Need, Proposal
from lacre_gateway.budget.plans import LimitKind
from lacre_gateway.budget.record import Record


@dataclass(slots=True)
class Waiter:
    """A request. met: whether its need was."""

    need: Need
    met: asyncio.Future[bool]


@dataclass(slots=True)
class CeilingChange:
    """An administrator's addition that waits to be written. amount: None: so much that the whole ceiling of the plan remains.

    done: by how much the ceiling was raised, by this addition or before by one of the same number; None if it has too many.
    """

    kind: LimitKind
    window: int
    number: str
    amount: int | None
    done: asyncio.Future[int | None]


@dataclass(slots=True)
class Draw:
    """An account, the known state of its record, and the requests that wait for it. looked: when its record was last read only
    to learn of additions. doubted: the last write whose answer did not come, until the record is read.
    """

    account: Account
    record: Record | None = None
    revision: int = 0
    known: bool = False
    task: asyncio.Task[object] | None = None
    waiting: list[Waiter] | None = None
    changes: list[CeilingChange] = field(default_factory=list)
    looked: float = float("-inf")
    doubted: Proposal | None = None

    def doubt(self, proposal: Proposal) -> None:
        """It is unknown whether the write has happened, or will."""
        self.account.doubt(proposal)
        self.doubted = proposal

    def happened(self, now: float) -> Proposal | None:
        """The write in doubt, if the record that was just read shows that it has happened; it is confirmed then.

        A busy disk answers late. Without this each late write would be made again, only to be late again. The bytes of the own
        part decide: only this credential writes them, and they hold all that the capacity depends on.
        """
        doubted, self.doubted = self.doubted, None
        if doubted is None or self.record is None or self.record.encode() != doubted.record.encode():
            return None
        self.account.confirm(doubted, now)
        return doubted

    @property
    def changing(self) -> list[CeilingChange]:
        """The changes that somebody still waits for."""
        self.changes = [change for change in self.changes if not change.done.done()]
        return self.changes

    def used(self, kind: LimitKind, window: int, record: Record | None) -> int:
        """By the record, and what this process has settled since it last wrote."""
        used = 0 if record is None else record.used(kind, window)
        counter = self.account.current.get(kind)
        if counter is None or counter.window != window:
            return used
        share = None if record is None else record.share(kind, window, self.account.holder)
        return used - (0 if share is None else share.used) + counter.used

    def changed(self, approver: Approver) -> tuple[Record | None, list[tuple[CeilingChange, int | None]]]:
        """The record with the changes that wait, and the result of each once the record is written."""
        record, results = self.record, list[tuple[CeilingChange, int | None]]()
        genuine = approver.check(self.account.key)
        for change in self.changing:
            record = record or Record(self.account.name)
            limit = change.kind, change.window
            # A gateway whose clock is far off does not count its own additions. It still makes none of them twice.
            added = record.added.get(limit, {})
            own = {name: each.amount for name, each in added.items() if genuine(limit, name, each)}
            before = {**own, **record.raised.get(limit, {})}
            if change.number in before:
                results.append((change, before[change.number]))
                continue
            amount = change.amount
            if amount is None:
                amount = max(0, self.used(change.kind, change.window, record) - sum(before.values()))
            full = len(added) >= MAX_ADDITIONS and change.number not in added
            results.append((change, None if full and amount else amount))
            if amount and not full:
                addition = approver.sign(self.account.key, limit, change.number, amount)
                record = record.raised_by(limit, change.number, addition)
        return record, results


def answer(results: Sequence[tuple[CeilingChange, int | None]]) -> None:
    """Tells those who wait."""
    for change, result in results:
        if not change.done.done():
            change.done.set_result(result)


def with_additions(caller: Caller, draws: Mapping[str, Draw], windows: Mapping[LimitKind, int]) -> Caller:
    """With the ceilings as they were raised, as far as these draws know. windows: of now."""
    known = {scope.key: draws[scope.key].account for scope in caller.scopes if scope.key in draws}
    if not any(account.raised for account in known.values()):
        return caller
    return replace(caller, scopes=tuple(_with_additions(scope, known.get(scope.key), windows) for scope in caller.scopes))


def _with_additions(scope: BudgetScope, account: Account | None, windows: Mapping[LimitKind, int]) -> BudgetScope:
    if account is None:
        return scope
    limits = tuple((kind, account.ceiling(kind, windows[kind], ceiling)) for kind, ceiling in scope.limits)
    return replace(scope, limits=limits)


def parsed(value: bytes) -> Record:
    """Raises FabricUnavailable."""
    try:
        return Record.parse(value)
    except InvalidMessage as exc:
        raise FabricUnavailable("a budget in the bucket cannot be read: it has another version, or is damaged") from exc

"""Decides whose turn it is: tenants first, then the callers of a tenant, then the order of arrival.

Rules:
- A caller is identified by two pseudonyms from the grant (`lacre_fabric.work.grants`), the tenant's and its own. A client can
  influence nothing here: neither with its cache salt, nor with the number of conversations or choices.
- The tenant with the fewest running tasks is next. Among equals it is the one with the fewest computed tokens. After that it is
  the one that has waited longest since its last turn. The callers of a tenant are ordered in the same way.
- A newcomer's count starts at that of the least served party. So no one gains by waiting, or loses by having worked alone
  before.
- A party with nothing waiting and nothing running is forgotten.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Final, Generic, TypeVar

Fair = tuple[str, str]  # the pseudonyms of a tenant and of a caller
NOBODY: Final[Fair] = ("", "")  # for an engine without grants: all tasks are one caller's

T = TypeVar("T")


class _Party:
    """A tenant or a caller. spent: computed tokens, on a common scale. turn: when it was served last."""

    __slots__ = ("running", "spent", "turn", "waiting")

    def __init__(self, spent: int, turn: int) -> None:
        self.running = 0
        self.spent = spent
        self.turn = turn
        self.waiting = 0

    @property
    def order(self) -> tuple[int, int, int]:
        return self.running, self.spent, self.turn


class _Caller(_Party, Generic[T]):
    __slots__ = ("queue",)

    def __init__(self, spent: int, turn: int) -> None:
        super().__init__(spent, turn)
        self.queue: OrderedDict[str, T] = OrderedDict()


class _Tenant(_Party, Generic[T]):
    __slots__ = ("callers",)

    def __init__(self, spent: int, turn: int) -> None:
        super().__init__(spent, turn)
        self.callers: dict[str, _Caller[T]] = {}


class FairQueue(Generic[T]):
    """Waiting items by id. An item taken with `hold` runs until `release`."""

    def __init__(self) -> None:
        self._tenants: dict[str, _Tenant[T]] = {}
        self._count = 0

    def __iter__(self) -> Iterator[T]:
        """Waiting items: each caller's in order."""
        for tenant in self._tenants.values():
            for caller in tenant.callers.values():
                yield from caller.queue.values()

    def add(self, fair: Fair, item_id: str, item: T, *, first: bool = False) -> None:
        """first: ahead of its caller's other items."""
        tenant, caller = self._parties(fair)
        caller.queue[item_id] = item
        if first:
            caller.queue.move_to_end(item_id, last=False)
        caller.waiting += 1
        tenant.waiting += 1

    def next(self) -> T | None:
        """The item that is next. It stays in the queue."""
        tenant = _first(self._tenants)
        caller = None if tenant is None else _first(tenant.callers)
        return None if caller is None else next(iter(caller.queue.values()))

    def take(self, fair: Fair, item_id: str, *, hold: bool) -> None:
        """Removes an item that had its turn. hold: whether it runs now."""
        self._count += 1
        for party in self._parties(fair):
            party.turn = self._count
            party.running += hold
        self.drop(fair, item_id)

    def drop(self, fair: Fair, item_id: str) -> None:
        """Removes an item that no longer waits."""
        tenant, caller = self._parties(fair)
        del caller.queue[item_id]
        caller.waiting -= 1
        tenant.waiting -= 1
        self._forget(fair)

    def release(self, fair: Fair) -> None:
        """A held item has ended."""
        for party in self._parties(fair):
            party.running -= 1
        self._forget(fair)

    def spend(self, fair: Fair, tokens: int) -> None:
        """Counts tokens that were computed for a waiting or running task."""
        for party in self._parties(fair):
            party.spent += tokens

    def spent(self, fair: Fair) -> tuple[int, int]:
        """The tokens computed for the tenant and for the caller. Smaller ones go first."""
        tenant, caller = self._parties(fair)
        return tenant.spent, caller.spent

    def _parties(self, fair: Fair) -> tuple[_Tenant[T], _Caller[T]]:
        tenant = self._tenants.get(fair[0])
        if tenant is None:
            self._count += 1
            tenant = self._tenants[fair[0]] = _Tenant(_least(self._tenants), self._count)
        caller = tenant.callers.get(fair[1])
        if caller is None:
            self._count += 1
            caller = tenant.callers[fair[1]] = _Caller(_least(tenant.callers), self._count)
        return tenant, caller

    def _forget(self, fair: Fair) -> None:
        tenant, caller = self._parties(fair)
        if not (caller.running or caller.waiting):
            del tenant.callers[fair[1]]
        if not tenant.callers:
            del self._tenants[fair[0]]


P = TypeVar("P", bound=_Party)


def _first(parties: Mapping[str, P]) -> P | None:
    return min((party for party in parties.values() if party.waiting), key=lambda party: party.order, default=None)


def _least(parties: Mapping[str, _Party]) -> int:
    return min((party.spent for party in parties.values()), default=0)

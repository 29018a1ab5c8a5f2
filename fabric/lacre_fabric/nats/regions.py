"""In which region a request waits for a worker: in its gateway's own, unless one of another can begin sooner.

Rules:
- What is known is what workers say of themselves once a second, and what this gateway has sent since.
- A request that may be in one region's queue is not put into another's: only the server's word that it stored nothing lets it
  go on to the next.
"""

from __future__ import annotations

from collections.abc import Mapping

from lacre_fabric.work.contract import BEAT


def in_order(own: str, free: Mapping[str, int]) -> list[str]:
    """The regions to try, the best first: the own one if it has a free slot, those with the most, and of busy ones the own.

    free: of each region where live workers serve the model, their free slots, less what was sent there just now.
    """

    def rank(region: str) -> tuple[bool, bool, int, str]:
        return free[region] <= 0, region != own, -free[region], region

    return sorted(free, key=rank)


class Sent:
    """How much this gateway sent to a pool in a region that its workers have had no time to tell of yet."""

    def __init__(self) -> None:
        self._at: dict[tuple[str, str], dict[str, float]] = {}  # of each pool and region, when, by request; the oldest first

    def add(self, pool: str, region: str, request: str, now: float) -> None:
        self._at.setdefault((pool, region), {})[request] = now

    def forget(self, pool: str, region: str, request: str) -> None:
        """It is over: its slot is free again, or is told of with the next presence."""
        self._at.get((pool, region), {}).pop(request, None)

    def count(self, pool: str, region: str, now: float) -> int:
        sent = self._at.get((pool, region), {})
        while sent and sent[first := next(iter(sent))] <= now - BEAT:
            del sent[first]
        return len(sent)

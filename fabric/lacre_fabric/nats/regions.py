"""Chooses the region in which a request waits: the gateway's own, unless another region's worker can start sooner.

Rules:
- The choice uses the workers' presence, sent once a second, and this gateway's own requests since then.
- A request that may be in one region's queue goes into no other. Only if the server confirms that it stored nothing does the
  gateway try the next region.
"""

from __future__ import annotations

from collections.abc import Mapping

from lacre_fabric.work.contract import BEAT


def in_order(own: str, free: Mapping[str, int]) -> list[str]:
    """The regions to try, best first: the own region if it has a free slot, then those with most free slots. Among busy regions
    the own comes first.

    free: free slots of the workers that serve the model, by region, minus this gateway's recent requests.
    """

    def rank(region: str) -> tuple[bool, bool, int, str]:
        return free[region] <= 0, region != own, -free[region], region

    return sorted(free, key=rank)


class Sent:
    """Requests of this gateway that the workers' presence does not show yet, by pool and region."""

    def __init__(self) -> None:
        self._at: dict[tuple[str, str], dict[str, float]] = {}  # send times by request, oldest first

    def add(self, pool: str, region: str, request: str, now: float) -> None:
        self._at.setdefault((pool, region), {})[request] = now

    def forget(self, pool: str, region: str, request: str) -> None:
        """The request is over: its slot is free, or the next presence shows it."""
        self._at.get((pool, region), {}).pop(request, None)

    def count(self, pool: str, region: str, now: float) -> int:
        sent = self._at.get((pool, region), {})
        while sent and sent[first := next(iter(sent))] <= now - BEAT:
            del sent[first]
        return len(sent)

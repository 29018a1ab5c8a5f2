"""Which worker has the beginning of a conversation in its cache: the same one as before, as far as anybody knows.

Rules:
- The choice is a function of the affinity and of the live workers (rendezvous hashing). So nothing is remembered, shared or
  written, and all gateways agree. If a worker comes or goes, only the conversations that it gets or had move.
- The gateway offers the work to that worker. Only if the worker declines it, or is certainly not there, does the work go
  elsewhere: it never runs twice.
- A busy worker is not asked, and no other one in its place: the pool's queue decides then.
- A worker that leaves an offer unanswered is asked nothing for a while, and its presence does not end that: each such offer
  fails a request.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from typing import Final

from lacre_fabric.work.presence import MAX_NODES

TRIES: Final = 2  # workers: the first may have died since its last presence
# NATS ends a worker's connection for which 64 MiB wait, and all gateway processes together fill it. With these two limits, 64
# processes do not. Longer work is queued.
MAX_UNANSWERED: Final = 4  # offers of one gateway process to one worker
MAX_OFFERED: Final = 256 * 1024  # bytes of one request
# Workers of one pool in one region that are ranked: twice as many as may be connected (`accounts`). With more, a thief of a
# shared credential invents them, and each would cost every request a hash. The queue decides then.
MAX_RANKED: Final = 128
SHUNNED: Final = 30.0  # seconds after an unanswered offer; twice as long after each further one
MAX_SHUNNED: Final = 3600.0  # seconds: as long as an affinity lives


def in_turn(affinity: bytes, free: Mapping[str, int], unanswered: Mapping[str, int] | None = None) -> list[str]:
    """The workers to ask, best first; it ends before the first busy one. free: the free slots of each worker. unanswered: how
    many offers each has to answer.
    """
    if len(free) > MAX_RANKED:
        return []
    asked_now = unanswered or {}

    def rank(node: str) -> bytes:
        return hashlib.sha256(affinity + node.encode()).digest()

    asked: list[str] = []
    for node in sorted(free, key=rank)[:TRIES]:
        if asked_now.get(node, 0) >= min(free[node], MAX_UNANSWERED):
            break
        asked.append(node)
    return asked


class Shunned:
    """The workers that are offered nothing for now, because they left an offer unanswered. clock: in seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._until: dict[tuple[str, str], tuple[float, float]] = {}  # by region and node: the end, and the seconds in all

    def add(self, region: str, node: str) -> None:
        """An offer was unanswered. Offers that were open at the same time count once."""
        now = self._clock()
        until, pause = self._until.get((region, node), (now, SHUNNED / 2))
        if until > now:
            return
        self._until.pop((region, node), None)
        if len(self._until) >= MAX_NODES:
            del self._until[next(iter(self._until))]
        pause = min(2 * pause, MAX_SHUNNED)
        self._until[region, node] = now + pause, pause

    def answered(self, region: str, node: str) -> None:
        """It answered an offer. This ends no pause: some answers do not make up for the others."""
        until, _ = self._until.get((region, node), (0.0, 0.0))
        if until <= self._clock():
            self._until.pop((region, node), None)

    def without(self, region: str, free: Mapping[str, int]) -> dict[str, int]:
        """The workers that may be asked."""
        now = self._clock()
        return {node: slots for node, slots in free.items() if self._until.get((region, node), (now, 0.0))[0] <= now}

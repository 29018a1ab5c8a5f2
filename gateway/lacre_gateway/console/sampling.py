"""Looks at the gateway every few seconds: for its minutes, and for what workers do in a second."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from typing import Final

from lacre_gateway.admin.gauges import Gauges
from lacre_gateway.console.minutes import Minute, MinuteCount, MinuteStore, PoolLoad
from lacre_gateway.gateway import Gateway

EVERY: Final = 10.0  # seconds between two looks; each asks NATS for the queues
_KEPT: Final = 7  # looks: rates are over a minute

Place = tuple[str, str, str]  # pool, region, node


class GatewaySampler:
    """store: gets each minute."""

    def __init__(self, gateway: Gateway, store: MinuteStore) -> None:
        self._gateway = gateway
        self._store = store
        self._gauges = Gauges(gateway)
        self._count = MinuteCount(gateway.metrics.totals, gateway.clock())
        self._looks: deque[tuple[float, dict[Place, int]]] = deque(maxlen=_KEPT)

    async def run(self) -> None:
        while True:
            await self.look()
            await asyncio.sleep(EVERY)

    async def look(self) -> None:
        gateway = self._gateway
        await self._gauges.refresh()
        fabric = gateway.fabric
        seen = {} if fabric is None else fabric.seen()
        self._looks.append((time.monotonic(), {at: worker.generated for at, worker in seen.items()}))
        places = [place for regions in self._gauges.pools().values() for place in regions.values()]
        load = PoolLoad(
            queued=sum(waiting or 0 for _, waiting in places), busy=sum(at.busy for at, _ in places),
            slots=sum(at.busy + at.free for at, _ in places), workers=sum(at.workers for at, _ in places),
        )  # fmt: skip
        minute = self._count.sample(gateway.clock(), load)
        if minute is not None:
            await asyncio.to_thread(self._store.add, minute)

    @property
    def unfinished(self) -> Minute:
        """The present minute so far."""
        return self._count.unfinished()

    def rate(self, at: Place) -> float | None:
        """The tokens in a second that a worker generated, over the last minute; None if it is not known for so long."""
        known = [(when, counts[at]) for when, counts in self._looks if at in counts]
        if len(known) < 2 or known[-1][0] == known[0][0] or known[-1][1] < known[0][1]:
            return None
        return (known[-1][1] - known[0][1]) / (known[-1][0] - known[0][0])

"""Which pools have no queue. Queues are in NATS' memory: a restart of NATS loses them, until the provisioner makes them again.

Rules:
- Only the answer "not found" counts. If NATS does not answer, `Gateway.missing` says so by another name.
- It looks at the queues of the gateway's own region: those that it publishes to first.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Final, Protocol

from lacre.runtime import tasks
from lacre_fabric.logs import Log
from lacre_fabric.work.contract import Backlog, FabricError, NoQueue

LOOK: Final = 2.0  # seconds between looks: one question to NATS for each pool
REMEDY: Final = "run `lacre keys tend` where the state folder is: it recreates queues; with --stay it does so by itself"


class QueueSource(Protocol):
    """Where queues are counted: the fabric."""

    async def backlog(self, pool: str, region: str) -> Backlog:
        """Raises NoQueue or FabricUnavailable."""
        ...


class Queues:
    """lost: the pools without a queue, as of the last look. places: what to look at: pools and the region."""

    def __init__(self, log: Log, fabric: Callable[[], QueueSource], places: Callable[[], Iterable[tuple[str, str]]]) -> None:
        self.lost: frozenset[str] = frozenset()
        self.served = True  # whether any pool has a queue
        self._log = log
        self._fabric = fabric
        self._places = places

    async def look(self) -> None:
        """Raises FabricUnavailable if there is no connection."""
        fabric, places = self._fabric(), list(self._places())
        found = await tasks.together(*(self._is_lost(fabric, *place) for place in places))
        lost = frozenset(pool for (pool, _), gone in zip(places, found, strict=True) if gone)
        for pool in sorted(lost - self.lost):
            self._log.error("queue.missing", pool=pool, remedy=REMEDY)
        for pool in sorted(self.lost - lost):
            self._log.info("queue.found", pool=pool)
        self.lost, self.served = lost, len(lost) < max(1, len(places))

    async def _is_lost(self, fabric: QueueSource, pool: str, region: str) -> bool:
        try:
            await fabric.backlog(pool, region)
        except NoQueue:
            return True
        except FabricError:
            return pool in self.lost
        return False

    async def watch(self) -> None:
        while True:
            with suppress(FabricError):  # `Gateway.missing` says that there is no connection
                await self.look()
            await asyncio.sleep(LOOK)

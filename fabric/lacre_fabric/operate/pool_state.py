"""What the pools are doing now: their live workers, their slots, and the requests in their queues."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

import nats.errors
import nats.js.errors
from nats.aio.msg import Msg

from lacre.errors import InvalidMessage
from lacre_fabric.nats import subjects
from lacre_fabric.nats.connection import Connection
from lacre_fabric.work.contract import PRESENT_FOR
from lacre_fabric.work.presence import MAX_NODES, Presence

_LOOK: Final = 0.1  # seconds between checks of the presence received
_LATE: Final = 1.0  # seconds that a worker's announcement may be late


@dataclass(frozen=True, slots=True)
class LiveWorker:
    """A worker that announced itself. name: its node, after its region if that has a name. busy, free: its slots."""

    name: str
    models: tuple[str, ...]
    busy: int
    free: int


@dataclass(frozen=True, slots=True)
class PoolState:
    """workers: the live ones. queued: requests that no worker has finished taking; None if the pool has no queue."""

    workers: tuple[LiveWorker, ...]
    queued: int | None

    @property
    def busy(self) -> int:
        return sum(worker.busy for worker in self.workers)

    @property
    def free(self) -> int:
        return sum(worker.free for worker in self.workers)

    @property
    def in_use(self) -> str:
        """What would be lost if the pool went now; empty if nothing."""
        found = []
        if self.workers:
            found.append(f"live workers ({', '.join(worker.name for worker in self.workers)})")
        if self.queued:
            found.append(f"queued requests ({self.queued})")
        return " and ".join(found)


class _Heard:
    def __init__(self, pools: Iterable[str]) -> None:
        self._workers: dict[str, dict[str, LiveWorker]] = {pool: {} for pool in pools}

    async def hear(self, message: Msg) -> None:
        try:
            pool, region, node = subjects.parse_presence(message.subject)
            said = Presence.parse(message.data)
        except InvalidMessage:
            return  # no worker of ours: it takes no work either
        known, name = self._workers.get(pool), node if region == subjects.DEFAULT_REGION else f"{region}/{node}"
        if known is not None and (name in known or len(known) < MAX_NODES):
            known[name] = LiveWorker(name, tuple(sorted(said.models)), said.busy, said.free)

    def of(self, pool: str) -> tuple[LiveWorker, ...]:
        return tuple(self._workers[pool][name] for name in sorted(self._workers[pool]))


async def observe(
    connection: Connection, pools: Iterable[str], regions: Sequence[str], seconds: float = PRESENT_FOR - _LATE
) -> Mapping[str, PoolState]:
    """Listens to the pools' workers, each of which announces itself once a second. connection: the provisioner's.

    Raises FabricUnavailable.
    """
    names = tuple(pools)
    heard = _Heard(names)
    async with connection.mapped(confirmed=True):
        listening = [await connection.client.subscribe(subjects.presence(pool, "*", "*"), cb=heard.hear) for pool in names]
    try:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            await asyncio.sleep(_LOOK)
        queued = {pool: await _queued(connection, pool, regions) for pool in names}
    finally:
        for subscription in listening:
            with suppress(nats.errors.Error):  # a lost connection has no subscriptions
                await subscription.unsubscribe()
    return {pool: PoolState(heard.of(pool), queued[pool]) for pool in names}


async def _queued(connection: Connection, pool: str, regions: Sequence[str]) -> int | None:
    """None if a region has no queue."""
    found = 0
    for region in regions:
        async with connection.mapped():
            try:
                stream = await connection.jetstream.stream_info(subjects.work_stream(pool, region))
            except nats.js.errors.NotFoundError:
                return None
        found += stream.state.messages
    return found

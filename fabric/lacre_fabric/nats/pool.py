"""One pool as a gateway process sees it over NATS: a connection of its own, who is there, and the requests under way.

Rules:
- Everything that a pool's workers say comes over this connection: replies and presence. What they say too much of breaks this
  connection, and no other pool's. Nothing else of the gateway's depends on it.
- Messages of core NATS that came while it was broken are gone. Of a request that has begun, a gap tells. One that has not begun
  is looked for in its queue: if it is not there any more, its answer is lost, and that is said at once.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

import structlog

from lacre.errors import InvalidMessage
from lacre.runtime import tasks
from lacre_fabric.nats import subjects
from lacre_fabric.nats.connection import Connection
from lacre_fabric.work import frames
from lacre_fabric.work.contract import BEAT, SETTLE, FabricError, FabricUnavailable, WorkerLost
from lacre_fabric.work.frames import Frame, FrameKind
from lacre_fabric.work.gateway_stream import Inbound
from lacre_fabric.work.presence import Presence, Roster

KEEP: Final = frames.MAX_PAYLOAD + frames.MAX_BLOCK  # bytes of the longest message that a worker has to say
RETRY: Final = 1.0  # seconds until a connection that could not be made is tried again
# Seconds after which a request is lost that is not in its queue and has not begun: a worker that has it says so with a beat.
GRACE: Final = 1.5 * BEAT
MAX_STRAY: Final = 256  # requests that nobody waits for, of which workers are told within `STRAY_EVERY`
STRAY_EVERY: Final = 1.0  # seconds until a worker is told again that nobody waits: a beat comes as often

log = structlog.get_logger("lacre.fabric")

Open = Callable[[], Awaitable[Connection]]
Tell = Callable[[str, bytes], None]
# Which of these sequences are not in the queue of this region any more. Raises FabricError.
Gone = Callable[[str, list[int]], Awaitable[frozenset[int]]]


class _Stray:
    """The requests for which frames came and nobody waits: each is told to its worker once in a while, and not without end."""

    def __init__(self) -> None:
        self._told: set[str] = set()
        self._since = 0.0

    def add(self, request: str) -> bool:
        """Whether the worker is to be told now."""
        now = time.monotonic()
        if now >= self._since + STRAY_EVERY:
            self._told.clear()
            self._since = now
        if request in self._told or len(self._told) >= MAX_STRAY:
            return False
        self._told.add(request)
        return True


@dataclass(frozen=True, slots=True)
class Heard:
    """A sign of presence that can be read."""

    pool: str
    region: str
    node: str
    said: Presence


def read_presence(subject: str, block: bytes, payload: bytes) -> Heard | None:
    """None for what is no worker's sign of presence.

    block: headers. A worker writes none: with some, it is an entry of a bucket, which another node had JetStream send there.
    """
    if block:
        return None
    try:
        return Heard(*subjects.parse_presence(subject), Presence.parse(payload))
    except InvalidMessage:
        return None


@dataclass(slots=True)
class Waiting:
    """A request under way. region: None until it was published. sequence: its message's in the queue; None if no ack came."""

    inbound: Inbound
    connections: int  # of its pool, when it began
    region: str | None = None
    sequence: int | None = None


class PoolSide:
    """open_connection: makes the pool's connection. tell: says a word to a worker. gone: looks into the queues."""

    def __init__(self, pool: str, gateway_id: str, open_connection: Open, tell: Tell, gone: Gone) -> None:
        self.pool = pool
        self.roster = Roster()
        self.waiting: dict[str, Waiting] = {}  # by request
        self.presence_came = asyncio.Event()
        self.settled_at = 0.0  # on the monotonic clock: from then on, silence means that nobody is there
        self._gateway_id = gateway_id
        self._open, self._tell, self._gone = open_connection, tell, gone
        self._stray = _Stray()
        self._connection: Connection | None = None
        self._connections = 0
        self._opening = asyncio.Lock()
        self._soon: asyncio.Task[object] | None = None
        self._closed = False
        self._failed: FabricUnavailable | None = None
        self._not_before = 0.0

    # The connection

    @property
    def tried(self) -> bool:
        """Whether there is a connection, or was one, or should be one."""
        return self._connection is not None or self._failed is not None

    @property
    def connected(self) -> bool:
        return self._connection is not None and self._connection.connected

    async def connect(self) -> None:
        """Makes the connection if there is none. Raises FabricUnavailable where there is none now."""
        if self.connected:
            return
        async with self._opening:
            if self._connection is not None and self._connection.lost:
                await self._connection.close()
                self._connection = None
            if self._connection is None:
                await self._try()
        if not self.connected:
            raise FabricUnavailable(f"the connection for the answers of pool {self.pool} is away")

    def connect_soon(self) -> None:
        """For a pool that was heard of. What fails is tried again with the next sign of presence."""
        gone = self._connection is None or self._connection.lost
        if gone and not self._closed and not self._opening.locked() and time.monotonic() >= self._not_before:
            self._soon = tasks.detach("connection of a pool", self.connect())

    async def _try(self) -> None:
        if self._closed:
            raise FabricUnavailable("the gateway is closing")
        if self._failed is not None and time.monotonic() < self._not_before:
            raise self._failed
        try:
            connection = await self._subscribed()
        except FabricUnavailable as exc:
            self._failed, self._not_before = exc, time.monotonic() + RETRY
            log.warning("fabric.pool_not_connected", pool=self.pool, reason=str(exc))
            raise
        connection.on_reconnect = self._returned
        self._connection, self._failed = connection, None
        self._returned()

    async def _subscribed(self) -> Connection:
        connection = await self._open()
        try:
            async with connection.mapped(confirmed=True):
                # What waits to be read is bounded by `Inbound`, for each request by its credit: that request alone ends.
                await connection.client.subscribe_directly(subjects.replies(self._gateway_id, self.pool), self._on_reply)
                await connection.client.subscribe_directly(subjects.presence(self.pool, "*", "*"), self._on_presence)
        except BaseException:
            await connection.close()
            raise
        return connection

    async def close(self) -> None:
        self._closed = True
        if self._soon is not None:
            await tasks.end(self._soon)
        if self._connection is not None:
            await self._connection.close()

    # What workers say

    def hear(self, region: str, node: str, said: Presence) -> bool:
        """A sign of presence. Whether it was of any use."""
        heard = self.roster.hear(region, node, said)
        self.presence_came.set()
        return heard

    def _on_presence(self, subject: str, block: bytes, payload: bytes) -> bool:
        heard = read_presence(subject, block, payload)
        return heard is not None and self.hear(heard.region, heard.node, heard.said)

    def _on_reply(self, subject: str, block: bytes, payload: bytes) -> bool:
        try:
            _, request_id = subjects.parse_reply(subject)
            frame = Frame.read(block, payload)
        except InvalidMessage:
            return False  # what is no frame says nothing about an attempt; where it stood in for one, a gap tells
        waiting = self.waiting.get(request_id)
        if waiting is None:
            if frame.kind in (FrameKind.DATA, FrameKind.BEAT) and self._stray.add(request_id):
                self._tell(subjects.cancel(self.pool, request_id), b"")  # it runs for nobody
            return False
        inbound = waiting.inbound
        taken = inbound.put(frame)
        if frame.kind is FrameKind.BEAT and (total := inbound.renewal()) is not None:
            self._tell(subjects.credit(self.pool, request_id), str(total).encode())
        return taken

    # Requests

    def add(self, request_id: str, queue_limit: float) -> Waiting:
        waiting = self.waiting[request_id] = Waiting(Inbound(queue_limit), self._connections)
        return waiting

    def placed(self, waiting: Waiting, region: str, sequence: int | None) -> None:
        """It was published."""
        waiting.region, waiting.sequence = region, sequence
        if waiting.connections != self._connections:
            self.look_soon()

    def look_soon(self) -> None:
        """Looks for what has not begun: an answer to it may have been lost."""
        if self.waiting:
            tasks.detach("look for what has not begun", self._look())

    def _returned(self) -> None:
        """With each connection: whoever is there has a while to be heard."""
        self._connections += 1
        self.settled_at = time.monotonic() + SETTLE
        if self._connections > 1:
            log.warning("fabric.pool_reconnected", pool=self.pool)
        self.look_soon()

    async def _look(self) -> None:
        unbegun = [one for one in self.waiting.values() if one.region is not None and not one.inbound.started.is_set()]
        lost = [one for one in unbegun if one.sequence is None]  # whether it was ever there cannot be told
        for region in {one.region for one in unbegun if one.region is not None}:
            here = {one.sequence: one for one in unbegun if one.region == region and one.sequence is not None}
            try:
                lost += [here[sequence] for sequence in await self._gone(region, list(here))]
            except FabricError:
                lost += here.values()
        if lost:
            await asyncio.sleep(GRACE)
        for one in lost:
            if not one.inbound.started.is_set():
                one.inbound.fail(WorkerLost("the connection to NATS broke, and what became of the request is not known"))

"""A gateway process's view of one pool over NATS: its own connection, the live workers and the open requests.

Rules:
- The connection carries everything that the pool's workers send: replies and presence. If they flood it, only this connection
  breaks, and nothing else of the gateway depends on it.
- Core NATS messages are lost while the connection is down. For a request that has begun, a gap in its frames shows the loss.
- A request that has not begun is looked up in its queue. If it is no longer there, its answer is lost, and the request fails at
  once.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

import structlog

from lacre.errors import InvalidMessage, NewerFormat
from lacre.runtime import tasks
from lacre_fabric.nats import subjects
from lacre_fabric.nats.affinity import Shunned
from lacre_fabric.nats.connection import Connection
from lacre_fabric.work import frames
from lacre_fabric.work.contract import BEAT, SETTLE, FabricError, FabricUnavailable, WorkerLost
from lacre_fabric.work.frames import DECLINED, TAKEN, Frame, FrameKind
from lacre_fabric.work.gateway_stream import Inbound
from lacre_fabric.work.presence import Presence, Roster

KEEP: Final = frames.MAX_PAYLOAD + frames.MAX_BLOCK  # bytes of the longest message that a worker may send
RETRY: Final = 1.0  # seconds until a failed connection is retried
# Seconds. A request that is neither in its queue nor begun by then is lost: a worker that has it sends a beat.
GRACE: Final = 1.5 * BEAT
MAX_STRAY: Final = 256  # unknown requests per `STRAY_EVERY` whose workers are told to stop
STRAY_EVERY: Final = 1.0  # seconds until a worker is told again; beats come as often

log = structlog.get_logger("lacre.fabric")

Open = Callable[[], Awaitable[Connection]]
Tell = Callable[[str, bytes], None]
# Which of these sequences are no longer in this region's queue. Raises FabricError.
Gone = Callable[[str, list[int]], Awaitable[frozenset[int]]]


class _Stray:
    """Unknown requests for which frames arrive. Their workers are told to stop, at a bounded rate."""

    def __init__(self) -> None:
        self._told: set[str] = set()
        self._since = 0.0

    def add(self, request: str) -> bool:
        """Whether to tell the worker now."""
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
    """A valid presence message."""

    pool: str
    region: str
    node: str
    said: Presence


def read_presence(subject: str, block: bytes, payload: bytes) -> Heard | None:
    """None if it is not a worker's presence message. Raises NewerFormat.

    block: headers. Workers send none. With headers, it is a bucket entry that another node made JetStream send there.
    """
    if block:
        return None
    try:
        return Heard(*subjects.parse_presence(subject), Presence.parse(payload))
    except NewerFormat:
        raise
    except InvalidMessage:
        return None


@dataclass(slots=True)
class Waiting:
    """An open request. region: None until it is published. sequence: of its message in the queue; None if no ack came, or if a
    worker took it without the queue. offered: gets the answer of the worker that it is offered to now.
    """

    inbound: Inbound
    connections: int  # how often the pool had connected when it began
    region: str | None = None
    sequence: int | None = None
    offered: asyncio.Future[bytes] | None = None

    def answered(self, said: bytes) -> bool:
        """A worker's word about an offer. Returns whether it was of use."""
        if said not in (TAKEN, DECLINED) or self.offered is None:
            return False
        if not self.offered.done():
            self.offered.set_result(said)
        if said == TAKEN:
            self.inbound.hold()
        return True


class PoolSide:
    """A gateway process's state for one pool.

    open_connection: opens the pool's connection. tell: sends an order to a worker. gone: looks into the queues.
    """

    def __init__(self, pool: str, gateway_id: str, open_connection: Open, tell: Tell, gone: Gone) -> None:
        self.pool = pool
        self.roster = Roster()
        self.waiting: dict[str, Waiting] = {}  # by request
        self.presence_came = asyncio.Event()
        self.unanswered: Counter[str] = Counter()  # offers, by worker
        self.shunned = Shunned()
        self.settled_at = 0.0  # on the monotonic clock; silence after this time means that there is no worker
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
        self._newer_told = -1  # the connection whose log has it

    # The connection

    @property
    def tried(self) -> bool:
        """Whether there is or was a connection, or a failed attempt at one."""
        return self._connection is not None or self._failed is not None

    @property
    def connected(self) -> bool:
        return self._connection is not None and self._connection.connected

    async def connect(self) -> None:
        """Opens the connection if there is none. Raises FabricUnavailable if that fails."""
        if self.connected:
            return
        async with self._opening:
            if self._connection is not None and self._connection.lost:
                await self._connection.close()
                self._connection = None
            if self._connection is None:
                await self._try()
        if not self.connected:
            raise FabricUnavailable(f"the connection for the answers of pool {self.pool} is down")

    def connect_soon(self) -> None:
        """Connects in the background to a newly discovered pool. The next presence message retries a failure."""
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
                # `Inbound` bounds the unread bytes by each request's credit, so an overflow ends only that request.
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

    # Messages from workers

    def hear(self, region: str, node: str, said: Presence) -> bool:
        """Records presence. Returns whether it was of use."""
        heard = self.roster.hear(region, node, said)
        self.presence_came.set()
        return heard

    def _on_presence(self, subject: str, block: bytes, payload: bytes) -> bool:
        try:
            heard = read_presence(subject, block, payload)
        except NewerFormat as exc:
            self._tell_newer(exc)
            return False
        return heard is not None and self.hear(heard.region, heard.node, heard.said)

    def _tell_newer(self, newer: NewerFormat) -> None:
        """Once for each connection: a worker sends such messages again and again."""
        if self._newer_told != self._connections:
            self._newer_told = self._connections
            log.error("fabric.newer_worker", pool=self.pool, reason=str(newer))

    def _on_reply(self, subject: str, block: bytes, payload: bytes) -> bool:
        request_id = subject.rpartition(".")[2]  # NATS has compared the rest, which we subscribed to
        waiting = self.waiting.get(request_id)
        try:
            frame = Frame.read(block, payload)
        except NewerFormat as exc:
            self._tell_newer(exc)
            if waiting is not None and not waiting.inbound.started:
                waiting.inbound.fail(WorkerLost(str(exc)))  # else it would wait for its whole queue limit
            return False
        except InvalidMessage:
            return False  # an invalid frame proves nothing about an attempt; if it replaced a valid one, a gap shows it
        if waiting is None:
            self._stop_stray(subject, frame.kind)
            return False
        kind = frame.kind
        if kind is FrameKind.OFFER:
            return waiting.answered(frame.payload)
        inbound = waiting.inbound
        taken = inbound.put(frame)
        if kind is FrameKind.BEAT and (total := inbound.renewal()) is not None:
            self._tell(subjects.credit(self.pool, request_id), str(total).encode())
        return taken

    def _stop_stray(self, subject: str, kind: FrameKind) -> None:
        """Tells the worker of an unknown request to stop: it runs for no caller."""
        try:
            _, request_id = subjects.parse_reply(subject)
        except InvalidMessage:
            return
        if kind in (FrameKind.DATA, FrameKind.BEAT) and self._stray.add(request_id):
            self._tell(subjects.cancel(self.pool, request_id), b"")

    # Requests

    def add(self, request_id: str, queue_limit: float) -> Waiting:
        waiting = self.waiting[request_id] = Waiting(Inbound(queue_limit), self._connections)
        return waiting

    def placed(self, waiting: Waiting, region: str, sequence: int | None) -> None:
        """Records where the request was published."""
        waiting.region, waiting.sequence = region, sequence
        if waiting.connections != self._connections:
            self.look_soon()

    def look_soon(self) -> None:
        """Looks up the requests that have not begun: their answers may have been lost."""
        if self.waiting:
            tasks.detach("look for what has not begun", self._look())

    def _returned(self) -> None:
        """Runs after each connection: workers get `SETTLE` seconds to announce themselves."""
        self._connections += 1
        self.settled_at = time.monotonic() + SETTLE
        if self._connections > 1:
            log.warning("fabric.pool_reconnected", pool=self.pool)
        self.look_soon()

    async def _look(self) -> None:
        unbegun = [one for one in self.waiting.values() if one.region is not None and not one.inbound.started]
        lost = [one for one in unbegun if one.sequence is None]  # no ack came, so it may never have been there
        for region in {one.region for one in unbegun if one.region is not None}:
            here = {one.sequence: one for one in unbegun if one.region == region and one.sequence is not None}
            try:
                lost += [here[sequence] for sequence in await self._gone(region, list(here))]
            except FabricError:
                lost += here.values()
        if lost:
            await asyncio.sleep(GRACE)
        for one in lost:
            if not one.inbound.started:
                one.inbound.fail(WorkerLost("the connection to NATS broke, and the state of the request is unknown"))

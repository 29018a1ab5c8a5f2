"""Names who floods the message servers, and has the servers end the connections that do, by what they say of them (CONNZ).

Rules:
- A connection is cut off, never a user: honest processes may share a credential, and each has connections of its own.
- A connection is cut off when two looks in a row find it over `CUT_MESSAGES` or `CUT_BYTES`. For a minute after that, one
  look is enough for any other connection of this user, and looks follow each other at once.
- So a thief that comes back floods for about a second with each connection. Only a new credential ends that (docs/nats.md).
- Rates are by the server's clock, and those of a new connection count from its start. A watcher that stalls accuses nobody.
- A user is named once a minute while it goes on, however many connections it uses.
- A server that does not cut off is no reason to stop looking: users are named all the same.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final

import structlog
from nats.aio.msg import Msg

from lacre.errors import InvalidMessage, LacreError
from lacre.jose.claims import Members
from lacre.runtime import tasks
from lacre.runtime.json_objects import object_in
from lacre_fabric.nats import subjects
from lacre_fabric.nats.connection import Connection
from lacre_fabric.nats.roles import CONNECTIONS, MAX_SLOTS, Credential
from lacre_fabric.nats.servers import Servers
from lacre_fabric.work.contract import FabricUnavailable

MESSAGES: Final = 20_000  # a second, of one user: 256 streams at 50 tokens a second are 13,000
BYTES: Final = 256 * 2**20  # a second, of one user
# A second, of one connection. The busiest honest one is a worker's: a frame for each token, in every slot. At 200 tokens a
# second in each that is 100,000; a core that seals and frames 200 bytes and does nothing else makes some 30,000. A gateway
# process has some 900 requests a second (docs/scale.md), and some ten messages for each: 9,000, over several connections.
CUT_MESSAGES: Final = 200 * MAX_SLOTS
CUT_BYTES: Final = 2 * BYTES  # a second, of one connection: four gigabits, more than one process seals or relays
LOOKS: Final = 2  # in a row, until a connection is cut off: one may be a burst
LOOK: Final = 2.0  # seconds between looks
AGAIN: Final = 60.0  # seconds until a user is named again, or a server that does not answer is asked again
_LISTEN: Final = 0.5  # seconds in which servers answer
_SHORTEST: Final = 1.0  # seconds: what was sent in less counts as sent in so many, so that a short burst is no flood
# The connections that sent the most, and the newest: a thief that comes back has sent less than those that stayed.
_ASKED: Final = tuple({"auth": True, "sort": by, "limit": 256} for by in ("msgs_from", "bytes_from", "uptime"))
_MAX_ANSWERS: Final = 256 * len(_ASKED)  # of 256 servers
_CUT_LIMIT: Final = 2.0  # seconds for a server to end a connection
_MOST: Final = 2**64  # that a server counts
_MAX_CUTS: Final = 16  # connections in one look, so that looks go on; the others' turn comes with the next one
WATCHED: Final = tasks.Restart("each look learns anew what the connections have sent")
_REMEDY: Final = "unless this is your load, replace the credential, which may be stolen: docs/nats.md, The way back"
_CONFIGURE: Final = "configure what `lacre fabric accounts` prints"

log = structlog.get_logger("lacre.fabric")

At = tuple[str, int]  # a connection: the server's id, and its number there


@dataclass(frozen=True, slots=True)
class Flood:
    """messages: a second."""

    user: str
    messages: int


@dataclass(frozen=True, slots=True)
class ConnectionTraffic:
    """What a connection had sent at a time, in seconds since the epoch by its server's clock. started: when it began."""

    user: str
    time: float
    started: float
    messages: int
    size: int

    @classmethod
    def parse(cls, said: object, at: float) -> ConnectionTraffic:
        """Raises InvalidMessage."""
        one = Members(said, "the connection")
        user = str(said.get("authorized_user", "")) if isinstance(said, Mapping) else ""
        messages, size = (min(one.count(name), _MOST) for name in ("in_msgs", "in_bytes"))
        return cls(user, at, _seconds(one.text("start")), messages, size)

    def since(self, then: ConnectionTraffic | None) -> tuple[float, float]:
        """Messages and bytes a second since `then`, or since the connection began."""
        began = self.started if then is None else then.time
        seconds = max(self.time - began, _SHORTEST)
        messages, size = (0, 0) if then is None else (then.messages, then.size)
        return max(0, self.messages - messages) / seconds, max(0, self.size - size) / seconds


@dataclass(slots=True)
class Rates:
    """What each connection had sent when it was looked at last, and how many looks in a row found it over the limits."""

    before: dict[At, ConnectionTraffic] = field(default_factory=dict)
    over: Counter[At] = field(default_factory=Counter)

    def floods(self, said: Iterable[object]) -> list[Flood]:
        """The users that flood. said: the `data` of each CONNZ."""
        messages: Counter[str] = Counter()
        size: Counter[str] = Counter()
        over: Counter[At] = Counter()
        now = _connections(said)
        for at, sent in now.items():
            rate, volume = sent.since(self.before.get(at))
            messages[sent.user] += round(rate)
            size[sent.user] += round(volume)
            if rate > CUT_MESSAGES or volume > CUT_BYTES:
                over[at] = self.over[at] + 1
        self.before, self.over = now, over
        return [Flood(user, sent) for user, sent in messages.items() if sent > MESSAGES or size[user] > BYTES]

    def to_cut(self, cut_before: frozenset[str]) -> list[At]:
        """The connections to cut off after this look, `_MAX_CUTS` at most. cut_before: users of whom one was, lately."""
        found = [at for at, looks in self.over.items() if looks >= LOOKS or self.before[at].user in cut_before]
        return found[:_MAX_CUTS]


def _connections(said: Iterable[object]) -> dict[At, ConnectionTraffic]:
    """The newest word on each. What is not understood says nothing."""
    found: dict[At, ConnectionTraffic] = {}
    for data in said:
        try:
            one = Members(data, "the server")
            server, at = one.text("server_id"), _seconds(one.text("now"))
        except InvalidMessage:
            continue
        connections = data.get("connections") if isinstance(data, dict) else None
        if not server.isalnum():  # it becomes a part of a subject
            continue
        for each in connections if isinstance(connections, list) else ():
            try:
                key, sent = (server, Members(each, "the connection").count("cid")), ConnectionTraffic.parse(each, at)
            except InvalidMessage:
                continue
            if key not in found or found[key].time <= at:
                found[key] = sent
    return found


def _seconds(stamp: str) -> float:
    """Since the epoch. Raises InvalidMessage."""
    try:
        return datetime.fromisoformat(stamp).timestamp()
    except (ValueError, OverflowError) as exc:
        raise InvalidMessage("the time is none") from exc


def not_watched(reason: str) -> None:
    """Tells the log that nobody looks for floods."""
    log.warning("floods.not_watched", reason=reason, remedy=_CONFIGURE)


async def watch(servers: Servers, warden: Credential, *, look: float = LOOK) -> None:
    """For ever. What cannot be asked is tried again."""
    watcher, told = _Watcher(look), False
    while True:
        try:
            connection = await Connection.open(servers, warden)
            try:
                await watcher.run(connection)
            finally:
                await connection.close()
        except LacreError as exc:
            if not told:
                not_watched(str(exc))
            told = True
            await asyncio.sleep(AGAIN)


class _Watcher:
    """look: seconds between looks."""

    def __init__(self, look: float) -> None:
        self._look = look
        self._named: dict[str, float] = {}  # users, and until when they are not named again
        self._cut: dict[str, float] = {}  # users of whom a connection was cut off, and until when one look is enough
        self._told: dict[str, float] = {}  # users, and until when a cut-off is not logged again
        self._cuts: Counter[str] = Counter()  # connections of each user that were cut off, and are not told of yet
        self._may_cut = 0.0  # from when on a server may be asked again to cut off
        self._said_no = False

    async def run(self, connection: Connection) -> None:
        """Raises FabricError."""
        rates, answers = Rates(), asyncio.Queue[bytes](_MAX_ANSWERS)
        inbox = f"{subjects.inbox(connection.credential.name)}.floods"

        async def hear(message: Msg) -> None:
            if not answers.full():
                answers.put_nowait(message.data)

        async with connection.mapped(confirmed=True):
            await connection.client.subscribe(inbox, cb=hear)
        while True:
            async with connection.mapped(confirmed=True):
                for asked in _ASKED:
                    await connection.client.publish(CONNECTIONS, json.dumps(asked).encode(), reply=inbox)
            await asyncio.sleep(_LISTEN)
            floods = rates.floods([_data(answers.get_nowait()) for _ in range(answers.qsize())])
            self._name(floods)
            await self._cut_off(connection, rates)
            await asyncio.sleep(0.0 if self._cut_lately() else max(0.0, self._look - _LISTEN))

    def _name(self, floods: Sequence[Flood]) -> None:
        now = time.monotonic()
        for flood in floods:
            if now >= self._named.get(flood.user, 0.0):
                self._named[flood.user] = now + AGAIN
                log.error("fabric.flood", role=flood.user, number=flood.messages, remedy=_REMEDY)

    def _cut_lately(self) -> frozenset[str]:
        now = time.monotonic()
        self._cut = {user: until for user, until in self._cut.items() if now < until}
        return frozenset(self._cut)

    async def _cut_off(self, connection: Connection, rates: Rates) -> None:
        for at in rates.to_cut(self._cut_lately()) if time.monotonic() >= self._may_cut else ():
            user, denials = rates.before[at].user, connection.denials
            try:
                await _kick(connection, at)
            except FabricUnavailable as exc:
                if not self._said_no:
                    log.warning("floods.not_cut_off", role=user, reason=str(exc), remedy=_CONFIGURE)
                self._said_no = True
                if connection.denials != denials:  # each try is a line in the logs of both
                    self._may_cut = time.monotonic() + AGAIN
                return
            now = time.monotonic()
            self._cut[user] = now + AGAIN
            self._cuts[user] += 1
            if now >= self._told.get(user, 0.0):
                self._told[user] = now + AGAIN
                log.error("fabric.cut_off", role=user, number=self._cuts.pop(user), remedy=_REMEDY)


async def _kick(connection: Connection, at: At) -> None:
    """Has the server end a connection. One that has gone is fine. Raises FabricUnavailable where the server does not do it."""
    server, number = at
    async with connection.mapped():
        await connection.client.request(subjects.kick(server), json.dumps({"cid": number}).encode(), timeout=_CUT_LIMIT)


def _data(answer: bytes) -> object:
    return (object_in(answer) or {}).get("data")

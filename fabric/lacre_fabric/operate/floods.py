"""Finds clients that flood the NATS servers, and makes the servers close their connections. Uses the servers' CONNZ.

Rules:
- Connections are closed, not users: honest processes may share a credential, but each has its own connections.
- A connection is closed when two checks in a row find it over `CUT_MESSAGES` or `CUT_BYTES`. For a minute after that, one check
  suffices for this user's other connections, and checks follow each other at once.
- So an attacker who reconnects floods for about a second with each connection. Only a new credential ends that (docs/nats.md).
- Rates use the server's clock, and a new connection's rate counts from its start. So a watcher that stalls accuses no one.
- A flooding user is logged once a minute, however many connections it uses.
- If a server does not close connections, the checks continue and users are still logged.
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

MESSAGES: Final = 20_000  # per second and user: 256 streams at 50 tokens a second are 13,000
BYTES: Final = 256 * 2**20  # per second and user
# Per second and connection. The busiest honest one is a worker's: one frame per token in every slot. At 200 tokens a second per
# slot that is 100,000. A core that only seals and frames 200 bytes manages about 30,000. A gateway process handles about 900
# requests a second (docs/scale.md) with about ten messages each: 9,000, over several connections.
CUT_MESSAGES: Final = 200 * MAX_SLOTS
CUT_BYTES: Final = 2 * BYTES  # per second and connection: four gigabits, more than one process seals or relays
LOOKS: Final = 2  # in a row until a connection is closed: a single one may be a burst
LOOK: Final = 2.0  # seconds between checks
AGAIN: Final = 60.0  # seconds until a user is logged again, or a server that refused is asked again
_LISTEN: Final = 0.5  # seconds in which servers answer
_SHORTEST: Final = 1.0  # seconds: a shorter interval counts as this long, so that a short burst is no flood
# The connections that sent the most, and the newest ones: an attacker who reconnects has sent less than older connections.
_ASKED: Final = tuple({"auth": True, "sort": by, "limit": 256} for by in ("msgs_from", "bytes_from", "uptime"))
_MAX_ANSWERS: Final = 256 * len(_ASKED)  # of 256 servers
_CUT_LIMIT: Final = 2.0  # seconds for a server to close a connection
_MOST: Final = 2**64  # the highest count that a server reports
_MAX_CUTS: Final = 16  # connections per check, so that checks continue; the others follow in the next check
WATCHED: Final = tasks.Restart("each check reads all counts again")
_REMEDY: Final = "unless this is your own load, replace the credential: it may be stolen (docs/nats.md, The way back)"
_CONFIGURE: Final = "configure the output of `lacre fabric accounts`"

log = structlog.get_logger("lacre.fabric")

At = tuple[str, int]  # a connection: the server's id, and the connection's number there


@dataclass(frozen=True, slots=True)
class Flood:
    """A user that sends too much. messages: per second."""

    user: str
    messages: int


@dataclass(frozen=True, slots=True)
class ConnectionTraffic:
    """A connection's counts at one time, in seconds since the epoch on its server's clock. started: when it began."""

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
        """Messages and bytes per second since `then`, or since the connection began."""
        began = self.started if then is None else then.time
        seconds = max(self.time - began, _SHORTEST)
        messages, size = (0, 0) if then is None else (then.messages, then.size)
        return max(0, self.messages - messages) / seconds, max(0, self.size - size) / seconds


@dataclass(slots=True)
class Rates:
    """Each connection's last counts, and how many checks in a row found it over the limits."""

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
        """The connections to close after this check, at most `_MAX_CUTS`. cut_before: users with a recently closed
        connection.
        """
        found = [at for at, looks in self.over.items() if looks >= LOOKS or self.before[at].user in cut_before]
        return found[:_MAX_CUTS]


def _connections(said: Iterable[object]) -> dict[At, ConnectionTraffic]:
    """The newest counts of each connection. Malformed entries are skipped."""
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
    """Seconds since the epoch. Raises InvalidMessage."""
    try:
        return datetime.fromisoformat(stamp).timestamp()
    except (ValueError, OverflowError) as exc:
        raise InvalidMessage("the time is invalid") from exc


def not_watched(reason: str) -> None:
    """Logs that floods are not watched."""
    log.warning("floods.not_watched", reason=reason, remedy=_CONFIGURE)


async def watch(servers: Servers, warden: Credential, *, look: float = LOOK) -> None:
    """Runs forever. A server that cannot be asked is tried again."""
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
    """Checks the servers at intervals, logs floods and closes connections. look: seconds between checks."""

    def __init__(self, look: float) -> None:
        self._look = look
        self._named: dict[str, float] = {}  # users, and until when they are not logged again
        self._cut: dict[str, float] = {}  # users with a closed connection, and until when one check suffices
        self._told: dict[str, float] = {}  # users, and until when a closed connection is not logged again
        self._cuts: Counter[str] = Counter()  # closed connections of each user that are not logged yet
        self._may_cut = 0.0  # when a server may be asked again to close connections
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
                if connection.denials != denials:  # each try adds a line to both logs
                    self._may_cut = time.monotonic() + AGAIN
                return
            now = time.monotonic()
            self._cut[user] = now + AGAIN
            self._cuts[user] += 1
            if now >= self._told.get(user, 0.0):
                self._told[user] = now + AGAIN
                log.error("fabric.cut_off", role=user, number=self._cuts.pop(user), remedy=_REMEDY)


async def _kick(connection: Connection, at: At) -> None:
    """Makes the server close a connection; it may be gone already. Raises FabricUnavailable if the server refuses."""
    server, number = at
    async with connection.mapped():
        await connection.client.request(subjects.kick(server), json.dumps({"cid": number}).encode(), timeout=_CUT_LIMIT)


def _data(answer: bytes) -> object:
    return (object_in(answer) or {}).get("data")

"""Names who floods the message servers, by what they say of their connections (CONNZ).

Rules:
- It names, and cuts nobody off: a credential is shared by honest processes too, and only its owner can tell them from a thief.
  What a flood may cost others is bounded elsewhere (`accounts`, `layout`, `nats_pool`).
- A user is named once a minute while it goes on, however many connections it uses.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

import structlog
from nats.aio.msg import Msg

from lacre import tasks
from lacre.errors import LacreError
from lacre_fabric import subjects
from lacre_fabric.connection import Connection
from lacre_fabric.endpoints import Servers
from lacre_fabric.roles import CONNECTIONS, Credential

MESSAGES: Final = 20_000  # a second, of one user: 256 streams at 50 tokens a second are 13,000
BYTES: Final = 256 * 2**20  # a second, of one user
LOOK: Final = 2.0  # seconds between looks
AGAIN: Final = 60.0  # seconds until a user is named again, or a server that does not answer is asked again
_LISTEN: Final = 0.5  # seconds in which servers answer
_ASKED: Final = {"auth": True, "sort": "msgs_from", "limit": 256}  # the connections that sent the most
_MAX_ANSWERS: Final = 256  # servers
WATCHED: Final = tasks.Restart("each look learns anew what the connections have sent")
_REMEDY: Final = "unless this is your load, replace the credential, which may be stolen: docs/nats.md, The way back"

log = structlog.get_logger("lacre.fabric")


@dataclass(frozen=True, slots=True)
class Flood:
    """messages: a second."""

    user: str
    messages: int


@dataclass(slots=True)
class Rates:
    """What each connection had sent when it was looked at last, by server and connection: messages and bytes."""

    before: dict[tuple[str, int], tuple[int, int]] = field(default_factory=dict)
    began: bool = False

    def floods(self, said: Iterable[object], seconds: float) -> list[Flood]:
        """said: the `data` of each server's CONNZ. seconds: since the last look. The first one only learns."""
        messages: Counter[str] = Counter()
        size: Counter[str] = Counter()
        now: dict[tuple[str, int], tuple[int, int]] = {}
        for server, one in _connections(said):
            user, at = str(one.get("authorized_user", "")), (server, _count(one.get("cid")))
            now[at] = _count(one.get("in_msgs")), _count(one.get("in_bytes"))
            then = self.before.get(at, (0, 0))
            messages[user] += max(0, now[at][0] - then[0])
            size[user] += max(0, now[at][1] - then[1])
        learns, self.before, self.began = not self.began, now, True
        if learns:
            return []
        return [
            Flood(user, round(sent / seconds))
            for user, sent in messages.items()
            if sent > MESSAGES * seconds or size[user] > BYTES * seconds
        ]


def _connections(said: Iterable[object]) -> Iterable[tuple[str, Mapping[str, object]]]:
    for data in said:
        if isinstance(data, dict) and isinstance(data.get("connections"), list):
            yield from ((str(data.get("server_id")), one) for one in data["connections"] if isinstance(one, dict))


def _count(value: object) -> int:
    return value if isinstance(value, int) else 0


async def watch(servers: Servers, inspector: Credential, *, look: float = LOOK) -> None:
    """For ever. What cannot be asked is tried again."""
    named: dict[str, float] = {}
    told = False
    while True:
        try:
            connection = await Connection.open(servers, inspector)
            try:
                await _watch(connection, named, look)
            finally:
                await connection.close()
        except LacreError as exc:
            if not told:
                log.warning("floods.not_watched", reason=str(exc), remedy="configure what `lacre fabric accounts` prints")
            told = True
            await asyncio.sleep(AGAIN)


async def _watch(connection: Connection, named: dict[str, float], look: float) -> None:
    """Raises FabricError."""
    rates, answers = Rates(), asyncio.Queue[bytes](_MAX_ANSWERS)
    inbox = f"{subjects.inbox(connection.credential.name)}.floods"

    async def hear(message: Msg) -> None:
        if not answers.full():
            answers.put_nowait(message.data)

    async with connection.mapped(confirmed=True):
        await connection.client.subscribe(inbox, cb=hear)
    at = time.monotonic()
    while True:
        async with connection.mapped(confirmed=True):
            await connection.client.publish(CONNECTIONS, json.dumps(_ASKED).encode(), reply=inbox)
        await asyncio.sleep(_LISTEN)
        now = time.monotonic()
        said = [_data(answers.get_nowait()) for _ in range(answers.qsize())]
        for flood in rates.floods(said, max(now - at, _LISTEN)):
            if now >= named.get(flood.user, 0.0):
                named[flood.user] = now + AGAIN
                log.error("fabric.flood", role=flood.user, number=flood.messages, remedy=_REMEDY)
        at = now
        await asyncio.sleep(max(0.0, look - _LISTEN))


def _data(answer: bytes) -> object:
    try:
        said = json.loads(answer)
    except (ValueError, RecursionError):
        return None
    return said.get("data") if isinstance(said, dict) else None

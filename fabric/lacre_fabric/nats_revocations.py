"""The bucket of revocations: every gateway looks into it, several times a second.

Rules:
- Entries are only ever added: a gateway's credential can neither change nor remove one, nor its own. An entry goes by itself,
  when the last token that it is about has expired.
- A reader goes by the sequence of the stream, and looks again at the last entry that it has seen. Where that is another one,
  or none, the bucket may not be what it was: it is read from its beginning.
"""

from __future__ import annotations

import asyncio
import math
import time
from dataclasses import dataclass
from typing import Any, Final

import nats.js.errors
import structlog
from nats.js.api import DiscardPolicy, Header, StorageType, StreamConfig

from lacre.errors import InvalidMessage
from lacre_fabric import subjects
from lacre_fabric.connection import API_TIMEOUT, Connection
from lacre_fabric.revocations import Revocation
from lacre_fabric.work import FabricUnavailable

MAX_REVOCATIONS: Final = 100_000  # in the bucket: some 30 MB of it, and as much in each gateway
_WALKS: Final = 16  # reads under way at once: each entry takes a round trip
_EVERY: Final = subjects.revocation("*")
_NO_BUCKET: Final = "NATS has no bucket of revocations: run `lacre up`, or `lacre manifest publish`"
_NO_STREAM: Final = 10059  # JSStreamNotFoundErr
_STORE_FAILED: Final = 10077  # JSStreamStoreFailedF: the bucket's bounds, with `discard: new`
_FULL: Final = f"there are {MAX_REVOCATIONS} revocations already, and no room for more: revoke subjects, not single tokens"

log = structlog.get_logger("lacre.revocations")


def bucket(replicas: int) -> StreamConfig:
    """The bucket, as a stream: it keeps every entry, on disk, until the entry's own time is over."""
    return StreamConfig(
        name=subjects.REVOCATIONS_STREAM,
        subjects=[subjects.revocation("*")],
        max_msgs=MAX_REVOCATIONS,
        max_msg_size=1024,
        discard=DiscardPolicy.NEW,  # when full it says so, and forgets nothing
        storage=StorageType.FILE,
        num_replicas=replicas,
        allow_msg_ttl=True,
        deny_delete=True,
        deny_purge=True,
    )


async def revoke(connection: Connection, revocation: Revocation) -> None:
    """When this returns it is on disk, and every gateway has it with its next look. Raises FabricUnavailable."""
    subject, lives = subjects.revocation(revocation.key), math.ceil(revocation.until - time.time())
    async with connection.mapped():
        try:
            headers = {Header.MSG_TTL.value: str(max(1, lives))}
            await connection.jetstream.publish(subject, revocation.encode(), headers=headers, timeout=API_TIMEOUT)
        except nats.js.errors.NoStreamResponseError as exc:
            raise FabricUnavailable(_NO_BUCKET) from exc
        except nats.js.errors.APIError as exc:
            if exc.err_code == _STORE_FAILED:
                raise FabricUnavailable(_FULL) from exc
            raise


@dataclass(frozen=True, slots=True)
class _Entry:
    """What stands in the stream, and where. stamp: when it was stored, as the server says."""

    sequence: int
    stamp: str
    subject: str
    value: bytes

    def revocation(self) -> Revocation | None:
        """None for what is no revocation."""
        try:
            return Revocation.parse(self.subject.rpartition(".")[2], self.value)
        except InvalidMessage:
            log.error("revocation.unreadable")
            return None


class Reader:
    """Reads the bucket over one connection."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._last: _Entry | None = None

    async def read(self) -> list[Revocation]:
        """Those that were not read before; some may come again. Raises FabricUnavailable."""
        async with self._connection.mapped():
            newest = await self._get(subject=_EVERY)
            if newest is None or newest == self._last:
                self._last = newest
                return []
            since = 0 if self._last is None else self._last.sequence
            if since and await self._get(seq=since) != self._last:
                since = 0
            found = await self._between(since, newest.sequence)
        self._last = newest
        return [revocation for entry in found if (revocation := entry.revocation()) is not None]

    async def _between(self, since: int, until: int) -> list[_Entry]:
        """What stands after `since` up to `until`, in order: asked for at several places at once."""
        first = await self._get(seq=since + 1, subject=_EVERY, next=True)
        if first is None:
            return []
        step = max(1, -(-(until + 1 - first.sequence) // _WALKS))
        begins = range(first.sequence, until + 1, step)
        walks = await asyncio.gather(*(self._walk(begin, min(begin + step, until + 1)) for begin in begins))
        return [entry for walk in walks for entry in walk]

    async def _walk(self, begin: int, end: int) -> list[_Entry]:
        found: list[_Entry] = []
        while begin < end and (entry := await self._get(seq=begin, subject=_EVERY, next=True)) and entry.sequence < end:
            found.append(entry)
            begin = entry.sequence + 1
        return found

    async def _get(self, **asked: Any) -> _Entry | None:
        """By JetStream's own API, which answers in JSON. What a direct get answers is the entry itself, headers and all, and

        who asks can have it sent to another gateway, as if a worker had.
        """
        try:
            message = await self._connection.jetstream.get_msg(subjects.REVOCATIONS_STREAM, **asked)
        except nats.js.errors.NotFoundError as exc:
            if exc.err_code == _NO_STREAM:
                raise FabricUnavailable(_NO_BUCKET) from exc
            return None
        return _Entry(message.seq or 0, str(message.time), message.subject or "", message.data or b"")

"""The bucket of revocations. Every gateway reads it several times a second.

Rules:
- Entries are only added. A gateway's credential can neither change nor remove any, not even its own. An entry expires when the
  last token that it covers has expired.
- An entry's subject names the credential that wrote it. Each credential has a share of the bucket, so a stolen one cannot use
  up the others'. The provisioner's share is the reserve, for when a gateway's is full.
- A reader continues from the last sequence that it read, after checking that this entry is unchanged. If it differs or is
  missing, the bucket may have been replaced: the reader starts from the beginning.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from typing import Final

import nats.js.errors
import structlog
from nats.js.api import DiscardPolicy, Header, StorageType, StreamConfig

from lacre.errors import InvalidMessage
from lacre.runtime import tasks
from lacre_fabric.nats import subjects
from lacre_fabric.nats.connection import API_TIMEOUT, STORE_FAILED, TOO_MANY_REQUESTS, Connection, Stored
from lacre_fabric.work.contract import FabricUnavailable
from lacre_fabric.work.revocations import Revocation, StoreMark

SHARE: Final = 10_000  # revocations of one credential at a time
MAX_REVOCATIONS: Final = 20 * SHARE  # in the bucket: about 70 MB there and in each gateway
_LARGEST: Final = 1024  # bytes of one entry, with its headers
MAX_BYTES: Final = 256 * 2**20  # of the bucket: more than `MAX_REVOCATIONS` of the largest entries with NATS's overhead
_WALKS: Final = 16  # concurrent reads: each entry takes a round trip
_EVERY: Final = subjects.revocation("*")
_NO_BUCKET: Final = "NATS has no bucket of revocations: run `lacre up`, or `lacre manifest publish`"
_NO_STREAM: Final = 10059  # JSStreamNotFoundErr
_BUSY_LIMIT: Final = 10.0  # seconds to retry: a flood by one connection is cut off sooner
_BUSY_PAUSE: Final = 0.1  # seconds between tries
_FULL: Final = (
    "{name} has used its share of {share} revocations. Run `lacre revoke --state DIR` where the state "
    "folder is: it has a share of its own. If you made fewer, replace the credential, which may be stolen (docs/nats.md)"
)

log = structlog.get_logger("lacre.revocations")


class RevocationsFull(FabricUnavailable):
    """The credential's share of the bucket is full."""


def bucket(replicas: int) -> StreamConfig:
    """The bucket as a stream. It keeps every entry on disk until the entry expires."""
    return StreamConfig(
        name=subjects.REVOCATIONS_STREAM,
        subjects=[subjects.revocation("*")],
        max_msgs=MAX_REVOCATIONS,
        max_bytes=MAX_BYTES,
        max_msg_size=_LARGEST,
        max_msgs_per_subject=SHARE,
        discard_new_per_subject=True,
        discard=DiscardPolicy.NEW,  # when full it refuses, and deletes nothing
        storage=StorageType.FILE,
        num_replicas=replicas,
        allow_msg_ttl=True,
        deny_delete=True,
        deny_purge=True,
    )


async def revoke(connection: Connection, revocation: Revocation) -> None:
    """Adds a revocation under the connection's credential. When this returns it is on disk, and gateways see it at their next
    read.

    Retries while NATS has too many writes waiting. Raises RevocationsFull or FabricUnavailable.
    """
    deadline = time.monotonic() + _BUSY_LIMIT
    while not await _put(connection, revocation, last=time.monotonic() >= deadline):
        await asyncio.sleep(_BUSY_PAUSE)


async def _put(connection: Connection, revocation: Revocation, *, last: bool) -> bool:
    """False if NATS was too busy to take it. last: raise in that case too."""
    name = connection.credential.name
    subject, lives = subjects.revocation(name), math.ceil(revocation.until - time.time())
    async with connection.mapped():
        try:
            headers = {Header.MSG_TTL.value: str(max(1, lives))}
            await connection.jetstream.publish(subject, revocation.encode(), headers=headers, timeout=API_TIMEOUT)
        except nats.js.errors.NoStreamResponseError as exc:
            raise FabricUnavailable(_NO_BUCKET) from exc
        except nats.js.errors.APIError as exc:
            if exc.err_code == STORE_FAILED:
                raise RevocationsFull(_FULL.format(name=name, share=SHARE)) from exc
            if exc.err_code == TOO_MANY_REQUESTS and not last:
                return False
            raise
    return True


class RevocationReader:
    """Reads the bucket over one connection."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._last: Stored | None = None
        self.mark = StoreMark()  # as of the last read

    async def read(self) -> list[Revocation]:
        """Entries that were not read before; some may repeat. Raises FabricUnavailable."""
        async with self._connection.mapped():
            newest = await self._get(last_by_subj=_EVERY)
            if newest is None:
                self._last, self.mark = None, StoreMark()
                return []
            if newest == self._last:
                return []
            since = 0 if self._last is None else self._last.sequence
            if since and await self._get(seq=since) != self._last:
                since = 0
            found = await self._between(since, newest.sequence)
        self._last = newest
        marks = [entry for entry in found if entry.subject == subjects.store_mark()]
        if marks or not since:
            self.mark = _mark(marks[-1]) if marks else StoreMark()
        found = [entry for entry in found if entry.subject != subjects.store_mark()]
        read = [(_writer(entry), _revocation(entry)) for entry in found]
        for writer, number in Counter(writer for writer, revocation in read if revocation is None).items():
            log.error("revocation.unreadable", role=writer, number=number)  # one line, however many a stolen credential wrote
        return [revocation for _, revocation in read if revocation is not None]

    async def _between(self, since: int, until: int) -> list[Stored]:
        """The entries after `since` up to `until`, in order. Reads several ranges at once."""
        first = await self._get(seq=since + 1, next_by_subj=_EVERY)
        if first is None:
            return []
        step = max(1, -(-(until + 1 - first.sequence) // _WALKS))
        begins = range(first.sequence, until + 1, step)
        walks = await tasks.together(*(self._walk(begin, min(begin + step, until + 1)) for begin in begins))
        return [entry for walk in walks for entry in walk]

    async def _walk(self, begin: int, end: int) -> list[Stored]:
        found: list[Stored] = []
        while begin < end and (entry := await self._get(seq=begin, next_by_subj=_EVERY)) and entry.sequence < end:
            found.append(entry)
            begin = entry.sequence + 1
        return found

    async def _get(self, **asked: int | str) -> Stored | None:
        """Reads through JetStream's own API, which answers in JSON.

        A direct get returns the entry itself, headers included. A caller could have it sent to another gateway as if a worker
        had sent it.
        """
        try:
            return await self._connection.stored(subjects.REVOCATIONS_STREAM, asked)
        except nats.js.errors.NotFoundError as exc:
            if exc.err_code == _NO_STREAM:
                raise FabricUnavailable(_NO_BUCKET) from exc
            return None


def _mark(entry: Stored) -> StoreMark:
    """A mark that cannot be read counts as a loss: only the provisioner writes it, perhaps of a newer version."""
    try:
        return StoreMark.parse(entry.value)
    except InvalidMessage:
        return StoreMark(("unknown",))


def _revocation(entry: Stored) -> Revocation | None:
    """None if it is not a valid revocation."""
    try:
        return Revocation.parse(entry.value, _writer(entry))
    except InvalidMessage:
        return None


def _writer(entry: Stored) -> str:
    """The name of the credential that wrote it."""
    return entry.subject.rpartition(".")[2]

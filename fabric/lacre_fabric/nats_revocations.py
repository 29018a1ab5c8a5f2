"""The bucket of revocations: every gateway looks into it, several times a second.

Rules:
- Entries are only ever added: a gateway's credential can neither change nor remove one, nor its own. An entry goes by itself,
  when the last token that it is about has expired.
- A reader goes by the sequence of the stream, and asks each time for the last entry that it has seen too. Where that is another
  one, or none, the bucket is not what it was: it is read from its beginning.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass
from typing import Final, Self

import nats.js.errors
import structlog
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.js.api import DiscardPolicy, Header, StorageType, StreamConfig

from lacre.errors import InvalidMessage
from lacre_fabric import subjects
from lacre_fabric.connection import API_TIMEOUT, Connection, headers_of
from lacre_fabric.revocations import Revocation
from lacre_fabric.work import FabricUnavailable

MAX_REVOCATIONS: Final = 100_000  # in the bucket: some 30 MB of it, and as much in each gateway
_BATCH: Final = 500  # entries of one answer
_NO_BUCKET: Final = "NATS has no bucket of revocations: run `lacre up`, or `lacre manifest publish`"
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
        allow_direct=True,
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
    """Where an entry stands in the stream. stamp: when it was stored, as the server says."""

    sequence: int
    key: str
    stamp: str

    @classmethod
    def parse(cls, message: Msg) -> Self:
        """Raises FabricUnavailable."""
        headers = headers_of(message)
        try:
            return cls(int(headers["Nats-Sequence"]), headers["Nats-Subject"].rpartition(".")[2], headers["Nats-Time-Stamp"])
        except (KeyError, ValueError) as exc:
            raise FabricUnavailable(f"NATS gave no revocation ({headers.get('Status', 'no status')})") from exc


class Reader:
    """Reads the bucket over one connection."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._last: _Entry | None = None
        self._reconnects = 0

    async def read(self) -> list[Revocation]:
        """Those that were not read before; some may come again. Raises FabricUnavailable."""
        reconnects = int(self._connection.client.stats["reconnects"])
        if reconnects != self._reconnects:  # the server may have lost its disk
            self._reconnects, self._last = reconnects, None
        found = await self._entries(1 if self._last is None else self._last.sequence)
        if self._last is not None and (not found or _replaced(self._last, found[0][0])):
            self._last = None
            found = await self._entries(1)
        revocations = [revocation for entry, revocation in found if entry != self._last and revocation is not None]
        self._last = found[-1][0] if found else None
        return revocations

    async def _entries(self, sequence: int) -> list[tuple[_Entry, Revocation | None]]:
        """What stands at this sequence and after it, in order; None for what is no revocation."""
        found: list[tuple[_Entry, Revocation | None]] = []
        async with self._connection.mapped():
            inbox = self._connection.client.new_inbox()
            answers = await self._connection.client.subscribe(inbox)
            try:
                more = True
                while more:
                    asked = {"seq": found[-1][0].sequence + 1 if found else sequence, "next_by_subj": subjects.revocation("*")}
                    batch = json.dumps({**asked, "batch": _BATCH}).encode()
                    await self._connection.client.publish(subjects.READ_REVOCATIONS, batch, reply=inbox)
                    more = await _take(answers, found)
            finally:
                await answers.unsubscribe()
        return found


async def _take(answers: Subscription, found: list[tuple[_Entry, Revocation | None]]) -> bool:
    """Adds one batch; whether there is more. Raises FabricUnavailable and the library's errors."""
    while True:
        message = await answers.next_msg(timeout=API_TIMEOUT)
        headers = headers_of(message)
        status = headers.get("Status")
        if status == "204":  # the end of a batch
            return headers.get("Nats-Num-Pending") != "0"
        if status == "404":
            return False
        if status == "503":
            raise FabricUnavailable(_NO_BUCKET)
        entry = _Entry.parse(message)
        found.append((entry, _readable(entry, message.data)))


def _readable(entry: _Entry, value: bytes) -> Revocation | None:
    try:
        return Revocation.parse(entry.key, value)
    except InvalidMessage:
        log.error("revocation.unreadable", key=entry.key)
        return None


def _replaced(last: _Entry, first: _Entry) -> bool:
    return first.sequence == last.sequence and first != last

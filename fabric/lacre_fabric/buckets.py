"""A bucket that several processes share: values by key, each change a compare-and-set. Over NATS, and in memory for tests.

Rules:
- A write names the revision that it was decided on. `Conflict` is the server's word that the write did not happen.
- Any other failure of a write says nothing: it may have happened, or may still happen, for as long as the key has the revision
  that it named. Nothing is written again by itself.
- Times are the server's: processes whose clocks differ agree on them.
- Entries are read by JetStream's own API, which answers in JSON, from the stream's leader. What a direct get answers is the
  entry itself, headers and all, from any replica: who asks could have it sent to another process as what it is not.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol

import nats.js.errors
from nats.js.api import Header

from lacre_fabric.connection import Connection
from lacre_fabric.work import FabricError, FabricUnavailable

# JSStreamWrongLastSequenceErrF and its constant sister: the compare failed, so nothing was set.
CONFLICTS: Final = frozenset({10071, 10164})


class Conflict(FabricError):
    """The key has another revision by now: the write did not happen. Read again."""


@dataclass(frozen=True, slots=True)
class Entry:
    """revision: to be named by the write that replaces it. time: when the server took it, seconds since the epoch."""

    value: bytes
    revision: int
    time: float


class Bucket(Protocol):
    async def read(self, key: str) -> Entry | None:
        """None where nothing was ever written. Raises FabricUnavailable."""

    async def write(self, key: str, value: bytes, revision: int) -> int:
        """Replaces the entry of `revision`, 0 for none, and returns the new revision.

        Raises Conflict, or FabricUnavailable: then it may have happened all the same.
        """


class NatsBucket:
    """A `Bucket` of the KV bucket `name`; keys are subjects' tokens, with dots between them."""

    def __init__(self, connection: Connection, name: str) -> None:
        self._connection = connection
        self._stream = f"KV_{name}"
        self._subject = f"$KV.{name}"

    async def read(self, key: str) -> Entry | None:
        self._check_connected()
        async with self._connection.mapped():
            try:
                found = await self._connection.stored(self._stream, last_by_subj=f"{self._subject}.{key}")
            except nats.js.errors.NotFoundError:
                return None
        return Entry(found.value, found.sequence, found.time)

    async def write(self, key: str, value: bytes, revision: int) -> int:
        self._check_connected()
        async with self._connection.mapped():
            try:
                headers = {Header.EXPECTED_LAST_SUBJECT_SEQUENCE.value: str(revision)}
                ack = await self._connection.jetstream.publish(f"{self._subject}.{key}", value, headers=headers)
            except nats.js.errors.APIError as exc:
                if exc.err_code in CONFLICTS:
                    raise Conflict("the key was changed meanwhile") from exc
                raise
        return ack.seq

    def _check_connected(self) -> None:
        """The client would keep a message back until it is connected again, long after its caller gave up."""
        if not self._connection.connected:
            raise FabricUnavailable("not connected to NATS")


async def dump(connection: Connection, name: str) -> dict[str, Entry]:
    """Everything in a bucket, by key. Needs the provisioner's rights. Raises FabricUnavailable.

    Its keys are the leader's word: a watch may be with a replica that is behind, and tells of no keys then, and of no error.
    """
    bucket, prefix = NatsBucket(connection, name), f"$KV.{name}."
    async with connection.mapped():
        try:
            found = await connection.jetstream.stream_info(f"KV_{name}", subjects_filter=f"{prefix}>")
        except nats.js.errors.NotFoundError as exc:
            raise FabricUnavailable(f"there is no bucket {name}: `lacre up` or `lacre manifest publish` makes it") from exc
    keys = sorted(subject.removeprefix(prefix) for subject in found.state.subjects or ())
    entries = {key: await bucket.read(key) for key in keys}
    return {key: entry for key, entry in entries.items() if entry is not None}


class MemoryBucket:
    """A `Bucket` inside one process."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self.entries: dict[str, Entry] = {}
        self._clock = clock
        self._revision = 0

    async def read(self, key: str) -> Entry | None:
        await asyncio.sleep(0)
        return self.entries.get(key)

    async def write(self, key: str, value: bytes, revision: int) -> int:
        await asyncio.sleep(0)
        current = self.entries.get(key)
        if revision != (0 if current is None else current.revision):
            raise Conflict("the key was changed meanwhile")
        self._revision += 1
        self.entries[key] = Entry(value, self._revision, self._clock())
        return self._revision

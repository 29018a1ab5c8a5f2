"""A bucket that several processes share: values by key; each change is a compare-and-set. Over NATS, and in memory for tests.

Rules:
- Over NATS each credential owns one part of every key, and only it can write that part. NATS enforces this by subject. A
  compare-and-set covers all parts of a key, so a stolen credential changes only its own part.
- A write names the revision that it is based on. `Conflict` means that the server did not write.
- After any other failure the result is unknown. The write may have happened, or may still happen while the key has that
  revision. No write is repeated automatically.
- Times are the server's, so that processes with different clocks agree.
- Entries are read through JetStream's own API, which answers in JSON from the stream's leader. A direct get returns the entry
  itself, headers included, from any replica. A caller could have it sent to another process, which would take it for something
  else.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Final, Protocol

import nats.js.errors
from nats.js.api import Header

from lacre_fabric.nats.connection import Connection, Stored
from lacre_fabric.work.contract import FabricError, FabricUnavailable

# JSStreamWrongLastSequenceErrF and its constant variant: the comparison failed and nothing was written.
CONFLICTS: Final = frozenset({10071, 10164})

_COMPARED: Final = "Nats-Expected-Last-Subject-Sequence-Subject"  # the subjects whose newest revision is compared
ANSWER: Final = 1.0  # seconds: three tries fit into the time that a caller waits for a budget
_MAX_KNOWN: Final = 4096  # keys whose parts are cached


class Conflict(FabricError):
    """The key has a newer revision, so nothing was written. Read it again."""


@dataclass(frozen=True, slots=True)
class Entry:
    """The state of a key. value: this credential's part; may be empty. others: the other credentials' parts.

    revision: for the write that replaces it. time: of the newest write, in seconds since the epoch.
    """

    value: bytes
    revision: int
    time: float
    others: tuple[bytes, ...] = ()


class Bucket(Protocol):
    async def read(self, key: str) -> Entry | None:
        """None if the key was never written. Raises FabricUnavailable."""

    async def write(self, key: str, value: bytes, revision: int) -> int:
        """Replaces the entry of `revision` (0: no entry) and returns the new revision.

        Raises Conflict or FabricBusy; on any other FabricUnavailable the write may still have happened.
        """

    async def scan(self, begin: str, most: int) -> tuple[dict[str, list[bytes]], bool]:
        """All parts of the keys that begin with these tokens, at most `most` parts, and whether these are all.

        Raises FabricUnavailable.
        """


@dataclass(slots=True)
class _Known:
    """The parts of a key as of `newest`. values: by writer."""

    newest: Stored
    values: dict[str, bytes]


class NatsBucket:
    """A `Bucket` on the KV bucket `name`. Keys are subject tokens with dots between them.

    It caches the parts of a key and reads only what is newer: most reads take one round trip.
    """

    def __init__(self, connection: Connection, name: str) -> None:
        self._connection = connection
        self._stream = f"KV_{name}"
        self._subject = f"$KV.{name}"
        self._own = connection.credential.name
        self._known: dict[str, _Known] = {}

    async def read(self, key: str) -> Entry | None:
        self._check_connected()
        async with self._connection.mapped():
            known = await self._look(key)
        if known is None:
            return None
        others = tuple(value for writer, value in known.values.items() if writer != self._own)
        return Entry(known.values.get(self._own, b""), known.newest.sequence, known.newest.time, others)

    async def _look(self, key: str) -> _Known | None:
        every = f"{self._subject}.*.{key}"
        newest = await self._get(last_by_subj=every)
        if newest is None:
            return None
        known = self._known.pop(key, None)
        if known is None or not self._goes_on(known.newest, newest):
            known, at = _Known(newest, {}), 0
        else:
            at = known.newest.sequence
        while at < newest.sequence:
            part = await self._get(seq=at + 1, next_by_subj=every)
            if part is None or part.sequence >= newest.sequence:
                break
            known.values[_writer(part)], at = part.value, part.sequence
        known.values[_writer(newest)], known.newest = newest.value, newest
        if len(self._known) >= _MAX_KNOWN:
            self._known.clear()
        self._known[key] = known
        return known

    @staticmethod
    def _goes_on(before: Stored, newest: Stored) -> bool:
        """Whether this seems to be the same bucket as before. If not, what was drawn in the old one counts for a while: less is
        given out, never more.
        """
        if before.sequence == newest.sequence:
            return before == newest
        return before.sequence < newest.sequence

    async def _get(self, **asked: int | str) -> Stored | None:
        try:
            return await self._connection.stored(self._stream, asked, limit=ANSWER)
        except nats.js.errors.NotFoundError:
            return None

    async def write(self, key: str, value: bytes, revision: int) -> int:
        self._check_connected()
        async with self._connection.mapped():
            try:
                headers = {
                    Header.EXPECTED_LAST_SUBJECT_SEQUENCE.value: str(revision),
                    _COMPARED: f"{self._subject}.*.{key}",
                }
                subject = f"{self._subject}.{self._own}.{key}"
                ack = await self._connection.jetstream.publish(subject, value, headers=headers, timeout=ANSWER)
            except nats.js.errors.APIError as exc:
                if exc.err_code in CONFLICTS:
                    raise Conflict("the key was changed meanwhile") from exc
                raise
        return ack.seq

    async def scan(self, begin: str, most: int) -> tuple[dict[str, list[bytes]], bool]:
        self._check_connected()
        wanted, found, at = f"{self._subject}.*.{begin}>", dict[str, dict[str, bytes]](), 0
        async with self._connection.mapped():
            for _ in range(most):
                part = await self._get(seq=at + 1, next_by_subj=wanted)
                if part is None:
                    return {key: list(parts.values()) for key, parts in found.items()}, True
                found.setdefault(part.subject.split(".", 3)[3], {})[_writer(part)], at = part.value, part.sequence
        return {key: list(parts.values()) for key, parts in found.items()}, False

    def _check_connected(self) -> None:
        """The client would buffer a message until it reconnects, long after its caller gave up."""
        if not self._connection.connected:
            raise FabricUnavailable("not connected to NATS")


def _writer(part: Stored) -> str:
    """The name of the credential, from the subject."""
    return part.subject.split(".")[2]


async def dump(connection: Connection, name: str) -> dict[str, Entry]:
    """Every entry of a bucket, by whole key: with the credential's name in front if keys have parts. Needs the provisioner's
    rights. Raises FabricUnavailable.

    The keys come from the stream's leader. A watch may ask a replica that is behind, and would then report no keys and no
    error.
    """
    js, prefix = connection.jetstream, f"$KV.{name}."
    found: dict[str, Entry] = {}
    async with connection.mapped():
        try:
            info = await js.stream_info(f"KV_{name}", subjects_filter=f"{prefix}>")
        except nats.js.errors.NotFoundError as exc:
            raise FabricUnavailable(f"no bucket {name}: create it with `lacre up` or `lacre manifest publish`") from exc
        for subject in sorted(info.state.subjects or ()):
            with suppress(nats.js.errors.NotFoundError):
                said = await connection.stored(f"KV_{name}", {"last_by_subj": subject})
                found[subject.removeprefix(prefix)] = Entry(said.value, said.sequence, said.time)
    return found

"""A bucket that several processes share: values by key, each change a compare-and-set. Over NATS, and in memory for tests.

Rules:
- Over NATS each credential has a part of every key, which it alone writes: NATS holds that by the subject. A compare-and-set is
  of all parts of a key at once. So a credential that is stolen changes no part but its own.
- A write names the revision that it was decided on. `Conflict` is the server's word that the write did not happen.
- Any other failure of a write says nothing: it may have happened, or may still happen, for as long as the key has the revision
  that it named. Nothing is written again by itself.
- Times are the server's: processes whose clocks differ agree on them.
- Entries are read by JetStream's own API, which answers in JSON, from the stream's leader. What a direct get answers is the
  entry itself, headers and all, from any replica: who asks could have it sent to another process as what it is not.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Final, Protocol

import nats.js.errors
from nats.js.api import Header

from lacre_fabric.nats.connection import Connection, Stored
from lacre_fabric.work.contract import FabricError, FabricUnavailable

# JSStreamWrongLastSequenceErrF and its constant sister: the compare failed, so nothing was set.
CONFLICTS: Final = frozenset({10071, 10164})

_COMPARED: Final = "Nats-Expected-Last-Subject-Sequence-Subject"  # of which subjects the revision is the newest
ANSWER: Final = 1.0  # seconds: whoever waits for a budget has time for three tries
_MAX_KNOWN: Final = 4096  # keys of which the parts are kept


class Conflict(FabricError):
    """The key has another revision by now: the write did not happen. Read again."""


@dataclass(frozen=True, slots=True)
class Entry:
    """What stands under a key. value: what this credential wrote, or nothing. others: what each other one did.

    revision: to be named by the write that replaces it. time: of the newest write, seconds since the epoch.
    """

    value: bytes
    revision: int
    time: float
    others: tuple[bytes, ...] = ()


class Bucket(Protocol):
    async def read(self, key: str) -> Entry | None:
        """None where nothing was ever written. Raises FabricUnavailable."""

    async def write(self, key: str, value: bytes, revision: int) -> int:
        """Replaces the entry of `revision`, 0 for none, and returns the new revision.

        Raises Conflict, FabricBusy, or another FabricUnavailable: then it may have happened all the same.
        """


@dataclass(slots=True)
class _Known:
    """The parts of a key as they stood at `newest`. values: by who wrote them."""

    newest: Stored
    values: dict[str, bytes]


class NatsBucket:
    """A `Bucket` of the KV bucket `name`; keys are subjects' tokens, with dots between them.

    What it has read of a key it keeps, and reads on from there: most reads take one round trip.
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
        """Whether the bucket is still the one that was read before, as far as that can be told. Where it is not, what was drawn
        in the other one counts for a while: less is given out, never more.
        """  # fmt: skip
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

    def _check_connected(self) -> None:
        """The client would keep a message back until it is connected again, long after its caller gave up."""
        if not self._connection.connected:
            raise FabricUnavailable("not connected to NATS")


def _writer(part: Stored) -> str:
    """The name of the credential, which the subject says."""
    return part.subject.split(".")[2]


async def dump(connection: Connection, name: str) -> dict[str, Entry]:
    """Everything in a bucket, by the whole key: with the credential's name in front, where parts are. Needs the provisioner's
    rights. Raises FabricUnavailable.

    Its keys are the leader's word: a watch may be with a replica that is behind, and tells of no keys then, and of no error.
    """
    js, prefix = connection.jetstream, f"$KV.{name}."
    found: dict[str, Entry] = {}
    async with connection.mapped():
        try:
            info = await js.stream_info(f"KV_{name}", subjects_filter=f"{prefix}>")
        except nats.js.errors.NotFoundError as exc:
            raise FabricUnavailable(f"there is no bucket {name}: `lacre up` or `lacre manifest publish` makes it") from exc
        for subject in sorted(info.state.subjects or ()):
            with suppress(nats.js.errors.NotFoundError):
                said = await connection.stored(f"KV_{name}", {"last_by_subj": subject})
                found[subject.removeprefix(prefix)] = Entry(said.value, said.sequence, said.time)
    return found

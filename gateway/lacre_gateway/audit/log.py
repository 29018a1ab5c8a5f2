"""The audit log as the gateway uses it: it takes entries, and returns their place in the tree when they are durable.

Rules:
- One thread commits. It takes all waiting entries, commits them together (one sync, one signature), and then reports. The event
  loop never waits for a disk, and a commit never waits for tiles, which a second thread writes.
- A request waits for its intent before it is served. Nothing waits for an outcome, so it may share the next commit.
- Each commit costs a signature, a sync and several waits for the interpreter's lock. So commits keep a distance while several
  requests run, and requests share them. A single request never waits for others.
- If the log cannot be written, intents fail, and outcomes of recorded intents are kept until it can. The thread retries by
  itself, so that service returns without a restart.
- At a start, intents without an outcome from an earlier process first get the outcome `interrupted`.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from lacre.errors import LacreError, SettingsError
from lacre.evidence.audit_proof import AuditProof
from lacre.runtime import tasks
from lacre.runtime.records import record
from lacre_fabric.logs import Log
from lacre_gateway.audit import entries as kinds
from lacre_gateway.audit import open_requests, reserve, series
from lacre_gateway.audit.entries import Entry, Event, Intent, Outcome, encode
from lacre_gateway.audit.journal import MAX_GROUP
from lacre_gateway.audit.reader import LogReader
from lacre_gateway.audit.store import Committed, Publication, Store

_LINGER: Final = 0.02  # seconds that outcomes may wait for more entries; no request waits for them
DISTANCE: Final = 0.005  # seconds between the beginnings of two commits, at most: a worker takes longer to answer
_DISTANCE_EACH: Final = 0.0005  # of it, for each other running request
_CLOSE_LIMIT: Final = 30.0  # seconds for a disk to take the last entries; a busy disk takes some
_RETRY: Final = 1.0  # seconds between attempts to publish
_IDLE: Final = 1.0  # seconds without an entry, after which the tiles are updated, or a failed write is tried again
_PUBLISH_AFTER: Final = 1024  # entries; keeps the journal small and a restart quick
_MAX_WAITING: Final = MAX_GROUP // 2  # of one commit: each may bring an annex
_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT})
_OWN: Final = frozenset({kinds.RESUMED, kinds.STOPPED})  # written again at each attempt


class AuditUnavailable(LacreError):
    """The entry could not be recorded: no space, or the file is gone. Without a record nothing is served."""


@record(frozen=True, slots=True)
class Recorded:
    """The place of an entry; its proof is made when it is needed."""

    committed: Committed
    number: int

    def proof(self) -> AuditProof:
        return self.committed.proof(self.number)


@record(frozen=True, slots=True)
class _Waiting:
    entry: Entry
    data: tuple[bytes, ...]
    recorded: asyncio.Future[Recorded] | None


_Answer = tuple["asyncio.Future[Recorded] | None", "Recorded | AuditUnavailable"]


class AuditLog:
    """An open log. Made and used on the event loop; closed by `close`, which writes the waiting entries.

    writable: whether the last attempt to write succeeded. recorded_before: the newest time that an earlier process recorded, in
    seconds since the epoch; 0 if there was none.
    """

    def __init__(
        self,
        folder: Path,
        key: Ed25519PrivateKey,
        origin: str,
        *,
        others: Sequence[Ed25519PrivateKey] = (),
        log: Log,
        policy_set: str | None = None,
        clock: Callable[[], float] = time.time,
        observe: Callable[[float, int], None] = lambda _seconds, _entries: None,
        under_way: Callable[[], int] = lambda: 1,
    ) -> None:
        """Raises SettingsError if the log cannot be opened, or does not hold. origin: for a new log. others: keys that may have
        signed the log that is there.

        observe: gets each commit's seconds and entries (0 for a failed one), on the log's own thread. under_way: returns how
        many running requests a commit could wait for; called on the same thread.
        """
        self._observe = observe
        self._under_way = under_way
        self._store = Store(folder, key, origin, others)
        self._log = log
        self._clock = clock
        self._policy_set = policy_set
        self._open: dict[str, None] = {}
        self._owed: list[_Waiting] = []
        self._refused = 0
        self._publish_at = 0.0
        self._publishing: Future[Publication] | None = None
        self._tiles = ThreadPoolExecutor(1, "audit-tiles")
        # While one is due: who asked for it, and the next log's key if it is another one
        self._rotation: tuple[str | None, Ed25519PrivateKey | None] | None = None
        self.recorded_before = 0.0
        self.writable = True
        self._entries: deque[_Waiting] = deque()
        self._due = threading.Event()  # wakes the thread; an entry by itself does not, because that costs more than the entry
        self._lingering: asyncio.TimerHandle | None = None
        self._closing = False
        self._over = False  # the thread has ended, or is about to: what it has not taken by now, it never will
        self._next_commit = 0.0
        self._loop = asyncio.get_running_loop()
        try:
            try:
                self._resume(folder)
            except OSError as exc:
                if exc.errno not in _FULL or not reserve.give_up(folder):
                    raise
                self._resume(folder)
        except (OSError, LacreError) as exc:
            self._store.close()
            reason = exc.strerror if isinstance(exc, OSError) else exc
            raise SettingsError(
                f"audit: the log in {folder} cannot be written ({reason}): free space, or name another folder"
            ) from exc
        self._thread = tasks.thread("audit", self._run)

    def append(self, entry: Entry) -> asyncio.Future[Recorded]:
        """The future is done when the entry is durable; it fails with AuditUnavailable. It need not be awaited.

        Raises EntryTooLarge.
        """
        recorded: asyncio.Future[Recorded] = self._loop.create_future()
        self._take(_Waiting(entry, encode(entry), recorded))
        return recorded

    def note(self, outcome: Outcome) -> None:
        """As `append`, for an outcome whose place in the tree nobody asks for. Raises EntryTooLarge."""
        self._take(_Waiting(outcome, encode(outcome), None))

    def _take(self, waiting: _Waiting) -> None:
        self._entries.append(waiting)
        if self._over:
            self._refuse_rest()
        elif not isinstance(waiting.entry, Outcome):
            self._wake()
        elif self._lingering is None and not self._due.is_set():
            self._lingering = self._loop.call_later(_LINGER, self._lingered)

    def _wake(self) -> None:
        """Wakes the thread. The thread clears `_due` before it looks, so a later entry wakes it again."""
        if not self._due.is_set():
            self._due.set()

    def _lingered(self) -> None:
        """The timer is not stopped when an intent takes the outcomes along: a new one for each would cost more."""
        self._lingering = None
        if self._entries:
            self._wake()

    @property
    def size(self) -> int:
        """How many entries of the newest log are durable."""
        return self._store.size

    @property
    def origin(self) -> str:
        """Of the newest log. It changes when the log was rotated."""
        return self._store.origin

    @property
    def public(self) -> bytes:
        """The key of the newest log."""
        return self._store.public

    def rotate(self, actor: str | None = None, key: Ed25519PrivateKey | None = None) -> None:
        """Makes the thread begin a new log soon, which continues this one. It tries again while the disk refuses.

        key: signs the new log; default: the present one.
        """
        due = self._rotation
        self._rotation = (actor, key or (due[1] if due is not None else None))
        self._wake()

    async def close(self) -> None:
        """Waits until every entry so far is durable and the tiles are up to date; it gives up if the disk stands still."""
        self._closing = True
        self._wake()
        await asyncio.to_thread(self._thread.join, _CLOSE_LIMIT)

    def _resume(self, folder: Path) -> None:
        """Finishes what the last process left unfinished, and begins."""
        now = round(self._clock(), 3)
        opening: list[Entry] = []
        if self._store.torn:
            opening.append(Event(time=now, event=kinds.RECOVERED, count=self._store.torn))
        left = self._left_open(folder) if self._store.size else []
        if self._store.size:
            self.recorded_before = series.last_time(LogReader(self._store.folder, self._store.public))
        if self._store.ended:  # a crash came between the end of that log and the next one
            self._store.rotate(now, left)
        opening += [
            Outcome(
                request_id=name, time=now, outcome=kinds.INTERRUPTED, status=None, unreceipted=True, receipt=None,
                refused_receipt=None, prompt_tokens=None, cached_tokens=None, completion_tokens=None, duration=None,
            ) for name in left
        ]  # fmt: skip
        opening.append(Event(time=now, event=kinds.STARTED, policy_set=self._policy_set, count=len(left)))
        encoded = [encode(entry)[0] for entry in opening]
        for at in range(0, len(encoded), MAX_GROUP):
            self._store.commit(encoded[at : at + MAX_GROUP])
        self._store.published(self._store.publication(()).write())

    def _left_open(self, folder: Path) -> list[str]:
        """The requests whose intents have no outcome, starting from the last list of them on disk."""
        listed = self._store.still_open()
        if listed is None:
            return open_requests.since_the_start(folder, self._store.public)
        size, names = listed
        return open_requests.since(names, LogReader(self._store.folder, self._store.public).entries(size))

    def _run(self) -> None:
        try:
            closing = False
            while not closing:
                group, closing = self._next_group()
                self._record(group)
                idle = not group
                del group  # the requests' futures, with the whole commit: the next entry may take long to come
                self._publish(idle=idle)
                self._rotate()
            self._record([self._own(Event(time=self._now(), event=kinds.STOPPED))])
            self._publish(idle=True, wait=True)
        finally:
            self.writable, self._over = False, True
            self._refuse_rest()
            self._tiles.shutdown()
            self._store.close()

    def _next_group(self) -> tuple[list[_Waiting], bool]:
        """All waiting entries, up to a limit; none after a time; and whether the log is to end."""
        self._keep_distance()
        if not self._due.wait(None if self.writable and not self._store.unpublished and not self._rotation else _IDLE):
            return [], False
        closing = self._closing
        self._due.clear()
        group = [self._entries.popleft() for _ in range(min(len(self._entries), _MAX_WAITING))]
        if self._entries or (closing and group):
            self._due.set()
        return group, closing and not group

    def _keep_distance(self) -> None:
        """Lets entries collect. Before waiting for one: to wake this thread costs the event loop more than to append one."""
        while not self._closing and (wait := self._next_commit - time.monotonic()) > 0:
            time.sleep(wait)

    def _record(self, group: Sequence[_Waiting]) -> None:
        """Commits the group and the outcomes owed from before; reports the result to all."""
        if not self.writable:
            group = [self._own(Event(time=self._now(), event=kinds.RESUMED, count=self._refused)), *self._owed, *group]
        batch, unfounded = self._founded(group)
        self._answer(unfounded, AuditUnavailable("the intent of this outcome was not recorded"))
        if not batch:
            return
        began = time.monotonic()
        self._next_commit = began + min(DISTANCE, _DISTANCE_EACH * (self._under_way() - 1))
        try:
            if self._store.ended:
                self._store.rotate(self._now(), self._open)
                self._rotation = None
            committed = self._store.commit([data for waiting in batch for data in waiting.data])
        except OSError as exc:
            self._observe(time.monotonic() - began, 0)
            self._failed(batch, exc)
        except BaseException:
            self._answer(batch, AuditUnavailable("the audit log has failed"))
            raise
        else:
            self._observe(time.monotonic() - began, sum(len(waiting.data) for waiting in batch))
            self._succeeded(batch, committed)

    def _founded(self, group: Sequence[_Waiting]) -> tuple[list[_Waiting], list[_Waiting]]:
        """The entries that may be recorded, and the outcomes of intents that were not."""
        fresh: set[str] = set()
        batch: list[_Waiting] = []
        unfounded: list[_Waiting] = []
        for waiting in group:
            entry = waiting.entry
            if isinstance(entry, Intent):
                fresh.add(entry.request_id)
            if isinstance(entry, Outcome) and entry.request_id not in self._open and entry.request_id not in fresh:
                unfounded.append(waiting)
            else:
                batch.append(waiting)
        return batch, unfounded

    def _succeeded(self, batch: Sequence[_Waiting], committed: Committed) -> None:
        if not self.writable:
            self._log.info("audit log written again")
        self.writable, self._owed, self._refused = True, [], 0
        answers: list[_Answer] = []
        number = -1
        for waiting in batch:
            number += len(waiting.data)  # the annex has the first number
            if waiting.recorded is not None:
                answers.append((waiting.recorded, Recorded(committed, number)))
            if isinstance(waiting.entry, Intent):
                self._open[waiting.entry.request_id] = None
            elif isinstance(waiting.entry, Outcome):
                self._open.pop(waiting.entry.request_id, None)
        if answers:
            self._tell(answers)

    def _failed(self, batch: Sequence[_Waiting], error: OSError) -> None:
        """Refuses intents; keeps the outcomes of intents that are recorded."""
        if self.writable:
            self._log.error("audit log cannot be written", reason=error.strerror)
        self.writable = False
        refused = [waiting for waiting in batch if isinstance(waiting.entry, Intent)]
        self._refused += len(refused)
        self._owed = [
            waiting for waiting in batch
            if (isinstance(waiting.entry, Outcome) and waiting.entry.request_id in self._open)
            or (isinstance(waiting.entry, Event) and waiting.entry.event not in _OWN)
        ]  # fmt: skip
        kept = set(map(id, self._owed))
        self._answer(
            [waiting for waiting in batch if id(waiting) not in kept],
            AuditUnavailable(f"the audit log cannot be written: {error.strerror}"),
        )

    def _publish(self, *, idle: bool, wait: bool = False) -> None:
        """Starts writing the tiles, beside the commits. A failure does no harm: the journal holds everything until it
        succeeds.
        """
        if self._publishing is not None and (wait or self._publishing.done()):
            self._finish(self._publishing)
        if self._store.ended:
            return  # the rotation publishes
        due = self._store.unpublished > 0 if idle else self._store.unpublished >= _PUBLISH_AFTER
        if self._publishing is None and due and (wait or time.monotonic() >= self._publish_at):
            try:
                publication = self._store.publication(self._open)
            except OSError as exc:
                self._not_published(exc)
                return
            self._publishing = self._tiles.submit(publication.write)
            if wait:
                self._finish(self._publishing)

    def _rotate(self) -> None:
        """Begins a new log if one is due. No commit is under way, and afterwards no tiles are."""
        if self._rotation is None or not self.writable:
            return
        self._publish(idle=True, wait=True)
        try:
            self._store.rotate(self._now(), self._open, *self._rotation)
        except OSError as exc:
            self._log.warning("audit log cannot be rotated", reason=exc.strerror)
            return
        self._rotation = None
        self._log.info("audit log rotated", origin=self._store.origin)

    def _finish(self, publishing: Future[Publication]) -> None:
        self._publishing = None
        try:
            self._store.published(publishing.result())
        except OSError as exc:
            self._not_published(exc)

    def _not_published(self, error: OSError) -> None:
        self._log.warning("audit tiles cannot be written", reason=error.strerror)
        self._publish_at = time.monotonic() + _RETRY

    def _refuse_rest(self) -> None:
        """On either thread: an entry that comes while the other one ends is refused by one of them."""
        with contextlib.suppress(IndexError):
            while True:
                self._answer([self._entries.popleft()], AuditUnavailable("the audit log is closed"))

    def _own(self, event: Event) -> _Waiting:
        """An event of the log itself; nothing waits for it."""
        return _Waiting(event, encode(event), None)

    def _now(self) -> float:
        return round(self._clock(), 3)

    def _answer(self, group: Sequence[_Waiting], error: AuditUnavailable) -> None:
        self._tell([(waiting.recorded, error) for waiting in group])

    def _tell(self, answers: Sequence[_Answer]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed, and no task waits
            self._loop.call_soon_threadsafe(_settle, answers)


def _settle(answers: Sequence[_Answer]) -> None:
    for recorded, answer in answers:
        if recorded is None or recorded.done():  # the waiting task was cancelled
            continue
        if isinstance(answer, Recorded):
            recorded.set_result(answer)
        else:
            recorded.set_exception(answer)
            recorded.exception()  # so that nothing warns of one that no task awaits

"""The record of who was allowed what: JSON lines, one *intent* before a request is served and one *outcome* after it.

Rules:
- An entry holds the fields of its dataclass and no other. There is no field for content, a token or an exception's text.
- The caller of `append` may wait for its entry to be on disk; the gateway does so before the first byte of an answer leaves.
- One thread writes. It takes all entries that wait, writes them together, syncs once, and only then says so (group commit), so
  the event loop never waits for a disk.
- After a failed write the file is cut back to its last whole line; every entry of the failed group is reported as not recorded.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import queue
import threading
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import ClassVar, Final

from lacre.errors import LacreError, SettingsError

_MODE: Final = 0o600
# Entries of one group. A group of this size is far from delaying anyone: some 200 KiB.
_MAX_GROUP: Final = 512


class AuditUnavailable(LacreError):
    """The entry could not be recorded: no space, or the file is gone. Without a record nothing is served."""


@dataclass(frozen=True, slots=True)
class Intent:
    """What is about to be done, and for whom. time: seconds since the epoch. digest: hex SHA-256 of `hdr ‖ enc`."""

    kind: ClassVar[str] = "intent"

    request_id: str
    time: float
    subject: str
    tenant: str
    issuer: str
    pool: str
    model: str
    action: str
    shape: str
    kem: str
    max_tokens: int
    sealed_bytes: int
    digest: str
    decision: str
    policies: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Outcome:
    """How it ended. duration: seconds. Tokens are those of the receipt that settled it; None without one.
    refused_receipt: why the newest receipt was not that one.
    """

    kind: ClassVar[str] = "outcome"

    request_id: str
    time: float
    outcome: str
    status: int | None
    unreceipted: bool
    refused_receipt: str | None
    prompt_tokens: int | None
    cached_tokens: int | None
    completion_tokens: int | None
    duration: float


def encode(entry: Intent | Outcome) -> bytes:
    """One line of the record."""
    values = {"kind": entry.kind, **{field.name: getattr(entry, field.name) for field in fields(entry)}}
    return json.dumps(values, separators=(",", ":")).encode() + b"\n"


_Waiting = tuple[bytes, "asyncio.Future[None]"]


class AuditLog:
    """An open record. Made and used on the event loop; closed by `close`, which writes what still waits."""

    def __init__(self, path: Path) -> None:
        """Raises SettingsError where the file cannot be opened for appending."""
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, _MODE)
            os.fchmod(self._file, _MODE)
        except OSError as exc:
            raise SettingsError(f"audit: cannot open {path} ({exc.strerror}): name a file this user may write") from exc
        self._queue: queue.SimpleQueue[_Waiting | None] = queue.SimpleQueue()
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._run, name="audit", daemon=True)
        self._thread.start()

    def append(self, entry: Intent | Outcome) -> asyncio.Future[None]:
        """The future is done when the entry is on disk; it fails with AuditUnavailable. It need not be awaited."""
        recorded: asyncio.Future[None] = self._loop.create_future()
        recorded.add_done_callback(_retrieved)
        if self._thread.is_alive():
            self._queue.put((encode(entry), recorded))
        else:
            recorded.set_exception(AuditUnavailable("the audit record is closed"))
        return recorded

    async def close(self) -> None:
        """Waits until every entry so far is on disk."""
        self._queue.put(None)
        await asyncio.to_thread(self._thread.join)

    def _run(self) -> None:
        try:
            size = _end_line(self._file)
            closing = False
            while not closing:
                group, closing = self._next_group()
                if group:
                    size = self._record(group, size)
        finally:
            os.close(self._file)

    def _next_group(self) -> tuple[list[_Waiting], bool]:
        """All that waits, up to a limit; and whether the end was asked for."""
        group: list[_Waiting] = []
        item = self._queue.get()
        with contextlib.suppress(queue.Empty):
            while item is not None:
                group.append(item)
                if len(group) == _MAX_GROUP:
                    return group, False
                item = self._queue.get_nowait()
            return group, True
        return group, False

    def _record(self, group: Sequence[_Waiting], size: int) -> int:
        """Returns the size of the file after it."""
        data = b"".join(line for line, _ in group)
        error: AuditUnavailable | None = None
        try:
            _write_all(self._file, data)
            os.fdatasync(self._file)
            size += len(data)
        except OSError as exc:
            error = AuditUnavailable(f"the audit record cannot be written: {exc.strerror}")
            with contextlib.suppress(OSError):  # where cutting back fails too, the next start ends the torn line
                os.ftruncate(self._file, size)
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(_settle, [recorded for _, recorded in group], error)
        return size


def _settle(group: Sequence[asyncio.Future[None]], error: AuditUnavailable | None) -> None:
    for recorded in group:
        if recorded.done():  # its waiter was cancelled
            continue
        if error is None:
            recorded.set_result(None)
        else:
            recorded.set_exception(error)


def _retrieved(recorded: asyncio.Future[None]) -> None:
    """An outcome that nobody waits for must not warn when it is collected."""
    if not recorded.cancelled():
        recorded.exception()


def _write_all(file: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]


def _end_line(file: int) -> int:
    """Ends a line that a crash tore, so that the next entry stands on its own. Returns the size of the file."""
    size = os.lseek(file, 0, os.SEEK_END)
    if size and os.pread(file, 1, size - 1) != b"\n":
        _write_all(file, b"\n")
        size += 1
    return size

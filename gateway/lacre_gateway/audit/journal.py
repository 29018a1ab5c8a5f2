"""The journal: the entries and the signed checkpoint of each group commit since the tiles were last written.

    commit = entries length(4) ‖ note length(4) ‖ entries, as in a bundle ‖ note

While their tiles are being written, older commits are in `journal.old`, and new ones in `journal`.

Rules:
- A commit is appended in one write and synced; before that, no caller learns of it.
- After a failed write the file is cut back to its last whole commit.
- A crash leaves an unfinished commit at the end of the file: cut short, or with zeros for blocks that were never written. Any
  other fault was not a crash, and people must look at it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from lacre.errors import InvalidMessage
from lacre.evidence.checkpoints import MAX_NOTE
from lacre.runtime.private_files import sync_folder
from lacre_gateway.audit.tiles import decode_bundle, encode_bundle

NAME: Final = "journal"
OLD: Final = "journal.old"
_FLAGS: Final = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
_HEAD_BYTES: Final = 8
MAX_GROUP: Final = 512  # entries of one commit
_HOLE: Final = bytes(16)  # neither JSON nor the lengths around it have so many zeros in a row
# ends every commit, so none follows the damage of a crash
_SIGNATURE: Final = re.compile("\n\n— [!-~]+ [A-Za-z0-9+/=]{92}\n".encode())
_MAX_ENTRIES: Final = 2 * MAX_GROUP * (2 + 0xFFFF)  # bytes; a larger value is garbage


@dataclass(frozen=True, slots=True)
class Commit:
    """end: the offset in the file after it."""

    entries: list[bytes]
    note: bytes
    end: int


def commits(data: bytes) -> Iterator[Commit]:
    """The commits in order, up to the end or to the damage of a crash. Raises InvalidMessage for any other fault."""
    at = 0
    while (commit := _commit(data, at)) is not None:
        yield commit
        at = commit.end
    # A hole in the last commit may have spared its signature; no signature follows the damage of a crash.
    end = at + _HEAD_BYTES + int.from_bytes(data[at : at + 4]) + int.from_bytes(data[at + 4 : at + 8])
    if _SIGNATURE.search(data, at if end > len(data) else end):
        raise InvalidMessage("an unfinished commit, and another after it")


def whole(data: bytes) -> int:
    """The size of all whole commits in bytes. Raises InvalidMessage."""
    return max((commit.end for commit in commits(data)), default=0)


def _commit(data: bytes, at: int) -> Commit | None:
    """None at the end, and for an unfinished commit."""
    head = data[at : at + _HEAD_BYTES]
    entries, note = int.from_bytes(head[:4]), int.from_bytes(head[4:])
    middle, end = at + _HEAD_BYTES + entries, at + _HEAD_BYTES + entries + note
    if len(head) < _HEAD_BYTES or end > len(data) or _HOLE in data[at + _HEAD_BYTES : end] or not any(head):
        return None
    if entries > _MAX_ENTRIES or not 0 < note <= MAX_NOTE:
        raise InvalidMessage("a commit with an impossible length")
    return Commit(decode_bundle(data[at + _HEAD_BYTES : middle]), data[middle:end], end)


class Journal:
    """The open file, for its only writer. Methods raise OSError."""

    def __init__(self, folder: Path, size: int) -> None:
        """size: of its whole commits; the rest is cut off."""
        self._folder = folder
        self._file = os.open(folder / NAME, _FLAGS, 0o600)
        self._torn = False
        self.cut(size)

    def begin_anew(self) -> None:
        """Moves the present journal to `journal.old`; does nothing if there already is one."""
        if self._torn or (self._folder / OLD).exists():
            return
        fresh = self._folder / f".{NAME}.new"
        file = os.open(fresh, _FLAGS | os.O_TRUNC, 0o600)  # first, because it may fail; nothing has changed then
        (self._folder / NAME).rename(self._folder / OLD)
        fresh.rename(self._folder / NAME)
        os.close(self._file)
        self._file, self._size = file, 0
        sync_folder(self._folder)

    def drop_old(self) -> None:
        """The tiles hold the old commits now."""
        (self._folder / OLD).unlink(missing_ok=True)

    def cut(self, size: int) -> None:
        """Cuts the file to its first `size` bytes."""
        os.ftruncate(self._file, size)
        os.fdatasync(self._file)
        self._size, self._torn = size, False

    def append(self, entries: Sequence[bytes], note: bytes) -> None:
        """If it fails, the commit is not in the file, or is cut off before the next one is written."""
        bundle = encode_bundle(entries)
        data = len(bundle).to_bytes(4) + len(note).to_bytes(4) + bundle + note
        if self._torn:
            self.cut(self._size)
        try:
            _write_synced(self._file, data, self._size)
        except OSError:
            self._torn = True  # if cutting fails too
            self.cut(self._size)
            raise
        self._size += len(data)

    def close(self) -> None:
        os.close(self._file)


def _write_synced(handle: int, data: bytes, at: int) -> None:
    """`write` and `fdatasync` in one call: between two calls, the thread would have to wait again for the interpreter's
    lock.
    """
    view = memoryview(data)
    while view:
        written = os.pwritev(handle, [view], at, os.RWF_DSYNC)
        view, at = view[written:], at + written

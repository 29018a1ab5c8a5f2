"""The entries of all linked logs in order, each compared with its signed tree: what an export reads.

Rules:
- No entry is missing in silence. A log that is missing, altered, or erased without a record ends the reading.
- All logs must be one chain, from the newest to the oldest, before the first entry is read (`chain`).
- A log that retention erases before it was read ends the reading too: its entries are lost to the reader, and it must know.
"""

from __future__ import annotations

import json
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from lacre.errors import InvalidMessage, SettingsError
from lacre.evidence import checkpoints
from lacre.runtime.json_objects import parse_object
from lacre.runtime.private_files import replace
from lacre_gateway.audit import chain, series
from lacre_gateway.audit import entries as kinds
from lacre_gateway.audit.entries import parse
from lacre_gateway.audit.reader import CHECKPOINT, LogReader, Wrong, read_file

_POLL: Final = 0.5  # seconds between two looks for new entries
_MAX_CURSOR: Final = 4096  # bytes of the file
_TELLS_OF_ERASURE: Final = f'"{kinds.ERASED}"'.encode()  # in an entry that may record one; spares parsing the others


@dataclass(frozen=True, slots=True)
class Cursor:
    """Where an export continues: the next index of the log with this origin."""

    origin: str
    index: int

    @classmethod
    def load(cls, path: Path) -> Cursor | None:
        """None if there is no file yet. Raises SettingsError."""
        data = read_file(path, _MAX_CURSOR)
        if data is None:
            return None
        try:
            members = parse_object(data, "it")
            origin, index = members["origin"], members["index"]
        except (InvalidMessage, KeyError):
            origin, index = None, None
        if not isinstance(origin, str) or type(index) is not int or index < 0:
            raise SettingsError(f"{path} is not the cursor of an export: name another file, or remove it to export all again")
        return cls(origin, index)

    def save(self, path: Path) -> None:
        """Raises OSError."""
        replace(path, json.dumps({"origin": self.origin, "index": self.index}).encode())


@dataclass(frozen=True, slots=True)
class PlacedEntry:
    """An entry, and where it is."""

    origin: str
    index: int
    data: bytes


def read(
    root: Path, key: bytes | None, start: Cursor | None = None, *, follow: bool = False, alone: bool = False
) -> Iterator[PlacedEntry | None]:
    """The entries of all logs from the cursor on; None each time there are no more for now. Raises Wrong or SettingsError.

    key: as for `chain.parts`. alone: the first log may continue one that is not here.
    """
    parts = chain.parts(root, key)
    missing = chain.linked_by(parts[0].first)
    if missing is not None and not alone:
        raise SettingsError(f"{root} continues the log {missing}, which is not here: pass --alone to export it by itself")
    reading = _Reading(root, parts, *((1, 0) if start is None else _place_in(parts, root, start)))
    while True:
        yield from reading.rest()
        yield None
        if not follow:
            return
        time.sleep(_POLL)


def entries(root: Path, key: bytes | None = None) -> Iterator[bytes]:
    """Of all logs that were not erased, the oldest first. Raises as `read` does."""
    return (entry.data for entry in read(root, key, alone=True) if entry is not None)


def place_of(root: Path, key: bytes | None, start: Cursor) -> tuple[chain.LinkedLog, int]:
    """The log of the cursor, and the index there. Raises Wrong or SettingsError."""
    parts = chain.parts(root, key)
    number, index = _place_in(parts, root, start)
    return parts[number - 1], index


def _place_in(parts: Sequence[chain.LinkedLog], root: Path, start: Cursor) -> tuple[int, int]:
    for part in parts:
        last = part.checkpoint
        if last.origin == start.origin:
            if part.erased and start.index < last.size:
                raise _lost(last.origin, start.index, "remove the cursor to export all that is left")
            return part.number, start.index
    raise SettingsError(f"there is no log {start.origin} in {root}: remove the cursor to export all that is there")


def _lost(origin: str, index: int, remedy: str) -> SettingsError:
    return SettingsError(f"the log {origin} was erased before its entries from {index} on were exported: {remedy}")


@dataclass(slots=True)
class _Reading:
    """parts: all logs that were there at the last look. The newest of them may grow, and may have a successor now.

    number, at: the log and the index of the next entry. gone: how many logs were erased when the reading began. unrecorded: the
    newest erased log that was passed over, while its record is not read yet; origin and size. The gateway erases and records
    from the oldest on, so this one record vouches for the erasures before it, whose own records may be erased too.
    """

    root: Path
    parts: Sequence[chain.LinkedLog]
    number: int
    at: int
    gone: int = 0
    unrecorded: tuple[str, int] | None = None

    def __post_init__(self) -> None:
        self.gone = sum(part.erased for part in self.parts)

    def rest(self) -> Iterator[PlacedEntry]:
        """All entries that there are now."""
        while True:
            newer = series.newest(self.root) > self.number  # first: then the reading below sees the end of this log
            with series.named(self.number):
                note, ended = yield from self._log(self.parts[self.number - 1])
            if not newer and not ended:
                break
            if not newer and not series.appears(self.root, self.number + 1):
                raise Wrong(series.name(self.number + 1), series.MISSING)
            self._turn(note)
        if self.unrecorded is not None:
            raise Wrong(self.unrecorded[0], series.UNRECORDED)

    def _turn(self, note: bytes) -> None:
        """To the next log. note: the last checkpoint of this one."""
        if self.number == len(self.parts):
            parts = chain.parts(self.root, self.parts[-1].key)
            with series.named(self.number):
                _check_same(parts[self.number - 1].note, note)
            self.parts = parts
        self.number, self.at = self.number + 1, 0

    def _log(self, part: chain.LinkedLog) -> Generator[PlacedEntry, None, tuple[bytes, bool]]:
        """Returns the newest checkpoint, and whether another log continues this one."""
        try:
            if series.erased(part.folder) is not None:
                return self._pass(part), True
            reader = LogReader(part.folder, part.key)
            if self.number < len(self.parts):
                _check_same(reader.note, part.note)
            if reader.size < self.at:
                raise Wrong(CHECKPOINT, f"the log was rolled back: {self.at} entries were exported, and it has {reader.size}")
            for index, data in enumerate(reader.entries(self.at), self.at):
                self._look(data)
                self.at = index + 1
                yield PlacedEntry(reader.checkpoint.origin, index, data)
        except Wrong:
            if series.erased(part.folder) is None:
                raise
            return self._pass(part), True  # retention was faster
        return reader.note, chain.has_ended(reader.last)

    def _pass(self, part: chain.LinkedLog) -> bytes:
        """An erased log. Raises SettingsError if it was there when the reading began."""
        proof = series.remains(part.folder, part.key)
        note = b"" if proof is None else proof.checkpoint
        if self.number < len(self.parts):
            _check_same(note, part.note)
        last = checkpoints.parse(note)
        if part.number > self.gone and self.at < last.size:
            raise _lost(last.origin, self.at, "export all that is left without a cursor, and export more often")
        if self.at > last.size:
            raise Wrong(CHECKPOINT, f"the log was rolled back: {self.at} entries were exported, and it had {last.size}")
        self.unrecorded = last.origin, last.size
        return note

    def _look(self, data: bytes) -> None:
        if self.unrecorded is not None and _TELLS_OF_ERASURE in data:
            members = parse(data)
            if members.get("event") == kinds.ERASED and self.unrecorded == (members["target"], members["count"]):
                self.unrecorded = None


def _check_same(found: bytes, known: bytes) -> None:
    """Raises Wrong if these checkpoints of one log differ."""
    if found != known:
        raise Wrong(CHECKPOINT, "it is not the one that the next log links")

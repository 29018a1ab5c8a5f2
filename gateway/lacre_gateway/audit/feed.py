"""The entries of all linked logs in order, each compared with its signed tree: what an export reads.

Rules:
- No entry is missing in silence. A log that is missing, altered, or erased without a record ends the reading.
- Each log but the first must begin with the last checkpoint of the log before.
- A log that retention erases before it was read ends the reading too: its entries are lost to the reader, and it must know.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from lacre.errors import InvalidMessage, SettingsError
from lacre.evidence import checkpoints
from lacre.runtime.json_objects import parse_object
from lacre.runtime.private_files import replace
from lacre_gateway.audit import entries as kinds
from lacre_gateway.audit import series
from lacre_gateway.audit.entries import LogLink, parse
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


def read(root: Path, key: bytes | None, start: Cursor | None = None, *, follow: bool = False) -> Iterator[PlacedEntry | None]:
    """The entries of all logs from the cursor on; None each time there are no more for now. Raises Wrong or SettingsError."""
    reading = _Reading(root, key, *((1, 0) if start is None else place_of(root, key, start)))
    while True:
        yield from reading.rest()
        yield None
        if not follow:
            return
        time.sleep(_POLL)


def place_of(root: Path, key: bytes | None, start: Cursor) -> tuple[int, int]:
    """The log of the cursor, and the index there. Raises Wrong or SettingsError."""
    for number in range(1, series.newest(root) + 1):
        folder = series.place(root, number)
        with series.named(number):
            own = series.vouched_key(root, number, key)
            note = series.remains(folder, own)
            last = LogReader(folder, own).checkpoint if note is None else checkpoints.parse(note)
        if last.origin == start.origin:
            if note is not None and start.index < last.size:
                raise _lost(last.origin, start.index, "remove the cursor to export all that is left")
            return number, start.index
    raise SettingsError(f"there is no log {start.origin} in {root}: remove the cursor to export all that is there")


def _lost(origin: str, index: int, remedy: str) -> SettingsError:
    return SettingsError(f"the log {origin} was erased before its entries from {index} on were exported: {remedy}")


@dataclass(slots=True)
class _Reading:
    """number, at: the log and the index of the next entry. before: the last checkpoint of the log before, if it was read.

    gone: the logs that were erased when the reading began. unrecorded: those of them whose record is not read yet.
    """

    root: Path
    key: bytes | None
    number: int
    at: int
    before: bytes | None = None
    gone: frozenset[int] = frozenset()
    unrecorded: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.gone = frozenset(range(1, series.newest(self.root) + 1)) - frozenset(series.kept(self.root))

    def rest(self) -> Iterator[PlacedEntry]:
        """All entries that there are now."""
        while True:
            newer = series.newest(self.root) > self.number  # first: then the reading below sees the end of this log
            with series.named(self.number):
                yield from self._log(series.place(self.root, self.number))
            if not newer:
                break
            self.number, self.at = self.number + 1, 0
        if self.unrecorded:
            raise Wrong(next(iter(self.unrecorded)), "it was erased, and no later log has recorded that")

    def _log(self, folder: Path) -> Iterator[PlacedEntry]:
        key = series.vouched_key(self.root, self.number, self.key)
        note = series.remains(folder, key)
        if note is not None:
            self._pass(checkpoints.parse(note), note)
            return
        reader = LogReader(folder, key)
        if reader.size < self.at:
            raise Wrong(CHECKPOINT, f"the log was rolled back: {self.at} entries were exported, and it has {reader.size}")
        try:
            for index, data in enumerate(reader.proven(self.at), self.at):
                self._look(index, data)
                self.at = index + 1
                yield PlacedEntry(reader.checkpoint.origin, index, data)
        except Wrong:
            note = series.remains(folder, key)
            if note is None:
                raise
            self._pass(checkpoints.parse(note), note)  # retention was faster
        self.before = reader.note

    def _pass(self, last: checkpoints.Checkpoint, note: bytes) -> None:
        """An erased log. Raises SettingsError if it was there when the reading began."""
        if self.number not in self.gone and self.at < last.size:
            raise _lost(last.origin, self.at, "export all that is left without a cursor, and export more often")
        self.unrecorded[last.origin] = last.size
        self.before = note

    def _look(self, index: int, data: bytes) -> None:
        if index == 0 and self.number > 1:
            members = parse(data)
            linked = members["kind"] == LogLink.kind and self.before in (None, str(members["checkpoint"]).encode())
            if not linked:
                raise Wrong("entry 0", "it is no link to the last checkpoint of the log before")
        if self.unrecorded and _TELLS_OF_ERASURE in data:
            members = parse(data)
            if members.get("event") == kinds.ERASED and self.unrecorded.get(str(members["target"])) == members["count"]:
                del self.unrecorded[str(members["target"])]

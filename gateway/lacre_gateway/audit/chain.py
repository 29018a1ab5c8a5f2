"""Which logs of a folder belong together. All of them are checked before anyone reads an entry.

Rules:
- The first entry of a log holds the last checkpoint of the log before. So nobody can put another log in an old one's place.
- The last entry of a log names the next log, and its key if that is another one. Of an erased log this entry is gone. Then only
  a later log that the known key signed vouches for the next key.
- A file `key` is believed only as far as these entries go.
- The newest log is read first, because retention erases from the oldest on. So no erased log is seen after a kept one while a
  gateway runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from lacre.errors import InvalidMessage, LacreError
from lacre.evidence import checkpoints
from lacre.evidence.checkpoints import Checkpoint
from lacre_gateway.audit import entries as kinds
from lacre_gateway.audit import series
from lacre_gateway.audit.entries import LogLink, parse
from lacre_gateway.audit.reader import CHECKPOINT, KEY, LogReader, Wrong
from lacre_gateway.audit.story import next_key

NO_LINK: Final = "it is no link to the last checkpoint of the log before"
OUT_OF_TURN: Final = "the log was erased, and an older one was not"


@dataclass(frozen=True, slots=True)
class LinkedLog:
    """One log of a chain. note: its last checkpoint; of the newest log, the newest one when it was read.

    first, last: its entries of these places, which are in the signed tree. last: None if the log was erased.
    """

    number: int
    folder: Path
    key: bytes
    note: bytes
    first: bytes
    last: bytes | None

    @property
    def checkpoint(self) -> Checkpoint:
        return checkpoints.parse(self.note)

    @property
    def erased(self) -> bool:
        return self.last is None

    def reader(self) -> LogReader:
        """Of a log that another one continues: in the state that the other one links. Raises Wrong or SettingsError."""
        reader = LogReader(self.folder, self.key)
        if reader.note != self.note:
            raise Wrong(CHECKPOINT, "it is not the one that the next log links")
        return reader


def parts(root: Path, known: bytes | None) -> tuple[LinkedLog, ...]:
    """All logs, the oldest first. Raises Wrong or SettingsError if one does not belong to the others.

    known: a key of the gateway. None: then the logs only agree with each other.
    """
    found: list[LinkedLog] = []
    keys = series.keys(root, known)
    for number in range(len(keys), 0, -1):
        with series.named(number):
            part = _part(root, number, keys[number - 1])
        if found:
            with series.named(number + 1):
                _check_joined(part, found[-1], vouched=known is None or known in keys[number:])
        elif part.erased:
            raise Wrong(part.checkpoint.origin, series.UNRECORDED)
        found.append(part)
    return tuple(found[::-1])


def readers(root: Path, known: bytes | None) -> list[LogReader]:
    """Of each log that was not erased, the oldest first. known: as for `parts`. Raises Wrong or SettingsError."""
    *old, newest = parts(root, known)
    kept = [part.reader() for part in old if not part.erased]
    return [*kept, LogReader(newest.folder, newest.key)]


def linked_by(first: bytes) -> str | None:
    """The origin of the log that a first entry links; None if it links none. Raises Wrong."""
    link = _members(first, "entry 0")
    if link["kind"] != LogLink.kind:
        return None
    try:
        return checkpoints.parse(str(link["checkpoint"]).encode()).origin
    except LacreError as exc:
        raise Wrong("entry 0", str(exc)) from exc


def _part(root: Path, number: int, key: bytes) -> LinkedLog:
    folder = series.place(root, number)
    try:
        return _erased(folder, number, key) or _kept(folder, number, key)
    except Wrong:
        part = _erased(folder, number, key)  # retention may have been faster
        if part is None:
            raise
        return part


def _erased(folder: Path, number: int, key: bytes) -> LinkedLog | None:
    found = series.remains(folder, key)
    return None if found is None else LinkedLog(number, folder, key, found.checkpoint, found.entry, None)


def _kept(folder: Path, number: int, key: bytes) -> LinkedLog:
    reader = LogReader(folder, key)
    return LinkedLog(number, folder, key, reader.note, reader.entry(0), reader.last)


def _check_joined(before: LinkedLog, after: LinkedLog, *, vouched: bool) -> None:
    """Raises Wrong. vouched: whether the known key signed the later log, or one after it."""
    link = _members(after.first, "entry 0")
    if link["kind"] != LogLink.kind or str(link["checkpoint"]).encode() != before.note:
        raise Wrong("entry 0", NO_LINK)
    due = series.following(before.checkpoint.origin, before.number)
    if after.checkpoint.origin != due:
        raise Wrong(CHECKPOINT, f"its origin is {after.checkpoint.origin}, and {due} continues the log before")
    if after.erased and not before.erased:
        raise Wrong(series.PROOF, OUT_OF_TURN)
    if before.last is None:
        named = after.key if vouched else before.key
    else:
        end = _members(before.last, "the last entry of the log before")
        if (end.get("event"), end.get("target")) != (kinds.ROTATED, due):
            raise Wrong("entry 0", f"the log before does not end with the event that {due} continues it")
        named = _next_key(end) or before.key
    if after.key != named:
        raise Wrong(KEY, series.NOT_NAMED)


def has_ended(last: bytes) -> bool:
    """Whether this last entry says that another log continues. Raises Wrong."""
    return _members(last, "the last entry").get("event") == kinds.ROTATED


def _members(data: bytes, place: str) -> dict[str, Any]:
    try:
        return parse(data)
    except InvalidMessage as exc:
        raise Wrong(place, str(exc)) from exc


def _next_key(end: dict[str, Any]) -> bytes | None:
    try:
        return next_key(end)
    except InvalidMessage as exc:
        raise Wrong("the last entry of the log before", str(exc)) from exc
